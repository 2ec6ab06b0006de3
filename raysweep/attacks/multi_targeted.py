"""MultiTargeted attack (Gowal et al. 2019) that spends its steps on the rows near the boundary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from raysweep.attacks.base import (
    AttackResult,
    Norm,
    VulnerabilityKind,
    check_eps_range,
    freeze_model,
    is_on_cpu,
    masked_assign_,
    project_to_ball,
    sample_on_sphere,
    steepest_ascent_direction,
    true_class_margin,
)
from raysweep.lazy_modules import torch
from raysweep.rng import ExampleRng
from raysweep.schedules import Number, Schedule, bounded, resolved_value
from raysweep.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor, nn

# Of a step, this share goes along the gradient, the rest along the move before (as in APGD).
_MOMENTUM = 0.75
# When fewer rows are left, several runs of each are computed in one batch of about this size: the
# time of a pass through a small batch hardly depends on the number of rows.
_PACKED_ROWS = 64


class MultiTargeted(Spec):
    """PGD on margins of the logits, in several runs that hopeless rows leave (MultiTargeted).

    The first run raises max_{i != y} z_i - z_y. The others raise z_t - z_y for one class t after
    the other, in the order of their logits where the first run came nearest to the boundary, and
    then again, each from another random start. In a run the step size falls from 2 eps to 0 along a
    cosine.

    Let m be the margin z_y - max_{i != y} z_i of the image and m' the least margin found. If the
    margin falls evenly, the boundary is at the distance (1 + r) eps, with r = m' / (m - m'). A row
    leaves after n runs if r > reach / n: a row gets about reach / r runs. A row stops at its first
    misclassified iterate.
    """

    kind: Literal["multi-targeted"] = "multi-targeted"
    """Selects this attack."""

    eps: Annotated[Schedule, bounded(0)] = 8 / 255
    """Radius of the ball around the image, in pixel values; at most 1 for Linf."""

    steps: Annotated[int, Field(ge=1, le=10_000)] = 5
    """Gradient steps of each run."""

    runs: Annotated[int, Field(ge=1, le=10_000)] = 40
    """Largest number of runs of a row."""

    targets: Annotated[int, Field(ge=1)] = 5
    """Number of target classes."""

    reach: Annotated[Number, Field(ge=0)] | None = 2.0
    """How far beyond eps the boundary may be expected to lie, in units of eps: a row leaves after n
    runs if it is expected to be farther than reach / n. Null: no row leaves."""

    norm: Norm = "Linf"
    """Norm of the ball and of a step."""

    _check_eps_range = model_validator(mode="after")(check_eps_range)

    @property
    def vulnerability_kind(self) -> VulnerabilityKind:
        """Always `margin`."""
        return "margin"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng) -> AttackResult:
        """Attack a batch; see `Attack` for the arguments.

        Returns:
            The misclassified iterate of each broken row, the iterate of least margin of the others.
        """
        with freeze_model(model):
            with torch.no_grad():
                logits = model(x)
            clean_margin = true_class_margin(logits, y)
            search = _Search(
                x.clone(),
                logits.clone(),
                clean_margin.clone(),
                logits.argmax(1) != y,
                torch.ones_like(y),
            )
            targets = y
            run = 0
            while run < self.runs:
                rows = self._find_live_rows(search, clean_margin, run)
                if not len(rows):
                    break
                if run == 1:
                    targets = self._rank_targets(search.best_logits, y)
                # The first run is alone, because it determines the targets of the later ones.
                n_packed = max(1, _PACKED_ROWS // len(rows)) if run else 1
                runs = range(run, min(run + n_packed, self.runs))
                results = self._run_packed(model, x[rows], y[rows], targets[rows], runs, rng, rows)
                for run_index, result in zip(runs, results, strict=True):
                    # Results of runs after which a row would not have taken part do not count.
                    live_rows = self._find_live_rows(search, clean_margin, run_index)
                    is_live = torch.isin(rows, live_rows)
                    search.put(rows[is_live], result.select_rows(is_live))
                run = runs.stop
        return AttackResult(search.best_x, search.queries)

    def _find_live_rows(self, search: _Search, clean_margin: Tensor, run: int) -> Tensor:
        """Return the positions of the rows that take another run, (M,) int64."""
        is_live = ~search.is_broken
        if run and self.reach is not None:
            drop = clean_margin - search.best_margin
            is_live &= search.best_margin * run <= self.reach * drop
        return is_live.nonzero()[:, 0]

    def _rank_targets(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the other classes by their logits, largest first, (N, number of targets)."""
        others = logits.scatter(1, y[:, None], -torch.inf)
        n_targets = min(self.targets, logits.shape[1] - 1)
        return others.argsort(stable=True, dim=1, descending=True)[:, :n_targets]

    def _run_packed(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        targets: Tensor,
        runs: range,
        rng: ExampleRng,
        rows: Tensor,
    ) -> list[_Search]:
        """Compute several runs of the rows (M,) in one batch; return the result of each run."""
        eps, rows_rng = resolved_value(self.eps), rng.select_rows(rows)
        streams = [rows_rng.derive_stream("run", run) for run in runs]
        x_start = torch.cat([_sample_start(x, eps, self.norm, stream) for stream in streams])
        target = None
        if runs.start:
            target = torch.cat([targets[:, (run - 1) % targets.shape[1]] for run in runs])
        n_runs = len(runs)
        packed_x, packed_y = x.repeat(n_runs, *(1 for _ in x.shape[1:])), y.repeat(n_runs)
        return self._run_once(model, packed_x, packed_y, target, x_start).split(n_runs)

    def _run_once(
        self, model: nn.Module, x: Tensor, y: Tensor, target: Tensor | None, x_start: Tensor
    ) -> _Search:
        """Take all steps from one start; `target` (N,) is None for the first run."""
        eps = resolved_value(self.eps)
        x_now = x_before = x_start
        search = _Search.start(x_now, y)
        rows: Tensor = torch.arange(len(x), device=x.device)
        for step in range(self.steps + 1):
            logits, grad = _compute_margin_gradient(model, x_now, y, target)
            search.visit(rows, x_now, logits, y)
            if step == self.steps:
                break
            if is_on_cpu(x):
                kept = (~search.is_broken[rows]).nonzero()[:, 0]
                if len(kept) < len(rows):
                    rows, x, y, grad = rows[kept], x[kept], y[kept], grad[kept]
                    x_now, x_before = x_now[kept], x_before[kept]
                    target = None if target is None else target[kept]
                if not len(rows):
                    break
            length = eps * (1 + math.cos(math.pi * step / self.steps))
            ahead = x_now + length * steepest_ascent_direction(grad, self.norm)
            ahead = project_to_ball(ahead, x, eps, self.norm)
            if step:
                ahead = torch.lerp(x_now, ahead, _MOMENTUM)
                ahead = ahead.add_(x_now - x_before, alpha=1 - _MOMENTUM)
                ahead = project_to_ball(ahead, x, eps, self.norm)
            x_now, x_before = ahead, x_now
        return search


