"""Reference implementations of the published attacks: plain loops over one example in numpy and
float64.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SmallNet:
    """Two layers with a tanh between them; its logits and their derivatives are written out by
    hand.

    levels: if not 0, pixels are first rounded to multiples of 1 / levels, so that different points
    have exactly the same loss; derivatives ignore the rounding.
    """

    first: Array
    first_bias: Array
    second: Array
    second_bias: Array
    levels: int = 0

    @classmethod
    def draw(
        cls, pixels: int, classes: int, seed: int, hidden: int = 16, scale: float = 4.0
    ) -> "SmallNet":
        rng = np.random.default_rng(seed)
        first = rng.normal(size=(hidden, pixels)) * scale / math.sqrt(pixels)
        second = rng.normal(size=(classes, hidden)) * 2 / math.sqrt(hidden)
        return cls(first, -first.sum(1) / 2, second, rng.normal(size=classes) * 0.1)

    def rounded(self, x: Array) -> Array:
        return np.round(x * self.levels) / self.levels if self.levels else x

    def logits(self, x: Array) -> Array:
        return (
            self.second @ np.tanh(self.first @ self.rounded(x).ravel() + self.first_bias)
            + self.second_bias
        )

    def jacobian(self, x: Array) -> Array:
        """(classes, pixels): the derivative of each logit."""
        inner = np.tanh(self.first @ self.rounded(x).ravel() + self.first_bias)
        return (self.second * (1 - inner**2)) @ self.first

    def predict(self, x: Array) -> int:
        return int(np.argmax(self.logits(x)))

    def margin(self, x: Array, y: int) -> float:
        z = self.logits(x)
        return float(z[y] - max(z[k] for k in range(len(z)) if k != y))

    def module(self) -> nn.Sequential:
        """The same network in torch."""
        hidden, pixels = self.first.shape
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, len(self.second))
        )
        net = nn.Sequential(Rounded(self.levels), *net).double()
        with torch.no_grad():
            for parameter, value in zip(
                net.parameters(),
                (self.first, self.first_bias, self.second, self.second_bias),
                strict=True,
            ):
                parameter.copy_(torch.from_numpy(value))
        return net


class Rounded(nn.Module):
    """Rounds to multiples of 1 / levels; gradients pass through unchanged."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            (x * self.levels).round().detach() / self.levels + (x - x.detach())
            if self.levels
            else x
        )


def draw_images(count: int, shape: tuple[int, int, int], seed: int) -> Array:
    """Images in [0, 1] with some pixels at the ends of that range."""
    return np.clip(np.random.default_rng(seed).uniform(-0.1, 1.1, (count, *shape)), 0, 1)


@contextmanager
def recorded_inputs(model: nn.Module) -> Iterator[list[Array]]:
    """Every batch that the model is given, in order."""
    seen: list[Array] = []
    handle = model.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().numpy().copy())
    )
    try:
        yield seen
    finally:
        handle.remove()


def loss_and_slope(
    name: str,
    z: Array,
    y: int,
    target: int = -1,
    natural: Array | None = None,
    confidence: float = 0.0,
) -> tuple[float, Array]:
    """An attack's loss at one row of logits, and its derivative with respect to each logit."""
    classes = len(z)
    one = np.eye(classes)
    others = [k for k in range(classes) if k != y]
    rival = max(others, key=lambda k: z[k])
    down = sorted(range(classes), key=lambda k: -z[k])
    p = np.exp(z - z.max())
    p /= p.sum()
    if name == "ce":
        return -math.log(p[y]), p - one[y]
    if name == "kl":
        assert natural is not None
        q = np.exp(natural - natural.max())
        q /= q.sum()
        return sum(q[k] * (math.log(q[k]) - math.log(p[k])) for k in range(classes)), p - q
    if name == "cw":
        return z[rival] - z[y], one[rival] - one[y]
    if name == "cw with confidence":
        value = z[y] - z[rival] + confidence
        return (-value, one[rival] - one[y]) if value > 0 else (0.0, np.zeros(classes))
    if name == "dlr":
        above, above_slope = z[y] - z[rival], one[y] - one[rival]
        below, below_slope = z[down[0]] - z[down[2]] + 1e-12, one[down[0]] - one[down[2]]
    elif name == "dlr-targeted":
        above, above_slope = z[y] - z[target], one[y] - one[target]
        below = z[down[0]] - (z[down[2]] + z[down[3]]) / 2 + 1e-12
        below_slope = one[down[0]] - (one[down[2]] + one[down[3]]) / 2
    else:
        raise ValueError(name)
    return -above / below, -above_slope / below + above * below_slope / below**2


