"""Text for people: durations and counts."""


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


def format_count(count: int, noun: str) -> str:
    """Format a count and a singular noun, with an `s` if necessary: `1 trial`, `2 trials`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
