"""Warnings about settings that are valid, but do nothing or other things than users may expect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from raysweep.attacks.step_size import resolve_step_size
from raysweep.data import DataSpec
from raysweep.formatting import format_count
from raysweep.schedules import (
    CosineSchedule,
    InterpolatedSchedule,
    LinearSchedule,
    PiecewiseSchedule,
    resolved_value,
)
from raysweep.spec import EpochSchedule, Spec

if TYPE_CHECKING:
    from raysweep.training.config import TrainingConfig

# An attack that reaches this share of its radius is taken to reach it.
_SAME_LENGTH = 1 - 1e-6
# Steps that together are this often as long as epsilon cross the ball from any start.
_AMPLE_LENGTH = 2.5


class ConfigWarning(NamedTuple):
    """A warning about one setting.

    Attributes:
        setting: Dotted path, or a few words about it.
        value: Its value as text; "" if the words name it.
        effect: What it does, or does not do.
    """

    setting: str
    value: str
    effect: str

    @property
    def line(self) -> str:
        """The warning as one line."""
        return f"{self.setting}{f' = {self.value}' if self.value else ''}: {self.effect}"


def find_config_warnings(config: TrainingConfig) -> list[ConfigWarning]:
    """Find settings that have no effect, or another effect than users may expect.

    Args:
        config: A config that passes all checks.

    Returns:
        The warnings; empty if there are none.
    """
    return [
        *_warn_about_long_burn_ins(config),
        *_warn_about_late_changes(config),
        *_warn_about_short_attacks(config),
        *_warn_about_compute(config),
        *_warn_about_data(config),
        *_warn_about_selection(config),
    ]


def _warn_about_long_burn_ins(config: TrainingConfig) -> Iterator[ConfigWarning]:
    """Warn about instance weights whose burn-in is as long as the run."""
    epochs = format_count(config.epochs, "epoch")
    for name, term in config.method.terms.items():
        burn_in = getattr(term.weight, "burn_in", 0)
        if burn_in >= config.epochs:
            path = f"method.terms.{name}.weight.burn_in"
            yield ConfigWarning(path, str(burn_in), f"the weights never act in {epochs}")


def _warn_about_late_changes(config: TrainingConfig) -> Iterator[ConfigWarning]:
    """Warn about schedules that change, or end their change, after the last epoch."""
    epochs = format_count(config.epochs, "epoch")
    for path, schedule in _iter_schedules(config, ""):
        last = schedule.value_at(config.epochs - 1)
        if isinstance(schedule, PiecewiseSchedule):
            n_reached = sum(boundary < config.epochs for boundary in schedule.boundaries)
            unused = ", ".join(f"{value:g}" for value in schedule.values[n_reached + 1 :])
            if unused:
                boundaries = str(list(schedule.boundaries))
                effect = f"in {epochs} (0 to {config.epochs - 1}) it never becomes {unused}"
                yield ConfigWarning(f"{path}.boundaries", boundaries, effect)
        elif isinstance(schedule, LinearSchedule | CosineSchedule):
            if schedule.end > config.epochs:
                effect = f"in {epochs} it gets to {last:.3g}, not to {schedule.last:g}"
                yield ConfigWarning(f"{path}.end", str(schedule.end), effect)
        elif isinstance(schedule, InterpolatedSchedule) and schedule.epochs[-1] > config.epochs:
            effect = f"in {epochs} it gets to {last:.3g}, not to {schedule.values[-1]:g}"
            yield ConfigWarning(f"{path}.epochs", str(list(schedule.epochs)), effect)


def _iter_schedules(value: Any, path: str) -> Iterator[tuple[str, EpochSchedule]]:
    """Yield each schedule of a nested spec with its dotted path."""
    if isinstance(value, EpochSchedule):
        yield path, value
        return
    parts: Mapping[str, Any] = {}
    if isinstance(value, Spec):
        parts = {name: getattr(value, name) for name in type(value).model_fields}
    elif isinstance(value, Mapping):
        parts = value
    for name, part in parts.items():
        yield from _iter_schedules(part, f"{path}.{name}" if path else name)


def _warn_about_short_attacks(config: TrainingConfig) -> Iterator[ConfigWarning]:
    """Warn about attacks whose steps together are shorter than their radius."""
    groups = {
        "method.attacks": config.method.attacks,
        "validation.attacks": config.validation.attacks,
        "validation.finish": config.validation.finish,
    }
    for group, attacks in groups.items():
        yield from find_short_attacks(attacks, config.epochs, f"{group}.")


def find_short_attacks(
    attacks: Mapping[str, Any], epochs: int = 1, prefix: str = ""
) -> Iterator[ConfigWarning]:
    """Find attacks whose steps together are shorter than their radius in some epoch.

    Args:
        attacks: Attacks by name.
        epochs: Number of epochs, for attacks whose settings change.
        prefix: Dotted path of the attacks, with a dot at the end.

    Yields:
        A warning for each of them, those in cascades too.
    """
    for name, attack in _iter_single_attacks(attacks):
        if warning := _find_short_attack(f"{prefix}{name}", attack, epochs):
            yield warning


def _iter_single_attacks(attacks: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield all attacks, those of cascades too, with their dotted paths."""
    for name, attack in attacks.items():
        yield name, attack
        for inner_name, inner in getattr(attack, "attacks", {}).items():
            yield f"{name}.attacks.{inner_name}", inner


