"""raysweep show"""

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import yaml
from rich.console import Console

from raysweep import storage
from raysweep.catalog import METHODS
from raysweep.commands import runs_in, settings
from raysweep.display import trial_table
from raysweep.pipeline.shipped import pipelines
from raysweep.spec import Json, SpecError, read_yaml, unknown_name
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.space import load_space
from raysweep.training.presets import presets, resolve


def run(args: Namespace) -> int:
    if args.what in (*METHODS, *presets()):
        return _print(args, resolve(args.what, settings(args)).json_dict())
    is_file = args.what.endswith((".yaml", ".yml"))
    if args.what in pipelines() or (is_file and "stages" in read_yaml(Path(args.what))):
        from raysweep.pipeline.pipeline import load_pipeline

        return _print(args, load_pipeline(args.what, settings(args))[1].json_dict())
    if is_file:
        space = load_space("", settings(args), Path(args.what))
        return _print(args, {"space": space.json_dict(), "config": space.config({}).json_dict()})
    runs = runs_in(args, write=False)
    if storage.pull_file(runs / args.what / "sweep.json"):
        return _sweep(args, Ledger.open(runs / args.what))
    sweeps = storage.folders(runs, "sweep.json")
    known = dict.fromkeys([*METHODS, *presets(), *pipelines(), *sweeps])
    raise SpecError(unknown_name("method, preset, space file, pipeline or sweep", args.what, list(known)))


def _print(args: Namespace, data: Json) -> int:
    print(
        json.dumps(data, indent=1) if args.json else yaml.safe_dump(data, sort_keys=False),
        end="\n" if args.json else "",
    )
    return 0


def _sweep(args: Namespace, ledger: Ledger) -> int:
    trials = ledger.trials()
    if args.json:
        return _print(
            args, {"name": ledger.name, "space": ledger.space.json_dict(), "trials": [asdict(t) for t in trials]}
        )
    running = [trial for trial in trials if trial.state == "running"]
    console = Console()
    console.print(
        f"{ledger.name}: {len(trials) - len(running)} of {ledger.space.total} trials ended, {len(running)} not"
    )
    ranked = ledger.ranked()
    rest = [trial for trial in trials if trial.number not in {t.number for t in ranked}]
    console.print(trial_table(ledger, [*ranked, *rest]))
    return 0
