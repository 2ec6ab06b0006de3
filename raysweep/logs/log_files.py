"""Log files on this machine: written line by line, rotated by size, and searched for their end.

A file that has reached its limit is renamed to `log.jsonl.TIME-HOST-PROCESS`, so that the machines
that use one bucket never choose the same name; the oldest of too many are deleted.
"""

import contextlib
import json
import logging
import os
import socket
import sys
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

from raysweep.logs.entries import (
    JsonEntry,
    escape_unprintable,
    format_entry,
    format_json_line,
    read_entries,
)

logger = logging.getLogger(__name__)

# Part of an earlier log that is searched for the end of the process that wrote it.
_TAIL_BYTES = 2**18


class LogFile(RotatingFileHandler):
    """A log file that is rotated by size, and never raises."""

    def __init__(
        self, path: Path, formatter: logging.Formatter, max_bytes: int, n_full_files: int
    ) -> None:
        """Describe the file; it is opened for the first record.

        Args:
            path: The file.
            formatter: Converts records to lines.
            max_bytes: Size at which it is renamed and a new file begins.
            n_full_files: Number of full files that are kept.
        """
        super().__init__(
            path, maxBytes=max_bytes, backupCount=n_full_files, encoding="utf-8", delay=True
        )
        self.path = path
        self.setFormatter(formatter)
        self._n_lost = 0

    def _open(self) -> Any:
        """Open the file; end the line that a killed process or a full disk cut off."""
        is_cut_off = _ends_within_line(self.path)
        # A sweep that somebody else has made could have a link to another file here.
        stream = open(  # noqa: SIM115 - the handler closes it
            self.path, self.mode, encoding=self.encoding, opener=_open_unless_link
        )
        if is_cut_off:
            stream.write("\n")
        return stream

    def doRollover(self) -> None:  # noqa: N802 - logging's name
        """Start a new file; keep the full one under a name of its own, and not too many of them."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        writer = f"{socket.gethostname()}-{os.getpid()}"
        self.path.rename(self.path.with_name(f"{self.path.name}.{now}-{writer}"))
        for file in list_outdated_files(list_rotated_files(self.path), self.backupCount):
            file.unlink(missing_ok=True)
        self.stream = self._open()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Drop the record; say so once on the terminal."""
        stream: TextIO | None = self.stream
        # Otherwise the buffer would keep the record for ever.
        self.stream = None
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.close()
        self._n_lost += 1
        if self._n_lost == 1:
            error = sys.exc_info()[1]
            reason = getattr(error, "strerror", None) or error
            logger.warning(
                "the log %s cannot be written: %s; the work continues", self.path, reason
            )


def _open_unless_link(path: str, flags: int) -> int:
    """Open a file for `open`; OSError for a symbolic link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


class JsonFormatter(logging.Formatter):
    """Formats records as JSON lines with some keys in common."""

    def __init__(self, context: dict[str, Any]) -> None:
        super().__init__()
        self._context = context

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        return format_json_line(record, self._context)


class TextFormatter(JsonFormatter):
    """Formats records for people."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text, with the traceback of its exception."""
        entry = json.loads(super().format(record))
        text = format_entry(entry)
        if "exception" in entry:
            text += f"\n{escape_unprintable(entry['exception']['traceback'].rstrip())}"
        return text


def is_rotation_of(file: Path, path: Path) -> bool:
    """Check whether a file is a log file or a full one of it.

    Args:
        file: The file in question.
        path: The log file.
    """
    return file == path or file.name.startswith(f"{path.name}.")


def list_outdated_files(files: list[Path], n_full_files: int) -> list[Path]:
    """List the full log files that are too many.

    Args:
        files: A log file and full ones of it.
        n_full_files: Number of full files that are kept.

    Returns:
        The oldest full files.
    """
    # The names end with the time. The file that is being written has none.
    full_files = sorted(file for file in files if file.suffix not in (".jsonl", ".txt"))
    return full_files[: max(0, len(full_files) - n_full_files)]


def list_rotated_files(path: Path) -> list[Path]:
    """List a log file and its full ones, as far as they exist.

    Args:
        path: The log file.
    """
    return [file for file in path.parent.glob(f"{path.name}*") if is_rotation_of(file, path)]


def find_last_process(path: Path) -> JsonEntry | None:
    """Find the last start or end of a process in a log file.

    Args:
        path: The log file.

    Returns:
        Its entry; None if there is none near the end of the file.
    """
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            # A device, such as /dev/full, has no end.
            text = stream.read(_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return None
    marks = [entry for entry in read_entries([text]) if entry.get("event") in ("start", "end")]
    return marks[-1] if marks else None


def _ends_within_line(path: Path) -> bool:
    """Return whether the file's last line has no end."""
    try:
        with path.open("rb") as stream:
            if stream.seek(0, os.SEEK_END) == 0:
                return False
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) != b"\n"
    except OSError:
        return False
