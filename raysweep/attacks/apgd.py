"""Auto-PGD (Croce & Hein 2020a, alg. 1): PGD with momentum whose step size halves itself,
untargeted and targeted.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from raysweep.attacks.base import (
    AttackResult,
    Norm,
    VulnerabilityKind,
    check_eps_range,
    freeze_model,
    is_on_cpu,
    l2_norms,
    masked_assign_,
    project_to_ball,
    steepest_ascent_direction,
    true_class_margin,
)
from raysweep.rng import ExampleRng
from raysweep.schedules import Schedule, bounded, resolved_value
from raysweep.spec import Spec, SpecError


class APGD(Spec):
    """APGD with the settings of AutoAttack; a row is done as soon as one of its iterates is
    misclassified.

    loss: `ce`; `cw`, -(z_y - max_{i != y} z_i); `dlr`, that over z_pi1 - z_pi3 (eq. 6);
    `dlr-targeted`, for the `targets` classes ranked after the first by the clean logits (eq. 7).
    rho: least share of steps that must raise the loss (condition 1). samples: forward passes
    averaged for one gradient, for models that draw random numbers; if more than one, rows take
    every step and return their last misclassified iterate.
    """

    kind: Literal["apgd"] = "apgd"
    eps: Annotated[Schedule, bounded(0)] = 8 / 255
    steps: Annotated[int, Field(ge=1, le=10_000)] = 100
    loss: Literal["ce", "cw", "dlr", "dlr-targeted"] = "ce"
    norm: Norm = "Linf"
    restarts: Annotated[int, Field(ge=1)] = 1
    targets: Annotated[int, Field(ge=1)] = 9
    rho: Annotated[float, Field(ge=0, le=1)] = 0.75
    samples: Annotated[int, Field(ge=1)] = 1

    _check_eps_range = model_validator(mode="after")(check_eps_range)

    @property
    def vulnerability_kind(self) -> VulnerabilityKind:
        return "probability" if self.loss == "ce" else "margin"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng) -> AttackResult:
        """x (N, C, H, W) in [0, 1], y (N,). Rows that hold out return their iterate of highest
        loss.
        """
        with freeze_model(model):
            with torch.no_grad():
                logits = model(x)
            self._check_class_count(logits.shape[1])
            ranked = logits.argsort(1, descending=True)
            result, queries, best = x.clone(), torch.ones_like(y), x.new_full(y.shape, -torch.inf)
            live = (ranked[:, 0] == y).nonzero()[:, 0]
            ranks = (
                range(1, 1 + min(self.targets, logits.shape[1] - 1))
                if self.loss == "dlr-targeted"
                else [0]
            )
            for rank in ranks:
                for restart in range(self.restarts):
                    if not len(live):
                        break
                    stream = rng.select_rows(live).derive_stream("target", rank, "restart", restart)
                    run = self._attack_once(model, x[live], y[live], ranked[live, rank], stream)
                    better = run.is_broken | (run.best_loss > best[live])
                    result[live[better]] = run.x_adv[better]
                    best[live] = torch.maximum(best[live], run.best_loss)
                    queries[live] += run.queries
                    live = live[~run.is_broken]
        return AttackResult(result, queries)

    def _attack_once(
        self, model: nn.Module, x: Tensor, y: Tensor, target: Tensor, rng: ExampleRng
    ) -> "_ApgdResult":
        """One start: rows leave the batch when broken (on a GPU at the checkpoints only, to spare
        synchronisation).
        """
        eps = resolved_value(self.eps)
        start = self._sample_start(x, rng)
        loss, correct, grad = self._compute_loss_gradient(model, start, y, target)
        done = _ApgdResult(start.clone(), ~correct, loss.clone(), torch.full_like(y, self.samples))
        state = _ApgdState(
            row_index=torch.arange(len(x), device=x.device), x=x, y=y, target=target, x_broken=start.clone(), x_adv=start,
            x_prev=start, grad=grad, best_x=start.clone(), best_grad=grad.clone(), best_loss=loss,
            prev_loss=torch.zeros_like(loss),
            increase_count=torch.zeros_like(loss), step_size=torch.full_like(loss, 2 * eps), best_loss_at_check=loss,
            was_halved=torch.ones_like(correct), is_broken=~correct, queries=torch.full_like(y, self.samples),
        )  # fmt: skip
        checkpoints = _step_size_checkpoints(self.steps)
        since = 0
        for i in range(self.steps):
            if self.samples == 1 and (is_on_cpu(x) or since == 0):
                state = _retire_broken_rows(state, done)
            if not len(state.row_index):
                break
            moved = self._propose_iterate(state, eps, momentum=0.75 if i else 1.0)
            state.x_prev, state.x_adv = state.x_adv, moved
            loss, correct, state.grad = self._compute_loss_gradient(
                model, moved, state.y, state.target
            )
            state.queries = state.queries + self.samples * (~state.is_broken).long()
            masked_assign_(state.x_broken, ~correct, moved)
            state.is_broken = state.is_broken | ~correct
            state.increase_count = state.increase_count + (loss > state.prev_loss)
            state.prev_loss = loss
            better = loss > state.best_loss
            masked_assign_(state.best_x, better, moved)
            masked_assign_(state.best_grad, better, state.grad)
            state.best_loss = torch.fmax(state.best_loss, loss)
            since += 1
            if i + 1 in checkpoints:
                self._halve_stalled_steps(state, since)
                since = 0
        state = _retire_broken_rows(state, done)
        (
            done.x_adv[state.row_index],
            done.best_loss[state.row_index],
            done.queries[state.row_index],
        ) = state.best_x, state.best_loss, state.queries
        return done

    def _propose_iterate(self, state: "_ApgdState", eps: float, momentum: float) -> Tensor:
        """A gradient step, then the average with the last move (alg. 1, lines 7-8)."""
        direction = steepest_ascent_direction(state.grad, self.norm)
        z = project_to_ball(
            torch.addcmul(state.x_adv, direction, _broadcast_rows(state.step_size)),
            state.x,
            eps,
            self.norm,
        )
        moved = torch.lerp(state.x_adv, z, momentum)
        moved = moved.add_(state.x_adv - state.x_prev, alpha=1 - momentum)
        return project_to_ball(moved, state.x, eps, self.norm)

    def _halve_stalled_steps(self, state: "_ApgdState", steps_since_check: int) -> None:
        """Half the step, from the best point, where the loss rose too seldom (condition 1) or its
        best stalled (2).
        """
        stalled = ~state.was_halved & (state.best_loss_at_check >= state.best_loss)
        state.was_halved = (state.increase_count <= self.rho * steps_since_check) | stalled
        state.best_loss_at_check = state.best_loss
        state.step_size = torch.where(state.was_halved, state.step_size / 2, state.step_size)
        state.x_adv = torch.where(_broadcast_rows(state.was_halved), state.best_x, state.x_adv)
        state.grad = torch.where(_broadcast_rows(state.was_halved), state.best_grad, state.grad)
        state.increase_count = torch.zeros_like(state.increase_count)

    def _compute_loss_gradient(
        self, model: nn.Module, x_adv: Tensor, y: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (N,), which rows are still right (N,), and the mean gradient over `samples` passes."""
        x_adv = x_adv.detach().requires_grad_()
        total = torch.zeros_like(x_adv)
        for _ in range(self.samples):
            logits = model(x_adv)
            loss = self._compute_loss(logits, y, target)
            (grad,) = torch.autograd.grad(loss.sum(), x_adv)
            total = total + grad if self.samples > 1 else grad
        return (
            loss.detach(),
            logits.detach().argmax(1) == y,
            total / self.samples if self.samples > 1 else total,
        )

    def _compute_loss(self, logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        if self.loss == "ce":
            return F.cross_entropy(logits, y, reduction="none")
        if self.loss == "cw":
            return -true_class_margin(logits, y)
        ranked = logits.detach().topk(4 if self.loss == "dlr-targeted" else 3, 1).indices
        if self.loss == "dlr":
            first, third = logits.gather(1, ranked[:, 0:3:2]).unbind(1)
            return -true_class_margin(logits, y) / (first - third + 1e-12)
        picked = torch.cat([y[:, None], target[:, None], ranked[:, :1], ranked[:, 2:]], 1)
        true, wanted, first, third, fourth = logits.gather(1, picked).unbind(1)
        return -(true - wanted) / (first - 0.5 * (third + fourth) + 1e-12)

    def _sample_start(self, x: Tensor, rng: ExampleRng) -> Tensor:
        """A random point of the sphere: x + eps t / |t| in the attack's norm."""
        shape = tuple(x.shape[1:])
        if self.norm == "Linf":
            t = rng.symmetric_uniform(shape, x.dtype)
            return (
                x
                + resolved_value(self.eps)
                * t
                / _broadcast_rows(t.flatten(1).abs().amax(1).clamp_min(1e-12))
            ).clamp(0, 1)
        t = rng.normal(shape, x.dtype)
        return (x + resolved_value(self.eps) * t / l2_norms(t).clamp_min(1e-12)).clamp(0, 1)

    def _check_class_count(self, classes: int) -> None:
        needed = {"dlr": 3, "dlr-targeted": 4}.get(self.loss, 2)
        if classes < needed:
            raise SpecError(
                f"the {self.loss} loss needs {needed} logits or more, the model has {classes}; use cw"
            )


@dataclass
class _ApgdResult:
    """What one start came to: the broken or else best iterate, whether broken, best loss, forward
    passes.
    """

    x_adv: Tensor
    is_broken: Tensor
    best_loss: Tensor
    queries: Tensor


@dataclass
class _ApgdState:
    """Rows still under attack; `row` is their place in the batch."""

    row_index: Tensor
    x: Tensor
    y: Tensor
    target: Tensor
    x_broken: Tensor
    x_adv: Tensor
    x_prev: Tensor
    grad: Tensor
    best_x: Tensor
    best_grad: Tensor
    best_loss: Tensor
    prev_loss: Tensor
    increase_count: Tensor
    step_size: Tensor
    best_loss_at_check: Tensor
    was_halved: Tensor
    is_broken: Tensor
    queries: Tensor


def _retire_broken_rows(state: _ApgdState, result: _ApgdResult) -> _ApgdState:
    """Write the broken rows to `done`, keep the others."""
    keep = (~state.is_broken).nonzero()[:, 0]
    if len(keep) == len(state.row_index):
        return state
    out = state.row_index[state.is_broken]
    result.x_adv[out], result.is_broken[out] = state.x_broken[state.is_broken], True
    result.best_loss[out], result.queries[out] = (
        state.best_loss[state.is_broken],
        state.queries[state.is_broken],
    )
    return _ApgdState(
        **{field.name: getattr(state, field.name)[keep] for field in fields(_ApgdState)}
    )


def _step_size_checkpoints(steps: int) -> set[int]:
    """Iterations after which the step size is looked at (sec. 3.1): gaps of .22 K, shorter by .03
    K, at least .06 K.
    """
    gap, at, found = max(int(0.22 * steps), 1), 0, set()
    while at + gap <= steps:
        at += gap
        found.add(at)
        gap = max(gap - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return found


def _broadcast_rows(row: Tensor) -> Tensor:
    return row.view(-1, 1, 1, 1)
