"""Names of the metrics that the epochs of a run may have."""

from raysweep.training.config import TrainingConfig
from raysweep.training.selection import CHANCE_LIMIT_METRIC

_COMMON_METRICS = (
    *("epoch", "shared", "train/lr", "train/loss", "train/seconds", "train/clean"),
    *("train/natural", "train/robust", "validation_seconds", CHANCE_LIMIT_METRIC),
    *("clean", "robust_worst", "robust_margin", "masking_gap", "zero_gradient"),
    *("val/ce_cw_gap", "val/scaling_gap", "flatness_friendly", "flatness_adversarial"),
)
_ATTACK_METRICS = ("{}", "kappa_{}", "kappa_median_{}", "V_{}")
_TERM_METRICS = ("weight_{}", "ess_{}", "active_{}", "low_weight_{}")


def list_metric_names(config: TrainingConfig) -> list[str]:
    """List the metrics that the epochs of a run may have.

    Args:
        config: Config of the run.

    Returns:
        The names. An epoch has some of them, depending on `validation` and the size of the data.
    """
    return [
        *_COMMON_METRICS,
        *config.validation.attacks,
        *(
            f"train/{form.format(name)}"
            for name in config.method.attacks
            for form in _ATTACK_METRICS
        ),
        *(f"train/{form.format(name)}" for name in config.method.terms for form in _TERM_METRICS),
    ]
