"""Find sweeps, trials and training runs by the names that commands print and take."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raysweep.spec import SpecError, describe_unknown_name
from raysweep.stores import StorePath, is_uri, open_path, require_reachable
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.trial import RunKind, Trial, identify_run_folder
from raysweep.tracking import Tracker, tracking_uri
from raysweep.user_folders import expand_home

# An MLflow run's id.
_RUN_ID_PATTERN = re.compile(r"[0-9a-f]{32}")
_RUNS_PREFIX = "runs/"
_TRIAL_PATTERN = re.compile(
    r"(?P<sweep>.+?)/((?P<base>base[-/])?|repeats/)(?P<number>[0-9]+)(-seed-(?P<seed>[0-9]+))?"
)


@dataclass(frozen=True)
class FoundRun:
    """What a name means in the folder of all runs.

    Attributes:
        path: Folder of the sweep, trial or training run.
        ledger: The sweep, also of a trial; None for a training run.
        run_kind: Whether it is a trial, a base run or a repeat; None for a sweep or training run.
        run_key: Its name in the sweep, such as `0003` or `base-0000` (see `Trial.key`); "" for a
            sweep or training run.
    """

    path: StorePath
    ledger: Ledger | None = None
    run_kind: RunKind | None = None
    run_key: str = ""

    @property
    def kind(self) -> RunKind | Literal["sweep", "training run"]:
        """What it is, for messages."""
        if self.ledger is None:
            return "training run"
        return self.run_kind or "sweep"


def find_run(name: str, runs_folder: StorePath) -> FoundRun | None:
    """Find what SWEEP, SWEEP/0003, SWEEP/base-0000, SWEEP/0003-seed-1, RUN or a folder names.

    Args:
        name: The name, as the user typed it; `runs/` before it is left out. Or the path or URI of a
            folder, if no run has this name.
        runs_folder: The folder of all sweeps and training runs.

    Returns:
        What it names; None if there is nothing of this name.

    Raises:
        SpecError: The sweep has no such trial.
    """
    return _find_named_run(name, runs_folder) or _find_run_at(name)


def _find_named_run(name: str, runs_folder: StorePath) -> FoundRun | None:
    """Find a sweep, trial or training run by its name in the folder of all runs."""
    name = name.removeprefix(_RUNS_PREFIX).rstrip("/")
    # No run's name starts with a point; `./NAME` is a path.
    if not name or name.startswith(".") or Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    part = _TRIAL_PATTERN.fullmatch(name)
    if part and (runs_folder / part["sweep"] / "sweep.json").is_file():
        kind: RunKind = "base run" if part["base"] else "repeat" if part["seed"] else "trial"
        params = {"seed": int(part["seed"])} if part["seed"] else {}
        run = Trial(int(part["number"]), params, kind=kind)
        return _find_trial(Ledger.open(runs_folder / part["sweep"]), run)
    return _identify_run(runs_folder / name)


def _find_trial(ledger: Ledger, wanted: Trial) -> FoundRun:
    """Find a trial, base run or repeat of a sweep. Raises SpecError if it does not have it."""
    runs = [run for run in ledger.load_all_runs() if run.kind == wanted.kind]
    for run in runs:
        if run.key == wanted.key:
            return FoundRun(ledger.run_path(run), ledger, run.kind, run.key)
    if wanted.kind == "repeat":
        names = ", ".join(run.key for run in runs) or "none"
        raise SpecError(f"{ledger.name} has no repeat {wanted.key}; its repeats: {names}")
    raise SpecError(f"{ledger.name} has no {wanted.title}: it has {len(runs)}, counted from 0000")


def _find_run_at(path_or_uri: str) -> FoundRun | None:
    """Find the sweep, trial or training run of a folder."""
    if not is_uri(path_or_uri) and not expand_home(path_or_uri).is_dir():
        return None
    folder = open_path(path_or_uri)
    require_reachable(folder)
    if identity := identify_run_folder(folder):
        sweep = folder.parent.parent
        if (sweep / "sweep.json").is_file():
            return FoundRun(folder, Ledger.open(sweep), *identity)
    return _identify_run(folder)


def _identify_run(folder: StorePath) -> FoundRun | None:
    """Return the sweep or training run whose folder this is; None for other folders."""
    if (folder / "sweep.json").is_file():
        return FoundRun(folder, Ledger.open(folder))
    return FoundRun(folder) if (folder / "run.json").is_file() else None


def list_runs(runs_folder: StorePath) -> list[FoundRun]:
    """List the sweeps and training runs of a folder, by name."""
    sweeps = runs_folder.list_folders_containing("sweep.json")
    runs = set(runs_folder.list_folders_containing("run.json")) - set(sweeps)
    found = [FoundRun(runs_folder / name, Ledger.open(runs_folder / name)) for name in sweeps]
    found += [FoundRun(runs_folder / name) for name in runs]
    return sorted(found, key=lambda run: run.path.name)


def is_mlflow_reference(name: str) -> bool:
    """Return whether a name is `runs:/ID`, `models:/NAME` or the id of an MLflow run."""
    return bool(_RUN_ID_PATTERN.fullmatch(name)) or name.startswith(("runs:/", "models:/"))


def download_from_mlflow(reference: str, tracker: Tracker, out: Path) -> tuple[str, Path]:
    """Download the checkpoint of a run or registered model.

    Args:
        reference: See `is_mlflow_reference`.
        tracker: The MLflow store.
        out: Folder of `runs`.

    Returns:
        Id of the MLflow run, and folder of the checkpoint.

    Raises:
        SpecError: There is no such checkpoint.
        InfrastructureError: The store does not answer.
    """
    return tracker.download_checkpoint(reference, out / "runs" / "from-mlflow")


def find_checkpoint_folder(name: str, runs_folder: StorePath) -> StorePath:
    """Find the folder of a checkpoint or run.

    Args:
        name: A path, a URI, a training run, a trial, or a sweep, whose best trial is meant.
        runs_folder: The folder of all sweeps and training runs.

    Returns:
        Folder of a checkpoint, or of a run, whose best epoch is meant.

    Raises:
        SpecError: There is no such sweep, trial, run or folder, or the sweep has no result.
    """
    if not is_uri(name) and not expand_home(name).exists():
        found = find_run(name, runs_folder)
        if found is None:
            names = [run.path.name for run in list_runs(runs_folder)]
            if names:
                noun = "sweep, trial, training run or folder"
                raise SpecError(describe_unknown_name(noun, name, names))
        elif found.kind == "sweep":
            return find_best_checkpoint(Ledger.open(found.path))
        else:
            return found.path
    path = open_path(name)
    require_reachable(path)
    if (path / "sweep.json").is_file():
        return find_best_checkpoint(Ledger.open(path))
    return path


def find_best_checkpoint(ledger: Ledger) -> StorePath:
    """Return the folder of the best epoch of a sweep's best trial.

    Raises:
        SpecError: No trial has a value of the objective yet, or all that have one failed.
    """
    best_trial = ledger.find_best_trial()
    if best_trial is None:
        objective = ledger.space.objectives[0]
        raise SpecError(f"{ledger.path}: no trial has reported {objective} yet, except failed ones")
    return ledger.best_checkpoint_path(best_trial)


def open_default_tracker(out: Path) -> Tracker:
    """Open the MLflow store of a folder. Raises InfrastructureError if it does not answer."""
    return Tracker(tracking_uri(out), out / "mlruns").wait_until_ready()
