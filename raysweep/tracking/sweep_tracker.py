"""A sweep in MLflow: a parent run, its trials as children, each found again by its tags."""

from collections.abc import Iterator

from raysweep import storage
from raysweep.results import advise_on_trial
from raysweep.sweep.epoch_counts import count_epochs
from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.search_space import param_labels
from raysweep.tracking.mlflow_tracker import RunStatus, Tracker, format_mlflow_param
from raysweep.training.checkpoint import RunDirectory, TrainingCheckpoint
from raysweep.training.failure_reports import TRACEBACK_FILE

# Figures take a second a trial: the best few get them.
_N_PLOTTED_TRIALS = 3
_RUN_STATUS_BY_STATE: dict[str, RunStatus] = {
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "failed": "FAILED",
    "running": "KILLED",
}


class SweepTracker:
    """A sweep as a parent run, its trials as children."""

    def __init__(self, tracker: Tracker, fingerprint: str = "") -> None:
        self._tracker = tracker
        self._fingerprint = fingerprint
        self._trial_run_ids: dict[int, str] = {}

    def on_sweep_start(self, ledger: Ledger, concurrency: int) -> None:
        self._ledger = ledger
        tags = {"raysweep.kind": "sweep", "raysweep.sweep": ledger.key}
        self._sweep_run_id = self._tracker.get_or_create_run(ledger.name, tags)
        self._param_labels = param_labels(list(ledger.space.space))
        self._config = ledger.space.trial_config({})
        self._tracker.log_config(self._sweep_run_id, self._config, self._fingerprint)
        self._tracker.log_json(self._sweep_run_id, ledger.space.to_stored_dict(), "space.json")
        for trial in ledger.load_trials():
            self._close_stale_run(trial)

    def on_trial_update(self, trial: Trial, epoch_metrics: dict[str, float] | None) -> None:
        run = self._trial_run_ids.get(trial.number) or self._open_trial_run(trial)
        if epoch_metrics is not None:
            self._tracker.log_metrics(run, epoch_metrics, trial.epoch)
        if trial.state != "running":
            self._end_trial_run(run, trial)

    def on_sweep_end(self, ledger: Ledger) -> None:
        trials = {trial.number: trial for trial in ledger.load_trials()}
        for trial in trials.values():
            # Also those that an earlier driver left open and this one had no time for.
            if trial.state == "running" and (run := self._find_trial_run(trial)):
                self._tracker.end_run(run, "KILLED")
        ranked = ledger.rank_trials()
        for trial in ranked[:_N_PLOTTED_TRIALS]:
            last = RunDirectory(ledger.trial_path(trial.number)).read_last_checkpoint()
            known = self._find_trial_run(trial)
            if known is not None and last is not None:
                self._tracker.log_training_plots(known, last.path.parent, last.history)
        if ranked:
            self._tracker.log_best(self._sweep_run_id, ranked[0].best)
            self._tracker.log_final(self._sweep_run_id, {"trials": float(len(trials))})
            self._tracker.set_tags(self._sweep_run_id, {"best_trial": f"{ranked[0].number:04d}"})
        self._tracker.set_description(
            self._sweep_run_id, list(self._summarize_sweep(ledger, list(trials.values()), ranked))
        )
        done = (
            all(trial.state != "running" for trial in trials.values())
            and len(trials) >= ledger.space.n_trials
        )
        self._tracker.end_run(self._sweep_run_id, "FINISHED" if done else "KILLED")

    def _summarize_sweep(
        self, ledger: Ledger, trials: list[Trial], ranked: list[Trial]
    ) -> Iterator[str]:
        """The parent's description: how the sweep stands, what is best, and what to type next."""
        ended = [trial for trial in trials if trial.state != "running"]
        failed = sum(trial.state == "failed" for trial in ended)
        yield f"{len(ended)} of {ledger.space.n_trials} trials ended{f', {failed} of them failed' if failed else ''}"
        yield str(count_epochs(trials))
        if not ranked:
            return
        best, (metric, *others) = ranked[0], ledger.space.objectives
        at = f"in epoch {best.best['epoch']:.0f}"
        yield f"best: trial {best.number:04d}, {_metric_title(metric)} {best.score(metric):.3f} {at}: {self._summarize_params(best)}"
        if others:
            on_front = ", ".join(f"{trial.number:04d}" for trial in ledger.pareto_front())
            yield f"Pareto front of {' and '.join(map(_metric_title, [metric, *others]))}: {on_front or 'empty'}"
        if masked := [
            f"{trial.number:04d}" for trial in ranked if ledger.exceeds_masking_gap(trial)
        ]:
            yield f"masking gap over {ledger.space.max_masking_gap}: {', '.join(masked)} are ranked last"
        yield f"next: `raysweep eval {storage.uri_of(ledger.best_checkpoint_path(best))}`"

    def _close_stale_run(self, trial: Trial) -> None:
        """A driver that was killed may have left the run of a trial that had ended open."""
        if trial.state == "running" or (
            (found := self._find_trial_run(trial)) and self._tracker.has_run_ended(found)
        ):
            return
        self._end_trial_run(self._open_trial_run(trial), trial)

    def _find_trial_run(self, trial: Trial) -> str | None:
        """Id of the trial's run, if it has one."""
        tags = _trial_run_tags(self._ledger.key, f"{trial.number:04d}")
        return self._trial_run_ids.get(trial.number) or self._tracker.find_run(tags)

    def _open_trial_run(self, trial: Trial) -> str:
        tags = _trial_run_tags(self._ledger.key, f"{trial.number:04d}")
        # The number first: the UI cuts names off, and the sweep's is the parent's.
        run = self._tracker.get_or_create_run(
            f"{trial.number:04d} {self._ledger.name}", tags, self._sweep_run_id
        )
        self._trial_run_ids[trial.number] = run
        self._tracker.log_config(
            run, self._ledger.space.trial_config(trial.params), self._fingerprint
        )
        self._tracker.set_tags(run, {"searched": self._summarize_params(trial)})
        if trial.epoch:
            self._log_missing_epochs(run, trial)
        return run

    def _log_missing_epochs(self, run_id: str, trial: Trial) -> None:
        """Epochs that the ledger knew and MLflow did not when an earlier driver was killed."""
        last = self._tracker.get_last_epoch(run_id)
        for row in RunDirectory(self._ledger.trial_path(trial.number)).read_history():
            if last < row["epoch"] <= trial.epoch:
                self._tracker.log_metrics(run_id, row, int(row["epoch"]))

    def _summarize_params(self, trial: Trial) -> str:
        return ", ".join(
            f"{self._param_labels.get(k, k)}={format_mlflow_param(v)}"
            for k, v in trial.params.items()
        )

    def _end_trial_run(self, run_id: str, trial: Trial) -> None:
        if trial.best:
            self._tracker.log_best(run_id, trial.best)
            best = self._ledger.best_checkpoint_path(trial)
            storage.pull_checkpoint(best)
            self._tracker.log_folder(run_id, best, "checkpoint")
        error = self._ledger.trial_path(trial.number) / TRACEBACK_FILE
        if trial.state == "failed" and storage.pull_file(error):
            self._tracker.log_file(run_id, error)
        reason = [f"{trial.state}: {trial.reason}"] if trial.reason else []
        self._tracker.set_description(
            run_id, [*reason, *advise_on_trial(self._ledger, trial.number)]
        )
        self._tracker.set_tags(
            run_id, {"state": trial.state, **({"reason": trial.reason} if trial.reason else {})}
        )
        self._tracker.end_run(run_id, _RUN_STATUS_BY_STATE[trial.state])


def checkpoint_run_tags(checkpoint: TrainingCheckpoint) -> dict[str, str]:
    """The tags of the run that wrote a checkpoint of `raysweep train` or of a sweep's trial."""
    folder = checkpoint.path.parent
    if storage.pull_file(folder / "trial.json"):
        return _trial_run_tags(Ledger.open(folder.parent.parent).key, folder.name)
    return training_run_tags(RunDirectory(folder))


def training_run_tags(run_directory: RunDirectory) -> dict[str, str]:
    return {"raysweep.kind": "train", "raysweep.run": run_directory.run_key}


def _trial_run_tags(sweep_key: str, trial_number: str) -> dict[str, str]:
    return {"raysweep.kind": "trial", "raysweep.sweep": sweep_key, "raysweep.trial": trial_number}


def _metric_title(metric: str) -> str:
    return metric.replace("_", " ")
