"""The sweep: Ray Tune runs the trials, Optuna proposes them, ASHA stops the weak ones, the ledger remembers."""

import logging
import traceback
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from raysweep import storage
from raysweep.data import Data, DataSpec, load
from raysweep.spec import SpecError
from raysweep.sweep.asha import Asha
from raysweep.sweep.cluster import connected
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.relay import BUG, BUGS, Budget, Listener, Relay, Stop, SweepFailed
from raysweep.sweep.resources import Resources
from raysweep.sweep.search import FAILED, StudySearch
from raysweep.sweep.workers import Release, train_on_workers
from raysweep.training.checkpoint import Checkpoint
from raysweep.training.config import RunConfig
from raysweep.training.prefix import PREFIXES, Prefixes
from raysweep.training.trainer import TrainingFailed, fit

# What kills a trial's process (a preempted node, a killed worker) costs nothing but the epoch it was in.
_RETRIES = 20


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
                relay = Relay(ledger, config.epochs, listeners, resources.gpus, budget or Budget())
                _tuner(ledger, config, relay, resources, concurrent, space.total - done).fit()
                if len(relay.bugs) >= BUGS:
                    raise SweepFailed(f"{len(relay.bugs)} trials met the same kind of error, see {relay.bugs[0]}")
        except tune.TuneError as error:
            # Tune wraps what the ledger's writes raise.
            if isinstance(error.__context__, storage.StoreFailed | SpecError):
                raise error.__context__ from None
            raise
        finally:
            for listener in listeners:
                listener.ended(ledger)


def _tuner(
    ledger: Ledger, config: RunConfig, relay: Relay, resources: Resources, concurrent: int, trials: int
) -> tune.Tuner:
    for name in ("ray.tune", "ray.train", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="ray")
    where, space = storage.name(ledger.path.resolve()), ledger.space

    def trainable(proposal: dict[str, Any]) -> None:
        settings = space.config(proposal["settings"])
        # Each machine has its own copy of a bucket.
        root = storage.at(where)
        path = root / "trials" / f"{proposal['number']:04d}"
        prefixes = Prefixes(root.parent / PREFIXES) if space.share_prefixes else None
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
            # Nothing but Tune's own scratch: no sweep starts from it.
            storage_path=str(ledger.path.resolve()),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=_RETRIES),
            stop=Stop(relay),
            callbacks=[relay, Release(ledger.path / "trials")],
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
    except storage.StoreFailed:
        raise
    except Exception as error:
        log = path / "error.txt"
        log.write_text(traceback.format_exc())
        storage.push(log)
        tune.report({FAILED: f"{type(error).__name__}: {error}", BUG: storage.name(log)})


@cache
def _load_once(spec: str) -> Data:
    """Trials that follow each other in one process read the data once."""
    return load(DataSpec.model_validate_json(spec))
