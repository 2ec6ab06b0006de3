"""Fast adaptive boundary attack (Croce & Hein 2020b), as AutoAttack runs it: success is a distance
of at most eps.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from raysweep.attacks.base import (
    AttackResult,
    Norm,
    VulnerabilityKind,
    check_eps_range,
    freeze_model,
    is_on_cpu,
    masked_assign_,
)
from raysweep.rng import ExampleRng
from raysweep.schedules import Schedule, bounded, resolved_value
from raysweep.spec import Spec

# Rows leave the batch this often where looking for them would make the host wait for the device.
ROW_CHECK_INTERVAL = 10
# Of the projection: 3072 coordinates took 18 at most, with the wildest gradients.
MAX_NEWTON_STEPS = 30


class FAB(Spec):
    """FAB with the settings of AutoAttack; a row is done at its first adversarial point within eps.

    targets: classes, in the order of the clean logits, whose boundary is sought one after the
    other; null seeks the nearest of all boundaries (a backward pass for each class). Restarts after
    the first start from a random point.
    """

    kind: Literal["fab"] = "fab"
    eps: Annotated[Schedule, bounded(0)] = 8 / 255
    steps: Annotated[int, Field(ge=1, le=10_000)] = 100
    norm: Norm = "Linf"
    targets: Annotated[int, Field(ge=1)] | None = 9
    restarts: Annotated[int, Field(ge=1)] = 1
    alpha_max: Annotated[float, Field(ge=0, le=1)] = 0.1
    eta: Annotated[float, Field(ge=1)] = 1.05
    beta: Annotated[float, Field(gt=0, le=1)] = 0.9

    _check_eps_range = model_validator(mode="after")(check_eps_range)

    @property
    def vulnerability_kind(self) -> VulnerabilityKind:
        return "margin"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng) -> AttackResult:
        """x (N, C, H, W) in [0, 1], y (N,). Rows that hold out return as they came."""
        with freeze_model(model):
            with torch.no_grad():
                ranked = model(x).argsort(1, descending=True)
            result, queries = x.clone(), torch.ones_like(y)
            live = (ranked[:, 0] == y).nonzero()[:, 0]
            ranks = range(1, 1 + min(self.targets, ranked.shape[1] - 1)) if self.targets else [0]
            for rank in ranks:
                for restart in range(self.restarts):
                    if not len(live):
                        break
                    start = x[live]
                    if restart:
                        start = self._sample_start(
                            start,
                            rng.select_rows(live).derive_stream("target", rank, "restart", restart),
                        )
                    target = ranked[live, rank] if self.targets else None
                    found, broken, spent = self._search_boundary(
                        model, x[live], y[live], target, start
                    )
                    result[live[broken]] = found[broken]
                    queries[live] += spent
                    live = live[~broken]
        return AttackResult(result, queries)

    def _search_boundary(
        self, model: nn.Module, x: Tensor, y: Tensor, target: Tensor | None, x_start: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One start (alg. 1): point found, whether within eps, forward passes spent, each a row."""
        eps = resolved_value(self.eps)
        found, broken, queries = (
            x.clone(),
            torch.zeros_like(y, dtype=torch.bool),
            torch.zeros_like(y),
        )
        row, point, adv = torch.arange(len(x), device=x.device), x_start, x.clone()
        hit, spent = broken, queries
        for step in range(self.steps):
            if is_on_cpu(x) or step % ROW_CHECK_INTERVAL == 0:
                keep = (~hit).nonzero()[:, 0]
                if len(keep) < len(row):
                    found[row], broken[row], queries[row] = adv, hit, spent
                    row, x, y, point, adv, hit, spent = (
                        v[keep] for v in (row, x, y, point, adv, hit, spent)
                    )
                    target = None if target is None else target[keep]
                if not len(row):
                    break
            point = self._step_towards_boundary(
                point, x, *self._linearize_boundary(model, point, y, target)
            )
            with torch.inference_mode():
                wrong = model(point).argmax(1) != y
            spent = spent + 2 * (~hit).long()
            move = point - x
            new = wrong & (_row_norms(move, self.norm) <= eps) & ~hit
            masked_assign_(adv, new, point)
            hit = hit | new
            point = torch.addcmul(
                x, move, _broadcast_rows(x.new_ones(len(x)).masked_fill_(wrong, self.beta))
            )
        found[row], broken[row], queries[row] = adv, hit, spent
        return found, broken, queries

    def _linearize_boundary(
        self, model: nn.Module, x_adv: Tensor, y: Tensor, target: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """z_t - z_y (N,) and its gradient (N, D): the linearised boundary, the nearest one if
        untargeted.
        """
        x_adv = x_adv.detach().requires_grad_()
        logits = model(x_adv)
        if target is not None:
            value = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]
            (grad,) = torch.autograd.grad(value.sum(), x_adv)
            return value.detach(), grad.flatten(1)
        jacobian = torch.stack(
            [
                torch.autograd.grad(logits[:, c].sum(), x_adv, retain_graph=True)[0]
                for c in range(logits.shape[1])
            ],
            1,
        ).flatten(2)
        rows = torch.arange(len(y), device=y.device)
        values = logits.detach() - logits.detach()[rows, y, None]
        normals = jacobian - jacobian[rows, y, None]
        dual = normals.abs().sum(2) if self.norm == "Linf" else normals.norm(dim=2)
        nearest = (values.abs() / (dual + 1e-12)).scatter(1, y[:, None], torch.inf).argmin(1)
        return values[rows, nearest], normals[rows, nearest]

    def _step_towards_boundary(
        self, x_adv: Tensor, x: Tensor, gap: Tensor, normal: Tensor
    ) -> Tensor:
        """Overshoot the projections of the point and of x onto the plane, biased to x by their
        distances (eq. 9).
        """
        p, origin = x_adv.flatten(1), x.flatten(1)
        gaps = torch.stack([gap, gap + (normal * (origin - p)).sum(1)])
        here, there = project_onto_plane(torch.stack([p, origin]), normal, gaps, self.norm)
        far, near = (_row_norms(move, self.norm).clamp_min(1e-8)[:, None] for move in (there, here))
        alpha = (near / (near + far)).clamp_max(self.alpha_max)
        moved = torch.lerp(p + self.eta * here, origin + self.eta * there, alpha)
        return moved.clamp_(0, 1).view_as(x)

    def _sample_start(self, x: Tensor, rng: ExampleRng) -> Tensor:
        """A random point at distance eps / 2."""
        shape = tuple(x.shape[1:])
        t = (
            rng.symmetric_uniform(shape, x.dtype)
            if self.norm == "Linf"
            else rng.normal(shape, x.dtype)
        )
        return (
            x
            + 0.5
            * resolved_value(self.eps)
            * t
            / _broadcast_rows(_row_norms(t, self.norm).clamp_min(1e-12))
        ).clamp(0, 1)


