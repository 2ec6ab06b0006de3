"""Differences on the same examples and the split of a spread, against hand computations, SciPy and
simulations with known variances.
"""

import itertools
import math
import statistics

import numpy as np
import pytest

from raysweep.evaluation.paired_statistics import (
    compare_paired,
    estimate_measurement_variance,
    split_spread,
)


def outcomes(both: int, first_only: int, second_only: int, none: int) -> tuple:
    first = [1.0] * both + [1.0] * first_only + [0.0] * second_only + [0.0] * none
    second = [1.0] * both + [0.0] * first_only + [1.0] * second_only + [0.0] * none
    return np.array(first), np.array(second)


def test_the_interval_of_agresti_and_min() -> None:
    """Half an example in each cell: b* = 12.5, c* = 3.5, n* = 102."""
    pair = compare_paired(*outcomes(50, 12, 3, 35))
    half = 1.959964 * math.sqrt(16 - 9**2 / 102) / 102
    assert pair.difference == pytest.approx(0.09)
    assert (pair.low, pair.high) == pytest.approx((9 / 102 - half, 9 / 102 + half))
    assert pair.is_told_apart
    other = compare_paired(*reversed(outcomes(50, 12, 3, 35)))
    assert (other.low, other.high) == pytest.approx((-pair.high, -pair.low))
    # Of 15 comparisons each has the level 0.05 / 15, whose two-sided point is 2.9352.
    wide = compare_paired(*outcomes(50, 12, 3, 35), n_comparisons=15)
    assert wide.high - 9 / 102 == pytest.approx(half * 2.9352 / 1.959964, rel=1e-4)
    assert not wide.is_told_apart
    # The randomness of two trainings of standard deviation 0.03.
    wide = compare_paired(*outcomes(50, 12, 3, 35), training_variance=2 * 0.03**2)
    assert wide.high - 9 / 102 == pytest.approx(
        math.hypot(half, 1.959964 * math.sqrt(2) * 0.03), rel=1e-6
    )


def test_equal_models_are_not_told_apart() -> None:
    pair = compare_paired(*outcomes(60, 0, 0, 40))
    assert pair.difference == 0 and pair.low < 0 < pair.high and not pair.is_told_apart


def test_coverage_of_the_interval() -> None:
    """2,000 pairs of models with true accuracies 0.60 and 0.54 that share most errors."""
    rng = np.random.default_rng(0)
    probabilities = [0.5, 0.10, 0.04, 0.36]
    hits = 0
    for counts in rng.multinomial(300, probabilities, size=2000).tolist():
        pair = compare_paired(*outcomes(*counts))
        hits += pair.low <= 0.06 <= pair.high
    # Three standard errors of a share of 0.95 over 2,000.
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


def test_measurement_variance_is_half_the_mean_variance_of_a_difference() -> None:
    scores = np.random.default_rng(1).integers(0, 2, size=(5, 40)).astype(float)
    halves = [
        statistics.variance((a - b).tolist()) / 40 / 2 for a, b in itertools.combinations(scores, 2)
    ]
    assert estimate_measurement_variance(scores) == pytest.approx(statistics.fmean(halves))


def test_the_share_is_that_of_kuder_and_richardson() -> None:
    """KR-20 of five models over four examples, by its own formula, with sample variances.

    Totals 4, 3, 2, 1, 0; shares right 4/5, 3/5, 2/5, 1/5; sum of n/(n - 1) p (1 - p) = 1;
    variance of the totals 2.5; 4/3 (1 - 1 / 2.5) = 0.8.
    """
    scores = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    split = split_spread(scores.astype(float))
    assert split is not None and split.n_repeats == 0 and split.training_variance == 0
    assert split.share == pytest.approx(0.8)
    # The variance of the accuracies, 2.5 / 16, times the share, and the rest.
    assert split.settings_variance == pytest.approx(0.8 * 2.5 / 16)
    assert split.measurement_variance == pytest.approx(0.2 * 2.5 / 16)
    # Feldt (1965), by the 5% points of F(4, 12), 3.2592 and 1 / 5.9117.
    assert split.share_low == pytest.approx(1 - 0.2 * 3.2592, abs=1e-4)
    assert split.share_high == pytest.approx(1 - 0.2 / 5.9117, abs=1e-4)
    # 1.96^2 x 4 x 0.2 / 0.8 = 3.84: with four examples a typical difference is seen.
    assert split.needed_examples == 4 and split.needed_seeds == 1


