"""The sweep: Ray Tune runs the trials, Optuna proposes them, ASHA stops the weak ones, the ledger remembers."""

import logging
import math
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from raysweep.data import Data, DataSpec, load
from raysweep.spec import SpecError
from raysweep.sweep.asha import Asha
from raysweep.sweep.cluster import connected
from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.search import FAILED, StudySearch
from raysweep.sweep.workers import DRIVER_CPUS, Release, train_on_workers
from raysweep.training.checkpoint import Checkpoint
from raysweep.training.config import RunConfig
from raysweep.training.prefix import PREFIXES, Prefixes
from raysweep.training.trainer import TrainingFailed, fit

# What kills a trial's process (a preempted node, a killed worker) costs nothing but the epoch it was in.
_RETRIES = 20
# So many trials with an error of the code end the sweep.
_BUGS = 3
BUG = "bug"


@dataclass(frozen=True)
class Resources:
    """What one trial holds, in Ray's logical units; several workers share it equally."""

    cpus: float = 1
    gpus: float = 0
    workers: int = 1

    def __post_init__(self) -> None:
        each = self.gpus / self.workers
        if each > 1 and each != int(each):
            wants = f"{self.gpus:g} GPUs for {self.workers} workers"
            raise SpecError(f"--gpus-per-trial: {wants} is {each:g} each: give each a whole number, or one or less")
        if self.workers > 1 and self.worker["CPU"] <= 0:
            raise SpecError(f"--cpus-per-trial: {self.cpus:g} CPUs are not enough for {self.workers} workers")

    @property
    def trial(self) -> dict[str, float]:
        """Held by the trial's own process, which trains if it is the only worker and waits if not."""
        return {"CPU": self.cpus, "GPU": self.gpus} if self.workers == 1 else {"CPU": DRIVER_CPUS}

    @property
    def worker(self) -> dict[str, float]:
        """Held by each of several workers: its share, less what lets the trial's own process stand beside it.

        Ray counts in ten thousandths; what is rounded up might not fit.
        """
        shares = {"CPU": self.cpus / self.workers - DRIVER_CPUS, "GPU": self.gpus / self.workers}
        return {name: math.floor(share * 10_000) / 10_000 for name, share in shares.items()}

    def concurrent(self, cluster: dict[str, float], nodes: Sequence[dict[str, float]] = ()) -> int:
        """How many trials run at once. Raises SpecError if not even one fits.

        nodes: what each node has; several workers may sit on different ones, each of them on one.
        """
        fits = [cluster.get("CPU", 0) / self.cpus]
        if self.gpus:
            fits.append(cluster.get("GPU", 0) / self.gpus)
        if min(fits) < 1:
            have = f"{cluster.get('CPU', 0):g} CPUs and {cluster.get('GPU', 0):g} GPUs"
            raise SpecError(f"a trial wants {self.cpus:g} CPUs and {self.gpus:g} GPUs, the cluster has {have}")
        if self.workers == 1:
            return int(min(fits))
        places = sum(min(int(node.get(k, 0) / v) for k, v in self.worker.items() if v) for node in nodes)
        if places < self.workers:
            each = f"{self.cpus / self.workers:g} CPUs and {self.gpus / self.workers:g} GPUs"
            raise SpecError(f"a trial wants {self.workers} workers of {each} each, the cluster's nodes hold {places}")
        return min(int(min(fits)), places // self.workers)


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


def run_sweep(
    ledger: Ledger,
    listeners: Sequence[Listener],
    resources: Resources | None = None,
    address: str | None = None,
    budget: Budget | None = None,
) -> None:
    """Run the trials that the ledger still lacks, or as many as the budget allows.

    Raises SpecError before anything runs if they cannot, SweepFailed when several have failed by what looks like a bug.
    """
    resources = resources or Resources()
    space = ledger.space
    config = space.config({})
    with connected(address) as cluster:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        concurrent = resources.concurrent(cluster, nodes)
        for listener in listeners:
            listener.started(ledger, concurrent)
        done = sum(trial.state != "running" for trial in ledger.trials())
        try:
            if done < space.total:
                relay = _Relay(ledger, config.epochs, listeners, resources, budget or Budget())
                _tuner(ledger, config, relay, resources, concurrent, space.total - done).fit()
                if len(relay.bugs) >= _BUGS:
                    raise SweepFailed(f"{len(relay.bugs)} trials met the same kind of error, see {relay.bugs[0]}")
        finally:
            for listener in listeners:
                listener.ended(ledger)


def _tuner(
    ledger: Ledger, config: RunConfig, relay: "_Relay", resources: Resources, concurrent: int, trials: int
) -> tune.Tuner:
    for name in ("ray.tune", "ray.train", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="ray")
    root, space = str(ledger.path.resolve()), ledger.space

    def trainable(proposal: dict[str, Any]) -> None:
        settings = space.config(proposal["settings"])
        path = Path(root) / "trials" / f"{proposal['number']:04d}"
        prefixes = Prefixes(Path(root).parent / PREFIXES) if space.share_prefixes else None
        if resources.workers == 1:
            _train(settings, path, resources.cpus, prefixes)
        else:
            train_on_workers(settings, path, resources.workers, resources.worker, prefixes)

    return tune.Tuner(
        tune.with_resources(trainable, resources.trial),
        tune_config=tune.TuneConfig(
            num_samples=trials,
            max_concurrent_trials=concurrent,
            search_alg=StudySearch(ledger),
            scheduler=_scheduler(ledger, config.epochs),
            # A trial that waits for its workers cannot be told to stop: its process ends, and the workers with it.
            reuse_actors=resources.workers == 1,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=root,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=_RETRIES),
            stop=_Stop(relay),
            callbacks=[relay, Release(Path(root) / "trials")],
        ),
    )


