"""Schedules: settings such as lr, eps, lambda or beta that may change with the epoch."""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from raysweep.spec import EpochSchedule


def _parse_number(value: Any) -> Any:
    """Convert a fraction such as '8/255' to a float; leave all else to pydantic."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction("/".join(part.strip() for part in value.split("/"))))
        except (ValueError, ZeroDivisionError):
            return value
    return value


Number = Annotated[float, BeforeValidator(_parse_number)]
Epoch = Annotated[int, Field(ge=0)]


class PiecewiseSchedule(EpochSchedule):
    """A constant value in each interval between boundaries."""

    kind: Literal["piecewise"] = "piecewise"
    """Selects this schedule; may be left out."""
    boundaries: tuple[Epoch, ...]
    """Epochs (0-based, increasing) at which the next value begins."""
    values: tuple[Number, ...]
    """One value more than boundaries: `values[i]` holds from epoch `boundaries[i - 1]`."""

    @model_validator(mode="after")
    def _check_boundaries(self) -> Self:
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                f"{len(self.boundaries)} boundaries need {len(self.boundaries) + 1} values"
            )
        if list(self.boundaries) != sorted(set(self.boundaries)):
            raise ValueError("boundaries must increase")
        return self

    def value_at(self, epoch: float) -> float:
        return self.values[sum(epoch >= boundary for boundary in self.boundaries)]


class _RampSchedule(EpochSchedule):
    """A change from `first` at epoch `start` to `last` at epoch `end`, constant outside."""

    first: Number
    """Value up to epoch `start`."""
    last: Number
    """Value from epoch `end`."""
    start: Epoch = 0
    """Epoch (0-based) at which the change begins."""
    end: Epoch
    """Epoch (0-based) at which the change ends; must come after `start`."""

    @model_validator(mode="after")
    def _check_epoch_order(self) -> Self:
        if self.end <= self.start:
            raise ValueError(f"end must come after start, got start {self.start}, end {self.end}")
        return self

    def _elapsed_fraction_at(self, epoch: float) -> float:
        """Return the fraction of the change that lies before `epoch`, in [0, 1]."""
        return _elapsed_fraction(epoch, self.start, self.end)


class LinearSchedule(_RampSchedule):
    """A straight line from `first` at epoch `start` to `last` at epoch `end`, constant outside."""

    kind: Literal["linear"] = "linear"
    """Selects this schedule."""

    def value_at(self, epoch: float) -> float:
        return self.first + (self.last - self.first) * self._elapsed_fraction_at(epoch)


class CosineSchedule(_RampSchedule):
    """Half a cosine from `first` at epoch `start` to `last` at epoch `end`, constant outside."""

    kind: Literal["cosine"] = "cosine"
    """Selects this schedule."""
    last: Number = 0.0
    """Value from epoch `end`."""

    def value_at(self, epoch: float) -> float:
        cosine = math.cos(math.pi * self._elapsed_fraction_at(epoch))
        return self.last + (self.first - self.last) * (1 + cosine) / 2


class InterpolatedSchedule(EpochSchedule):
    """Straight lines through the points (`epochs[i]`, `values[i]`), constant outside.

    The cyclic schedules of GAIRAT, figure 11, have this form.
    """

    kind: Literal["interpolated"] = "interpolated"
    """Selects this schedule."""
    epochs: Annotated[tuple[Epoch, ...], Field(min_length=2)]
    """Epochs of the points (0-based, increasing), at least two."""
    values: tuple[Number, ...]
    """Values at the points, one for each epoch."""

    @model_validator(mode="after")
    def _check_points(self) -> Self:
        if len(self.values) != len(self.epochs) or list(self.epochs) != sorted(set(self.epochs)):
            raise ValueError("epochs must increase, with one value each")
        return self

    def value_at(self, epoch: float) -> float:
        return _interpolate_values(epoch, self.epochs, self.values)


def _schedule_kind(value: Any) -> str:
    """Return the tag of the class with which pydantic validates `value`."""
    if isinstance(value, dict):
        return str(value.get("kind", "piecewise"))
    return getattr(value, "kind", "number")


Schedule = Annotated[
    Annotated[Number, Tag("number")]
    | Annotated[PiecewiseSchedule, Tag("piecewise")]
    | Annotated[LinearSchedule, Tag("linear")]
    | Annotated[CosineSchedule, Tag("cosine")]
    | Annotated[InterpolatedSchedule, Tag("interpolated")],
    Discriminator(_schedule_kind),
]


def schedule_value_at(schedule: float | EpochSchedule, epoch: float) -> float:
    """Return the value of a schedule or constant at an epoch.

    Args:
        schedule: A schedule, or a number that is the same at every epoch.
        epoch: Epoch, 0-based; a fraction for a moment within an epoch.

    Returns:
        The value.
    """
    return schedule.value_at(epoch) if isinstance(schedule, EpochSchedule) else schedule


def resolved_value(value: float | EpochSchedule) -> float:
    """Return a setting as a float; TypeError if it is still a schedule.

    Args:
        value: A setting of a spec that `Spec.resolve_at` returned.

    Returns:
        `value` itself.

    Raises:
        TypeError: The setting is still a schedule.
    """
    if isinstance(value, EpochSchedule):
        raise TypeError(
            f"{value!r} changes with the epoch: call .resolve_at(epoch) before you call the spec"
        )
    return value


def bounded(low: float = -math.inf, high: float = math.inf) -> AfterValidator:
    """Create a pydantic validator for the range of a number, or of all values of a schedule.

    Args:
        low: Smallest value allowed.
        high: Largest value allowed.

    Returns:
        The validator, for `Annotated[Schedule, bounded(0, 1)]`. It raises ValueError.
    """

    def check_bounds(schedule: float | EpochSchedule) -> float | EpochSchedule:
        for value in bounding_values(schedule):
            if low <= value <= high:
                continue
            if high < math.inf:
                raise ValueError(f"must be between {low:g} and {high:g}")
            raise ValueError(f"must be at least {low:g}")
        return schedule

    return AfterValidator(check_bounds)


def bounding_values(schedule: float | EpochSchedule) -> tuple[float, ...]:
    """Return values whose minimum and maximum are bounds of the schedule at every epoch.

    Args:
        schedule: A number or schedule.

    Returns:
        One or more values.
    """
    if isinstance(schedule, PiecewiseSchedule | InterpolatedSchedule):
        return schedule.values
    if isinstance(schedule, _RampSchedule):
        return (schedule.first, schedule.last)
    return (schedule_value_at(schedule, 0),)


def _elapsed_fraction(epoch: float, start: int, end: int) -> float:
    """Return the position of `epoch` between `start` and `end`, clipped to [0, 1]."""
    return min(max((epoch - start) / (end - start), 0.0), 1.0)


def _interpolate_values(epoch: float, epochs: Sequence[int], values: Sequence[float]) -> float:
    """Return the value at `epoch` of the line through the points, constant outside."""
    points = list(zip(epochs, values, strict=True))
    for (e0, v0), (e1, v1) in pairwise(points):
        if epoch <= e1:
            return v0 + (v1 - v0) * _elapsed_fraction(epoch, e0, e1)
    return values[-1]
