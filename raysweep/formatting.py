"""Text for people: durations, counts, and URLs without their passwords."""

import re

# In turn: a user name and a password after a scheme, also where slashes lack; a whole text that is
# a URL and has spaces in its password; a user name and a password without a scheme; a query.
_PASSWORD_PATTERN = re.compile(
    r"(:/*[^\s:/]*:)\S*(?=@)"
    r"|^([^\s:/]+://[^\s:/]*:).*(?=@)"
    r"|((?<!\S)[^\s:/@]+:)(?=[^\s/])\S*(?=@)"
    r"|(password=)[^\s&]*"
)


def format_clock(seconds: float) -> str:
    """Return a time for a line that is updated, such as `2:05` or `1:02:05`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_duration(seconds: float) -> str:
    """Return a time for a sentence or a table, such as `4.2 s`, `12.5 min` or `1.7 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_count(count: int, noun: str) -> str:
    """Return a count with its noun in the right number: `1 trial`, `2 trials`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def redact_secrets(text: str) -> str:
    """Replace the passwords of URLs by `***`.

    Args:
        text: A URL of a database or server, well-formed or not, or a line that contains one.

    Returns:
        The text without the passwords in `user:password@host` and `password=...`. When in doubt
        too much is removed, not too little.
    """
    return _PASSWORD_PATTERN.sub(r"\1\2\3\4***", text)
