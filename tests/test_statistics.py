"""Verdicts and the numbers behind them, compared with numbers worked out by hand, printed tables,
and formulas that are written out here.
"""

import itertools
import math
import statistics

import numpy as np
import pytest

from raysweep.evaluation.report import compute_wilson_interval
from raysweep.pipeline.published_results import decide_paper_verdict
from raysweep.pipeline.statistics import (
    AccuracySummary,
    binomial_p_value,
    kendall_tau,
    mcnemar_test,
    student_t_quantile,
    summarize_accuracies,
)

NORMAL_95 = 1.9599640
# Two-sided 95% points by degrees of freedom, as books print them.
STUDENT_T_95 = {
    **{1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 8: 2.3060},
    **{9: 2.2622, 10: 2.2281, 11: 2.2010, 12: 2.1788, 13: 2.1604, 14: 2.1448, 15: 2.1314},
    **{20: 2.0860, 24: 2.0639, 30: 2.0423, 40: 2.0211, 60: 2.0003, 120: 1.9799},
}


def flags(both: int, gained: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    new = [True] * both + [True] * gained + [False] * lost + [False] * neither
    old = [True] * both + [False] * gained + [True] * lost + [False] * neither
    return new, old


@pytest.mark.parametrize(
    ("hits", "count", "p"),
    [
        (0, 0, 1.0),
        (0, 5, 2 / 32),
        (0, 6, 2 / 64),
        (1, 8, 2 * (1 + 8) / 256),
        (2, 10, 2 * (1 + 10 + 45) / 1024),
        (5, 10, 1.0),
    ],
)
def test_exact_binomial(hits, count, p) -> None:
    assert binomial_p_value(hits, count) == pytest.approx(p)


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ((50, 6, 0, 44), "better"),  # p = 2/64 = 0.031
        ((50, 5, 0, 45), "cannot tell"),  # p = 2/32 = 0.0625
        ((50, 0, 6, 44), "worse"),
        ((50, 2, 10, 38), "worse"),  # p = 2 x (1 + 12 + 66) / 4096 = 0.039
        ((50, 3, 10, 37), "cannot tell"),  # p = 0.092
        ((60, 0, 0, 40), "tie"),  # the same verdict on every example
        ((5000, 10, 12, 4978), "tie"),  # -0.02 points, 95% within 0.12
        ((100, 30, 30, 40), "cannot tell"),  # the interval reaches 7 points
    ],
)
def test_mcnemar(counts, verdict) -> None:
    test = mcnemar_test(*flags(*counts))
    assert test.verdict == verdict
    assert (test.gained, test.lost, test.examples) == (counts[1], counts[2], sum(counts))
    assert test.difference == pytest.approx((counts[1] - counts[2]) / sum(counts))


def test_mcnemar_interval() -> None:
    """(8 - 2) / 100, and 1.96 sqrt(10 - 36 / 100) / 100."""
    test = mcnemar_test(*flags(40, 8, 2, 50))
    assert test.interval == pytest.approx((0.06 - 0.060854, 0.06 + 0.060854), abs=1e-5)
    assert test.p == pytest.approx(2 * (1 + 10 + 45) / 1024)


def test_kendall() -> None:
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert kendall_tau([1, 2, 3], [30, 20, 10]) == -1
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / (2 * 3) ** 0.5)
    assert kendall_tau([1, 1], [1, 2]) is None and kendall_tau([1], [1]) is None


def test_summary_has_both_sources_of_doubt() -> None:
    one = summarize_accuracies([0.5], 10_000)
    assert (one.median, one.sd, one.n_seeds) == (0.5, None, 1)
    assert (one.low, one.high) == pytest.approx((0.4902, 0.5098), abs=1e-4)
    five = summarize_accuracies([0.49, 0.50, 0.51, 0.50, 0.50], 10_000)
    assert five.sd == pytest.approx(0.0070711, abs=1e-6)
    # t(4) 2.776 x 0.0070711 / sqrt 5 = 0.008778, with 0.0098 of the test set
    assert five.high - 0.5 == pytest.approx((0.008778**2 + 0.0098**2) ** 0.5, abs=1e-4)