@dataclass
class _Search:
    """What was found for each of N rows.

    Attributes:
        best_x: First misclassified iterate, or the iterate of least margin if there is none.
        best_logits: Its logits, (N, classes).
        best_margin: Its margin z_y - max_{i != y} z_i, (N,).
        is_broken: Whether it is misclassified, (N,) bool.
        queries: Forward passes, (N,) int64.
    """

    best_x: Tensor
    best_logits: Tensor
    best_margin: Tensor
    is_broken: Tensor
    queries: Tensor

    @classmethod
    def start(cls, x: Tensor, y: Tensor) -> _Search:
        """Return a search of rows that have visited no point yet."""
        margin = x.new_full(y.shape, torch.inf)
        is_broken = torch.zeros_like(y, dtype=torch.bool)
        return cls(x.clone(), x.new_zeros(len(x), 0), margin, is_broken, torch.zeros_like(y))

    def select_rows(self, rows: Tensor) -> _Search:
        """Select the results of some rows, by a mask (N,) or by positions."""
        return _Search(*(values[rows] for values in vars(self).values()))

    def split(self, n_parts: int) -> list[_Search]:
        """Split the rows into `n_parts` equal parts, in order."""
        parts = zip(*(values.chunk(n_parts) for values in vars(self).values()), strict=True)
        return [_Search(*part) for part in parts]

    def visit(self, rows: Tensor, x: Tensor, logits: Tensor, y: Tensor) -> None:
        """Record an iterate of some rows.

        Args:
            rows: Their positions, (M,) int64.
            x: The iterates, (M, C, H, W).
            logits: Their logits, (M, classes).
            y: True labels, (M,).
        """
        if not self.best_logits.shape[1]:
            self.best_logits = logits.new_zeros(len(self.best_x), logits.shape[1])
        was_broken = self.is_broken[rows]
        self.queries[rows] += (~was_broken).long()
        self._replace(rows, x, logits, true_class_margin(logits, y), logits.argmax(1) != y)

    def put(self, rows: Tensor, other: _Search) -> None:
        """Record the result of a run of some rows, at the positions `rows`, (M,) int64."""
        self.queries[rows] += other.queries
        self._replace(rows, other.best_x, other.best_logits, other.best_margin, other.is_broken)

    def _replace(
        self, rows: Tensor, x: Tensor, logits: Tensor, margin: Tensor, is_broken: Tensor
    ) -> None:
        """Replace what is recorded where a row is broken for the first time or its margin falls."""
        is_better = ~self.is_broken[rows] & (is_broken | (margin < self.best_margin[rows]))
        for recorded, values in (
            (self.best_x, x),
            (self.best_logits, logits),
            (self.best_margin, margin),
            (self.is_broken, is_broken),
        ):
            merged = recorded[rows]
            masked_assign_(merged, is_better, values)
            recorded[rows] = merged


def _sample_start(x: Tensor, eps: float, norm: Norm, rng: ExampleRng) -> Tensor:
    """Return random points of the cube for Linf, of the sphere for L2."""
    if norm == "L2":
        return sample_on_sphere(x, eps, norm, rng)
    return (x + eps * rng.symmetric_uniform(tuple(x.shape[1:]), x.dtype)).clamp(0, 1)


def _compute_margin_gradient(
    model: nn.Module, x_adv: Tensor, y: Tensor, target: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return logits (N, classes) and the gradient (N, C, H, W) of the loss to raise."""
    with torch.enable_grad():
        x_adv = x_adv.detach().requires_grad_()
        logits = model(x_adv)
        if target is None:
            loss = -true_class_margin(logits, y)
        else:
            loss = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]
        (grad,) = torch.autograd.grad(loss.sum(), x_adv)
    return logits.detach(), grad
