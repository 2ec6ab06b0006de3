"""Numbers that may change with the epoch: lr, eps, lambda, tau, beta, ..."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from raysweep.spec import EpochSchedule


def _parse_number(value: Any) -> Any:
    """'8/255' is a number in this field; 'inf' is one in YAML's spelling ('.inf') and in ours."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction("/".join(part.strip() for part in value.split("/"))))
        except (ValueError, ZeroDivisionError):
            return value
    return value


Number = Annotated[float, BeforeValidator(_parse_number)]
Epoch = Annotated[int, Field(ge=0)]


class PiecewiseSchedule(EpochSchedule):
    """`values[i]` from epoch `boundaries[i-1]` on (0-based): one value more than boundaries."""

    kind: Literal["piecewise"] = "piecewise"
    boundaries: tuple[Epoch, ...]
    values: tuple[Number, ...]

    @model_validator(mode="after")
    def _check_boundaries(self) -> Self:
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                f"{len(self.boundaries)} boundaries need {len(self.boundaries) + 1} values"
            )
        if list(self.boundaries) != sorted(set(self.boundaries)):
            raise ValueError("boundaries must increase")
        return self

    def value_at(self, epoch: int) -> float:
        return self.values[sum(epoch >= b for b in self.boundaries)]


class _RampSchedule(EpochSchedule):
    first: Number
    last: Number
    start: Epoch = 0
    end: Epoch

    @model_validator(mode="after")
    def _check_epoch_order(self) -> Self:
        if self.end <= self.start:
            raise ValueError(f"end must come after start, got start {self.start}, end {self.end}")
        return self

    def _elapsed_fraction_at(self, epoch: int) -> float:
        return _elapsed_fraction(epoch, self.start, self.end)


class LinearSchedule(_RampSchedule):
    """Straight line from `first` at epoch `start` to `last` at epoch `end`, constant outside."""

    kind: Literal["linear"] = "linear"

    def value_at(self, epoch: int) -> float:
        return self.first + (self.last - self.first) * self._elapsed_fraction_at(epoch)


class CosineSchedule(_RampSchedule):
    """Half a cosine from `first` at epoch `start` to `last` at epoch `end`, constant outside."""

    kind: Literal["cosine"] = "cosine"
    last: Number = 0.0

    def value_at(self, epoch: int) -> float:
        return (
            self.last
            + (self.first - self.last)
            * (1 + math.cos(math.pi * self._elapsed_fraction_at(epoch)))
            / 2
        )


class InterpolatedSchedule(EpochSchedule):
    """Straight lines through (`epochs[i]`, `values[i]`), constant outside: the cyclic schedules of
    G fig. 11.
    """

    kind: Literal["interpolated"] = "interpolated"
    epochs: Annotated[tuple[Epoch, ...], Field(min_length=2)]
    values: tuple[Number, ...]

    @model_validator(mode="after")
    def _check_points(self) -> Self:
        if len(self.values) != len(self.epochs) or list(self.epochs) != sorted(set(self.epochs)):
            raise ValueError("epochs must increase, with one value each")
        return self

    def value_at(self, epoch: int) -> float:
        return _interpolate_values(epoch, self.epochs, self.values)


def _schedule_kind(value: Any) -> str:
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


def schedule_value_at(schedule: float | EpochSchedule, epoch: int) -> float:
    """The schedule's value at `epoch`; a number is its own schedule."""
    return schedule.value_at(epoch) if isinstance(schedule, EpochSchedule) else schedule


def resolved_value(value: float | EpochSchedule) -> float:
    """The number of a setting whose spec has been resolved with `.at(epoch)`."""
    if isinstance(value, EpochSchedule):
        raise TypeError(
            f"{value!r} changes with the epoch: resolve the spec with .at(epoch) before it is called"
        )
    return value


def bounded(low: float = -math.inf, high: float = math.inf) -> AfterValidator:
    """A bound on every value that a schedule takes."""

    def check(schedule: float | EpochSchedule) -> float | EpochSchedule:
        for value in bounds(schedule):
            if not low <= value <= high:
                allowed = (
                    f"between {low:g} and {high:g}" if high < math.inf else f"at least {low:g}"
                )
                raise ValueError(f"must be {allowed}")
        return schedule

    return AfterValidator(check)


def bounds(schedule: float | EpochSchedule) -> tuple[float, ...]:
    """Values that bound everything the schedule says."""
    if isinstance(schedule, PiecewiseSchedule | InterpolatedSchedule):
        return schedule.values
    if isinstance(schedule, _RampSchedule):
        return (schedule.first, schedule.last)
    return (schedule_value_at(schedule, 0),)


def _elapsed_fraction(epoch: int, start: int, end: int) -> float:
    return min(max((epoch - start) / (end - start), 0.0), 1.0)


def _interpolate_values(epoch: int, epochs: Sequence[int], values: Sequence[float]) -> float:
    for (e0, v0), (e1, v1) in zip(
        zip(epochs, values, strict=True), zip(epochs[1:], values[1:], strict=True), strict=False
    ):
        if epoch <= e1:
            return v0 + (v1 - v0) * _elapsed_fraction(epoch, e0, e1)
    return values[-1]
