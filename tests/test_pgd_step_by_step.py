"""PGD in all its forms and MMA's search against plain loops over one example."""

import numpy as np
import pytest
import torch
from slow_attacks import SmallNet, draw_images, recorded_inputs, slow_pgd

from raysweep.attacks import PGD, MinimalPerturbation
from raysweep.rng import ExampleRng

SHAPE = (2, 2, 3)
NET = SmallNet.draw(12, 5, seed=0)
X = draw_images(24, SHAPE, seed=1)
# The last three rows are wrong from the start.
Y = np.array([NET.predict(x) for x in X])
Y[-3:] = (Y[-3:] + 1) % 5
RADIUS = {"Linf": (0.15, 0.04), "L2": (0.5, 0.15)}


def run(attack):
    """The result, and the points at which the model was evaluated."""
    rng = ExampleRng.for_examples(torch.arange(len(X)), 3)
    model = NET.module()
    with recorded_inputs(model) as seen:
        result = attack(model, torch.from_numpy(X), torch.from_numpy(Y), rng)
    return result, seen


def expected(attack, starts, loss=None):
    return [
        slow_pgd(
            NET, x, int(y), start, eps=attack.eps, step=attack.step_size, steps=attack.steps,
            loss=loss or attack.loss,
            norm=attack.norm, tau=None if attack.tau is None else int(attack.tau),
            confidence=attack.confidence,
        )
        for x, y, start in zip(X, Y, starts, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(
    ("loss", "start"),
    [
        ("ce", "natural"),
        ("ce", "gaussian"),
        ("cw", "uniform"),
        ("kl", "uniform"),
        ("kl", "gaussian"),
    ],
)
def test_every_iterate_and_kappa(norm, loss, start):
    """kappa continues to count where a row that was wrong is right again."""
    eps, step = RADIUS[norm]
    attack = PGD(eps=eps, step_size=2 * step, steps=9, loss=loss, norm=norm, start=start)
    result, seen = run(attack)
    first = 1 if loss == "kl" else 0
    if first:
        assert np.array_equal(seen[0], X)
    assert len(seen) == first + attack.steps
    slow = expected(attack, seen[first], "cw with confidence" if loss == "cw" else None)
    for row, outcome in enumerate(slow):
        for k, point in enumerate(outcome.points):
            np.testing.assert_allclose(seen[first + k][row], point, atol=1e-9)
        np.testing.assert_allclose(result.x_adv[row], outcome.x, atol=1e-9)
    assert result.kappa.tolist() == [outcome.kappa for outcome in slow]
    assert result.queries.tolist() == [attack.steps] * len(X)
    assert len(set(result.kappa.tolist())) > 2


def test_kappa_counts_right_iterates_after_a_wrong_one():
    """A KL attack leads rows of the wrong label to the right one (G alg. 1 has no `break`)."""
    attack = PGD(eps=0.4, step_size=0.1, steps=8, start="gaussian", loss="kl")
    result, (_, *seen) = run(attack)
    right = np.array(
        [[NET.predict(x) == y for x, y in zip(batch, Y, strict=True)] for batch in seen]
    )
    until_wrong = np.cumprod(right, axis=0).sum(0)
    assert (right.sum(0) > until_wrong).any()
    assert result.kappa.tolist() == right.sum(0).tolist()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("tau", [0, 1, 3])
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_early_stopping_is_algorithm_3(norm, tau, loss):
    """Points, kappa and forward passes of each row; rows stop at different steps, some never."""
    eps, step = RADIUS[norm]
    attack = PGD(eps=eps, step_size=step, steps=9, loss=loss, norm=norm, tau=tau)
    result, seen = run(attack)
    slow = expected(attack, seen[1 if loss == "kl" else 0])
    np.testing.assert_allclose(result.x_adv, np.array([outcome.x for outcome in slow]), atol=1e-9)
    assert result.kappa.tolist() == [outcome.kappa for outcome in slow]
    assert result.queries.tolist() == [outcome.queries for outcome in slow]
    assert len(set(result.queries.tolist())) > 3
    assert max(result.queries.tolist()) == 9


def test_margin_loss_has_no_gradient_beyond_its_confidence():
    """-max(z_y - z_j + confidence, 0): a row whose rival leads by more than the confidence stays
    where it is.
    """
    attack = PGD(eps=0.3, step_size=0.03, steps=9, loss="cw", confidence=0.5, start="natural")
    result, _ = run(attack)
    slow = expected(attack, X, "cw with confidence")
    np.testing.assert_allclose(result.x_adv, np.array([outcome.x for outcome in slow]), atol=1e-9)
    stopped = [np.array_equal(outcome.points[-1], outcome.x) for outcome in slow]
    assert 0 < sum(stopped) < len(stopped)


def test_default_confidence_is_50():
    """With it the margin loss of these rows never vanishes, with 49 less it does."""
    assert PGD().confidence == 50
    settings = {"eps": 0.3, "step_size": 0.03, "steps": 9, "loss": "cw", "start": "natural"}
    assert not torch.equal(
        run(PGD(**settings))[0].x_adv, run(PGD(**settings, confidence=0.5))[0].x_adv
    )


def test_defaults_are_the_papers():
    """G section 5: 8/255, steps of 2/255, K = 10, cross-entropy, random start, batch norms in eval
    mode.
    """
    assert PGD().to_json_dict() == {
        "kind": "pgd", "eps": 8 / 255, "step_size": 2 / 255, "steps": 10, "loss": "ce",
        "norm": "Linf", "start": "uniform", "tau": None, "confidence": 50.0, "mode": "eval",
    }  # fmt: skip


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_pixel_without_gradient_stays(norm):
    """sign(0) = 0, and a gradient that is zero everywhere has no direction."""
    blind = SmallNet(NET.first * (np.arange(12) != 7), NET.first_bias, NET.second, NET.second_bias)
    deaf = SmallNet(NET.first * 0, NET.first_bias, NET.second, NET.second_bias)
    attack = PGD(eps=0.3, step_size=0.1, steps=3, norm=norm, start="natural")
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    moved = (
        attack(blind.module(), x, y, ExampleRng.for_examples(torch.arange(24), 0)).x_adv - x
    ).flatten(1)
    assert (moved[:, 7] == 0).all() and (moved[:, :7] != 0).any(1).all()
    assert torch.equal(
        attack(deaf.module(), x, y, ExampleRng.for_examples(torch.arange(24), 0)).x_adv, x
    )


def test_train_mode_is_only_for_the_attack():
    """mode `train` uses batch statistics in the attack, then restores the model's mode."""
    norm = torch.nn.BatchNorm1d(12, affine=False).double()
    modes = []
    norm.register_forward_hook(lambda module, args, output: modes.append(module.training))
    flat = torch.nn.Sequential(torch.nn.Flatten(), norm, *NET.module()[2:])
    for mode, before in (("train", False), ("eval", True)):
        flat.train(before)
        PGD(steps=2, mode=mode, loss="kl")(
            flat,
            torch.from_numpy(X),
            torch.from_numpy(Y),
            ExampleRng.for_examples(torch.arange(24), 0),
        )
        assert flat.training is before and norm.training is before
    assert modes == [True] * 3 + [False] * 3


SLOPE = np.array([3.0, -2.0, 1.0, 0.0])


def line() -> torch.nn.Module:
    """z_1 - z_0 = 3 a - 2 b + c - 1.4 on images of four pixels a, b, c, d."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([torch.zeros(4), torch.from_numpy(SLOPE)]))
        net[1].bias.copy_(torch.tensor([0.0, -1.4]))
    return net


def search_line(
    norm, d_max, bisections=10, rows=((0.5, 0.5, 0.5, 0.5), (0.9, 0.5, 0.5, 0.5)), **settings
):
    x = torch.tensor(rows, dtype=torch.float64).view(-1, 1, 2, 2)
    attack = MinimalPerturbation(
        d_max=d_max, norm=norm, bisections=bisections, start="natural", **settings
    )
    with recorded_inputs(model := line()) as seen:
        result = attack(
            model,
            x,
            torch.zeros(len(x), dtype=torch.long),
            ExampleRng.for_examples(torch.arange(len(x)), 0),
        )
    return x, result, seen


def test_shortest_perturbation_by_hand_linf():
    """z_1 - z_0 = -0.4 at the first row, and falls by 6 for each unit of Linf: the boundary is 1/15
    away.

    PGD's direction is the sign of the slope. 5 bisections of a path of 0.15 give the boundary up to
    0.15 / 32 from above: 4/9 lies between 14/32 and 15/32. kappa = floor(10 * 15/32) = 4. The
    second row is wrong from the start.
    """
    x, result, _ = search_line("Linf", 0.15, bisections=5)
    expected = 0.15 * 15 / 32 * np.array([1.0, -1.0, 1.0, 0.0])
    np.testing.assert_allclose((result.x_adv - x)[0].flatten(), expected, atol=1e-12)
    assert torch.equal(result.x_adv[1], x[1])
    assert result.kappa.tolist() == [4, 0]
    # The clean pass; then 10 passes for PGD, one for its end, 5 bisections.
    assert result.queries.tolist() == [17, 1]


def test_shortest_perturbation_by_hand_l2():
    """|w| = sqrt(14): the boundary is 0.4 / sqrt(14) = 0.1069 away; path of 0.12, 4 bisections:
    15/16, kappa 9.
    """
    x, result, _ = search_line("L2", 0.12, bisections=4)
    np.testing.assert_allclose(
        (result.x_adv - x)[0].flatten(), 0.12 * 15 / 16 * SLOPE / np.sqrt(14), atol=1e-12
    )
    assert result.kappa.tolist() == [9, 0]
    assert result.queries.tolist() == [16, 1]


def test_a_row_out_of_reach_keeps_the_end_of_pgd():
    x, result, _ = search_line("Linf", 0.06)
    np.testing.assert_allclose(
        (result.x_adv - x)[0].flatten(), 0.06 * np.array([1.0, -1.0, 1.0, 0.0]), atol=1e-12
    )
    assert result.kappa.tolist() == [10, 0]
    assert result.queries.tolist() == [12, 1]


def test_kappa_of_a_row_at_the_very_end_is_below_steps():
    """The boundary is found at the full length: kappa = 10 would mean that it was not found."""
    _, result, _ = search_line("Linf", 0.4 / 6 + 1e-9, bisections=1)
    assert result.kappa.tolist() == [9, 0]


def test_step_of_the_inner_pgd():
    """step_scale x d_max / steps."""
    x, _, seen = search_line("Linf", 0.1, steps=8, step_scale=2.0, loss="cw")
    # seen[0] is clean, seen[1] PGD's start, seen[2] its first step.
    np.testing.assert_allclose(
        (seen[2] - x[:1].numpy()).ravel(), 2.0 * 0.1 / 8 * np.sign(SLOPE), atol=1e-12
    )
    x, _, seen = search_line("Linf", 0.1)
    np.testing.assert_allclose(
        (seen[2] - x[:1].numpy()).ravel(), 2.5 * 0.1 / 10 * np.sign(SLOPE), atol=1e-12
    )


@pytest.mark.parametrize("loss", ["ce", "cw"])
def test_inner_pgd_uses_the_loss_and_the_norm_of_the_search(loss):
    """The points of PGD inside the search are those of PGD itself on the rows that are right."""
    right = np.array([NET.predict(x) == y for x, y in zip(X, Y, strict=True)])
    attack = MinimalPerturbation(
        d_max=0.4, norm="L2", loss=loss, start="uniform", steps=4, bisections=3
    )
    result, seen = run(attack)
    starts = iter(seen[1])
    for row in np.flatnonzero(right):
        outcome = slow_pgd(
            NET, X[row], int(Y[row]), next(starts), eps=0.4, step=0.25, steps=4, norm="L2",
            loss="cw with confidence" if loss == "cw" else "ce",
        )  # fmt: skip
        delta, low, high = outcome.x - X[row], 0.0, 1.0
        if NET.predict(outcome.x) != Y[row]:
            for _ in range(3):
                middle = (low + high) / 2
                if NET.predict(X[row] + middle * delta) == Y[row]:
                    low = middle
                else:
                    high = middle
        np.testing.assert_allclose(result.x_adv[row], X[row] + high * delta, atol=1e-9)
    assert torch.equal(result.x_adv[~right], torch.from_numpy(X)[~right])