def project_onto_plane(points: Tensor, normal: Tensor, gap: Tensor, norm: Norm) -> Tensor:
    """Smallest moves d (..., N, D) with normal . d = -gap and points + d in [0, 1]; the corner if
    none does.

    points (..., N, D), normal (N, D), gap (..., N). Every coordinate moves towards the plane at its
    own speed (1 in Linf, |normal| in L2) until it meets the box. The gap closed by a time is
    concave and piecewise linear, so Newton's method climbs to the answer in a few steps, and is
    there when no further coordinate has stopped. Masks are numbers: on a CPU `torch.where` takes
    ten times as long as a product.
    """
    towards = normal.sign() * torch.ones_like(gap).masked_fill_(gap >= 0, -1.0)[..., None]
    gap, weight = gap.abs(), normal.abs()
    rate = weight if norm == "Linf" else weight * weight
    room = torch.addcmul((towards + 1) / 2, towards, points, value=-1).clamp_min_(0)
    move, moving, closing = torch.zeros_like(room), torch.empty_like(room), torch.empty_like(room)
    time, pace = torch.zeros_like(gap), torch.full_like(gap, -1)
    for _ in range(MAX_NEWTON_STEPS):
        torch.lt(move, room, out=moving)
        before, pace = pace, torch.mul(rate, moving, out=closing).sum(-1)
        short = gap - torch.mul(weight, move, out=closing).sum(-1)
        climbing = (pace != before) & (pace > 0)
        if is_on_cpu(points) and not climbing.any():
            break
        time = torch.where(climbing, time + short / pace, time)
        reach = (
            time[..., None] if norm == "Linf" else torch.mul(time[..., None], weight, out=closing)
        )
        torch.minimum(reach, room, out=move)
    return move.mul_(towards)


def _row_norms(delta: Tensor, norm: Norm) -> Tensor:
    """Length of each row in `norm`, (N,)."""
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "Linf" else flat.norm(dim=1)


def _broadcast_rows(row: Tensor) -> Tensor:
    return row.view(-1, 1, 1, 1)
