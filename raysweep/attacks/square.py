"""Square attack (Andriushchenko et al. 2020): random search over square windows, no gradient."""

import math
from dataclasses import dataclass
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
    l2_norms,
    masked_assign_,
    true_class_margin,
)
from raysweep.rng import ExampleRng
from raysweep.schedules import Schedule, bounded, resolved_value
from raysweep.spec import Spec

# Queries after which the share of pixels in a window halves (sec. 4.1, for any budget: AutoAttack
# does not rescale it).
WINDOW_HALVING_QUERIES = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# Rows leave the batch this often where looking for them would make the host wait for the device.
ROW_CHECK_INTERVAL = 100


class Square(Spec):
    """Square with the margin loss and the settings of AutoAttack.

    All rows share the windows (and in Linf the signs) of a query number, as officially; starts, and
    signs in L2, are the row's own. In Linf a proposal that cannot change the outcome spends no
    forward pass: the row already looks so, or it refused the same window before and has not changed
    since.
    """

    kind: Literal["square"] = "square"
    eps: Annotated[Schedule, bounded(0)] = 8 / 255
    queries: Annotated[int, Field(ge=1)] = 5000
    norm: Norm = "Linf"
    restarts: Annotated[int, Field(ge=1)] = 1
    p_init: Annotated[float, Field(gt=0, le=1)] = 0.8

    _check_eps_range = model_validator(mode="after")(check_eps_range)

    @property
    def vulnerability_kind(self) -> VulnerabilityKind:
        return "margin"

    @property
    def steps(self) -> int:
        return self.queries

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng) -> AttackResult:
        """x (N, C, H, W) in [0, 1], y (N,). Rows that hold out return their point of least margin."""
        search = self._search_linf if self.norm == "Linf" else self._search_l2
        with freeze_model(model), torch.inference_mode():
            best_x, best, queries = x.clone(), true_class_margin(model(x), y), torch.ones_like(y)
            for restart in range(self.restarts):
                rows = (best > 0).nonzero()[:, 0]
                if not len(rows):
                    break
                found = _SquareSearch(
                    rows,
                    x[rows],
                    y[rows],
                    rng.select_rows(rows).derive_stream("restart", restart),
                    best_x,
                    best,
                    queries,
                )
                search(model, found)
                found.retire_rows(all_rows=True)
        return AttackResult(best_x.clone(), queries.clone())

    def _search_linf(self, model: nn.Module, search: "_SquareSearch") -> None:
        """From vertical stripes of ±eps, set windows to ±eps, one sign a channel (alg. 2)."""
        eps, (_, channels, height, width) = resolved_value(self.eps), search.x.shape
        low, high = (search.x - eps).clamp(0, 1), (search.x + eps).clamp(0, 1)
        stripes = (
            search.rng.derive_stream("start").uniform((channels, 1, width), search.x.dtype) < 0.5
        )
        search.set_start(model, torch.where(stripes, low, high))
        changed = torch.full_like(search.y, -1)
        lazy = is_on_cpu(search.x)
        seen: dict[tuple[int, ...], int] = {}
        draws = self._draw_shared_numbers(search.rng, 2 + channels)
        for query in range(self.queries):
            if lazy or query % ROW_CHECK_INTERVAL == 0:
                keep = search.retire_rows()
                if keep is not None:
                    low, high, changed = low[keep], high[keep], changed[keep]
            if not len(search.x):
                break
            side = min(self._window_side(query, height * width), height, width)
            top, left = (
                _window_offset(draws[query][0], height - side),
                _window_offset(draws[query][1], width - side),
            )
            signs = [draw < 0.5 for draw in draws[query][2:]]
            area = (..., slice(top, top + side), slice(left, left + side))
            window = torch.stack(
                [(low if down else high)[:, c][area] for c, down in enumerate(signs)], 1
            )
            if not lazy:
                candidate = search.best_x_adv.clone()
                candidate[area] = window
                search.accept_improvements(model, candidate)
                continue
            worth = (window != search.best_x_adv[area]).flatten(1).any(1)
            key = (side, top, left, *signs)
            if key in seen:
                worth &= changed > seen[key]
            seen[key] = query
            rows = worth.nonzero()[:, 0]
            if len(rows):
                candidate = search.best_x_adv[rows]
                candidate[area] = window[rows]
                changed[search.accept_improvements(model, candidate, rows)] = query

    def _search_l2(self, model: nn.Module, search: "_SquareSearch") -> None:
        """From a grid of bumps of norm eps, move the mass of one window to a new bump in another
        (alg. 3).
        """
        eps, (_, channels, height, width) = resolved_value(self.eps), search.x.shape
        x = search.x
        delta = _bump_grid(x, search.rng.derive_stream("start"))
        search.set_start(model, (x + eps * delta / l2_norms(delta).clamp_min(1e-12)).clamp(0, 1))
        draws = self._draw_shared_numbers(search.rng, 5)
        signs, bumps = torch.empty(0), dict[tuple[int, bool], Tensor]()
        for query in range(self.queries):
            if query % ROW_CHECK_INTERVAL == 0 or is_on_cpu(x):
                keep = search.retire_rows()
                signs = signs if keep is None or query % ROW_CHECK_INTERVAL == 0 else signs[keep]
            if not len(search.x):
                break
            if query % ROW_CHECK_INTERVAL == 0:
                signs = (
                    search.rng.derive_stream("signs", query)
                    .uniform((ROW_CHECK_INTERVAL, channels, 1, 1), x.dtype)
                    .lt(0.5)
                    * 2.0
                    - 1
                )
            x, delta = search.x, search.best_x_adv - search.x
            side = self._window_side(query, height * width, min_side=3)
            side = min(side + 1 - side % 2, height, width)
            top, left, top2, left2 = (
                _window_offset(draw, length - side)
                for draw, length in zip(draws[query], (height, width) * 2, strict=False)
            )
            window = delta[..., top : top + side, left : left + side]
            window2 = delta[..., top2 : top2 + side, left2 : left2 + side]
            key = side, draws[query][4] < 0.5
            if key not in bumps:
                bumps[key] = _two_sided_bump(*key, x)
            new = torch.addcdiv(
                bumps[key] * signs[:, query % ROW_CHECK_INTERVAL],
                window,
                _channel_l2_norms(window) + 1e-12,
            )
            before = l2_norms(delta).square_()
            window.zero_()
            window2.zero_()
            freed = (before - l2_norms(delta).square_()).clamp_min_(0)
            mass = (eps**2 - before).clamp_min_(0).div_(channels).add_(freed).sqrt_()
            window.copy_(new.mul_(mass / (_channel_l2_norms(new) + 1e-12)))
            search.accept_improvements(
                model, torch.addcmul(x, delta, eps / l2_norms(delta).clamp_min_(1e-12)).clamp_(0, 1)
            )

    def _draw_shared_numbers(self, rng: ExampleRng, numbers_per_query: int) -> list[list[float]]:
        """`count` numbers for each query number, the same for every row, drawn on the host."""
        numbers = ExampleRng(rng.derive_stream("windows").key, torch.arange(self.queries))
        return numbers.uniform((numbers_per_query,), torch.float64).tolist()

    def _window_side(self, query: int, pixels: int, min_side: int = 1) -> int:
        """Side of the window (sec. 4.1): round(sqrt(p H W))."""
        share = self.p_init / 2 ** sum(query > after for after in WINDOW_HALVING_QUERIES)
        return max(round(math.sqrt(share * pixels)), min_side)


