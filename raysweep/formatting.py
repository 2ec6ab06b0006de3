"""Text for people: durations, counts, and URLs without their passwords."""

import re

# The alternatives, in order:
# 1. scheme://user:password@, also with missing slashes;
# 2. the same with spaces in the password, if the whole text is a URL;
# 3. user:password@ without a scheme;
# 4. password=... in a query.
_PASSWORD_PATTERN = re.compile(
    r"(:/*[^\s:/]*:)\S*(?=@)"
    r"|^([^\s:/]+://[^\s:/]*:).*(?=@)"
    r"|((?<!\S)[^\s:/@]+:)(?=[^\s/])\S*(?=@)"
    r"|(password=)[^\s&]*"
)


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


def redact_secrets(text: str) -> str:
    """Replace the passwords of URLs by `***`.

    Args:
        text: A URL of a database or server, well-formed or not, or a line that contains one.

    Returns:
        The text with `***` for the passwords in `user:password@host` and `password=...`. In unclear
        cases it removes too much rather than too little.
    """
    return _PASSWORD_PATTERN.sub(r"\1\2\3\4***", text)