def test_settings_that_do_nothing_and_settings_that_do_all() -> None:
    rng = np.random.default_rng(2)
    flat = split_spread((rng.random((16, 300)) < 0.5).astype(float))
    assert flat is not None and flat.share < 0.5 and flat.share_low == 0
    steep = split_spread((rng.random((16, 300)) < np.linspace(0.2, 0.8, 16)[:, None]).astype(float))
    assert steep is not None and steep.share_low > 0.9 and steep.needed_seeds == 1
    same = np.ones((4, 30))
    assert split_spread(same) is None, "no example tells them apart"
    assert split_spread(np.eye(2)) is None, "two models are too few"


def simulate(rng: np.random.Generator, n_settings: int, n_seeds: int, sd: float, seed_sd: float):
    """Scores of models whose true accuracies are normal around 0.6, on examples that are easy and
    hard; and the settings of each.
    """
    accuracy = (
        0.6 + rng.normal(0, sd, (n_settings, 1)) + rng.normal(0, seed_sd, (n_settings, n_seeds))
    )
    easiness = rng.uniform(-0.3, 0.3, 300)
    chance = np.clip(accuracy.reshape(-1, 1) + easiness, 0, 1)
    scores = (rng.random(chance.shape) < chance).astype(float)
    return scores, [index for index in range(n_settings) for _ in range(n_seeds)]


def test_the_parts_of_known_spreads() -> None:
    """The mean estimates over 300 sweeps are the variances that made them; so is the coverage of
    the interval of the share.
    """
    rng = np.random.default_rng(3)
    settings, training, inside = [], [], 0
    for _ in range(300):
        split = split_spread(*simulate(rng, 16, 3, sd=0.03, seed_sd=0.02))
        assert split is not None and split.n_repeats == 32
        settings.append(split.settings_variance)
        training.append(split.training_variance)
        # Mean variance of a verdict: 0.6 x 0.4 less that of the easiness, 0.6^2 / 12 = 0.03.
        truth = 0.03**2 / (0.03**2 + 0.02**2 + 0.21 / 300)
        inside += split.share_low <= truth <= split.share_high
    assert statistics.fmean(settings) == pytest.approx(0.03**2, rel=0.08)
    assert statistics.fmean(training) == pytest.approx(0.02**2, rel=0.15)
    assert inside / 300 == pytest.approx(0.9, abs=0.055)


def test_what_would_tell_two_settings_apart() -> None:
    """With the advised number of examples, a typical difference is 1.96 of its standard errors."""
    rng = np.random.default_rng(4)
    split = split_spread(*simulate(rng, 200, 1, sd=0.02, seed_sd=0.0))
    assert split is not None and split.needed_examples is not None
    noise = split.measurement_variance * split.n_examples / split.needed_examples
    assert math.sqrt(split.settings_variance / noise) == pytest.approx(1.96, rel=0.01)
    # 0.21 x 1.96^2 / 0.02^2 examples, within what 200 settings tell of a variance.
    assert split.needed_examples == pytest.approx(0.21 * 1.96**2 / 0.02**2, rel=0.35)
    assert split.needed_seeds == pytest.approx(split.needed_examples / 300, abs=1)


def test_no_number_of_examples_helps_where_training_is_as_random() -> None:
    rng = np.random.default_rng(5)
    split = split_spread(*simulate(rng, 600, 4, sd=0.03, seed_sd=0.06))
    assert split is not None and split.needed_examples is None
    # (0.06^2 + 0.21 / 300) x 1.96^2 / 0.03^2 = 18.4, within what 600 settings tell.
    assert split.needed_seeds is not None and 14 <= split.needed_seeds <= 25
