"""Attack cascade: several attacks in a row, each on the rows that no earlier attack broke."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from raysweep.attacks.apgd import APGD
from raysweep.attacks.base import (
    AttackResult,
    VulnerabilityKind,
    freeze_model,
    maybe_tf32,
    true_class_margin,
)
from raysweep.attacks.fab import FAB
from raysweep.attacks.multi_targeted import MultiTargeted
from raysweep.attacks.pgd import PGD
from raysweep.attacks.square import Square
from raysweep.lazy_modules import torch
from raysweep.rng import ExampleRng
from raysweep.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor, nn


def attack_kind(value: Any) -> str:
    """Return the `kind` of an attack, by which pydantic chooses the class.

    Args:
        value: An attack spec, or plain data; a mapping without `kind` is PGD.

    Returns:
        The kind; "" if `value` is neither.
    """
    if isinstance(value, dict):
        return str(value.get("kind", "pgd"))
    return str(getattr(value, "kind", ""))


SingleAttack = Annotated[
    Annotated[PGD, Tag("pgd")]
    | Annotated[APGD, Tag("apgd")]
    | Annotated[MultiTargeted, Tag("multi-targeted")]
    | Annotated[FAB, Tag("fab")]
    | Annotated[Square, Tag("square")],
    Discriminator(attack_kind),
]


@dataclass(frozen=True)
class CascadeResult(AttackResult):
    """Result of a cascade.

    Attributes:
        robust_after: Attack name -> rows (N,) bool that no attack up to this one broke.
    """

    robust_after: Mapping[str, Tensor] = field(default_factory=dict)


class AttackCascade(Spec):
    """Named attacks in order; each attacks only the rows that no earlier attack broke.

    The random numbers of an attack depend on its name. The same attack under another name is
    therefore a restart.
    """

    kind: Literal["worst_case"] = "worst_case"
    """Selects this attack."""

    tf32: bool = False
    """Compute convolutions and matrix products of the attacks in TF32, on NVIDIA GPUs. Whether a
    row is broken is still decided in float32."""

    attacks: Annotated[dict[str, SingleAttack], Field(min_length=1)]
    """Name -> attack, in order. A name has at most 64 letters, digits and `_ + . -`."""

    @field_validator("attacks")
    @classmethod
    def _check_attack_names(cls, attacks: dict[str, SingleAttack]) -> dict[str, SingleAttack]:
        """Reject names that metric names and files cannot contain."""
        for name in attacks:
            if not re.fullmatch(r"[\w+.-]{1,64}", name) or name in ("clean", "robust"):
                raise ValueError(
                    f"{name!r} cannot name an attack: use letters, digits and _ + . -, "
                    "but not 'clean' or 'robust'"
                )
        return attacks

    @property
    def vulnerability_kind(self) -> VulnerabilityKind:
        """Always `margin`."""
        return "margin"

    @property
    def steps(self) -> int:
        """Largest number of steps of an attack in the cascade."""
        return max(attack.steps for attack in self.attacks.values())

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng) -> CascadeResult:
        """Run the attacks on a batch; see `Attack` for the arguments.

        Returns:
            For each row the image of smallest margin that any attack returned, and after each
            attack the rows that are not broken yet.
        """
        with freeze_model(model), torch.no_grad():
            margin = true_class_margin(model(x), y)
            x_adv, queries, robust_after = x.clone(), torch.ones_like(y), {}
            for name, attack in self.attacks.items():
                live_rows = (margin > 0).nonzero()[:, 0]
                if len(live_rows):
                    stream = rng.select_rows(live_rows).derive_stream(name)
                    with torch.enable_grad(), maybe_tf32(self.tf32):
                        result = attack(model, x[live_rows], y[live_rows], stream)
                    new_margin = true_class_margin(model(result.x_adv), y[live_rows])
                    improved = new_margin < margin[live_rows]
                    x_adv[live_rows[improved]] = result.x_adv[improved]
                    margin[live_rows] = torch.minimum(margin[live_rows], new_margin)
                    queries[live_rows] += result.queries + 1
                robust_after[name] = margin > 0
        return CascadeResult(x_adv, queries, robust_after=robust_after)


def build_restart_cascade(attack: PGD, n_restarts: int, name: str = "pgd") -> AttackCascade:
    """Return a cascade of `n_restarts` random starts of one attack.

    Args:
        attack: The attack to restart.
        n_restarts: Number of starts, at least 1.
        name: Prefix of the attack names: the starts are called `name-1`, `name-2`, ...

    Returns:
        The cascade.
    """
    return AttackCascade(attacks={f"{name}-{i + 1}": attack for i in range(n_restarts)})
