"""APGD against a plain loop over one example: every point that it evaluates, its losses, targets
and restarts.
"""

import math

import numpy as np
import pytest
import torch
from slow_attacks import Outcome, SmallNet, draw_images, loss_and_slope, recorded_inputs, slow_apgd
from torch import nn

from raysweep.attacks import APGD
from raysweep.rng import ExampleRng

SHAPE = (2, 2, 3)
NET = SmallNet.draw(12, 6, seed=0)
X = draw_images(12, SHAPE, seed=1)
# The last row is wrong from the start.
Y = np.array([NET.predict(x) for x in X])
Y[-1] = (Y[-1] + 1) % 6
# Small enough that some rows hold out, large enough that others break on the way.
RADIUS = {"Linf": 0.06, "L2": 0.25}
# Section 3.1 of Auto-PGD for 100 iterations, and the same rule by hand for 30: gaps of 6, 5, 4, 3,
# 2 and then 1.
CHECKPOINTS = {
    100: [22, 41, 57, 70, 80, 87, 93, 99],
    30: [6, 11, 15, 18, 20, *range(21, 31)],
    3: [1, 2, 3],
}


def run(attack, rows, net=NET, seed=5):
    """The result for these rows, and the points at which the model was evaluated."""
    model = net.module()
    with recorded_inputs(model) as seen:
        result = attack(
            model,
            torch.from_numpy(X[rows]),
            torch.from_numpy(Y[rows]),
            ExampleRng.for_examples(torch.tensor(rows), seed),
        )
    return result, seen


def compare_with_slow_apgd(attack, row, net=NET, seed=5):
    """Run our attack and the slow one on one row from the same starts, and compare every point.

    Returns the number of points compared, and whether the row held out: None where rounding decides
    that.
    """
    result, seen = run(attack, [row], net, seed)
    x, y = X[row], int(Y[row])
    points, best, queries = [x], Outcome(x, 0, []), 1
    down = sorted(range(6), key=lambda k: -net.logits(x)[k])
    targets = down[1 : 1 + attack.targets] if attack.loss == "dlr-targeted" else [y]
    runs = [] if down[0] != y else [target for target in targets for _ in range(attack.restarts)]
    for target in runs:
        outcome = slow_apgd(
            net, x, y, target, seen[len(points)][0], eps=attack.eps, steps=attack.steps,
            loss=attack.loss,
            checkpoints=CHECKPOINTS[attack.steps], norm=attack.norm, rho=attack.rho,
        )  # fmt: skip
        points += outcome.points[: outcome.sure]
        queries += outcome.queries
        if outcome.broken or outcome.loss > best.loss:
            best = outcome
        if outcome.broken or outcome.sure < len(outcome.points):
            break
    for ours, slow in zip(seen, points, strict=False):
        np.testing.assert_allclose(ours[0], slow, atol=1e-8)
    if runs and outcome.sure < len(outcome.points):
        return len(points), None
    assert len(seen) == len(points)
    np.testing.assert_allclose(result.x_adv[0], best.x, atol=1e-8)
    assert result.queries.tolist() == [queries]
    return len(points), not best.broken


