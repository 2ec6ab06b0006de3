"""raysweep train"""

import json
import math
import sys
from argparse import Namespace
from pathlib import Path

from rich.console import Console

from raysweep import storage
from raysweep.commands import open_tracker, plain_name, runs_in, settings, ui_command, writable
from raysweep.data import Data, load
from raysweep.display import figures, step_bar
from raysweep.pipeline.lock import alone
from raysweep.spec import SpecError
from raysweep.sweep.failures import BUG, FAILED, explain
from raysweep.tracking import Tracker, train_tags
from raysweep.training.advice import advise
from raysweep.training.checkpoint import Checkpoint, Run
from raysweep.training.config import RunConfig
from raysweep.training.pause import Interrupted, told_to_end
from raysweep.training.prefix import PREFIXES, Prefixes
from raysweep.training.presets import resolve
from raysweep.training.trainer import Fitted, check_goes_on, fit
from raysweep.wording import counted


def run(args: Namespace) -> int:
    config = resolve(args.method, settings(args))
    name = plain_name(args.name, "--name") if args.name else f"{config.method.name}-{config.digest()[:8]}"
    data = load(config.data)
    for line in config.warnings():
        print(f"raysweep: warning: {line}", file=sys.stderr)
    out, path = writable(args.out), runs_in(args) / name
    with alone(path):
        if storage.pull_file(path / "sweep.json"):
            raise SpecError(f"{storage.name(path)} holds a sweep: choose another --name")
        if (last := Run(path).last()) is not None:
            # Before the tracker reopens what may be another run.
            check_goes_on(last, config, data.fingerprint)
        return _train(args, config, data, open_tracker(out), path)


def _train(args: Namespace, config: RunConfig, data: Data, tracker: Tracker, path: Path) -> int:
    """Train and tell; however that ends, the run in MLflow is closed."""
    tags = train_tags(Run(path))
    known = tracker.find(tags)
    reported = tracker.last_step(known) if known else 0
    run_id = tracker.run(path.name, tags)
    try:
        tracker.config(run_id, config, data.fingerprint)
        fitted = _fit(config, data, tracker, run_id, path, reported)
        advice = _record(config, tracker, run_id, fitted)
    except Interrupted as reason:
        tracker.close(run_id, "KILLED")
        print(f"raysweep: {reason}; the same command goes on from there", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        tracker.close(run_id, "KILLED")
        raise
    except (SpecError, storage.StoreFailed):
        tracker.close(run_id, "FAILED")
        raise
    except Exception as error:
        why = explain(error, config, path, trial=False)
        more = f"; its traceback is in {storage.name(path / 'error.txt')}" if BUG in why else ""
        print(f"raysweep: training failed: {why[FAILED]}{more}", file=sys.stderr)
        tracker.close(run_id, "FAILED")
        return 1
    return _tell(args, config, tracker, fitted, advice)


def _fit(config: RunConfig, data: Data, tracker: Tracker, run_id: str, path: Path, reported: int) -> Fitted:
    def report(metrics: dict[str, float], checkpoint: Checkpoint) -> None:
        epoch, loss = int(metrics["epoch"]), metrics["train/loss"]
        print(f"epoch {epoch}/{config.epochs} loss {loss:.3f} {figures(metrics)}", file=sys.stderr)
        tracker.metrics(run_id, metrics, epoch)

    what, steps = f"{config.method.name} on {config.data.name}", math.ceil(len(data.train) / config.batch_size)
    print(
        f"{what}: {counted(config.epochs, 'epoch')} of {counted(steps, 'step')}, in {storage.name(path)}",
        file=sys.stderr,
    )
    store = Prefixes(path.parent / PREFIXES)
    with told_to_end() as told, step_bar(Console(stderr=True), config.epochs, steps) as bar:
        return fit(config, path, report, data=data, prefixes=store, reported=reported, interrupted=told, stepped=bar)


def _record(config: RunConfig, tracker: Tracker, run_id: str, fitted: Fitted) -> list[str]:
    """What MLflow keeps of a run that has ended; the advice in it."""
    tracker.best(run_id, fitted.best.metrics)
    tracker.artifacts(run_id, fitted.best.path, "checkpoint")
    tracker.plots(run_id, fitted.last.path.parent, fitted.last.history)
    advice = advise(config, fitted.last.history)
    tracker.describe(run_id, advice)
    tracker.close(run_id, "FINISHED")
    return advice


def _tell(args: Namespace, config: RunConfig, tracker: Tracker, fitted: Fitted, advice: list[str]) -> int:
    best = {k: v for k, v in fitted.best.metrics.items() if "/" not in k}
    where = storage.name(fitted.best.path)
    if args.json:
        facts = {"checkpoint": where, "epoch": fitted.best.epoch, "metrics": best, "advice": advice}
        print(json.dumps(facts, indent=1))
        return 0
    objective = config.validation.objective
    print(f"best epoch {fitted.best.epoch} by {objective}: {best[objective]:.3f}\n  {where}")
    for line in advice:
        print(f"note: {line}")
    if tracker.uri:
        print(f"compare with\n  {ui_command(tracker.uri)}")
    return 0
