"""Estimate the duration of AutoAttack on a model from the duration of its validation."""

from collections.abc import Iterable, Mapping
from typing import Any

from raysweep.attacks import build_named_attack
from raysweep.training.validation import Validation

# The unit of costs is a forward and a backward pass of one example. Here: a forward pass alone.
_FORWARD_COST = 1 / 3
# Cost of the evaluation of one natural image.
_NATURAL_COST = 1.0


def estimate_autoattack_seconds(
    validation: Validation, metrics: Mapping[str, float]
) -> float | None:
    """Estimate the seconds that AutoAttack takes on the validation images, in one process.

    The duration of the validation, divided by its number of passes, is the duration of a pass. The
    numbers of passes follow from the steps of the attacks and the share of examples that are still
    robust.

    Args:
        validation: Settings of the validation.
        metrics: Metrics of a validated epoch: `validation_seconds`, and the accuracies `clean` and
            `robust_worst` from 0 to 1.

    Returns:
        The seconds; None if a metric is missing, because the epoch was not validated or was
        validated by an earlier version of raysweep.
    """
    names = ("validation_seconds", "clean", "robust_worst")
    if any(name not in metrics for name in names):
        return None
    seconds, clean, robust = (metrics[name] for name in names)
    scaled = len(validation.scales) * validation.scaled_share
    first_attack = list(validation.attacks.values())[:1]
    validation_passes = (
        _NATURAL_COST
        + clean * _count_passes(validation.attacks.values())
        + clean * scaled * _count_passes(first_attack)
        + robust * _count_passes(validation.finish.values())
    )
    autoattack = build_named_attack("autoattack", 1 / 255, "Linf")
    passes = clean * _NATURAL_COST + robust * _count_passes(autoattack.attacks.values())
    return seconds * passes / validation_passes


def _count_passes(attacks: Iterable[Any]) -> float:
    """Return the number of passes of an example that survives all attacks."""
    return sum(map(_count_attack_passes, attacks))


def _count_attack_passes(attack: Any) -> float:
    """Return the number of passes of an example that survives an attack."""
    if hasattr(attack, "attacks"):
        return _count_passes(attack.attacks.values())
    if hasattr(attack, "queries"):
        return _FORWARD_COST * float(attack.queries * attack.restarts)
    if hasattr(attack, "runs"):
        return float(attack.runs * attack.steps)
    is_targeted = attack.kind == "fab" or getattr(attack, "loss", "").endswith("-targeted")
    targets = attack.targets if is_targeted else 1
    return float(attack.steps * targets * getattr(attack, "restarts", 1))
