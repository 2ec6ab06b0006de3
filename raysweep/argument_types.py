"""Check the arguments of raysweep's Python functions, whose callers have no parser before them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from raysweep.formatting import shorten_value
from raysweep.spec import SpecError

_MAX_DEPTH = 100

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def accept_scalars(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator: the function also accepts scalars of NumPy and PyTorch as arguments.

    Args:
        function: Any function.

    Returns:
        The function, to which an argument such as `numpy.int64(3)` or `torch.tensor(0.1)` is passed
        as a plain int, float, str or bool.
    """

    @functools.wraps(function)
    def call_with_plain_values(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Call the function with plain arguments."""
        plain_args: Any = map(to_plain_scalar, args)
        plain_kwargs: Any = {name: to_plain_scalar(value) for name, value in kwargs.items()}
        return function(*plain_args, **plain_kwargs)

    return call_with_plain_values


def to_plain_scalar(value: Any) -> Any:
    """Convert a scalar of NumPy or PyTorch to a plain value.

    Args:
        value: Any value.

    Returns:
        An int, float, str or bool for such a scalar; any other value unchanged.
    """
    return _unpack_array(value) if _is_array(value) and value.shape == () else value


def _unpack_array(value: Any) -> Any:
    """Return the number or the lists of an array of NumPy or a tensor of PyTorch."""
    plain = value.tolist()
    # NumPy leaves a number with more digits than Python's as it is.
    is_long = _is_array(plain) and getattr(plain.dtype, "kind", None) == "f"
    return float(plain) if is_long else plain


def _is_array(value: Any) -> bool:
    """Return whether a value is an array or scalar of NumPy or a tensor of PyTorch."""
    return hasattr(value, "tolist") and hasattr(value, "dtype") and hasattr(value, "shape")


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
    # Checked first, because `numpy.float64` is a float and `numpy.str_` is a str.
    if _is_array(value) and not isinstance(plain := _unpack_array(value), type(value)):
        return to_plain_value(name, plain, depth + 1)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise SpecError(f"{name} = {shorten_value(value)}: is not UTF-8")
        return value
    if isinstance(value, Mapping | list | tuple) and depth == _MAX_DEPTH:
        raise SpecError(f"{name}: has more than {_MAX_DEPTH} lists and mappings in each other")
    if isinstance(value, Mapping):
        return {
            to_plain_scalar(key): to_plain_value(name, item, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [to_plain_value(name, item, depth + 1) for item in value]
    if hasattr(value, "__fspath__"):
        return to_plain_value(name, value.__fspath__())
    raise SpecError(
        f"{name} = {shorten_value(value)}: expected a number, a text, a path, a list or a mapping, "
        f"got {type(value).__name__}"
    )
