"""raysweep tune"""

import json
import math
import shlex
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from raysweep import storage
from raysweep.commands import places, plain_name, runs_in, settings, ui_command, writable
from raysweep.data import Data, load
from raysweep.display import Progress, table_console, trial_table
from raysweep.pipeline.lock import alone
from raysweep.results import masking, sweep_facts, trial_advice
from raysweep.spec import SpecError, read_yaml
from raysweep.sweep.growth import check_growth
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.space import SearchSpace, load_space, space_file
from raysweep.tracking import SweepTracker, Tracker, embedded_store
from raysweep.training.config import named_method

if TYPE_CHECKING:
    from raysweep.sweep.relay import Budget, End, Listener
    from raysweep.sweep.resources import Resources

_BEST = 5


def run(args: Namespace) -> int:
    args.space = args.space and space_file(args.space)
    runs = runs_in(args, write=not args.plan)
    old = Ledger.open(runs / plain_name(args.resume, "--resume")) if args.resume else None
    space, data = _checked(args, old)
    resources = _resources(args)
    if args.plan:
        from raysweep.sweep.plan import plan

        return plan(space, data, resources, args.address, args.json, old.trials() if old else [])
    out = writable(args.out)
    exports = _exports(args)
    name = args.name or f"{space.config({}).method.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = runs / (args.resume or plain_name(name, "--name"))
    tracker = Tracker(embedded_store(out), out / "mlruns")
    listeners: list[Listener] = [SweepTracker(tracker, data.fingerprint), Progress(Console(stderr=True)), *exports]

    from raysweep.sweep.relay import SweepFailed
    from raysweep.sweep.tuner import run_sweep

    with alone(path):
        ledger = Ledger.open(path) if args.resume else Ledger.create(path, space)
        grown = space if args.resume else None
        if grown not in (None, ledger.space):
            # What grows is written once nothing can refuse it any more.
            tracker.ready()
        try:
            end = run_sweep(ledger, listeners, resources, args.address, _budget(args), data.fingerprint, grown)
        except SpecError:
            if not args.resume:
                ledger.discard()
            raise
        except SweepFailed as error:
            print(f"raysweep: the sweep failed: {error}", file=sys.stderr)
            return 1
    return _report(args, ledger, tracker, end)


def _exports(args: Namespace) -> "list[Listener]":
    if not args.optuna:
        return []
    from raysweep.sweep.export import StudyExport

    return [StudyExport(args.optuna)]


def _resources(args: Namespace) -> "Resources":
    from raysweep.sweep.resources import Resources

    return Resources(args.cpus_per_trial, args.gpus_per_trial, args.workers)


def _budget(args: Namespace) -> "Budget":
    from raysweep.sweep.relay import Budget

    return Budget(args.max_time or math.inf, math.inf if args.max_gpu_hours is None else 3600 * args.max_gpu_hours)


def _checked(args: Namespace, old: Ledger | None) -> tuple[SearchSpace, Data]:
    """Everything that can be refused before anything starts. old: the sweep to go on with."""
    if old is not None:
        space = _resumed(args, old)
    elif args.method is None and args.space is None:
        raise SpecError("METHOD is missing: name one of `raysweep list`, or give --space FILE or --resume NAME")
    else:
        if args.method is not None and args.space is None:
            named_method(args.method)
        space = load_space(args.method or "", settings(args), args.space)
    if args.trials:
        space = space.model_copy(update={"trials": args.trials})
    config = space.config({})
    for line in config.warnings():
        print(f"raysweep: warning: {line}", file=sys.stderr)
    return space, load(config.data)


def _resumed(args: Namespace, ledger: Ledger) -> SearchSpace:
    """The sweep's own space with what the command line changes: epochs by --set, ranges by --space."""
    old = ledger.space
    method = old.config({}).method.name
    if args.method not in (None, method):
        raise SpecError(f"--resume {args.resume}: is a sweep of {method!r}, not of {args.method!r}")
    space, changes = old, settings(args)
    if args.space:
        for key, value in (read_yaml(args.space).get("base") or {}).items():
            # The sweep's paths are absolute.
            same = (value, str(Path(str(value)).expanduser().resolve()))
            if key not in changes and old.base.get(key, value) not in same:
                raise SpecError(f"{args.space}: base.{key} = {value!r}: the sweep has {old.base[key]!r}; use --set")
        space = load_space(method, {**old.base, **changes}, args.space)
        space = space.model_copy(update={"trials": max(old.trials, space.trials)})
    elif changes:
        space = old.fixed(changes)
    check_growth(old, space, {trial.number: trial.settings for trial in ledger.trials()})
    return space


def _report(args: Namespace, ledger: Ledger, tracker: Tracker, end: "End") -> int:
    """The best trials, where they are, what sharing saved, and what to type next."""
    ranked, trials = ledger.ranked(), ledger.trials()
    ended = [trial for trial in trials if trial.state != "running"]
    out = places(args)
    asked, trained = sum(t.epoch for t in trials), sum(t.trained for t in trials)
    if args.json:
        print(json.dumps(sweep_facts(ledger), indent=1))
    elif ranked:
        console = table_console()
        names = [name.replace("_", " ") for name in ledger.space.objectives]
        if len(names) > 1:
            best = sorted(ledger.front(), key=lambda trial: -trial.score(ledger.space.objectives[0]))
            print(f"\n{len(best)} of {len(trials)} trials on the Pareto front of {' and '.join(names)}")
            console.print(trial_table(ledger, best))
        else:
            print(f"\nbest {min(_BEST, len(ranked))} of {len(trials)} trials by {names[0]} on the validation split")
            console.print(trial_table(ledger, ranked[:_BEST]))
        for line in masking(ledger):
            print(line)
        for line in trial_advice(ledger, ranked[0].number):
            print(f"trial {ranked[0].number:04d}: {line}")
        print(f"epochs: {asked} asked, {trained} trained, {asked - trained} taken over from other trials")
        print(f"\nbest checkpoint\n  {storage.name(ledger.checkpoint(ranked[0]))}")
        print(f"next\n  raysweep eval {ledger.name}/{ranked[0].number:04d}{out}")
        print(f"  raysweep show {ledger.name}{out}\n  {ui_command(tracker.uri)}")
    if end != "done":
        command = f"raysweep tune --resume {ledger.name}{out}{_held(args)}"
        print(f"raysweep: {len(ended)} of {ledger.space.total} trials done; go on with\n  {command}", file=sys.stderr)
        return 0 if end == "budget" else 130
    failed = [trial for trial in trials if trial.state == "failed"]
    if failed and len(failed) == len(trials):
        print(f"raysweep: every trial failed; the first: {failed[0].reason}", file=sys.stderr)
        return 1
    return 0


def _held(args: Namespace) -> str:
    """What the sweep does not know of itself, for a command that goes on: the cluster, what a trial holds, Optuna."""
    flags = [f"--address {shlex.quote(args.address)}"] if args.address else []
    flags += [f"--workers {args.workers}"] if args.workers > 1 else []
    flags += [f"--cpus-per-trial {args.cpus_per_trial:g}"] if args.cpus_per_trial != 1 else []
    flags += [f"--gpus-per-trial {args.gpus_per_trial:g}"] if args.gpus_per_trial is not None else []
    if args.optuna:
        from raysweep.sweep.export import masked

        flags.append(f"--optuna {shlex.quote(masked(args.optuna))}")
    return "".join(f" {flag}" for flag in flags)
