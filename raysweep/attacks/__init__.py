"""Attacks. A new one is a file here and a line in `AnyAttack`, and in `SingleAttack` if cascades may have it."""

from typing import Annotated

from pydantic import Discriminator, Tag

from raysweep.attacks.apgd import APGD
from raysweep.attacks.autoattack import ATTACKS, Version, autoattack, custom, preset
from raysweep.attacks.base import Adversarial, Attack, Norm, float32_as, frozen, margin, tf32_if, vulnerability
from raysweep.attacks.fab import FAB
from raysweep.attacks.minimal import Minimal
from raysweep.attacks.pgd import PGD
from raysweep.attacks.square import Square
from raysweep.attacks.worst_case import Cascade, SingleAttack, WorstCase, kind_of, restarts

AnyAttack = Annotated[
    Annotated[PGD, Tag("pgd")]
    | Annotated[Minimal, Tag("minimal")]
    | Annotated[APGD, Tag("apgd")]
    | Annotated[FAB, Tag("fab")]
    | Annotated[Square, Tag("square")]
    | Annotated[WorstCase, Tag("worst_case")],
    Discriminator(kind_of),
]

__all__ = [
    "APGD",
    "ATTACKS",
    "FAB",
    "PGD",
    "Adversarial",
    "AnyAttack",
    "Attack",
    "Cascade",
    "Minimal",
    "Norm",
    "SingleAttack",
    "Square",
    "Version",
    "WorstCase",
    "autoattack",
    "custom",
    "float32_as",
    "frozen",
    "margin",
    "preset",
    "restarts",
    "tf32_if",
    "vulnerability",
]
