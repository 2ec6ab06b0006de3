"""Log entries: records as JSON lines, and JSON lines as text for people."""

import json
import logging
import re
import socket
import traceback
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from raysweep.redaction import redact_secrets, redact_value

JsonEntry = dict[str, Any]
"""One line of a log, as a dict."""

# Attributes that every record has, or that say where it was shown: they are no fields of the entry.
_COMMON_ATTRIBUTES = frozenset(
    {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName", "is_shown_elsewhere"}
)
_ENTRY_KEYS = ("time", "level", "logger", "process", "host", "message", "exception")
_MAX_TRACEBACK_CHARACTERS = 20_000
_MAX_CAUSES = 20


def format_json_line(record: logging.LogRecord, context: Mapping[str, Any]) -> str:
    """Format a record as one line of `log.jsonl`.

    Args:
        record: The record; attributes that `extra=` added to it become keys of the entry.
        context: Further keys, such as the number of the trial.

    Returns:
        A JSON object without a line break and without secrets.
    """
    return json.dumps(_make_entry(record, context), default=str)


def _make_entry(record: logging.LogRecord, context: Mapping[str, Any]) -> JsonEntry:
    """Convert a record to an entry without secrets."""
    entry: JsonEntry = {
        "time": format_time(record.created),
        "level": record.levelname,
        "logger": record.name,
        "process": record.process,
        "host": socket.gethostname(),
        **context,
        "message": record.getMessage(),
    }
    for name, value in record.__dict__.items():
        # Ray adds private attributes to every record.
        is_private = name.startswith("_")
        if not is_private and name not in _COMMON_ATTRIBUTES and name not in _ENTRY_KEYS:
            entry[name] = value
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        # A secret that was cut off could not be told.
        text = redact_secrets("".join(traceback.format_exception(error)))
        entry["exception"] = {
            "causes": describe_causes(error),
            "traceback": text[-_MAX_TRACEBACK_CHARACTERS:],
        }
    return dict(zip(entry, redact_value(list(entry.values())), strict=True))


def describe_causes(error: BaseException) -> list[JsonEntry]:
    """Describe an exception and what caused it.

    Args:
        error: The exception.

    Returns:
        `type` and `message` of the exception, then of its cause, and so on to the first one. An
        exception that was being handled counts as the cause, also where `from None` hides it.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain and len(chain) < _MAX_CAUSES:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return [{"type": type(one).__name__, "message": str(one)} for one in chain]


# Control characters, except for tab and line feed, and halves of characters.
_UNPRINTABLE_PATTERN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def format_entry(entry: JsonEntry) -> str:
    """Format an entry for people.

    Args:
        entry: A line of `log.jsonl`.

    Returns:
        Time (UTC), level, who wrote it, and the message; below it an indented line for each cause
        of an exception.
    """
    time, level = str(entry.get("time", "")), str(entry.get("level", ""))
    lines = [f"{time:<24} {level:<7} {describe_writer(entry)}  {entry.get('message', '')}"]
    exception = entry.get("exception")
    causes = exception.get("causes") if isinstance(exception, dict) else None
    for number, cause in enumerate(causes if isinstance(causes, list) else []):
        introduction = "because of " if number else ""
        values = cause if isinstance(cause, dict) else {"message": cause}
        message = "\n        ".join(str(values.get("message", "")).splitlines())
        lines.append(f"    {introduction}{values.get('type', '')}: {message}")
    return escape_unprintable("\n".join(lines))


def escape_unprintable(text: str) -> str:
    """Replace what a terminal would obey or a file cannot hold by an escape, such as `\\x1b`.

    Args:
        text: Text from a log, where file names and damaged lines may contain any character.
    """
    return _UNPRINTABLE_PATTERN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def describe_writer(entry: JsonEntry) -> str:
    """Return who wrote an entry: `trial 0003` or a command, with its process and host."""
    who = str(entry.get("writer", ""))
    if who in ("trial", "base run", "repeat"):
        number = entry.get("trial", 0)
        who += f" {number:04d}" if isinstance(number, int) else f" {number}"
        if "seed" in entry:
            who += f" seed {entry['seed']}"
        if "rank" in entry:
            who += f" worker {entry['rank']}"
    return f"[{who} process {entry.get('process', '?')} on {entry.get('host', '?')}]"


def read_entries(texts: Iterable[str]) -> list[JsonEntry]:
    """Read the contents of log files.

    Args:
        texts: JSON lines, in any order.

    Returns:
        All entries in the order of their times, each by the clock of the machine that wrote it. A
        line that is not JSON, because a process was killed while it wrote, becomes an entry whose
        message is the line.
    """
    entries: list[JsonEntry] = []
    for text in texts:
        last_time = ""
        for line in filter(str.strip, text.split("\n")):
            entry = _parse_line(line, last_time)
            last_time = str(entry["time"])
            entries.append(entry)
    return sorted(entries, key=lambda entry: str(entry["time"]))


def _parse_line(line: str, last_time: str) -> JsonEntry:
    """Parse a line; a damaged one gets the time of the line before it."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if isinstance(entry, dict) and "time" in entry:
        return entry
    return {"time": last_time, "level": "DAMAGED", "message": line}


def format_time(seconds: float) -> str:
    """Format a time as in the entries.

    Args:
        seconds: Unix seconds.

    Returns:
        UTC with milliseconds, such as 2026-03-01T02:00:00.123Z.
    """
    time = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return time.replace("+00:00", "Z")
