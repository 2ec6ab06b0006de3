"""Tune's events, written to the ledger and told to those who follow; and what ends a sweep before its last trial."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from ray import tune
from ray.tune.experiment import Trial as RayTrial

from raysweep.sweep.failures import BUG, FAILED, lost
from raysweep.sweep.ledger import Ledger, Trial

# So many trials with an error of the code end the sweep.
BUGS = 3
# What kills a trial's process (a preempted node, a killed worker) costs nothing but the epoch it was in.
RETRIES = 20


class Listener(Protocol):
    """Somebody who follows a sweep: a display, a tracker."""

    def started(self, ledger: Ledger, concurrent: int) -> None: ...

    def trial_changed(self, trial: Trial, metrics: dict[str, float] | None) -> None:
        """A trial started, reported an epoch (`metrics`), or ended."""
        ...

    def ended(self, ledger: Ledger) -> None: ...


# Why a call of `run_sweep` came to its end; interrupted: by Ctrl-C.
End = Literal["done", "budget", "interrupted"]


class SweepFailed(RuntimeError):
    """Several trials met an error that their settings do not explain."""


@dataclass
class Budget:
    """What one call may spend: wall seconds, and GPU seconds that trials hold (evaluation and retries included)."""

    seconds: float = math.inf
    gpu_seconds: float = math.inf

    def spent(self, wall: float, gpu: float) -> bool:
        return wall >= self.seconds or gpu >= self.gpu_seconds


class Relay(tune.Callback):
    """Tune's events, written to the ledger and passed on; it also knows when to end."""

    def __init__(self, ledger: Ledger, epochs: int, listeners: Sequence[Listener], gpus: float, budget: Budget) -> None:
        self.bugs: list[str] = []
        # Why trials got no process: they are for another round of Tune.
        self._unstarted: list[str] = []
        # Whether it was this that ended a round of Tune, not Ctrl-C.
        self.ended = False
        self._rounds = 0
        self._progress = False
        self._ledger = ledger
        self._epochs = epochs
        self._listeners = listeners
        self._gpus = gpus
        self._budget = budget
        # By number, of earlier calls and rounds too; read once, for a sweep's folder may hold thousands.
        self._known = {trial.number: trial for trial in ledger.trials()}
        self._trials: dict[str, Trial] = {}
        # Since when trials hold what they hold, as far as it is not counted yet; none while they wait to start again.
        self._since: dict[str, float] = {}
        self._began = time.monotonic()
        self._held = 0.0

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks into snapshots that are never read: the ledger is the truth.
        return {}

    @property
    def over(self) -> bool:
        """Whether the sweep is to end before its last trial."""
        now = time.monotonic()
        held = self._held + sum(now - since for since in self._since.values())
        return len(self.bugs) >= BUGS or self._budget.spent(now - self._began, held * self._gpus)

    def end(self) -> bool:
        """`over`, asked by who then ends the sweep."""
        self.ended |= self.over
        return self.ended

    def another_round(self) -> bool:
        """Whether Tune is to run (again): the first time, and while trials lack nothing but a process that lives."""
        again = not self._rounds or (bool(self._unstarted) and not self.end())
        self._rounds, self._progress = self._rounds + 1, False
        self._unstarted.clear()
        return again

    def check(self) -> None:
        """Raises SweepFailed if the round that has ended shows that more would bring nothing."""
        if len(self.bugs) >= BUGS:
            raise SweepFailed(f"{len(self.bugs)} trials met errors of the code, the first:\n{self.bugs[0]}")
        if self._unstarted and not self._progress:
            raise SweepFailed(f"no trial could start: {self._unstarted[-1]}")

    def on_trial_start(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        proposal = trial.config
        self._since[trial.trial_id] = time.monotonic()
        if trial.trial_id not in self._trials:
            fresh = Trial(proposal["number"], proposal["settings"])
            self._update(trial, replace(self._known.get(fresh.number, fresh), state="running"))

    def on_trial_result(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, result: dict[str, Any], **info: Any
    ) -> None:
        before = self._trials[trial.trial_id]
        if FAILED in result:
            self.bugs += [result[BUG]] if BUG in result else []
            self._update(trial, replace(before, state="failed", reason=result[FAILED]))
            return
        metrics = {k: float(v) for k, v in result.items() if k == "epoch" or _is_ours(k, v)}
        after = before.reported(metrics, self._ledger.space.objectives[0])
        if after is not before:
            self._update(trial, after, metrics)

    def on_trial_complete(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        record = self._trials.get(trial.trial_id)
        # None: a budget was spent before its first process started.
        if record is not None and record.state == "running":
            if record.epoch >= record.settings.get("epochs", self._epochs):
                self._update(trial, replace(record, state="finished", reason=""))
            elif not self.over:
                self._update(trial, replace(record, state="stopped", reason=""))
        self._let_go(trial)

    def on_trial_recover(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        before = self._trials.get(trial.trial_id)
        if before is not None:
            self._update(trial, replace(before, retries=before.retries + 1, reason=lost(_account(trial))))
        self._let_go(trial)

    def on_trial_error(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        before, why = self._trials.get(trial.trial_id), lost(_account(trial))
        if before is not None and trial.num_failures > RETRIES:
            self._update(trial, replace(before, state="failed", reason=f"{why}, {trial.num_failures} times"))
        else:
            # Tune does not try again where a process is lost while it starts.
            self._unstarted.append(why)
        self._let_go(trial)

    def _let_go(self, trial: RayTrial) -> None:
        """The trial's process has ended: it holds nothing until it starts again."""
        now = time.monotonic()
        self._held += now - self._since.pop(trial.trial_id, now)

    def _update(self, trial: RayTrial, record: Trial, metrics: dict[str, float] | None = None) -> None:
        now = time.monotonic()
        held = now - self._since.get(trial.trial_id, now)
        self._since[trial.trial_id] = now
        self._held += held
        record = replace(record, seconds=record.seconds + held)
        self._progress |= metrics is not None or record.state != "running"
        self._trials[trial.trial_id] = self._known[record.number] = record
        self._ledger.write(record)
        for listener in self._listeners:
            listener.trial_changed(record, metrics)


class Stop(tune.Stopper):
    """Ends all trials when the relay says so."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._relay.end()

    def __getstate__(self) -> dict[str, Any]:
        return {}


_TUNE_KEYS = frozenset({
    "timestamp", "time_this_iter_s", "time_total_s", "time_since_restore", "pid", "iterations_since_restore",
    "training_iteration", "done",
})  # fmt: skip


def _account(trial: RayTrial) -> str:
    """What Ray says of the trial's last failure."""
    file = trial.error_file
    return Path(file).read_text().rpartition("Failure # ")[2] if file and Path(file).exists() else ""


def _is_ours(key: str, value: Any) -> bool:
    return key not in _TUNE_KEYS and isinstance(value, int | float) and not isinstance(value, bool)
