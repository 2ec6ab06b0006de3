"""Instance weights: callables (WeightInputs) -> weights (N,), at least 0 and without gradient.

To add a reweighting, write a spec class with a field `kind` and a method `__call__`, and list it in
`AnyWeight`. A base class below adds the fields that the training loop reads: `by` (input of the
weight), `normalise` (divide by the mean), `burn_in` (first epochs with weight 1). "G eq." and
"L eq." cite the papers of GAIRAT and LRAT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Discriminator, Field, model_validator

from raysweep.attacks.base import VulnerabilityKind, true_class_confidence
from raysweep.lazy_modules import torch
from raysweep.schedules import Number, Schedule, bounded, resolved_value
from raysweep.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class WeightInputs:
    """Arguments of a weight: model outputs for one input of a term, and weights of earlier terms.

    Attributes:
        logits: Logits of the input, (N, classes), without gradient.
        y: True labels, (N,) int64.
        kappa: Geometry values of the attack that made the input, (N,) int64 in 0..attack_steps
            (G alg. 1). None for natural images and for attacks that do not count it.
        attack_steps: Number of steps K of that attack; 0 for natural images.
        vulnerability_kind: Formula of the vulnerability V to that attack (L eq. 8-9).
        earlier_weights: Term name -> weights (N,) of the terms before this one.
    """

    logits: Tensor
    y: Tensor
    kappa: Tensor | None = None
    attack_steps: int = 0
    vulnerability_kind: VulnerabilityKind = "probability"
    earlier_weights: Mapping[str, Tensor] = field(default_factory=dict)


@cache
def _constant_tensor(device: torch.device, values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Return constants on a device. Cached, because each copy to a GPU makes the host wait."""
    return torch.tensor(values, dtype=dtype, device=device)


class UniformWeight(Spec):
    """Weight 1 for every example."""

    kind: Literal["uniform"] = "uniform"
    """Selects this weight; the default of a term."""

    def __call__(self, inputs: WeightInputs) -> Tensor:
        """Return ones, (N,)."""
        return torch.ones_like(inputs.y, dtype=inputs.logits.dtype)


class _ModelDependentWeight(Spec):
    """Base class of weights that depend on the model's output."""

    by: str | None = None
    """Input whose logits or kappa decide the weight: `natural` or the name of an attack. Null means
    the first input of the term itself."""

    normalise: bool = True
    """Divide by the mean over the global batch, so that the mean weight is 1 (G alg. 2)."""


class _BurnInWeight(_ModelDependentWeight):
    """Base class of weights that are 1 during the first epochs."""

    burn_in: Annotated[int, Field(ge=0)] = 0
    """Number of first epochs in which every weight is exactly 1."""

    def resolve_at(self, epoch: int) -> Self:
        """Return the spec at an epoch (0-based): `UniformWeight` during the burn-in."""
        if epoch < self.burn_in:
            return UniformWeight()  # type: ignore[return-value]
        return super().resolve_at(epoch).replace(burn_in=0)


