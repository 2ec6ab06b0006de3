"""Sweep listener that records a sweep in MLflow.

The sweep is a parent run and its trials are child runs; each is found again by its tags. All is
written by the thread of a `RecordQueue`, so that the driver never waits for MLflow.
"""

import logging
import shlex
import threading
from collections.abc import Sequence
from typing import NamedTuple

from raysweep.data import DatasetSplits
from raysweep.errors import is_interruption
from raysweep.record_queue import RecordQueue, RecordStoreUnavailable
from raysweep.spec import SpecError
from raysweep.sweep.base_comparison import compare_with_base
from raysweep.sweep.conclusions import describe_conclusions
from raysweep.sweep.epoch_counts import count_epochs
from raysweep.sweep.finalist_summary import summarize_finalists
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.repeat_summary import summarize_repeats
from raysweep.sweep.search_space import param_labels
from raysweep.sweep.spread_summary import format_trial_numbers, summarize_spread
from raysweep.sweep.trial import RunKind, Trial, identify_run_folder
from raysweep.sweep.trial_advice import advise_on_trial
from raysweep.tracking.mlflow_tracker import (
    EpochRecord,
    FoundRun,
    RunStatus,
    Tracker,
    current_time_ms,
    format_mlflow_param,
)
from raysweep.training.checkpoint import RunDirectory, TrainingCheckpoint, read_checkpoint
from raysweep.training.failure_reports import TRACEBACK_FILE
from raysweep.training.metric_history import EpochMetrics
from raysweep.unrecorded_folders import clear_unrecorded, note_unrecorded

logger = logging.getLogger(__name__)

# Figures take a second for each trial, and weights the space of the store.
_N_SHOWN_TRIALS = 3
# Until then, the processes of the first trials start.
_START_DELAY_SECONDS = 5.0
# Updates of a trial that wait for MLflow in memory.
_MAX_WAITING_UPDATES = 50
# Tag with the number of epochs that an ended run has.
_EPOCHS_TAG = "epochs"
_KIND_TAG, _SWEEP_TAG, _TRIAL_TAG = "raysweep.kind", "raysweep.sweep", "raysweep.trial"
_RUN_STATUS_BY_STATE: dict[str, RunStatus] = {
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "failed": "FAILED",
    "running": "KILLED",
}


class _TrialUpdate(NamedTuple):
    """A trial after one event; `epoch` is None unless it reported one."""

    trial: Trial
    epoch: EpochRecord | None