@pytest.mark.parametrize(
    ("middle", "half", "verdict"),
    [
        (50.0, 1.0, "reproduced"),
        (51.4, 1.0, "reproduced"),
        (51.6, 1.0, "cannot tell"),
        (52.4, 1.0, "cannot tell"),
        (52.6, 1.0, "not reproduced"),
        (47.0, 1.0, "not reproduced"),
        (50.0, 2.0, "cannot tell"),
        (47.0, 2.0, "cannot tell"),
    ],
)
def test_verdict_on_a_papers_number(middle, half, verdict) -> None:
    """The paper says 50, tolerance 1.5."""
    ours = AccuracySummary(middle / 100, None, (middle - half) / 100, (middle + half) / 100, 1)
    assert decide_paper_verdict(ours, 50.0, 1.5) == verdict


def two_tails(hits: int, count: int) -> float:
    """The probability of at most `hits` heads, or tails, of a fair coin; `hits` is at most half."""
    tail = sum(math.comb(count, k) for k in range(hits + 1)) / 2**count
    return min(1.0, 2 * tail)


def test_exact_binomial_adds_both_tails() -> None:
    """Every split of up to 16 examples into gained and lost, and some of a whole test set."""
    splits = [(hits, count) for count in range(17) for hits in range(count // 2 + 1)]
    for hits, count in [*splits, (300, 700), (480, 1000), (990, 2000)]:
        expected = pytest.approx(two_tails(hits, count), rel=1e-9)
        assert binomial_p_value(hits, count) == expected, (hits, count)
        assert binomial_p_value(count - hits, count) == expected, "heads or tails"


@pytest.mark.parametrize(
    ("both", "gained", "lost", "neither"), [(30, 9, 2, 19), (500, 30, 61, 409), (3, 0, 7, 2)]
)
def test_the_interval_of_mcnemar_is_that_of_paired_differences(both, gained, lost, neither) -> None:
    new, old = flags(both, gained, lost, neither)
    test = mcnemar_test(new, old)
    assert test.p == pytest.approx(two_tails(min(gained, lost), gained + lost))
    differences = np.array(new, float) - np.array(old, float)
    half = NORMAL_95 * differences.std() / math.sqrt(len(new))
    assert test.difference == pytest.approx(differences.mean())
    assert test.interval == pytest.approx((differences.mean() - half, differences.mean() + half))
    turned = mcnemar_test(old, new)
    assert (turned.gained, turned.lost, turned.p) == (lost, gained, test.p)
    assert turned.difference == -test.difference


def test_a_p_at_the_level_is_not_significant() -> None:
    """p = 2 / 32 for five gained and none lost."""
    new, old = flags(50, 5, 0, 45)
    assert mcnemar_test(new, old, alpha=2 / 32).verdict == "cannot tell"
    assert mcnemar_test(new, old, alpha=0.0626).verdict == "better"
    assert mcnemar_test(old, new, alpha=0.0626).verdict == "worse"
    assert mcnemar_test(*flags(50, 5, 0, 45)) == mcnemar_test(new, old, alpha=0.05, margin=0.01), (
        "the defaults"
    )


def test_a_tie_needs_the_whole_interval_within_the_margin() -> None:
    """Ten gained, four lost: the interval reaches further up than down; with the models swapped,
    further down.
    """
    for new, old in (flags(400, 10, 4, 586), flags(400, 4, 10, 586)):
        low, high = mcnemar_test(new, old, alpha=0).interval
        near, far = sorted((abs(low), abs(high)))
        assert low < 0 < high and near < far
        assert mcnemar_test(new, old, alpha=0, margin=far).verdict == "tie", (
            "an end equal to the margin is within it"
        )
        assert mcnemar_test(new, old, alpha=0, margin=(near + far) / 2).verdict == "cannot tell"
        assert mcnemar_test(new, old, alpha=0, margin=near / 2).verdict == "cannot tell"


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Wilson's formula: the shares p with (share - p)^2 = z^2 p (1 - p) / count."""
    a, b, c = count + NORMAL_95**2, -(2 * hits + NORMAL_95**2), hits**2 / count
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def test_wilson() -> None:
    for count in (1, 7, 100, 10_000):
        for hits in {0, 1, count // 3, count // 2, count - 1, count}:
            assert compute_wilson_interval(hits, count) == pytest.approx(
                wilson(hits, count), abs=1e-7
            ), (hits, count)
    assert compute_wilson_interval(0, 0) == (0.0, 1.0)
    assert all(
        0 <= low <= high <= 1
        for low, high in (compute_wilson_interval(0, 3), compute_wilson_interval(3, 3))
    )


def test_students_t_is_that_of_printed_tables_however_many_seeds() -> None:
    for freedom, point in STUDENT_T_95.items():
        assert student_t_quantile(freedom) == pytest.approx(point, abs=5.1e-5), freedom
    points = [student_t_quantile(freedom) for freedom in range(1, 60)]
    assert points == sorted(points, reverse=True)


def tau_b(a: list[float], b: list[float]) -> float | None:
    """Concordant minus discordant pairs, over the geometric mean of the pairs without a tie."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in pairs]
    untied = math.prod(sum(sign[side] != 0 for sign in signs) for side in (0, 1))
    return sum(x * y for x, y in signs) / math.sqrt(untied) if untied else None


def test_kendall_counts_pairs_with_and_without_ties() -> None:
    draws = np.random.default_rng(0)
    for size in (2, 3, 5, 8, 13):
        for _ in range(6):
            a, b = draws.integers(0, 4, size).tolist(), draws.integers(0, 4, size).tolist()
            expected = tau_b(a, b)
            assert kendall_tau(a, b) == (None if expected is None else pytest.approx(expected))
        a, b = draws.normal(size=size).tolist(), draws.normal(size=size).tolist()
        assert kendall_tau(a, b) == pytest.approx(tau_b(a, b))
    assert kendall_tau([], []) is None


@pytest.mark.parametrize(
    ("shares", "median", "sd"),
    [
        # Skewed, so that neither the mean nor the middle of the range is the median; in no order.
        ([0.9, 0.1, 0.2], 0.2, 0.435889894354067),
        ([0.9, 0.1, 0.3, 0.2], 0.25, 0.359397644214130),
        ([0.5, 0.5, 0.5], 0.5, 0.0),
        ([0.4, 0.6], 0.5, 0.141421356237310),
        ([0.7], 0.7, None),
    ],
)
def test_median_and_spread_over_seeds(shares, median, sd) -> None:
    """The spread divides by n - 1: (0.6 - 0.4) / sqrt 2 for two."""
    found = summarize_accuracies(shares, 1000)
    assert found.median == pytest.approx(median)
    assert found.sd == (None if sd is None else pytest.approx(sd, abs=1e-12))
    assert found.n_seeds == len(shares)


@pytest.mark.parametrize("seeds", [2, 5, 11, 12, 25])
def test_the_interval_adds_the_uncertainty_of_seeds_to_that_of_the_test_set(seeds) -> None:
    shares = [0.5 + 0.04 * math.sin(seed) for seed in range(seeds)]
    found = summarize_accuracies(shares, 1000)
    median = statistics.median(shares)
    over_seeds = STUDENT_T_95[seeds - 1] * np.std(shares, ddof=1) / math.sqrt(seeds)
    low, high = wilson(round(median * 1000), 1000)
    assert found.low == pytest.approx(median - math.hypot(over_seeds, median - low), abs=2e-6)
    assert found.high == pytest.approx(median + math.hypot(over_seeds, high - median), abs=2e-6)


def test_the_interval_of_one_seed_is_that_of_the_test_set() -> None:
    for hits in (0, 3, 50, 100):
        found = summarize_accuracies([hits / 100], 100)
        assert (found.low, found.high) == pytest.approx(wilson(hits, 100), abs=1e-7)


def test_the_interval_stays_between_0_and_1() -> None:
    """Two seeds far apart: t is 12.7."""
    for shares in ([0.01, 0.6], [0.4, 0.99], [0.0, 1.0]):
        found = summarize_accuracies(shares, 100)
        assert 0 <= found.low <= found.median <= found.high <= 1
    assert summarize_accuracies([0.0, 1.0], 100)[2:4] == (0.0, 1.0)


@pytest.mark.parametrize(
    ("low", "middle", "high", "verdict"),
    [
        # Sums of powers of 2, so that equal numbers are exactly equal: the paper says 50, with
        # tolerance 12.5.
        (0.5, 0.625, 0.75, "reproduced"),
        (0.25, 0.375, 0.5, "reproduced"),
        (0.5, 0.626, 0.75, "cannot tell"),
        (0.25, 0.374, 0.5, "cannot tell"),
        (0.374, 0.5, 0.625, "cannot tell"),
        (0.625, 0.7, 0.75, "cannot tell"),
        (0.25, 0.3, 0.375, "cannot tell"),
        (0.626, 0.7, 0.75, "not reproduced"),
        (0.25, 0.3, 0.374, "not reproduced"),
    ],
)
def test_verdict_where_a_number_lies_on_the_tolerance(low, middle, high, verdict) -> None:
    assert decide_paper_verdict(AccuracySummary(middle, None, low, high, 1), 50.0, 12.5) == verdict
