"""What a run's numbers say, in words: each line names what was seen and what it means for the
sweep.
"""

from collections.abc import Iterator, Mapping, Sequence

from raysweep.attacks import PGD
from raysweep.schedules import resolved_value
from raysweep.training.config import TrainingConfig
from raysweep.weights import RemainderWeight, UniformWeight

EpochMetrics = Mapping[str, float]

# Shares and differences of shares from which on a line is worth reading.
_MIN_MASKING_GAP = 0.05
_LOW_SAMPLE_SIZE = 0.3
_HIGH_SAMPLE_SIZE = 0.98
_MIN_ACTIVE_SHARE = 0.01
_MIN_ZERO_GRADIENTS = 0.05
_MIN_OVERFITTING_DROP = 0.03
_KAPPA_EDGE_SHARE = 0.05


def advise_on_training(config: TrainingConfig, history: Sequence[EpochMetrics]) -> list[str]:
    """Advice on a training run from its rows of metrics, one an epoch; no line where nothing stands
    out.

    The weights are judged by the last epoch, masking by the best one (see `validation.objective`).
    """
    if not history:
        return []
    objective = config.validation.objective
    judged = [row for row in history if objective in row]
    best = max(judged, key=lambda row: row[objective]) if judged else history[-1]
    return [
        *_advise_on_masking(best),
        *_advise_on_weights(config, history[-1]),
        *_advise_on_kappa(config, history[-1]),
        *(_advise_on_overfitting(objective, best, judged[-1]) if judged else ()),
    ]


def _advise_on_masking(metrics: EpochMetrics) -> Iterator[str]:
    gap = metrics.get("masking_gap", 0.0)
    if gap >= _MIN_MASKING_GAP:
        yield f"PGD overstates the worst case by {100 * gap:.1f} points: likely masking; do not select by PGD"
    difference = metrics.get("pgd", 0.0) - metrics.get("cw", 1.0)
    if difference >= _MIN_MASKING_GAP:
        yield f"PGD-CW gap {100 * difference:.1f} points: the margin is attacked where cross-entropy is not"
    share = metrics.get("zero_gradient", 0.0)
    if share >= _MIN_ZERO_GRADIENTS:
        yield f"{100 * share:.1f}% of right answers have no gradient: cross-entropy attacks cannot see them"


def _advise_on_weights(config: TrainingConfig, metrics: EpochMetrics) -> Iterator[str]:
    """The observatory of the weights: whether they act, and on how many examples."""
    epoch = int(metrics["epoch"])
    for name, term in config.resolve_at(epoch - 1).method.terms.items():
        if isinstance(term.weight, UniformWeight):
            if epoch <= getattr(config.method.terms[name].weight, "burn_in", 0):
                yield f"weights of {name} have not acted: epoch {epoch} is within the burn-in"
            continue
        active, effective = metrics.get(f"train/active_{name}"), metrics.get(f"train/ess_{name}")
        if isinstance(term.weight, RemainderWeight):
            if active is not None and active < _MIN_ACTIVE_SHARE:
                total = f"total {resolved_value(term.weight.total):g}"
                yield f"{name} is inert: active on {100 * active:.1f}% of samples with {total}; a larger one would act"
        elif effective is not None and effective < _LOW_SAMPLE_SIZE:
            yield f"effective sample size {100 * effective:.0f}% ({name}): the weights fit few points"
        elif effective is not None and effective > _HIGH_SAMPLE_SIZE:
            equal = "the weights are all but equal and change little"
            yield f"effective sample size {100 * effective:.1f}% ({name}): {equal}"


def _advise_on_kappa(config: TrainingConfig, metrics: EpochMetrics) -> Iterator[str]:
    for name, attack in config.method.attacks.items():
        mean = metrics.get(f"train/kappa_{name}")
        if mean is None or not isinstance(attack, PGD) or attack.steps < 2:
            continue
        if mean >= (1 - _KAPPA_EDGE_SHARE) * attack.steps:
            yield f"kappa of {name} is {mean:.1f} of {attack.steps}: the attack hardly ever succeeds"
        elif mean <= _KAPPA_EDGE_SHARE * attack.steps:
            yield f"kappa of {name} is {mean:.1f} of {attack.steps}: nearly all examples fall at once"


def _advise_on_overfitting(
    objective: str, best_metrics: EpochMetrics, last_metrics: EpochMetrics
) -> Iterator[str]:
    fall = best_metrics[objective] - last_metrics[objective]
    if fall >= _MIN_OVERFITTING_DROP:
        yield (
            f"{objective.replace('_', ' ')} fell by {100 * fall:.1f} points after epoch {int(best_metrics['epoch'])}: "
            "robust overfitting or too large steps; take the best epoch, end earlier or lower optim.lr"
        )
