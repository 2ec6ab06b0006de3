"""Statistical tests and intervals for comparing accuracies of models.

Functions import SciPy themselves: a part of it takes a second.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from raysweep.evaluation.paired_statistics import compute_normal_quantile
from raysweep.evaluation.report import compute_wilson_interval

PairedVerdict = Literal["better", "worse", "tie", "cannot tell"]
ALPHA = 0.05
# Differences in accuracy up to this size do not matter in practice.
TIE_MARGIN = 0.01
# The share of a distribution below the upper end of a two-sided 95% interval.
_UPPER_95 = 0.975


@dataclass(frozen=True)
class McNemarResult:
    """McNemar's test of two models on the same examples.

    Attributes:
        gained: Number of examples that only the new model classifies correctly.
        lost: Number of examples that only the old model classifies correctly.
        examples: Number of examples in the comparison.
        p: Two-sided p-value, in [0, 1].
        difference: Accuracy of the new model minus that of the old one, in [-1, 1].
        interval: 95% confidence interval of `difference`.
        verdict: What the test allows to conclude about the new model.
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
    """Compare two models by McNemar's exact test (binomial on the discordant pairs).

    Args:
        new_correct: For each example, whether the new model is correct.
        old_correct: The same for the old model, with the examples in the same order.
        alpha: Significance level of the test.
        margin: Largest difference in accuracy that counts as a tie.

    Returns:
        The counts, the p-value and the verdict. A significant difference is "better" or "worse".
        Otherwise the verdict is "tie" if the 95% interval lies within +-margin, else "cannot tell".

    Raises:
        ValueError: If the two sequences have different lengths.
    """
    pairs = list(zip(new_correct, old_correct, strict=True))
    gained = sum(new and not old for new, old in pairs)
    lost = sum(old and not new for new, old in pairs)
    count = len(pairs)
    p = binomial_p_value(min(gained, lost), gained + lost)
    difference = (gained - lost) / count
    deviation = math.sqrt(gained + lost - (gained - lost) ** 2 / count) / count
    half_width = compute_normal_quantile(0.95) * deviation
    interval = (difference - half_width, difference + half_width)
    verdict: PairedVerdict = "cannot tell"
    if p < alpha:
        verdict = "better" if gained > lost else "worse"
    elif -margin <= interval[0] and interval[1] <= margin:
        verdict = "tie"
    return McNemarResult(gained, lost, count, p, difference, interval, verdict)


def binomial_p_value(n_heads: int, n_throws: int) -> float:
    """Compute the exact p-value of a fair coin.

    Args:
        n_heads: Number of heads.
        n_throws: Number of throws, 0 or more.

    Returns:
        Two-sided p-value: the probability of a number of heads that is at least as far from half
        of the throws. It is 1 without a throw.
    """
    # scipy.stats has a function for this, but takes a second to import.
    from scipy.special import bdtr

    n_fewer = min(n_heads, n_throws - n_heads)
    return 1.0 if 2 * n_fewer == n_throws else float(2 * bdtr(n_fewer, n_throws, 0.5))


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Compute Kendall's rank correlation tau-b of two sequences.

    Args:
        a: Numbers.
        b: Numbers in the same order, as many as in `a`.

    Returns:
        tau-b in [-1, 1], or None if a sequence is constant or has fewer than two values.
    """
    from scipy.stats import kendalltau

    if len(a) < 2:
        return None
    tau = float(kendalltau(a, b).statistic)
    return None if math.isnan(tau) else tau


def student_t_quantile(degrees_of_freedom: int) -> float:
    """Return the two-sided 95% point of Student's t distribution.

    Args:
        degrees_of_freedom: 1 or more.
    """
    from scipy.special import stdtrit

    return float(stdtrit(degrees_of_freedom, _UPPER_95))


class AccuracySummary(NamedTuple):
    """Accuracy of the same training over several seeds.

    Attributes:
        median: Median over the seeds, in [0, 1].
        sd: Sample standard deviation over the seeds; None for one seed.
        low: Lower end of the 95% interval, in [0, 1].
        high: Upper end of the 95% interval, in [0, 1].
        n_seeds: Number of seeds.
    """

    median: float
    sd: float | None
    low: float
    high: float
    n_seeds: int


def summarize_accuracies(accuracies: Sequence[float], n_examples: int) -> AccuracySummary:
    """Summarize accuracies of several seeds.

    The 95% interval combines two sources of error: the seeds (Student's t) and the finite test set
    (Wilson).

    Args:
        accuracies: One accuracy in [0, 1] for each seed.
        n_examples: Number of test examples behind each accuracy.

    Returns:
        Median, standard deviation and interval.
    """
    median = statistics.median(accuracies)
    n_seeds = len(accuracies)
    sd, seed_error = None, 0.0
    if n_seeds > 1:
        sd = statistics.stdev(accuracies)
        seed_error = student_t_quantile(n_seeds - 1) * sd / math.sqrt(n_seeds)
    low, high = compute_wilson_interval(round(median * n_examples), n_examples)
    low = median - math.hypot(seed_error, median - low)
    high = median + math.hypot(seed_error, high - median)
    return AccuracySummary(median, sd, max(0.0, low), min(1.0, high), n_seeds)