class SweepTracker:
    """Sweep listener that writes to MLflow.

    The updates of a trial that come while others are written share their requests.

    Args:
        tracker: Client of the store.
        dataset: The sweep's data; None to log no data set, and models that only raysweep can load.
        records: Queue that its owner finishes, such as that of a pipeline; by default the tracker
            has its own and finishes it at the end of the sweep.
    """

    def __init__(
        self,
        tracker: Tracker,
        dataset: DatasetSplits | None = None,
        records: RecordQueue | None = None,
    ) -> None:
        self._tracker = tracker
        self._dataset = dataset
        # By the trials' keys.
        self._trial_run_ids: dict[str, str] = {}
        self._updates: dict[str, list[_TrialUpdate]] = {}
        self._updates_lock = threading.Lock()
        # The ledger has all that the records are made of.
        self._owns_records = records is None
        self._records = records or RecordQueue(
            "MLflow store", tracker.uri, start_delay_seconds=_START_DELAY_SECONDS
        )

    def on_sweep_start(self, ledger: Ledger, concurrency: int) -> None:
        """Open the sweep's run, and close runs of ended trials that are still open.

        Raises InfrastructureError if the store does not answer yet; later outages end nothing.
        """
        self._ledger = ledger
        self._param_labels = param_labels(list(ledger.space.space))
        self._tracker.require_working_store()
        note_unrecorded(ledger.path)
        # As they are now: the record is written later, and trials that end meanwhile write theirs.
        ended = [run for run in ledger.load_all_runs() if run.state != "running"]
        self._records.write(lambda: self._open_sweep_run(ended))

    def on_trial_update(self, trial: Trial, epoch_metrics: EpochMetrics | None) -> None:
        """Log an epoch or the end of a trial."""
        epoch = None
        if epoch_metrics is not None:
            epoch = EpochRecord(epoch_metrics, trial.epoch, current_time_ms())
        with self._updates_lock:
            updates = self._updates.setdefault(trial.key, [])
            is_scheduled = bool(updates)
            if len(updates) >= _MAX_WAITING_UPDATES:
                # A long outage: what MLflow lacks is read from the checkpoints when it is back.
                updates.clear()
                self._trial_run_ids.pop(trial.key, None)
                epoch = None
            updates.append(_TrialUpdate(trial, epoch))
        if not is_scheduled:
            self._records.write(lambda: self._write_updates(trial.key))

    def on_base_run_update(self, run: Trial, epoch_metrics: EpochMetrics | None) -> None:
        """Log an epoch or the end of a base run."""
        self.on_trial_update(run, epoch_metrics)

    def on_repeat_update(self, run: Trial, epoch_metrics: EpochMetrics | None) -> None:
        """Log an epoch or the end of a repeat."""
        self.on_trial_update(run, epoch_metrics)

    def on_finalist_update(self, trial: Trial, n_left: int) -> None:
        """Nothing to write yet: `on_sweep_end` logs the results of all finalists."""

    def on_sweep_end(self, ledger: Ledger, error: BaseException | None = None) -> None:
        """Log the results of the sweep, plot the best trials, and end all runs."""
        if ledger.is_lost():
            # Another driver has taken the sweep over and writes its runs.
            if self._owns_records:
                self._records.discard()
            return
        self._records.write(lambda: self._log_sweep_end(ledger, error))
        if self._owns_records:
            self._records.finish(f"; `raysweep sync {ledger.name}` writes them")

    def flush(self) -> bool:
        """Wait until all is written or the store fails; return whether all is written."""
        return self._records.flush()

    def _open_sweep_run(self, ended: Sequence[Trial]) -> None:
        """Open the sweep's run, and complete those of trials that had ended when it began."""
        ledger = self._ledger
        tags = {_KIND_TAG: "sweep", _SWEEP_TAG: ledger.key}
        self._sweep_run_id = self._tracker.get_or_create_run(ledger.name, tags)
        config = ledger.space.trial_config({})
        self._tracker.log_config(self._sweep_run_id, config, self._dataset)
        self._tracker.log_json(self._sweep_run_id, ledger.space.to_stored_dict(), "space.json")
        self._complete_ended_runs(ended)

    def _write_updates(self, key: str) -> None:
        """Write what a trial has reported since the last time."""
        with self._updates_lock:
            updates = self._updates.pop(key, [])
        if not updates or self._ledger.is_lost():
            return
        try:
            self._log_updates(updates)
        except RecordStoreUnavailable as error:
            if not error.is_final:
                with self._updates_lock:
                    self._updates[key] = [*updates, *self._updates.get(key, [])]
            raise

    def _log_updates(self, updates: list[_TrialUpdate]) -> None:
        """Log the epochs and the end of a trial."""
        latest = updates[-1].trial
        epochs = [update.epoch for update in updates if update.epoch is not None]
        run_id = self._trial_run_ids.get(latest.key) or self._open_trial_run(updates[0].trial)
        self._tracker.log_epochs(run_id, epochs)
        if latest.state != "running":
            self._end_trial_run(run_id, latest)

    def _log_sweep_end(self, ledger: Ledger, error: BaseException | None) -> None:
        """Log the results of the sweep, plot the best trials, and end all runs."""
        trials = ledger.load_trials()
        for trial in ledger.load_all_runs():
            # This includes runs that an earlier driver left open and this one did not resume.
            if trial.state == "running":
                if trial.key not in self._trial_run_ids:
                    self._open_trial_run(trial)
                self._tracker.end_run(self._trial_run_ids[trial.key], "KILLED")
        ranked_trials = ledger.rank_trials()
        for trial in ranked_trials[:_N_SHOWN_TRIALS]:
            self._upload_trial(ledger, trial)
        best_trial = ledger.find_best_trial()
        if best_trial is not None:
            self._tracker.log_best(self._sweep_run_id, best_trial.best)
            final = {"trials": float(len(trials)), **_score_metrics(ledger, best_trial)}
            self._tracker.log_final(self._sweep_run_id, final)
            self._tracker.set_tags(self._sweep_run_id, {"best_trial": f"{best_trial.number:04d}"})
        self._log_finalists(ledger)
        self._log_repeats(ledger)
        self._log_spread(ledger)
        self._log_base_comparison(ledger)
        self._tracker.set_description(
            self._sweep_run_id, self._summarize_sweep(ledger, trials, ranked_trials)
        )
        self._tracker.end_run(self._sweep_run_id, _choose_sweep_status(ledger, error))
        if not self._records.has_lost_records:
            clear_unrecorded(ledger.path)

    def _log_finalists(self, ledger: Ledger) -> None:
        """Log what AutoAttack says of the finalists, to their runs and to that of the sweep."""
        summary = summarize_finalists(ledger)
        if summary is None:
            return
        corrected_score = _score_metric_name(ledger, "finalist/corrected_score")
        for trial, overestimate in zip(summary.by_objective, summary.overestimates, strict=True):
            metrics = {
                "finalist/robust_accuracy": trial.final_value(summary.objective),
                "finalist/overestimate": overestimate,
                corrected_score: trial.corrected_score(summary.objective),
            }
            if run_id := self._find_trial_run(trial):
                self._tracker.log_final(run_id, metrics)
        best_trial = summary.by_autoattack[0]
        metrics = {
            "finalist/robust_accuracy": best_trial.final_value(summary.objective),
            "finalist/overestimate": max(summary.overestimates),
            "finalist/gain": summary.gain,
            corrected_score: best_trial.corrected_score(summary.objective),
        }
        self._tracker.log_final(self._sweep_run_id, metrics)

    def _log_repeats(self, ledger: Ledger) -> None:
        """Log the mean over the seeds, to the runs of the repeated trials and to that of the sweep,
        which gets that of the best.
        """
        summary = summarize_repeats(ledger)
        if summary is None:
            return
        name = _score_metric_name(ledger, "repeat/mean")
        for trial in summary.trials:
            mean, n_seeds = trial.score(summary.objective), float(len(trial.trainings))
            run_ids = [self._find_trial_run(trial)]
            if trial.number == summary.trials[0].number:
                run_ids.append(self._sweep_run_id)
            for run_id in run_ids:
                if run_id:
                    self._tracker.log_final(run_id, {name: mean, "repeat/seeds": n_seeds})

    def _log_spread(self, ledger: Ledger) -> None:
        """Log which trials cannot be told apart from the best, and the settings' share."""
        summary = summarize_spread(ledger)
        if summary is None:
            return
        metrics = {"spread/trials_like_best": float(len(summary.like_best))}
        if (split := summary.split) is not None:
            metrics |= {
                "spread/settings_share": split.share,
                "spread/settings_share_low": split.share_low,
                "spread/settings_share_high": split.share_high,
            }
            if summary.rung is not None:
                metrics["spread/rung"] = float(summary.rung)
        self._tracker.log_final(self._sweep_run_id, metrics)
        like_best = format_trial_numbers(summary.like_best) or "none"
        tags = {"like_best": like_best, "ended_early": ledger.load_early_end() or "no"}
        self._tracker.set_tags(self._sweep_run_id, tags)

    def _log_base_comparison(self, ledger: Ledger) -> None:
        """Log whether the best trial beats the base method."""
        comparison = compare_with_base(ledger)
        if comparison is None:
            return
        pair = comparison.difference
        metrics = {
            "base/difference": pair.difference,
            "base/difference_low": pair.low,
            "base/difference_high": pair.high,
        }
        self._tracker.log_final(self._sweep_run_id, metrics)
        tags = {"base_method": comparison.base_method, "beats_base": comparison.verdict}
        self._tracker.set_tags(self._sweep_run_id, tags)

    def _upload_trial(self, ledger: Ledger, trial: Trial) -> None:
        """Upload the figures of a trial, and the weights of its best epoch, to its run."""
        last = RunDirectory(ledger.trial_path(trial.number)).read_last_checkpoint()
        run_id = self._find_trial_run(trial)
        if run_id is None or last is None:
            return
        self._tracker.log_training_plots(run_id, last.path.parent, last.history)
        best_path = ledger.best_checkpoint_path(trial)
        if trial.best and best_path.fetch_checkpoint() is not None:
            self._tracker.log_model(run_id, read_checkpoint(best_path), self._dataset)

    def _summarize_sweep(
        self, ledger: Ledger, trials: list[Trial], ranked_trials: list[Trial]
    ) -> list[str]:
        """Describe in lines the progress of the sweep, its best trials, and the next command."""
        ended = [trial for trial in trials if trial.state != "running"]
        n_failed = sum(trial.state == "failed" for trial in ended)
        failures = f", {n_failed} of them failed" if n_failed else ""
        lines = [
            f"{len(ended)} of {ledger.space.n_trials} trials ended{failures}",
            str(count_epochs(ledger.load_all_runs())),
        ]
        best_trial, objectives = ledger.find_best_trial(), ledger.space.objectives
        if best_trial is None:
            return lines
        lines.append(
            f"best: trial {best_trial.number:04d}, "
            f"{_metric_title(ledger.space.score_name)} {best_trial.score(objectives[0]):.3f} "
            f"{_describe_origin(ledger, best_trial)}: {self._summarize_params(best_trial)}"
        )
        if len(objectives) > 1:
            titles = " and ".join(map(_metric_title, objectives))
            front = _format_trial_numbers(ledger.unmasked_pareto_front())
            lines.append(f"Pareto front of {titles}: {front or 'empty'}")
        lines += describe_conclusions(ledger)
        masked_trials = [
            trial
            for trial in ranked_trials
            if trial.state != "failed" and ledger.exceeds_masking_gap(trial)
        ]
        if masked_trials:
            lines.append(
                f"masking gap over {ledger.space.max_masking_gap}: "
                f"{_format_trial_numbers(masked_trials)} are ranked last"
            )
        checkpoint_uri = ledger.best_checkpoint_path(best_trial)
        return [*lines, f"next: raysweep eval {shlex.quote(str(checkpoint_uri))}"]

    def _complete_ended_runs(self, ended: Sequence[Trial]) -> None:
        """Complete the runs of ended trials: a driver was killed, or MLflow did not answer."""
        if not ended:
            return
        found = {
            (run.tags.get(_TRIAL_TAG), run.tags.get(_KIND_TAG)): run
            for run in reversed(self._tracker.list_runs({_SWEEP_TAG: self._ledger.key}))
        }
        for trial in ended:
            tags = _trial_run_tags(self._ledger, trial.kind, trial.key)
            run = found.get((tags[_TRIAL_TAG], tags[_KIND_TAG]))
            if run is None or not _is_complete(run, trial):
                self._end_trial_run(self._open_trial_run(trial), trial)

    def _find_trial_run(self, trial: Trial) -> str | None:
        """Return the id of the trial's run; None if it has none."""
        tags = _trial_run_tags(self._ledger, trial.kind, trial.key)
        return self._trial_run_ids.get(trial.key) or self._tracker.find_run(tags)

    def _open_trial_run(self, trial: Trial) -> str:
        """Open the trial's run, log its config and the epochs that it lacks, and return its id."""
        tags = _trial_run_tags(self._ledger, trial.kind, trial.key)
        # The number comes first because the UI truncates names.
        name = f"{self._ledger.describe_row(trial)} {self._ledger.name}"
        run_id = self._tracker.get_or_create_run(name, tags, self._sweep_run_id)
        try:
            config = self._ledger.find_config(trial)
        except SpecError:
            # Its params are not valid together, so that it has failed.
            logger.debug("%s has no config", trial.title)
        else:
            self._tracker.log_config(run_id, config, self._dataset)
        self._tracker.set_tags(run_id, {"searched": self._summarize_params(trial)})
        if trial.epoch:
            self._log_missing_epochs(run_id, trial)
        # Only now, because all of this is repeated after an outage.
        self._trial_run_ids[trial.key] = run_id
        return run_id

    def _log_missing_epochs(self, run_id: str, trial: Trial) -> None:
        """Log the epochs that the ledger has and MLflow lacks, because a driver was killed."""
        last_logged = self._tracker.get_last_epoch(run_id)
        meta = RunDirectory(self._ledger.run_path(trial)).read_last_meta()
        if meta is None:
            return
        now = current_time_ms()
        missing = [
            EpochRecord(row, int(row["epoch"]), now)
            for row in meta["history"]
            if last_logged < row["epoch"] <= trial.epoch
        ]
        self._tracker.log_epochs(run_id, missing)

    def _summarize_params(self, trial: Trial) -> str:
        """Return the trial's params as `label=value, ...`."""
        return ", ".join(
            f"{self._param_labels.get(path, path)}={format_mlflow_param(value)}"
            for path, value in trial.params.items()
        )

    def _end_trial_run(self, run_id: str, trial: Trial) -> None:
        """Log how a trial ended, with its best checkpoint, and end its run."""
        if trial.best:
            self._tracker.log_best(run_id, trial.best)
            if score := _score_metrics(self._ledger, trial):
                self._tracker.log_final(run_id, score)
        traceback_path = self._ledger.run_path(trial) / TRACEBACK_FILE
        if trial.state == "failed" and traceback_path.is_file():
            self._tracker.log_text(run_id, traceback_path.read_text(), TRACEBACK_FILE)
        description = advise_on_trial(self._ledger, trial.number) if trial.kind == "trial" else []
        # A trial that runs again has the reason of its earlier end.
        self._tracker.delete_tags(run_id, ["reason"])
        tags = {"state": trial.state, _EPOCHS_TAG: str(trial.epoch)}
        if trial.reason:
            description = [f"{trial.state}: {trial.reason}", *description]
            tags["reason"] = trial.reason
        self._tracker.set_description(run_id, description)
        self._tracker.set_tags(run_id, tags)
        self._tracker.end_run(run_id, _RUN_STATUS_BY_STATE[trial.state])


