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
from contextlib import contextmanager
from typing import NoReturn, TextIO

from raysweep import __version__
from raysweep.commands import doctor, run, show, train, tune
from raysweep.commands import eval as eval_command
from raysweep.commands import list as list_command
from raysweep.logs import command_log
from raysweep.shell_completion import SUPPORTED_SHELLS, PrintCompletion

logger = logging.getLogger(__name__)

_COMMAND_MODULES = (list_command, show, train, tune, run, doctor, eval_command)

_DESCRIPTION = """\
Find the hyper-parameters of instance-reweighted adversarial training on a cluster, and evaluate
the best models with AutoAttack.

Start with `raysweep tune lrat`: it needs no data, no GPU and no network. Every setting can be
changed with `--set path=value`; `raysweep show lrat` prints all paths. In a path `*` matches any
characters: `--set '*.eps=8/255'` sets every epsilon at once. Results go to ./runs and ./mlflow.db
(open them with `mlflow ui`), or to --out and MLFLOW_TRACKING_URI.
"""
_EPILOG = (
    "Exit codes: 0 done; 1 the work failed; 2 a setting or a file is wrong, nothing was started; "
    "130 interrupted."
)

# Commands that resume if they are run again as they are.
_RESUMABLE_COMMANDS = ("train", "run", "eval")
# Libraries that only some commands need: {module: (name for messages, requirement for pip)}.
_OPTIONAL_REQUIREMENTS = {"ray": ("Ray", "ray[default,tune,train]"), "mlflow": ("MLflow", "mlflow")}


class _OneLineErrorParser(argparse.ArgumentParser):
    """A parser that prints an error in one line, as commands do."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        self.exit(2, f"raysweep: error: {message}; see `{self.prog} --help`\n")


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
    """Run a command; print each mistake of the user as one line.

    Args:
        arguments: The command line without `raysweep`; None for that of this process.

    Returns:
        The exit code: 0 done, 1 the work failed, 2 a setting or file is wrong, 130 interrupted.

    Raises:
        SystemExit: The arguments cannot be parsed, or ask for help only.
    """
    given_arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = _parse_arguments(given_arguments)
    _disable_telemetry()
    with _one_line_warnings():
        return _run_command(args, given_arguments)


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
    from raysweep.errors import CompatibilityWarning
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
        if issubclass(category, FormerNameWarning | CompatibilityWarning):
            logger.warning("%s", message)
        else:
            original_showwarning(message, category, filename, lineno, file, line)

    warnings.showwarning = showwarning
    try:
        yield
    finally:
        warnings.showwarning = original_showwarning


def _run_command(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run the command; print an expected error and return its exit code."""
    from raysweep.errors import InfrastructureError
    from raysweep.spec import SpecError
    from raysweep.storage import BucketUnavailable

    try:
        with command_log(arguments, getattr(args, "verbose", False)) as log:
            log.exit_code = int(args.run_command(args))
        return log.exit_code
    except SpecError as error:
        _print_errors(error.problems)
        return 2
    except InfrastructureError as error:
        _print_errors(error.problems)
        return error.exit_code
    except BucketUnavailable as error:
        hint = "no file in the bucket is damaged: run the command again (a sweep: with --resume)"
        _print_errors([f"{error}; {hint}"])
        return 1
    except ModuleNotFoundError as error:
        if error.name not in _OPTIONAL_REQUIREMENTS:
            raise
        title, requirement = _OPTIONAL_REQUIREMENTS[error.name]
        install = f"pip install '{requirement}'"
        _print_errors(
            [f"`raysweep {args.command}` needs {title}, which is not installed: {install}"]
        )
        return 2
    except BrokenPipeError:
        # The reader of the output has closed the pipe (`raysweep list | head`). Redirect stdout,
        # because Python would print an error when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        hint = "; run the same command to resume" if args.command in _RESUMABLE_COMMANDS else ""
        print(f"raysweep: interrupted{hint}", file=sys.stderr)
        return 130


def _print_errors(problems: Sequence[str]) -> None:
    """Print each problem in one line on stderr."""
    for problem in problems:
        print(f"raysweep: error: {problem}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
