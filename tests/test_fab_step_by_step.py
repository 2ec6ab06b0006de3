"""FAB against a plain loop over one example, and by hand on a model with one straight boundary."""

import numpy as np
import pytest
import torch
from slow_attacks import (
    Outcome,
    SmallNet,
    draw_images,
    recorded_inputs,
    size,
    slow_fab,
    slow_projection,
)

from raysweep.attacks import FAB
from raysweep.attacks.fab import compute_projection_step
from raysweep.rng import ExampleRng

SHAPE = (2, 2, 3)
NET = SmallNet.draw(12, 6, seed=0)
X = draw_images(12, SHAPE, seed=1)
# The last row is wrong from the start.
Y = np.array([NET.predict(x) for x in X])
Y[-1] = (Y[-1] + 1) % 6


def run(attack, rows):
    model = NET.module()
    with recorded_inputs(model) as seen:
        result = attack(
            model,
            torch.from_numpy(X[rows]),
            torch.from_numpy(Y[rows]),
            ExampleRng.for_examples(torch.tensor(rows), 5),
        )
    return result, seen


def compare_with_slow_fab(attack, row):
    """Compare every point of our attack and the slow one on one row. Returns whether it broke, and
    in which run.
    """
    result, seen = run(attack, [row])
    x, y = X[row], int(Y[row])
    down = sorted(range(6), key=lambda k: -NET.logits(x)[k])
    targets = down[1 : 1 + attack.targets] if attack.targets else [None]
    runs = (
        []
        if down[0] != y
        else [(target, again) for target in targets for again in range(attack.restarts)]
    )
    points, outcome, number = [x], Outcome(x, 0, []), -1
    for number, (target, again) in enumerate(runs):  # noqa: B007
        start = x
        if again:
            start = seen[len(points)][0]
            # Random starts are at half of eps, unless the box cuts them.
            assert 0.2 * attack.eps < size(start - x, attack.norm) <= 0.5 * attack.eps + 1e-12
        outcome = slow_fab(
            NET, x, y, target, start, eps=attack.eps, steps=attack.steps, norm=attack.norm,
            alpha_max=attack.alpha_max, eta=attack.eta, beta=attack.beta,
        )  # fmt: skip
        points += outcome.points
        if outcome.broken:
            break
    assert len(seen) == len(points)
    for ours, slow in zip(seen, points, strict=True):
        np.testing.assert_allclose(ours[0], slow, atol=1e-8)
    np.testing.assert_allclose(result.x_adv[0], outcome.x, atol=1e-8)
    assert result.queries.tolist() == [len(points)]
    return outcome.broken, number


@pytest.mark.parametrize("targets", [9, None])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.09), ("L2", 0.3)])
def test_every_point_of_a_run(norm, eps, targets):
    """Projections, the bias to x, overshoot, the step back from beyond the boundary; rows that hold
    out and others.
    """
    outcomes = [
        compare_with_slow_fab(FAB(eps=eps, norm=norm, steps=10, targets=targets), row)
        for row in (3, 4, 7, 11)
    ]
    outcomes.append(
        compare_with_slow_fab(FAB(eps=eps / 3, norm=norm, steps=10, targets=targets), 1)
    )
    # Row 3 is broken by its second target in L2; row 1 holds out against all five.
    second = (False, 4) if norm == "Linf" else (True, 1)
    if targets:
        assert outcomes == [second, (True, 0), (True, 0), (False, -1), (False, 4)]
    else:
        assert outcomes == [(norm == "L2", 0), (True, 0), (True, 0), (False, -1), (False, 0)]


@pytest.mark.parametrize(
    "change",
    [{}, {"alpha_max": 0.5}, {"alpha_max": 0.0}, {"eta": 1.3}, {"beta": 0.5}, {"targets": None}],
    ids=str,
)
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.05), ("L2", 0.15)])
def test_settings_and_restarts(norm, eps, change):
    attack = FAB(eps=eps, norm=norm, steps=8, targets=1, restarts=2).model_copy(update=change)
    assert compare_with_slow_fab(attack, 3) == (False, 1)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("targets", [3, None])
def test_rows_of_a_batch_do_not_affect_each_other(norm, targets):
    """Rows that are wrong, break or hold out at different times do not disturb each other."""
    attack = FAB(eps={"Linf": 0.085, "L2": 0.3}[norm], norm=norm, steps=6, targets=targets)
    rows = [0, 2, 3, 4, 6, 11]
    result, _ = run(attack, rows)
    alone = [run(attack, [row])[0] for row in rows]
    np.testing.assert_allclose(result.x_adv, torch.cat([one.x_adv for one in alone]), atol=1e-8)
    assert result.queries.tolist() == [int(one.queries) for one in alone]
    assert len(set(result.queries.tolist())) >= 3


def test_rows_that_are_done_spend_no_more_queries(monkeypatch):
    """As on a GPU, a row that is done stays in the batch for a while; neither its point nor its
    queries change.
    """
    attack, rows = FAB(eps=0.3, norm="L2", steps=12, targets=1), list(range(12))
    early, _ = run(attack, rows)
    for module in ("base", "fab"):
        monkeypatch.setattr(f"raysweep.attacks.{module}.is_on_cpu", lambda x: False)
    late, _ = run(attack, rows)
    np.testing.assert_allclose(late.x_adv, early.x_adv, atol=1e-9)
    assert late.queries.tolist() == early.queries.tolist()


