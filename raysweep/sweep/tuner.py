"""The sweep: Ray Tune runs the trials, Optuna proposes them, ASHA stops the weak ones, the ledger remembers."""

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
from raysweep.data import load
from raysweep.data.shared import Source
from raysweep.spec import SpecError
from raysweep.sweep.asha import Asha
from raysweep.sweep.cluster import connected, nodes
from raysweep.sweep.failures import explain
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.preemption import Preemptible, busy, leave, told
from raysweep.sweep.probe import missing, sees
from raysweep.sweep.relay import RETRIES, Budget, End, Listener, Relay, Stop
from raysweep.sweep.resources import Resources
from raysweep.sweep.search import StudySearch
from raysweep.sweep.space import SearchSpace
from raysweep.sweep.workers import Release, train_on_workers
from raysweep.training.checkpoint import Checkpoint
from raysweep.training.config import RunConfig
from raysweep.training.pause import Interrupted
from raysweep.training.prefix import PREFIXES, Prefixes
from raysweep.training.trainer import fit


def run_sweep(
    ledger: Ledger,
    listeners: Sequence[Listener],
    resources: Resources | None = None,
    address: str | None = None,
    budget: Budget | None = None,
    fingerprint: str | None = None,
    grown: SearchSpace | None = None,
) -> End:
    """Run the trials that the ledger still lacks, or as many as the budget allows: why it ended.

    fingerprint: the data's, where the caller knows it; grown: what the sweep is to become (see `Ledger.extend`). Raises
    SpecError before anything runs or changes if they cannot, SweepFailed when several have failed by what looks like a
    bug.
    """
    resources = resources or Resources()
    space = grown or ledger.space
    config = space.config({})
    source = Source(config.data, fingerprint or load(config.data).fingerprint)
    with connected(address) as cluster:
        if problems := missing(ledger.path, source):
            raise SpecError(problems)
        resources = resources.on(cluster)
        budget = budget or Budget()
        if math.isfinite(budget.gpu_seconds) and not resources.held_gpus:
            raise SpecError("--max-gpu-hours: the trials hold no GPU; use --max-time")
        concurrent = resources.concurrent(cluster, nodes())
        if grown is not None:
            ledger.extend(grown)
        for listener in listeners:
            listener.started(ledger, concurrent)
        relay = Relay(ledger, config.epochs, listeners, resources.held_gpus, budget)
        try:
            while (wanted := space.total - _ended(ledger)) > 0 and relay.another_round():
                with _handlers_put_back():
                    _tuner(ledger, source, relay, resources, concurrent, wanted).fit()
                relay.check()
        except tune.TuneError as error:
            # Tune wraps what the ledger's writes raise.
            if isinstance(error.__context__, storage.StoreFailed | SpecError):
                raise error.__context__ from None
            raise
        finally:
            for listener in listeners:
                listener.ended(ledger)
    if _ended(ledger) >= space.total:
        return "done"
    return "budget" if relay.ended else "interrupted"


@contextmanager
def _handlers_put_back() -> Iterator[None]:
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


def _ended(ledger: Ledger) -> int:
    return sum(trial.state != "running" for trial in ledger.trials())


def _tuner(
    ledger: Ledger, source: Source, relay: Relay, resources: Resources, concurrent: int, trials: int
) -> tune.Tuner:
    for name in ("ray.tune", "ray.train", "ray"):
        logging.getLogger(name).setLevel(logging.CRITICAL if name == "ray.tune" else logging.ERROR)
    warnings.filterwarnings("ignore", module="ray")
    where, space = storage.name(ledger.path.resolve()), ledger.space

    def trainable(proposal: dict[str, Any]) -> None:
        settings = space.config(proposal["settings"])
        # Each machine has its own copy of a bucket.
        root = storage.at(where)
        path = root / "trials" / f"{proposal['number']:04d}"
        store = Prefixes(root.parent / PREFIXES, limit=int(space.prefix_gib * 2**30))
        prefixes = store if space.share_prefixes else None
        if resources.workers == 1:
            _train(settings, path, resources.cpus, prefixes, source)
        else:
            train_on_workers(settings, path, resources.workers, resources.worker, prefixes, source)

    trainable.__mixins__ = (Preemptible,)  # type: ignore[attr-defined]
    return tune.Tuner(
        tune.with_resources(trainable, resources.trial),
        tune_config=tune.TuneConfig(
            num_samples=trials,
            max_concurrent_trials=concurrent,
            search_alg=StudySearch(ledger),
            scheduler=_scheduler(ledger, space.config({}).epochs),
            # A trial that waits for its workers cannot be told to stop: its process ends, and the workers with it.
            reuse_actors=resources.workers == 1,
        ),
        run_config=tune.RunConfig(
            name="ray",
            # Nothing but Tune's own scratch: no sweep starts from it.
            storage_path=str(ledger.path.resolve()),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            stop=Stop(relay),
            callbacks=[relay, Release(ledger.path / "trials")],
        ),
    )


def _scheduler(ledger: Ledger, epochs: int) -> TrialScheduler:
    return FIFOScheduler() if ledger.space.scheduler.kind == "none" else Asha(ledger, epochs)


def _train(config: RunConfig, path: Path, cpus: float, prefixes: Prefixes | None, source: Source) -> None:
    """One trial, in its own process: what `raysweep train` does, reporting to Tune.

    Only what the trial's settings or code explain is caught here: what kills the process is Tune's to retry.
    """
    import torch

    torch.set_num_threads(max(1, int(cpus)))

    def report(metrics: dict[str, float], checkpoint: Checkpoint) -> None:
        tune.report(metrics)

    try:
        sees(path.parent.parent)
        with busy():
            fit(config, path, report, data=source.load(config.data), prefixes=prefixes, interrupted=told)
    except Interrupted:
        leave()
    except storage.StoreFailed:
        raise
    except Exception as error:
        tune.report(explain(error, config, path))
