"""Warnings about a search space: what cannot act in its trials, by the ends of its ranges."""

from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from raysweep.formatting import format_count
from raysweep.schedules import PiecewiseSchedule
from raysweep.spec import SpecError
from raysweep.sweep.search_space import Params, Scheduler, SearchSpace
from raysweep.training.config import TrainingConfig
from raysweep.training.config_warnings import ConfigWarning

# (method, data set, epochs, epoch in which the learning rate first drops) -> first epoch in which
# trials have nearly their final order although that is before the drop. It was measured on recorded
# curves of just these trainings (benchmarks/search_quality.md).
_FIRST_ORDERED_EPOCHS = {("fat", "digits", 8, 6): 4}


def list_space_warnings(space: SearchSpace) -> list[str]:
    """List what trials of a space do other than users may expect.

    A searched setting is judged by the ends of its range or by its choices, not by the value that
    it would have if it were not searched.

    Args:
        space: A search space without problems.

    Returns:
        One line for each warning; empty if there are none.
    """
    config = space.trial_config({})
    base_warnings = config.find_warnings()
    # Searched path -> warnings at each of its values.
    warnings_by_path = {path: list(_iter_value_warnings(space, path)) for path in space.space}
    lines = []
    for warning in base_warnings:
        if not any(_depends_on(path, warning, values) for path, values in warnings_by_path.items()):
            lines.append(warning.line)
    for path, values in warnings_by_path.items():
        lines += _describe_range(space, path, values, base_warnings)
    if cut_grid := space.describe_cut_grid():
        lines.append(cut_grid)
    if space.scheduler.kind == "asha":
        lines += _describe_rungs(space.scheduler, config)
    return list(dict.fromkeys(lines))


def _describe_rungs(scheduler: Scheduler, config: TrainingConfig) -> Iterator[str]:
    """Yield a line if ASHA compares no trials, or trials before their learning rate drops.

    Before the first drop the order of trials of most methods says little about their order at the
    end.
    """
    rungs = scheduler.rungs(config.epochs)
    if not rungs:
        yield (
            f"scheduler.grace_period = {scheduler.grace_period}: trials of "
            f"{format_count(config.epochs, 'epoch')} are never compared, so none is stopped early"
        )
    elif isinstance(config.optim.lr, PiecewiseSchedule):
        drop = _find_first_drop(config.optim.lr)
        if drop is not None and rungs[0] < _find_first_ordered_epoch(config, drop):
            possible_epochs = (
                epoch
                for epoch in range(drop, config.epochs)
                if _can_begin(scheduler, epoch, config)
            )
            grace_period = next(possible_epochs, None)
            remedy = "" if grace_period is None else f"it to {grace_period}, or "
            yield (
                f"scheduler.grace_period = {rungs[0]}: trials are compared before the learning "
                f"rate drops in epoch {drop}, when their order says little about the end; set "
                f"{remedy}scheduler.kind to none"
            )


def _find_first_ordered_epoch(config: TrainingConfig, drop: int) -> int:
    """Return the first epoch in which the order of trials says something about their order at the
    end: where the learning rate drops, unless an earlier one was measured; 0 if it never drops.
    """
    if drop > config.epochs:
        return 0
    training = (config.method.name, config.data.name, config.epochs, drop)
    return _FIRST_ORDERED_EPOCHS.get(training, drop)


def _can_begin(scheduler: Scheduler, grace_period: int, config: TrainingConfig) -> bool:
    """Return whether all rungs after a grace period are epochs that are validated."""
    rungs = scheduler.replace(grace_period=grace_period).rungs(config.epochs)
    return all(config.is_validated(rung - 1) for rung in rungs)


def _find_first_drop(schedule: PiecewiseSchedule) -> int | None:
    """Return the first epoch, from 1, with a lower value than the one before; None without one."""
    changes = zip(schedule.boundaries, pairwise(schedule.values), strict=True)
    return next((boundary + 1 for boundary, (before, after) in changes if after < before), None)


def _iter_value_warnings(
    space: SearchSpace, path: str
) -> Iterator[tuple[Any, list[ConfigWarning]]]:
    """Yield each end or choice of a searched setting with the warnings of its config."""
    condition = _meet_condition(space, path)
    for value in space.space[path].bounds_or_choices():
        with suppress(SpecError):
            yield value, space.trial_config({**condition, path: value}).find_warnings()


def _meet_condition(space: SearchSpace, path: str) -> Params:
    """Return values of other settings with which a setting is searched."""
    return {
        other: values[0] if isinstance(values, list) else values
        for other, values in space.space[path].when.items()
    }


def _depends_on(
    path: str, warning: ConfigWarning, values: list[tuple[Any, list[ConfigWarning]]]
) -> bool:
    """Return whether a warning of the base config comes and goes with a searched setting."""
    if fnmatchcase(warning.setting, path):
        return True
    return any(warning not in warnings for _, warnings in values)


def _describe_range(
    space: SearchSpace,
    path: str,
    values: list[tuple[Any, list[ConfigWarning]]],
    base_warnings: list[ConfigWarning],
) -> Iterator[str]:
    """Yield a line for each kind of warning that values of a searched setting cause."""
    distribution = space.space[path]
    shown = str(distribution.bounds_or_choices())
    settings = dict.fromkeys(
        warning.setting
        for _, warnings in values
        for warning in warnings
        if warning not in base_warnings or _depends_on(path, warning, values)
    )
    for setting in settings:
        causes = [
            (value, warning)
            for value, warnings in values
            for warning in warnings
            if warning.setting == setting
        ]
        effect = causes[0][1].effect
        if setting != path and not fnmatchcase(setting, path):
            effect = causes[0][1].line
        if len(causes) == len(values):
            yield f"{path} in {shown}: {effect}"
        else:
            at = ", ".join(str(value) for value, _ in causes)
            if distribution.int and causes[0][0] == distribution.int[1]:
                first = _find_first_warned(space, path, setting, *distribution.int)
                at = f"{first} to {at}" if first < distribution.int[1] else at
            yield f"{path} in {shown}: at {at}: {effect}"


def _find_first_warned(space: SearchSpace, path: str, setting: str, low: int, high: int) -> int:
    """Return the smallest whole number with a warning; `low` has none, `high` has one."""
    while high - low > 1:
        middle = (low + high) // 2
        warnings = space.trial_config(
            {**_meet_condition(space, path), path: middle}
        ).find_warnings()
        if any(warning.setting == setting for warning in warnings):
            high = middle
        else:
            low = middle
    return high
