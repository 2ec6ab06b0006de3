"""Square against a plain loop over one example, and its proposals by what the paper says about
them.
"""

import math

import numpy as np
import pytest
import torch
from slow_attacks import (
    SmallNet,
    bump,
    draw_images,
    recorded_inputs,
    size,
    slow_square_l2,
    slow_square_linf,
    window_side,
)

from raysweep.attacks import Square
from raysweep.attacks.square import _two_sided_bump
from raysweep.rng import ExampleRng

# Neither square nor of a side that 5 divides; two channels.
SHAPE = (2, 13, 11)
NET = SmallNet.draw(2 * 13 * 11, 5, seed=0)
X = draw_images(8, SHAPE, seed=2)
# The last row is wrong from the start.
Y = np.array([NET.predict(x) for x in X])
Y[-1] = (Y[-1] + 1) % 5
F64 = torch.float64


def run(attack, rows, x=X):
    model = NET.module()
    with recorded_inputs(model) as seen:
        result = attack(
            model,
            torch.from_numpy(x[rows]),
            torch.from_numpy(Y[rows]),
            ExampleRng.for_examples(torch.tensor(rows), 5),
        )
    return result, seen


def streams(row, restart=0):
    """The stream of one start for one row, and a function for the numbers of its windows, which all
    rows share.
    """
    rng = ExampleRng.for_examples(torch.tensor([row]), 5).derive_stream("restart", restart)

    def shared(name, count, each, dtype=F64):
        return ExampleRng(name.key, torch.arange(count)).uniform((each,), dtype).numpy()

    return rng, shared


def slow(attack, row, restart=0):
    rng, shared = streams(row, restart)
    start, queries = rng.derive_stream("start"), attack.queries
    if attack.norm == "Linf":
        stripes = start.uniform((2, 1, 11), F64)[0].numpy()
        draws = shared(rng.derive_stream("windows"), queries, 4)
        return slow_square_linf(
            NET, X[row], int(Y[row]), stripes, draws, eps=attack.eps, p_init=attack.p_init
        )
    grid_signs = start.derive_stream("signs").uniform((6, 5, 2, 1, 1), F64)[0, ..., 0, 0].numpy()
    grid_turned = shared(start.derive_stream("turned"), 30, 1, torch.float32).reshape(6, 5)
    blocks = [
        rng.derive_stream("signs", block).uniform((100, 2, 1, 1), F64)[0, ..., 0, 0]
        for block in range(0, queries, 100)
    ]
    return slow_square_l2(
        NET, X[row], int(Y[row]), grid_signs, grid_turned,
        shared(rng.derive_stream("windows"), queries, 5),
        torch.cat(blocks).numpy(), eps=attack.eps, p_init=attack.p_init,
    )  # fmt: skip


def run_slow_square(attack, row):
    """The best point of all starts, whether it is misclassified, and the slow attack's outcome for
    each start.
    """
    best, least, outcomes = X[row], NET.margin(X[row], int(Y[row])), []
    for restart in range(attack.restarts):
        if least > 0:
            outcomes.append(slow(attack, row, restart))
            if -outcomes[-1].loss < least:
                best, least = outcomes[-1].x, -outcomes[-1].loss
    return best, least <= 0, outcomes


@pytest.mark.parametrize(("eps", "row"), [(0.3, 0), (1.0, 1), (1.0, 2), (1.0, 7)])
def test_every_proposal_l2(eps, row):
    """Windows, signs, bumps, the mass that moves and the norm, query by query."""
    attack = Square(eps=eps, queries=130, norm="L2")
    result, seen = run(attack, [row])
    best, broken, outcomes = run_slow_square(attack, row)
    points = [X[row], *[point for outcome in outcomes for point in outcome.points]]
    assert broken == (row != 0)
    assert len(seen) == len(points)
    for ours, one in zip(seen, points, strict=True):
        np.testing.assert_allclose(ours[0], one, atol=1e-7)
    np.testing.assert_allclose(result.x_adv[0], best, atol=1e-7)
    assert result.queries.tolist() == [len(points)]


