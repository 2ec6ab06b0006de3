"""Verdicts against numbers worked out by hand."""

import pytest

from raysweep.pipeline.paper import agreement
from raysweep.pipeline.statistics import Summary, binomial_p, kendall_tau, mcnemar, summary


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
    assert binomial_p(hits, count) == pytest.approx(p)


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
    test = mcnemar(*flags(*counts))
    assert test.verdict == verdict
    assert (test.gained, test.lost, test.examples) == (counts[1], counts[2], sum(counts))
    assert test.difference == pytest.approx((counts[1] - counts[2]) / sum(counts))


def test_mcnemar_interval() -> None:
    """(8 - 2) / 100, and 1.96 sqrt(10 - 36 / 100) / 100."""
    test = mcnemar(*flags(40, 8, 2, 50))
    assert test.interval == pytest.approx((0.06 - 0.060854, 0.06 + 0.060854), abs=1e-5)
    assert test.p == pytest.approx(2 * (1 + 10 + 45) / 1024)


def test_kendall() -> None:
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert kendall_tau([1, 2, 3], [30, 20, 10]) == -1
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / (2 * 3) ** 0.5)
    assert kendall_tau([1, 1], [1, 2]) is None and kendall_tau([1], [1]) is None


def test_summary_has_both_sources_of_doubt() -> None:
    one = summary([0.5], 10_000)
    assert (one.median, one.sd, one.seeds) == (0.5, None, 1)
    assert (one.low, one.high) == pytest.approx((0.4902, 0.5098), abs=1e-4)
    five = summary([0.49, 0.50, 0.51, 0.50, 0.50], 10_000)
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
    ours = Summary(middle / 100, None, (middle - half) / 100, (middle + half) / 100, 1)
    assert agreement(ours, 50.0, 1.5) == verdict