def _is_complete(run: FoundRun, trial: Trial) -> bool:
    """Return whether MLflow has the end of a trial, and with it all that came before."""
    return (
        run.status == _RUN_STATUS_BY_STATE[trial.state]
        and run.tags.get("state") == trial.state
        and run.tags.get(_EPOCHS_TAG) == str(trial.epoch)
    )


def _choose_sweep_status(ledger: Ledger, error: BaseException | None) -> RunStatus:
    """Return the status of a sweep's run: FAILED after an error or without any result."""
    if error is not None and not is_interruption(error):
        return "FAILED"
    if not ledger.has_ended():
        return "KILLED"
    return "FAILED" if ledger.find_best_trial() is None else "FINISHED"


def checkpoint_run_tags(checkpoint: TrainingCheckpoint) -> dict[str, str]:
    """Return the tags that identify the MLflow run in which a checkpoint was trained.

    Args:
        checkpoint: A checkpoint of `raysweep train` or of a sweep's trial.
    """
    folder = checkpoint.path.parent
    identity = identify_run_folder(folder)
    if identity and (folder / "trial.json").is_file():
        return _trial_run_tags(Ledger.open(folder.parent.parent), *identity)
    return training_run_tags(RunDirectory(folder))


def training_run_tags(run_directory: RunDirectory) -> dict[str, str]:
    """Return the tags that identify the MLflow run of `raysweep train` in a folder."""
    return {_KIND_TAG: "train", "raysweep.run": run_directory.run_key}


