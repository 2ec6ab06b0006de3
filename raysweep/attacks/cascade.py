"""The worst case over several attacks: each next one sees only the rows that the former left."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, Tag, field_validator
from torch import Tensor, nn

from raysweep.attacks.apgd import APGD
from raysweep.attacks.base import (
    AttackResult,
    VulnerabilityKind,
    freeze_model,
    maybe_tf32,
    true_class_margin,
)
from raysweep.attacks.fab import FAB
from raysweep.attacks.pgd import PGD
from raysweep.attacks.square import Square
from raysweep.rng import ExampleRng
from raysweep.spec import Spec


def attack_kind(value: Any) -> str:
    """Plain data without a `kind` is PGD."""
    return (
        str(value.get("kind", "pgd"))
        if isinstance(value, dict)
        else str(getattr(value, "kind", ""))
    )


SingleAttack = Annotated[
    Annotated[PGD, Tag("pgd")]
    | Annotated[APGD, Tag("apgd")]
    | Annotated[FAB, Tag("fab")]
    | Annotated[Square, Tag("square")],
    Discriminator(attack_kind),
]


@dataclass(frozen=True)
class CascadeResult(AttackResult):
    """robust_after: attack name -> (N,) bool, rows that every attack so far left right."""

    robust_after: Mapping[str, Tensor] = field(default_factory=dict)


class AttackCascade(Spec):
    """A cascade of named attacks. A name is also a stream of random numbers: the same attack twice
    is a restart.

    tf32: attacks compute convolutions and matrix products in TF32 (NVIDIA's GPUs); what counts as
    broken is decided in float32 all the same.
    """

    kind: Literal["worst_case"] = "worst_case"
    tf32: bool = False
    attacks: Annotated[dict[str, SingleAttack], Field(min_length=1)]

    @field_validator("attacks")
    @classmethod
    def _check_attack_names(cls, attacks: dict[str, SingleAttack]) -> dict[str, SingleAttack]:
        for name in attacks:
            if not re.fullmatch(r"[\w+.-]{1,64}", name) or name in ("clean", "robust"):
                raise ValueError(
                    f"{name!r} cannot name an attack: use letters, digits and _ + . -, but not 'clean' or 'robust'"
                )
        return attacks

    @property
    def vulnerability_kind(self) -> VulnerabilityKind:
        return "margin"

    @property
    def steps(self) -> int:
        """Of the longest attack."""
        return max(attack.steps for attack in self.attacks.values())

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng) -> CascadeResult:
        """x (N, C, H, W) in [0, 1], y (N,). Rows that hold out return the point of least margin
        found.
        """
        with freeze_model(model), torch.no_grad():
            least = true_class_margin(model(x), y)
            result, queries, robust_after = x.clone(), torch.ones_like(y), {}
            for name, attack in self.attacks.items():
                live = (least > 0).nonzero()[:, 0]
                if len(live):
                    with torch.enable_grad(), maybe_tf32(self.tf32):
                        found = attack(
                            model, x[live], y[live], rng.select_rows(live).derive_stream(name)
                        )
                    reached = true_class_margin(model(found.x_adv), y[live])
                    better = reached < least[live]
                    result[live[better]] = found.x_adv[better]
                    least[live] = torch.minimum(least[live], reached)
                    queries[live] += found.queries + 1
                robust_after[name] = least > 0
        return CascadeResult(result, queries, robust_after=robust_after)


def build_restart_cascade(attack: PGD, n_restarts: int, name: str = "pgd") -> AttackCascade:
    """`count` starts of one attack."""
    return AttackCascade(attacks={f"{name}-{i + 1}": attack for i in range(n_restarts)})
