"""A sweep in MLflow: a parent run, its trials as children, each found again by its tags."""

from raysweep import storage
from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.space import labels
from raysweep.tracking.store import Status, Tracker, text_of
from raysweep.training.advice import advise
from raysweep.training.checkpoint import Checkpoint, Run

# Figures take a second a trial: the best few get them.
_PLOTTED = 3
_STATUS: dict[str, Status] = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED", "running": "KILLED"}


class SweepTracker:
    """A sweep as a parent run, its trials as children."""

    def __init__(self, tracker: Tracker, fingerprint: str = "") -> None:
        self._tracker = tracker
        self._fingerprint = fingerprint
        self._runs: dict[int, str] = {}

    def started(self, ledger: Ledger, concurrent: int) -> None:
        self._ledger = ledger
        tags = {"raysweep.kind": "sweep", "raysweep.sweep": ledger.key}
        self._parent = self._tracker.run(ledger.name, tags)
        self._labels = labels(list(ledger.space.space))
        self._config = ledger.space.config({})
        self._tracker.config(self._parent, self._config, self._fingerprint)
        self._tracker.artifact(self._parent, ledger.space.json_dict(), "space.json")
        for trial in ledger.trials():
            self._reconcile(trial)

    def trial_changed(self, trial: Trial, metrics: dict[str, float] | None) -> None:
        run = self._runs.get(trial.number) or self._open(trial)
        if metrics is not None:
            self._tracker.metrics(run, metrics, trial.epoch)
        if trial.state != "running":
            self._finish(run, trial)

    def ended(self, ledger: Ledger) -> None:
        trials = {trial.number: trial for trial in ledger.trials()}
        for number, run in self._runs.items():
            if trials[number].state == "running":
                self._tracker.close(run, "KILLED")
        ranked = ledger.ranked()
        for trial in ranked[:_PLOTTED]:
            last = Run(ledger.run_path(trial.number)).last()
            if trial.number in self._runs and last is not None:
                self._tracker.plots(self._runs[trial.number], last.path.parent, last.history)
                self._tracker.describe(self._runs[trial.number], advise(last.config, last.history))
        if ranked:
            best = {f"best/{name}": value for name, value in _headline(ranked[0]).items()}
            self._tracker.metrics(self._parent, best | {"trials": float(len(trials))}, 0)
            self._tracker.tag(self._parent, {"best_trial": f"{ranked[0].number:04d}"})
        done = all(trial.state != "running" for trial in trials.values()) and len(trials) >= ledger.space.total
        self._tracker.close(self._parent, "FINISHED" if done else "KILLED")

    def _reconcile(self, trial: Trial) -> None:
        """A driver that was killed may have left a trial's run without its last epochs, or open."""
        tags = _trial_tags(self._ledger.key, f"{trial.number:04d}")
        found = self._tracker.find(tags)
        if trial.state == "running" or (found and self._tracker.closed(found)):
            return
        run = self._open(trial)
        for row in Run(self._ledger.run_path(trial.number)).history():
            self._tracker.metrics(run, row, int(row["epoch"]))
        self._finish(run, trial)

    def _open(self, trial: Trial) -> str:
        tags = _trial_tags(self._ledger.key, f"{trial.number:04d}")
        run = self._tracker.run(f"{self._ledger.name}/{trial.number:04d}", tags, self._parent)
        self._runs[trial.number] = run
        self._tracker.config(run, self._ledger.space.config(trial.settings), self._fingerprint)
        searched = ", ".join(f"{self._labels.get(k, k)}={text_of(v)}" for k, v in trial.settings.items())
        self._tracker.tag(run, {"searched": searched})
        return run

    def _finish(self, run: str, trial: Trial) -> None:
        if trial.best:
            self._tracker.metrics(run, {f"best/{k}": v for k, v in _headline(trial).items()}, trial.epoch)
            best = self._ledger.checkpoint(trial)
            storage.pull(best)
            self._tracker.artifacts(run, best, "checkpoint")
        self._tracker.tag(run, {"state": trial.state, **({"reason": trial.reason} if trial.reason else {})})
        self._tracker.close(run, _STATUS[trial.state])


def run_tags(saved: Checkpoint) -> dict[str, str]:
    """The tags of the run that wrote a checkpoint of `raysweep train` or of a sweep's trial."""
    folder = saved.path.parent
    if storage.pull_file(folder / "trial.json"):
        return _trial_tags(Ledger.open(folder.parent.parent).key, folder.name)
    return train_tags(Run(folder))


def train_tags(run: Run) -> dict[str, str]:
    return {"raysweep.kind": "train", "raysweep.run": run.key}


def _trial_tags(sweep: str, number: str) -> dict[str, str]:
    return {"raysweep.kind": "trial", "raysweep.sweep": sweep, "raysweep.trial": number}


def _headline(trial: Trial) -> dict[str, float]:
    return {k: v for k, v in trial.best.items() if "/" not in k}
