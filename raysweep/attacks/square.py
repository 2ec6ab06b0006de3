"""Square attack (Andriushchenko et al. 2020): random search over square windows, no gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

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
from raysweep.lazy_modules import torch
from raysweep.rng import ExampleRng
from raysweep.schedules import Schedule, bounded, resolved_value
from raysweep.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor, nn

# Queries after which the share of pixels in a window halves (sec. 4.1). As in AutoAttack, they do
# not depend on the total number of queries.
WINDOW_HALVING_QUERIES = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# On an accelerator, broken rows are removed from the batch only after this number of queries,
# because the host waits for the device when it counts them.
ROW_CHECK_INTERVAL = 100


class Square(Spec):
    """Square attack on the margin loss, with the defaults of AutoAttack.

    As in the official code, each query proposes the same window to all rows, for Linf also with the
    same signs. Each row has its own random start, and for L2 its own signs. On a CPU, a Linf query
    skips the rows that it cannot improve: rows that already have the proposed pixels, and rows that
    have not changed since the same window was proposed to them before.
    """

    kind: Literal["square"] = "square"
    """Selects this attack."""

    eps: Annotated[Schedule, bounded(0)] = 8 / 255
    """Radius of the ball around the image, in pixel values; at most 1 for Linf."""

    queries: Annotated[int, Field(ge=1)] = 5000
    """Number of proposals per start; each costs a row at most one forward pass."""

    norm: Norm = "Linf"
    """Norm of the ball."""

    restarts: Annotated[int, Field(ge=1)] = 1
    """Number of random starts. Only rows that no start has broken yet start again."""

    p_init: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the pixels in the first windows (sec. 4.1)."""

    _check_eps_range = model_validator(mode="after")(check_eps_range)

    @property
    def vulnerability_kind(self) -> VulnerabilityKind:
        """Always `margin`."""
        return "margin"

    @property
    def steps(self) -> int:
        """Number of queries, under the name that the other attacks use."""
        return self.queries

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng) -> AttackResult:
        """Attack a batch; see `Attack` for the arguments.

        Returns:
            For each row the image of smallest margin that was tried.
        """
        run_search = self._search_linf if self.norm == "Linf" else self._search_l2
        with freeze_model(model), torch.inference_mode():
            x_adv, queries = x.clone(), torch.ones_like(y)
            margin = true_class_margin(model(x), y)
            for restart in range(self.restarts):
                live_rows = (margin > 0).nonzero()[:, 0]
                if not len(live_rows):
                    break
                search = _SquareSearch(
                    live_rows,
                    x[live_rows],
                    y[live_rows],
                    rng.select_rows(live_rows).derive_stream("restart", restart),
                    x_adv,
                    margin,
                    queries,
                )
                run_search(model, search)
                search.retire_rows(all_rows=True)
        return AttackResult(x_adv.clone(), queries.clone())

    def _search_linf(self, model: nn.Module, search: _SquareSearch) -> None:
        """Start from vertical stripes of ±eps, then set windows to ±eps (alg. 2).

        Each channel of a window has one sign.
        """
        eps, (_, channels, height, width) = resolved_value(self.eps), search.x.shape
        low, high = (search.x - eps).clamp(0, 1), (search.x + eps).clamp(0, 1)
        stripes = search.rng.derive_stream("start").uniform((channels, 1, width), search.x.dtype)
        search.set_start(model, torch.where(stripes < 0.5, low, high))
        skips_rows = is_on_cpu(search.x)
        last_change = torch.full_like(search.y, -1)  # query that last changed each row
        last_proposal: dict[tuple[int, ...], int] = {}  # window -> query that last proposed it
        draws = self._draw_shared_numbers(search.rng, 2 + channels)
        for query in range(self.queries):
            if skips_rows or query % ROW_CHECK_INTERVAL == 0:
                remaining = search.retire_rows()
                if remaining is not None:
                    low, high = low[remaining], high[remaining]
                    last_change = last_change[remaining]
            if not len(search.x):
                break
            side = min(self._window_side(query, height * width), height, width)
            top = _window_offset(draws[query][0], height - side)
            left = _window_offset(draws[query][1], width - side)
            use_low = [draw < 0.5 for draw in draws[query][2:]]
            area = (..., slice(top, top + side), slice(left, left + side))
            window = _linf_window(low, high, use_low, area)
            if not skips_rows:
                candidate = search.best_x_adv.clone()
                candidate[area] = window
                search.accept_improvements(model, candidate)
                continue
            may_improve = (window != search.best_x_adv[area]).flatten(1).any(1)
            key = (side, top, left, *use_low)
            if key in last_proposal:
                may_improve &= last_change > last_proposal[key]
            last_proposal[key] = query
            rows = may_improve.nonzero()[:, 0]
            if len(rows):
                candidate = search.best_x_adv[rows]
                candidate[area] = window[rows]
                last_change[search.accept_improvements(model, candidate, rows)] = query

    def _search_l2(self, model: nn.Module, search: _SquareSearch) -> None:
        """Start from a grid of bumps with norm eps, then move mass between two windows (alg. 3).

        Mass is squared norm of the perturbation.
        """
        eps, (_, channels, height, width) = resolved_value(self.eps), search.x.shape
        x = search.x
        delta = _bump_grid(x, search.rng.derive_stream("start"))
        search.set_start(model, (x + eps * delta / l2_norms(delta).clamp_min(1e-12)).clamp(0, 1))
        draws = self._draw_shared_numbers(search.rng, 5)
        signs = torch.empty(0)
        bumps: dict[tuple[int, bool], Tensor] = {}
        for query in range(self.queries):
            # Signs are drawn for ROW_CHECK_INTERVAL queries at a time.
            draws_signs = query % ROW_CHECK_INTERVAL == 0
            if draws_signs or is_on_cpu(x):
                remaining = search.retire_rows()
                if remaining is not None and not draws_signs:
                    signs = signs[remaining]
            if not len(search.x):
                break
            if draws_signs:
                stream = search.rng.derive_stream("signs", query)
                signs = _random_signs(stream, (ROW_CHECK_INTERVAL, channels, 1, 1), x.dtype)
            x, delta = search.x, search.best_x_adv - search.x
            side = self._window_side(query, height * width, min_side=3)
            side = min(side + 1 - side % 2, height, width)
            top, left, top2, left2 = (
                _window_offset(draw, length - side)
                for draw, length in zip(draws[query], (height, width) * 2, strict=False)
            )
            target = delta[..., top : top + side, left : left + side]
            source = delta[..., top2 : top2 + side, left2 : left2 + side]
            key = side, draws[query][4] < 0.5
            if key not in bumps:
                bumps[key] = _two_sided_bump(*key, x)
            bump = bumps[key] * signs[:, query % ROW_CHECK_INTERVAL]
            _move_mass_(delta, target, source, bump, eps)
            scale = eps / l2_norms(delta).clamp_min_(1e-12)
            search.accept_improvements(model, torch.addcmul(x, delta, scale).clamp_(0, 1))

    def _draw_shared_numbers(self, rng: ExampleRng, numbers_per_query: int) -> list[list[float]]:
        """Draw numbers in [0, 1) on the host for each query, the same for every row.

        Returns:
            `numbers_per_query` numbers for each query.
        """
        numbers = ExampleRng(rng.derive_stream("windows").key, torch.arange(self.queries))
        return numbers.uniform((numbers_per_query,), torch.float64).tolist()

    def _window_side(self, query: int, pixels: int, min_side: int = 1) -> int:
        """Return the side of the window, round(sqrt(p H W)) with p halving over time (sec. 4.1)."""
        share = self.p_init / 2 ** sum(query > after for after in WINDOW_HALVING_QUERIES)
        return max(round(math.sqrt(share * pixels)), min_side)