def step_direction(slope: Array, norm: str) -> Array:
    if norm == "Linf":
        return np.sign(slope)
    length = math.sqrt(sum(v * v for v in slope.ravel()))
    return slope / length if length > 0 else slope


def size(move: Array, norm: str) -> float:
    flat = move.ravel()
    return (
        max(abs(float(v)) for v in flat)
        if norm == "Linf"
        else math.sqrt(sum(float(v) ** 2 for v in flat))
    )


def project(point: Array, x: Array, eps: float, norm: str) -> Array:
    """Project into the ball around x, then into the box."""
    if norm == "Linf":
        point = np.minimum(np.maximum(point, x - eps), x + eps)
    elif size(point - x, "L2") > eps:
        point = x + (point - x) * (eps / size(point - x, "L2"))
    return np.minimum(np.maximum(point, 0), 1)


@dataclass
class Outcome:
    """The result of an attack on one row: its point, its forward passes, and every point that it
    evaluated.

    sure: how many of these points follow from clear decisions. The next one depended on the last
    digits of a loss, which another order of summation may change.
    """

    x: Array
    queries: int
    points: list[Array]
    kappa: int = 0
    broken: bool = False
    loss: float = -math.inf
    unsure_from: int | None = None

    @property
    def sure(self) -> int:
        return len(self.points) if self.unsure_from is None else self.unsure_from


def slow_pgd(
    net: SmallNet,
    x: Array,
    y: int,
    start: Array,
    *,
    eps: float,
    step: float,
    steps: int,
    loss: str = "ce",
    norm: str = "Linf",
    tau: int | None = None,
    confidence: float = 50.0,
) -> Outcome:
    """Algorithm 1 of GAIRAT, or with `tau` its algorithm 3."""
    point, kappa, points = start, 0, []
    natural = net.logits(x)
    left = tau
    for _ in range(steps):
        points.append(point)
        right = net.predict(point) == y
        if left is not None and not right:
            if left == 0:
                break
            left -= 1
        if right:
            kappa += 1
        _, slope = loss_and_slope(
            loss, net.logits(point), y, natural=natural, confidence=confidence
        )
        gradient = (slope @ net.jacobian(point)).reshape(x.shape)
        point = project(point + step * step_direction(gradient, norm), x, eps, norm)
    return Outcome(point, len(points), points, kappa)


def slow_apgd(
    net: SmallNet,
    x: Array,
    y: int,
    target: int,
    start: Array,
    *,
    eps: float,
    steps: int,
    checkpoints: list[int],
    loss: str = "ce",
    norm: str = "Linf",
    rho: float = 0.75,
) -> Outcome:
    """Algorithm 1 of Auto-PGD; stops at the first misclassified point, else returns the one of
    highest loss.
    """

    def look(at: Array) -> tuple[float, Array]:
        value, slope = loss_and_slope(loss, net.logits(at), y, target)
        return value, (slope @ net.jacobian(at)).reshape(x.shape)

    points, step, halved_last = [start], 2 * eps, True
    value, gradient = look(start)
    best, best_value, best_gradient = start, value, gradient
    if net.predict(start) != y:
        return Outcome(start, 1, points, broken=True, loss=value)
    # At its first check the official code compares the loss of step 0 with a row of zeros.
    values, unsure_from = {-1: 0.0}, None
    last_check, best_at_check = 0, value
    before = now = start
    for i in range(steps):
        pushed = project(now + step * step_direction(gradient, norm), x, eps, norm)
        moved = pushed if i == 0 else now + 0.75 * (pushed - now) + 0.25 * (now - before)
        moved = project(moved, x, eps, norm)
        before, now = now, moved
        points.append(now)
        values[i], gradient = look(now)
        for other, at in ((best_value, best), (values[i - 1], before)):
            same = np.array_equal(net.rounded(now), net.rounded(at))
            if unsure_from is None and abs(values[i] - other) < 1e-13 and not same:
                unsure_from = len(points)
        if values[i] > best_value:
            best, best_value, best_gradient = now, values[i], gradient
        if net.predict(now) != y:
            return Outcome(
                now, len(points), points, broken=True, loss=best_value, unsure_from=unsure_from
            )
        if i + 1 in checkpoints:
            length = i + 1 - last_check
            increases = len([j for j in range(last_check, i + 1) if values[j] > values[j - 1]])
            seldom = increases <= rho * length
            stalled = not halved_last and best_value == best_at_check
            halved_last = seldom or stalled
            if halved_last:
                step, now, gradient = step / 2, best, best_gradient
            last_check, best_at_check = i + 1, best_value
    return Outcome(best, len(points), points, loss=best_value, unsure_from=unsure_from)


