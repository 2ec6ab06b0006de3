"""A sweep in MLflow: a parent run, its trials as children, each found again by its tags."""

from collections.abc import Iterator

from raysweep import storage
from raysweep.results import trial_advice
from raysweep.sweep.failures import ERROR
from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.space import labels
from raysweep.tracking.store import Status, Tracker, text_of
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
        for trial in trials.values():
            # Also those that an earlier driver left open and this one had no time for.
            if trial.state == "running" and (run := self._known(trial)):
                self._tracker.close(run, "KILLED")
        ranked = ledger.ranked()
        for trial in ranked[:_PLOTTED]:
            last = Run(ledger.run_path(trial.number)).last()
            known = self._known(trial)
            if known is not None and last is not None:
                self._tracker.plots(known, last.path.parent, last.history)
        if ranked:
            self._tracker.best(self._parent, ranked[0].best)
            self._tracker.results(self._parent, {"trials": float(len(trials))})
            self._tracker.tag(self._parent, {"best_trial": f"{ranked[0].number:04d}"})
        self._tracker.describe(self._parent, list(self._summary(ledger, list(trials.values()), ranked)))
        done = all(trial.state != "running" for trial in trials.values()) and len(trials) >= ledger.space.total
        self._tracker.close(self._parent, "FINISHED" if done else "KILLED")

    def _summary(self, ledger: Ledger, trials: list[Trial], ranked: list[Trial]) -> Iterator[str]:
        """The parent's description: how the sweep stands, what is best, and what to type next."""
        ended = [trial for trial in trials if trial.state != "running"]
        failed = sum(trial.state == "failed" for trial in ended)
        yield f"{len(ended)} of {ledger.space.total} trials ended{f', {failed} of them failed' if failed else ''}"
        asked, trained = sum(t.epoch for t in trials), sum(t.trained for t in trials)
        yield f"epochs: {asked} asked, {trained} trained, {asked - trained} taken over from other trials"
        if not ranked:
            return
        best, (metric, *others) = ranked[0], ledger.space.objectives
        at = f"in epoch {best.best['epoch']:.0f}"
        yield f"best: trial {best.number:04d}, {_words(metric)} {best.score(metric):.3f} {at}: {self._searched(best)}"
        if others:
            on_front = ", ".join(f"{trial.number:04d}" for trial in ledger.front())
            yield f"Pareto front of {' and '.join(map(_words, [metric, *others]))}: {on_front or 'empty'}"
        if masked := [f"{trial.number:04d}" for trial in ranked if ledger.masks(trial)]:
            yield f"masking gap over {ledger.space.max_masking_gap}: {', '.join(masked)} are ranked last"
        yield f"next: `raysweep eval {storage.name(ledger.checkpoint(best))}`"

    def _reconcile(self, trial: Trial) -> None:
        """A driver that was killed may have left the run of a trial that had ended open."""
        if trial.state == "running" or ((found := self._known(trial)) and self._tracker.closed(found)):
            return
        self._finish(self._open(trial), trial)

    def _known(self, trial: Trial) -> str | None:
        """Id of the trial's run, if it has one."""
        tags = _trial_tags(self._ledger.key, f"{trial.number:04d}")
        return self._runs.get(trial.number) or self._tracker.find(tags)

    def _open(self, trial: Trial) -> str:
        tags = _trial_tags(self._ledger.key, f"{trial.number:04d}")
        # The number first: the UI cuts names off, and the sweep's is the parent's.
        run = self._tracker.run(f"{trial.number:04d} {self._ledger.name}", tags, self._parent)
        self._runs[trial.number] = run
        self._tracker.config(run, self._ledger.space.config(trial.settings), self._fingerprint)
        self._tracker.tag(run, {"searched": self._searched(trial)})
        if trial.epoch:
            self._fill(run, trial)
        return run

    def _fill(self, run: str, trial: Trial) -> None:
        """Epochs that the ledger knew and MLflow did not when an earlier driver was killed."""
        last = self._tracker.last_step(run)
        for row in Run(self._ledger.run_path(trial.number)).history():
            if last < row["epoch"] <= trial.epoch:
                self._tracker.metrics(run, row, int(row["epoch"]))

    def _searched(self, trial: Trial) -> str:
        return ", ".join(f"{self._labels.get(k, k)}={text_of(v)}" for k, v in trial.settings.items())

    def _finish(self, run: str, trial: Trial) -> None:
        if trial.best:
            self._tracker.best(run, trial.best)
            best = self._ledger.checkpoint(trial)
            storage.pull(best)
            self._tracker.artifacts(run, best, "checkpoint")
        error = self._ledger.run_path(trial.number) / ERROR
        if trial.state == "failed" and storage.pull_file(error):
            self._tracker.file(run, error)
        reason = [f"{trial.state}: {trial.reason}"] if trial.reason else []
        self._tracker.describe(run, [*reason, *trial_advice(self._ledger, trial.number)])
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


def _words(metric: str) -> str:
    return metric.replace("_", " ")
