"""The few statistics that verdicts rest on, exact where they can be."""

import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

from raysweep.evaluation.report import compute_wilson_interval

PairedVerdict = Literal["better", "worse", "tie", "cannot tell"]
ALPHA = 0.05
# Half of the differences (in accuracy) that nobody would care about.
TIE_MARGIN = 0.01
# Student's t, two-sided 95%, by degrees of freedom.
_STUDENT_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_NORMAL_95 = 1.959964


class McNemarResult(NamedTuple):
    """Two models on the same examples: gained are right only under the new one, lost only under the
    old one.
    """

    gained: int
    lost: int
    examples: int
    p: float
    difference: float
    interval: tuple[float, float]
    verdict: PairedVerdict


def mcnemar_test(
    new_correct: Sequence[bool],
    old_correct: Sequence[bool],
    alpha: float = ALPHA,
    margin: float = TIE_MARGIN,
) -> McNemarResult:
    """McNemar's exact test (binomial on the discordant pairs), and what it allows to say.

    tie: the 95% interval of the difference lies within +-margin; cannot tell: neither that nor
    significant.
    """
    gained = sum(a and not b for a, b in zip(new_correct, old_correct, strict=True))
    lost = sum(b and not a for a, b in zip(new_correct, old_correct, strict=True))
    count = len(new_correct)
    p = binomial_p_value(min(gained, lost), gained + lost)
    difference = (gained - lost) / count
    half = _NORMAL_95 * math.sqrt(gained + lost - (gained - lost) ** 2 / count) / count
    interval = (difference - half, difference + half)
    verdict: PairedVerdict = "cannot tell"
    if p < alpha:
        verdict = "better" if gained > lost else "worse"
    elif -margin <= interval[0] and interval[1] <= margin:
        verdict = "tie"
    return McNemarResult(gained, lost, count, p, difference, interval, verdict)


def binomial_p_value(n_heads: int, n_throws: int) -> float:
    """Two-sided p of at most `hits` heads (or tails) in `count` throws of a fair coin."""
    return float(
        min(1.0, 2 * sum(math.comb(n_throws, k) for k in range(n_heads + 1)) / 2**n_throws)
    )


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's tau-b; None where one side is constant or there are fewer than two points."""
    concordant = ties_a = ties_b = pairs = 0
    for i in range(len(a)):
        for j in range(i):
            x, y = a[i] - a[j], b[i] - b[j]
            pairs += 1
            ties_a += x == 0
            ties_b += y == 0
            concordant += (x * y > 0) - (x * y < 0)
    scale = math.sqrt((pairs - ties_a) * (pairs - ties_b))
    return concordant / scale if scale else None


def student_t_quantile(degrees_of_freedom: int) -> float:
    """Return the two-sided 95% point of Student's t with `freedom` (1 or more) degrees of freedom,
    to within 0.0005.

    Beyond the table it comes from an expansion about the normal distribution's (Abramowitz and
    Stegun 26.7.5).
    """
    if degrees_of_freedom <= len(_STUDENT_T_95):
        return _STUDENT_T_95[degrees_of_freedom - 1]
    z = _NORMAL_95
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return (
        z
        + first / degrees_of_freedom
        + second / degrees_of_freedom**2
        + third / degrees_of_freedom**3
    )


class AccuracySummary(NamedTuple):
    """One number measured on several models (seeds): median, spread, and a 95% interval of what is
    behind it.
    """

    median: float
    sd: float | None
    low: float
    high: float
    n_seeds: int


def summarize_accuracies(accuracies: Sequence[float], n_examples: int) -> AccuracySummary:
    """Of accuracies in [0, 1], each measured on `examples`.

    The interval has both sources of doubt: seeds (t) and the finite test set (Wilson).
    """
    median = statistics.median(accuracies)
    sd = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    seeds = (
        0.0
        if sd is None
        else student_t_quantile(len(accuracies) - 1) * sd / math.sqrt(len(accuracies))
    )
    low, high = compute_wilson_interval(round(median * n_examples), n_examples)
    low, high = median - math.hypot(seeds, median - low), median + math.hypot(seeds, high - median)
    return AccuracySummary(median, sd, max(0.0, low), min(1.0, high), len(accuracies))
