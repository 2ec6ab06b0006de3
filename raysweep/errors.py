"""The errors of raysweep, and the exit code of each.

`raysweep.cli` is the only place that turns an error into a line and an exit code; everything else
raises. An error that replaces another one keeps it as its cause: `raise SpecError(...) from error`.
"""

import errno
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, ClassVar, Self

from raysweep.redaction import redact_secrets
from raysweep.visible_text import shorten_line, show_characters

_INFRASTRUCTURE_ERRNOS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE),
        *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
        *(errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENOTCONN),
    }
)


class ExitCode(IntEnum):
    """Exit codes of the command line."""

    DONE = 0
    """Everything is done, and no report found a regression."""
    WORK_FAILED = 1
    """A trial, stage or run failed, or a claim of a bundle is false."""
    WRONG_SETTINGS = 2
    """A setting, a file of settings or the command line is wrong; nothing was started."""
    INFRASTRUCTURE = 3
    """A cluster, store, bucket, package, device or disk is missing or does not answer.

    A failed check of `raysweep doctor` ends with this code, too.
    """
    DAMAGED_FILE = 4
    """The content of a file is damaged; it has to be repaired or deleted."""
    REGRESSION = 5
    """Everything is done, and a report found a regression."""
    INTERRUPTED = 130
    """Interrupted by Ctrl-C or SIGTERM; the same command resumes."""


class RaysweepError(Exception):
    """Base class of all errors that a user should see without a traceback.

    An error keeps its class, its problems and its causes when it is pickled, so that it can be
    raised again in another process. A cause of another library becomes a RuntimeError with its type
    and text.

    Attributes:
        problems: One line per problem.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.WORK_FAILED
    """Exit code of a command that this error ends."""
    line_prefix: ClassVar[str] = "error: "
    """What the command line prints before each problem, behind the name of the program."""
    has_long_problems: ClassVar[bool] = False
    """Whether a problem may take several lines, such as a traceback or a command to type."""
    hint: ClassVar[str] = ""
    """What the command line adds to the last problem: what to do next."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        """Store the problems without secrets; the exception's message is all lines.

        Args:
            problems: One line or several.
        """
        lines = [problems] if isinstance(problems, str) else list(problems)
        self.problems = [self._clean_problem(line) for line in lines]
        super().__init__("\n".join(self.problems))

    def _clean_problem(self, problem: str) -> str:
        """Return a problem without secrets, control characters and overlong values.

        Names and values in it may come from files of strangers.
        """
        shown = show_characters(redact_secrets(problem), line_breaks=self.has_long_problems)
        return shown if self.has_long_problems else shorten_line(shown)

    def with_prefix(self, prefix: str) -> Self:
        """Return an error of the same class whose problems all start with a text.

        Raise the result `from` this error.

        Args:
            prefix: The text, including its separator, such as "set: ".
        """
        return type(self)([f"{prefix}{problem}" for problem in self.problems])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the class, the problems, other attributes and the chain of causes."""
        return _rebuild_error, (type(self), self.problems, dict(self.__dict__), _pack_causes(self))


class SpecError(RaysweepError, ValueError):
    """A user's mistake: a wrong setting, file of settings or option. Nothing was started.

    Each problem is a line with the setting, its value and what is allowed.
    """

    exit_code = ExitCode.WRONG_SETTINGS


class InfrastructureError(RaysweepError):
    """Something that the work needs is missing, full, forbidden or does not answer.

    For example a Ray cluster, an MLflow store, a bucket, a folder, a package or a GPU. The settings
    may be right: the same command can succeed later or elsewhere.
    """

    exit_code = ExitCode.INFRASTRUCTURE


class DamagedFileError(RaysweepError, ValueError):
    """The content of a file is damaged or incomplete: a checkpoint, ledger, artifact or data set.

    YAML files that users write are no such files; mistakes in them are a `SpecError`.
    """

    exit_code = ExitCode.DAMAGED_FILE


class WorkFailed(RaysweepError, RuntimeError):
    """Work that was started has failed: a training run, a trial, a sweep or a stage."""

    has_long_problems = True
    exit_code = ExitCode.WORK_FAILED
    line_prefix = ""


class RegressionFound(RaysweepError):
    """A report compares worse than an earlier one. Each problem is one regression."""

    exit_code = ExitCode.REGRESSION
    line_prefix = "regression: "


class WorkInterrupted(RaysweepError):
    """Work ended early because of Ctrl-C or SIGTERM, and saved its state."""

    has_long_problems = True
    exit_code = ExitCode.INTERRUPTED
    line_prefix = ""


class CompatibilityWarning(UserWarning):
    """An installed library lacks something that raysweep uses, and raysweep works without it.

    The command line prints it as one line.
    """


class ChangedValueWarning(FutureWarning):
    """A file or option has a value that earlier versions of raysweep read as another one.

    The command line prints it as one line.
    """


def list_causes(error: BaseException) -> list[BaseException]:
    """List the causes of an error: what it was raised `from`, the cause of that, and so on.

    Args:
        error: The error, which is not in the list.
    """
    causes: list[BaseException] = []
    cause = error.__cause__
    while cause is not None and cause is not error and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__
    return causes


def is_infrastructure_error(error: BaseException) -> bool:
    """Return whether an error of the system is about a disk, rights or the network.

    Others, such as a missing file that no user named, are probably bugs and need a traceback.

    Args:
        error: Any error.
    """
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno in _INFRASTRUCTURE_ERRNOS


def is_interruption(error: BaseException) -> bool:
    """Return whether an error means that the user ended the work.

    Args:
        error: Any error of a command that works.
    """
    return isinstance(error, KeyboardInterrupt | WorkInterrupted)


def describe_os_error(error: OSError) -> str:
    """Describe an error of the operating system in one line, with the file if there is one.

    Args:
        error: The error.
    """
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


def _pack_causes(error: BaseException) -> list[BaseException]:
    """List the causes, those that cannot be pickled replaced by their type and text."""
    return [_make_picklable(cause) for cause in list_causes(error)]


def _make_picklable(cause: BaseException) -> BaseException:
    """Return a RaysweepError or a built-in error itself, and any other one as a RuntimeError.

    Errors of libraries may hold sockets, or fail only when they are unpickled.
    """
    is_builtin = type(cause).__module__ == "builtins" and not isinstance(cause, BaseExceptionGroup)
    has_plain_args = all(isinstance(arg, str | int | float | None) for arg in cause.args)
    if isinstance(cause, RaysweepError) or (is_builtin and has_plain_args):
        return cause
    return RuntimeError(f"{type(cause).__name__}: {cause}")


def _rebuild_error(
    error_type: type[RaysweepError],
    problems: list[str],
    attributes: dict[str, Any],
    causes: list[BaseException],
) -> RaysweepError:
    """Make a pickled error again, with its chain of causes."""
    error = error_type(problems)
    error.__dict__.update(attributes)
    parent: BaseException = error
    for cause in causes:
        parent.__cause__ = cause
        parent = cause
    return error


def get_first_line(error: Exception) -> str:
    """Return the first line of an error's text, or the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
