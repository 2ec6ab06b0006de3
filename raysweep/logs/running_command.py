"""The log of one command of raysweep, from its start to its exit code."""

import contextlib
import logging
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from raysweep.errors import ExitCode
from raysweep.logs.handlers import EarlyRecordBuffer, TerminalHandler
from raysweep.logs.package_logger import attach_handlers, detach_all_handlers, detach_handlers
from raysweep.redaction import redact_secrets

LEVEL_VARIABLE = "RAYSWEEP_LOG_LEVEL"
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

logger = logging.getLogger(__name__)


class CommandLog:
    """The log of one command of raysweep, from its start to its exit code.

    Attributes:
        name: Name of the command, such as `tune`.
        command_line: The whole command without secrets.
        exit_code: The command's exit code; None until it is known.
        started_at: When it started, in Unix seconds.
        early_records: Records that no folder has yet.
        folders: Closes the log of the command's outermost folder.
    """

    running: "ClassVar[CommandLog | None]" = None
    """The command that this process runs."""

    def __init__(self, name: str, command_line: str) -> None:
        self.name = name
        self.command_line = redact_secrets(command_line)
        self.exit_code: int | None = None
        self.started_at = time.time()
        self.early_records = EarlyRecordBuffer()
        self.folders = contextlib.ExitStack()


def format_command_line(arguments: Sequence[str]) -> str:
    """Return a command of raysweep as a line for a shell, without secrets.

    Args:
        arguments: The command line without `raysweep`.
    """
    # Quotes could hide the secrets of an argument.
    return redact_secrets(shlex.join(["raysweep", *map(redact_secrets, arguments)]))


@contextmanager
def command_log(name: str, command_line: str, verbose: bool = False) -> Iterator[CommandLog]:
    """Context manager for a command: shows records on the terminal, and logs the command's end.

    Args:
        name: Name of the command, such as `tune`.
        command_line: What the user typed: the whole command, or the call of a Python function.
        verbose: Whether `--verbose` was given.

    Yields:
        The command's log. The caller sets its `exit_code`.

    Raises:
        SpecError: $RAYSWEEP_LOG_LEVEL is not a level.
    """
    level = _choose_terminal_level(verbose)
    command = CommandLog(name, command_line)
    terminal, early = TerminalHandler(level), command.early_records
    outer_command, CommandLog.running = CommandLog.running, command
    attach_handlers(terminal, early)
    started_at = time.monotonic()
    try:
        with command.folders:
            try:
                yield command
            except BaseException as error:
                _log_command_end(command, started_at, error)
                raise
            _log_command_end(command, started_at, None)
    finally:
        detach_handlers(terminal, early)
        CommandLog.running = outer_command


def detach_command_log() -> None:
    """In a fork, stop logging as part of the command that the parent process runs."""
    CommandLog.running = None
    detach_all_handlers()


def _log_command_end(command: CommandLog, started_at: float, error: BaseException | None) -> None:
    """Log how a command ended, after how many seconds and with which exit code."""
    seconds = round(time.monotonic() - started_at, 1)
    exit_code, level, reason = command.exit_code, logging.INFO, ""
    if error is not None:
        is_interrupt = isinstance(error, KeyboardInterrupt)
        default = ExitCode.INTERRUPTED if is_interrupt else ExitCode.WORK_FAILED
        exit_code = int(getattr(error, "exit_code", default))
        is_failure = exit_code not in (ExitCode.INTERRUPTED, ExitCode.REGRESSION)
        level = logging.ERROR if is_failure else logging.WARNING
        reason = f": {type(error).__name__}: {error}".rstrip(": ")
    logger.log(
        level,
        "%s ended its work after %s s with exit code %s, its process shuts down%s",
        command.command_line,
        seconds,
        exit_code,
        reason,
        exc_info=error,
        extra={
            "event": "end",
            "exit_code": exit_code,
            "seconds": seconds,
            "is_shown_elsewhere": True,
        },
    )


def _choose_terminal_level(verbose: bool) -> int:
    """Return the level of the terminal; SpecError if the environment variable is wrong."""
    name = os.environ.get(LEVEL_VARIABLE, "").lower()
    if name and name not in _LEVELS:
        from raysweep.spec import SpecError

        raise SpecError(
            f"{LEVEL_VARIABLE}={os.environ[LEVEL_VARIABLE]!r}: expected {', '.join(_LEVELS)}"
        )
    level = _LEVELS.get(name, logging.WARNING)
    return min(level, logging.INFO) if verbose else level
