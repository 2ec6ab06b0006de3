"""Callback and stopper for Ray Tune: write the ledger, notify listeners, and end a sweep early."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from ray import tune
from ray.tune.experiment import Trial as RayTrial

from raysweep.disk_space import find_free_bytes
from raysweep.errors import WorkFailed
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.process_death_causes import describe_process_loss
from raysweep.sweep.spread_summary import describe_early_end, find_early_end
from raysweep.sweep.trial import Trial
from raysweep.training.failure_reports import BUG_TRACEBACK_KEY, FAILURE_KEY, INFRASTRUCTURE_KEY
from raysweep.training.metric_history import EpochMetrics
from raysweep.training.resource_use import SYSTEM_PREFIX
from raysweep.training.selection import SelectionRule

logger = logging.getLogger(__name__)

SweepEndReason = Literal["done", "budget", "interrupted"]
"""Why a call of `run_sweep` ended; `interrupted` is by Ctrl-C."""

MAX_BUGGY_TRIALS = 3
"""Number of trials with errors in the code after which a sweep ends."""

MAX_TRIAL_RETRIES = 20
_DISK_LOOK_SECONDS = 1.0
"""How often a trial is started again after it lost its process (killed, or its node preempted).

A retry is cheap: it resumes from the last checkpoint.
"""

_TUNE_RESULT_KEYS = frozenset(
    {
        "done",
        "iterations_since_restore",
        "pid",
        "time_since_restore",
        "time_this_iter_s",
        "time_total_s",
        "timestamp",
        "training_iteration",
    }
)


class SweepListener(Protocol):
    """Follows a sweep, for example to display or track it.

    All methods are called in the driver, one at a time. An exception ends the sweep.
    """

    def on_sweep_start(self, ledger: Ledger, concurrency: int) -> None:
        """Receive the sweep before its first trial starts.

        Args:
            ledger: The sweep.
            concurrency: Number of trials that run at the same time; 0 if all have ended already.
        """

    def on_trial_update(self, trial: Trial, epoch_metrics: EpochMetrics | None) -> None:
        """Receive a trial after it started, reported an epoch, was started again, or ended.

        Args:
            trial: The trial, as it was just written to the ledger.
            epoch_metrics: Metrics of the reported epoch; None for other events.
        """

    def on_base_run_update(self, run: Trial, epoch_metrics: EpochMetrics | None) -> None:
        """Receive a base run when a trial would be received.

        Args:
            run: The run, as it was just written to the ledger.
            epoch_metrics: Metrics of the reported epoch; None for other events.
        """

    def on_repeat_update(self, run: Trial, epoch_metrics: EpochMetrics | None) -> None:
        """Receive a repeat of a trial when a trial would be received.

        Args:
            run: The repeat, as it was just written to the ledger.
            epoch_metrics: Metrics of the reported epoch; None for other events.
        """

    def on_finalist_update(self, trial: Trial, n_left: int) -> None:
        """Receive one of the best trials before AutoAttack attacks it, and after.

        Args:
            trial: The trial, or a repeat of it or a base run; its `finalist` has the result after
                the attack.
            n_left: Number of trials whose attacks have not ended, this one included before its own.
        """

    def on_sweep_end(self, ledger: Ledger, error: BaseException | None = None) -> None:
        """Receive the sweep at its end.

        Args:
            ledger: The sweep, with the final state of its trials.
            error: What ended the sweep early, `KeyboardInterrupt` included; None if nothing did, or
                if Tune handled Ctrl-C.
        """


class SweepFailed(WorkFailed):
    """Several trials failed with errors in the code, or no trial could start."""


@dataclass
class Budget:
    """What one call of `run_sweep` may spend.

    Attributes:
        wall_seconds: Seconds since the start of the call.
        gpu_seconds: Number of GPUs times the seconds that trials hold them, evaluation and retries
            included, and that AutoAttack on the finalists holds them.
    """

    wall_seconds: float = math.inf
    gpu_seconds: float = math.inf

    def is_exhausted(self, wall_seconds: float, gpu_seconds: float) -> bool:
        """Return whether one of the amounts has reached its limit."""
        return wall_seconds >= self.wall_seconds or gpu_seconds >= self.gpu_seconds


class LedgerCallback(tune.Callback):
    """Write Tune's events to the ledger, notify listeners, and decide when the sweep must end.

    Tune runs in rounds: trials that got no process in one round are started again in the next.

    Args:
        ledger: The sweep.
        max_epochs: Epochs of a trial whose params do not set `epochs`.
        listeners: Objects that are notified of each change, after it is in the ledger.
        gpus_per_trial: GPUs that a running trial holds.
        budget: What this call may spend.

    Attributes:
        bug_tracebacks: Tracebacks of errors in the code, one for each trial that had one.
        limit_reached: Whether this callback ended a round of Tune, rather than Ctrl-C.
    """

    def __init__(
        self,
        ledger: Ledger,
        max_epochs: int,
        listeners: Sequence[SweepListener],
        gpus_per_trial: float,
        budget: Budget,
    ) -> None:
        self.bug_tracebacks: list[str] = []
        self.limit_reached = False
        self.lacks_disk_space = False
        self._next_disk_look = 0.0
        # Why trials got no process in this round.
        self._start_failures: list[str] = []
        self._n_rounds = 0
        self._made_progress = False
        self._ledger = ledger
        self._max_epochs = max_epochs
        self._listeners = listeners
        self._gpus_per_trial = gpus_per_trial
        self._budget = budget
        # Includes trials of earlier calls and rounds. Read once, because a sweep may have thousands
        # of trials.
        self._trials_by_key = {trial.key: trial for trial in ledger.load_all_runs()}
        self._rules: dict[str, SelectionRule] = {}
        self._trials_by_id: dict[str, Trial] = {}
        # By Tune's id: since when a trial has held its resources, apart from the seconds that are
        # already counted. Trials that wait for a process are missing.
        self._interval_starts: dict[str, float] = {}
        # By Tune's id: host and process of the trial's last report.
        self._places: dict[str, str] = {}
        self._start_time = time.monotonic()
        self._counted_seconds = 0.0

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks into snapshots that raysweep never reads.
        return {}

    def _describe_limits(self, wall_seconds: float, gpu_seconds: float) -> list[str]:
        """Describe each limit that there is, and what has been spent of it."""
        limits = []
        if math.isfinite(self._budget.wall_seconds):
            limits.append(f"{wall_seconds:.1f} s of {self._budget.wall_seconds:g} s have passed")
        if math.isfinite(self._budget.gpu_seconds):
            spent = f"{gpu_seconds:.1f} GPU seconds of {self._budget.gpu_seconds:g}"
            limits.append(f"{spent} are spent")
        if self.lacks_disk_space:
            limits.append("the disk has less free space than its reserve")
        if self.bug_tracebacks:
            limits.append(f"{len(self.bug_tracebacks)} trials had errors in the code")
        return limits

    @property
    def has_reached_limit(self) -> bool:
        """Whether the sweep must end before its last trial.

        Its budget is exhausted, its disk nearly full, or there are too many bugs.
        """
        return (
            len(self.bug_tracebacks) >= MAX_BUGGY_TRIALS
            or self._budget.is_exhausted(*self._spent_seconds())
            or self._update_disk_space()
        )

    def _update_disk_space(self) -> bool:
        """Set `lacks_disk_space` if the disk has less than its reserve, and return it."""
        folder = self._ledger.path.local_path
        now = time.monotonic()
        if self.lacks_disk_space or folder is None or now < self._next_disk_look:
            return self.lacks_disk_space
        self._next_disk_look = now + _DISK_LOOK_SECONDS
        reserve_bytes = self._ledger.space.disk_reserve_gib * 2**30
        self.lacks_disk_space = find_free_bytes(folder) < reserve_bytes
        return self.lacks_disk_space

    def _spent_seconds(self) -> tuple[float, float]:
        """Return the wall seconds of this call, and the GPU seconds of its trials."""
        now = time.monotonic()
        uncounted_seconds = sum(now - start for start in self._interval_starts.values())
        trial_seconds = self._counted_seconds + uncounted_seconds
        return now - self._start_time, trial_seconds * self._gpus_per_trial

    @contextmanager
    def hold_resources(self, n_trials: int) -> Iterator[None]:
        """Count what this many trials hold to the budget, while work other than trials uses it.

        Args:
            n_trials: Number of trials that could run at the same time.
        """
        started_at = time.monotonic()
        holders = [f"holder {number}" for number in range(n_trials)]
        self._interval_starts |= dict.fromkeys(holders, started_at)
        try:
            yield
        finally:
            for holder in holders:
                del self._interval_starts[holder]
            self._counted_seconds += n_trials * (time.monotonic() - started_at)

    def update_limit_reached(self) -> bool:
        """Set `limit_reached` if the limit has been reached, and return it.

        Called where a result of True ends the sweep. `has_reached_limit` changes nothing.
        """
        if self.has_reached_limit and not self.limit_reached:
            self._log_limit()
        self.limit_reached |= self.has_reached_limit
        return self.limit_reached

    def _log_limit(self) -> None:
        """Log the numbers for which the sweep ends early."""
        wall_seconds, gpu_seconds = self._spent_seconds()
        logger.warning(
            "the sweep ends early: %s; %d trials have started",
            "; ".join(self._describe_limits(wall_seconds, gpu_seconds)),
            len(self._trials_by_id),
            extra={
                "event": "limit",
                "wall_seconds": wall_seconds,
                "gpu_seconds": gpu_seconds,
                "is_shown_elsewhere": True,
            },
        )

    def reset_round_count(self) -> None:
        """Count the rounds of Tune from 0 again, because the next one trains other runs."""
        self._n_rounds = 0

    def start_round_if_needed(self) -> bool:
        """Begin a round of Tune if one is needed.

        Returns:
            True in the first round, and while trials failed only because they got no process and
            the sweep has not reached its limit.
        """
        is_needed = not self._n_rounds or (
            bool(self._start_failures) and not self.update_limit_reached()
        )
        self._n_rounds, self._made_progress = self._n_rounds + 1, False
        if is_needed and self._start_failures:
            logger.warning(
                "round %d of Tune: %d trials got no process: %s",
                self._n_rounds,
                len(self._start_failures),
                self._start_failures[-1],
                extra={"is_shown_elsewhere": True},
            )
        self._start_failures.clear()
        return is_needed

    def require_round_progress(self) -> None:
        """Check after a round of Tune that another one makes sense.

        Raises:
            SweepFailed: If too many trials had errors in the code, or no trial made progress.
        """
        if len(self.bug_tracebacks) >= MAX_BUGGY_TRIALS:
            raise SweepFailed(
                f"{len(self.bug_tracebacks)} trials failed with errors in the code, the first:\n"
                f"{self.bug_tracebacks[0]}"
            )
        if self._start_failures and not self._made_progress:
            raise SweepFailed(f"no trial could start: {self._start_failures[-1]}")

    def on_trial_start(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any
    ) -> None:
        """Start the trial's clock; at its first start also write it as running."""
        self._interval_starts[trial.trial_id] = time.monotonic()
        if trial.trial_id not in self._trials_by_id:
            new_trial = Trial.from_tune_config(trial.config)
            saved_trial = self._trials_by_key.get(new_trial.key, new_trial)
            rule = self._ledger.find_rule(saved_trial)
            self._rules[saved_trial.key] = rule
            saved_trial = saved_trial.with_rule(rule)
            _log_trial_start(saved_trial)
            self._save_and_notify(trial, replace(saved_trial, state="running"))

    def on_trial_result(
        self,
        iteration: int,
        trials: list[RayTrial],
        trial: RayTrial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        """Write an epoch, or the failure that the trial reported."""
        saved_trial = self._trials_by_id[trial.trial_id]
        self._log_place(trial, saved_trial, result)
        if FAILURE_KEY in result:
            logger.error(
                "%s failed: %s",
                saved_trial.title,
                result[FAILURE_KEY],
                extra={
                    "trial": saved_trial.number,
                    "epoch": saved_trial.epoch,
                    "event": "trial_failed",
                    "trial_traceback": result.get(BUG_TRACEBACK_KEY, ""),
                    "is_shown_elsewhere": True,
                },
            )
            if BUG_TRACEBACK_KEY in result:
                self.bug_tracebacks.append(result[BUG_TRACEBACK_KEY])
            failed_trial = replace(
                saved_trial,
                state="failed",
                reason=result[FAILURE_KEY],
                is_infrastructure_failure=INFRASTRUCTURE_KEY in result,
            )
            self._save_and_notify(trial, failed_trial)
            return
        metrics = {k: float(v) for k, v in result.items() if k == "epoch" or _is_metric(k, v)}
        # Only listeners get these: they are no results.
        results = {k: v for k, v in metrics.items() if not k.startswith(SYSTEM_PREFIX)}
        updated_trial = saved_trial.with_epoch(results, self._rules[saved_trial.key])
        if updated_trial is not saved_trial:
            updated_trial = self._ledger.with_rung_results(updated_trial, self._max_epochs)
            self._save_and_notify(trial, updated_trial, metrics)

    def on_trial_complete(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any
    ) -> None:
        """Write the end of a trial; one that the limit cut off stays `running` to be resumed."""
        saved_trial = self._trials_by_id.get(trial.trial_id)
        # It is None if the limit was reached before the trial's first process started.
        if saved_trial is not None and saved_trial.state == "running":
            if saved_trial.epoch >= saved_trial.params.get("epochs", self._max_epochs):
                _log_trial_end(saved_trial, "finished")
                self._end_trial(trial, replace(saved_trial, state="finished", reason=""))
            elif self.has_reached_limit:
                _log_trial_end(saved_trial, "cut off, to be resumed later,")
            else:
                _log_trial_end(saved_trial, "stopped")
                self._end_trial(trial, replace(saved_trial, state="stopped", reason=""))
        self._stop_clock(trial)

    def _end_trial(self, ray_trial: RayTrial, ended_trial: Trial) -> None:
        """Write a trial that has ended, with what its best epoch gets right."""
        self._save_and_notify(ray_trial, self._ledger.with_verdicts(ended_trial))
        if (
            ended_trial.kind == "repeat"
            or self._ledger.space.until is None
            or self._ledger.load_early_end()
        ):
            return
        trials = [trial for trial in self._trials_by_key.values() if trial.kind == "trial"]
        reason = find_early_end(self._ledger, trials)
        if reason is not None:
            self._ledger.save_early_end(reason)
            logger.info(
                "the sweep needs no more trials: %s",
                describe_early_end(reason),
                extra={"event": "early_end", "reason": reason, "is_shown_elsewhere": True},
            )

    def on_trial_recover(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any
    ) -> None:
        """Count a retry of a trial that lost its process."""
        saved_trial = self._trials_by_id.get(trial.trial_id)
        if saved_trial is not None:
            reason = describe_process_loss(_last_ray_error(trial))
            retried_trial = replace(saved_trial, retries=saved_trial.retries + 1, reason=reason)
            self._log_loss(trial, retried_trial, "it is queued to start again")
            self._save_and_notify(trial, retried_trial)
        self._stop_clock(trial)

    def on_trial_error(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any
    ) -> None:
        """Write that a trial lost its process too often, or remember that it could not start."""
        saved_trial = self._trials_by_id.get(trial.trial_id)
        reason = describe_process_loss(_last_ray_error(trial))
        if saved_trial is not None and trial.num_failures > MAX_TRIAL_RETRIES:
            reason = f"{reason}, {trial.num_failures} times"
            self._log_loss(trial, replace(saved_trial, reason=reason), "it is not started again")
            failed_trial = replace(
                saved_trial, state="failed", reason=reason, is_infrastructure_failure=True
            )
            self._save_and_notify(trial, failed_trial)
        else:
            logger.warning(
                "trial %04d got no process: %s", trial.config["number"], reason,
                extra={"trial": trial.config["number"], "ray_error": _last_ray_error(trial),
                       "is_shown_elsewhere": True},
            )  # fmt: skip
            # Tune does not retry a trial that loses its process while it starts.
            self._start_failures.append(reason)
        self._stop_clock(trial)

    def _log_place(self, ray_trial: RayTrial, saved_trial: Trial, result: dict[str, Any]) -> None:
        """Log where a trial runs, at the first report of each of its processes."""
        place = f"process {result.get('pid')} on {result.get('hostname')}"
        if self._places.get(ray_trial.trial_id) != place:
            self._places[ray_trial.trial_id] = place
            logger.info(
                "first report of %s from %s",
                saved_trial.title,
                place,
                extra={
                    "trial": saved_trial.number,
                    "attempt": saved_trial.retries + 1,
                    "node": result.get("hostname"),
                    "node_ip": result.get("node_ip"),
                    "trial_process": result.get("pid"),
                },
            )

    def _log_loss(self, ray_trial: RayTrial, lost_trial: Trial, consequence: str) -> None:
        """Log that a trial lost its process, with what Ray says about it."""
        place = self._places.pop(ray_trial.trial_id, "a process that had not reported yet")
        logger.warning(
            "%s lost its process after epoch %d (%s): %s; %s, next attempt %d",
            lost_trial.title,
            lost_trial.epoch,
            place,
            lost_trial.reason,
            consequence,
            lost_trial.retries + 1,
            extra={
                "event": "trial_lost",
                "trial": lost_trial.number,
                "epoch": lost_trial.epoch,
                "next_attempt": lost_trial.retries + 1,
                "ray_error": _last_ray_error(ray_trial),
                "is_shown_elsewhere": True,
            },
        )

    def _stop_clock(self, ray_trial: RayTrial) -> None:
        """Count the seconds of a trial whose process has ended."""
        now = time.monotonic()
        self._counted_seconds += now - self._interval_starts.pop(ray_trial.trial_id, now)

    def _save_and_notify(
        self, ray_trial: RayTrial, updated_trial: Trial, metrics: EpochMetrics | None = None
    ) -> None:
        """Count the trial's seconds, write it to the ledger, and notify the listeners."""
        now = time.monotonic()
        seconds = now - self._interval_starts.get(ray_trial.trial_id, now)
        self._interval_starts[ray_trial.trial_id] = now
        self._counted_seconds += seconds
        updated_trial = replace(updated_trial, seconds=updated_trial.seconds + seconds)
        self._made_progress |= metrics is not None or updated_trial.state != "running"
        self._trials_by_id[ray_trial.trial_id] = updated_trial
        self._trials_by_key[updated_trial.key] = updated_trial
        self._ledger.save_trial(updated_trial)
        for listener in self._listeners:
            if updated_trial.kind == "base run":
                listener.on_base_run_update(updated_trial, metrics)
            elif updated_trial.kind == "repeat":
                listener.on_repeat_update(updated_trial, metrics)
            else:
                listener.on_trial_update(updated_trial, metrics)


class BudgetStopper(tune.Stopper):
    """Stop all trials when the ledger callback has reached its limit.

    Args:
        ledger_callback: The callback of the same sweep.
    """

    def __init__(self, ledger_callback: LedgerCallback) -> None:
        self._ledger_callback = ledger_callback

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Never stop a single trial."""
        return False

    def stop_all(self) -> bool:
        """Return whether all trials must stop."""
        return self._ledger_callback.update_limit_reached()

    def __getstate__(self) -> dict[str, Any]:
        # As for the callback: Tune's snapshots are never read.
        return {}


def _log_trial_start(trial: Trial) -> None:
    """Log that a trial starts, or resumes after the death of an earlier driver."""
    logger.info(
        "%s %s: %s",
        trial.title,
        f"resumes after epoch {trial.epoch}" if trial.epoch else "starts",
        ", ".join(f"{path}={value}" for path, value in trial.params.items()),
        extra={
            "event": "trial_start",
            "trial": trial.number,
            "epoch": trial.epoch,
            "attempt": trial.retries + 1,
            "params": trial.params,
        },
    )


def _log_trial_end(trial: Trial, how: str) -> None:
    """Log how a trial ended."""
    logger.info(
        "%s %s after epoch %d: %d epochs trained by itself, %.1f s, %d restarts",
        trial.title,
        how,
        trial.epoch,
        trial.trained_epochs,
        trial.seconds,
        trial.retries,
        extra={
            "event": "trial_end",
            "trial": trial.number,
            "epoch": trial.epoch,
            "best_after_burn_in": {
                name: value for name, value in trial.best.items() if "/" not in name
            },
        },
    )


def _last_ray_error(ray_trial: RayTrial) -> str:
    """Return Ray's message about the trial's last failure; empty if there is none."""
    error_file = ray_trial.error_file
    if not error_file or not Path(error_file).exists():
        return ""
    return Path(error_file).read_text(encoding="utf-8").rpartition("Failure # ")[2]


def _is_metric(key: str, value: Any) -> bool:
    """Return whether an entry of Tune's result is a number that the trial reported."""
    if key in _TUNE_RESULT_KEYS or isinstance(value, bool):
        return False
    return isinstance(value, int | float)
