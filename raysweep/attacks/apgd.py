"""Auto-PGD (Croce & Hein 2020a, alg. 1): PGD with momentum and a step size that adapts itself."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from raysweep.attacks.base import (
    AttackResult,
    Norm,
    VulnerabilityKind,
    broadcast_rows,
    check_eps_range,
    freeze_model,
    is_on_cpu,
    masked_assign_,
    project_to_ball,
    sample_on_sphere,
    steepest_ascent_direction,
    true_class_margin,
)
from raysweep.lazy_modules import F, torch
from raysweep.rng import ExampleRng
from raysweep.schedules import Schedule, bounded, resolved_value
from raysweep.spec import Spec, SpecError

if TYPE_CHECKING:
    from torch import Tensor, nn


class APGD(Spec):
    """Auto-PGD with the defaults of AutoAttack (Croce & Hein 2020a).

    A row stops at its first misclassified iterate. Equation numbers are those of Croce & Hein.
    """

    kind: Literal["apgd"] = "apgd"
    """Selects this attack."""

    eps: Annotated[Schedule, bounded(0)] = 8 / 255
    """Radius of the ball around the image, in pixel values; at most 1 for Linf."""

    steps: Annotated[int, Field(ge=1, le=10_000)] = 100
    """Gradient steps of each start."""

    loss: Literal["ce", "cw", "dlr", "dlr-targeted"] = "ce"
    """Loss to maximise: `ce`, cross-entropy; `cw`, max_{i != y} z_i - z_y; `dlr`, the same divided
    by z_pi1 - z_pi3, the difference of the largest and third largest logit (eq. 6);
    `dlr-targeted`, its targeted form (eq. 7)."""

    norm: Norm = "Linf"
    """Norm of the ball."""

    restarts: Annotated[int, Field(ge=1)] = 1
    """Number of random starts, per target class if targeted. Only rows that no start has broken yet
    start again."""

    targets: Annotated[int, Field(ge=1)] = 9
    """Number of target classes of `dlr-targeted`: the highest clean logits after the first."""

    rho: Annotated[float, Field(ge=0, le=1)] = 0.75
    """The step size halves if at most this share of the steps since the last check raised the loss
    (condition 1)."""

    samples: Annotated[int, Field(ge=1)] = 1
    """Forward passes whose gradients are averaged, for models that draw random numbers. Above 1,
    each row takes all steps, and a broken row returns its last misclassified iterate."""

    _check_eps_range = model_validator(mode="after")(check_eps_range)

    @property
    def vulnerability_kind(self) -> VulnerabilityKind:
        """`probability` for the cross-entropy, `margin` for the other losses."""
        return "probability" if self.loss == "ce" else "margin"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng) -> AttackResult:
        """Attack a batch; see `Attack` for the arguments.

        Returns:
            The misclassified iterate of each broken row, the iterate of highest loss of the others.

        Raises:
            SpecError: If the model has too few classes for the loss.
        """
        with freeze_model(model):
            with torch.no_grad():
                logits = model(x)
            self._check_class_count(logits.shape[1])
            ranking = logits.argsort(1, descending=True)
            x_adv, queries = x.clone(), torch.ones_like(y)
            best_loss = x.new_full(y.shape, -torch.inf)
            live_rows = (ranking[:, 0] == y).nonzero()[:, 0]
            for rank in self._target_ranks(logits.shape[1]):
                for restart in range(self.restarts):
                    if not len(live_rows):
                        break
                    run = self._attack_once(
                        model,
                        x[live_rows],
                        y[live_rows],
                        ranking[live_rows, rank],
                        rng.select_rows(live_rows).derive_stream(
                            "target", rank, "restart", restart
                        ),
                    )
                    improved = run.is_broken | (run.best_loss > best_loss[live_rows])
                    x_adv[live_rows[improved]] = run.x_adv[improved]
                    best_loss[live_rows] = torch.maximum(best_loss[live_rows], run.best_loss)
                    queries[live_rows] += run.queries
                    live_rows = live_rows[~run.is_broken]
        return AttackResult(x_adv, queries)

    def _target_ranks(self, n_classes: int) -> range:
        """Return the ranks, by clean logits, of the target classes; rank 0 if untargeted."""
        if self.loss == "dlr-targeted":
            return range(1, 1 + min(self.targets, n_classes - 1))
        return range(1)

    def _attack_once(
        self, model: nn.Module, x: Tensor, y: Tensor, target: Tensor, rng: ExampleRng
    ) -> _ApgdResult:
        """Run alg. 1 from one random start."""
        eps = resolved_value(self.eps)
        x_start = sample_on_sphere(x, eps, self.norm, rng)
        loss, is_correct, grad = self._compute_loss_gradient(model, x_start, y, target)
        result = _ApgdResult(
            x_start.clone(), ~is_correct, loss.clone(), torch.full_like(y, self.samples)
        )
        state = _ApgdState(
            row_index=torch.arange(len(x), device=x.device),
            x=x,
            y=y,
            target=target,
            x_broken=x_start.clone(),
            x_adv=x_start,
            x_prev=x_start,
            grad=grad,
            best_x=x_start.clone(),
            best_grad=grad.clone(),
            best_loss=loss,
            prev_loss=torch.zeros_like(loss),
            increase_count=torch.zeros_like(loss),
            step_size=torch.full_like(loss, 2 * eps),
            best_loss_at_check=loss,
            was_halved=torch.ones_like(is_correct),
            is_broken=~is_correct,
            queries=torch.full_like(y, self.samples),
        )
        checkpoints = _step_size_checkpoints(self.steps)
        steps_since_check = 0
        for step in range(self.steps):
            # On an accelerator, counting the broken rows makes the host wait, so they are removed
            # only after a check of the step size.
            if self.samples == 1 and (is_on_cpu(x) or steps_since_check == 0):
                state = _retire_broken_rows(state, result)
            if not len(state.row_index):
                break
            self._take_step(model, state, eps, momentum=0.75 if step else 1.0)
            steps_since_check += 1
            if step + 1 in checkpoints:
                self._halve_stalled_steps(state, steps_since_check)
                steps_since_check = 0
        state = _retire_broken_rows(state, result)
        result.x_adv[state.row_index] = state.best_x
        result.best_loss[state.row_index] = state.best_loss
        result.queries[state.row_index] = state.queries
        return result

    def _take_step(self, model: nn.Module, state: _ApgdState, eps: float, momentum: float) -> None:
        """Move to the next iterate and record its loss, gradient and prediction."""
        x_next = self._propose_iterate(state, eps, momentum)
        state.x_prev, state.x_adv = state.x_adv, x_next
        loss, is_correct, state.grad = self._compute_loss_gradient(
            model, x_next, state.y, state.target
        )
        state.queries = state.queries + self.samples * (~state.is_broken).long()
        masked_assign_(state.x_broken, ~is_correct, x_next)
        state.is_broken = state.is_broken | ~is_correct
        state.increase_count = state.increase_count + (loss > state.prev_loss)
        state.prev_loss = loss
        improved = loss > state.best_loss
        masked_assign_(state.best_x, improved, x_next)
        masked_assign_(state.best_grad, improved, state.grad)
        state.best_loss = torch.fmax(state.best_loss, loss)

    def _propose_iterate(self, state: _ApgdState, eps: float, momentum: float) -> Tensor:
        """Take a gradient step, then average it with the previous move (alg. 1, lines 7-8)."""
        direction = steepest_ascent_direction(state.grad, self.norm)
        z = project_to_ball(
            torch.addcmul(state.x_adv, direction, broadcast_rows(state.step_size)),
            state.x,
            eps,
            self.norm,
        )
        x_next = torch.lerp(state.x_adv, z, momentum)
        x_next = x_next.add_(state.x_adv - state.x_prev, alpha=1 - momentum)
        return project_to_ball(x_next, state.x, eps, self.norm)

    def _halve_stalled_steps(self, state: _ApgdState, steps_since_check: int) -> None:
        """Halve the step size of slow rows, and move these rows back to their best iterate.

        A row is slow if the loss rose in at most a share rho of its steps since the last check
        (condition 1), or if the last check did not halve its step size and its best loss has not
        improved since (condition 2).
        """
        is_stalled = ~state.was_halved & (state.best_loss_at_check >= state.best_loss)
        state.was_halved = (state.increase_count <= self.rho * steps_since_check) | is_stalled
        state.best_loss_at_check = state.best_loss
        state.step_size = torch.where(state.was_halved, state.step_size / 2, state.step_size)
        state.x_adv = torch.where(broadcast_rows(state.was_halved), state.best_x, state.x_adv)
        state.grad = torch.where(broadcast_rows(state.was_halved), state.best_grad, state.grad)
        state.increase_count = torch.zeros_like(state.increase_count)

    def _compute_loss_gradient(
        self, model: nn.Module, x_adv: Tensor, y: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss (N,), whether rows are correct (N,) bool, and gradient (N, C, H, W).

        The gradient is the mean over `samples` passes; loss and prediction are of the last pass.
        """
        with torch.enable_grad():
            x_adv = x_adv.detach().requires_grad_()
            total_grad = torch.zeros_like(x_adv)
            for _ in range(self.samples):
                logits = model(x_adv)
                loss = self._compute_loss(logits, y, target)
                (grad,) = torch.autograd.grad(loss.sum(), x_adv)
                total_grad = total_grad + grad if self.samples > 1 else grad
            mean_grad = total_grad / self.samples if self.samples > 1 else total_grad
            return loss.detach(), logits.detach().argmax(1) == y, mean_grad

    def _compute_loss(self, logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each row, (N,). Only `dlr-targeted` uses `target`, (N,) int64."""
        if self.loss == "ce":
            return F.cross_entropy(logits, y, reduction="none")
        if self.loss == "cw":
            return -true_class_margin(logits, y)
        ranking = logits.detach().topk(4 if self.loss == "dlr-targeted" else 3, 1).indices
        if self.loss == "dlr":
            first, third = logits.gather(1, ranking[:, 0:3:2]).unbind(1)
            return -true_class_margin(logits, y) / (first - third + 1e-12)
        columns = torch.cat([y[:, None], target[:, None], ranking[:, :1], ranking[:, 2:]], 1)
        z_true, z_target, first, third, fourth = logits.gather(1, columns).unbind(1)
        return -(z_true - z_target) / (first - 0.5 * (third + fourth) + 1e-12)

    def _check_class_count(self, n_classes: int) -> None:
        """Raise SpecError if the loss needs more logits than the model has."""
        min_classes = {"dlr": 3, "dlr-targeted": 4}.get(self.loss, 2)
        if n_classes < min_classes:
            raise SpecError(
                f"the {self.loss} loss needs {min_classes} logits or more, "
                f"the model has {n_classes}; use cw"
            )


@dataclass
class _ApgdResult:
    """Result of one start, by row.

    Attributes:
        x_adv: Misclassified iterate, or the iterate of highest loss if there is none.
        is_broken: Whether an iterate was misclassified, (N,) bool.
        best_loss: Highest loss, (N,).
        queries: Forward passes, (N,) int64.
    """

    x_adv: Tensor
    is_broken: Tensor
    best_loss: Tensor
    queries: Tensor


@dataclass
class _ApgdState:
    """State of the M rows that are still in the batch; every tensor has M rows.

    Attributes:
        row_index: Position of each row in the original batch.
        x: Natural images.
        y: True labels.
        target: Target classes.
        x_broken: Last misclassified iterate; valid where `is_broken`.
        x_adv: Current iterate.
        x_prev: Iterate before it.
        grad: Gradient at `x_adv`.
        best_x: Iterate of highest loss.
        best_grad: Gradient at `best_x`.
        best_loss: Loss at `best_x`.
        prev_loss: Loss of the last step.
        increase_count: Steps since the last check that raised the loss.
        step_size: Step size of each row.
        best_loss_at_check: `best_loss` at the last check.
        was_halved: Whether the last check halved the step size.
        is_broken: Whether any iterate was misclassified.
        queries: Forward passes so far.
    """

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
    """Write broken rows to `result` and return the state of the other rows."""
    unbroken = (~state.is_broken).nonzero()[:, 0]
    if len(unbroken) == len(state.row_index):
        return state
    broken_rows = state.row_index[state.is_broken]
    result.x_adv[broken_rows] = state.x_broken[state.is_broken]
    result.is_broken[broken_rows] = True
    result.best_loss[broken_rows] = state.best_loss[state.is_broken]
    result.queries[broken_rows] = state.queries[state.is_broken]
    return _ApgdState(
        **{field.name: getattr(state, field.name)[unbroken] for field in fields(_ApgdState)}
    )


def _step_size_checkpoints(steps: int) -> set[int]:
    """Return the iterations after which the step size may halve (sec. 3.1).

    The first gap is 0.22 K of K steps; each next gap is shorter by 0.03 K, down to 0.06 K.
    """
    gap, checkpoint = max(int(0.22 * steps), 1), 0
    checkpoints = set()
    while checkpoint + gap <= steps:
        checkpoint += gap
        checkpoints.add(checkpoint)
        gap = max(gap - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return checkpoints