def slow_projection(p: Array, w: Array, gap: float, norm: str) -> Array:
    """The smallest move d with w . d = -gap and p + d in the box; the corner nearest to the plane
    if there is none.

    All coordinates move at the same time, at speed 1 (Linf) or |w_i| (L2), and each stops at the
    box. These events are handled in the order of time.
    """
    d = np.zeros(len(p))
    movers = []
    for i in range(len(p)):
        if w[i] == 0 or gap == 0:
            continue
        sign = 1 if (w[i] > 0) == (gap < 0) else -1
        room = 1 - p[i] if sign > 0 else p[i]
        speed = 1.0 if norm == "Linf" else abs(w[i])
        movers.append((room / speed, i, sign, speed))
    left, time = abs(gap), 0.0
    for stop, i, _, _ in sorted(movers):
        pace = sum(abs(w[k]) * v for s, k, _, v in movers if (s, k) >= (stop, i))
        if pace * (stop - time) >= left:
            time += left / pace
            break
        left -= pace * (stop - time)
        time = stop
    for stop, i, sign, speed in movers:
        d[i] = sign * speed * min(time, stop)
    return d


def slow_fab(
    net: SmallNet,
    x: Array,
    y: int,
    target: int | None,
    start: Array,
    *,
    eps: float,
    steps: int,
    norm: str = "Linf",
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> Outcome:
    """Algorithm 1 of FAB; stops at the first misclassified point that is at most eps from x."""
    point, points = start, []
    for _ in range(steps):
        points.append(point)
        z, slopes = net.logits(point), net.jacobian(point)
        if target is None:
            distances = {}
            for k in range(len(z)):
                if k != y:
                    w = slopes[k] - slopes[y]
                    dual = sum(abs(v) for v in w) if norm == "Linf" else size(w, "L2")
                    distances[k] = abs(z[k] - z[y]) / dual
            other = min(distances, key=lambda k: distances[k])
        else:
            other = target
        value, w = z[other] - z[y], slopes[other] - slopes[y]
        here = slow_projection(point.ravel(), w, value, norm)
        there = slow_projection(x.ravel(), w, value + float(w @ (x - point).ravel()), norm)
        near, far = max(size(here, norm), 1e-8), max(size(there, norm), 1e-8)
        alpha = min(near / (near + far), alpha_max)
        moved = (1 - alpha) * (point.ravel() + eta * here) + alpha * (x.ravel() + eta * there)
        moved = np.clip(moved, 0, 1).reshape(x.shape)
        points.append(moved)
        if net.predict(moved) != y:
            if size(moved - x, norm) <= eps:
                return Outcome(moved, len(points), points, broken=True)
            point = (1 - beta) * x + beta * moved
        else:
            point = moved
    return Outcome(x, len(points), points)


def window_side(query: int, height: int, width: int, p_init: float, at_least: int) -> int:
    """Side of Square's window: p is halved after each of these queries."""
    p = p_init
    for after in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000):
        if query > after:
            p /= 2
    return max(round(math.sqrt(p * height * width)), at_least)


