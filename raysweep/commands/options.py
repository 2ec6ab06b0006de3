"""Options and argument types of the command line that several commands share.

This module and the top level of every command module import the standard library only, so that
`raysweep --help` answers at once.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

# A string, because the class of argparse takes no type arguments while the program runs.
CommandParsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_DESCRIPTION_WIDTH = 110
_SECONDS_PER_UNIT = {"s": 1, "m": 60, "h": 3600}


def add_command(
    parsers: CommandParsers,
    name: str,
    run_command: Callable[[argparse.Namespace], None],
    *,
    summary: str,
    description: str,
    examples: Sequence[str],
) -> argparse.ArgumentParser:
    """Add the parser of one command.

    Args:
        parsers: The parsers of all commands, which the new one joins.
        name: What the user types after `raysweep`.
        run_command: Runs the command, and raises an error if it fails; parsed arguments carry it
            as `run_command`.
        summary: Line about the command in `raysweep --help`.
        description: Text above the options in `raysweep NAME --help`; it is wrapped.
        examples: Complete command lines, printed below the options.

    Returns:
        The parser, still without arguments.
    """
    parser = parsers.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, _DESCRIPTION_WIDTH),
        epilog="\n".join(["examples:", *(f"  {example}" for example in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run_command=run_command)
    return parser


class _AppendAssignment(argparse.Action):
    """Append a value of `--set`; refuse a name for which the command has an option of its own."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        name = values.partition("=")[0].strip()
        option = f"--{name.replace('_', '-')}"
        if option in parser._option_string_actions:
            parser.error(f"argument --set: use the option {option} in place of {name}=...")
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), values])


def add_override_options(parser: argparse.ArgumentParser) -> None:
    """Add `--set` and `--data-dir`, which change settings."""
    parser.add_argument(
        "--set",
        action=_AppendAssignment,
        default=[],
        metavar="PATH=VALUE",
        help="change a setting (repeatable)",
    )
    parser.add_argument(
        "--data-dir",
        type=parse_path,
        metavar="DIR",
        help="folder of the data set: short for --set data.data_dir=",
    )


def add_code_option(parser: argparse.ArgumentParser) -> None:
    """Add `--code`, a Python file of the user's own."""
    parser.add_argument(
        "--code",
        type=parse_path,
        metavar="FILE",
        help="Python file of your own with the network that model.name names; nothing that a "
        "checkpoint or sweep names is imported without it",
    )


def add_address_option(parser: argparse.ArgumentParser) -> None:
    """Add `--address`, the Ray cluster to use."""
    parser.add_argument(
        "--address",
        metavar="ADDR",
        help="Ray cluster: auto or host:port (default: $RAY_ADDRESS, else local)",
    )


def add_location_options(parser: argparse.ArgumentParser) -> None:
    """Add `--out` and `--storage`, where results are written."""
    parser.add_argument(
        "--out",
        type=parse_path,
        default=Path(),
        metavar="DIR",
        help="folder for runs/ and mlflow.db (default: .)",
    )
    parser.add_argument(
        "--storage",
        metavar="WHERE",
        help="where sweeps and checkpoints go instead of runs/: a folder, s3://BUCKET/PATH or "
        "gs://BUCKET/PATH",
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")


def add_verbose_option(parser: argparse.ArgumentParser) -> None:
    """Add `--verbose`, which `raysweep.logs.command_log` reads."""
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="print what is logged on stderr, not only warnings (see also $RAYSWEEP_LOG_LEVEL)",
    )


def parse_path(text: str) -> Path:
    """Convert text to a path; `~` is the home folder. ArgumentTypeError if there is none."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: there is no such home folder") from error


def parse_positive_int(text: str) -> int:
    """Convert text to a whole number of at least 1, or raise ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse_duration(text: str) -> float:
    """Convert a time such as 90s, 30m or 2h to seconds, or raise ArgumentTypeError."""
    try:
        seconds = float(text[:-1]) * _SECONDS_PER_UNIT[text[-1:]]
    except (ValueError, KeyError):
        seconds = -1.0
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 30m or 2h")
    return seconds


def parse_fraction(text: str) -> float:
    """Convert 0.031 or 8/255 to a number of at least 0, or raise ArgumentTypeError."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        value = -1.0
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 0.031 or 8/255")
    return value


def parse_non_negative(text: str) -> float:
    """Convert text to a finite number of at least 0, or raise ArgumentTypeError."""
    try:
        amount = float(text)
    except ValueError:
        amount = -1.0
    if not 0 <= amount < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return amount