@pytest.mark.parametrize(("eps", "row"), [(0.02, 0), (0.02, 2), (0.06, 1), (0.06, 7)])
def test_every_proposal_linf(eps, row):
    """Proposals in order; our attack skips those that cannot change anything, and has the same
    outcome.
    """
    attack = Square(eps=eps, queries=130)
    result, (_, *seen) = run(attack, [row])
    best, broken, outcomes = run_slow_square(attack, row)
    assert broken == (row != 0)
    np.testing.assert_allclose(result.x_adv[0], best, atol=1e-12)
    points = iter(outcomes[0].points if outcomes else [])
    for ours in seen:
        assert any(np.allclose(ours[0], one, rtol=0, atol=1e-12) for one in points)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.04), ("L2", 0.5)])
def test_rows_of_a_batch_do_not_affect_each_other(norm, eps):
    """All rows share the windows, but not the starts; a row that breaks leaves the others alone;
    the best start counts.

    Queries are those that can matter, so that in Linf they are at most the slow one's.
    """
    attack = Square(eps=eps, queries=25, norm=norm, restarts=2)
    result, _ = run(attack, list(range(8)))
    for row in range(8):
        best, _, outcomes = run_slow_square(attack, row)
        np.testing.assert_allclose(result.x_adv[row], best, atol=1e-7)
        spent = 1 + sum(outcome.queries for outcome in outcomes)
        assert (
            int(result.queries[row]) == spent
            if norm == "L2"
            else 1 <= int(result.queries[row]) <= spent
        )


@pytest.mark.parametrize(("p_init", "sides"), [(0.1, (5, 3)), (0.01, (3, 3))])
def test_l2_proposals_change_two_odd_windows_and_keep_the_norm(p_init, sides):
    """For a model with a constant margin no proposal is accepted, so that each one differs from the
    start alone.

    Outside its two windows a proposal is the start times one factor.
    """
    same = SmallNet.draw(2 * 13 * 11, 5, seed=0, scale=0.0)
    module, grey = same.module(), torch.full((1, *SHAPE), 0.5, dtype=F64)
    attack = Square(eps=0.7, queries=60, norm="L2", p_init=p_init)
    with recorded_inputs(module) as seen:
        attack(
            module,
            grey,
            torch.tensor([same.predict(X[0])]),
            ExampleRng.for_examples(torch.tensor([3]), 0),
        )
    _, start, *proposals = [batch[0] - 0.5 for batch in seen]
    assert len(proposals) == 60 and math.isclose(size(start, "L2"), 0.7, rel_tol=1e-9)
    used = np.abs(start) > 1e-6
    for query, proposal in enumerate(proposals):
        assert math.isclose(size(proposal, "L2"), 0.7, rel_tol=1e-9)
        ratio = np.full(SHAPE, np.nan)
        ratio[used] = proposal[used] / start[used]
        values, counts = np.unique(ratio[used].round(6), return_counts=True)
        moved = (np.abs(ratio - values[counts.argmax()]) > 1e-5).any(0)
        # sqrt(0.1 x 143) = 3.8, sqrt(0.05 x 143) = 2.7 after query 10, 1.9 after query 50: odd, and
        # 3 at least.
        side = sides[query > 10]
        rows, columns = np.flatnonzero(moved.any(1)), np.flatnonzero(moved.any(0))
        assert side**2 * 0.6 <= moved.sum() <= 2 * side**2
        assert max(len(rows), len(columns)) <= 2 * side and min(len(rows), len(columns)) >= side - 1


def test_bumps():
    """Equation 2 by hand for side 3: half of a 1 x 3 and half of a 2 x 3 hill, of opposite sign;
    norm 1.
    """
    flat = np.array([1 / 4, 1 + 1 / 4, 1 / 4])
    upper = flat / np.linalg.norm(flat)
    hill = np.array([[1 / 4, 1 / 4, 1 / 4], [1 / 4, 5 / 4, 1 / 4]])
    lower = -hill / np.linalg.norm(hill)
    both = np.concatenate([upper[None], lower]) / math.sqrt(2)
    np.testing.assert_allclose(bump(3, False), both, atol=1e-12)
    for side in range(1, 12):
        for turned in (False, True):
            ours = _two_sided_bump(side, turned, torch.zeros((), dtype=F64))
            np.testing.assert_allclose(ours, bump(side, turned), atol=1e-7)