@dataclass
class _SquareSearch:
    """State of one start: the rows that are still in the batch, and the results of all rows.

    Attributes:
        row_index: Position in the results of each of the M rows in the batch.
        x: Natural images, (M, C, H, W).
        y: True labels, (M,).
        rng: Random numbers of the M rows.
        result_x_adv: Best images of all rows, over all starts.
        result_margin: Margins of `result_x_adv`.
        result_queries: Forward passes of all rows.
        best_x_adv: Best images of this start, (M, C, H, W).
        best_margin: Margins of `best_x_adv`, (M,); a row is broken at 0 or less.
        queries: Forward passes in this start, (M,) int64.
    """

    row_index: Tensor
    x: Tensor
    y: Tensor
    rng: ExampleRng
    result_x_adv: Tensor
    result_margin: Tensor
    result_queries: Tensor
    best_x_adv: Tensor = field(init=False)
    best_margin: Tensor = field(init=False)
    queries: Tensor = field(init=False)

    def set_start(self, model: nn.Module, candidate: Tensor) -> None:
        """Make `candidate` (M, C, H, W) the best images."""
        self.best_x_adv, self.best_margin = candidate, true_class_margin(model(candidate), self.y)
        self.queries = torch.ones_like(self.y)

    def accept_improvements(
        self, model: nn.Module, candidate: Tensor, row_index: Tensor | None = None
    ) -> Tensor:
        """Replace the best image of each row whose candidate has a smaller margin.

        Args:
            model: The model under attack.
            candidate: Proposed images, one for each of the M rows or of `row_index`.
            row_index: Positions of the proposals in the batch, int64; None for all rows.

        Returns:
            Rows that changed: bool (M,) without `row_index`, else positions in the batch.
        """
        if row_index is None:
            margin = true_class_margin(model(candidate), self.y)
            self.queries += self.best_margin > 0
            improved = margin < self.best_margin
            masked_assign_(self.best_x_adv, improved, candidate)
            self.best_margin = torch.fmin(margin, self.best_margin)
            return improved
        margin = true_class_margin(model(candidate), self.y[row_index])
        self.queries[row_index] += 1
        improved = margin < self.best_margin[row_index]
        changed_rows = row_index[improved]
        self.best_x_adv[changed_rows] = candidate[improved]
        self.best_margin[changed_rows] = margin[improved]
        return changed_rows

    def retire_rows(self, all_rows: bool = False) -> Tensor | None:
        """Write the broken rows, or all rows, to the results and drop them from the batch.

        Returns:
            Former positions of the rows that remain, int64; None if no row was dropped.
        """
        if all_rows:
            leaves = torch.ones_like(self.best_margin, dtype=torch.bool)
        else:
            leaves = self.best_margin <= 0
        if not leaves.any():
            return None
        result_rows = self.row_index[leaves]
        improved = self.best_margin[leaves] < self.result_margin[result_rows]
        self.result_x_adv[result_rows[improved]] = self.best_x_adv[leaves][improved]
        self.result_margin[result_rows[improved]] = self.best_margin[leaves][improved]
        self.result_queries[result_rows] += self.queries[leaves]
        remaining = (~leaves).nonzero()[:, 0]
        self.row_index = self.row_index[remaining]
        self.x, self.y = self.x[remaining], self.y[remaining]
        self.rng = self.rng.select_rows(remaining)
        self.best_x_adv = self.best_x_adv[remaining]
        self.best_margin = self.best_margin[remaining]
        self.queries = self.queries[remaining]
        return remaining


