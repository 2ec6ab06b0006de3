"""`raysweep compare`: whether the difference between sweeps, trials or training runs is real."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.commands.options import (
    CommandParsers,
    add_command,
    add_json_option,
    add_location_options,
)

if TYPE_CHECKING:
    from raysweep.run_comparison import RunComparison

logger = logging.getLogger(__name__)

SUMMARY = "compare sweeps, trials or training runs: is the difference between them real"
DESCRIPTION = (
    "Compares the best trials of sweeps, single trials and training runs, each pair on the same "
    "validation images: by AutoAttack if it attacked both, else by the objective. Prints their "
    "accuracies with those of the base methods, the differences with 95% intervals, and whether "
    "they are real. Runs with other data or another threat model are refused. A figure goes to "
    "runs/comparisons."
)
EXAMPLES = ("raysweep compare g1 l1", "raysweep compare g1/0003 g1/0007 mine --json")

_FIGURES_FOLDER = "comparisons"
_FIGURE_DPI = 150
_MAX_FIGURE_NAME = 100


@dataclass(frozen=True)
class CompareRequest:
    """What the user asked `raysweep compare` to do.

    Attributes:
        names: Names or folders of the sweeps, trials and training runs.
        out: Folder of `runs` and `mlflow.db`.
        storage: Folder or URI of sweeps; None for `runs` in `out`.
        as_json: Whether to print JSON on stdout.
    """

    names: tuple[str, ...]
    out: Path
    storage: str | None
    as_json: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> CompareRequest:
        """Convert parsed arguments."""
        return cls(tuple(args.names), args.out, args.storage, args.json)


def add_parser(parsers: CommandParsers) -> None:
    """Add the arguments of `raysweep compare` to the command line."""
    parser = add_command(
        parsers, "compare", run_command, summary=SUMMARY, description=DESCRIPTION, examples=EXAMPLES
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="WHAT",
        help="two or more: a sweep (its best trial), a trial SWEEP/0003, a training run, or the "
        "folder of one of them",
    )
    add_location_options(parser)
    add_json_option(parser)


def run_command(args: argparse.Namespace) -> None:
    """Run `raysweep compare`."""
    request = CompareRequest.from_args(args)
    from raysweep.run_comparison import compare

    comparison = compare(*request.names, out=request.out, storage=request.storage)
    figure = _save_figure(request, comparison)
    if request.as_json:
        print(json.dumps({**comparison.to_json_dict(), "figure": figure and str(figure)}, indent=1))
        return
    _print_table(comparison)
    for line in comparison.describe():
        print(line)
    if figure is not None:
        print(f"figure\n  {figure}")


def _save_figure(request: CompareRequest, comparison: RunComparison) -> Path | None:
    """Write the figure and return its file; None, with a warning, if it cannot be written."""
    from raysweep.atomic_files import atomic_open
    from raysweep.errors import describe_os_error

    file = request.out.resolve() / "runs" / _FIGURES_FOLDER / _choose_figure_name(request.names)
    try:
        with atomic_open(file) as stream:
            comparison.plot().savefig(stream, format="png", dpi=_FIGURE_DPI)
    except OSError as error:
        logger.warning("no figure: %s", describe_os_error(error))
        return None
    return file


def _choose_figure_name(names: Sequence[str]) -> str:
    """Choose a file name of at most 100 bytes and an ending that differs for other names."""
    text = "-vs-".join(re.sub(r"[^\w.-]+", "-", name).strip("-.") for name in names)
    if len(text.encode()) > _MAX_FIGURE_NAME:
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        text = text.encode()[: _MAX_FIGURE_NAME - 9].decode(errors="ignore") + f"-{digest}"
    return f"{text}.png"


def _print_table(comparison: RunComparison) -> None:
    """Print the accuracies of the models and base methods."""
    from rich.table import Table

    from raysweep.terminal import create_table_console, format_metric

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run")
    rows = comparison.rows
    has_autoattack = any(row.robust_under_autoattack is not None for row in rows)
    titles = ["clean", comparison.objective.replace("_", " "), *(["AA"] if has_autoattack else [])]
    for title in titles:
        table.add_column(title, justify="right", min_width=5)
    for row in rows:
        cells = [row.metrics.get("clean"), row.metrics.get(comparison.objective)]
        if has_autoattack:
            cells.append(row.robust_under_autoattack)
        table.add_row(row.title, *map(format_metric, cells))
    create_table_console().print(table)
