"""Attacks. A new one is a file here and a line in `AnyAttack`."""

from raysweep.attacks.base import Adversarial, Attack, frozen, margin, vulnerability
from raysweep.attacks.pgd import PGD

AnyAttack = PGD

__all__ = ["PGD", "Adversarial", "AnyAttack", "Attack", "frozen", "margin", "vulnerability"]
