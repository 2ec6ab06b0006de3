"""Advice on a training run: sentences that explain conspicuous metrics."""

from collections.abc import Iterator, Sequence

from raysweep.attacks import PGD
from raysweep.formatting import format_count
from raysweep.instance_weights import RemainderWeight, UniformWeight
from raysweep.schedules import resolved_value
from raysweep.training.config import TrainingConfig
from raysweep.training.metric_history import EpochMetrics
from raysweep.training.selection import (
    CHANCE_LIMIT_METRIC,
    find_best_burn_in_metrics,
    find_best_epoch,
)

# Thresholds of shares, or of differences of shares, beyond which advice is given.
_MIN_MASKING_GAP = 0.05
_LOW_SAMPLE_SIZE = 0.3
_HIGH_SAMPLE_SIZE = 0.98
_MIN_ACTIVE_SHARE = 0.01
_MIN_ZERO_GRADIENTS = 0.05
_MIN_OVERFITTING_DROP = 0.03
_KAPPA_EDGE_SHARE = 0.05


def advise_on_training(config: TrainingConfig, history: Sequence[EpochMetrics]) -> list[str]:
    """Give advice on a training run.

    Advice on masked gradients uses the metrics of the best epoch (see `validation.objective`),
    advice on instance weights and kappa those of the last epoch.

    Args:
        config: Config of the run.
        history: Metrics of all finished epochs, in order.

    Returns:
        One line for each finding; empty if nothing stands out.
    """
    if not history:
        return []
    objective = config.validation.objective
    last = history[-1]
    validated = [metrics for metrics in history if objective in metrics]
    best = history[find_best_epoch(config, history) - 1] if validated else last
    lines = [
        *_advise_on_masking(best),
        *_advise_on_weights(config, last),
        *_advise_on_kappa(config, last),
    ]
    if best.get("clean", 1.0) <= best.get(CHANCE_LIMIT_METRIC, -1.0):
        lines += _advise_on_guessing(config, best)
    elif validated:
        lines += _advise_on_burn_in(config, history, best)
        lines += _advise_on_overfitting(objective, best, validated[-1])
    return lines


def _advise_on_masking(metrics: EpochMetrics) -> Iterator[str]:
    """Report symptoms of masked gradients."""
    gap = metrics.get("masking_gap", 0.0)
    if gap >= _MIN_MASKING_GAP:
        yield (
            f"PGD overstates the worst case by {100 * gap:.1f} points: likely masking; "
            "do not select by PGD"
        )
    difference = metrics.get("pgd", 0.0) - metrics.get("cw", 1.0)
    if difference >= _MIN_MASKING_GAP:
        yield (
            f"PGD-CW gap {100 * difference:.1f} points: the margin loss finds adversarial examples "
            "that cross-entropy misses"
        )
    share = metrics.get("zero_gradient", 0.0)
    if share >= _MIN_ZERO_GRADIENTS:
        yield (
            f"{100 * share:.1f}% of examples are correct and have no gradient: "
            "attacks on the cross-entropy cannot break them"
        )


def _advise_on_weights(config: TrainingConfig, metrics: EpochMetrics) -> Iterator[str]:
    """Report terms whose instance weights have no effect, or are concentrated on few examples."""
    epoch = int(metrics["epoch"])
    for name, term in config.resolve_at(epoch - 1).method.terms.items():
        if isinstance(term.weight, UniformWeight):
            # A weight is uniform during its burn-in.
            if epoch <= getattr(config.method.terms[name].weight, "burn_in", 0):
                yield f"weights of {name} have not acted: epoch {epoch} is within the burn-in"
        elif isinstance(term.weight, RemainderWeight):
            yield from _advise_on_remainder_weight(name, term.weight, metrics)
        else:
            yield from _advise_on_sample_size(name, metrics)


def _advise_on_remainder_weight(
    name: str, weight: RemainderWeight, metrics: EpochMetrics
) -> Iterator[str]:
    """Report a remainder weight that is almost always zero."""
    active_share = metrics.get(f"train/active_{name}")
    if active_share is not None and active_share < _MIN_ACTIVE_SHARE:
        yield (
            f"{name} is inert: active on {100 * active_share:.1f}% of samples with "
            f"total {resolved_value(weight.total):g}; a larger total would act"
        )


def _advise_on_sample_size(name: str, metrics: EpochMetrics) -> Iterator[str]:
    """Report weights that are concentrated on few examples, or nearly equal."""
    ess = metrics.get(f"train/ess_{name}")
    if ess is None:
        return
    if ess < _LOW_SAMPLE_SIZE:
        yield f"effective sample size {100 * ess:.0f}% ({name}): the weights fit few points"
    elif ess > _HIGH_SAMPLE_SIZE:
        yield (
            f"effective sample size {100 * ess:.1f}% ({name}): "
            "the weights are nearly equal and change little"
        )


def _advise_on_kappa(config: TrainingConfig, metrics: EpochMetrics) -> Iterator[str]:
    """Report attacks that succeed almost never, or on almost all examples in the first steps."""
    for name, attack in config.method.attacks.items():
        mean = metrics.get(f"train/kappa_{name}")
        if mean is None or not isinstance(attack, PGD) or attack.steps < 2:
            continue
        kappa = f"kappa of {name} is {mean:.1f} of {attack.steps}"
        if mean >= (1 - _KAPPA_EDGE_SHARE) * attack.steps:
            yield f"{kappa}: the attack hardly ever succeeds"
        elif mean <= _KAPPA_EDGE_SHARE * attack.steps:
            yield f"{kappa}: the attack succeeds at once on nearly all examples"


def _advise_on_guessing(config: TrainingConfig, best_metrics: EpochMetrics) -> Iterator[str]:
    """Report a run without an epoch that is better than guessing."""
    epochs = format_count(config.epochs, "epoch")
    yield (
        f"no epoch is better than guessing: {best_metrics['clean']:.3f} of natural images are "
        f"right, and guessing reaches {best_metrics[CHANCE_LIMIT_METRIC]:.3f}; train for more than "
        f"{epochs}, or with another optim.lr"
    )


def _advise_on_burn_in(
    config: TrainingConfig, history: Sequence[EpochMetrics], best_metrics: EpochMetrics
) -> Iterator[str]:
    """Report a run that was better before its instance weights acted."""
    objective = config.validation.objective
    title = objective.replace("_", " ")
    if best_metrics["epoch"] <= config.burn_in:
        if history[-1]["epoch"] > config.burn_in:
            yield (
                f"the best epoch, {int(best_metrics['epoch'])}, is within the burn-in: no later "
                "one is better than chance"
            )
        return
    before = find_best_burn_in_metrics(config, history).get(objective)
    if before is not None and before > best_metrics[objective]:
        yield (
            f"reweighting made this worse: {title} {before:.3f} before it acted, "
            f"{best_metrics[objective]:.3f} after"
        )


def _advise_on_overfitting(
    objective: str, best_metrics: EpochMetrics, last_metrics: EpochMetrics
) -> Iterator[str]:
    """Report an objective that fell after the best epoch."""
    drop = best_metrics[objective] - last_metrics[objective]
    if drop >= _MIN_OVERFITTING_DROP:
        yield (
            f"{objective.replace('_', ' ')} fell by {100 * drop:.1f} points after epoch "
            f"{int(best_metrics['epoch'])}: robust overfitting or too large steps; "
            "take the best epoch, end earlier or lower optim.lr"
        )
