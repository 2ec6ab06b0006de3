"""Text for people: durations, counts and values."""

import time
from typing import Any

_MAX_VALUE_LENGTH = 200


def format_clock(seconds: float) -> str:
    """Format a duration in seconds as a clock for progress lines, such as `2:05` or `1:02:05`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_duration(seconds: float) -> str:
    """Format a duration in seconds for sentences and tables: `4.2 s`, `12.5 min` or `1.7 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_local_time(seconds: float) -> str:
    """Format seconds since 1970 as local date and time: `2026-01-31 02:00`."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def format_count(count: int, noun: str) -> str:
    """Format a count and a singular noun, with an `s` if necessary: `1 trial`, `2 trials`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def shorten_value(value: Any, max_length: int = _MAX_VALUE_LENGTH) -> str:
    """Format a value of a user for an error message, in one line.

    Args:
        value: Any value.
        max_length: Characters of the longest text that stays whole.

    Returns:
        Its `repr`; of a longer one the start, and how many characters it has.
    """
    text = value if isinstance(value, str) else _bounded_repr(value)
    if len(text) > max_length:
        return f"{text[:max_length]!r}... ({len(text)} characters)"
    return repr(value)


def _bounded_repr(value: Any) -> str:
    """Return the `repr` of a value; its class for integers too large for Python to write."""
    try:
        return repr(value)
    except ValueError:
        return f"<{type(value).__name__}>"
