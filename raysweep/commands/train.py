"""raysweep train"""

import json
import sys
from argparse import Namespace

from raysweep.commands import plain_name, settings, ui_command, writable
from raysweep.data import load
from raysweep.tracking import Tracker, embedded_store
from raysweep.training.checkpoint import Checkpoint
from raysweep.training.presets import resolve
from raysweep.training.trainer import OBJECTIVE, TrainingFailed, fit


def run(args: Namespace) -> int:
    config = resolve(args.method, settings(args))
    name = plain_name(args.name, "--name") if args.name else f"{config.method.name}-{config.digest()[:8]}"
    data = load(config.data)
    for line in config.warnings():
        print(f"raysweep: warning: {line}", file=sys.stderr)
    out = writable(args.out)
    path = out / "runs" / name
    tracker = Tracker(embedded_store(out), out / "mlruns")
    tags = {"raysweep.kind": "train", "raysweep.run": f"{name}-{config.digest()}"}
    run_id: list[str] = []

    def report(metrics: dict[str, float], checkpoint: Checkpoint) -> None:
        if not run_id:
            run_id.append(tracker.run(name, tags))
            tracker.config(run_id[0], config, data.fingerprint)
        numbers = " ".join(f"{k} {v:.3f}" for k, v in metrics.items() if "/" not in k and k != "epoch")
        loss = metrics["train/loss"]
        print(f"epoch {checkpoint.epoch}/{config.epochs} loss {loss:.3f} {numbers}", file=sys.stderr)
        tracker.metrics(run_id[0], metrics, checkpoint.epoch)

    try:
        fitted = fit(config, path, report, data=data)
    except TrainingFailed as error:
        if run_id:
            tracker.close(run_id[0], "FAILED")
        print(f"raysweep: training failed: {error}", file=sys.stderr)
        return 1
    best = {k: v for k, v in fitted.best.metrics.items() if "/" not in k}
    tracker.metrics(run_id[0], {f"best/{k}": v for k, v in best.items()}, fitted.best.epoch)
    tracker.artifacts(run_id[0], fitted.best.path, "checkpoint")
    tracker.plots(run_id[0], path, fitted.last.history)
    tracker.close(run_id[0], "FINISHED")
    if args.json:
        print(json.dumps({"checkpoint": str(fitted.best.path), "epoch": fitted.best.epoch, "metrics": best}, indent=1))
        return 0
    print(f"best epoch {fitted.best.epoch} by {OBJECTIVE}: {best[OBJECTIVE]:.3f}\n  {fitted.best.path}")
    print(f"compare with\n  {ui_command(tracker.uri)}")
    return 0