def run_fab_on_plane(points, eps, norm, steps=100, offset=-2.8, **settings):
    """FAB on images of two pixels a, b of class 0, with z_1 - z_0 = 3 a + b + offset."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[0.0, 0.0], [3.0, 1.0]]))
        net[1].bias.copy_(torch.tensor([0.0, offset]))
    x = torch.tensor(points, dtype=torch.float64).view(-1, 1, 1, 2)
    with recorded_inputs(net) as seen:
        result = FAB(eps=eps, norm=norm, steps=steps, **settings)(
            net,
            x,
            torch.zeros(len(x), dtype=torch.long),
            ExampleRng.for_examples(torch.arange(len(x)), 0),
        )
    return result, [batch.reshape(-1, 2) for batch in seen]


def test_two_steps_by_hand_linf():
    """From (.5, .5) the boundary is 0.8 / 4 = 0.2 away, and 1.05 times that is 0.01 beyond the eps
    of 0.205.

    So the first point found, (.71, .71), is too far: back to 0.9 of the way, (.689, .689), 0.011
    before the boundary. From there alpha = 0.011 / (0.011 + 0.2), a mixture of .689 + 1.05 * 0.011
    and .71: near enough.
    """
    result, seen = run_fab_on_plane([[0.5, 0.5], [0.9, 0.9]], 0.205, "Linf")
    alpha = 0.011 / 0.211
    last = (1 - alpha) * (0.689 + 1.05 * 0.011) + alpha * 0.71
    for points, expected in zip(seen[1:], (0.5, 0.71, 0.689, last), strict=True):
        np.testing.assert_allclose(points, [[expected, expected]], atol=1e-12)
    assert abs(last - 0.701043) < 1e-6
    np.testing.assert_allclose(result.x_adv.view(2, 2), [[last, last], [0.9, 0.9]], atol=1e-12)
    assert result.queries.tolist() == [5, 1]


def test_one_step_by_hand_l2():
    """w = (3, 1), gap 0.8: the move is 1.05 * 0.8 / 10 * w; 0.8 / 10 * w has the length 0.253."""
    result, seen = run_fab_on_plane([[0.5, 0.5]], 0.27, "L2")
    np.testing.assert_allclose(seen[2], [[0.5 + 1.05 * 0.24, 0.5 + 1.05 * 0.08]], atol=1e-12)
    np.testing.assert_allclose(result.x_adv.view(1, 2), seen[2], atol=1e-12)
    assert result.queries.tolist() == [3]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_one_step_by_hand_where_the_box_is_in_the_way(norm):
    """3 a + b - 3.5 is -0.25 at (.95, .4). a has room for .05, which gives .15; the other .1 is
    b's. Then 5% more.
    """
    result, seen = run_fab_on_plane([[0.95, 0.4]], 0.2, norm, offset=-3.5)
    np.testing.assert_allclose(seen[2], [[1.0, 0.4 + 1.05 * 0.1]], atol=1e-12)
    np.testing.assert_allclose(result.x_adv.view(1, 2), seen[2], atol=1e-12)


def test_no_success_beyond_eps():
    """The boundary is 0.2 away: with eps 0.19 the row is returned unchanged, after 100 steps of two
    passes.
    """
    result, seen = run_fab_on_plane([[0.5, 0.5]], 0.19, "Linf")
    assert result.x_adv.flatten().tolist() == [0.5, 0.5]
    assert result.queries.tolist() == [201] == [len(seen)]


def test_a_distance_of_just_eps_is_a_success():
    """At (.5, .5) + 1.05 * 0.2: these steps are not exact in floats, so eps is the distance or one
    ulp less.
    """
    distance = float(np.abs(run_fab_on_plane([[0.5, 0.5]], 1.0, "Linf", steps=1)[1][2] - 0.5).max())
    for eps, queries in ((distance, 3), (np.nextafter(distance, 0), 5)):
        assert run_fab_on_plane([[0.5, 0.5]], float(eps), "Linf")[0].queries.tolist() == [queries]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_projection_in_the_box(norm):
    """Both signs of the gap, coordinates without weight or room, planes beyond the box; two layers
    of points.
    """
    rng = np.random.default_rng(3)
    points = np.clip(rng.uniform(-0.3, 1.3, (2, 40, 9)), 0, 1)
    normal = rng.normal(size=(40, 9)) * (rng.uniform(size=(40, 9)) < 0.8)
    gaps = rng.normal(size=(2, 40)) * 2
    gaps[0, 0] = 0
    steps = compute_projection_step(*(torch.from_numpy(v) for v in (points, normal, gaps)), norm)
    ours = steps.numpy()
    reached = 0
    for layer in range(2):
        for row in range(40):
            p, w, gap = points[layer, row], normal[row], gaps[layer, row]
            slow = slow_projection(p, w, gap, norm)
            np.testing.assert_allclose(ours[layer, row], slow, atol=1e-9)
            reached += abs(w @ slow + gap) < 1e-9
    assert 40 < reached < 80


def test_defaults_are_those_of_autoattack():
    assert FAB().to_json_dict() == {
        "kind": "fab", "eps": 8 / 255, "steps": 100, "norm": "Linf", "targets": 9, "restarts": 1,
        "alpha_max": 0.1, "eta": 1.05, "beta": 0.9,
    }  # fmt: skip


def test_a_radius_of_zero_moves_nothing():
    for norm in ("Linf", "L2"):
        attack = FAB(eps=0, norm=norm, steps=2, targets=2, restarts=2)
        assert torch.equal(run(attack, list(range(12)))[0].x_adv, torch.from_numpy(X))
