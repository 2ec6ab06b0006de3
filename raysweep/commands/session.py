"""The log, the private files and the errors of a command, on the command line and in Python."""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from raysweep.code_files import forget_code_afterwards
from raysweep.disk_space import is_disk_full_error
from raysweep.errors import (
    ChangedValueWarning,
    CompatibilityWarning,
    ExitCode,
    InfrastructureError,
    RaysweepError,
    SpecError,
    WorkInterrupted,
    describe_os_error,
    get_first_line,
    is_infrastructure_error,
)
from raysweep.file_privacy import private_files
from raysweep.formatting import shorten_value
from raysweep.logs import command_log
from raysweep.output_streams import OutputClosed
from raysweep.user_folders import provide_library_folders

logger = logging.getLogger(__name__)

RESUMABLE_COMMANDS = ("train", "run", "eval", "sync")
"""Commands that resume if they are run again as they are."""
# Libraries that only some commands need: {module: (name for messages, requirement for pip)}.
_OPTIONAL_REQUIREMENTS = {"ray": ("Ray", "ray[default,tune,train]"), "mlflow": ("MLflow", "mlflow")}
# Errors of libraries about something that the work needs: (module, class).
_INFRASTRUCTURE_ERRORS = (
    ("mlflow.exceptions", "MlflowException"),
    ("optuna.exceptions", "StorageInternalError"),
    ("ray.exceptions", "RaySystemError"),
    ("sqlalchemy.exc", "OperationalError"),
)


@contextmanager
def command_session(command: str, command_line: str, verbose: bool = False) -> Iterator[None]:
    """Context manager for the work of a command: its log, private files and expected errors.

    Args:
        command: Name of the command, such as `tune`.
        command_line: What the user typed, for the log.
        verbose: Whether the terminal shows what is logged, not only warnings.

    Raises:
        RaysweepError: The work failed in a way that a user should see as a line. Bugs keep their
            class.
    """
    _disable_telemetry()
    with (
        _one_line_warnings(),
        private_files(),
        forget_code_afterwards(),
        command_log(command, command_line, verbose) as log,
    ):
        with _convert_expected_errors(command):
            provide_library_folders()
            yield
        log.exit_code = ExitCode.DONE


def _disable_telemetry() -> None:
    """Keep Ray and MLflow from sending usage statistics to their makers, unless the user wants it.

    Each of them is told so again where raysweep starts to use it. This is for the user's own code
    that a command imports, and for processes that it starts.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Print warnings of raysweep as one line on stderr, without file name and line number."""
    from raysweep.spec import FormerNameWarning

    original_showwarning = warnings.showwarning

    def showwarning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        one_line = FormerNameWarning | ChangedValueWarning | CompatibilityWarning
        if issubclass(category, one_line):
            logger.warning("%s", message)
        else:
            original_showwarning(message, category, filename, lineno, file, line)

    warnings.showwarning = showwarning
    try:
        yield
    finally:
        warnings.showwarning = original_showwarning


@contextmanager
def _convert_expected_errors(command: str) -> Iterator[None]:
    """Raise errors that a user should see as a RaysweepError; bugs keep their class."""
    try:
        yield
    except OutputClosed:
        raise
    except (Exception, KeyboardInterrupt) as error:
        expected = find_expected_error(error, command)
        if expected is None or expected is error:
            raise
        raise expected from error


def find_expected_error(error: BaseException, command: str) -> RaysweepError | None:
    """Find the error that the user should see.

    Args:
        error: Any error of a command.
        command: Name of the command.

    Returns:
        The error, which has one line per problem; None for a bug, which needs its traceback.
    """
    if isinstance(error, WorkInterrupted | KeyboardInterrupt):
        hint = "; run the same command to resume" if command in RESUMABLE_COMMANDS else ""
        reason = str(error) or "interrupted"
        return WorkInterrupted(f"{reason}{hint}")
    if isinstance(error, RaysweepError):
        return error
    if isinstance(error, ModuleNotFoundError) and error.name in _OPTIONAL_REQUIREMENTS:
        title, requirement = _OPTIONAL_REQUIREMENTS[error.name]
        install = f"pip install '{requirement}'"
        return InfrastructureError(
            f"`raysweep {command}` needs {title}, which is not installed: {install}"
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return SpecError(f"{shorten_value(str(error.filename))}: is too long for a path")
    if isinstance(error, OSError) and is_infrastructure_error(error):
        return InfrastructureError(describe_os_error(error))
    if isinstance(error, Exception) and is_disk_full_error(error):
        return InfrastructureError(get_first_line(error))
    if isinstance(error, _load_library_errors()):
        lines = str(error).splitlines() or [type(error).__name__]
        return InfrastructureError(lines[0])
    return None


def _load_library_errors() -> tuple[type[BaseException], ...]:
    """Return the errors of `_INFRASTRUCTURE_ERRORS` whose libraries have been imported."""
    return tuple(
        getattr(sys.modules[module], name)
        for module, name in _INFRASTRUCTURE_ERRORS
        if module in sys.modules
    )