def _trial_run_tags(ledger: Ledger, kind: RunKind, key: str) -> dict[str, str]:
    """Return the tags that identify the MLflow run of a trial, base run or repeat."""
    return {_KIND_TAG: kind, _SWEEP_TAG: ledger.key, _TRIAL_TAG: key}


def _format_trial_numbers(trials: list[Trial]) -> str:
    """Return the numbers of trials as `0000, 0001`."""
    return ", ".join(f"{trial.number:04d}" for trial in trials)


def _score_metrics(ledger: Ledger, trial: Trial) -> dict[str, float]:
    """Return the score of a trial as a metric; {} if it is the objective of its best epoch."""
    if not trial.averages:
        return {}
    name = _score_metric_name(ledger, "score")
    return {name: trial.score(ledger.space.objectives[0])}


def _score_metric_name(ledger: Ledger, name: str) -> str:
    """Return the name in MLflow of a metric that is a score of trials.

    MLflow shows the runs of several sweeps in one table, and scores with a margin are of another
    scale than those without.
    """
    return f"{name}_with_margin" if ledger.space.has_margin_in_score else name


def _describe_origin(ledger: Ledger, trial: Trial) -> str:
    """Describe from which seeds or epochs the score of a trial is computed."""
    if trial.repeats:
        return f"as the mean over {len(trial.trainings)} seeds"
    if trial.averages:
        return ledger.space.describe_score_epochs(trial.best["epoch"])
    return f"in epoch {trial.best['epoch']:.0f}"


def _metric_title(metric: str) -> str:
    """Return a metric's name with spaces."""
    return metric.replace("_", " ")
