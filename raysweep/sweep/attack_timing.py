"""How long AutoAttack on a model takes, from how long its validation took."""

from collections.abc import Iterable, Mapping
from typing import Any

from raysweep.attacks import build_named_attack
from raysweep.training.validation import Validation

# A forward pass without the gradient, in relation to one with it.
_FORWARD_COST = 1 / 3
# Passes of an example on which nothing but the natural images is measured.
_NATURAL_COST = 1.0


def estimate_autoattack_seconds(
    validation: Validation, metrics: Mapping[str, float]
) -> float | None:
    """Estimate the seconds that AutoAttack takes on the validation images, in one process.

    The validation measured how long a pass through the network takes. The number of passes follows
    from the steps of the attacks and from how many examples survive them.

    Args:
        validation: The validation of an epoch.
        metrics: What it measured.

    Returns:
        The seconds; None if they cannot be estimated: the epoch was not validated, or an earlier
        version of raysweep did it.
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
    """Return the passes of an example that survives some attacks."""
    return sum(map(_count_attack_passes, attacks))


def _count_attack_passes(attack: Any) -> float:
    """Return the passes of an example that survives an attack: forward and backward is one."""
    if hasattr(attack, "attacks"):
        return _count_passes(attack.attacks.values())
    if hasattr(attack, "queries"):
        return _FORWARD_COST * float(attack.queries * attack.restarts)
    if hasattr(attack, "runs"):
        return float(attack.runs * attack.steps)
    is_targeted = attack.kind == "fab" or getattr(attack, "loss", "").endswith("-targeted")
    targets = attack.targets if is_targeted else 1
    return float(attack.steps * targets * getattr(attack, "restarts", 1))
