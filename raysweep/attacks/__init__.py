"""Attacks. A new one is a file here and a line in `SingleAttack`."""

from typing import Annotated

from pydantic import Field

from raysweep.attacks.apgd import APGD
from raysweep.attacks.autoattack import PRESETS, Version, autoattack, custom, preset
from raysweep.attacks.base import Adversarial, Attack, Norm, frozen, margin, vulnerability
from raysweep.attacks.fab import FAB
from raysweep.attacks.pgd import PGD
from raysweep.attacks.square import Square
from raysweep.attacks.worst_case import Cascade, SingleAttack, WorstCase, restarts

AnyAttack = Annotated[PGD | APGD | FAB | Square | WorstCase, Field(discriminator="kind")]

__all__ = [
    "APGD",
    "FAB",
    "PGD",
    "PRESETS",
    "Adversarial",
    "AnyAttack",
    "Attack",
    "Cascade",
    "Norm",
    "SingleAttack",
    "Square",
    "Version",
    "WorstCase",
    "autoattack",
    "custom",
    "frozen",
    "margin",
    "preset",
    "restarts",
    "vulnerability",
]
