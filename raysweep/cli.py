"""The command line: parse arguments, run a command, print errors in one line.

Each command is a module of `raysweep.commands`. Building the parser imports the standard library
only, so that `raysweep --help` answers at once.
"""

import argparse
import difflib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from traceback import format_exception
from types import TracebackType
from typing import Any, NoReturn, TextIO

from raysweep import __version__
from raysweep.code_files import forget_code_afterwards
from raysweep.commands import doctor, run, show, sync, train, tune
from raysweep.commands import eval as eval_command
from raysweep.commands import list as list_command
from raysweep.disk_space import is_disk_full_error
from raysweep.errors import (
    ChangedValueWarning,
    CompatibilityWarning,
    ExitCode,
    InfrastructureError,
    RaysweepError,
    WorkInterrupted,
    describe_os_error,
    get_first_line,
    is_infrastructure_error,
)
from raysweep.file_privacy import private_files
from raysweep.logs import command_log
from raysweep.output_streams import OutputClosed, forgiving_output
from raysweep.redaction import redact_secrets
from raysweep.shell_completion import SUPPORTED_SHELLS, PrintCompletion
from raysweep.user_folders import provide_library_folders
from raysweep.visible_text import shorten_line, visible_output

logger = logging.getLogger(__name__)

_COMMAND_MODULES = (list_command, show, train, tune, run, sync, doctor, eval_command)

_DESCRIPTION = """\
Find the hyper-parameters of instance-reweighted adversarial training on a cluster, and evaluate
the best models with AutoAttack.

Start with `raysweep tune lrat`: it needs no data, no GPU and no network. Every setting can be
changed with `--set path=value`; `raysweep show lrat` prints all paths. In a path `*` matches any
characters: `--set '*.eps=8/255'` sets every epsilon at once. Results go to ./runs and ./mlflow.db
(open them with `mlflow ui`), or to --out and MLFLOW_TRACKING_URI.
"""
_EPILOG = """\
Exit codes: 0 done; 1 the work failed; 2 a setting is wrong, nothing was started; 3 a cluster,
store, bucket, package, GPU or disk is missing, full or does not answer; 4 a file is damaged;
5 done, and a report saw a regression; 130 interrupted.
"""

# Commands that resume if they are run again as they are.
_RESUMABLE_COMMANDS = ("train", "run", "eval", "sync")
# Commands whose end is more than their output.
_WORK_COMMANDS = (*_RESUMABLE_COMMANDS, "tune")
# Libraries that only some commands need: {module: (name for messages, requirement for pip)}.
_OPTIONAL_REQUIREMENTS = {"ray": ("Ray", "ray[default,tune,train]"), "mlflow": ("MLflow", "mlflow")}
# Errors of libraries about something that the work needs: (module, class).
_INFRASTRUCTURE_ERRORS = (
    ("mlflow.exceptions", "MlflowException"),
    ("optuna.exceptions", "StorageInternalError"),
    ("ray.exceptions", "RaySystemError"),
    ("sqlalchemy.exc", "OperationalError"),
)


class _OneLineErrorParser(argparse.ArgumentParser):
    """A parser that prints an error in one line, as commands do, and takes no abbreviations."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # `--data` would mean `--data-dir`, and an option added later would change what it means.
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with the code for wrong settings."""
        line = shorten_line(redact_secrets(f"{message}; see `{self.prog} --help`"))
        self.exit(ExitCode.WRONG_SETTINGS, f"raysweep: error: {line}\n")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line.

    Returns:
        A parser; the arguments that it parses have the function of the command as `run_command`.
    """
    parser: argparse.ArgumentParser = _OneLineErrorParser(
        "raysweep",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"raysweep {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SUPPORTED_SHELLS,
        help="print a completion script, for `eval` or a file",
    )
    parsers = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND"
    )
    for module in _COMMAND_MODULES:
        module.add_parser(parsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; print each expected error as one line.

    Args:
        arguments: The command line without `raysweep`; None for that of this process.

    Returns:
        The exit code, one of `ExitCode`.

    Raises:
        SystemExit: The arguments cannot be parsed, or ask for help only.
    """
    if sys.platform == "win32":
        return _refuse_windows()
    given_arguments = sys.argv[1:] if arguments is None else list(arguments)
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_traceback
    works = given_arguments[:1] and given_arguments[0] in _WORK_COMMANDS
    with forgiving_output(is_all=not works), visible_output():
        args = _parse_arguments(given_arguments)
        _disable_telemetry()
        with _one_line_warnings():
            return _run_command(args, given_arguments)


def _refuse_windows() -> int:
    """Say that Windows has not what raysweep is built on: its file locks, signals and forks."""
    _print_error(
        InfrastructureError(
            "raysweep runs on Linux and macOS; on Windows, install and run it in WSL"
        )
    )
    return ExitCode.INFRASTRUCTURE


def _print_traceback(
    error_type: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Print the traceback of a bug as Python does, without secrets."""
    lines = format_exception(error_type, error, traceback)
    with suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(redact_secrets("".join(lines)))


def _disable_telemetry() -> None:
    """Keep Ray and MLflow from sending usage statistics to their makers, unless the user wants it.

    Each of them is told so again where raysweep starts to use it. This is for the user's own code
    that a command imports, and for processes that it starts.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; suggest the nearest option for an unknown one."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        command = commands.choices[args.command]
        flag = unknown[0].partition("=")[0]
        nearest = difflib.get_close_matches(flag, command._option_string_actions, n=1)
        hint = f"; nearest: {nearest[0]}" if nearest else ""
        command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return args


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


def _run_command(args: argparse.Namespace, arguments: Sequence[str]) -> ExitCode:
    """Run the command; print an expected error and return its exit code."""
    try:
        with (
            private_files(),
            forget_code_afterwards(),
            command_log(arguments, getattr(args, "verbose", False)) as log,
        ):
            with _convert_expected_errors(args.command):
                provide_library_folders()
                args.run_command(args)
                sys.stdout.flush()
            log.exit_code = ExitCode.DONE
        return ExitCode.DONE
    except RaysweepError as error:
        _print_error(error)
        return error.exit_code
    except OutputClosed:
        # The reader of the output has enough (`raysweep list | head`).
        return ExitCode.DONE


@contextmanager
def _convert_expected_errors(command: str) -> Iterator[None]:
    """Raise errors that a user should see as a RaysweepError; bugs keep their class."""
    try:
        yield
    except OutputClosed:
        raise
    except (Exception, KeyboardInterrupt) as error:
        expected = _find_expected_error(error, command)
        if expected is None or expected is error:
            raise
        raise expected from error


def _find_expected_error(error: BaseException, command: str) -> RaysweepError | None:
    """Return the error that the user should see; None for a bug, which needs its traceback."""
    if isinstance(error, WorkInterrupted | KeyboardInterrupt):
        hint = "; run the same command to resume" if command in _RESUMABLE_COMMANDS else ""
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


def _print_error(error: RaysweepError) -> None:
    """Print each problem in one line on stderr."""
    for problem in error.problems:
        hint = error.hint if problem is error.problems[-1] else ""
        # A full disk or a reader that has gone must not change the exit code.
        with suppress(OSError, ValueError):
            print(f"raysweep: {error.line_prefix}{problem}{hint}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
