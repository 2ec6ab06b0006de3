"""Approximation of the shortest perturbation that changes the prediction: PGD, then bisection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from raysweep.attacks.base import (
    AttackResult,
    Norm,
    VulnerabilityKind,
    broadcast_rows,
    freeze_model,
    l2_norms,
    soft_logit_margin,
)
from raysweep.attacks.pgd import PGD
from raysweep.lazy_modules import torch
from raysweep.rng import ExampleRng
from raysweep.schedules import Number, Schedule, bounded, resolved_value
from raysweep.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor, nn


class MinimalPerturbation(Spec):
    """AN-PGD of MMA (Ding et al. 2020, alg. 1), for perturbations up to the length `d_max`.

    PGD of radius `search_factor` x d_max gives a direction; bisection along it finds where the
    prediction changes. A row that is misclassified without perturbation is unchanged; a row that
    PGD does not break gets PGD's last iterate. The authors start PGD with the radius that they
    found for the example in the previous epoch. Here the radius is always the same, so that the
    result of an epoch depends only on the model's weights.
    """

    later_fields: ClassVar[frozenset[str]] = frozenset({"search_factor"})

    kind: Literal["minimal"] = "minimal"
    """Selects this attack."""

    d_max: Annotated[Schedule, bounded(0)] = 12 / 255
    """Length in pixel values from which a perturbation counts as not found."""

    search_factor: Annotated[Number, Field(ge=1)] = 1.0
    """Radius of PGD in units of `d_max`, at least 1. MMA's code has 1.05: an image that breaks just
    beyond d_max has kappa = steps, and so weight 0, like one that does not break."""

    steps: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Steps of PGD."""

    step_scale: Annotated[Number, Field(gt=0)] = 2.5
    """Step size of PGD in units of its radius / steps."""

    bisections: Annotated[int, Field(ge=1, le=60)] = 10
    """Number of bisection steps; each halves the interval that contains the shortest length."""

    loss: Literal["ce", "cw", "slm"] = "ce"
    """Loss of PGD: `ce`, cross-entropy; `cw`, margin of the logits; `slm`, the soft logit margin of
    MMA's code. With `slm` a row counts as misclassified where that loss is at least 0, that is
    where the probability of the true class is at most 1/2, as in MMA's code."""

    norm: Norm = "Linf"
    """Norm that measures the length."""

    start: Literal["natural", "uniform"] = "uniform"
    """Start of PGD: `natural`, the image; `uniform`, a random point of the ball."""

    @property
    def vulnerability_kind(self) -> VulnerabilityKind:
        """`margin` for the loss `cw`, `probability` for `ce`, as for PGD."""
        return "margin" if self.loss == "cw" else "probability"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng) -> AttackResult:
        """Attack a batch; see `Attack` for the arguments.

        Returns:
            The nearest misclassified images found. kappa is the length of the perturbation in units
            of d_max / steps, rounded down: 0 for a row that is misclassified without perturbation,
            `steps` for a row that the attack did not break or broke only at d_max or beyond.
        """
        with freeze_model(model):
            correct_rows = self._is_correct(model, x, y).nonzero()[:, 0]
            x_adv, kappa, queries = x.clone(), torch.zeros_like(y), torch.ones_like(y)
            if len(correct_rows):
                x_adv[correct_rows], kappa[correct_rows], n_queries = self._attack_correct_rows(
                    model, x[correct_rows], y[correct_rows], rng.select_rows(correct_rows)
                )
                queries[correct_rows] += n_queries
        return AttackResult(x_adv, queries, kappa)

    def _attack_correct_rows(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return images, kappa and queries of rows that the model classifies correctly."""
        d_max = resolved_value(self.d_max)
        radius = self.search_factor * d_max
        pgd = PGD(
            eps=radius,
            step_size=self.step_scale * radius / self.steps,
            steps=self.steps,
            loss=self.loss,
            norm=self.norm,
            start=self.start,
        )
        delta = pgd(model, x, y, rng).x_adv - x
        kappa = torch.full_like(y, self.steps)
        queries = torch.full_like(y, self.steps + 1)
        broken_rows = (~self._is_correct(model, x + delta, y)).nonzero()[:, 0]
        if len(broken_rows):
            delta[broken_rows] *= self._bisect_delta(
                model, x[broken_rows], y[broken_rows], delta[broken_rows]
            )
            if self.norm == "L2":
                lengths = l2_norms(delta[broken_rows])
            else:
                lengths = delta[broken_rows].abs().amax((1, 2, 3), keepdim=True)
            steps_to_boundary = (lengths.flatten() / d_max * self.steps).long()
            # Without a margin for the search, a length of d_max is a matter of rounding.
            max_kappa = self.steps if self.search_factor > 1 else self.steps - 1
            kappa[broken_rows] = steps_to_boundary.clamp(max=max_kappa)
            queries[broken_rows] += self.bisections
        return x + delta, kappa, queries

    def _bisect_delta(self, model: nn.Module, x: Tensor, y: Tensor, delta: Tensor) -> Tensor:
        """Return a fraction of delta, (N, 1, 1, 1) in (0, 1], at which the row is misclassified.

        A slightly smaller fraction is classified correctly.
        """
        low, high = x.new_zeros(len(x), 1, 1, 1), x.new_ones(len(x), 1, 1, 1)
        for _ in range(self.bisections):
            middle = (low + high) / 2
            is_correct = broadcast_rows(self._is_correct(model, x + middle * delta, y))
            low = torch.where(is_correct, middle, low)
            high = torch.where(is_correct, high, middle)
        return high

    def _is_correct(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return whether each row counts as correctly classified, (N,) bool; see `loss`."""
        with torch.no_grad():
            logits = model(x)
            is_correct: Tensor = logits.argmax(1) == y
            return soft_logit_margin(logits, y) < 0 if self.loss == "slm" else is_correct