@dataclass
class _SquareSearch:
    """Rows still searched, and (`result_*`) where the outcome of every row of the batch goes."""

    row_index: Tensor
    x: Tensor
    y: Tensor
    rng: ExampleRng
    result_x_adv: Tensor
    result_margin: Tensor
    result_queries: Tensor

    def set_start(self, model: nn.Module, candidate: Tensor) -> None:
        self.best_x_adv, self.best_margin = candidate, true_class_margin(model(candidate), self.y)
        self.queries = torch.ones_like(self.y)

    def accept_improvements(
        self, model: nn.Module, candidate: Tensor, row_index: Tensor | None = None
    ) -> Tensor:
        """Take each candidate whose margin is smaller; the rows that took it."""
        if row_index is None:
            loss = true_class_margin(model(candidate), self.y)
            self.queries += self.best_margin > 0
            better = loss < self.best_margin
            masked_assign_(self.best_x_adv, better, candidate)
            self.best_margin = torch.fmin(loss, self.best_margin)
            return better
        loss = true_class_margin(model(candidate), self.y[row_index])
        self.queries[row_index] += 1
        better = loss < self.best_margin[row_index]
        taken = row_index[better]
        self.best_x_adv[taken], self.best_margin[taken] = candidate[better], loss[better]
        return taken

    def retire_rows(self, all_rows: bool = False) -> Tensor | None:
        """Write the broken rows (or all) to the result and drop them; positions of those kept, None
        if all are.
        """
        out = (
            torch.ones_like(self.best_margin, dtype=torch.bool)
            if all_rows
            else self.best_margin <= 0
        )
        if not out.any():
            return None
        to = self.row_index[out]
        better = self.best_margin[out] < self.result_margin[to]
        self.result_x_adv[to[better]] = self.best_x_adv[out][better]
        self.result_margin[to[better]] = self.best_margin[out][better]
        self.result_queries[to] += self.queries[out]
        keep = (~out).nonzero()[:, 0]
        self.row_index, self.x, self.y, self.rng = (
            self.row_index[keep],
            self.x[keep],
            self.y[keep],
            self.rng.select_rows(keep),
        )
        self.best_x_adv, self.best_margin, self.queries = (
            self.best_x_adv[keep],
            self.best_margin[keep],
            self.queries[keep],
        )
        return keep