class GeometryWeight(_BurnInWeight):
    """GAIRAT's weight w(kappa), which does not increase with the geometry value kappa in 0..K."""

    kind: Literal["geometry"] = "geometry"
    """Selects this weight."""

    shape: Literal["tanh", "linear", "sigmoid", "piecewise"] = "tanh"
    """Form of w: `tanh`, (1 + tanh(lam + 5 (1 - 2 kappa / K))) / 2 (G eq. 6); `linear`,
    1 - kappa / (K + 1) (G eq. 7); `sigmoid`, sigma(lam + 5 (1 - 2 kappa / K)) (G eq. 8);
    `piecewise`, `table[kappa]` (the yellow line of G fig. 4)."""

    lam: Annotated[Schedule, bounded(-30)] = 0.0
    """lambda of `tanh` and `sigmoid`, at least -30; inf gives w = 1, adversarial training."""

    table: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Weights of `piecewise` for kappa = 0, 1, 2, ...; they must not increase. If kappa is larger
    than the table, the last weight is used."""

    official: bool = False
    """Replace 1 - 2 kappa / K by (h - kappa) / h with h = floor(K / 2), as in the authors' code.
    This differs for odd K."""

    @model_validator(mode="after")
    def _check_table(self) -> Self:
        """Reject a table that is missing, unused or increasing."""
        if (self.shape == "piecewise") != bool(self.table):
            raise ValueError("set `table` if and only if `shape` is `piecewise`")
        if any(a < b for a, b in zip(self.table, self.table[1:], strict=False)):
            raise ValueError(
                "`table` must not increase: a larger kappa never weighs more (G section 3.2)"
            )
        return self

    def __call__(self, inputs: WeightInputs) -> Tensor:
        """Return w(kappa), (N,) in [0, 1] except for `piecewise`.

        Raises:
            TypeError: If the inputs have no kappa, or `official` is true and K < 2.
        """
        if inputs.kappa is None:
            raise TypeError("geometry weights need the kappa of an attack")
        kappa = inputs.kappa.to(inputs.logits.dtype)
        if self.shape == "linear":
            return 1 - kappa / (inputs.attack_steps + 1)
        if self.shape == "piecewise":
            table = _constant_tensor(kappa.device, self.table, kappa.dtype)
            return table[inputs.kappa.clamp(max=len(self.table) - 1)]
        half = inputs.attack_steps // 2 if self.official else inputs.attack_steps / 2
        if not half:
            raise TypeError(
                "official geometry weights divide by floor(K / 2): "
                "the attack needs at least 2 steps"
            )
        argument = resolved_value(self.lam) + 5 * (half - kappa) / half
        # (1 + tanh(a)) / 2 = sigma(2 a). For a very negative lambda the left side would round to 0
        # for all rows of a batch; the right side does not.
        return torch.sigmoid(2 * argument if self.shape == "tanh" else argument)


class VulnerabilityWeight(_ModelDependentWeight):
    """LRAT's weight g(V) = alpha (1 - V)^beta (L eq. 7, 10).

    V is p_y (L eq. 8) or the margin of the probabilities (L eq. 9), depending on the attack's
    `vulnerability_kind`.
    """

    kind: Literal["vulnerability"] = "vulnerability"
    """Selects this weight."""

    alpha: Annotated[Schedule, bounded(0)] = 2.0
    """Factor alpha, at least 0 (L eq. 10)."""

    beta: Annotated[Schedule, bounded(0)] = 0.5
    """Exponent beta, at least 0 (L eq. 10)."""

    normalise: bool = False
    """Divide by the mean over the global batch. LRAT does not normalise a single term, but divides
    by the mean of the summed weights of all terms (L eq. 17): see `normalise` of the method."""

    def __call__(self, inputs: WeightInputs) -> Tensor:
        """Return g(V), (N,), at least 0."""
        v = true_class_confidence(inputs.logits, inputs.y, inputs.vulnerability_kind)
        return resolved_value(self.alpha) * (1 - v).clamp_min(0) ** resolved_value(self.beta)


class ProbabilisticMarginWeight(_BurnInWeight):
    """MAIL's weight scale x sigma(slope (PM + bias)) (Wang et al. 2021).

    The probabilistic margin PM = max_{j != y} p_j - p_y in [-1, 1] has the sign of the authors'
    code: it is large where the model favours a wrong class. The paper writes gamma for the slope
    and -beta for the bias.
    """

    kind: Literal["margin"] = "margin"
    """Selects this weight."""

    slope: Annotated[Schedule, bounded(0)] = 10.0
    """Slope of the sigmoid, at least 0."""

    bias: Schedule = -0.5
    """Number that is added to PM, of any sign."""

    scale: Annotated[Number, Field(gt=0)] = 1.0
    """Factor of the weight, greater than 0. It has no effect if `normalise` is true, as in the
    paper. The authors' code uses 3 and does not normalise."""

    def __call__(self, inputs: WeightInputs) -> Tensor:
        """Return the weights, (N,) in (0, scale)."""
        margin = true_class_confidence(inputs.logits, inputs.y, "margin")
        argument = resolved_value(self.slope) * (resolved_value(self.bias) - margin)
        return self.scale * torch.sigmoid(argument)


class WithinMarginWeight(Spec):
    """Weight 1 if the attack found a misclassified image (kappa < K), else 0.

    This is MMA's condition d < d_max (Ding et al. 2020).
    """

    kind: Literal["within_margin"] = "within_margin"
    """Selects this weight."""

    by: str | None = None
    """Name of the attack whose kappa decides the weight; null means the first input of the term
    itself."""

    def __call__(self, inputs: WeightInputs) -> Tensor:
        """Return 0 or 1, (N,).

        Raises:
            TypeError: If the inputs have no kappa.
        """
        if inputs.kappa is None:
            raise TypeError("within_margin weights need the kappa of an attack")
        return (inputs.kappa < inputs.attack_steps).to(inputs.logits.dtype)


class RemainderWeight(Spec):
    """Weight [total - sum of the weights of other terms]_+.

    Used for LRAT's lower bound C (L eq. 5) and GAIR-RST's weight 1 - w (G eq. 13).
    """

    kind: Literal["remainder"] = "remainder"
    """Selects this weight."""

    total: Annotated[Schedule, bounded(0)]
    """Number from which the other weights are subtracted, at least 0."""

    of: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of terms before this one, whose weights are subtracted."""

    def __call__(self, inputs: WeightInputs) -> Tensor:
        """Return the remainders, (N,), at least 0."""
        weight_sum = sum(inputs.earlier_weights[name] for name in self.of)
        return (resolved_value(self.total) - weight_sum).clamp_min(0)  # type: ignore[union-attr]


AnyWeight = Annotated[
    UniformWeight
    | GeometryWeight
    | VulnerabilityWeight
    | ProbabilisticMarginWeight
    | WithinMarginWeight
    | RemainderWeight,
    Discriminator("kind"),
]
