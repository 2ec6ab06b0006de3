"""Summary of a training run for `--plan`: its images, attacks, learning rate and weights."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from raysweep.attacks.step_size import EpsMultiple
from raysweep.formatting import format_count
from raysweep.schedules import (
    CosineSchedule,
    InterpolatedSchedule,
    LinearSchedule,
    PiecewiseSchedule,
)
from raysweep.spec import EpochSchedule
from raysweep.training.selection import can_guess_all_labels

if TYPE_CHECKING:
    from raysweep.data import DatasetSplits, Split
    from raysweep.training.config import TrainingConfig

PLAN_WIDTH = 80
"""Columns of a plan."""
UNKNOWN_TIME = "the time cannot be estimated on this machine in a few seconds"
"""What a plan says where training steps take too long to time them."""
_LABEL_WIDTH = 12
# Word for a setting whose value a sweep chooses.
_SEARCHED = "(searched)"
_MAX_DENOMINATOR = 255


def summarize_training(
    config: TrainingConfig, data: DatasetSplits, searched_paths: Collection[str] = ()
) -> list[str]:
    """Summarize what a training run will do, in lines of at most 80 columns.

    Args:
        config: Config of the run.
        data: Its data.
        searched_paths: Settings that a sweep searches, by dotted path with or without `*`; they are
            called searched, because the config has other values.

    Returns:
        The lines, each row with a label.
    """
    return wrap_summary_rows(list_summary_rows(config, data, searched_paths))


def list_data_warnings(config: TrainingConfig, data: DatasetSplits) -> list[str]:
    """Warn if there are too few validation images to distinguish a network from a guess.

    Args:
        config: Config of the run.
        data: Its data.

    Returns:
        One line, or none.
    """
    labels = config.validation.select_split(data).y[: config.validation.size]
    if not can_guess_all_labels(data.classes, len(labels), int(labels.bincount().max())):
        return []
    images = format_count(len(labels), "validation image")
    return [
        f"{images}: guessing may get all of them right, so the choice of the best epoch means "
        "nothing; give more images, or set data.val_size"
    ]


def list_summary_rows(
    config: TrainingConfig, data: DatasetSplits, searched_paths: Collection[str] = ()
) -> list[tuple[str, str]]:
    """Return the rows of `summarize_training`, which has the same arguments, as (label, text)."""
    return list(_TrainingSummary(config, data, searched_paths).iter_rows())


def wrap_summary_rows(rows: Iterable[tuple[str, str]], width: int = PLAN_WIDTH) -> list[str]:
    """Break the rows of a summary into lines.

    Args:
        rows: Pairs (label, text).
        width: Columns of a line.
    """
    lines: list[str] = []
    for label, text in rows:
        lines += wrap_plan_line(f"{label:<{_LABEL_WIDTH}}{text}", _LABEL_WIDTH, width)
    return lines


def wrap_plan_line(line: str, indent: int = 4, width: int = PLAN_WIDTH) -> list[str]:
    """Break a line of a plan into lines of at most `width` columns.

    Args:
        line: The line; long words, such as paths of files, are not broken.
        indent: Columns by which the lines after the first are indented.
        width: Columns of a line.
    """
    return textwrap.wrap(
        line,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def count_per_class(split: Split, n_classes: int) -> list[int]:
    """Count the examples of each class of a split.

    Args:
        split: The split.
        n_classes: Number of classes.
    """
    counts: list[int] = split.y.bincount(minlength=n_classes).tolist()
    return counts


class _TrainingSummary:
    """The rows of a summary. A setting that a sweep searches is called searched."""

    def __init__(
        self, config: TrainingConfig, data: DatasetSplits, searched_paths: Collection[str]
    ) -> None:
        self.config = config
        self.data = data
        self.searched_paths = searched_paths

    def iter_rows(self) -> Iterator[tuple[str, str]]:
        """Yield pairs (label, text)."""
        yield from self._iter_data_rows()
        config = self.config
        size = self._show("batch_size", config.batch_size)
        yield "model", f"{self._show('model.name', config.model.name)}, batches of {size}"
        for name, attack in config.method.attacks.items():
            yield "attack", f"{name}: {self._describe_attack(f'method.attacks.{name}', attack)}"
        yield from self._iter_validation_rows()
        if config.compute.compile:
            yield "compute", "torch.compile takes minutes at the start; no estimate includes it"
        yield "rate", self._show_schedule("optim.lr", config.optim.lr)
        for name, term in config.method.terms.items():
            if hasattr(term.weight, "burn_in"):
                path = f"method.terms.{name}.weight.burn_in"
                burn_in = self._show(path, f"after {format_count(term.weight.burn_in, 'epoch')}")
                yield "weights", f"of {name} act: {burn_in}"

    def _iter_data_rows(self) -> Iterator[tuple[str, str]]:
        """Yield what the images are, and how many of each class."""
        data, validation = self.data, self.config.validation
        channels, height, width = data.train.x.shape[1:]
        used = validation.select_split(data)
        is_test = validation.split == "test"
        split = "test" if is_test else "validation"
        n_test = len(data.test) or "none"
        others = "" if is_test else f", {n_test} for test"
        yield (
            "images",
            f"{self.config.data.name}, {height} x {width} pixels, "
            f"{format_count(channels, 'channel')}: {len(data.train)} for training, "
            f"{len(used)} for {split}{others}",
        )
        train, val = (count_per_class(part, data.classes) for part in (data.train, used))
        yield (
            "classes",
            f"{data.classes}; of each {_format_counts(train)} for training, "
            f"{_format_counts(val)} for {split}",
        )

    def _iter_validation_rows(self) -> Iterator[tuple[str, str]]:
        """Yield what validation attacks and how often."""
        validation, epochs = self.config.validation, self.config.epochs
        n_validated = sum(self.config.is_validated(epoch) for epoch in range(epochs))
        often = "each epoch" if n_validated == epochs else f"{n_validated} of {epochs} epochs"
        size = f", {validation.size} images" if validation.size else ""
        yield "validation", f"{often}{size}; the best epoch is chosen by {validation.objective}"
        for group, attacks in (("attacks", validation.attacks), ("finish", validation.finish)):
            for name, attack in attacks.items():
                path = f"validation.{group}.{name}"
                yield "", f"{name}: {self._describe_attack(path, attack)}"

    def _describe_attack(self, path: str, attack: Any) -> str:
        """Describe norm, radius, steps and step size of an attack."""
        parts = []
        if hasattr(attack, "norm"):
            parts.append(self._show(f"{path}.norm", attack.norm))
        for key, name in (("eps", "eps"), ("d_max", "up to")):
            if hasattr(attack, key):
                value = self._show_schedule(f"{path}.{key}", getattr(attack, key))
                parts.append(f"{name} {value}")
        if attack.kind == "square":
            parts.append(f"{attack.queries} queries")
        else:
            runs = f"up to {attack.runs} runs of " if attack.kind == "multi-targeted" else ""
            parts.append(f"{runs}{self._show(f'{path}.steps', attack.steps)} steps")
        if hasattr(attack, "step_size"):
            parts[-1] += f" of {self._show_step_size(path, attack)}"
        return ", ".join(parts)

    def _show_step_size(self, path: str, attack: Any) -> str:
        """Show the step size of an attack."""
        if isinstance(attack.step_size, EpsMultiple):
            return self._show(f"{path}.step_size", f"{attack.step_size.factor:g} eps")
        return self._show_schedule(f"{path}.step_size", attack.step_size)

    def _show(self, path: str, value: Any) -> str:
        """Show a setting, or that it is searched."""
        is_searched = any(
            path == searched or path.startswith(f"{searched}.") or fnmatchcase(path, searched)
            for searched in self.searched_paths
        )
        return _SEARCHED if is_searched else str(value)

    def _show_schedule(self, path: str, value: float | EpochSchedule) -> str:
        """Show a number or schedule, also where only a part of the schedule is searched."""
        if any(searched.startswith(f"{path}.") for searched in self.searched_paths):
            return "a schedule, of which a part is searched"
        return self._show(path, describe_schedule(value, self.config.epochs))


def describe_schedule(value: float | EpochSchedule, epochs: int) -> str:
    """Describe how a setting changes during a run.

    Args:
        value: A number or schedule.
        epochs: Number of epochs of the run; what comes later is left out.

    Returns:
        Such as "0.05, 0.01 after 5 epochs, 0.002 after 7".
    """
    if isinstance(value, PiecewiseSchedule):
        drops = [
            f"{_format_number(number)} after {boundary}"
            for boundary, number in zip(value.boundaries, value.values[1:], strict=True)
            if boundary < epochs
        ]
        if drops:
            drops[0] += " epochs" if value.boundaries[0] != 1 else " epoch"
        return ", ".join([_format_number(value.values[0]), *drops])
    if isinstance(value, LinearSchedule | CosineSchedule):
        way = "" if isinstance(value, LinearSchedule) else " along half a cosine"
        return (
            f"from {_format_number(value.first)} to {_format_number(value.last)}{way} in epochs "
            f"{value.start} to {value.end}"
        )
    if isinstance(value, InterpolatedSchedule):
        points = ", ".join(
            f"{_format_number(number)} at {epoch}"
            for epoch, number in zip(value.epochs, value.values, strict=True)
        )
        return f"on lines through {points} epochs"
    if isinstance(value, EpochSchedule):
        return f"a {type(value).__name__}"
    return _format_number(value)


def _format_number(value: float) -> str:
    """Format a number; multiples of 1/255 also as a fraction."""
    text = f"{value:.4g}"
    numerator = value * _MAX_DENOMINATOR
    if 0 < value < 1 and len(repr(value)) > 8 and abs(numerator - round(numerator)) < 1e-9:
        return f"{text} ({round(numerator)}/{_MAX_DENOMINATOR})"
    return text


def _format_counts(counts: list[int]) -> str:
    """Format numbers of examples of the classes: one number, or the smallest and largest."""
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
