"""What a run's numbers say, in words: each line names what was seen and what it means for the sweep."""

from collections.abc import Iterator, Mapping, Sequence

from raysweep.attacks import PGD
from raysweep.schedules import now
from raysweep.training.config import RunConfig
from raysweep.weights import Remainder, Uniform

Row = Mapping[str, float]

# Shares and differences of shares from which on a line is worth reading.
_GAP = 0.05
_FEW = 0.3
_EVEN = 0.98
_INERT = 0.01
_ZERO = 0.05
_OVERFIT = 0.03
_EDGE = 0.05


def advise(config: RunConfig, history: Sequence[Row]) -> list[str]:
    """Advice on a training run from its rows of metrics, one an epoch; no line where nothing stands out.

    The weights are judged by the last epoch, masking by the best one (see `validation.objective`).
    """
    if not history:
        return []
    objective = config.validation.objective
    judged = [row for row in history if objective in row]
    best = max(judged, key=lambda row: row[objective]) if judged else history[-1]
    return [
        *_masking(best),
        *_weights(config, history[-1]),
        *_kappa(config, history[-1]),
        *(_overfitting(objective, best, judged[-1]) if judged else ()),
    ]


def _masking(row: Row) -> Iterator[str]:
    gap = row.get("masking_gap", 0.0)
    if gap >= _GAP:
        yield f"PGD overstates the worst case by {100 * gap:.1f} points: likely masking; do not select by PGD"
    difference = row.get("pgd", 0.0) - row.get("cw", 1.0)
    if difference >= _GAP:
        yield f"PGD-CW gap {100 * difference:.1f} points: the margin is attacked where cross-entropy is not"
    share = row.get("zero_gradient", 0.0)
    if share >= _ZERO:
        yield f"{100 * share:.1f}% of right answers have no gradient: cross-entropy attacks cannot see them"


def _weights(config: RunConfig, row: Row) -> Iterator[str]:
    """The observatory of the weights: whether they act, and on how many examples."""
    epoch = int(row["epoch"])
    for name, term in config.at(epoch - 1).method.terms.items():
        if isinstance(term.weight, Uniform):
            if epoch <= getattr(config.method.terms[name].weight, "burn_in", 0):
                yield f"weights of {name} have not acted: epoch {epoch} is within the burn-in"
            continue
        active, effective = row.get(f"train/active_{name}"), row.get(f"train/ess_{name}")
        if isinstance(term.weight, Remainder):
            if active is not None and active < _INERT:
                total = f"total {now(term.weight.total):g}"
                yield f"{name} is inert: active on {100 * active:.1f}% of samples with {total}; a larger one would act"
        elif effective is not None and effective < _FEW:
            yield f"effective sample size {100 * effective:.0f}% ({name}): the weights fit few points"
        elif effective is not None and effective > _EVEN:
            equal = "the weights are all but equal and change little"
            yield f"effective sample size {100 * effective:.1f}% ({name}): {equal}"


def _kappa(config: RunConfig, row: Row) -> Iterator[str]:
    for name, attack in config.method.attacks.items():
        mean = row.get(f"train/kappa_{name}")
        if mean is None or not isinstance(attack, PGD) or attack.steps < 2:
            continue
        if mean >= (1 - _EDGE) * attack.steps:
            yield f"kappa of {name} is {mean:.1f} of {attack.steps}: the attack hardly ever succeeds"
        elif mean <= _EDGE * attack.steps:
            yield f"kappa of {name} is {mean:.1f} of {attack.steps}: nearly all examples fall at once"


def _overfitting(objective: str, best: Row, last: Row) -> Iterator[str]:
    fall = best[objective] - last[objective]
    if fall >= _OVERFIT:
        yield (
            f"{objective.replace('_', ' ')} fell by {100 * fall:.1f} points after epoch {int(best['epoch'])}: "
            "robust overfitting or too large steps; take the best epoch, end earlier or lower optim.lr"
        )
