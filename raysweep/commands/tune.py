"""raysweep tune"""

import json
import sys
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from raysweep.commands import plain_name, settings, ui_command, writable
from raysweep.data import Data, load
from raysweep.display import Progress, trial_table
from raysweep.spec import SpecError
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.space import SearchSpace, load_space
from raysweep.tracking import SweepTracker, Tracker, embedded_store
from raysweep.training.config import named_method

_BEST = 5


def run(args: Namespace) -> int:
    space, data = _checked(args)
    if args.plan:
        from raysweep.sweep.plan import plan

        return plan(space, data, args)
    out = writable(args.out)
    ledger = _ledger(args, out / "runs", space)
    tracker = Tracker(embedded_store(out), out / "mlruns")

    from raysweep.sweep.tuner import Listener, Resources, run_sweep

    console = Console(stderr=True)
    listeners: list[Listener] = [SweepTracker(tracker, data.fingerprint), Progress(console)]
    try:
        resources = Resources(args.cpus_per_trial, _gpus(args), args.workers)
        run_sweep(ledger, listeners, resources, args.address)
    except SpecError:
        ledger.discard()
        raise
    return _report(args, ledger, tracker)


def _checked(args: Namespace) -> tuple[SearchSpace, Data]:
    """Everything that can be refused before anything starts."""
    if args.resume:
        ledger = Ledger.open(args.out / "runs" / plain_name(args.resume, "--resume"))
        if args.set or args.space:
            raise SpecError("--resume goes on with the settings it has: leave out --set and --space")
        space = ledger.space
    else:
        named_method(args.method)
        space = load_space(args.method, settings(args), args.space)
    if args.trials:
        space = space.model_copy(update={"trials": args.trials})
    config = space.config({})
    for line in config.warnings():
        print(f"raysweep: warning: {line}", file=sys.stderr)
    return space, load(config.data)


def _ledger(args: Namespace, runs: Path, space: SearchSpace) -> Ledger:
    if args.resume:
        ledger = Ledger.open(runs / args.resume)
        ledger.extend(space)
        return ledger
    name = args.name or f"{args.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Ledger.create(runs / plain_name(name, "--name"), space)


def _gpus(args: Namespace) -> float:
    if args.gpus_per_trial is not None:
        return float(args.gpus_per_trial)
    import torch

    return float(args.workers) if torch.cuda.is_available() else 0.0


def _report(args: Namespace, ledger: Ledger, tracker: Tracker) -> int:
    """The best trials, where they are, and what to type next."""
    ranked, trials = ledger.ranked(), ledger.trials()
    ended = [trial for trial in trials if trial.state != "running"]
    if args.json:
        rows = [asdict(t) | {"checkpoint": str(ledger.checkpoint(t))} for t in ranked]
        print(json.dumps({"sweep": ledger.name, "path": str(ledger.path), "trials": rows}, indent=1))
    elif ranked:
        metric = ledger.space.metric.replace("_", " ")
        print(f"\nbest {min(_BEST, len(ranked))} of {len(trials)} trials by {metric} on the validation split")
        Console(width=None if sys.stdout.isatty() else 160).print(trial_table(ledger, ranked[:_BEST]))
        print(f"\nbest checkpoint\n  {ledger.checkpoint(ranked[0])}")
        out = "" if args.out == Path() else f" --out {args.out}"
        print(f"next\n  raysweep show {ledger.name}{out}\n  {ui_command(tracker.uri)}")
    if len(ended) < ledger.space.total:
        out = "" if args.out == Path() else f" --out {args.out}"
        print(
            f"raysweep: interrupted; go on with\n  raysweep tune {args.method} --resume {ledger.name}{out}",
            file=sys.stderr,
        )
        return 130
    failed = [trial for trial in trials if trial.state == "failed"]
    if failed and len(failed) == len(trials):
        print(f"raysweep: every trial failed; the first: {failed[0].reason}", file=sys.stderr)
        return 1
    return 0