def _scheduler(ledger: Ledger, epochs: int) -> TrialScheduler:
    return FIFOScheduler() if ledger.space.scheduler.kind == "none" else Asha(ledger, epochs)


def _train(config: RunConfig, path: Path, cpus: float, prefixes: Prefixes | None) -> None:
    """One trial, in its own process: what `raysweep train` does, reporting to Tune.

    Only what the trial's settings or code explain is caught here: what kills the process is Tune's to retry.
    """
    import torch

    torch.set_num_threads(max(1, int(cpus)))

    def report(metrics: dict[str, float], checkpoint: Checkpoint) -> None:
        tune.report(metrics)

    try:
        fit(config, path, report, data=_load_once(config.data.model_dump_json()), prefixes=prefixes)
    except (TrainingFailed, SpecError) as error:
        tune.report({FAILED: str(error)})
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        hint = f"lower batch_size (now {config.batch_size}) or raise --gpus-per-trial"
        tune.report({FAILED: f"out of memory on {torch.cuda.get_device_name()}: {hint}"})
    except Exception as error:
        (path / "error.txt").write_text(traceback.format_exc())
        tune.report({FAILED: f"{type(error).__name__}: {error}", BUG: str(path / "error.txt")})


@cache
def _load_once(spec: str) -> Data:
    """Trials that follow each other in one process read the data once."""
    return load(DataSpec.model_validate_json(spec))


class _Relay(tune.Callback):
    """Tune's events, written to the ledger and passed on; it also knows when to end."""

    def __init__(
        self, ledger: Ledger, epochs: int, listeners: Sequence[Listener], resources: Resources, budget: Budget
    ) -> None:
        self.bugs: list[str] = []
        self._ledger = ledger
        self._epochs = epochs
        self._listeners = listeners
        self._gpus = resources.gpus
        self._budget = budget
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
        return len(self.bugs) >= _BUGS or self._budget.spent(wall, self._held * self._gpus)

    def on_trial_start(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        proposal = trial.config
        if trial.trial_id not in self._trials:
            known = {t.number: t for t in self._ledger.trials()}
            fresh = Trial(proposal["number"], proposal["settings"])
            self._update(trial, replace(known.get(fresh.number, fresh), state="running"))

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


class _Stop(tune.Stopper):
    """Ends all trials when the relay says so."""

    def __init__(self, relay: _Relay) -> None:
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
