"""Instance weights: (Look) -> (N,), without gradient. A new reweighting is a class here and a line
in `Weight`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Discriminator, Field, model_validator
from torch import Tensor

from raysweep.attacks.base import VulnerabilityKind as VulnerabilityView
from raysweep.attacks.base import true_class_confidence, true_class_margin
from raysweep.schedules import Number, Schedule, bounded, resolved_value
from raysweep.spec import Spec


@dataclass(frozen=True)
class WeightInputs:
    """What a weight may look at: one view of the batch and what the terms before it decided.

    logits: (N, C) of the view, detached; y: (N,); kappa, steps: of the view's attack (kappa (N,),
    None on natural data); view: how vulnerability to that attack is measured; weights: those of the
    terms before, by name.
    """

    logits: Tensor
    y: Tensor
    kappa: Tensor | None = None
    attack_steps: int = 0
    vulnerability_kind: VulnerabilityView = "probability"
    earlier_weights: Mapping[str, Tensor] = field(default_factory=dict)


@cache
def _constant_tensor(device: torch.device, values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Constants that go to a device once: sending them there makes the host wait."""
    return torch.tensor(values, dtype=dtype, device=device)


class UniformWeight(Spec):
    """w = 1."""

    kind: Literal["uniform"] = "uniform"

    def __call__(self, inputs: WeightInputs) -> Tensor:
        return torch.ones_like(inputs.y, dtype=inputs.logits.dtype)


class _ModelDependentWeight(Spec):
    """Settings of a weight that depends on the model.

    by: the attack whose kappa or logits decide; null is the view that the term itself looks at.
    normalise: divide by the mean over the global batch (G alg. 2), so that the mean weight is 1.
    """

    by: str | None = None
    normalise: bool = True


class _BurnInWeight(_ModelDependentWeight):
    """A reweighting that starts late.

    burn_in: w = 1 in the first `burn_in` epochs, exactly: the settings of such an epoch are those
    of `Uniform`.
    """

    burn_in: Annotated[int, Field(ge=0)] = 0

    def resolve_at(self, epoch: int) -> Self:
        if epoch < self.burn_in:
            return UniformWeight()  # type: ignore[return-value]
        return super().resolve_at(epoch).replace(burn_in=0)


class GeometryWeight(_BurnInWeight):
    """GAIRAT's w(kappa), non-increasing in the geometry value kappa in 0..K.

    shape: `tanh`, (1 + tanh(lam + 5 (1 - 2 kappa / K))) / 2 (G eq. 6); `linear`, 1 - kappa / (K +
    1) (eq. 7); `sigmoid`, sigma(lam + 5 (1 - 2 kappa / K)) (eq. 8); `piecewise`, `table[kappa]`
    (the yellow line of G fig. 4), its last entry standing for every larger kappa. lam = inf gives w
    = 1: adversarial training. official: the authors' code instead of the paper, (h - kappa) / h
    with h = floor(K / 2), which differs for odd K.
    """

    kind: Literal["geometry"] = "geometry"
    shape: Literal["tanh", "linear", "sigmoid", "piecewise"] = "tanh"
    lam: Annotated[Schedule, bounded(-30)] = 0.0
    table: tuple[Annotated[float, Field(ge=0)], ...] = ()
    official: bool = False

    @model_validator(mode="after")
    def _check_table(self) -> Self:
        if (self.shape == "piecewise") != bool(self.table):
            raise ValueError("`table` goes with shape `piecewise`, and only with it")
        if any(a < b for a, b in zip(self.table, self.table[1:], strict=False)):
            raise ValueError(
                "`table` must not increase: a larger kappa never weighs more (G section 3.2)"
            )
        return self

    def __call__(self, inputs: WeightInputs) -> Tensor:
        if inputs.kappa is None:
            raise TypeError("geometry weights need a view that is an attack's output")
        kappa = inputs.kappa.to(inputs.logits.dtype)
        if self.shape == "linear":
            return 1 - kappa / (inputs.attack_steps + 1)
        if self.shape == "piecewise":
            return _constant_tensor(kappa.device, self.table, kappa.dtype)[
                inputs.kappa.clamp(max=len(self.table) - 1)
            ]
        half = inputs.attack_steps // 2 if self.official else inputs.attack_steps / 2
        if not half:
            raise TypeError(
                "the official geometry weights need an attack of 2 steps or more: they divide by floor(K / 2)"
            )
        argument = resolved_value(self.lam) + 5 * (half - kappa) / half
        # (1 + tanh(a)) / 2 = sigma(2 a), which does not saturate to an all-zero batch when lam is
        # very negative.
        return torch.sigmoid(2 * argument if self.shape == "tanh" else argument)


