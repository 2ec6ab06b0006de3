"""Tune's events, written to the ledger and told to those who follow; and what ends a sweep before its last trial."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ray import tune
from ray.tune.experiment import Trial as RayTrial

from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.search import FAILED

BUG = "bug"
# So many trials with an error of the code end the sweep.
BUGS = 3


class Listener(Protocol):
    """Somebody who follows a sweep: a display, a tracker."""

    def started(self, ledger: Ledger, concurrent: int) -> None: ...

    def trial_changed(self, trial: Trial, metrics: dict[str, float] | None) -> None:
        """A trial started, reported an epoch (`metrics`), or ended."""
        ...

    def ended(self, ledger: Ledger) -> None: ...


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
        self._ledger = ledger
        self._epochs = epochs
        self._listeners = listeners
        self._gpus = gpus
        self._budget = budget
        # What earlier calls left; a sweep's folder may hold thousands.
        self._past = {trial.number: trial for trial in ledger.trials()}
        self._trials: dict[str, Trial] = {}
        self._seen: dict[str, float] = {}
        self._began = time.monotonic()
        self._held = 0.0

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks into snapshots that are never read: the ledger is the truth.
        return {}

    @property
    def over(self) -> bool:
        """Whether the sweep is to end before its last trial."""
        wall = time.monotonic() - self._began
        return len(self.bugs) >= BUGS or self._budget.spent(wall, self._held * self._gpus)

    def on_trial_start(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        proposal = trial.config
        if trial.trial_id not in self._trials:
            fresh = Trial(proposal["number"], proposal["settings"])
            self._update(trial, replace(self._past.get(fresh.number, fresh), state="running"))

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
        record = self._trials[trial.trial_id]
        if record.state == "running" and record.epoch >= self._epochs:
            self._update(trial, replace(record, state="finished"))
        elif record.state == "running" and not self.over:
            self._update(trial, replace(record, state="stopped"))

    def on_trial_error(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        error = trial.get_error()
        reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
        self._update(trial, replace(self._trials[trial.trial_id], state="failed", reason=reason))

    def _update(self, trial: RayTrial, record: Trial, metrics: dict[str, float] | None = None) -> None:
        now = time.monotonic()
        held = now - self._seen.get(trial.trial_id, now)
        self._seen[trial.trial_id] = now
        self._held += held
        record = replace(record, seconds=record.seconds + held)
        self._trials[trial.trial_id] = record
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
        return self._relay.over

    def __getstate__(self) -> dict[str, Any]:
        return {}


_TUNE_KEYS = frozenset({
    "timestamp", "time_this_iter_s", "time_total_s", "time_since_restore", "pid", "iterations_since_restore",
    "training_iteration", "done",
})  # fmt: skip


def _is_ours(key: str, value: Any) -> bool:
    return key not in _TUNE_KEYS and isinstance(value, int | float) and not isinstance(value, bool)
