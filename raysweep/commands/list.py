"""`raysweep list`: print the names that other commands take."""

from __future__ import annotations

import argparse
import inspect
import json
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raysweep.commands.options import (
    CommandParsers,
    add_command,
    add_json_option,
    add_location_options,
)

if TYPE_CHECKING:
    from raysweep.run_lookup import FoundRun

SUMMARY = "list methods, models, data sets, attacks, metrics, search spaces, presets, pipelines"
DESCRIPTION = (
    "Lists the names that other commands take, with a line about each: methods, models, data sets, "
    "attacks, metrics, search spaces, presets (single runs of the papers) and pipelines."
)
EXAMPLES = ("raysweep list", "raysweep list --json", "raysweep list runs")

_LINE_WIDTH = 118
_FOOTER = """
`raysweep show NAME` prints every setting of a method, preset or pipeline. If several of these have
one name, type preset:NAME or space:NAME. `raysweep tune METHOD` runs a sweep of a method, `raysweep
train METHOD|PRESET` one training run, and `raysweep run PIPELINE` a pipeline."""


@dataclass(frozen=True)
class ListRequest:
    """What the user asked `raysweep list` to do.

    Attributes:
        what: "runs" for sweeps and training runs, None for the names that are built in.
        out: Folder of `runs`.
        storage: Folder or URI of sweeps; None for `runs` in `out`.
        as_json: Whether to print JSON on stdout.
    """

    what: Literal["runs"] | None
    out: Path
    storage: str | None
    as_json: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ListRequest:
        """Convert parsed arguments."""
        return cls(what=args.what, out=args.out, storage=args.storage, as_json=args.json)


def add_parser(parsers: CommandParsers) -> None:
    """Add the arguments of `raysweep list` to the command line."""
    parser = add_command(
        parsers, "list", run_command, summary=SUMMARY, description=DESCRIPTION, examples=EXAMPLES
    )
    parser.add_argument(
        "what",
        nargs="?",
        type=_parse_what,
        metavar="runs",
        help="list the sweeps and training runs of this folder instead",
    )
    add_location_options(parser)
    add_json_option(parser)


def _parse_what(text: str) -> str:
    """Return "runs", the only word that `raysweep list` takes."""
    if text != "runs":
        raise argparse.ArgumentTypeError(
            f"{text!r} is not `runs`, the only list of its own; `raysweep list` has all names, and "
            "`raysweep show NAME` what has one of them"
        )
    return text


def run_command(args: argparse.Namespace) -> None:
    """Run `raysweep list`."""
    request = ListRequest.from_args(args)
    if request.what == "runs":
        _list_runs(request)
        return
    from raysweep.pipeline.builtin_pipelines import describe_builtin_pipelines
    from raysweep.sweep.search_space import list_builtin_spaces
    from raysweep.training.presets import list_presets

    tables = _list_described_names()
    spaces, presets, pipelines = list_builtin_spaces(), list_presets(), describe_builtin_pipelines()
    if request.as_json:
        names = {"spaces": spaces, "presets": presets, "pipelines": pipelines}
        print(json.dumps({**tables, **names}, indent=1))
        return
    for title, rows in tables.items():
        _print_table(title, rows)
    _print_names("search spaces", spaces)
    _print_names("presets: runs of the papers", presets)
    _print_table("pipelines", pipelines)
    print(_FOOTER)


def _list_runs(request: ListRequest) -> None:
    """Print a line about each sweep and training run of a folder."""
    from raysweep.commands.common import resolve_runs_folder
    from raysweep.run_lookup import list_runs

    runs_folder = resolve_runs_folder(request.out, request.storage, for_writing=False)
    rows: list[dict[str, str | None]] = [_summarize_run(found) for found in list_runs(runs_folder)]
    if request.as_json:
        print(json.dumps({"runs": rows}, indent=1))
    elif not rows:
        print(f"no sweep or training run in {runs_folder}")
    else:
        cells = [list(rows[0]), *([cell or "" for cell in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            padded = [f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)]
            print("  ".join(padded).rstrip())


def _summarize_run(found: FoundRun) -> dict[str, str | None]:
    """Return {title: cell} of a sweep or training run."""
    from raysweep.result_loading import find_sweep_state, load_training_run

    row = {"name": found.path.name, "kind": found.kind}
    if found.ledger is None:
        run = load_training_run(found.path)
        if run.config is None:
            return {**row, "state": run.state, "method": None, "done": "0 epochs", "best": None}
        method, objective = run.config.method.name, str(run.config.validation.objective)
        state, done = run.state, f"{run.n_epochs} of {run.config.epochs} epochs"
        score, name = run.best.get(objective), objective
    else:
        ledger = found.ledger
        method, objective = ledger.space.trial_config({}).method.name, ledger.space.objectives[0]
        state = find_sweep_state(ledger)
        done = f"{ledger.count_ended_trials()} of {ledger.space.n_trials} trials"
        best_trial = ledger.find_best_trial()
        score, name = best_trial.score(objective) if best_trial else None, ledger.space.score_name
    best = None if score is None else f"{name} {score:.3f}"
    return {**row, "state": state, "method": method, "done": done, "best": best}


def _list_described_names() -> dict[str, Mapping[str, str]]:
    """Return {kind: {name: line about it}} for what is defined in Python."""
    from raysweep.attacks import ATTACK_DESCRIPTIONS
    from raysweep.catalog import METHODS
    from raysweep.data.dataset_loaders import DATASET_LOADERS
    from raysweep.models import MODELS
    from raysweep.training.validation import OBJECTIVE_DESCRIPTIONS

    return {
        "methods": _summarize_docstrings(METHODS),
        "models": _summarize_docstrings(MODELS),
        "data": _summarize_docstrings(DATASET_LOADERS),
        "attacks": ATTACK_DESCRIPTIONS,
        "metrics": OBJECTIVE_DESCRIPTIONS,
    }


def _summarize_docstrings(entries: Mapping[str, Callable[..., Any]]) -> dict[str, str]:
    """Return the first line of each docstring."""
    return {name: (inspect.getdoc(entry) or "").split("\n")[0] for name, entry in entries.items()}


def _print_table(title: str, rows: Mapping[str, str]) -> None:
    """Print a name and its description per line."""
    width = max(map(len, rows))
    print(title)
    for name, description in rows.items():
        print(f"  {name:<{width}}  {description}")


def _print_names(title: str, names: Iterable[str]) -> None:
    """Print names without descriptions, several per line."""
    text = textwrap.fill(
        "  ".join(names),
        _LINE_WIDTH,
        initial_indent="  ",
        subsequent_indent="  ",
        break_on_hyphens=False,
    )
    print(f"{title}\n{text}")
