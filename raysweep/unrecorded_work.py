"""Find work of which MLflow lacks records, and write them from its files."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raysweep.checkpoint_evaluation import EvaluationRecord, log_evaluation
from raysweep.data import DatasetSplits, load_data
from raysweep.errors import InfrastructureError, RaysweepError
from raysweep.formatting import format_count
from raysweep.leases import hold_folder_lease, hold_pipeline_lock, is_folder_in_use
from raysweep.pipeline.artifact import Artifact
from raysweep.pipeline.facts import ReportFacts
from raysweep.pipeline.report.stage import log_report_files
from raysweep.record_queue import RecordQueue
from raysweep.stores import StorePath, open_path
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.trial import RUN_FOLDERS
from raysweep.tracking import RunRecorder, SweepTracker, Tracker, training_run_tags
from raysweep.training import checkpoint
from raysweep.training.checkpoint import RunDirectory
from raysweep.training.config import TrainingConfig
from raysweep.training.failure_reports import load_failure_report
from raysweep.training.selection import find_best_epoch
from raysweep.unrecorded_folders import UNRECORDED_FILE, clear_unrecorded, read_unrecorded

logger = logging.getLogger(__name__)

WorkKind = Literal["sweep", "training run", "evaluation", "pipeline"]

# Where sweeps, training runs and evaluations are, below the folder of all runs: those of a name,
# and those of a pipeline that runs every night. Evaluations are beside their checkpoint.
_RUN_PATTERNS = ("[!.]*", "pipelines/*/sweeps/*/*")
_EVALUATION_PATTERNS = ("eval-*", *(f"{folder}/*/eval-*" for folder in RUN_FOLDERS))
_EVALUATION_TYPES: dict[str, Any] = {
    "name": str,
    "metrics": dict[str, float],
    "run_id": str | None,
    "run_tags": dict[str, str],
}


@dataclass(frozen=True)
class UnrecordedWork:
    """Work of which MLflow may lack records.

    Attributes:
        kind: What it is.
        folder: Its folder.
    """

    kind: WorkKind
    folder: StorePath

    @property
    def title(self) -> str:
        """What messages call it, such as `sweep g1`."""
        name = self.folder.name
        if self.kind == "evaluation":
            name = f"{self.folder.parent.name}/{name}"
        return f"{self.kind} {name}"

    def belongs_to(self, name: str) -> bool:
        """Return whether it is the work of this name, or a part of it, such as an evaluation."""
        return name in self.folder.key.split("/") or self.folder.name.startswith(f"{name}-0")


def list_unrecorded_work(out: Path, runs_folder: StorePath) -> list[UnrecordedWork]:
    """List the work of which MLflow lacks records, except for sweeps and runs in progress.

    Args:
        out: Output folder, which has the pipelines.
        runs_folder: Folder of all sweeps and training runs.

    Returns:
        Sweeps and training runs, then evaluations, which refer to them, then pipelines.
    """
    local_runs = open_path(out / "runs")
    found = [
        UnrecordedWork("sweep" if (folder / "sweep.json").is_file() else "training run", folder)
        for folder in _list_noted_folders([runs_folder], _RUN_PATTERNS)
    ]
    found = [work for work in found if not is_folder_in_use(work.folder)]
    # Evaluations of checkpoints in a bucket are in `out`.
    roots = [local_runs] if runs_folder.local_path is None else [local_runs, runs_folder]
    patterns = [f"{run}/{part}" for run in _RUN_PATTERNS for part in _EVALUATION_PATTERNS]
    for folder in _list_noted_folders(roots, [*patterns, "eval/*"]):
        found.append(UnrecordedWork("evaluation", folder))
    for folder in _list_noted_folders([local_runs], ["pipelines/*"]):
        if not is_folder_in_use(folder):
            found.append(UnrecordedWork("pipeline", folder))
    return found


def _list_noted_folders(roots: Iterable[StorePath], patterns: Iterable[str]) -> list[StorePath]:
    """Return the folders with a note below some folders, in the order of their keys."""
    found = {
        file.key: StorePath(root.store, file.key).parent
        for root in roots
        for pattern in patterns
        for file in root.list_files(f"{pattern}/{UNRECORDED_FILE}")
    }
    return [found[key] for key in sorted(found)]


def record_work(work: UnrecordedWork, tracker: Tracker) -> None:
    """Write to MLflow the records that it lacks of one piece of work, without a time limit.

    Args:
        work: The work.
        tracker: Client of the store.

    Raises:
        InfrastructureError: The store does not answer, or refused a record. One line.
        SpecError: A process works in its folder.
        DamagedFileError: A file of it is damaged. One line.
    """
    records = RecordQueue("MLflow store", tracker.uri, flush_seconds=None)
    try:
        if work.kind == "sweep":
            _record_sweep(work.folder, tracker, records)
        elif work.kind == "training run":
            _record_training_run(work.folder, tracker, records)
        elif work.kind == "evaluation":
            _record_evaluation(work.folder, tracker, records)
        else:
            _record_pipeline(work.folder, tracker, records)
    except RaysweepError:
        records.finish()
        raise
    if n_missing := records.finish("; run `raysweep sync` again"):
        raise InfrastructureError(f"MLflow lacks {format_count(n_missing, 'record')}")


def _record_sweep(folder: StorePath, tracker: Tracker, records: RecordQueue) -> None:
    """Write what MLflow lacks of a sweep and of its trials."""
    with hold_folder_lease(folder) as held_folder:
        ledger = Ledger.open(held_folder)
        dataset = _load_data(ledger.space.trial_config({}), ledger.find_data_fingerprint())
        listener = SweepTracker(tracker, dataset, records)
        listener.on_sweep_start(ledger, 0)
        listener.on_sweep_end(ledger)
        records.flush()


def _record_training_run(folder: StorePath, tracker: Tracker, records: RecordQueue) -> None:
    """Write what MLflow lacks of a training run."""
    with hold_folder_lease(folder) as held_folder:
        run_directory = RunDirectory(held_folder)
        last = run_directory.read_last_checkpoint()
        if last is None:
            # It ended in its first epoch: nothing says what it trained.
            clear_unrecorded(folder)
            return
        tags = training_run_tags(run_directory)
        run = RunRecorder(tracker, folder.name, tags, folder, records)
        n_logged_epochs = run.count_logged_epochs()
        dataset = _load_data(last.config, last.meta["data_fingerprint"])
        run.open(last.config, dataset)
        for row in last.history[n_logged_epochs:]:
            run.log_epoch(row)
        if load_failure_report(held_folder):
            run.end("FAILED")
        elif last.epoch < last.config.epochs:
            run.end("KILLED")
        else:
            saved_epochs = run_directory.list_saved_epochs()
            best_epoch = find_best_epoch(last.config, last.history, saved_epochs)
            best = checkpoint.read_checkpoint(run_directory.epoch_path(best_epoch))
            run.log_result(last.config, best, last, dataset)
        run.finish()


def _load_data(config: TrainingConfig, fingerprint: str | None) -> DatasetSplits | None:
    """Load the data of a training; None if they are missing or have changed."""
    try:
        dataset = load_data(config.data)
    except RaysweepError as error:
        logger.warning("MLflow gets no record of the data set: %s", error)
        return None
    return dataset if fingerprint in (None, dataset.fingerprint) else None


def _record_evaluation(folder: StorePath, tracker: Tracker, records: RecordQueue) -> None:
    """Write the metrics and files of an evaluation."""
    note = read_unrecorded(folder, _EVALUATION_TYPES)
    local_folder = folder.local_path
    if note is None or local_folder is None:
        return
    record = EvaluationRecord(**{name: note[name] for name in _EVALUATION_TYPES})
    records.write(lambda: log_evaluation(tracker, record, local_folder))


def _record_pipeline(folder: StorePath, tracker: Tracker, records: RecordQueue) -> None:
    """Write the reports of a pipeline; the records of its other stages have their own notes."""
    local_folder = folder.local_path
    assert local_folder is not None
    with hold_pipeline_lock(local_folder, wait=False):
        for artifact_folder in sorted(local_folder.glob("[0-9][0-9]-report-*")):
            artifact = Artifact.read_if_finished(artifact_folder)
            if artifact is None:
                continue
            verdict = artifact.read_facts(ReportFacts).verdict
            records.write(
                lambda path=artifact_folder, key=artifact.key, verdict=verdict: log_report_files(  # type: ignore[misc]
                    tracker, folder.name, key, path, verdict
                )
            )
        if records.flush() and not records.has_lost_records:
            clear_unrecorded(folder)
