"""Check the arguments of raysweep's Python functions, whose callers have no parser before them."""

from collections.abc import Mapping
from typing import Any

from raysweep.formatting import shorten_value
from raysweep.spec import SpecError

_MAX_DEPTH = 100


def check_argument_type(name: str, value: object, types: tuple[type, ...], expected: str) -> None:
    """Raise SpecError if an argument has another type than those allowed.

    Args:
        name: Name of the argument.
        value: What the caller gave.
        types: The allowed classes; True and False do not count as numbers.
        expected: What messages call these, such as `a text`.

    Raises:
        SpecError: It has none of these types. One line.
    """
    is_bool_as_number = isinstance(value, bool) and bool not in types
    if not isinstance(value, types) or is_bool_as_number:
        raise SpecError(f"{name} = {shorten_value(value)}: is not {expected}")


def to_plain_value(name: str, value: Any, depth: int = 0) -> Any:
    """Return the value of a setting as YAML would give it.

    Args:
        name: Name of the setting, for messages.
        value: What the caller gave: a plain value, a path, a number or array of NumPy or PyTorch;
            also within lists and mappings.
        depth: Number of lists and mappings around it.

    Raises:
        SpecError: It is none of them, or lies in more than 100 lists and mappings. One line.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise SpecError(f"{name} = {shorten_value(value)}: is not UTF-8")
        return value
    if isinstance(value, Mapping | list | tuple) and depth == _MAX_DEPTH:
        raise SpecError(f"{name}: has more than {_MAX_DEPTH} lists and mappings in each other")
    if isinstance(value, Mapping):
        return {key: to_plain_value(name, item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain_value(name, item, depth + 1) for item in value]
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return to_plain_value(name, value.tolist(), depth + 1)
    if hasattr(value, "__fspath__"):
        return to_plain_value(name, value.__fspath__())
    raise SpecError(
        f"{name} = {shorten_value(value)}: expected a number, a text, a path, a list or a mapping, "
        f"got {type(value).__name__}"
    )
