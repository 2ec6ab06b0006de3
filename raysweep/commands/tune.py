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
from raysweep.commands import (
    check_plain_name,
    format_location_flags,
    format_ui_command,
    make_writable_folder,
    parse_overrides,
    resolve_runs_folder,
)
from raysweep.data import Dataset, load_data
from raysweep.formatting import redact_secrets
from raysweep.leases import hold_folder_lease
from raysweep.results import advise_on_trial, describe_masking, sweep_to_json
from raysweep.spec import SpecError, read_yaml
from raysweep.sweep.extension_checks import check_extension
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace, load_space, resolve_space_path
from raysweep.terminal import SweepDisplay, build_trial_table, create_table_console
from raysweep.tracking import SweepTracker, Tracker, tracking_uri
from raysweep.training.config import method_by_name

if TYPE_CHECKING:
    from raysweep.sweep.resources import Resources
    from raysweep.sweep.tune_callbacks import Budget, SweepEndReason, SweepListener

_MAX_TRIALS_PRINTED = 5


def run_command(args: Namespace) -> int:
    args.space = args.space and resolve_space_path(args.space)
    runs = resolve_runs_folder(args, for_writing=not args.plan)
    old = Ledger.open(runs / check_plain_name(args.resume, "--resume")) if args.resume else None
    space, data = _load_checked_space(args, old)
    resources = _make_resources(args)
    if args.plan:
        from raysweep.sweep.plan import plan_sweep

        return plan_sweep(
            space, data, resources, args.address, args.json, old.load_trials() if old else []
        )
    out = make_writable_folder(args.out)
    exports = _make_export_listeners(args)
    name = args.name or f"{space.trial_config({}).method.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = runs / (args.resume or check_plain_name(name, "--name"))
    tracker = Tracker(tracking_uri(out), out / "mlruns")
    listeners: list[SweepListener] = [
        SweepTracker(tracker, data.fingerprint),
        SweepDisplay(Console(stderr=True)),
        *exports,
    ]

    from raysweep.sweep.tune_callbacks import SweepFailed
    from raysweep.sweep.tuner import run_sweep

    with hold_folder_lease(path):
        ledger = Ledger.open(path) if args.resume else Ledger.create(path, space)
        grown = space if args.resume else None
        if grown not in (None, ledger.space):
            # What grows is written once nothing can refuse it any more.
            tracker.wait_until_ready()
        try:
            end = run_sweep(
                ledger,
                listeners,
                resources,
                args.address,
                _make_budget(args),
                data.fingerprint,
                grown,
            )
        except SpecError:
            if not args.resume:
                ledger.delete_if_empty()
            raise
        except SweepFailed as error:
            print(f"raysweep: the sweep failed: {error}", file=sys.stderr)
            return 1
    return _print_sweep_result(args, ledger, tracker, end)


def _make_export_listeners(args: Namespace) -> "list[SweepListener]":
    if not args.optuna:
        return []
    from raysweep.sweep.optuna_export import OptunaExporter

    return [OptunaExporter(args.optuna)]


def _make_resources(args: Namespace) -> "Resources":
    from raysweep.sweep.resources import Resources

    return Resources(args.cpus_per_trial, args.gpus_per_trial, args.workers)


def _make_budget(args: Namespace) -> "Budget":
    from raysweep.sweep.tune_callbacks import Budget

    return Budget(
        args.max_time or math.inf,
        math.inf if args.max_gpu_hours is None else 3600 * args.max_gpu_hours,
    )


def _load_checked_space(
    args: Namespace, resumed_ledger: Ledger | None
) -> tuple[SearchSpace, Dataset]:
    """Everything that can be refused before anything starts. old: the sweep to go on with."""
    if resumed_ledger is not None:
        space = _extend_resumed_space(args, resumed_ledger)
    elif args.method is None and args.space is None:
        raise SpecError(
            "METHOD is missing: name one of `raysweep list`, or give --space FILE or --resume NAME"
        )
    else:
        if args.method is not None and args.space is None:
            method_by_name(args.method)
        space = load_space(args.method or "", parse_overrides(args), args.space)
    if args.trials:
        space = space.replace(trials=args.trials)
    config = space.trial_config({})
    for line in config.list_warnings():
        print(f"raysweep: warning: {line}", file=sys.stderr)
    return space, load_data(config.data)