def _window_offset(uniform_draw: float, max_offset: int) -> int:
    """Return an integer in [0, max_offset).

    The last possible offset is never drawn, as in the official code.
    """
    return int(uniform_draw * max_offset)


def _linf_window(low: Tensor, high: Tensor, use_low: list[bool], area: tuple[Any, ...]) -> Tensor:
    """Cut a window out of the images, each channel from `low` or `high` as given by `use_low`."""
    channels = []
    for channel, is_low in enumerate(use_low):
        bound = low if is_low else high
        channels.append(bound[:, channel][area])
    return torch.stack(channels, 1)


def _move_mass_(delta: Tensor, target: Tensor, source: Tensor, bump: Tensor, eps: float) -> None:
    """Move the mass of two windows to a new bump in the first one, in place (alg. 3).

    Args:
        delta: Perturbations, (M, C, H, W).
        target: View of the window of `delta` that gets the bump.
        source: View of the window of `delta` that is cleared.
        bump: Signed bump of the size of a window, (M, C, side, side).
        eps: Radius of the ball. If the perturbation is shorter, the bump also gets the mass that is
            missing to eps.
    """
    new_window = torch.addcdiv(bump, target, _channel_l2_norms(target) + 1e-12)
    total = l2_norms(delta).square_()
    target.zero_()
    source.zero_()
    released = (total - l2_norms(delta).square_()).clamp_min_(0)
    channels = delta.shape[1]
    mass = (eps**2 - total).clamp_min_(0).div_(channels).add_(released).sqrt_()
    target.copy_(new_window.mul_(mass / (_channel_l2_norms(new_window) + 1e-12)))


