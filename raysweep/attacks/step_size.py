"""Step sizes: numbers, schedules, or multiples of the attack's epsilon."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from raysweep.schedules import Number, Schedule, bounded, resolved_value
from raysweep.spec import EpochSchedule, Spec

# `eps`, `eps/4`, `0.25 eps`, `0.25*eps`, `2.5 eps/10`.
_EPS_MULTIPLE = re.compile(r"\s*(?:([\d.]+)\s*\*?\s*)?eps\s*(?:/\s*([\d.]+))?\s*")


class EpsMultiple(Spec):
    """A step size in units of the attack's epsilon, also where epsilon changes with the epoch.

    It may be written as text: `eps/4` or `0.25 eps`.
    """

    kind: Literal["eps"] = "eps"
    """Selects this form."""

    factor: Annotated[Number, Field(gt=0)]
    """Step size divided by epsilon."""


def _parse_eps_multiple(value: Any) -> Any:
    """Convert text such as `eps/4`; leave all else to pydantic."""
    match = _EPS_MULTIPLE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    factor, divisor = (float(number or 1) for number in match.groups())
    return {"kind": "eps", "factor": factor / divisor if divisor else 0.0}


def _step_size_form(value: Any) -> str:
    """Return the tag of the type with which pydantic validates `value`."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "eps" if kind == "eps" else "schedule"


StepSize = Annotated[
    Annotated[Annotated[Schedule, bounded(0)], Tag("schedule")]
    | Annotated[EpsMultiple, Tag("eps")],
    Discriminator(_step_size_form),
    BeforeValidator(_parse_eps_multiple),
]


def resolve_step_size(step_size: float | EpochSchedule | EpsMultiple, eps: float) -> float:
    """Return a step size in pixel values.

    Args:
        step_size: A step size without schedule.
        eps: Epsilon of the attack, in pixel values.

    Returns:
        The length of a step.

    Raises:
        TypeError: The step size is still a schedule.
    """
    if isinstance(step_size, EpsMultiple):
        return step_size.factor * eps
    return resolved_value(step_size)
