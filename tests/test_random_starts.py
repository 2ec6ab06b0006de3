"""Where attacks start: in the ball, on the sphere, evenly in all directions, and inside the box."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from slow_attacks import recorded_inputs

from raysweep.attacks import APGD, FAB, PGD, MinimalPerturbation
from raysweep.rng import ExampleRng

SHAPE = (2, 2, 3)
PIXELS = 12
ROWS = 3000


def starts(attack, pixel, which, dtype=torch.float64, rows=ROWS, seed=0):
    """The batch number `which` that the attack gives to the model, as differences from grey images,
    (rows, 12).
    """
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(PIXELS, 4)).to(dtype)
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    x = torch.full((rows, *SHAPE), pixel, dtype=dtype)
    with recorded_inputs(model) as seen:
        attack(
            model,
            x,
            torch.zeros(rows, dtype=torch.long),
            ExampleRng.for_examples(torch.arange(rows), seed),
        )
    assert seen[which].dtype == x.numpy().dtype
    return seen[which].reshape(rows, PIXELS) - x.numpy().reshape(rows, PIXELS)


def check_directions(moves):
    """Check for even directions: zero mean, no correlation, and each coordinate's square is beta
    distributed.
    """
    unit = moves / np.linalg.norm(moves, axis=1, keepdims=True)
    assert np.abs(unit.mean(0)).max() < 4 / math.sqrt(ROWS * PIXELS)
    second = unit.T @ unit / ROWS * PIXELS
    assert np.abs(second - np.eye(PIXELS)).max() < 0.12
    for column in unit.T:
        assert stats.kstest(column**2, "beta", (0.5, (PIXELS - 1) / 2)).pvalue > 1e-3


@pytest.mark.parametrize(
    ("attack", "which"),
    [(PGD(eps=0.3, steps=1), 0), (MinimalPerturbation(d_max=0.3, steps=1), 1)],
    ids=repr,
)
def test_uniform_in_the_cube(attack, which):
    """Each pixel is uniform in (-eps, eps), independent of the others."""
    moves = starts(attack, 0.5, which) / 0.3
    assert np.abs(moves).max() <= 1
    for column in moves.T:
        assert stats.kstest(column, "uniform", (-1, 2)).pvalue > 1e-3
    assert np.abs(np.corrcoef(moves.T)[~np.eye(PIXELS, dtype=bool)]).max() < 0.08


@pytest.mark.parametrize(
    ("attack", "which"),
    [
        (PGD(eps=0.4, steps=1, norm="L2"), 0),
        (MinimalPerturbation(d_max=0.4, steps=1, norm="L2"), 1),
    ],
    ids=repr,
)
def test_uniform_in_the_ball(attack, which):
    """The share of volume inside a row's radius, (r / eps)^12, is uniform."""
    moves = starts(attack, 0.5, which)
    radius = np.linalg.norm(moves, axis=1) / 0.4
    assert radius.max() <= 1
    assert stats.kstest(radius**PIXELS, "uniform").pvalue > 1e-3
    check_directions(moves)


@pytest.mark.parametrize(("attack", "which", "radius"), [
    (APGD(eps=0.4, steps=1, norm="L2"), 1, 0.4),
    (FAB(eps=0.4, steps=1, targets=1, restarts=2, norm="L2"), 3, 0.2),
], ids=repr)  # fmt: skip
def test_on_the_sphere(attack, which, radius):
    """APGD starts at eps, FAB's second start at eps / 2."""
    moves = starts(attack, 0.5, which)
    np.testing.assert_allclose(np.linalg.norm(moves, axis=1), radius, rtol=1e-9)
    check_directions(moves)


@pytest.mark.parametrize(("attack", "which", "radius"), [
    (APGD(eps=0.3, steps=1), 1, 0.3), (FAB(eps=0.3, steps=1, targets=1, restarts=2), 3, 0.15),
], ids=repr)  # fmt: skip
def test_on_the_cube(attack, which, radius):
    """t / max |t| with t uniform in (-1, 1): one pixel of each row is at the radius, the others are
    uniform.
    """
    moves = starts(attack, 0.5, which) / radius
    np.testing.assert_allclose(np.abs(moves).max(1), 1, rtol=1e-9)
    others = np.sort(np.abs(moves), axis=1)[:, :-1]
    assert (
        stats.kstest(np.random.default_rng(0).permuted(others, axis=1)[:, 0], "uniform").pvalue
        > 1e-3
    )
    assert (
        np.abs(moves.mean(0)).max() < 0.05
        and np.abs(np.corrcoef(moves.T)[~np.eye(PIXELS, dtype=bool)]).max() < 0.08
    )
    largest = np.abs(moves).argmax(1)
    assert stats.chisquare(np.bincount(largest, minlength=PIXELS)).pvalue > 1e-3


def test_gaussian_start_is_not_clipped():
    """x + 0.001 N(0, I), as TRADES does: half of the pixels of a black image are below 0."""
    for loss, which in (("ce", 0), ("kl", 1)):
        moves = starts(PGD(eps=0.3, steps=1, start="gaussian", loss=loss), 0.0, which)
        assert stats.kstest(moves.ravel() / 0.001, "norm").pvalue > 1e-3


@pytest.mark.parametrize(("attack", "which"), [
    (PGD(eps=0.3, steps=1), 0), (PGD(eps=0.9, steps=1, norm="L2"), 0), (APGD(eps=0.3, steps=1), 1),
    (APGD(eps=0.9, steps=1, norm="L2"), 1), (FAB(eps=0.3, steps=1, targets=1, restarts=2), 3),
    (FAB(eps=0.9, steps=1, targets=1, restarts=2, norm="L2"), 3),
], ids=repr)  # fmt: skip
@pytest.mark.parametrize("pixel", [0.0, 1.0])
def test_starts_are_clipped_to_the_box(attack, which, pixel):
    moves = starts(attack, pixel, which, rows=300) * (1 if pixel == 0 else -1)
    assert moves.min() == 0 and 0.4 < (moves == 0).mean() < 0.6 and moves.max() > 0.1


def test_no_random_start():
    for attack, which in (
        (PGD(start="natural", steps=1), 0),
        (MinimalPerturbation(start="natural", steps=1), 1),
    ):
        assert (starts(attack, 0.25, which, rows=3) == 0).all()


def test_the_first_start_of_fab_is_the_image():
    assert (starts(FAB(eps=0.3, steps=1, targets=1, restarts=2), 0.25, 1, rows=3) == 0).all()


def test_restarts_targets_rows_and_seeds_have_starts_of_their_own():
    apgd = APGD(eps=0.3, steps=1, loss="dlr-targeted", targets=2, restarts=2)
    several = [starts(apgd, 0.5, which, rows=2) for which in (1, 3, 5, 7)]
    several.append(starts(apgd, 0.5, 1, rows=2, seed=1))
    rows = [row for moves in several for row in moves]
    assert len({row.tobytes() for row in rows}) == 10


def test_starts_in_float32_stay_in_float32():
    moves = starts(PGD(eps=0.3, steps=1, norm="L2"), 0.5, 0, dtype=torch.float32, rows=20)
    assert moves.dtype == np.float32