def _extend_resumed_space(args: Namespace, ledger: Ledger) -> SearchSpace:
    """The sweep's own space with what the command line changes: epochs by --set, ranges by --space."""
    old = ledger.space
    method = old.trial_config({}).method.name
    if args.method not in (None, method):
        raise SpecError(f"--resume {args.resume}: is a sweep of {method!r}, not of {args.method!r}")
    space, changes = old, parse_overrides(args)
    if args.space:
        for key, value in (read_yaml(args.space).get("base") or {}).items():
            # The sweep's paths are absolute.
            same = (value, str(Path(str(value)).expanduser().resolve()))
            if key not in changes and old.base.get(key, value) not in same:
                raise SpecError(
                    f"{args.space}: base.{key} = {value!r}: the sweep has {old.base[key]!r}; use --set"
                )
        space = load_space(method, {**old.base, **changes}, args.space)
        space = space.replace(trials=max(old.trials, space.trials))
    elif changes:
        space = old.with_overrides(changes)
    check_extension(old, space, {trial.number: trial.params for trial in ledger.load_trials()})
    return space


def _print_sweep_result(
    args: Namespace, ledger: Ledger, tracker: Tracker, end_reason: "SweepEndReason"
) -> int:
    """The best trials, where they are, what sharing saved, and what to type next."""
    ranked, trials = ledger.rank_trials(), ledger.load_trials()
    ended = [trial for trial in trials if trial.state != "running"]
    out = format_location_flags(args)
    asked, trained = sum(t.epoch for t in trials), sum(t.trained_epochs for t in trials)
    if args.json:
        print(json.dumps(sweep_to_json(ledger), indent=1))
    elif ranked:
        console = create_table_console()
        names = [name.replace("_", " ") for name in ledger.space.objectives]
        if len(names) > 1:
            best = sorted(
                ledger.pareto_front(), key=lambda trial: -trial.score(ledger.space.objectives[0])
            )
            print(
                f"\n{len(best)} of {len(trials)} trials on the Pareto front of {' and '.join(names)}"
            )
            console.print(build_trial_table(ledger, best))
        else:
            print(
                f"\nbest {min(_MAX_TRIALS_PRINTED, len(ranked))} of {len(trials)} trials by {names[0]} on the validation split"
            )
            console.print(build_trial_table(ledger, ranked[:_MAX_TRIALS_PRINTED]))
        for line in describe_masking(ledger):
            print(line)
        for line in advise_on_trial(ledger, ranked[0].number):
            print(f"trial {ranked[0].number:04d}: {line}")
        print(
            f"epochs: {asked} asked, {trained} trained, {asked - trained} taken over from other trials"
        )
        print(f"\nbest checkpoint\n  {storage.uri_of(ledger.best_checkpoint_path(ranked[0]))}")
        print(f"next\n  raysweep eval {ledger.name}/{ranked[0].number:04d}{out}")
        print(f"  raysweep show {ledger.name}{out}\n  {format_ui_command(tracker.uri)}")
    if end_reason != "done":
        command = f"raysweep tune --resume {ledger.name}{out}{_format_resume_flags(args)}"
        print(
            f"raysweep: {len(ended)} of {ledger.space.n_trials} trials done; go on with\n  {command}",
            file=sys.stderr,
        )
        return 0 if end_reason == "budget" else 130
    failed = [trial for trial in trials if trial.state == "failed"]
    if failed and len(failed) == len(trials):
        print(f"raysweep: every trial failed; the first: {failed[0].reason}", file=sys.stderr)
        return 1
    return 0


def _format_resume_flags(args: Namespace) -> str:
    """What the sweep does not know of itself, for a command that goes on: the cluster, what a trial
    holds, Optuna.
    """
    flags = [f"--address {shlex.quote(args.address)}"] if args.address else []
    flags += [f"--workers {args.workers}"] if args.workers > 1 else []
    flags += [f"--cpus-per-trial {args.cpus_per_trial:g}"] if args.cpus_per_trial != 1 else []
    flags += (
        [f"--gpus-per-trial {args.gpus_per_trial:g}"] if args.gpus_per_trial is not None else []
    )
    if args.optuna:
        flags.append(f"--optuna {shlex.quote(redact_secrets(args.optuna))}")
    return "".join(f" {flag}" for flag in flags)
