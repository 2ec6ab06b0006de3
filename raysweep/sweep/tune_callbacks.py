"""Tune's events, written to the ledger and told to those who follow; and what ends a sweep before
its last trial.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from ray import tune
from ray.tune.experiment import Trial as RayTrial

from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.process_loss import describe_process_loss
from raysweep.training.failure_reports import BUG_TRACEBACK_KEY, FAILURE_KEY

# So many trials with an error of the code end the sweep.
MAX_BUGGY_TRIALS = 3
# What kills a trial's process (a preempted node, a killed worker) costs nothing but the epoch it
# was in.
MAX_TRIAL_RETRIES = 20


class SweepListener(Protocol):
    """Somebody who follows a sweep: a display, a tracker."""

    def on_sweep_start(self, ledger: Ledger, concurrency: int) -> None: ...

    def on_trial_update(self, trial: Trial, epoch_metrics: dict[str, float] | None) -> None:
        """A trial started, reported an epoch (`metrics`), or ended."""
        ...

    def on_sweep_end(self, ledger: Ledger) -> None: ...


# Why a call of `run_sweep` came to its end; interrupted: by Ctrl-C.
SweepEndReason = Literal["done", "budget", "interrupted"]


class SweepFailed(RuntimeError):
    """Several trials met an error that their settings do not explain."""


@dataclass
class Budget:
    """What one call may spend: wall seconds, and GPU seconds that trials hold (evaluation and
    retries included).
    """

    wall_seconds: float = math.inf
    gpu_seconds: float = math.inf

    def is_exhausted(self, wall_seconds: float, gpu_seconds: float) -> bool:
        return wall_seconds >= self.wall_seconds or gpu_seconds >= self.gpu_seconds


class LedgerCallback(tune.Callback):
    """Tune's events, written to the ledger and passed on; it also knows when to end."""

    def __init__(
        self,
        ledger: Ledger,
        max_epochs: int,
        listeners: Sequence[SweepListener],
        gpus_per_trial: float,
        budget: Budget,
    ) -> None:
        self.bug_tracebacks: list[str] = []
        # Why trials got no process: they are for another round of Tune.
        self._start_failures: list[str] = []
        # Whether it was this that ended a round of Tune, not Ctrl-C.
        self.limit_reached = False
        self._n_rounds = 0
        self._made_progress = False
        self._ledger = ledger
        self._max_epochs = max_epochs
        self._listeners = listeners
        self._gpus_per_trial = gpus_per_trial
        self._budget = budget
        # By number, of earlier calls and rounds too; read once, for a sweep's folder may hold
        # thousands.
        self._trials_by_number = {trial.number: trial for trial in ledger.load_trials()}
        self._trials_by_id: dict[str, Trial] = {}
        # Since when trials hold what they hold, as far as it is not counted yet; none while they
        # wait to start again.
        self._interval_starts: dict[str, float] = {}
        self._start_time = time.monotonic()
        self._counted_seconds = 0.0

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks into snapshots that are never read: the ledger is the truth.
        return {}

    @property
    def has_reached_limit(self) -> bool:
        """Whether the sweep is to end before its last trial."""
        now = time.monotonic()
        held = self._counted_seconds + sum(now - since for since in self._interval_starts.values())
        return len(self.bug_tracebacks) >= MAX_BUGGY_TRIALS or self._budget.is_exhausted(
            now - self._start_time, held * self._gpus_per_trial
        )

    def update_limit_reached(self) -> bool:
        """`over`, asked by who then ends the sweep."""
        self.limit_reached |= self.has_reached_limit
        return self.limit_reached

    def start_round(self) -> bool:
        """Whether Tune is to run (again): the first time, and while trials lack nothing but a
        process that lives.
        """
        again = not self._n_rounds or (
            bool(self._start_failures) and not self.update_limit_reached()
        )
        self._n_rounds, self._made_progress = self._n_rounds + 1, False
        self._start_failures.clear()
        return again

    def check_round(self) -> None:
        """Raises SweepFailed if the round that has ended shows that more would bring nothing."""
        if len(self.bug_tracebacks) >= MAX_BUGGY_TRIALS:
            raise SweepFailed(
                f"{len(self.bug_tracebacks)} trials met errors of the code, the first:\n{self.bug_tracebacks[0]}"
            )
        if self._start_failures and not self._made_progress:
            raise SweepFailed(f"no trial could start: {self._start_failures[-1]}")

    def on_trial_start(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any
    ) -> None:
        proposal = trial.config
        self._interval_starts[trial.trial_id] = time.monotonic()
        if trial.trial_id not in self._trials_by_id:
            fresh = Trial(proposal["number"], proposal["params"])
            self._save_and_notify(
                trial, replace(self._trials_by_number.get(fresh.number, fresh), state="running")
            )

    def on_trial_result(
        self,
        iteration: int,
        trials: list[RayTrial],
        trial: RayTrial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        before = self._trials_by_id[trial.trial_id]
        if FAILURE_KEY in result:
            self.bug_tracebacks += (
                [result[BUG_TRACEBACK_KEY]] if BUG_TRACEBACK_KEY in result else []
            )
            self._save_and_notify(
                trial, replace(before, state="failed", reason=result[FAILURE_KEY])
            )
            return
        metrics = {k: float(v) for k, v in result.items() if k == "epoch" or _is_metric(k, v)}
        after = before.with_epoch(metrics, self._ledger.space.objectives[0])
        if after is not before:
            self._save_and_notify(trial, after, metrics)

    def on_trial_complete(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any
    ) -> None:
        record = self._trials_by_id.get(trial.trial_id)
        # None: a budget was spent before its first process started.
        if record is not None and record.state == "running":
            if record.epoch >= record.params.get("epochs", self._max_epochs):
                self._save_and_notify(trial, replace(record, state="finished", reason=""))
            elif not self.has_reached_limit:
                self._save_and_notify(trial, replace(record, state="stopped", reason=""))
        self._stop_clock(trial)

    def on_trial_recover(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any
    ) -> None:
        before = self._trials_by_id.get(trial.trial_id)
        if before is not None:
            self._save_and_notify(
                trial,
                replace(
                    before,
                    retries=before.retries + 1,
                    reason=describe_process_loss(_last_ray_error(trial)),
                ),
            )
        self._stop_clock(trial)

    def on_trial_error(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any
    ) -> None:
        before, why = (
            self._trials_by_id.get(trial.trial_id),
            describe_process_loss(_last_ray_error(trial)),
        )
        if before is not None and trial.num_failures > MAX_TRIAL_RETRIES:
            self._save_and_notify(
                trial, replace(before, state="failed", reason=f"{why}, {trial.num_failures} times")
            )
        else:
            # Tune does not try again where a process is lost while it starts.
            self._start_failures.append(why)
        self._stop_clock(trial)

    def _stop_clock(self, ray_trial: RayTrial) -> None:
        """The trial's process has ended: it holds nothing until it starts again."""
        now = time.monotonic()
        self._counted_seconds += now - self._interval_starts.pop(ray_trial.trial_id, now)

    def _save_and_notify(
        self, ray_trial: RayTrial, updated_trial: Trial, metrics: dict[str, float] | None = None
    ) -> None:
        now = time.monotonic()
        held = now - self._interval_starts.get(ray_trial.trial_id, now)
        self._interval_starts[ray_trial.trial_id] = now
        self._counted_seconds += held
        updated_trial = replace(updated_trial, seconds=updated_trial.seconds + held)
        self._made_progress |= metrics is not None or updated_trial.state != "running"
        self._trials_by_id[ray_trial.trial_id] = self._trials_by_number[updated_trial.number] = (
            updated_trial
        )
        self._ledger.save_trial(updated_trial)
        for listener in self._listeners:
            listener.on_trial_update(updated_trial, metrics)


class BudgetStopper(tune.Stopper):
    """Ends all trials when the relay says so."""

    def __init__(self, ledger_callback: LedgerCallback) -> None:
        self._ledger_callback = ledger_callback

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._ledger_callback.update_limit_reached()

    def __getstate__(self) -> dict[str, Any]:
        return {}


_TUNE_RESULT_KEYS = frozenset({
    "timestamp", "time_this_iter_s", "time_total_s", "time_since_restore", "pid", "iterations_since_restore",
    "training_iteration", "done",
})  # fmt: skip


def _last_ray_error(ray_trial: RayTrial) -> str:
    """What Ray says of the trial's last failure."""
    file = ray_trial.error_file
    return (
        Path(file).read_text().rpartition("Failure # ")[2] if file and Path(file).exists() else ""
    )


def _is_metric(key: str, value: Any) -> bool:
    return (
        key not in _TUNE_RESULT_KEYS
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    )
