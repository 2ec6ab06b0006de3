"""Projected gradient descent in the forms that training and evaluation use: one loop, its settings."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from raysweep import losses
from raysweep.attacks.base import Adversarial, Norm, View, frozen, in_pixels, margin, norms, project, step_direction
from raysweep.rng import Rng
from raysweep.schedules import Number, Schedule, now, within
from raysweep.spec import Spec


class PGD(Spec):
    """PGD-K (G eq. 4), counting the geometry value kappa on the way (G alg. 1).

    loss: `ce`; `cw`, the margin loss -max(z_y - max_{i != y} z_i + confidence, 0) (L eq. 12); `kl`, KL(p(x) || p(x~))
    (G alg. 4). start: `uniform` in the eps-ball; `gaussian`, x + 0.001 N(0, I), not clipped, as TRADES does;
    `natural`, x itself (L alg. 2-3). tau: a row stops `tau` steps after it is first misclassified (G alg. 3, FAT);
    null takes all K steps. mode: of the batch norms while attacking; as published, `eval`.
    """

    kind: Literal["pgd"] = "pgd"
    eps: Annotated[Schedule, within(0)] = 8 / 255
    step_size: Annotated[Schedule, within(0)] = 2 / 255
    steps: Annotated[int, Field(ge=1, le=10_000)] = 10
    loss: Literal["ce", "cw", "kl"] = "ce"
    norm: Norm = "Linf"
    start: Literal["natural", "uniform", "gaussian"] = "uniform"
    tau: Annotated[Schedule, within(0)] | None = None
    confidence: Annotated[Number, Field(ge=0)] = 50.0
    mode: Literal["eval", "train"] = "eval"

    _in_pixels = model_validator(mode="after")(in_pixels)

    @property
    def view(self) -> View:
        """L eq. 8 for attacks that lower p_y, eq. 9 for those that raise another class."""
        return "margin" if self.loss == "cw" else "probability"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: Rng) -> Adversarial:
        """x (N, C, H, W) in [0, 1], y (N,) int64; one forward a step serves kappa, tau and the gradient."""
        with frozen(model, self.mode):
            reference = _logits(model, x) if self.loss == "kl" else None
            return self._ascend(model, x, y, self._start(x, rng), reference)

    def _ascend(self, model: nn.Module, x: Tensor, y: Tensor, current: Tensor, reference: Tensor | None) -> Adversarial:
        eps, step_size = now(self.eps), now(self.step_size)
        kappa = torch.zeros_like(y)
        queries = torch.zeros_like(y)
        result = current.clone() if self.tau is not None else current
        rows: Tensor | slice = slice(None)
        budget = None if self.tau is None else torch.full_like(y, int(now(self.tau)))
        for _ in range(self.steps):
            correct, grad = self._gradient(model, current, y, reference)
            kappa[rows] += correct
            queries[rows] += 1
            if budget is not None:
                going = (correct | (budget > 0)).nonzero()[:, 0]
                budget = (budget - (~correct).long())[going]
                rows = going if isinstance(rows, slice) else rows[going]
                if len(going) < len(x):
                    x, y, current, grad = x[going], y[going], current[going], grad[going]
                    reference = reference[going] if reference is not None else None
                if not len(going):
                    break
            current = project(current + step_size * step_direction(grad, self.norm), x, eps, self.norm)
            if budget is not None:
                result[rows] = current
        return Adversarial(result if budget is not None else current, queries, kappa)

    def _gradient(self, model: nn.Module, x_adv: Tensor, y: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which rows are still right (N,), and the gradient of the attack's loss at x_adv."""
        x_adv = x_adv.detach().requires_grad_()
        logits = model(x_adv)
        if self.loss == "cw":
            loss = -(margin(logits, y) + self.confidence).clamp_min(0)
        elif reference is not None:
            loss = losses.kl(logits, reference, y)
        else:
            loss = losses.ce(logits, logits, y)
        (grad,) = torch.autograd.grad(loss.sum(), x_adv)
        return logits.detach().argmax(1) == y, grad

    def _start(self, x: Tensor, rng: Rng) -> Tensor:
        if self.start == "natural":
            return x
        shape = tuple(x.shape[1:])
        if self.start == "gaussian":
            return x + 0.001 * rng.normal(shape, x.dtype)
        if self.norm == "Linf":
            return (x + now(self.eps) * rng.symmetric(shape, x.dtype)).clamp(0, 1)
        direction = rng.normal(shape, x.dtype)
        radius = rng.stream("radius").uniform((1, 1, 1), x.dtype) ** (1 / math.prod(shape))
        return (x + now(self.eps) * radius * direction / norms(direction)).clamp(0, 1)


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(x)
    # The next replay of a CUDA graph overwrites its output.
    return logits.clone()
