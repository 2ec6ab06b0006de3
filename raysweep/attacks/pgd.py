"""Projected gradient descent in the forms that training and evaluation use: one loop, its settings."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from raysweep import losses
from raysweep.attacks.base import (
    AttackResult,
    Norm,
    VulnerabilityKind,
    check_eps_range,
    freeze_model,
    l2_norms,
    project_to_ball,
    steepest_ascent_direction,
    true_class_margin,
)
from raysweep.rng import ExampleRng
from raysweep.schedules import Number, Schedule, bounded, resolved_value
from raysweep.spec import Spec


class PGD(Spec):
    """PGD-K (G eq. 4), counting the geometry value kappa on the way (G alg. 1).

    loss: `ce`; `cw`, the margin loss -max(z_y - max_{i != y} z_i + confidence, 0) (L eq. 12); `kl`,
    KL(p(x) || p(x~)) (G alg. 4). start: `uniform` in the eps-ball; `gaussian`, x + 0.001 N(0, I),
    not clipped, as TRADES does; `natural`, x itself (L alg. 2-3). tau: a row stops `tau` steps
    after it is first misclassified (G alg. 3, FAT); null takes all K steps. mode: of the batch
    norms while attacking; as published, `eval`.
    """

    kind: Literal["pgd"] = "pgd"
    eps: Annotated[Schedule, bounded(0)] = 8 / 255
    step_size: Annotated[Schedule, bounded(0)] = 2 / 255
    steps: Annotated[int, Field(ge=1, le=10_000)] = 10
    loss: Literal["ce", "cw", "kl"] = "ce"
    norm: Norm = "Linf"
    start: Literal["natural", "uniform", "gaussian"] = "uniform"
    tau: Annotated[Schedule, bounded(0)] | None = None
    confidence: Annotated[Number, Field(ge=0)] = 50.0
    mode: Literal["eval", "train"] = "eval"

    _check_eps_range = model_validator(mode="after")(check_eps_range)

    @property
    def vulnerability_kind(self) -> VulnerabilityKind:
        """L eq. 8 for attacks that lower p_y, eq. 9 for those that raise another class."""
        return "margin" if self.loss == "cw" else "probability"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng) -> AttackResult:
        """x (N, C, H, W) in [0, 1], y (N,) int64; one forward a step serves kappa, tau and the
        gradient.
        """
        with freeze_model(model, self.mode):
            reference = _compute_natural_logits(model, x) if self.loss == "kl" else None
            return self._ascend_loss(model, x, y, self._sample_start(x, rng), reference)

    def _ascend_loss(
        self, model: nn.Module, x: Tensor, y: Tensor, x_start: Tensor, natural_logits: Tensor | None
    ) -> AttackResult:
        eps, step_size = resolved_value(self.eps), resolved_value(self.step_size)
        kappa = torch.zeros_like(y)
        queries = torch.zeros_like(y)
        result = x_start.clone() if self.tau is not None else x_start
        rows: Tensor | slice = slice(None)
        budget = None if self.tau is None else torch.full_like(y, int(resolved_value(self.tau)))
        for _ in range(self.steps):
            correct, grad = self._compute_gradient(model, x_start, y, natural_logits)
            kappa[rows] += correct
            queries[rows] += 1
            if budget is not None:
                going = (correct | (budget > 0)).nonzero()[:, 0]
                budget = (budget - (~correct).long())[going]
                rows = going if isinstance(rows, slice) else rows[going]
                if len(going) < len(x):
                    x, y, x_start, grad = x[going], y[going], x_start[going], grad[going]
                    natural_logits = natural_logits[going] if natural_logits is not None else None
                if not len(going):
                    break
            x_start = project_to_ball(
                x_start + step_size * steepest_ascent_direction(grad, self.norm), x, eps, self.norm
            )
            if budget is not None:
                result[rows] = x_start
        return AttackResult(result if budget is not None else x_start, queries, kappa)

    def _compute_gradient(
        self, model: nn.Module, x_adv: Tensor, y: Tensor, natural_logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Which rows are still right (N,), and the gradient of the attack's loss at x_adv."""
        x_adv = x_adv.detach().requires_grad_()
        logits = model(x_adv)
        if self.loss == "cw":
            loss = -(true_class_margin(logits, y) + self.confidence).clamp_min(0)
        elif natural_logits is not None:
            loss = losses.kl_divergence(logits, natural_logits, y)
        else:
            loss = losses.cross_entropy(logits, logits, y)
        (grad,) = torch.autograd.grad(loss.sum(), x_adv)
        return logits.detach().argmax(1) == y, grad

    def _sample_start(self, x: Tensor, rng: ExampleRng) -> Tensor:
        if self.start == "natural":
            return x
        shape = tuple(x.shape[1:])
        if self.start == "gaussian":
            return x + 0.001 * rng.normal(shape, x.dtype)
        if self.norm == "Linf":
            return (x + resolved_value(self.eps) * rng.symmetric_uniform(shape, x.dtype)).clamp(
                0, 1
            )
        direction = rng.normal(shape, x.dtype)
        radius = rng.derive_stream("radius").uniform((1, 1, 1), x.dtype) ** (1 / math.prod(shape))
        return (x + resolved_value(self.eps) * radius * direction / l2_norms(direction)).clamp(0, 1)


def _compute_natural_logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(x)
    # The next replay of a CUDA graph overwrites its output.
    return logits.clone()