@pytest.mark.parametrize("loss", ["ce", "cw", "dlr"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_every_point_of_a_run(norm, loss):
    """Steps, momentum, halvings, returns to the best point: 100 iterations, of rows that hold out
    and of others.
    """
    attack = APGD(eps=RADIUS[norm], norm=norm, loss=loss)
    counts, held = zip(*[compare_with_slow_apgd(attack, row) for row in (2, 3, 11)], strict=True)
    # In L2 the margin's iterates come to rest within 22 steps; from there rounding decides.
    assert (
        counts[0] < 60
        and counts[1] > (22 if (loss, norm) == ("cw", "L2") else 60)
        and counts[2] == 1
    )
    assert held[0] is False


@pytest.mark.parametrize(("norm", "eps", "rows"), [("Linf", 0.03, (1, 2)), ("L2", 0.12, (3, 7))])
def test_targets_are_the_classes_ranked_after_the_first(norm, eps, rows):
    """Ranks 2, 3, 4, ... of the clean logits, one run each; a row held out returns the best of all
    runs.
    """
    for row, targets, runs in zip(rows, (9, 2), (5, 2), strict=True):
        attack = APGD(eps=eps, norm=norm, loss="dlr-targeted", steps=30, targets=targets)
        assert compare_with_slow_apgd(attack, row) == (1 + runs * 31, True)


def test_a_row_that_breaks_at_its_second_target_is_done():
    count, held = compare_with_slow_apgd(APGD(eps=0.113, loss="dlr-targeted", steps=30), 3)
    assert 33 < count < 60 and held is False


def test_restarts_keep_the_best():
    """Row 3 has its highest loss neither in the first run nor in the last one."""
    attack = APGD(eps=0.05, loss="dlr", steps=3, restarts=4)
    assert [compare_with_slow_apgd(attack, row) for row in (0, 3)] == [(17, True)] * 2


class Cliff(nn.Module):
    """One pixel. Up to 0.5 six classes are nearly equal and the first leads; beyond, the second is
    just ahead of it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        even, pair = torch.tensor([[0.1, 0, 0, 0, 0, 0], [2.0, 2.1, -9, -9, -9, -9]], dtype=x.dtype)
        return torch.where(x.view(-1, 1) > 0.5, pair, even) + 0 * x.view(-1, 1)


def test_a_misclassified_point_is_returned_though_another_start_has_a_higher_loss():
    """Starts are at 0.3, where the cross-entropy is 1.7 and the row is right, or at 0.7, where it
    is 0.7 and wrong.
    """
    x, y = torch.full((20, 1, 1, 1), 0.5, dtype=torch.float64), torch.zeros(20, dtype=torch.long)
    result = APGD(eps=0.2, steps=3, restarts=12)(
        Cliff(), x, y, ExampleRng.for_examples(torch.arange(20), 0)
    )
    np.testing.assert_allclose(result.x_adv.flatten(), 0.7)
    # The clean pass, 4 for each start at 0.3, one for the start at 0.7.
    assert {(queries - 2) % 4 for queries in result.queries.tolist()} == {0}
    assert len(set(result.queries.tolist())) > 2


@pytest.mark.parametrize(("eps", "norm", "rho"), [(0.1, "Linf", 0.75), (0.2, "L2", 0.5)])
def test_equal_losses(eps, norm, rho):
    """Where pixels are rounded, a step often leaves the loss unchanged, which is neither a rise nor
    a new best.
    """
    net = SmallNet(NET.first, NET.first_bias, NET.second, NET.second_bias, levels=8)
    assert compare_with_slow_apgd(APGD(eps=eps, norm=norm, steps=30, rho=rho), 3, net) == (32, True)


def test_the_first_check_does_not_halve_the_step_because_the_best_stalls():
    """APGD acts as if the step had been halved before. Here the start is better than the first
    iterate.
    """
    net = SmallNet(NET.first, NET.first_bias, NET.second, NET.second_bias, levels=4)
    assert compare_with_slow_apgd(APGD(eps=0.25, norm="L2", steps=3), 1, net, seed=3) == (5, True)


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_share_of_rising_steps(rho):
    assert compare_with_slow_apgd(APGD(eps=0.2, norm="L2", steps=30, rho=rho), 3) == (32, True)


@pytest.mark.parametrize(("loss", "norm"), [("ce", "L2"), ("dlr-targeted", "Linf")])
def test_rows_of_a_batch_do_not_affect_each_other(loss, norm):
    """Rows that are wrong, break or hold out at different times do not disturb each other."""
    attack = APGD(eps=RADIUS[norm], norm=norm, loss=loss, steps=20, targets=2, restarts=2)
    rows = [0, 2, 3, 6, 8, 11]
    result, _ = run(attack, rows)
    alone = [run(attack, [row])[0] for row in rows]
    np.testing.assert_allclose(result.x_adv, torch.cat([one.x_adv for one in alone]), atol=1e-8)
    assert result.queries.tolist() == [int(one.queries) for one in alone]
    assert len(set(result.queries.tolist())) > 3


def test_a_radius_of_zero_moves_nothing():
    for norm in ("Linf", "L2"):
        assert torch.equal(
            run(APGD(eps=0, norm=norm, steps=3), list(range(12)))[0].x_adv, torch.from_numpy(X)
        )


def test_defaults_are_those_of_autoattack():
    assert APGD().to_json_dict() == {
        "kind": "apgd", "eps": 8 / 255, "steps": 100, "loss": "ce", "norm": "Linf", "restarts": 1,
        "targets": 9, "rho": 0.75, "samples": 1,
    }  # fmt: skip


class Alternating(nn.Module):
    """Two networks that answer in turn."""

    def __init__(self, *nets: SmallNet) -> None:
        super().__init__()
        self.nets, self.calls = nn.ModuleList(net.module() for net in nets), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        answer: torch.Tensor = self.nets[self.calls % len(self.nets)](x)
        return answer


def test_gradients_are_averaged_over_samples():
    """samples = 2: each gradient is the mean of two, loss and verdict are those of the last pass;
    no row leaves early, and a broken row returns its last misclassified point.
    """
    other = SmallNet.draw(12, 6, seed=0, scale=4.4)
    model = Alternating(NET, other)
    attack = APGD(eps=0.1, steps=4, samples=2)
    with recorded_inputs(model) as seen:
        result = attack(
            model,
            torch.from_numpy(X),
            torch.from_numpy(Y),
            ExampleRng.for_examples(torch.arange(12), 5),
        )
    # Pass 1 (clean) is of `other`, passes 2 and 3 of NET and `other`, and so on.
    right = [row for row in range(12) if other.predict(X[row]) == Y[row]]
    assert len(seen) == 1 + 2 * 5
    assert all(np.array_equal(a, b) for a, b in zip(seen[1::2], seen[2::2], strict=True))

    def slope(net, x, y):
        return (loss_and_slope("ce", net.logits(x), y)[1] @ net.jacobian(x)).reshape(SHAPE)

    verdicts, queries = [], {}
    for i, row in enumerate(right):
        x, y, points = X[row], int(Y[row]), [batch[i] for batch in seen[1::2]]
        # Before its first step no row is moved by a checkpoint.
        gradient = (slope(NET, points[0], y) + slope(other, points[0], y)) / 2
        first = np.clip(np.clip(points[0] + 0.2 * np.sign(gradient), x - 0.1, x + 0.1), 0, 1)
        np.testing.assert_allclose(points[1], first, atol=1e-12)
        wrong = [k for k, point in enumerate(points) if other.predict(point) != y]
        losses = [loss_and_slope("ce", other.logits(point), y)[0] for point in points]
        expected = points[wrong[-1]] if wrong else points[int(np.argmax(losses))]
        np.testing.assert_allclose(result.x_adv[row], expected, atol=1e-12)
        queries[row] = 1 + 2 * (wrong[0] + 1 if wrong else 5)
        verdicts.append((len(wrong), wrong[-1] if wrong else -1))
    assert result.queries.tolist() == [queries.get(row, 1) for row in range(12)]
    assert any(count == 0 for count, _ in verdicts) and any(count > 1 for count, _ in verdicts)


def rows_of_logits(classes):
    """Random logits; y is each class once in each row, so that it takes every rank. Then ties."""
    rng = np.random.default_rng(classes)
    rows = [rng.normal(size=classes) * 3 for _ in range(3)]
    rows += [np.repeat([2.0, 1.0], classes)[-classes - 2 :][:classes], np.full(classes, 0.5)]
    return [(z, y, t) for z in rows for y in range(classes) for t in range(classes) if t != y]


@pytest.mark.parametrize("loss", ["dlr", "dlr-targeted", "cw", "ce"])
@pytest.mark.parametrize("classes", [4, 5, 10])
def test_losses_by_rank(loss, classes):
    """-(z_y - max_{j != y} z_j) / (z_1st - z_3rd + 1e-12), -(z_y - z_t) / (z_1st - (z_3rd + z_4th)
    / 2 + 1e-12).
    """
    cases = rows_of_logits(classes)
    z = torch.tensor(np.array([case[0] for case in cases]), requires_grad=True)
    y, target = torch.tensor([case[1] for case in cases]), torch.tensor([case[2] for case in cases])
    ours = APGD(loss=loss)._compute_loss(z, y, target)
    (slopes,) = torch.autograd.grad(ours.sum(), z)
    for (row, true, other), value, slope in zip(cases, ours.tolist(), slopes.numpy(), strict=True):
        expected, expected_slope = loss_and_slope(loss, row, true, other)
        assert math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12)
        if len(set(row)) == classes:
            np.testing.assert_allclose(slope, expected_slope, rtol=1e-9, atol=1e-12)
    assert slopes.isfinite().all()


def test_dlr_losses_by_hand():
    """Ranked 7, 5, 4, 1, 0; the true class is first, second, third or fourth."""
    z = torch.tensor([[4.0, 7.0, 0.0, 5.0, 1.0]], dtype=torch.float64).expand(4, 5)
    y, target = torch.tensor([1, 3, 0, 4]), torch.tensor([3, 1, 2, 0])
    untargeted = APGD(loss="dlr")._compute_loss(z, y, target)
    targeted = APGD(loss="dlr-targeted")._compute_loss(z, y, target)
    np.testing.assert_allclose(untargeted, np.array([-2, 2, 3, 6]) / 3, rtol=1e-9)
    np.testing.assert_allclose(targeted, np.array([-2, 2, -4, 3]) / 4.5, rtol=1e-9)


def test_dlr_losses_do_not_change_with_the_scale_of_the_logits():
    z = torch.tensor([[4.0, 7.0, 0.0, 5.0, 1.0]], dtype=torch.float64)
    y, target = torch.tensor([1]), torch.tensor([3])
    for loss in ("dlr", "dlr-targeted"):
        attack = APGD(loss=loss)
        np.testing.assert_allclose(
            attack._compute_loss(1e3 * z - 5, y, target),
            attack._compute_loss(z, y, target),
            rtol=1e-9,
        )