def _window_offset(uniform_draw: float, max_offset: int) -> int:
    """An integer in [0, high): the last offset is never drawn, as officially."""
    return int(uniform_draw * max_offset)


def _channel_l2_norms(window: Tensor) -> Tensor:
    """Euclidean norm of each channel of a window, (N, C, 1, 1)."""
    length: Tensor = torch.linalg.vector_norm(window, dim=(-2, -1), keepdim=True)
    return length


def _bump_grid(x: Tensor, rng: ExampleRng) -> Tensor:
    """Bumps of side H / 5 laid side by side, each with its sign."""
    _, channels, height, width = x.shape
    side = max(height // 5, 1)
    first = (height - side * 5) // 2
    rows, columns = height // side, width // side
    signs = (
        rng.derive_stream("signs").uniform((rows, columns, channels, 1, 1), x.dtype).lt(0.5) * 2.0
        - 1
    )
    turned = (
        ExampleRng(rng.derive_stream("turned").key, torch.arange(rows * columns))
        .uniform((1,))
        .flatten()
        .lt(0.5)
        .tolist()
    )
    delta = torch.zeros_like(x)
    for i in range(rows):
        for j in range(columns):
            top, left = max(first + i * side, 0), max(first + j * side, 0)
            area = delta[..., top : top + side, left : left + side]
            bump = _two_sided_bump(side, turned[i * columns + j], x)
            area += bump[: area.shape[2], : area.shape[3]] * signs[:, i, j]
    return delta


def _two_sided_bump(side: int, transposed: bool, like: Tensor) -> Tensor:
    """Two halves of opposite sign, each falling off from its middle, of norm 1 (eq. 3), (side,
    side).
    """
    half = side // 2
    bump = torch.cat([_one_sided_bump(half, side), -_one_sided_bump(side - half, side)])
    bump = bump / torch.linalg.vector_norm(bump)
    turned_bump: Tensor = bump.T if transposed else bump
    return turned_bump.to(like)


def _one_sided_bump(height: int, width: int) -> Tensor:
    """Sums of nested rectangles, 1 / k^2 the k-th from the inside, of norm 1."""
    hill: Tensor = torch.zeros(height, width)
    for k in range(max(height // 2 + 1, width // 2 + 1)):
        top, left = height // 2 - k, width // 2 - k
        hill[max(top, 0) : top + 2 * k + 1, max(left, 0) : left + 2 * k + 1] += 1 / (k + 1) ** 2
    unit: Tensor = hill / torch.linalg.vector_norm(hill).clamp_min(1e-12)
    return unit
