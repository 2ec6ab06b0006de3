"""The sweep: Ray Tune runs the trials, Optuna proposes them, ASHA stops the weak ones, the ledger
remembers.
"""

import logging
import math
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from raysweep import storage
from raysweep.data import load_data
from raysweep.data.dataset_cache import CachedDataset
from raysweep.spec import SpecError
from raysweep.sweep.asha import AshaScheduler
from raysweep.sweep.cluster import connect_to_cluster, node_capacities
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.multi_worker_trial import ReleaseWorkersCallback, train_on_workers
from raysweep.sweep.node_probe import find_node_problems, require_visible
from raysweep.sweep.optuna_search import LedgerSearcher
from raysweep.sweep.preemption import (
    PreemptibleMixin,
    defer_sigterm,
    exit_preempted,
    termination_requested,
)
from raysweep.sweep.resources import Resources
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.tune_callbacks import (
    MAX_TRIAL_RETRIES,
    Budget,
    BudgetStopper,
    LedgerCallback,
    SweepEndReason,
    SweepListener,
)
from raysweep.training.callbacks import FunctionCallback
from raysweep.training.checkpoint import TrainingCheckpoint
from raysweep.training.config import TrainingConfig
from raysweep.training.failure_reports import failure_report
from raysweep.training.mid_epoch_checkpoint import TrainingInterrupted
from raysweep.training.prefix_cache import PREFIX_CACHE_FOLDER, PrefixCache
from raysweep.training.trainer import train_model


def run_sweep(
    ledger: Ledger,
    listeners: Sequence[SweepListener],
    resources: Resources | None = None,
    address: str | None = None,
    budget: Budget | None = None,
    fingerprint: str | None = None,
    extended_space: SearchSpace | None = None,
) -> SweepEndReason:
    """Run the trials that the ledger still lacks, or as many as the budget allows: why it ended.

    fingerprint: the data's, where the caller knows it; grown: what the sweep is to become (see
    `Ledger.extend`). Raises SpecError before anything runs or changes if they cannot, SweepFailed
    when several have failed by what looks like a bug.
    """
    resources = resources or Resources()
    space = extended_space or ledger.space
    config = space.trial_config({})
    source = CachedDataset(config.data, fingerprint or load_data(config.data).fingerprint)
    with connect_to_cluster(address) as cluster:
        if problems := find_node_problems(ledger.path, source):
            raise SpecError(problems)
        resources = resources.resolve(cluster)
        budget = budget or Budget()
        if math.isfinite(budget.gpu_seconds) and not resources.n_gpus:
            raise SpecError("--max-gpu-hours: the trials hold no GPU; use --max-time")
        concurrent = resources.max_concurrent_trials(cluster, node_capacities())
        if extended_space is not None:
            ledger.extend_space(extended_space)
        for listener in listeners:
            listener.on_sweep_start(ledger, concurrent)
        relay = LedgerCallback(ledger, config.epochs, listeners, resources.n_gpus, budget)
        try:
            while (
                wanted := space.n_trials - _count_ended_trials(ledger)
            ) > 0 and relay.start_round():
                with _restore_signal_handlers():
                    _build_tuner(ledger, source, relay, resources, concurrent, wanted).fit()
                relay.check_round()
        except tune.TuneError as error:
            # Tune wraps what the ledger's writes raise.
            if isinstance(error.__context__, storage.BucketUnavailable | SpecError):
                raise error.__context__ from None
            raise
        finally:
            for listener in listeners:
                listener.on_sweep_end(ledger)
    if _count_ended_trials(ledger) >= space.n_trials:
        return "done"
    return "budget" if relay.limit_reached else "interrupted"


@contextmanager
def _restore_signal_handlers() -> Iterator[None]:
    """Tune leaves its own behind: after a sweep without Ctrl-C, the first one would do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _count_ended_trials(ledger: Ledger) -> int:
    return sum(trial.state != "running" for trial in ledger.load_trials())


def _build_tuner(
    ledger: Ledger,
    cached_dataset: CachedDataset,
    ledger_callback: LedgerCallback,
    resources: Resources,
    concurrency: int,
    n_trials: int,
) -> tune.Tuner:
    for name in ("ray.tune", "ray.train", "ray"):
        logging.getLogger(name).setLevel(logging.CRITICAL if name == "ray.tune" else logging.ERROR)
    warnings.filterwarnings("ignore", module="ray")
    where, space = storage.uri_of(ledger.path.resolve()), ledger.space

    def trainable(proposal: dict[str, Any]) -> None:
        settings = space.trial_config(proposal["params"])
        # Each machine has its own copy of a bucket.
        root = storage.local_path(where)
        path = root / "trials" / f"{proposal['number']:04d}"
        store = PrefixCache(
            root.parent / PREFIX_CACHE_FOLDER, max_bytes=int(space.prefix_gib * 2**30)
        )
        prefixes = store if space.share_prefixes else None
        if resources.workers == 1:
            _train_trial(settings, path, resources.cpus, prefixes, cached_dataset)
        else:
            train_on_workers(
                settings,
                path,
                resources.workers,
                resources.worker_resources,
                prefixes,
                cached_dataset,
            )

    trainable.__mixins__ = (PreemptibleMixin,)  # type: ignore[attr-defined]
    return tune.Tuner(
        tune.with_resources(trainable, resources.trial_resources),
        tune_config=tune.TuneConfig(
            num_samples=n_trials,
            max_concurrent_trials=concurrency,
            search_alg=LedgerSearcher(ledger),
            scheduler=_build_scheduler(ledger, space.trial_config({}).epochs),
            # A trial that waits for its workers cannot be told to stop: its process ends, and the
            # workers with it.
            reuse_actors=resources.workers == 1,
        ),
        run_config=tune.RunConfig(
            name="ray",
            # Nothing but Tune's own scratch: no sweep starts from it.
            storage_path=str(ledger.path.resolve()),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=MAX_TRIAL_RETRIES),
            stop=BudgetStopper(ledger_callback),
            callbacks=[ledger_callback, ReleaseWorkersCallback(ledger.path / "trials")],
        ),
    )


def _build_scheduler(ledger: Ledger, max_epochs: int) -> TrialScheduler:
    return (
        FIFOScheduler()
        if ledger.space.scheduler.kind == "none"
        else AshaScheduler(ledger, max_epochs)
    )


def _train_trial(
    config: TrainingConfig,
    run_path: Path,
    cpus: float,
    prefix_cache: PrefixCache | None,
    cached_dataset: CachedDataset,
) -> None:
    """One trial, in its own process: what `raysweep train` does, reporting to Tune.

    Only what the trial's settings or code explain is caught here: what kills the process is Tune's
    to retry.
    """
    import torch

    torch.set_num_threads(max(1, int(cpus)))

    def report(metrics: dict[str, float], checkpoint: TrainingCheckpoint) -> None:
        tune.report(metrics)

    try:
        require_visible(run_path.parent.parent)
        with defer_sigterm():
            train_model(
                config,
                run_path,
                FunctionCallback(report, should_interrupt=termination_requested),
                data=cached_dataset.load_shared(config.data),
                prefix_cache=prefix_cache,
            )
    except TrainingInterrupted:
        exit_preempted()
    except storage.BucketUnavailable:
        raise
    except Exception as error:
        tune.report(failure_report(error, config, run_path))
