"""raysweep show"""

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from raysweep import storage
from raysweep.catalog import METHODS
from raysweep.commands import named_sweep, runs_in, settings
from raysweep.display import table_console, trial_table
from raysweep.pipeline.shipped import pipelines
from raysweep.results import masking, sweep_facts, trial_advice, trial_facts
from raysweep.spec import Json, SpecError, flatten, read_yaml, unknown_name
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.space import SearchSpace, load_space, spaces
from raysweep.training.presets import presets, resolve
from raysweep.wording import counted


def run(args: Namespace) -> int:
    kind, what = _kind(args.what)
    if kind == "pipeline":
        from raysweep.pipeline.pipeline import load_pipeline

        pipeline = load_pipeline(what, settings(args))[1].json_dict()
        print(json.dumps(pipeline, indent=1) if args.json else yaml.safe_dump(pipeline, sort_keys=False).rstrip())
        return 0
    if kind == "space":
        shipped = what in spaces()
        return _space(args, load_space(what if shipped else "", settings(args), None if shipped else Path(what)))
    if kind:
        config = resolve(what, settings(args))
        return _print(config.json_dict()) if args.json else _paths(flatten(config))
    runs = runs_in(args, write=False)
    if found := named_sweep(what, runs):
        ledger, number = found
        return _sweep(args, ledger) if number is None else _trial(args, ledger, number)
    known = dict.fromkeys([*METHODS, *presets(), *pipelines(), *storage.folders(runs, "sweep.json")])
    raise SpecError(unknown_name("method, preset, space file, pipeline, sweep or trial", what, list(known)))


def _kind(what: str) -> tuple[str, str]:
    """What a name or file is, and its name without that; "" if no table has it. `preset:NAME` says it beforehand."""
    tables = {"pipeline": list(pipelines()), "method": list(METHODS), "preset": presets(), "space": spaces()}
    kind, colon, name = what.partition(":")
    if colon and kind in tables:
        if name not in tables[kind]:
            raise SpecError(unknown_name(kind, name, tables[kind]))
        return kind, name
    if what.endswith((".yaml", ".yml")):
        parts = read_yaml(Path(what))
        return ("pipeline" if "stages" in parts else "space" if "space" in parts else "preset"), what
    # A space has the name of its method: as a bare name that is the method.
    return next((kind for kind, names in tables.items() if what in names), ""), what


def _print(data: Json) -> int:
    print(json.dumps(data, indent=1))
    return 0


def _paths(values: Mapping[str, Any]) -> int:
    """Settings as `--set` takes them."""
    for path, value in values.items():
        print(f"{path} = {value if isinstance(value, str) else json.dumps(value)}")
    return 0


def _space(args: Namespace, space: SearchSpace) -> int:
    """What is searched, as a space's file says it, and every setting besides."""
    config = space.config({})
    if args.json:
        return _print({"space": space.json_dict(), "config": config.json_dict()})
    about = {key: value for key, value in space.json_dict().items() if key not in ("base", "space", "start")}
    print(f"{yaml.safe_dump(about, sort_keys=False)}space:")
    for path, distribution in space.space.items():
        print(f"  {path}: {json.dumps(distribution.model_dump(mode='json', exclude_defaults=True))}")
    if space.start:
        print("start:")
    for point in space.start:
        print(f"  - {json.dumps(point)}")
    print()
    return _paths({path: value for path, value in flatten(config).items() if path not in space.space})


def _sweep(args: Namespace, ledger: Ledger) -> int:
    trials = ledger.trials()
    if args.json:
        return _print(sweep_facts(ledger))
    running = [trial for trial in trials if trial.state == "running"]
    unfinished = f", {len(running)} not yet" if running else ""
    print(f"{ledger.name}: {len(trials) - len(running)} of {ledger.space.total} trials ended{unfinished}")
    ranked = ledger.ranked()
    rest = [trial for trial in trials if trial.number not in {t.number for t in ranked}]
    table_console().print(trial_table(ledger, [*ranked, *rest]))
    for line in masking(ledger):
        print(line)
    if ranked:
        for line in trial_advice(ledger, ranked[0].number):
            print(f"trial {ranked[0].number:04d}: {line}")
    return 0


def _trial(args: Namespace, ledger: Ledger, number: int) -> int:
    """One trial: what was searched, its best epoch, what stands out, where it is."""
    (trial,) = (trial for trial in ledger.trials() if trial.number == number)
    advice = trial_advice(ledger, number)
    folder = ledger.run_path(number)
    if args.json:
        return _print({**trial_facts(ledger, trial), "folder": storage.name(folder), "advice": advice})
    reason = f": {trial.reason}" if trial.reason else ""
    epochs = f"{counted(trial.epoch, 'epoch')}, {trial.trained} trained here"
    print(f"{ledger.name}/{number:04d} {trial.state}{reason} after {epochs}")
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
