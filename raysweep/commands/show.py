"""raysweep show"""

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from raysweep import storage
from raysweep.catalog import METHODS
from raysweep.commands import find_sweep_or_trial, parse_overrides, resolve_runs_folder
from raysweep.formatting import format_count
from raysweep.pipeline.builtin_pipelines import list_builtin_pipelines
from raysweep.results import advise_on_trial, describe_masking, sweep_to_json, trial_to_json
from raysweep.spec import JsonDict, SpecError, describe_unknown_name, flatten_spec, read_yaml
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace, list_builtin_spaces, load_space
from raysweep.terminal import build_trial_table, create_table_console
from raysweep.training.presets import list_presets, resolve_training_config


def run_command(args: Namespace) -> int:
    kind, what = _classify_name(args.what)
    if kind == "pipeline":
        from raysweep.pipeline.pipeline import load_pipeline

        pipeline = load_pipeline(what, parse_overrides(args))[1].to_json_dict()
        print(
            json.dumps(pipeline, indent=1)
            if args.json
            else yaml.safe_dump(pipeline, sort_keys=False).rstrip()
        )
        return 0
    if kind == "space":
        shipped = what in list_builtin_spaces()
        return _print_space(
            args,
            load_space(
                what if shipped else "", parse_overrides(args), None if shipped else Path(what)
            ),
        )
    if kind:
        config = resolve_training_config(what, parse_overrides(args))
        return (
            _print_json(config.to_json_dict())
            if args.json
            else _print_config_paths(flatten_spec(config))
        )
    runs = resolve_runs_folder(args, for_writing=False)
    if found := find_sweep_or_trial(what, runs):
        ledger, number = found
        return _print_sweep(args, ledger) if number is None else _print_trial(args, ledger, number)
    known = dict.fromkeys(
        [
            *METHODS,
            *list_presets(),
            *list_builtin_pipelines(),
            *storage.list_folders_containing(runs, "sweep.json"),
        ]
    )
    raise SpecError(
        describe_unknown_name(
            "method, preset, space file, pipeline, sweep or trial", what, list(known)
        )
    )


def _classify_name(name_or_file: str) -> tuple[str, str]:
    """What a name or file is, and its name without that; "" if no table has it. `preset:NAME` says
    it beforehand.
    """
    tables = {
        "pipeline": list(list_builtin_pipelines()),
        "method": list(METHODS),
        "preset": list_presets(),
        "space": list_builtin_spaces(),
    }
    kind, colon, name = name_or_file.partition(":")
    if colon and kind in tables:
        if name not in tables[kind]:
            raise SpecError(describe_unknown_name(kind, name, tables[kind]))
        return kind, name
    if name_or_file.endswith((".yaml", ".yml")):
        parts = read_yaml(Path(name_or_file))
        return (
            "pipeline" if "stages" in parts else "space" if "space" in parts else "preset"
        ), name_or_file
    # A space has the name of its method: as a bare name that is the method.
    return next((kind for kind, names in tables.items() if name_or_file in names), ""), name_or_file


def _print_json(data: JsonDict) -> int:
    print(json.dumps(data, indent=1))
    return 0


def _print_config_paths(values: Mapping[str, Any]) -> int:
    """Settings as `--set` takes them."""
    for path, value in values.items():
        print(f"{path} = {value if isinstance(value, str) else json.dumps(value)}")
    return 0


def _print_space(args: Namespace, space: SearchSpace) -> int:
    """What is searched, as a space's file says it, and every setting besides."""
    config = space.trial_config({})
    if args.json:
        return _print_json({"space": space.to_json_dict(), "config": config.to_json_dict()})
    about = {
        key: value
        for key, value in space.to_json_dict().items()
        if key not in ("base", "space", "points_to_evaluate")
    }
    print(f"{yaml.safe_dump(about, sort_keys=False)}space:")
    for path, distribution in space.space.items():
        print(
            f"  {path}: {json.dumps(distribution.model_dump(mode='json', exclude_defaults=True))}"
        )
    if space.points_to_evaluate:
        print("start:")
    for point in space.points_to_evaluate:
        print(f"  - {json.dumps(point)}")
    print()
    return _print_config_paths(
        {path: value for path, value in flatten_spec(config).items() if path not in space.space}
    )


def _print_sweep(args: Namespace, ledger: Ledger) -> int:
    trials = ledger.load_trials()
    if args.json:
        return _print_json(sweep_to_json(ledger))
    running = [trial for trial in trials if trial.state == "running"]
    unfinished = f", {len(running)} not yet" if running else ""
    print(
        f"{ledger.name}: {len(trials) - len(running)} of {ledger.space.n_trials} trials ended{unfinished}"
    )
    ranked = ledger.rank_trials()
    rest = [trial for trial in trials if trial.number not in {t.number for t in ranked}]
    create_table_console().print(build_trial_table(ledger, [*ranked, *rest]))
    for line in describe_masking(ledger):
        print(line)
    if ranked:
        for line in advise_on_trial(ledger, ranked[0].number):
            print(f"trial {ranked[0].number:04d}: {line}")
    return 0


def _print_trial(args: Namespace, ledger: Ledger, trial_number: int) -> int:
    """One trial: what was searched, its best epoch, what stands out, where it is."""
    (trial,) = (trial for trial in ledger.load_trials() if trial.number == trial_number)
    advice = advise_on_trial(ledger, trial_number)
    folder = ledger.trial_path(trial_number)
    if args.json:
        return _print_json(
            {**trial_to_json(ledger, trial), "folder": storage.uri_of(folder), "advice": advice}
        )
    reason = f": {trial.reason}" if trial.reason else ""
    epochs = f"{format_count(trial.epoch, 'epoch')}, {trial.trained_epochs} trained here"
    print(f"{ledger.name}/{trial_number:04d} {trial.state}{reason} after {epochs}")
    settings = {path: value for path, value in trial.params.items() if value is not None}
    metrics = {
        name: f"{value:.4f}"
        for name, value in trial.best.items()
        if "/" not in name and name != "epoch"
    }
    for title, rows in (
        ("searched", settings),
        (f"epoch {trial.best.get('epoch', 0):.0f}, its best", metrics),
    ):
        print(title)
        for name, value in rows.items():
            print(f"  {name} = {value}")
    for line in advice:
        print(f"note: {line}")
    print(f"folder\n  {storage.uri_of(folder)}")
    return 0
