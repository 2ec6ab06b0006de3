"""MultiTargeted against a plain loop over one example, and by hand on a straight boundary."""

import math

import numpy as np
import pytest
import torch
from ladder_network import LadderNetwork, ladder_images
from slow_attacks import SmallNet, draw_images, recorded_inputs, size

from raysweep.attacks import MultiTargeted, build_named_attack, multi_targeted
from raysweep.data import DatasetSplits
from raysweep.evaluation import evaluate
from raysweep.rng import ExampleRng
from raysweep.spec import SpecError
from raysweep.sweep.search_space import load_space

SHAPE = (2, 2, 3)
NET = SmallNet.draw(12, 6, seed=0)
X = draw_images(12, SHAPE, seed=1)
# The last row is wrong from the start.
Y = np.array([NET.predict(x) for x in X])
Y[-1] = (Y[-1] + 1) % 6


def attack_rows(attack: MultiTargeted, rows: list[int]):
    model = NET.module()
    with recorded_inputs(model) as seen:
        result = attack(
            model,
            torch.from_numpy(X[rows]),
            torch.from_numpy(Y[rows]),
            ExampleRng.for_examples(torch.tensor(rows), 5),
        )
    return result, seen


def project(point, x, eps, norm):
    if norm == "Linf":
        return np.clip(np.clip(point, x - eps, x + eps), 0, 1)
    delta = point - x
    return np.clip(x + delta * min(1, eps / max(size(delta, "L2"), 1e-12)), 0, 1)


def slow_run(attack, x, y, target, start):
    """All points of one run, until the first that is misclassified."""
    points = [start]
    for step in range(attack.steps):
        z, jacobian = NET.logits(points[-1]), NET.jacobian(points[-1])
        if int(np.argmax(z)) != y:
            break
        rival = target
        if target is None:
            rival = max((k for k in range(6) if k != y), key=lambda k: z[k])
        slope = (jacobian[rival] - jacobian[y]).reshape(SHAPE)
        direction = np.sign(slope) if attack.norm == "Linf" else slope / size(slope, "L2")
        length = attack.eps * (1 + math.cos(math.pi * step / attack.steps))
        ahead = project(points[-1] + length * direction, x, attack.eps, attack.norm)
        if step:
            ahead = points[-1] + 0.75 * (ahead - points[-1]) + 0.25 * (points[-1] - points[-2])
            ahead = project(ahead, x, attack.eps, attack.norm)
        points.append(ahead)
    return points


def slow_attack(attack, x, y, starts):
    """All points of all runs: (points, point of least margin, number of runs)."""
    points, best, runs, order = [x], x, 0, []
    for run in range(attack.runs):
        margin, drop = NET.margin(best, y), NET.margin(x, y) - NET.margin(best, y)
        if NET.predict(best) != y or (run and margin * run > attack.reach * drop):
            break
        if run == 1:
            others = sorted((k for k in range(6) if k != y), key=lambda k: -NET.logits(best)[k])
            order = others[: attack.targets]
        target = order[(run - 1) % len(order)] if run else None
        found = slow_run(attack, x, y, target, starts(len(points)))
        points += found
        runs += 1
        best = min([best, *found], key=lambda point: NET.margin(point, y))
        if NET.predict(found[-1]) != y:
            best = found[-1]
    return points, best, runs


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.09), ("L2", 0.3)])
@pytest.mark.parametrize("reach", [0.0, 1.0, 1e9])
def test_every_point_of_all_runs(norm, eps, reach, monkeypatch):
    """Steps, momentum, order of the targets, rows that break, that leave, that take all runs. Runs
    that are computed together find the same, and count only those that are needed.
    """
    n_runs = []
    packed_rows = multi_targeted._PACKED_ROWS
    for row in (1, 3, 4, 5, 7, 11):
        attack = MultiTargeted(eps=eps / (1 + 2 * (row == 1)), norm=norm, steps=6, runs=7,
                               targets=3, reach=reach)  # fmt: skip
        monkeypatch.setattr(multi_targeted, "_PACKED_ROWS", 1)
        result, seen = attack_rows(attack, [row])
        points, best, runs = slow_attack(attack, X[row], int(Y[row]), lambda n, s=seen: s[n][0])
        assert len(seen) == len(points) == int(result.queries)
        for ours, slow in zip(seen, points, strict=True):
            np.testing.assert_allclose(ours[0], slow, atol=1e-8)
        np.testing.assert_allclose(result.x_adv[0], best, atol=1e-8)
        n_runs.append(runs)
        monkeypatch.setattr(multi_targeted, "_PACKED_ROWS", packed_rows)
        packed, seen = attack_rows(attack, [row])
        assert torch.equal(packed.queries, result.queries)
        np.testing.assert_allclose(packed.x_adv[0], result.x_adv[0], atol=1e-9)
        assert runs < 3 or max(map(len, seen)) > 1, "runs after the first share batches"
    assert n_runs[-1] == 0, "the last row is wrong from the start"
    assert 1 in n_runs and (reach == 0.0 or max(n_runs) > 1)
    assert reach < 1e9 or max(n_runs) == 7