def test_stripes_linf():
    """The start is x + eps or x - eps in whole columns, a sign of its own for each column, channel
    and row.
    """
    grey = np.full((200, *SHAPE), 0.5)
    model = SmallNet.draw(2 * 13 * 11, 5, seed=0, scale=0.0).module()
    with recorded_inputs(model) as seen:
        label = model(torch.from_numpy(grey[:1])).argmax(1).expand(200)
        Square(eps=0.1, queries=1)(
            model, torch.from_numpy(grey), label, ExampleRng.for_examples(torch.arange(200), 1)
        )
    start = (seen[2] - 0.5) / 0.1
    np.testing.assert_allclose(np.abs(start), 1, atol=1e-9)
    assert (start == start[:, :, :1]).all()
    signs = start[:, :, 0]
    assert abs(signs.mean()) < 0.05
    for a, b in (
        (signs[:, 0], signs[:, 1]),
        (signs[:, :, :-1], signs[:, :, 1:]),
        (signs[:-1], signs[1:]),
    ):
        assert abs((a * b).mean()) < 0.06


def test_windows_linf():
    """On a model where no proposal is accepted: one square window, with the side of the schedule,
    one sign a channel.

    The last offset, at the lower or right border, is never drawn, as in the official code.
    """
    same = SmallNet.draw(2 * 13 * 11, 5, seed=0, scale=0.0)
    label = torch.tensor([same.predict(X[0])])
    grey = torch.full((1, *SHAPE), 0.5, dtype=F64)
    module = same.module()
    with recorded_inputs(module) as seen:
        Square(eps=0.1, queries=700, p_init=0.3)(
            module, grey, label, ExampleRng.for_examples(torch.tensor([3]), 0)
        )
    numbers = ExampleRng(
        ExampleRng.for_examples(torch.tensor([3]), 0)
        .derive_stream("restart", 0)
        .derive_stream("windows")
        .key,
        torch.arange(700),
    ).uniform((4,), F64)
    _, start, *proposals = [batch[0] for batch in seen]
    todo = iter(proposals)
    wanted, offsets = next(todo), []
    for query, draw in enumerate(numbers.tolist()):
        side = min(window_side(query, 13, 11, 0.3, 1), 11)
        top, left = math.floor(draw[0] * (13 - side)), math.floor(draw[1] * (11 - side))
        one = start.copy()
        for c in range(2):
            one[c, top : top + side, left : left + side] = 0.5 + (
                -0.1 if draw[2 + c] < 0.5 else 0.1
            )
        offsets.append((side, top, left))
        if np.allclose(one, wanted, rtol=0, atol=1e-12):
            wanted = next(todo, None)
            if wanted is None:
                break
    assert wanted is None
    assert len(proposals) > 300
    ones = {(top, left) for side, top, left in offsets if side == 3}
    assert {top for top, _ in ones} == set(range(10)) and {left for _, left in ones} == set(
        range(8)
    )


@pytest.mark.parametrize(
    ("query", "p"),
    [(0, 0.8), (10, 0.8), (11, 0.4), (50, 0.4), (51, 0.2), (200, 0.2), (201, 0.1), (500, 0.1),
     (501, 0.05), (1000, 0.05), (1001, 0.025), (2000, 0.025), (2001, 0.0125), (4000, 0.0125),
     (4001, 0.00625), (6000, 0.00625),
     (6001, 0.003125), (8000, 0.003125), (8001, 0.0015625), (99999, 0.0015625)],
)  # fmt: skip
def test_schedule_of_the_windows_share(query, p):
    """Section 4.1, of 1,000,000 pixels, so that a side tells p to three digits."""
    assert Square()._window_side(query, 1_000_000) == round(math.sqrt(p) * 1000)
    assert Square(p_init=0.05)._window_side(query, 1_000_000) == round(math.sqrt(p / 16) * 1000)


def test_defaults_are_those_of_autoattack():
    assert Square().to_json_dict() == {
        "kind": "square", "eps": 8 / 255, "queries": 5000, "norm": "Linf", "restarts": 1,
        "p_init": 0.8,
    }  # fmt: skip


def test_a_radius_of_zero_moves_nothing():
    assert torch.equal(run(Square(eps=0, queries=5), list(range(8)))[0].x_adv, torch.from_numpy(X))
    assert torch.equal(
        run(Square(eps=0, queries=5, norm="L2"), list(range(8)))[0].x_adv, torch.from_numpy(X)
    )
