"""The command line: parse arguments, run a command, print errors in one line.

Each command is a module of `raysweep.commands`. Building the parser imports the standard library
only, so that `raysweep --help` answers at once.
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from contextlib import suppress
from traceback import format_exception
from types import TracebackType
from typing import Any, NoReturn

from raysweep import __version__
from raysweep.commands import compare, doctor, run, show, sync, train, tune
from raysweep.commands import eval as eval_command
from raysweep.commands import list as list_command
from raysweep.commands.session import RESUMABLE_COMMANDS, command_session
from raysweep.errors import ExitCode, InfrastructureError, RaysweepError
from raysweep.logs import format_command_line
from raysweep.output_streams import OutputClosed, forgiving_output
from raysweep.redaction import redact_secrets
from raysweep.shell_completion import SUPPORTED_SHELLS, PrintCompletion
from raysweep.visible_text import shorten_line, visible_output

_COMMAND_MODULES = (list_command, show, train, tune, run, compare, sync, doctor, eval_command)

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

# Commands whose end is more than their output.
_WORK_COMMANDS = (*RESUMABLE_COMMANDS, "tune")


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
        if not given_arguments:
            build_parser().print_help(sys.stderr)
            return ExitCode.WRONG_SETTINGS
        args = _parse_arguments(given_arguments)
        return _run_command(args, given_arguments)


def _refuse_windows() -> int:
    """Print that Windows lacks the file locks, signals and forks that raysweep needs."""
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


def _run_command(args: argparse.Namespace, arguments: Sequence[str]) -> ExitCode:
    """Run the command; print an expected error and return its exit code."""
    command_line = format_command_line(arguments)
    try:
        with command_session(args.command, command_line, getattr(args, "verbose", False)):
            args.run_command(args)
            sys.stdout.flush()
        return ExitCode.DONE
    except RaysweepError as error:
        _print_error(error)
        return error.exit_code
    except OutputClosed:
        # The reader of the output has enough (`raysweep list | head`).
        return ExitCode.DONE


def _print_error(error: RaysweepError) -> None:
    """Print each problem in one line on stderr."""
    for problem in error.problems:
        hint = error.hint if problem is error.problems[-1] else ""
        # A full disk or a reader that has gone must not change the exit code.
        with suppress(OSError, ValueError):
            print(f"raysweep: {error.line_prefix}{problem}{hint}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