class VulnerabilityWeight(_ModelDependentWeight):
    """LRAT's g(V) = alpha (1 - V)^beta (L eq. 7-10); V is p_y or the probability margin, as the
    attack says.

    Not normalised by itself: LRAT divides by the mean weight of the whole pair (eq. 17), see
    `Method.normalise`.
    """

    kind: Literal["vulnerability"] = "vulnerability"
    alpha: Annotated[Schedule, bounded(0)] = 2.0
    beta: Annotated[Schedule, bounded(0)] = 0.5
    normalise: bool = False

    def __call__(self, inputs: WeightInputs) -> Tensor:
        return resolved_value(self.alpha) * (
            1 - true_class_confidence(inputs.logits, inputs.y, inputs.vulnerability_kind)
        ).clamp_min(0) ** resolved_value(self.beta)


class ProbabilisticMarginWeight(_BurnInWeight):
    """MAIL's scale x sigma(slope (PM + bias)), PM = max_{j != y} p_j - p_y in [-1, 1] (Wang et al.
    2021).

    Large where another class is as likely as the true one. Here PM's sign is that of the authors'
    code; the paper has slope and bias as gamma and -beta. The code has scale 3 and does not
    normalise, the paper normalises.
    """

    kind: Literal["margin"] = "margin"
    slope: Annotated[Schedule, bounded(0)] = 10.0
    bias: Schedule = -0.5
    scale: Annotated[Number, Field(gt=0)] = 1.0

    def __call__(self, inputs: WeightInputs) -> Tensor:
        return self.scale * torch.sigmoid(
            resolved_value(self.slope)
            * (resolved_value(self.bias) - true_class_margin(F.softmax(inputs.logits, 1), inputs.y))
        )


class WithinMarginWeight(Spec):
    """1 where the view's attack fooled the model on its way (kappa < K), else 0: MMA's d < d_max
    (Ding et al. 2020).
    """

    kind: Literal["within_margin"] = "within_margin"
    by: str | None = None

    def __call__(self, inputs: WeightInputs) -> Tensor:
        if inputs.kappa is None:
            raise TypeError("within_margin weights need a view that is an attack's output")
        return (inputs.kappa < inputs.attack_steps).to(inputs.logits.dtype)


class RemainderWeight(Spec):
    """[total - sum of the weights of the terms `of`]_+: LRAT's lower bound C (L eq. 5), GAIR-RST's
    1 - w (G eq. 13).
    """

    kind: Literal["remainder"] = "remainder"
    total: Annotated[Schedule, bounded(0)]
    of: Annotated[tuple[str, ...], Field(min_length=1)]

    def __call__(self, inputs: WeightInputs) -> Tensor:
        return (
            resolved_value(self.total) - sum(inputs.earlier_weights[name] for name in self.of)
        ).clamp_min(0)  # type: ignore[union-attr]


AnyWeight = Annotated[
    UniformWeight
    | GeometryWeight
    | VulnerabilityWeight
    | ProbabilisticMarginWeight
    | WithinMarginWeight
    | RemainderWeight,
    Discriminator("kind"),
]
