"""Attacks. A new one is a file here and a line in `AnyAttack`."""

from typing import Annotated

from pydantic import Field

from raysweep.attacks.base import Adversarial, Attack, frozen, margin, vulnerability
from raysweep.attacks.minimal import Minimal
from raysweep.attacks.pgd import PGD

AnyAttack = Annotated[PGD | Minimal, Field(discriminator="kind")]

__all__ = ["PGD", "Adversarial", "AnyAttack", "Attack", "Minimal", "frozen", "margin", "vulnerability"]
