"""The worst case over several attacks: each next one sees only the rows that the former left."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, Tag, field_validator
from torch import Tensor, nn

from raysweep.attacks.apgd import APGD
from raysweep.attacks.base import Adversarial, View, frozen, margin, tf32_if
from raysweep.attacks.fab import FAB
from raysweep.attacks.pgd import PGD
from raysweep.attacks.square import Square
from raysweep.rng import Rng
from raysweep.spec import Spec


def kind_of(value: Any) -> str:
    """Plain data without a `kind` is PGD."""
    return str(value.get("kind", "pgd")) if isinstance(value, dict) else str(getattr(value, "kind", ""))


SingleAttack = Annotated[
    Annotated[PGD, Tag("pgd")]
    | Annotated[APGD, Tag("apgd")]
    | Annotated[FAB, Tag("fab")]
    | Annotated[Square, Tag("square")],
    Discriminator(kind_of),
]


@dataclass(frozen=True)
class Cascade(Adversarial):
    """robust_after: attack name -> (N,) bool, rows that every attack so far left right."""

    robust_after: Mapping[str, Tensor] = field(default_factory=dict)


class WorstCase(Spec):
    """A cascade of named attacks. A name is also a stream of random numbers: the same attack twice is a restart.

    tf32: attacks compute convolutions and matrix products in TF32 (NVIDIA's GPUs); what counts as broken is decided in
    float32 all the same.
    """

    kind: Literal["worst_case"] = "worst_case"
    tf32: bool = False
    attacks: Annotated[dict[str, SingleAttack], Field(min_length=1)]

    @field_validator("attacks")
    @classmethod
    def _plain_names(cls, named: dict[str, SingleAttack]) -> dict[str, SingleAttack]:
        for name in named:
            if not re.fullmatch(r"[\w+.-]{1,64}", name) or name in ("clean", "robust"):
                raise ValueError(
                    f"{name!r} cannot name an attack: use letters, digits and _ + . -, but not 'clean' or 'robust'"
                )
        return named

    @property
    def view(self) -> View:
        return "margin"

    @property
    def steps(self) -> int:
        """Of the longest attack."""
        return max(attack.steps for attack in self.attacks.values())

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: Rng) -> Cascade:
        """x (N, C, H, W) in [0, 1], y (N,). Rows that hold out return the point of least margin found."""
        with frozen(model), torch.no_grad():
            least = margin(model(x), y)
            result, queries, robust_after = x.clone(), torch.ones_like(y), {}
            for name, attack in self.attacks.items():
                live = (least > 0).nonzero()[:, 0]
                if len(live):
                    with torch.enable_grad(), tf32_if(self.tf32):
                        found = attack(model, x[live], y[live], rng.rows(live).stream(name))
                    reached = margin(model(found.x), y[live])
                    better = reached < least[live]
                    result[live[better]] = found.x[better]
                    least[live] = torch.minimum(least[live], reached)
                    queries[live] += found.queries + 1
                robust_after[name] = least > 0
        return Cascade(result, queries, robust_after=robust_after)


def restarts(attack: PGD, count: int, name: str = "pgd") -> WorstCase:
    """`count` starts of one attack."""
    return WorstCase(attacks={f"{name}-{i + 1}": attack for i in range(count)})