def _find_short_attack(path: str, attack: Any, epochs: int) -> ConfigWarning | None:
    """Return a warning if an attack cannot cross its ball in some epoch."""
    if attack.kind == "minimal" and attack.step_scale < _SAME_LENGTH:
        effect = "its steps together are shorter than its radius; set it to 2.5"
        return ConfigWarning(f"{path}.step_scale", f"{attack.step_scale:g}", effect)
    if attack.kind != "pgd":
        return None
    has_schedule = any(isinstance(value, EpochSchedule) for value in (attack.eps, attack.step_size))
    for epoch in range(epochs if has_schedule else 1):
        now = attack.resolve_at(epoch)
        eps = resolved_value(now.eps)
        step_size = resolve_step_size(now.step_size, eps)
        if attack.steps * step_size < _SAME_LENGTH * eps:
            reached = f"{attack.steps * step_size:.4g}"
            when = f" in epoch {epoch}" if has_schedule else ""
            ample = max(int(attack.steps / _AMPLE_LENGTH), 1)
            effect = (
                f"{format_count(attack.steps, 'step')} reach {reached}{when}, not eps = {eps:.4g}; "
                f"set it to {'eps' if ample == 1 else f'eps/{ample}'}, or take more steps"
            )
            return ConfigWarning(f"{path}.step_size", f"{step_size:.4g}", effect)
    return None


def _warn_about_compute(config: TrainingConfig) -> Iterator[ConfigWarning]:
    """Warn about attacks that bf16 makes useless or torch.compile makes slow."""
    for name, attack in config.method.attacks.items():
        path = f"method.attacks.{name}"
        if config.compute.attack == "bf16" and getattr(attack, "start", None) == "gaussian":
            effect = f"{path} starts 0.001 from the image, which bf16 rounds away"
            yield ConfigWarning("compute.attack", "bf16", effect)
        if config.compute.compile and (attack.kind != "pgd" or attack.tau is not None):
            effect = (
                f"{path} shrinks its batch during the attack, and compiling each batch size takes "
                "minutes"
            )
            yield ConfigWarning("compute.compile", "true", effect)


def _warn_about_data(config: TrainingConfig) -> Iterator[ConfigWarning]:
    """Warn about a data folder that is not read, and about missing unlabeled data."""
    data = config.data
    if data.name == DataSpec().name and data.data_dir and not data.unlabeled:
        effect = f"not read: {data.name} come with scikit-learn"
        yield ConfigWarning("data.data_dir", str(data.data_dir), effect)
    if config.method.name.endswith("rst") and data.unlabeled is None:
        effect = f"{config.method.name} trains on labelled data alone"
        yield ConfigWarning("data.unlabeled is not set", "", effect)


def _warn_about_selection(config: TrainingConfig) -> Iterator[ConfigWarning]:
    """Warn about a best epoch that is chosen on test images, or a window without epochs."""
    if config.validation.split == "test":
        effect = "the best epoch is chosen on the test images, so its accuracies there are too high"
        yield ConfigWarning("validation.split", "test", effect)
    window = config.validation.window
    if window is not None and window[0] > config.epochs:
        effect = f"the run ends after epoch {config.epochs}"
        yield ConfigWarning("validation.window", str(list(window)), effect)
