"""One module for each command: `run(args) -> exit code`, and what several of them share."""

import importlib.util
import os
import re
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

from raysweep import storage
from raysweep.spec import SpecError, is_safe_name, parse_yaml
from raysweep.sweep.ledger import Ledger
from raysweep.tracking import NullTracker, Tracker, tracking_uri

# What else there is beside sweeps and runs.
_RESERVED_NAMES = ("pipelines", "eval", "from-mlflow")


def parse_overrides(args: Namespace) -> dict[str, Any]:
    """`--set` and `--data-dir` as {dotted path: value}; values are read as YAML. Raises SpecError
    for a missing `=`.
    """
    changes: dict[str, Any] = {}
    for item in args.set:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise SpecError(f"--set {item!r}: expected PATH=VALUE, for example --set epochs=20")
        try:
            changes[path] = parse_yaml(text)
        except yaml.YAMLError:
            raise SpecError(f"--set {item!r}: {text!r} is not a YAML value") from None
    if args.data_dir is not None:
        changes["data.data_dir"] = str(args.data_dir.resolve())
    return changes


def parse_data_overrides(args: Namespace, command_label: str) -> dict[str, Any]:
    """What `--set data.*` and `--data-dir` change of `data`. SpecError for the rest, nothing `to`
    this command.
    """
    changes = parse_overrides(args)
    if foreign := [key for key in changes if not key.startswith("data.")]:
        raise SpecError(
            [f"--set {key}: only data.* settings matter to {command_label}" for key in foreign]
        )
    return {key.removeprefix("data."): value for key, value in changes.items()}


def make_writable_folder(folder: Path, option: str = "--out") -> Path:
    """`folder`, made if need be. Raises SpecError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"{option} {folder}: cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise SpecError(f"{option} {folder}: cannot be written")
    return folder.resolve()


def resolve_runs_folder(args: Namespace, for_writing: bool = True) -> Path:
    """The folder of all runs: `--storage`, else `runs` in `--out`. Raises SpecError if it is out of
    reach.
    """
    if args.storage is None:
        return args.out.resolve() / "runs"  # type: ignore[no-any-return]
    folder = storage.require_reachable(args.storage)
    return make_writable_folder(folder, "--storage") if for_writing else folder


def find_sweep_or_trial(name: str, runs_folder: Path) -> tuple[Ledger, int | None] | None:
    """The sweep in the folder of all runs, and the trial's number if it is one, that SWEEP or
    SWEEP/0003 names.

    None if there is no such sweep; raises SpecError if it has no such trial.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    sweep, _, number = name.rpartition("/")
    if storage.pull_file(runs_folder / name / "sweep.json"):
        return Ledger.open(runs_folder / name), None
    if number.isdecimal() and storage.pull_file(runs_folder / sweep / "sweep.json"):
        ledger = Ledger.open(runs_folder / sweep)
        numbers = [trial.number for trial in ledger.load_trials()]
        if int(number) not in numbers:
            raise SpecError(
                f"{sweep} has no trial {int(number):04d}: it has {len(numbers)}, counted from 0000"
            )
        return ledger, int(number)
    return None


def format_location_flags(args: Namespace) -> str:
    """`--out` and `--storage` as they were given, for a command to type next."""
    out = [] if args.out == Path() else ["--out", str(args.out)]
    return "".join(
        f" {shlex.quote(part)}"
        for part in (*out, *(["--storage", args.storage] if args.storage else []))
    )


def check_plain_name(name: str, option: str) -> str:
    """A name that is a folder's name and nothing more, and not that of a folder with another use."""
    if name in _RESERVED_NAMES:
        raise SpecError(
            f"{option} {name!r}: in that folder raysweep keeps other things; choose another"
        )
    if not is_safe_name(name):
        raise SpecError(
            f"{option} {name!r}: use letters, digits, '-', '_' and '.', not starting with '.'"
        )
    return name


def open_tracker(out: Path) -> Tracker:
    """Open the MLflow store of `out`. Without MLflow, warn and return a tracker that keeps nothing.

    Raises SpecError, in one line, if the store does not answer.
    """
    if importlib.util.find_spec("mlflow") is None:
        print(
            "raysweep: warning: MLflow is not installed, nothing is tracked: pip install mlflow",
            file=sys.stderr,
        )
        return NullTracker()
    return Tracker(tracking_uri(out), out / "mlruns").wait_until_ready()


def format_ui_command(tracking_uri: str) -> str:
    """What to type to look at an MLflow store; never a password."""
    if tracking_uri == f"sqlite:///{(Path() / 'mlflow.db').resolve()}":
        return "mlflow ui"
    if tracking_uri.startswith("http"):
        return f"open {re.sub('//[^/]*@', '//', tracking_uri)}"
    # A server's database can only be that of the environment.
    store = tracking_uri if tracking_uri.startswith("sqlite") else '"$MLFLOW_TRACKING_URI"'
    return f"mlflow ui --backend-store-uri {store}"