def test_no_reach_is_an_endless_one():
    rows = list(range(12))
    settings = {"eps": 0.05, "steps": 3, "runs": 4}
    endless, _ = attack_rows(MultiTargeted(reach=1e9, **settings), rows)
    none, _ = attack_rows(MultiTargeted(reach=None, **settings), rows)
    assert torch.equal(endless.queries, none.queries) and torch.equal(endless.x_adv, none.x_adv)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_row_gets_runs_by_the_distance_of_the_boundary(norm):
    """The margin falls evenly, so a row at the distance d leaves after n runs if
    (d / eps - 1) n > reach. In L2 the boundary of the images of four pixels is at 2 d.
    """
    eps, steps = 0.1, 12
    distances = [0.09, 0.103, 0.12, 0.16, 0.205, 0.3]
    x, y = ladder_images(distances, [1, 0, 1, 0, 1, 0])
    reach = 1.0
    expected = []
    for d in distances:
        runs = 1
        while d > eps and (d / eps - 1) * runs <= reach and runs < 20:
            runs += 1
        expected.append(runs)
    assert expected == [1, 20, 6, 2, 1, 1]
    eps = eps if norm == "Linf" else 2 * eps
    attack = MultiTargeted(eps=eps, norm=norm, steps=steps, runs=20, reach=reach)
    result = attack(LadderNetwork(), x, y, ExampleRng.for_examples(torch.arange(6), 0))
    assert (LadderNetwork()(result.x_adv).argmax(1) != y).tolist() == [True] + 5 * [False]
    assert result.queries[1:].tolist() == [1 + runs * (steps + 1) for runs in expected[1:]]


def test_rows_do_not_depend_on_the_batch():
    attack, rows = MultiTargeted(eps=0.06, steps=4, runs=5), list(range(12))
    together, _ = attack_rows(attack, rows)
    for row in rows:
        alone, _ = attack_rows(attack, [row])
        np.testing.assert_allclose(alone.x_adv[0], together.x_adv[row], atol=1e-9)
        assert int(alone.queries) == int(together.queries[row])


def test_two_classes_have_one_target():
    net = SmallNet.draw(12, 2, seed=3).module()
    x = torch.from_numpy(X)
    y = net(x).argmax(1)
    attack = MultiTargeted(eps=0.02, steps=3, runs=4, reach=None)
    result = attack(net, x, y, ExampleRng.for_examples(torch.arange(12), 0))
    stands = net(result.x_adv).argmax(1) == y
    assert stands.any() and set(result.queries[stands].tolist()) == {1 + 4 * 4}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"reach": -1}, "reach"),
        ({"runs": 0}, "runs"),
        ({"targets": 0}, "targets"),
        ({"eps": 8}, "8/255"),
    ],
)
def test_wrong_settings_are_named(settings, problem):
    with pytest.raises(SpecError, match=problem):
        MultiTargeted.from_data(settings)


@pytest.mark.parametrize("space_name", ["gairat", "trades"])
def test_the_objective_by_name_has_the_attacks_of_a_new_sweep(space_name: str) -> None:
    validation = load_space(space_name, {}).trial_config({}).validation
    threat_model = validation.find_threat_model()
    assert threat_model is not None
    by_name = build_named_attack("objective", *threat_model).attacks
    assert by_name == {**validation.attacks, **validation.finish}


def test_evaluate_runs_the_objective(net: torch.nn.Module, digits: DatasetSplits) -> None:
    images, labels = digits.val.get_float_images(slice(0, 16)), digits.val.y[:16]
    report = evaluate(net, images, labels, attack="objective", eps=0.1)
    assert list(report.robust_after) == ["pgd", "cw", "multi_targeted"]
    cascade = build_named_attack("objective", 0.1, "Linf")
    assert report.attack == cascade.to_json_dict() and not report.is_autoattack
