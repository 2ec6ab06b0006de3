"""The shortest perturbation that fools the model, found approximately: PGD, then bisection along
its direction.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from raysweep.attacks.base import AttackResult, Norm, VulnerabilityKind, freeze_model, l2_norms
from raysweep.attacks.pgd import PGD
from raysweep.rng import ExampleRng
from raysweep.schedules import Number, Schedule, bounded, resolved_value
from raysweep.spec import Spec


class MinimalPerturbation(Spec):
    """MMA's AN-PGD (Ding et al. 2020, alg. 1) up to the length `d_max`.

    PGD of radius d_max gives a direction; `bisections` halvings find where the prediction changes
    on it. A row that is misclassified already stays as it is, one that PGD cannot break keeps PGD's
    point. The authors remember each example's last length and start PGD there; this starts at d_max
    each time, so that an epoch depends on nothing but the weights. PGD's step is step_scale x d_max
    / steps.
    """

    kind: Literal["minimal"] = "minimal"
    d_max: Annotated[Schedule, bounded(0)] = 12 / 255
    steps: Annotated[int, Field(ge=1, le=10_000)] = 10
    step_scale: Annotated[Number, Field(gt=0)] = 2.5
    bisections: Annotated[int, Field(ge=1, le=60)] = 10
    loss: Literal["ce", "cw"] = "ce"
    norm: Norm = "Linf"
    start: Literal["natural", "uniform"] = "uniform"

    @property
    def vulnerability_kind(self) -> VulnerabilityKind:
        """As for PGD with the same loss."""
        return "margin" if self.loss == "cw" else "probability"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng) -> AttackResult:
        """x (N, C, H, W) in [0, 1], y (N,) int64; kappa is the length found in units of d_max /
        steps, rounded down.

        0 where the row is wrong without any perturbation, `steps` where no point within d_max is.
        """
        with freeze_model(model):
            right = _is_correct(model, x, y).nonzero()[:, 0]
            x_adv, kappa, queries = x.clone(), torch.zeros_like(y), torch.ones_like(y)
            if len(right):
                x_adv[right], kappa[right], spent = self._attack_correct_rows(
                    model, x[right], y[right], rng.select_rows(right)
                )
                queries[right] += spent
        return AttackResult(x_adv, queries, kappa)

    def _attack_correct_rows(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Points, kappa and queries for rows that the model has right."""
        d_max = resolved_value(self.d_max)
        pgd = PGD(
            eps=d_max,
            step_size=self.step_scale * d_max / self.steps,
            steps=self.steps,
            loss=self.loss,
            norm=self.norm,
            start=self.start,
        )
        delta = pgd(model, x, y, rng).x_adv - x
        kappa = torch.full_like(y, self.steps)
        queries = torch.full_like(y, self.steps + 1)
        found = (~_is_correct(model, x + delta, y)).nonzero()[:, 0]
        if len(found):
            fraction = self._bisect_delta(model, x[found], y[found], delta[found])
            delta[found] *= fraction
            length = (
                l2_norms(delta[found])
                if self.norm == "L2"
                else delta[found].abs().amax((1, 2, 3), keepdim=True)
            )
            kappa[found] = (length.flatten() / d_max * self.steps).long().clamp(max=self.steps - 1)
            queries[found] += self.bisections
        return x + delta, kappa, queries

    def _bisect_delta(self, model: nn.Module, x: Tensor, y: Tensor, delta: Tensor) -> Tensor:
        """Fraction of delta, (N, 1, 1, 1) in (0, 1], at which the row is wrong and a little below
        which it is right.
        """
        low, high = x.new_zeros(len(x), 1, 1, 1), x.new_ones(len(x), 1, 1, 1)
        for _ in range(self.bisections):
            middle = (low + high) / 2
            correct = _is_correct(model, x + middle * delta, y).view(-1, 1, 1, 1)
            low, high = torch.where(correct, middle, low), torch.where(correct, high, middle)
        return high


def _is_correct(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        right: Tensor = model(x).argmax(1) == y
    return right
