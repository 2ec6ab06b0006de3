"""raysweep train"""

import json
import sys
from argparse import Namespace
from pathlib import Path

from raysweep import storage
from raysweep.commands import plain_name, runs_in, settings, ui_command, writable
from raysweep.data import Data, load
from raysweep.pipeline.lock import alone
from raysweep.spec import SpecError
from raysweep.tracking import Tracker, embedded_store, train_tags
from raysweep.training.advice import advise
from raysweep.training.checkpoint import Checkpoint, Run
from raysweep.training.config import RunConfig
from raysweep.training.pause import Interrupted, told_to_end
from raysweep.training.prefix import PREFIXES, Prefixes
from raysweep.training.presets import resolve
from raysweep.training.trainer import TrainingFailed, check_goes_on, fit


def run(args: Namespace) -> int:
    config = resolve(args.method, settings(args))
    name = plain_name(args.name, "--name") if args.name else f"{config.method.name}-{config.digest()[:8]}"
    data = load(config.data)
    for line in config.warnings():
        print(f"raysweep: warning: {line}", file=sys.stderr)
    out, runs = writable(args.out), runs_in(args)
    with alone(runs / name):
        return _train(args, config, data, out, runs / name)


def _train(args: Namespace, config: RunConfig, data: Data, out: Path, path: Path) -> int:
    if storage.pull_file(path / "sweep.json"):
        raise SpecError(f"{storage.name(path)} holds a sweep: choose another --name")
    if (last := Run(path).last()) is not None:
        # Before the tracker reopens what may be another run.
        check_goes_on(last, config, data.fingerprint)
    name = path.name
    tracker = Tracker(embedded_store(out), out / "mlruns").ready()
    tags = train_tags(Run(path))
    known = tracker.find(tags)
    reported = tracker.last_step(known) if known else 0
    run_id = tracker.run(name, tags)
    tracker.config(run_id, config, data.fingerprint)

    def report(metrics: dict[str, float], checkpoint: Checkpoint) -> None:
        numbers = " ".join(f"{k} {v:.3f}" for k, v in metrics.items() if "/" not in k and k != "epoch")
        epoch, loss = int(metrics["epoch"]), metrics["train/loss"]
        print(f"epoch {epoch}/{config.epochs} loss {loss:.3f} {numbers}", file=sys.stderr)
        tracker.metrics(run_id, metrics, epoch)

    store = Prefixes(path.parent / PREFIXES)
    try:
        with told_to_end() as told:
            fitted = fit(config, path, report, data=data, prefixes=store, reported=reported, interrupted=told)
    except Interrupted as reason:
        tracker.close(run_id, "KILLED")
        print(f"raysweep: {reason}; the same command goes on from there", file=sys.stderr)
        return 130
    except SpecError:
        tracker.close(run_id, "FAILED")
        raise
    except TrainingFailed as error:
        tracker.close(run_id, "FAILED")
        print(f"raysweep: training failed: {error}", file=sys.stderr)
        return 1
    best = {k: v for k, v in fitted.best.metrics.items() if "/" not in k}
    tracker.metrics(run_id, {f"best/{k}": v for k, v in best.items()}, fitted.best.epoch)
    tracker.artifacts(run_id, fitted.best.path, "checkpoint")
    tracker.plots(run_id, path, fitted.last.history)
    advice = advise(config, fitted.last.history)
    tracker.describe(run_id, advice)
    tracker.close(run_id, "FINISHED")
    where = storage.name(fitted.best.path)
    if args.json:
        facts = {"checkpoint": where, "epoch": fitted.best.epoch, "metrics": best, "advice": advice}
        print(json.dumps(facts, indent=1))
        return 0
    objective = config.validation.objective
    print(f"best epoch {fitted.best.epoch} by {objective}: {best[objective]:.3f}\n  {where}")
    for line in advice:
        print(f"note: {line}")
    print(f"compare with\n  {ui_command(tracker.uri)}")
    return 0
