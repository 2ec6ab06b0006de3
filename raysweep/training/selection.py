"""The rules that decide which epoch of a run is its best, and which checkpoint of several."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from raysweep.training.config import TrainingConfig
from raysweep.training.metric_history import EpochMetrics

TIE_BREAK_METRICS: Mapping[str, str] = {"robust_worst": "robust_margin"}
"""Objective -> continuous metric that ranks epochs and runs of the same objective; larger is
better."""

CHANCE_LIMIT_METRIC = "val/chance_limit"
"""Metric of a validated epoch: natural accuracy up to which a model may be guessing."""


class SelectionRule(NamedTuple):
    """Which epochs of a run can be its best, and by which metric.

    Attributes:
        objective: Metric that decides; larger is better.
        burn_in: Number of first epochs in which an instance weight is still 1.
        first_epoch: First eligible epoch, from 1 (`validation.window`).
        last_epoch: Last eligible epoch.
        score_epochs: Number of consecutive validated epochs, after the burn-in and in the window,
            that a mean averages; the best mean is the run's score. 1 if its score is the objective
            of its best epoch.
        margin_factor: Factor of the margin in the score and at the rungs of ASHA (see
            `add_margin`); at least 0, which leaves it out.
    """

    objective: str
    burn_in: int = 0
    first_epoch: int = 1
    last_epoch: float = math.inf
    score_epochs: int = 1
    margin_factor: float = 0.0

    @classmethod
    def from_config(cls, config: TrainingConfig) -> "SelectionRule":
        """Return the rule of a run.

        Args:
            config: The run's config.
        """
        first_epoch, last_epoch = config.validation.window or (1, math.inf)
        return cls(config.validation.objective, config.burn_in, first_epoch, last_epoch)


class EpochRank(NamedTuple):
    """How good an epoch is; a larger rank is better.

    Attributes:
        is_above_chance: Whether its natural accuracy is more than guessing gives.
        is_in_window: Whether it lies in `validation.window`.
        is_after_burn_in: Whether the burn-ins of all instance weights were over.
        value: Value of the objective; minus infinity if it was not measured.
        tie_break: Value of the metric that breaks ties of the objective (see
            `get_tie_break`).
    """

    is_above_chance: bool
    is_in_window: bool
    is_after_burn_in: bool
    value: float
    tie_break: float = -math.inf

    @property
    def is_eligible(self) -> bool:
        """Whether the run may be ranked by this epoch."""
        is_valid = self.is_above_chance and self.is_in_window and self.is_after_burn_in
        return is_valid and self.value > -math.inf


class RunRank(NamedTuple):
    """How good a run is, by its best epoch; a smaller rank is better.

    Attributes:
        has_failed: Whether the run failed; its best epoch may be older than the failure.
        has_ineligible_best: Whether its best epoch is not eligible (see `EpochRank`).
        exceeds_masking_gap: Whether its masking gap is above the limit of its search space.
        is_below_finalists: Whether AutoAttack decides between other runs, the finalists, and this
            run is none of them.
        negated_seeds: Minus the number of seeds whose mean the score is. A repeated trial is
            above all others: the best scores of these are partly luck. 0 for a finalist.
        negated_score: Minus the score, or minus its mean over several seeds; for a finalist minus
            the corrected score (`Trial.corrected_score`).
        negated_tie_break: Minus the metric that breaks ties (see `get_tie_break`).
    """

    has_failed: bool
    has_ineligible_best: bool
    exceeds_masking_gap: bool
    is_below_finalists: bool
    negated_seeds: int
    negated_score: float
    negated_tie_break: float = 0.0

    @property
    def is_eligible(self) -> bool:
        """Whether the run may be chosen: nothing but its score speaks against it."""
        return not (self.has_failed or self.has_ineligible_best or self.exceeds_masking_gap)


def rank_epoch(metrics: EpochMetrics, rule: SelectionRule) -> EpochRank:
    """Rank an epoch among those of its run.

    Args:
        metrics: Metrics of the epoch; {} before the first.
        rule: Rule of the run.

    Returns:
        The rank.
    """
    epoch = metrics.get("epoch", math.inf)
    clean, limit = metrics.get("clean", math.inf), metrics.get(CHANCE_LIMIT_METRIC, -math.inf)
    return EpochRank(
        is_above_chance=rule.objective in metrics and clean > limit,
        is_in_window=rule.first_epoch <= epoch <= rule.last_epoch,
        is_after_burn_in=epoch > rule.burn_in,
        value=metrics.get(rule.objective, -math.inf),
        tie_break=get_tie_break(metrics, rule.objective),
    )


def get_tie_break(metrics: EpochMetrics, objective: str) -> float:
    """Return the metric that ranks epochs and runs whose objective is the same.

    Args:
        metrics: Metrics of the epoch.
        objective: Name of the objective.

    Returns:
        The value; larger is better. Minus infinity if the objective has no such metric, or an
        earlier version trained the epoch, which has none or nan.
    """
    value = metrics.get(TIE_BREAK_METRICS.get(objective, ""), -math.inf)
    return -math.inf if math.isnan(value) else value


def add_margin(value: float, metrics: EpochMetrics, rule: SelectionRule) -> float:
    """Add the margin of an epoch to a value of the objective.

    The margin is the metric that also breaks ties of the objective (see `get_tie_break`):
    `robust_margin` for `robust_worst`, in [0, 1].

    Args:
        value: The objective, or a mean of it over several epochs.
        metrics: Metrics of the epoch.
        rule: Rule of the run, with the objective and the factor of the margin.

    Returns:
        `value` + `margin_factor` * margin; `value` alone if the epoch has no margin.
    """
    return value + rule.margin_factor * max(0.0, get_tie_break(metrics, rule.objective))


def measure_at_rung(metrics: EpochMetrics, rule: SelectionRule) -> float:
    """Return what ASHA compares at a rung: the objective of the epoch, with its margin.

    Args:
        metrics: Metrics of an epoch that measured the objective.
        rule: Rule of the run.

    Returns:
        The value; 0 if the epoch is no better than chance. Where one class is frequent, a model
        that always answers it looks robust.
    """
    if not rank_epoch(metrics, rule).is_above_chance:
        return 0.0
    return add_margin(metrics[rule.objective], metrics, rule)


def average_epochs(curve: Iterable[Sequence[float]], rule: SelectionRule) -> list[float]:
    """Average the objective over each `score_epochs` consecutive validated epochs of a run, among
    those after the burn-in and in the window.

    The best epoch of many is partly best by luck. Means are less so.

    Args:
        curve: Pairs (epoch, objective) of the epochs that measured it and that are better than
            chance, in order.
        rule: Rule of the run.

    Returns:
        The means, in the order of their last epochs. While there are fewer epochs than
        `score_epochs`, the mean over all; [] while there is none.
    """
    values = [
        value
        for epoch, value in curve
        if epoch > rule.burn_in and rule.first_epoch <= epoch <= rule.last_epoch
    ]
    size = min(rule.score_epochs, len(values))
    ends = range(size, len(values) + 1) if values else ()
    return [fmean(values[end - size : end]) for end in ends]


def find_best_epoch(
    config: TrainingConfig,
    history: Sequence[EpochMetrics],
    saved_epochs: Collection[int] | None = None,
) -> int:
    """Find the epoch with the highest `validation.objective` after all burn-ins.

    An epoch within a burn-in, outside `validation.window`, or whose natural accuracy is at chance,
    is chosen only if there is no other. Within a burn-in, the weights of the method do not act yet.

    Args:
        config: The run's config.
        history: Metrics of all finished epochs, at least one, in order.
        saved_epochs: The 1-based epochs to choose from; None for all.

    Returns:
        The 1-based epoch; the earliest of several with the same value.
    """
    rule = SelectionRule.from_config(config)
    best_epoch, best_rank = 0, None
    for epoch, metrics in enumerate(history, 1):
        if saved_epochs is not None and epoch not in saved_epochs:
            continue
        rank = rank_epoch({"epoch": epoch, **metrics}, rule)
        if best_rank is None or rank > best_rank:
            best_epoch, best_rank = epoch, rank
    return best_epoch or len(history)


def find_best_burn_in_metrics(
    config: TrainingConfig, history: Iterable[EpochMetrics]
) -> EpochMetrics:
    """Find what a run reached before its instance weights acted.

    Args:
        config: The run's config.
        history: Metrics of its epochs, in order.

    Returns:
        Metrics of the best epoch within the longest burn-in; {} if none measured the objective.
    """
    objective, best = config.validation.objective, EpochMetrics()
    for metrics in history:
        is_better = metrics.get(objective, -math.inf) > best.get(objective, -math.inf)
        if metrics["epoch"] <= config.burn_in and is_better:
            best = metrics
    return best


def compute_chance_limit(n_classes: int, n_examples: int, n_most_frequent: int = 0) -> float:
    """Compute the natural accuracy that guessing exceeds in 2% of cases.

    Args:
        n_classes: Number of classes.
        n_examples: Number of validated examples.
        n_most_frequent: Number of them that are of the most frequent class, which a constant
            prediction gets right; 0 if the classes are about equally frequent.

    Returns:
        Two standard deviations above 1 / `n_classes`, or above the share of the most frequent class
        if the examples are not divided as equally as possible; less than 1, because a model that is
        right on all examples is no guess, even if there are few.
    """
    return min(_compute_limit(n_classes, n_examples, n_most_frequent), 1 - 1 / n_examples)


def can_guess_all_labels(n_classes: int, n_examples: int, n_most_frequent: int = 0) -> bool:
    """Return whether a guess may be right on all of so few examples (two standard deviations).

    The arguments are those of `compute_chance_limit`.
    """
    return _compute_limit(n_classes, n_examples, n_most_frequent) >= 1


def _compute_limit(n_classes: int, n_examples: int, n_most_frequent: int) -> float:
    """Return two standard deviations above chance, which may be more than 1."""
    chance = 1 / n_classes
    if n_most_frequent > math.ceil(n_examples / n_classes):
        chance = n_most_frequent / n_examples
    return chance + 2 * math.sqrt(chance * (1 - chance) / n_examples)
