"""Attacks that search adversarial images.

To add an attack, write a module with a class that follows the protocol `Attack`. List the class in
`AnyAttack`, and in `SingleAttack` if a cascade may contain it.
"""

from typing import Annotated

from pydantic import Discriminator, Tag

from raysweep.attacks.apgd import APGD
from raysweep.attacks.base import (
    Attack,
    AttackResult,
    Norm,
    fp32_precision,
    freeze_model,
    maybe_tf32,
    restore_mode,
    set_mode,
    true_class_confidence,
    true_class_margin,
)
from raysweep.attacks.cascade import (
    AttackCascade,
    CascadeResult,
    SingleAttack,
    attack_kind,
    build_restart_cascade,
)
from raysweep.attacks.fab import FAB
from raysweep.attacks.minimal_perturbation import MinimalPerturbation
from raysweep.attacks.multi_targeted import MultiTargeted
from raysweep.attacks.named_attacks import (
    ATTACK_DESCRIPTIONS,
    AutoAttackVersion,
    autoattack,
    build_custom_cascade,
    build_named_attack,
    objective_attacks,
)
from raysweep.attacks.pgd import PGD
from raysweep.attacks.square import Square

AnyAttack = Annotated[
    Annotated[PGD, Tag("pgd")]
    | Annotated[MinimalPerturbation, Tag("minimal")]
    | Annotated[APGD, Tag("apgd")]
    | Annotated[MultiTargeted, Tag("multi-targeted")]
    | Annotated[FAB, Tag("fab")]
    | Annotated[Square, Tag("square")]
    | Annotated[AttackCascade, Tag("worst_case")],
    Discriminator(attack_kind),
]

__all__ = [
    "APGD",
    "ATTACK_DESCRIPTIONS",
    "FAB",
    "PGD",
    "AnyAttack",
    "Attack",
    "AttackCascade",
    "AttackResult",
    "AutoAttackVersion",
    "CascadeResult",
    "MinimalPerturbation",
    "MultiTargeted",
    "Norm",
    "SingleAttack",
    "Square",
    "autoattack",
    "build_custom_cascade",
    "build_named_attack",
    "build_restart_cascade",
    "fp32_precision",
    "freeze_model",
    "maybe_tf32",
    "objective_attacks",
    "restore_mode",
    "set_mode",
    "true_class_confidence",
    "true_class_margin",
]
