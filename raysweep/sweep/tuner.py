"""The sweep: Ray Tune runs the trials, Optuna proposes them, ASHA stops the weak ones, the ledger remembers."""

import logging
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from raysweep.data import Data, DataSpec, load
from raysweep.sweep.asha import Asha
from raysweep.sweep.cluster import connected, nodes
from raysweep.sweep.failures import explain
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.relay import RETRIES, Budget, Listener, Relay, Stop
from raysweep.sweep.resources import Resources
from raysweep.sweep.search import StudySearch
from raysweep.sweep.workers import Release, train_on_workers
from raysweep.training.checkpoint import Checkpoint
from raysweep.training.config import RunConfig
from raysweep.training.prefix import PREFIXES, Prefixes
from raysweep.training.trainer import fit


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
        concurrent = resources.concurrent(cluster, nodes())
        for listener in listeners:
            listener.started(ledger, concurrent)
        relay = Relay(ledger, config.epochs, listeners, resources.gpus, budget or Budget())
        try:
            while (missing := space.total - _ended(ledger)) > 0 and relay.another_round():
                _tuner(ledger, config, relay, resources, concurrent, missing).fit()
                relay.check()
        finally:
            for listener in listeners:
                listener.ended(ledger)


def _ended(ledger: Ledger) -> int:
    return sum(trial.state != "running" for trial in ledger.trials())


def _tuner(
    ledger: Ledger, config: RunConfig, relay: Relay, resources: Resources, concurrent: int, trials: int
) -> tune.Tuner:
    for name in ("ray.tune", "ray.train", "ray"):
        logging.getLogger(name).setLevel(logging.CRITICAL if name == "ray.tune" else logging.ERROR)
    warnings.filterwarnings("ignore", module="ray")
    root, space = str(ledger.path.resolve()), ledger.space

    def trainable(proposal: dict[str, Any]) -> None:
        settings = space.config(proposal["settings"])
        path = Path(root) / "trials" / f"{proposal['number']:04d}"
        store = Prefixes(Path(root).parent / PREFIXES, limit=int(space.prefix_gib * 2**30))
        prefixes = store if space.share_prefixes else None
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
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            stop=Stop(relay),
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
    except Exception as error:
        tune.report(explain(error, config, path))


@cache
def _load_once(spec: str) -> Data:
    """Trials that follow each other in one process read the data once."""
    return load(DataSpec.model_validate_json(spec))
