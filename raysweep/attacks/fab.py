"""Fast adaptive boundary attack (Croce & Hein 2020b) as AutoAttack uses it.

FAB searches the misclassified image nearest to the original; a row is broken if that image is
within eps.
"""

from __future__ import annotations

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
    sample_on_sphere,
)
from raysweep.lazy_modules import torch
from raysweep.rng import ExampleRng
from raysweep.schedules import Schedule, bounded, resolved_value
from raysweep.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor, nn

# On an accelerator, broken rows are removed from the batch only after this number of steps, because
# the host waits for the device when it counts them.
ROW_CHECK_INTERVAL = 10
# Largest number of Newton steps in `compute_projection_step`. Tests with extreme gradients and 3072
# pixels needed at most 18.
MAX_NEWTON_STEPS = 30


class FAB(Spec):
    """FAB with the defaults of AutoAttack (Croce & Hein 2020b).

    A row stops at its first misclassified point within eps.
    """

    kind: Literal["fab"] = "fab"
    """Selects this attack."""

    eps: Annotated[Schedule, bounded(0)] = 8 / 255
    """Largest distance that counts as success, in pixel values; at most 1 for Linf."""

    steps: Annotated[int, Field(ge=1, le=10_000)] = 100
    """Steps of each start."""

    norm: Norm = "Linf"
    """Norm of the distance."""

    targets: Annotated[int, Field(ge=1)] | None = 9
    """Number of target classes: the highest clean logits after the first. Each target class is
    searched separately. Null searches the nearest of all boundaries, with a backward pass for each
    class."""

    restarts: Annotated[int, Field(ge=1)] = 1
    """Number of starts, per target class if targeted. The first start is the image itself, the
    others are random."""

    alpha_max: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Largest weight of the original image in a step; 0 ignores the original image (eq. 9)."""

    eta: Annotated[float, Field(ge=1)] = 1.05
    """Factor by which a step overshoots the linearised boundary."""

    beta: Annotated[float, Field(gt=0, le=1)] = 0.9
    """After a misclassified iterate, the search continues at this fraction of its distance from the
    original image."""

    _check_eps_range = model_validator(mode="after")(check_eps_range)

    @property
    def vulnerability_kind(self) -> VulnerabilityKind:
        """Always `margin`."""
        return "margin"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng) -> AttackResult:
        """Attack a batch; see `Attack` for the arguments.

        Returns:
            A misclassified point within eps of each broken row; the other rows unchanged.
        """
        with freeze_model(model):
            with torch.no_grad():
                ranking = model(x).argsort(1, descending=True)
            x_adv, queries = x.clone(), torch.ones_like(y)
            live_rows = (ranking[:, 0] == y).nonzero()[:, 0]
            for rank in self._target_ranks(ranking.shape[1]):
                for restart in range(self.restarts):
                    if not len(live_rows):
                        break
                    x_start = x[live_rows]
                    if restart:
                        stream = rng.select_rows(live_rows).derive_stream(
                            "target", rank, "restart", restart
                        )
                        x_start = sample_on_sphere(
                            x_start, 0.5 * resolved_value(self.eps), self.norm, stream
                        )
                    target = ranking[live_rows, rank] if self.targets else None
                    x_broken, is_broken, n_queries = self._search_boundary(
                        model, x[live_rows], y[live_rows], target, x_start
                    )
                    x_adv[live_rows[is_broken]] = x_broken[is_broken]
                    queries[live_rows] += n_queries
                    live_rows = live_rows[~is_broken]
        return AttackResult(x_adv, queries)

    def _target_ranks(self, n_classes: int) -> range:
        """Return the ranks, by clean logits, of the target classes; rank 0 if untargeted."""
        return range(1, 1 + min(self.targets, n_classes - 1)) if self.targets else range(1)

    def _search_boundary(
        self, model: nn.Module, x: Tensor, y: Tensor, target: Tensor | None, x_start: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run alg. 1 from one start.

        Args:
            model: Model in eval mode, without parameter gradients.
            x: Natural images, (N, C, H, W).
            y: True labels, (N,).
            target: Target classes, (N,); None for the nearest boundary.
            x_start: First iterates, (N, C, H, W).

        Returns:
            Misclassified images (N, C, H, W), valid for broken rows only; whether each row is
            broken (N,) bool; forward passes of each row (N,) int64.
        """
        eps = resolved_value(self.eps)
        result_x, result_queries = x.clone(), torch.zeros_like(y)
        result_broken = torch.zeros_like(y, dtype=torch.bool)
        # State of the rows that are still in the batch.
        row_index, x_adv, x_broken = torch.arange(len(x), device=x.device), x_start, x.clone()
        is_broken, queries = result_broken, result_queries
        for step in range(self.steps):
            if is_on_cpu(x) or step % ROW_CHECK_INTERVAL == 0:
                unbroken = (~is_broken).nonzero()[:, 0]
                if len(unbroken) < len(row_index):
                    result_x[row_index] = x_broken
                    result_broken[row_index] = is_broken
                    result_queries[row_index] = queries
                    row_index, x, y, x_adv, x_broken, is_broken, queries = (
                        rows[unbroken]
                        for rows in (row_index, x, y, x_adv, x_broken, is_broken, queries)
                    )
                    target = None if target is None else target[unbroken]
                if not len(row_index):
                    break
            gap, normal = self._linearize_boundary(model, x_adv, y, target)
            x_adv = self._step_towards_boundary(x_adv, x, gap, normal)
            with torch.inference_mode():
                is_wrong = model(x_adv).argmax(1) != y
            queries = queries + 2 * (~is_broken).long()
            delta = x_adv - x
            newly_broken = is_wrong & (_row_norms(delta, self.norm) <= eps) & ~is_broken
            masked_assign_(x_broken, newly_broken, x_adv)
            is_broken = is_broken | newly_broken
            scale = x.new_ones(len(x)).masked_fill_(is_wrong, self.beta)
            x_adv = torch.addcmul(x, delta, broadcast_rows(scale))
        result_x[row_index] = x_broken
        result_broken[row_index] = is_broken
        result_queries[row_index] = queries
        return result_x, result_broken, result_queries

    def _linearize_boundary(
        self, model: nn.Module, x_adv: Tensor, y: Tensor, target: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return z_t - z_y (N,) and its gradient (N, D), which define the linearised boundary.

        t is the target class, or the class of the nearest linearised boundary if untargeted.
        """
        with torch.enable_grad():
            x_adv = x_adv.detach().requires_grad_()
            logits = model(x_adv)
            if target is not None:
                value = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]
                (grad,) = torch.autograd.grad(value.sum(), x_adv)
                return value.detach(), grad.flatten(1)
            class_grads = [
                torch.autograd.grad(logits[:, c].sum(), x_adv, retain_graph=True)[0]
                for c in range(logits.shape[1])
            ]
            jacobian = torch.stack(class_grads, 1).flatten(2)
            rows = torch.arange(len(y), device=y.device)
            values = logits.detach() - logits.detach()[rows, y, None]
            normals = jacobian - jacobian[rows, y, None]
            # The dual norm turns a gap of logits into a distance.
            dual = normals.abs().sum(2) if self.norm == "Linf" else normals.norm(dim=2)
            nearest = (values.abs() / (dual + 1e-12)).scatter(1, y[:, None], torch.inf).argmin(1)
            return values[rows, nearest], normals[rows, nearest]

    def _step_towards_boundary(
        self, x_adv: Tensor, x: Tensor, gap: Tensor, normal: Tensor
    ) -> Tensor:
        """Return the next iterate (eq. 9): a weighted mean of the projections of x_adv and x.

        Both projections overshoot the plane by the factor eta. With d_adv and d_x, the distances
        of x_adv and x to the plane, the projection of x has weight
        min(d_adv / (d_adv + d_x), alpha_max).
        """
        point, origin = x_adv.flatten(1), x.flatten(1)
        origin_gap = gap + (normal * (origin - point)).sum(1)
        point_move, origin_move = compute_projection_step(
            torch.stack([point, origin]), normal, torch.stack([gap, origin_gap]), self.norm
        )
        point_distance = _row_norms(point_move, self.norm).clamp_min(1e-8)[:, None]
        origin_distance = _row_norms(origin_move, self.norm).clamp_min(1e-8)[:, None]
        alpha = (point_distance / (point_distance + origin_distance)).clamp_max(self.alpha_max)
        x_next = torch.lerp(point + self.eta * point_move, origin + self.eta * origin_move, alpha)
        return x_next.clamp_(0, 1).view_as(x)


def compute_projection_step(points: Tensor, normal: Tensor, gap: Tensor, norm: Norm) -> Tensor:
    """Return the shortest moves that bring points of the box [0, 1]^D onto a plane in the box.

    Each coordinate moves towards the plane at its own speed (1 for Linf, |normal| for L2) and stops
    at the border of the box. The function from time to closed gap is concave and piecewise linear.
    Newton's method therefore approaches the time at which the gap is closed from below; it ends
    when a step stops no further coordinate.

    Args:
        points: Points to project, (..., N, D) in [0, 1].
        normal: Normals of the planes, (N, D).
        gap: Values of the linear function at the points, (..., N); the plane is where it is 0.
        norm: Norm that measures the length of the moves.

    Returns:
        Moves (..., N, D) with normal . move = -gap. If the plane does not intersect the box, the
        move to the corner nearest to the plane.
    """
    # Masks are 0-1 floats: on a CPU, torch.where takes ten times as long as a product.
    direction = normal.sign() * torch.ones_like(gap).masked_fill_(gap >= 0, -1.0)[..., None]
    gap, weight = gap.abs(), normal.abs()
    rate = weight if norm == "Linf" else weight * weight
    room = torch.addcmul((direction + 1) / 2, direction, points, value=-1).clamp_min_(0)
    move, is_moving, buffer = torch.zeros_like(room), torch.empty_like(room), torch.empty_like(room)
    time, speed = torch.zeros_like(gap), torch.full_like(gap, -1)
    for _ in range(MAX_NEWTON_STEPS):
        torch.lt(move, room, out=is_moving)
        previous_speed, speed = speed, torch.mul(rate, is_moving, out=buffer).sum(-1)
        open_gap = gap - torch.mul(weight, move, out=buffer).sum(-1)
        is_advancing = (speed != previous_speed) & (speed > 0)
        if is_on_cpu(points) and not is_advancing.any():
            break
        time = torch.where(is_advancing, time + open_gap / speed, time)
        if norm == "Linf":
            reach = time[..., None]
        else:
            reach = torch.mul(time[..., None], weight, out=buffer)
        torch.minimum(reach, room, out=move)
    return move.mul_(direction)


def _row_norms(delta: Tensor, norm: Norm) -> Tensor:
    """Return the length of each row in `norm`, (N,)."""
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "Linf" else flat.norm(dim=1)
