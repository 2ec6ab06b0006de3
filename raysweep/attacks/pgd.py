"""Projected gradient descent, in the forms that training and evaluation use."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from raysweep import losses
from raysweep.attacks.base import (
    AttackResult,
    Norm,
    VulnerabilityKind,
    check_eps_range,
    freeze_model,
    l2_norms,
    project_to_ball,
    soft_logit_margin,
    steepest_ascent_direction,
    true_class_margin,
)
from raysweep.attacks.step_size import EpsMultiple, StepSize, resolve_step_size
from raysweep.lazy_modules import torch
from raysweep.rng import ExampleRng
from raysweep.schedules import Number, Schedule, bounded, resolved_value
from raysweep.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor, nn


class PGD(Spec):
    """PGD with K steps (G eq. 4).

    It counts the geometry value kappa (G alg. 1): the number of iterates that the model classifies
    correctly.
    """

    kind: Literal["pgd"] = "pgd"
    """Selects this attack; the default of an attack without `kind`."""

    eps: Annotated[Schedule, bounded(0)] = 8 / 255
    """Radius of the ball around the image, in pixel values; at most 1 for Linf."""

    step_size: StepSize = 2 / 255
    """Length of a step, in pixel values, or in units of eps: `eps/4`, `0.25 eps`. To reach every
    point of the ball, `steps` times this length should be more than eps."""

    steps: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Number of steps K."""

    loss: Literal["ce", "cw", "kl", "slm"] = "ce"
    """Loss to maximise: `ce`, cross-entropy (L eq. 11); `cw`, the bounded margin
    -max(z_y - max_{i != y} z_i + confidence, 0) (L eq. 12); `kl`, KL(p(x) || p(x~)) (G alg. 4);
    `slm`, the soft logit margin log sum_{i != y} exp(z_i) - z_y (MMA)."""

    norm: Norm = "Linf"
    """Norm of the ball and of a step."""

    start: Literal["natural", "uniform", "gaussian"] = "uniform"
    """First iterate: `natural`, the image (L alg. 2-3); `uniform`, a random point of the ball;
    `gaussian`, x + 0.001 N(0, I) without clipping, as in TRADES."""

    tau: Annotated[Schedule, bounded(0)] | None = None
    """Number of steps that a row takes from misclassified iterates before it stops (FAT, G alg. 3).
    Null: rows do not stop early."""

    confidence: Annotated[Number, Field(ge=0)] = 50.0
    """The loss `cw` is constant where another logit exceeds z_y by at least this number."""

    mode: Literal["eval", "train"] = "eval"
    """Mode of the model during the attack; the papers use `eval`."""

    _check_eps_range = model_validator(mode="after")(check_eps_range)

    @property
    def vulnerability_kind(self) -> VulnerabilityKind:
        """`margin` (L eq. 9) for the loss `cw`, `probability` (L eq. 8) for the others."""
        return "margin" if self.loss == "cw" else "probability"

    def resolve_at(self, epoch: int) -> Self:
        """Return the attack at an epoch (0-based), also with its step size as a number."""
        resolved = super().resolve_at(epoch)
        if not isinstance(resolved.step_size, EpsMultiple):
            return resolved
        step_size = resolve_step_size(resolved.step_size, resolved_value(resolved.eps))
        return resolved.model_copy(update={"step_size": step_size})

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng) -> AttackResult:
        """Attack a batch; see `Attack` for the arguments.

        Returns:
            The last iterate of each row, and kappa in 0..steps.
        """
        with freeze_model(model, self.mode):
            natural_logits = _compute_natural_logits(model, x) if self.loss == "kl" else None
            return self._ascend_loss(model, x, y, self._sample_start(x, rng), natural_logits)

    def _ascend_loss(
        self, model: nn.Module, x: Tensor, y: Tensor, x_start: Tensor, natural_logits: Tensor | None
    ) -> AttackResult:
        """Take all steps. One forward pass per step gives kappa, the rows to stop, the gradient."""
        eps = resolved_value(self.eps)
        step_size = resolve_step_size(self.step_size, eps)
        kappa, queries = torch.zeros_like(y), torch.zeros_like(y)
        x_adv = x_start
        # Without tau, x_adv has all rows until the end. With tau, `result_x` has the images of all
        # rows; `rows` and `budget` belong to the rows that have not stopped: their positions, and
        # the number of steps that they may still take from misclassified iterates.
        result_x = x_start.clone() if self.tau is not None else x_start
        rows: Tensor | slice = slice(None)
        budget = None if self.tau is None else torch.full_like(y, int(resolved_value(self.tau)))
        for _ in range(self.steps):
            is_correct, grad = self._compute_gradient(model, x_adv, y, natural_logits)
            kappa[rows] += is_correct
            queries[rows] += 1
            if budget is not None:
                live_rows = (is_correct | (budget > 0)).nonzero()[:, 0]
                budget = (budget - (~is_correct).long())[live_rows]
                rows = live_rows if isinstance(rows, slice) else rows[live_rows]
                if len(live_rows) < len(x):
                    x, y = x[live_rows], y[live_rows]
                    x_adv, grad = x_adv[live_rows], grad[live_rows]
                    if natural_logits is not None:
                        natural_logits = natural_logits[live_rows]
                if not len(live_rows):
                    break
            direction = steepest_ascent_direction(grad, self.norm)
            x_adv = project_to_ball(x_adv + step_size * direction, x, eps, self.norm)
            if budget is not None:
                result_x[rows] = x_adv
        return AttackResult(result_x if budget is not None else x_adv, queries, kappa)

    def _compute_gradient(
        self, model: nn.Module, x_adv: Tensor, y: Tensor, natural_logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return whether rows are correct (N,) bool, and the gradient of the loss (N, C, H, W)."""
        with torch.enable_grad():
            x_adv = x_adv.detach().requires_grad_()
            logits = model(x_adv)
            if self.loss == "cw":
                loss = -(true_class_margin(logits, y) + self.confidence).clamp_min(0)
            elif self.loss == "slm":
                loss = soft_logit_margin(logits, y)
            elif natural_logits is not None:
                loss = losses.kl_divergence(logits, natural_logits, y)
            else:
                loss = losses.cross_entropy(logits, logits, y)
            (grad,) = torch.autograd.grad(loss.sum(), x_adv)
            return logits.detach().argmax(1) == y, grad

    def _sample_start(self, x: Tensor, rng: ExampleRng) -> Tensor:
        """Return the first iterates; a uniform start in L2 has a Gaussian direction."""
        if self.start == "natural":
            return x
        shape = tuple(x.shape[1:])
        if self.start == "gaussian":
            return x + 0.001 * rng.normal(shape, x.dtype)
        eps = resolved_value(self.eps)
        if self.norm == "Linf":
            return (x + eps * rng.symmetric_uniform(shape, x.dtype)).clamp(0, 1)
        direction = rng.normal(shape, x.dtype)
        radius = rng.derive_stream("radius").uniform((1, 1, 1), x.dtype) ** (1 / math.prod(shape))
        return (x + eps * radius * direction / l2_norms(direction)).clamp(0, 1)


def _compute_natural_logits(model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits of natural images without gradient."""
    with torch.no_grad():
        logits: Tensor = model(x)
    # Copied, because the next replay of a CUDA graph overwrites its output.
    return logits.clone()
