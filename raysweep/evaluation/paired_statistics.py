"""Differences between models that were measured on the same examples, and the spread of many.

Rows of a score matrix are models, columns are examples: 1 where the model is right, else 0. A row
may also be the mean of several models of the same settings.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from raysweep.lazy_modules import np

if TYPE_CHECKING:
    import numpy.typing as npt

    FloatArray = npt.NDArray[np.float64]

CONFIDENCE = 0.95
"""Confidence of the intervals of differences, over all of them together."""
SPREAD_CONFIDENCE = 0.9
"""Confidence of the interval of the settings' share: 5% lie above its upper end."""


class PairedDifference(NamedTuple):
    """Difference in accuracy between two models on the same examples.

    Attributes:
        difference: Accuracy of the first minus that of the second, in [-1, 1].
        low: Lower end of its interval.
        high: Upper end of its interval.
    """

    difference: float
    low: float
    high: float

    @property
    def is_told_apart(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """How the first model compares with the second: "better", "worse" or "cannot tell"."""
        if not self.is_told_apart:
            return "cannot tell"
        return "better" if self.low > 0 else "worse"


def compare_paired(
    first: FloatArray, second: FloatArray, n_comparisons: int = 1, training_variance: float = 0.0
) -> PairedDifference:
    """Compare two models on the same examples, by the interval of Agresti and Min (2005).

    Theirs is the normal interval of the mean difference after half an example was added to each of
    the four outcomes (both right, only the first, only the second, none). It covers the true
    difference as often as it claims, also if few examples differ.

    Args:
        first: Scores of the first model, (N,), in [0, 1].
        second: Scores of the second model on the same examples, (N,).
        n_comparisons: Number of comparisons, 1 or more, of which all intervals together are right
            with probability `CONFIDENCE` (Bonferroni). For the best of several models, their
            number.
        training_variance: Part of the variance of `difference`, 0 or more, that comes from the
            randomness of the two trainings. The examples do not show it.

    Returns:
        The difference with its interval.
    """
    differences = first - second
    n_rows = len(differences) + 2
    mean = float(differences.sum()) / n_rows
    variance = (float((differences**2).sum()) + 1 - n_rows * mean**2) / n_rows**2
    quantile = compute_normal_quantile(1 - (1 - CONFIDENCE) / n_comparisons)
    half_width = quantile * math.sqrt(variance + training_variance)
    return PairedDifference(float(differences.mean()), mean - half_width, mean + half_width)


def compare_groups(
    first: FloatArray,
    second: FloatArray,
    n_comparisons: int = 1,
    training_variance: float = 0.0,
) -> PairedDifference:
    """Compare the mean accuracies of two groups of models on the same examples.

    Args:
        first: Scores of the models of the first group, (M, N), M at least 1.
        second: Scores of those of the second, (K, N), on the same examples.
        n_comparisons: As for `compare_paired`.
        training_variance: Variance between the accuracies of models of one group that comes from
            the randomness of training (see `estimate_training_variance`).

    Returns:
        Mean accuracy of the first group minus that of the second, with its interval.
    """
    variance = training_variance * (1 / len(first) + 1 / len(second))
    return compare_paired(first.mean(0), second.mean(0), n_comparisons, variance)


def estimate_training_variance(groups: Iterable[FloatArray]) -> float:
    """Estimate how much the randomness of training changes the accuracy of one model.

    It is the variance between models of equal settings that the choice of the examples does not
    explain, averaged over the groups with their degrees of freedom as weights.

    Args:
        groups: Scores of models that differ only in their seeds, (M, N), one array for each
            settings. Arrays with one model are ignored.

    Returns:
        The variance, 0 or more; 0 if no group has two models.
    """
    repeated = [scores for scores in groups if len(scores) > 1]
    if not repeated:
        return 0.0
    excess, degrees_of_freedom = 0.0, 0
    for scores in repeated:
        spread = statistics.variance(scores.mean(1).tolist())
        excess += (len(scores) - 1) * (spread - estimate_measurement_variance(scores))
        degrees_of_freedom += len(scores) - 1
    return max(0.0, excess / degrees_of_freedom)


def estimate_measurement_variance(scores: FloatArray) -> float:
    """Estimate how much of the variance between models is due to the choice of the examples.

    It is half the variance of the difference between the accuracies of two models, averaged over
    all pairs: the residual mean square of the two-way analysis of variance without replication,
    divided by N. That some examples are easy or hard for all models does not count.

    Args:
        scores: Scores of the models, (M, N), M and N at least 2.

    Returns:
        The variance of one model's accuracy.
    """
    n_models, n_examples = scores.shape
    residuals = scores - scores.mean(1, keepdims=True) - scores.mean(0) + scores.mean()
    squares = float((residuals**2).sum())
    return squares / float((n_models - 1) * (n_examples - 1) * n_examples)


@dataclass(frozen=True)
class SpreadSplit:
    """What the spread of the scores of several models consists of. Variances are of accuracies.

    Attributes:
        n_models: Number of models.
        n_examples: Number of examples on which all were measured.
        n_repeats: Number of models that repeat the settings of another one with another seed; 0 if
            the randomness of training is unknown, and counts as an effect of the settings.
        measurement_variance: Part that is due to the choice of the examples.
        training_variance: Part that is due to the randomness of training; 0 without repeats.
        settings_variance: What is left: the variance of the true accuracies.
        share: Share of the settings in the variance of the scores of single trainings, in [0, 1].
        share_low: Lower end of its interval of `SPREAD_CONFIDENCE`.
        share_high: Upper end.
    """

    n_models: int
    n_examples: int
    n_repeats: int
    measurement_variance: float
    training_variance: float
    settings_variance: float
    share: float
    share_low: float
    share_high: float

    @property
    def needed_examples(self) -> int | None:
        """Number of examples with which two typical settings could be told apart.

        A typical difference, sqrt(2 x `settings_variance`), then equals half the width of its 95%
        interval. None if no number is enough: the settings explain nothing, or the randomness of
        training alone makes the interval wider.
        """
        spare = self.settings_variance / compute_normal_quantile() ** 2 - self.training_variance
        if spare <= 0:
            return None
        return math.ceil(self.n_examples * self.measurement_variance / spare)

    @property
    def needed_seeds(self) -> int | None:
        """Number of seeds for each setting with which two typical settings could be told apart.

        As for `needed_examples`, but on the same number of examples. The errors of two trainings on
        one example count as independent. None if the settings explain nothing.
        """
        if self.settings_variance <= 0:
            return None
        noise = self.measurement_variance + self.training_variance
        return math.ceil(noise * compute_normal_quantile() ** 2 / self.settings_variance)


def split_spread(scores: FloatArray, settings: Sequence[Hashable] = ()) -> SpreadSplit | None:
    """Split the variance between models into settings, training and measurement.

    Variance due to the settings = variance of the accuracies - measurement variance (see
    `estimate_measurement_variance`), and not below 0. Without repeats, the share of the settings is
    the coefficient of Kuder and Richardson (1937), which is Cronbach's alpha of right and wrong
    answers, with the interval of Feldt (1965). With repeats, the variance of models with the same
    settings replaces the measurement variance if it is larger (one-way analysis of variance).

    Args:
        scores: Scores of the models, (M, N).
        settings: Settings of each model without its seed; by default all differ.

    Returns:
        The parts; None with fewer than 3 different settings or 2 examples, or if no example tells
        any two models apart.
    """
    n_models, n_examples = scores.shape
    groups: dict[Hashable, list[float]] = defaultdict(list)
    for key, accuracy in zip(settings or range(n_models), scores.mean(1).tolist(), strict=True):
        groups[key].append(accuracy)
    if len(groups) < 3 or n_examples < 2:
        return None
    measurement = noise = estimate_measurement_variance(scores)
    n_repeats, noise_freedom = n_models - len(groups), (n_models - 1) * (n_examples - 1)
    if n_repeats:
        squares = sum(
            (value - statistics.fmean(group)) ** 2 for group in groups.values() for value in group
        )
        if squares / n_repeats > measurement:
            noise, noise_freedom = squares / n_repeats, n_repeats
    if noise <= 0:
        return None
    between = statistics.variance([statistics.fmean(group) for group in groups.values()])
    mean_inverse_size = statistics.fmean(1 / len(group) for group in groups.values())
    ratio = between / (noise * mean_inverse_size)
    tail = (1 - SPREAD_CONFIDENCE) / 2
    freedoms = (len(groups) - 1, noise_freedom)
    share, low, high = (
        _share_of_ratio(ratio / divisor, mean_inverse_size)
        for divisor in (1.0, _f_quantile(1 - tail, *freedoms), _f_quantile(tail, *freedoms))
    )
    return SpreadSplit(
        n_models,
        n_examples,
        n_repeats,
        measurement,
        noise - measurement,
        max(0.0, between - noise * mean_inverse_size),
        share,
        low,
        high,
    )


def _share_of_ratio(variance_ratio: float, mean_inverse_size: float) -> float:
    """Return the settings' share if the means of groups have this variance in units of noise."""
    effect = max(0.0, (variance_ratio - 1) * mean_inverse_size)
    return effect / (1 + effect)


def _f_quantile(probability: float, *degrees_of_freedom: int) -> float:
    """Return a quantile of the F distribution."""
    # SciPy's statistics take ten times as long to import.
    from scipy.special import fdtri

    return float(fdtri(*degrees_of_freedom, probability))


def compute_normal_quantile(confidence: float = CONFIDENCE) -> float:
    """Return the two-sided quantile of the standard normal distribution.

    Args:
        confidence: Probability of a number between minus and plus the quantile, in (0, 1).
    """
    return statistics.NormalDist().inv_cdf((1 + confidence) / 2)
