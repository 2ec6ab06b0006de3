"""raysweep show"""

import json
from argparse import Namespace
from pathlib import Path

import yaml
from rich.console import Console

from raysweep import storage
from raysweep.catalog import METHODS
from raysweep.commands import named_sweep, runs_in, settings
from raysweep.display import trial_table
from raysweep.pipeline.shipped import pipelines
from raysweep.results import sweep_facts, trial_advice, trial_facts
from raysweep.spec import Json, SpecError, read_yaml, unknown_name
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.space import load_space
from raysweep.training.presets import presets, resolve


def run(args: Namespace) -> int:
    parts = read_yaml(Path(args.what)) if args.what.endswith((".yaml", ".yml")) else {}
    if args.what in pipelines() or "stages" in parts:
        from raysweep.pipeline.pipeline import load_pipeline

        return _print(args, load_pipeline(args.what, settings(args))[1].json_dict())
    if "space" in parts:
        space = load_space("", settings(args), Path(args.what))
        return _print(args, {"space": space.json_dict(), "config": space.config({}).json_dict()})
    if parts or args.what in (*METHODS, *presets()):
        return _print(args, resolve(args.what, settings(args)).json_dict())
    runs = runs_in(args, write=False)
    if found := named_sweep(args.what, runs):
        ledger, number = found
        return _sweep(args, ledger) if number is None else _trial(args, ledger, number)
    sweeps = storage.folders(runs, "sweep.json")
    known = dict.fromkeys([*METHODS, *presets(), *pipelines(), *sweeps])
    raise SpecError(unknown_name("method, preset, space file, pipeline, sweep or trial", args.what, list(known)))


def _print(args: Namespace, data: Json) -> int:
    print(
        json.dumps(data, indent=1) if args.json else yaml.safe_dump(data, sort_keys=False),
        end="\n" if args.json else "",
    )
    return 0


def _sweep(args: Namespace, ledger: Ledger) -> int:
    trials = ledger.trials()
    if args.json:
        return _print(args, sweep_facts(ledger))
    running = [trial for trial in trials if trial.state == "running"]
    console = Console()
    console.print(
        f"{ledger.name}: {len(trials) - len(running)} of {ledger.space.total} trials ended, {len(running)} not"
    )
    ranked = ledger.ranked()
    rest = [trial for trial in trials if trial.number not in {t.number for t in ranked}]
    console.print(trial_table(ledger, [*ranked, *rest]))
    if ranked:
        for line in trial_advice(ledger, ranked[0].number):
            print(f"trial {ranked[0].number:04d}: {line}")
    return 0


def _trial(args: Namespace, ledger: Ledger, number: int) -> int:
    """One trial: what was searched, its best epoch, what stands out, where it is."""
    trials = {trial.number: trial for trial in ledger.trials()}
    if number not in trials:
        raise SpecError(f"{ledger.name} has no trial {number:04d}: it has {len(trials)}, counted from 0000")
    trial, advice = trials[number], trial_advice(ledger, number)
    folder = ledger.run_path(number)
    if args.json:
        return _print(args, {**trial_facts(ledger, trial), "folder": storage.name(folder), "advice": advice})
    reason = f": {trial.reason}" if trial.reason else ""
    print(f"{ledger.name}/{number:04d} {trial.state}{reason} after {trial.epoch} epochs, {trial.trained} trained here")
    settings = {path: value for path, value in trial.settings.items() if value is not None}
    metrics = {name: f"{value:.4f}" for name, value in trial.best.items() if "/" not in name and name != "epoch"}
    for title, rows in (("searched", settings), (f"epoch {trial.best.get('epoch', 0):.0f}, its best", metrics)):
        print(title)
        for name, value in rows.items():
            print(f"  {name} = {value}")
    for line in advice:
        print(f"note: {line}")
    print(f"folder\n  {storage.name(folder)}")
    return 0
