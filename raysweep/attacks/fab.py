"""Fast adaptive boundary attack (Croce & Hein 2020b), as AutoAttack runs it: success is a distance of at most eps."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from raysweep.attacks.base import Adversarial, Norm, View, frozen
from raysweep.rng import Rng
from raysweep.schedules import Schedule, now, within
from raysweep.spec import Spec


class FAB(Spec):
    """FAB with the settings of AutoAttack; a row is done at its first adversarial point within eps.

    targets: classes, in the order of the clean logits, whose boundary is sought one after the other; null seeks the
    nearest of all boundaries (a backward pass for each class). Restarts after the first start from a random point.
    """

    kind: Literal["fab"] = "fab"
    eps: Annotated[Schedule, within(0)] = 8 / 255
    steps: Annotated[int, Field(ge=1, le=10_000)] = 100
    norm: Norm = "Linf"
    targets: Annotated[int, Field(ge=1)] | None = 9
    restarts: Annotated[int, Field(ge=1)] = 1
    alpha_max: Annotated[float, Field(ge=0, le=1)] = 0.1
    eta: Annotated[float, Field(ge=1)] = 1.05
    beta: Annotated[float, Field(gt=0, le=1)] = 0.9

    @property
    def view(self) -> View:
        return "margin"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: Rng) -> Adversarial:
        """x (N, C, H, W) in [0, 1], y (N,). Rows that hold out return as they came."""
        with frozen(model):
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
                        start = self._start(start, rng.rows(live).stream("target", rank, "restart", restart))
                    target = ranked[live, rank] if self.targets else None
                    found, broken, spent = self._run(model, x[live], y[live], target, start)
                    result[live[broken]] = found[broken]
                    queries[live] += spent
                    live = live[~broken]
        return Adversarial(result, queries)

    def _run(
        self, model: nn.Module, x: Tensor, y: Tensor, target: Tensor | None, start: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One start (alg. 1): point found, whether within eps, forward passes spent, each a row."""
        eps = now(self.eps)
        found, broken, queries = x.clone(), torch.zeros_like(y, dtype=torch.bool), torch.zeros_like(y)
        row, current, done = torch.arange(len(x), device=x.device), start, broken.clone()
        for step in range(self.steps):
            if x.device.type == "cpu" or step % 10 == 0:
                keep = (~done).nonzero()[:, 0]
                if len(keep) < len(row):
                    row, x, y, current, done = row[keep], x[keep], y[keep], current[keep], done[keep]
                    target = None if target is None else target[keep]
                if not len(row):
                    break
            value, normal = self._plane(model, current, y, target)
            current = self._approach(current, x, value, normal)
            with torch.inference_mode():
                wrong = model(current).argmax(1) != y
            queries[row] += 2 * (~done).long()
            distance = current - x
            hit = wrong & (_size(distance, self.norm) <= eps) & ~done
            found[row] = torch.where(_wide(hit), current, found[row])
            broken[row] |= hit
            done = done | hit
            current = torch.where(_wide(wrong), x + self.beta * distance, current)
        return found, broken, queries

    def _plane(self, model: nn.Module, point: Tensor, y: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """z_t - z_y (N,) and its gradient (N, D): the linearised boundary, the nearest one if untargeted."""
        point = point.detach().requires_grad_()
        logits = model(point)
        if target is not None:
            value = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]
            (grad,) = torch.autograd.grad(value.sum(), point)
            return value.detach(), grad.flatten(1)
        jacobian = torch.stack(
            [torch.autograd.grad(logits[:, c].sum(), point, retain_graph=True)[0] for c in range(logits.shape[1])], 1
        ).flatten(2)
        rows = torch.arange(len(y), device=y.device)
        values = logits.detach() - logits.detach()[rows, y, None]
        normals = jacobian - jacobian[rows, y, None]
        dual = normals.abs().sum(2) if self.norm == "Linf" else normals.norm(dim=2)
        nearest = (values.abs() / (dual + 1e-12)).scatter(1, y[:, None], torch.inf).argmin(1)
        return values[rows, nearest], normals[rows, nearest]

    def _approach(self, point: Tensor, x: Tensor, value: Tensor, normal: Tensor) -> Tensor:
        """Overshoot the projections of the point and of x onto the plane, biased to x by their distances (eq. 9)."""
        p, origin = point.flatten(1), x.flatten(1)
        offset = (normal * p).sum(1) - value
        moves = project_onto_plane(torch.cat([p, origin]), normal.repeat(2, 1), offset.repeat(2), self.norm)
        here, there = moves.chunk(2)
        far, near = (_size(move, self.norm).clamp_min(1e-8)[:, None] for move in (there, here))
        alpha = (near / (near + far)).clamp_max(self.alpha_max)
        moved = (p + self.eta * here) * (1 - alpha) + (origin + self.eta * there) * alpha
        return moved.clamp(0, 1).view_as(x)

    def _start(self, x: Tensor, rng: Rng) -> Tensor:
        """A random point at distance eps / 2."""
        shape = tuple(x.shape[1:])
        t = rng.symmetric(shape, x.dtype) if self.norm == "Linf" else rng.normal(shape, x.dtype)
        return (x + 0.5 * now(self.eps) * t / _wide(_size(t, self.norm).clamp_min(1e-12))).clamp(0, 1)


def project_onto_plane(points: Tensor, normal: Tensor, offset: Tensor, norm: Norm) -> Tensor:
    """Smallest moves d (N, D) with normal . (points + d) = offset and points + d in [0, 1]; the corner if none does.

    Every coordinate moves towards the plane at its own speed (1 in Linf, |normal| in L2) until it meets the box; the
    time is where the sum of gains, concave and piecewise linear, meets the gap.
    """
    gap = (normal * points).sum(1) - offset
    towards = -normal.sign() * _wide_sign(gap)
    gap = gap.abs()
    weight = normal.abs()
    room = torch.where(towards > 0, 1 - points, points).clamp_min(0)
    speed = torch.ones_like(weight) if norm == "Linf" else weight
    stop = room / speed.clamp_min(1e-20)
    order = stop.argsort(1)
    stops = stop.gather(1, order)
    gained = (weight * room).gather(1, order).cumsum(1)
    rates = (weight * speed).gather(1, order)
    left = rates.flip(1).cumsum(1).flip(1) - rates
    enough = gained + left * stops
    first = (enough < gap[:, None]).sum(1, keepdim=True)
    last = points.shape[1] - 1
    k = first.clamp_max(last)
    before = (gained - (weight * room).gather(1, order)).gather(1, k)
    time = (gap[:, None] - before) / (left + rates).gather(1, k).clamp_min(1e-20)
    time = torch.where(first > last, torch.inf, time.clamp_min(0))
    distance = torch.where(weight > 0, torch.minimum(time.nan_to_num(posinf=3e38) * speed, room), 0)
    return towards * distance


def _wide_sign(value: Tensor) -> Tensor:
    """+1 where value >= 0, else -1, as (N, 1)."""
    return torch.where(value >= 0, 1.0, -1.0).to(value.dtype)[:, None]


def _size(move: Tensor, norm: Norm) -> Tensor:
    """Length of each row in `norm`, (N,)."""
    flat = move.flatten(1)
    return flat.abs().amax(1) if norm == "Linf" else flat.norm(dim=1)


def _wide(row: Tensor) -> Tensor:
    return row.view(-1, 1, 1, 1)