def slow_square_linf(
    net: SmallNet,
    x: Array,
    y: int,
    stripes: Array,
    draws: Array,
    *,
    eps: float,
    p_init: float = 0.8,
) -> Outcome:
    """Square's algorithm 2. stripes (C, 1, W) and draws (queries, 2 + C): numbers in [0, 1)."""
    channels, height, width = x.shape
    best = np.empty_like(x)
    for c in range(channels):
        for j in range(width):
            best[c, :, j] = x[c, :, j] + (-eps if stripes[c, 0, j] < 0.5 else eps)
    best = np.clip(best, 0, 1)
    least, points = net.margin(best, y), [best]
    for query, draw in enumerate(draws):
        if least <= 0:
            break
        side = min(window_side(query, height, width, p_init, 1), height, width)
        top, left = math.floor(draw[0] * (height - side)), math.floor(draw[1] * (width - side))
        proposal = best.copy()
        for c in range(channels):
            sign = -1 if draw[2 + c] < 0.5 else 1
            for i in range(top, top + side):
                for j in range(left, left + side):
                    proposal[c, i, j] = min(max(x[c, i, j] + sign * eps, 0), 1)
        points.append(proposal)
        if net.margin(proposal, y) < least:
            best, least = proposal, net.margin(proposal, y)
    return Outcome(best, len(points), points, broken=least <= 0, loss=-least)


def bump(side: int, turned: bool) -> Array:
    """Equations 2 and 3 of Square: two adjacent hills of opposite sign, with norm 1 together."""

    def hill(height: int, width: int) -> Array:
        result = np.zeros((height, width))
        n = max(height // 2, width // 2)
        for r in range(1, height + 1):
            for s in range(1, width + 1):
                m = n - max(abs(r - height // 2 - 1), abs(s - width // 2 - 1))
                result[r - 1, s - 1] = sum(1 / (n + 1 - k) ** 2 for k in range(m + 1))
        return result / size(result, "L2") if result.size else result

    both = np.concatenate([hill(side // 2, side), -hill(side - side // 2, side)])
    both /= size(both, "L2")
    return both.T if turned else both


def slow_square_l2(
    net: SmallNet,
    x: Array,
    y: int,
    grid_signs: Array,
    grid_turned: Array,
    draws: Array,
    signs: Array,
    *,
    eps: float,
    p_init: float = 0.8,
) -> Outcome:
    """Square's algorithm 3. grid_signs (rows, columns, C), draws (queries, 5), signs (queries, C):
    in [0, 1).
    """
    channels, height, width = x.shape
    tile = height // 5
    edge = (height - 5 * tile) // 2
    delta = np.zeros_like(x)
    for i in range(height // tile):
        for j in range(width // tile):
            shape = bump(tile, bool(grid_turned[i, j] < 0.5))
            for c in range(channels):
                for r in range(tile):
                    for s in range(tile):
                        a, b = edge + i * tile + r, edge + j * tile + s
                        if a < height and b < width:
                            delta[c, a, b] += shape[r, s] * (1 if grid_signs[i, j, c] < 0.5 else -1)
    best = np.clip(x + eps * delta / size(delta, "L2"), 0, 1)
    least, points = net.margin(best, y), [best]
    for query, draw in enumerate(draws):
        if least <= 0:
            break
        side = window_side(query, height, width, p_init, 3)
        side = min(side if side % 2 else side + 1, height, width)
        top, left = math.floor(draw[0] * (height - side)), math.floor(draw[1] * (width - side))
        top2, left2 = math.floor(draw[2] * (height - side)), math.floor(draw[3] * (width - side))
        delta = best - x
        inside = np.zeros((height, width), dtype=bool)
        inside[top : top + side, left : left + side] = True
        inside[top2 : top2 + side, left2 : left2 + side] = True
        freed = sum(float(v) ** 2 for v in delta[:, inside].ravel())
        unused = max(eps**2 - sum(float(v) ** 2 for v in delta.ravel()), 0)
        budget = math.sqrt(freed + unused / channels)
        shape = bump(side, bool(draw[4] < 0.5))
        new = {}
        for c in range(channels):
            old = delta[c, top : top + side, left : left + side]
            length = size(old, "L2")
            mixed = shape * (1 if signs[query, c] < 0.5 else -1) + (old / length if length else 0)
            new[c] = mixed / size(mixed, "L2") * budget
        delta[:, top2 : top2 + side, left2 : left2 + side] = 0
        for c in range(channels):
            delta[c, top : top + side, left : left + side] = new[c]
        proposal = np.clip(x + eps * delta / size(delta, "L2"), 0, 1)
        points.append(proposal)
        if net.margin(proposal, y) < least:
            best, least = proposal, net.margin(proposal, y)
    return Outcome(best, len(points), points, broken=least <= 0, loss=-least)