def _channel_l2_norms(window: Tensor) -> Tensor:
    """Return the Euclidean norm of each channel of a window, (N, C, 1, 1)."""
    norms: Tensor = torch.linalg.vector_norm(window, dim=(-2, -1), keepdim=True)
    return norms


def _random_signs(rng: ExampleRng, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Draw -1 or 1, (N, *shape)."""
    return rng.uniform(shape, dtype).lt(0.5) * 2.0 - 1


def _bump_grid(x: Tensor, rng: ExampleRng) -> Tensor:
    """Return perturbations (N, C, H, W) of bumps of side H / 5 side by side, with random signs."""
    _, channels, height, width = x.shape
    side = max(height // 5, 1)
    first_offset = (height - side * 5) // 2
    n_rows, n_columns = height // side, width // side
    signs = _random_signs(rng.derive_stream("signs"), (n_rows, n_columns, channels, 1, 1), x.dtype)
    # Whether a bump is transposed does not depend on the example.
    grid_rng = ExampleRng(rng.derive_stream("turned").key, torch.arange(n_rows * n_columns))
    is_transposed = grid_rng.uniform((1,)).flatten().lt(0.5).tolist()
    delta = torch.zeros_like(x)
    for i in range(n_rows):
        for j in range(n_columns):
            top, left = max(first_offset + i * side, 0), max(first_offset + j * side, 0)
            area = delta[..., top : top + side, left : left + side]
            bump = _two_sided_bump(side, is_transposed[i * n_columns + j], x)
            area += bump[: area.shape[2], : area.shape[3]] * signs[:, i, j]
    return delta


def _two_sided_bump(side: int, transposed: bool, like: Tensor) -> Tensor:
    """Return a bump (side, side) of norm 1: two halves of opposite sign (eq. 3).

    Args:
        side: Side of the bump, in pixels.
        transposed: Whether the halves are left and right instead of top and bottom.
        like: Tensor whose dtype and device the bump gets.
    """
    half = side // 2
    bump = torch.cat([_one_sided_bump(half, side), -_one_sided_bump(side - half, side)])
    bump = bump / torch.linalg.vector_norm(bump)
    oriented_bump: Tensor = bump.T if transposed else bump
    return oriented_bump.to(like)


def _one_sided_bump(height: int, width: int) -> Tensor:
    """Return a sum of nested rectangles of norm 1; the k-th from the inside has height 1 / k^2."""
    bump: Tensor = torch.zeros(height, width)
    for k in range(max(height // 2 + 1, width // 2 + 1)):
        top, left = height // 2 - k, width // 2 - k
        bump[max(top, 0) : top + 2 * k + 1, max(left, 0) : left + 2 * k + 1] += 1 / (k + 1) ** 2
    unit_bump: Tensor = bump / torch.linalg.vector_norm(bump).clamp_min(1e-12)
    return unit_bump
