"""Auto-PGD (Croce & Hein 2020a, alg. 1): PGD with momentum whose step size halves itself, untargeted and targeted."""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from raysweep.attacks.base import (
    Adversarial,
    Norm,
    View,
    cheap_to_look,
    frozen,
    in_pixels,
    margin,
    norms,
    project,
    put,
    step_direction,
)
from raysweep.rng import Rng
from raysweep.schedules import Schedule, now, within
from raysweep.spec import Spec, SpecError


class APGD(Spec):
    """APGD with the settings of AutoAttack; a row is done as soon as one of its iterates is misclassified.

    loss: `ce`; `cw`, -(z_y - max_{i != y} z_i); `dlr`, that over z_pi1 - z_pi3 (eq. 6); `dlr-targeted`, for the
    `targets` classes ranked after the first by the clean logits (eq. 7). rho: least share of steps that must raise the
    loss (condition 1). samples: forward passes averaged for one gradient, for models that draw random numbers; if more
    than one, rows take every step and return their last misclassified iterate.
    """

    kind: Literal["apgd"] = "apgd"
    eps: Annotated[Schedule, within(0)] = 8 / 255
    steps: Annotated[int, Field(ge=1, le=10_000)] = 100
    loss: Literal["ce", "cw", "dlr", "dlr-targeted"] = "ce"
    norm: Norm = "Linf"
    restarts: Annotated[int, Field(ge=1)] = 1
    targets: Annotated[int, Field(ge=1)] = 9
    rho: Annotated[float, Field(ge=0, le=1)] = 0.75
    samples: Annotated[int, Field(ge=1)] = 1

    _in_pixels = model_validator(mode="after")(in_pixels)

    @property
    def view(self) -> View:
        return "probability" if self.loss == "ce" else "margin"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: Rng) -> Adversarial:
        """x (N, C, H, W) in [0, 1], y (N,). Rows that hold out return their iterate of highest loss."""
        with frozen(model):
            with torch.no_grad():
                logits = model(x)
            self._check(logits.shape[1])
            ranked = logits.argsort(1, descending=True)
            result, queries, best = x.clone(), torch.ones_like(y), x.new_full(y.shape, -torch.inf)
            live = (ranked[:, 0] == y).nonzero()[:, 0]
            ranks = range(1, 1 + min(self.targets, logits.shape[1] - 1)) if self.loss == "dlr-targeted" else [0]
            for rank in ranks:
                for restart in range(self.restarts):
                    if not len(live):
                        break
                    stream = rng.rows(live).stream("target", rank, "restart", restart)
                    run = self._run(model, x[live], y[live], ranked[live, rank], stream)
                    better = run.broken | (run.loss > best[live])
                    result[live[better]] = run.x[better]
                    best[live] = torch.maximum(best[live], run.loss)
                    queries[live] += run.queries
                    live = live[~run.broken]
        return Adversarial(result, queries)

    def _run(self, model: nn.Module, x: Tensor, y: Tensor, target: Tensor, rng: Rng) -> "_Run":
        """One start: rows leave the batch when broken (on a GPU at the checkpoints only, to spare synchronisation)."""
        eps = now(self.eps)
        start = self._start(x, rng)
        loss, correct, grad = self._gradient(model, start, y, target)
        done = _Run(start.clone(), ~correct, loss.clone(), torch.full_like(y, self.samples))
        state = _State(
            row=torch.arange(len(x), device=x.device), x=x, y=y, target=target, adv=start.clone(), x_adv=start,
            x_old=start, grad=grad, best_x=start.clone(), best_grad=grad.clone(), best_loss=loss,
            last_loss=torch.zeros_like(loss),
            rises=torch.zeros_like(loss), step=torch.full_like(loss, 2 * eps), checked_loss=loss,
            reduced=torch.ones_like(correct), broken=~correct, queries=torch.full_like(y, self.samples),
        )  # fmt: skip
        checkpoints = _checkpoints(self.steps)
        since = 0
        for i in range(self.steps):
            if self.samples == 1 and (cheap_to_look(x) or since == 0):
                state = _leave(state, done)
            if not len(state.row):
                break
            moved = self._step(state, eps, momentum=0.75 if i else 1.0)
            state.x_old, state.x_adv = state.x_adv, moved
            loss, correct, state.grad = self._gradient(model, moved, state.y, state.target)
            state.queries = state.queries + self.samples * (~state.broken).long()
            put(state.adv, ~correct, moved)
            state.broken = state.broken | ~correct
            state.rises = state.rises + (loss > state.last_loss)
            state.last_loss = loss
            better = loss > state.best_loss
            put(state.best_x, better, moved)
            put(state.best_grad, better, state.grad)
            state.best_loss = torch.fmax(state.best_loss, loss)
            since += 1
            if i + 1 in checkpoints:
                self._checkpoint(state, since)
                since = 0
        state = _leave(state, done)
        done.x[state.row], done.loss[state.row], done.queries[state.row] = state.best_x, state.best_loss, state.queries
        return done

    def _step(self, state: "_State", eps: float, momentum: float) -> Tensor:
        """A gradient step, then the average with the last move (alg. 1, lines 7-8)."""
        direction = step_direction(state.grad, self.norm)
        z = project(torch.addcmul(state.x_adv, direction, _wide(state.step)), state.x, eps, self.norm)
        moved = torch.lerp(state.x_adv, z, momentum)
        moved = moved.add_(state.x_adv - state.x_old, alpha=1 - momentum)
        return project(moved, state.x, eps, self.norm)

    def _checkpoint(self, state: "_State", since: int) -> None:
        """Half the step, from the best point, where the loss rose too seldom (condition 1) or its best stalled (2)."""
        stalled = ~state.reduced & (state.checked_loss >= state.best_loss)
        state.reduced = (state.rises <= self.rho * since) | stalled
        state.checked_loss = state.best_loss
        state.step = torch.where(state.reduced, state.step / 2, state.step)
        state.x_adv = torch.where(_wide(state.reduced), state.best_x, state.x_adv)
        state.grad = torch.where(_wide(state.reduced), state.best_grad, state.grad)
        state.rises = torch.zeros_like(state.rises)

    def _gradient(self, model: nn.Module, x_adv: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (N,), which rows are still right (N,), and the mean gradient over `samples` passes."""
        x_adv = x_adv.detach().requires_grad_()
        total = torch.zeros_like(x_adv)
        for _ in range(self.samples):
            logits = model(x_adv)
            loss = self._loss(logits, y, target)
            (grad,) = torch.autograd.grad(loss.sum(), x_adv)
            total = total + grad if self.samples > 1 else grad
        return loss.detach(), logits.detach().argmax(1) == y, total / self.samples if self.samples > 1 else total

    def _loss(self, logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        if self.loss == "ce":
            return F.cross_entropy(logits, y, reduction="none")
        if self.loss == "cw":
            return -margin(logits, y)
        ranked = logits.detach().topk(4 if self.loss == "dlr-targeted" else 3, 1).indices
        if self.loss == "dlr":
            first, third = logits.gather(1, ranked[:, 0:3:2]).unbind(1)
            return -margin(logits, y) / (first - third + 1e-12)
        picked = torch.cat([y[:, None], target[:, None], ranked[:, :1], ranked[:, 2:]], 1)
        true, wanted, first, third, fourth = logits.gather(1, picked).unbind(1)
        return -(true - wanted) / (first - 0.5 * (third + fourth) + 1e-12)

    def _start(self, x: Tensor, rng: Rng) -> Tensor:
        """A random point of the sphere: x + eps t / |t| in the attack's norm."""
        shape = tuple(x.shape[1:])
        if self.norm == "Linf":
            t = rng.symmetric(shape, x.dtype)
            return (x + now(self.eps) * t / _wide(t.flatten(1).abs().amax(1).clamp_min(1e-12))).clamp(0, 1)
        t = rng.normal(shape, x.dtype)
        return (x + now(self.eps) * t / norms(t).clamp_min(1e-12)).clamp(0, 1)

    def _check(self, classes: int) -> None:
        needed = {"dlr": 3, "dlr-targeted": 4}.get(self.loss, 2)
        if classes < needed:
            raise SpecError(f"the {self.loss} loss needs {needed} logits or more, the model has {classes}; use cw")


@dataclass
class _Run:
    """What one start came to: the broken or else best iterate, whether broken, best loss, forward passes."""

    x: Tensor
    broken: Tensor
    loss: Tensor
    queries: Tensor


@dataclass
class _State:
    """Rows still under attack; `row` is their place in the batch."""

    row: Tensor
    x: Tensor
    y: Tensor
    target: Tensor
    adv: Tensor
    x_adv: Tensor
    x_old: Tensor
    grad: Tensor
    best_x: Tensor
    best_grad: Tensor
    best_loss: Tensor
    last_loss: Tensor
    rises: Tensor
    step: Tensor
    checked_loss: Tensor
    reduced: Tensor
    broken: Tensor
    queries: Tensor


def _leave(state: _State, done: _Run) -> _State:
    """Write the broken rows to `done`, keep the others."""
    keep = (~state.broken).nonzero()[:, 0]
    if len(keep) == len(state.row):
        return state
    out = state.row[state.broken]
    done.x[out], done.broken[out] = state.adv[state.broken], True
    done.loss[out], done.queries[out] = state.best_loss[state.broken], state.queries[state.broken]
    return _State(**{field.name: getattr(state, field.name)[keep] for field in fields(_State)})


def _checkpoints(steps: int) -> set[int]:
    """Iterations after which the step size is looked at (sec. 3.1): gaps of .22 K, shorter by .03 K, at least .06 K."""
    gap, at, found = max(int(0.22 * steps), 1), 0, set()
    while at + gap <= steps:
        at += gap
        found.add(at)
        gap = max(gap - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return found


def _wide(row: Tensor) -> Tensor:
    return row.view(-1, 1, 1, 1)
