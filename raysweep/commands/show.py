"""`raysweep show`: print settings, or the state of a sweep or trial."""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import shutil
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.commands.options import (
    CommandParsers,
    add_command,
    add_json_option,
    add_location_options,
    add_override_options,
)

if TYPE_CHECKING:
    from raysweep.run_lookup import FoundRun
    from raysweep.spec import JsonDict, SpecError
    from raysweep.stores import StorePath
    from raysweep.sweep.ledger import Ledger
    from raysweep.sweep.search_space import SearchSpace
    from raysweep.sweep.trial import Trial

SUMMARY = (
    "print all settings of a method, preset, space or pipeline; or the state of a sweep or trial"
)
DESCRIPTION = (
    "Prints every setting of a method or preset as `path = value  # description`; --set takes the "
    "part before the #. For a search space it also prints the searched ranges, for a pipeline its "
    "stages, for a sweep its trials (best first), and for a trial its settings, its best epoch and "
    "notes on its training. --set shows the settings with a change."
)
EXAMPLES = (
    "raysweep show lrat",
    "raysweep show preset:lrat-table1 --set epochs=50",
    "raysweep show g1/0003",
    "raysweep show g1 --log",
)

# Narrower terminals show no descriptions: they would take several lines each.
_MIN_DESCRIPTION_WIDTH = 80


@dataclass(frozen=True)
class ShowRequest:
    """What the user asked `raysweep show` to do.

    Attributes:
        name: Name or YAML file of what to show; `preset:NAME` and `space:NAME` say which kind.
        overrides: {dotted path: value} of `--set` and `--data-dir`.
        out: Folder of `runs` and `mlflow.db`.
        storage: Folder or URI of sweeps; None for `runs` in `out`.
        as_json: Whether to print JSON on stdout.
        log: Whether to print the log of what the name names.
    """

    name: str
    overrides: dict[str, Any]
    out: Path
    storage: str | None
    as_json: bool
    log: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ShowRequest:
        """Convert parsed arguments. Raises SpecError if `--set` is malformed."""
        from raysweep.commands.common import parse_overrides

        return cls(
            name=args.what,
            overrides=parse_overrides(args.set, args.data_dir),
            out=args.out,
            storage=args.storage,
            as_json=args.json,
            log=args.log,
        )


def add_parser(parsers: CommandParsers) -> None:
    """Add the arguments of `raysweep show` to the command line."""
    parser = add_command(
        parsers, "show", run_command, summary=SUMMARY, description=DESCRIPTION, examples=EXAMPLES
    )
    parser.add_argument(
        "what",
        metavar="WHAT",
        help="a method, preset or pipeline of `raysweep list` (preset:NAME or space:NAME if "
        "several of these have one name), a YAML file, a sweep, a training run, a trial: "
        "SWEEP/0003, the folder of one of them, or a checkpoint of MLflow: runs:/ID, models:/NAME",
    )
    parser.add_argument(
        "--log",
        action="store_true",
        help="print the log of a sweep (with its trials), trial, training run or pipeline, newest "
        "last; times are UTC, each by the clock of its machine; --json prints the lines as stored",
    )
    add_override_options(parser)
    add_location_options(parser)
    add_json_option(parser)


def run_command(args: argparse.Namespace) -> None:
    """Run `raysweep show`."""
    request = ShowRequest.from_args(args)
    if request.log:
        _show_log(request)
        return
    from raysweep.commands.common import resolve_runs_folder
    from raysweep.run_lookup import find_run, is_mlflow_reference

    if is_mlflow_reference(request.name):
        _show_mlflow_checkpoint(request)
        return
    runs_folder = resolve_runs_folder(request.out, request.storage, for_writing=False)
    found = find_run(request.name, runs_folder)
    if found is not None:
        _show_run(request, found)
        return
    kind, name = _classify_name(request.name)
    if kind == "pipeline":
        _show_pipeline(request, name)
    elif kind == "space":
        _show_space(request, name)
    elif kind:
        _show_config(request, name)
    else:
        raise _unknown_name_error(request.name, runs_folder)


def _show_run(request: ShowRequest, found: FoundRun) -> None:
    """Print a sweep, trial or training run; say how to see what else has its name."""
    if not request.as_json:
        _print_namesakes(request.name, found)
    if found.ledger is None:
        _show_training_run(request, found)
    elif found.run_kind is None:
        _show_sweep(request, found.ledger)
    else:
        _show_trial(request, found.ledger, found.run_key)


def _print_namesakes(name: str, found: FoundRun) -> None:
    """Print which commands show a method, preset, space, pipeline or file of the same name."""
    kinds = [kind for kind, names in _list_names_by_kind().items() if name in names]
    others = [f"`raysweep show {kind}:{shlex.quote(name)}`" for kind in kinds]
    if Path(name).is_file():
        others.append(f"`raysweep show {shlex.quote(f'./{name}')}`")
    if others:
        print(f"{name} is a {found.kind} of this folder; for its namesake: {' or '.join(others)}")


def _classify_name(name_or_file: str) -> tuple[str, str]:
    """Return (kind, name without `KIND:`); the kind is "" if no table has the name."""
    from raysweep.spec import SpecError, describe_unknown_name

    tables = _list_names_by_kind()
    kind, colon, name = name_or_file.partition(":")
    if colon and kind in tables:
        if name not in tables[kind]:
            raise SpecError(describe_unknown_name(kind, name, tables[kind]))
        return kind, name
    if name_or_file.endswith((".yaml", ".yml")):
        return _classify_yaml_file(Path(name_or_file)), name_or_file
    for kind, names in tables.items():
        if name_or_file in names:
            return kind, name_or_file
    return "", name_or_file


def _list_names_by_kind() -> dict[str, list[str]]:
    """Return {kind: names}; of kinds with the same name, the first is meant by the bare name."""
    from raysweep.catalog import METHODS
    from raysweep.pipeline.builtin_pipelines import list_builtin_pipelines
    from raysweep.sweep.search_space import list_builtin_spaces
    from raysweep.training.presets import list_presets

    # A space has the name of its method: the method comes first.
    return {
        "pipeline": list_builtin_pipelines(),
        "method": list(METHODS),
        "preset": list_presets(),
        "space": list_builtin_spaces(),
    }


def _classify_yaml_file(path: Path) -> str:
    """Return the kind of a YAML file by its keys."""
    from raysweep.yaml_files import read_yaml

    keys = read_yaml(path)
    if "stages" in keys:
        return "pipeline"
    return "space" if "space" in keys else "preset"


def _show_pipeline(request: ShowRequest, name_or_file: str) -> None:
    """Print a pipeline with its stages, as YAML or JSON."""
    from raysweep.pipeline.pipeline import load_pipeline
    from raysweep.yaml_files import dump_yaml

    _, pipeline, _ = load_pipeline(name_or_file, request.overrides)
    data = pipeline.to_json_dict()
    if request.as_json:
        _print_json(data)
    else:
        print(dump_yaml(data).rstrip())


def _show_space(request: ShowRequest, name_or_file: str) -> None:
    """Print the searched ranges of a search space, then every other setting."""
    from raysweep.settings_reference import describe_settings
    from raysweep.spec import flatten_spec
    from raysweep.sweep.search_space import list_builtin_spaces, load_space

    if name_or_file in list_builtin_spaces():
        space = load_space(name_or_file, request.overrides)
    else:
        space = load_space("", request.overrides, Path(name_or_file))
    config = space.trial_config({})
    if request.as_json:
        _print_json({"space": space.to_json_dict(), "config": config.to_json_dict()})
        return
    descriptions = describe_settings(config)
    _print_space_yaml(space, descriptions)
    print()
    _print_config_paths(
        {path: value for path, value in flatten_spec(config).items() if path not in space.space},
        descriptions,
    )


def _print_space_yaml(space: SearchSpace, config_descriptions: Mapping[str, str]) -> None:
    """Print a search space in the form of its YAML file, without its base settings.

    Args:
        space: The search space.
        config_descriptions: Descriptions of the training settings by dotted path.
    """
    from raysweep.settings_reference import describe_settings

    settings = space.to_json_dict()
    for key in ("base", "space", "points_to_evaluate"):
        settings.pop(key, None)
    _print_yaml_settings(settings, describe_settings(space))
    print("space:")
    for pattern, distribution in space.space.items():
        data = distribution.model_dump(mode="json", exclude_defaults=True)
        matches = (text for path, text in config_descriptions.items() if fnmatchcase(path, pattern))
        _print_described(f"  {pattern}: {json.dumps(data)}", next(matches, ""))
    if space.points_to_evaluate:
        print("points_to_evaluate:")
    for point in space.points_to_evaluate:
        print(f"  - {json.dumps(point)}")


def _print_yaml_settings(
    settings: JsonDict, descriptions: Mapping[str, str], parent_path: str = ""
) -> None:
    """Print settings as YAML, with the description of each as a comment.

    Args:
        settings: Settings by name.
        descriptions: Descriptions by dotted path.
        parent_path: Dotted path of the mapping that holds the settings; "" at the top.
    """
    from raysweep.yaml_files import dump_yaml

    indent = "  " * (parent_path.count(".") + 1) if parent_path else ""
    for name, value in settings.items():
        path = f"{parent_path}.{name}" if parent_path else name
        is_described_part = isinstance(value, dict) and any(
            other.startswith(f"{path}.") for other in descriptions
        )
        if is_described_part:
            _print_described(f"{indent}{name}:", descriptions.get(path, ""))
            _print_yaml_settings(value, descriptions, path)
            continue
        first, *others = dump_yaml({name: value}).splitlines()
        _print_described(indent + first, descriptions.get(path, ""))
        for line in others:
            print(indent + line)


def _show_config(request: ShowRequest, name_or_file: str) -> None:
    """Print every setting of a training run."""
    from raysweep.catalog import METHODS
    from raysweep.settings_reference import describe_settings
    from raysweep.spec import flatten_spec
    from raysweep.training.presets import load_preset_notes, resolve_training_config

    config = resolve_training_config(name_or_file, request.overrides)
    if request.as_json:
        _print_json(config.to_json_dict())
        return
    _print_config_paths(flatten_spec(config), describe_settings(config))
    if name_or_file not in METHODS:
        for path, note in load_preset_notes(name_or_file, request.overrides).items():
            print(f"# {path}: {note}")


def _print_json(data: JsonDict) -> None:
    """Print indented JSON."""
    print(json.dumps(data, indent=1))


def _print_config_paths(values: Mapping[str, Any], descriptions: Mapping[str, str]) -> None:
    """Print settings in the form that `--set` takes, with their descriptions as comments."""
    from raysweep.yaml_files import format_scalar

    for path, value in values.items():
        # `flatten_spec` gives lists as JSON, which is YAML, too.
        is_list = isinstance(value, str) and value.startswith("[") and value.endswith("]")
        text = value if is_list else format_scalar(value)
        _print_described(f"{path} = {text}", descriptions.get(path, ""))


def _print_described(line: str, description: str) -> None:
    """Print a setting and its description as a YAML comment.

    The comment stands behind the setting if both fit in one line, otherwise in lines below it.
    Lines in pipes and files have no limit. Narrow terminals show no descriptions.
    """
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    if not description or width < _MIN_DESCRIPTION_WIDTH:
        print(line)
    elif len(f"{line}  # {description}") <= width:
        print(f"{line}  # {description}")
    else:
        prefix = " " * (len(line) - len(line.lstrip()) + 4) + "# "
        print(line)
        print(
            textwrap.fill(
                description,
                width,
                initial_indent=prefix,
                subsequent_indent=prefix,
                break_on_hyphens=False,
            )
        )


def _show_log(request: ShowRequest) -> None:
    """Print the log of a sweep, trial, training run or pipeline.

    Raises:
        SpecError: There is no log of this name.
    """
    from raysweep.commands.common import resolve_runs_folder
    from raysweep.logs import format_entry, read_log
    from raysweep.run_lookup import find_run
    from raysweep.spec import SpecError
    from raysweep.stores import open_path

    runs_folder = resolve_runs_folder(request.out, request.storage, for_writing=False)
    name = request.name.removeprefix("pipeline:")
    pipeline_folder = open_path(request.out / "runs" / "pipelines" / name)
    folders = [pipeline_folder]
    if name == request.name and ".." not in Path(name).parts:
        found = find_run(name, runs_folder)
        folders = [found.path] if found else [runs_folder / name, pipeline_folder]
    for folder in folders:
        if entries := read_log(folder):
            break
    else:
        places = " and ".join(str(folder) for folder in folders)
        raise SpecError(f"{request.name}: no log in {places}")
    for entry in entries:
        print(json.dumps(entry) if request.as_json else format_entry(entry))


def _unknown_name_error(name: str, runs_folder: StorePath) -> SpecError:
    """Return the error for a name that nothing has."""
    from raysweep.run_lookup import list_runs
    from raysweep.spec import SpecError, describe_unknown_name

    runs = [run.path.name for run in list_runs(runs_folder)]
    builtin = itertools.chain.from_iterable(_list_names_by_kind().values())
    names = dict.fromkeys([*builtin, *runs])
    noun = "method, preset, space file, pipeline, sweep, trial or training run"
    return SpecError(describe_unknown_name(noun, name, list(names)))


def _show_sweep(request: ShowRequest, ledger: Ledger) -> None:
    """Print the trials of a sweep, best first, and notes on the best one."""
    from raysweep.commands.common import format_location_flags
    from raysweep.result_loading import (
        describe_guessing,
        describe_masking_effect_on_ranking,
        sweep_to_json,
    )
    from raysweep.sweep.conclusions import describe_conclusions
    from raysweep.sweep.spread_summary import summarize_spread
    from raysweep.sweep.trial_advice import advise_on_trial
    from raysweep.terminal import TrialTable, create_table_console

    if request.as_json:
        _print_json(sweep_to_json(ledger))
        return
    trials = ledger.load_trials()
    n_running = sum(trial.state == "running" for trial in trials)
    running = f", {n_running} not yet" if n_running else ""
    n_ended = len(trials) - n_running
    is_interrupted = ledger.is_interrupted()
    state = ", interrupted" if is_interrupted else running
    print(f"{ledger.name}: {n_ended} of {ledger.space.n_trials} trials ended{state}")
    if ledger.space.has_score:
        print(f"ranked by {ledger.space.describe_score()}")
    if is_interrupted:
        flags = format_location_flags(request.out, request.storage)
        print(f"resume with\n  raysweep tune --resume {ledger.name}{flags}")
    ranked = ledger.rank_trials()
    ranked_numbers = {trial.number for trial in ranked}
    unranked = [trial for trial in trials if trial.number not in ranked_numbers]
    create_table_console().print(
        TrialTable(
            ledger,
            [*ranked, *unranked, *ledger.load_base_runs(), *ledger.load_repeats()],
            is_interrupted=is_interrupted,
            spread=summarize_spread(ledger),
        )
    )
    for line in [
        *describe_conclusions(ledger),
        *describe_guessing(ledger),
        *describe_masking_effect_on_ranking(ledger),
    ]:
        print(line)
    best = ledger.find_best_trial()
    if best is not None:
        for line in advise_on_trial(ledger, best.number):
            print(f"trial {best.number:04d}: {line}")


def _show_trial(request: ShowRequest, ledger: Ledger, run_key: str) -> None:
    """Print the settings of a trial, base run or repeat, its best epoch, notes, and its folder."""
    from raysweep.result_loading import trial_to_json
    from raysweep.sweep.trial_advice import advise_on_trial

    (trial,) = (run for run in ledger.load_all_runs() if run.key == run_key)
    advice = advise_on_trial(ledger, trial.number) if trial.kind == "trial" else []
    folder = str(ledger.run_path(trial))
    if request.as_json:
        trial_data = trial_to_json(ledger, trial, ledger.is_interrupted())
        _print_json({**trial_data, "folder": folder, "advice": advice})
        return
    _print_trial_summary(ledger, trial)
    for line in advice:
        print(f"note: {line}")
    print(f"folder\n  {folder}")


def _print_trial_summary(ledger: Ledger, trial: Trial) -> None:
    """Print the state of a trial, its searched settings and the metrics of its best epoch."""
    from raysweep.formatting import format_count
    from raysweep.sweep.repeat_summary import list_seed_scores

    reason = f": {trial.reason}" if trial.reason else ""
    epochs = f"{format_count(trial.epoch, 'epoch')}, {trial.trained_epochs} trained here"
    state = trial.describe_state(ledger.is_interrupted())
    print(f"{ledger.name}/{trial.key} {state}{reason} after {epochs}")
    print("searched")
    for path, value in trial.params.items():
        if value is not None:
            print(f"  {path} = {value}")
    choice = ledger.describe_choice(trial)
    print(f"epoch {trial.best.get('epoch', 0):.0f}, its best" + (f": {choice}" if choice else ""))
    for name, metric in trial.best.items():
        if "/" not in name and name != "epoch":
            print(f"  {name} = {metric:.4f}")
    for average in trial.averages.values():
        print(f"{ledger.space.describe_score()}\n  {ledger.space.score_name} = {average:.4f}")
    if trial.repeats:
        objective = ledger.space.objectives[0]
        scores = ", ".join(f"{score:.4f}" for score in list_seed_scores(trial, objective))
        print(f"mean over {len(trial.trainings)} seeds")
        print(f"  {ledger.space.score_name} = {trial.score(objective):.4f} ({scores})")
    if trial.robust_under_autoattack is not None and trial.finalist is not None:
        print(f"  AutoAttack on {trial.finalist.n_examples} validation images")
        print(f"  robust = {trial.robust_under_autoattack:.4f}")
        corrected = trial.find_corrected_score(ledger.space.objectives[0])
        if corrected is not None and ledger.space.has_score:
            print(
                f"{ledger.space.score_name}, lowered by AutoAttack\n  corrected = {corrected:.4f}"
            )
    if trial.best_in_burn_in:
        objective = ledger.space.objectives[0]
        epoch = f"epoch {trial.best_in_burn_in['epoch']:.0f}"
        print(
            f"before its weights acted\n  {objective} = "
            f"{trial.best_in_burn_in[objective]:.4f} in {epoch}"
        )


def _show_mlflow_checkpoint(request: ShowRequest) -> None:
    """Print the checkpoint of an MLflow run or model: its metrics, its settings and its folder."""
    from raysweep.commands.common import open_tracker
    from raysweep.run_lookup import download_from_mlflow
    from raysweep.settings_reference import describe_settings
    from raysweep.spec import flatten_spec
    from raysweep.stores import open_path
    from raysweep.training.checkpoint import read_checkpoint

    run_id, folder = download_from_mlflow(request.name, open_tracker(request.out), request.out)
    saved = read_checkpoint(open_path(folder))
    metrics = {name: value for name, value in saved.last_metrics.items() if "/" not in name}
    if request.as_json:
        data = {"mlflow_run": run_id, "epoch": saved.epoch, "metrics": metrics}
        _print_json({**data, "config": saved.config.to_json_dict(), "checkpoint": str(folder)})
        return
    config = saved.config
    print(f"{request.name}: epoch {saved.epoch} of {config.method.name} on {config.data.name}")
    for name, metric in metrics.items():
        print(f"  {name} = {metric:.4f}")
    print(f"MLflow run\n  {run_id}\ncheckpoint\n  {folder}\nsettings")
    _print_config_paths(flatten_spec(config), describe_settings(config))


def _show_training_run(request: ShowRequest, found: FoundRun) -> None:
    """Print a training run: its state, its best epoch, notes on it, its settings and its folder."""
    from raysweep.formatting import format_count
    from raysweep.result_loading import load_training_run
    from raysweep.settings_reference import describe_settings
    from raysweep.spec import flatten_spec
    from raysweep.training.checkpoint import RunDirectory
    from raysweep.training.metric_advice import advise_on_training

    run = load_training_run(found.path)
    history = RunDirectory(found.path).read_history() if run.config else []
    advice = advise_on_training(run.config, history) if run.config else []
    if request.as_json:
        _print_json({**run.to_json_dict(), "advice": advice})
        return
    reason = f" ({run.reason})" if run.reason else ""
    if run.config is None:
        print(f"{run.name} {run.state}{reason} before its first epoch\nfolder\n  {run.path}")
        return
    progress = f"{run.n_epochs} of {format_count(run.config.epochs, 'epoch')}"
    what = f"{run.config.method.name} on {run.config.data.name}"
    print(f"{run.name} {run.state}{reason} after {progress}: {what}")
    print(f"epoch {run.best['epoch']:.0f}, its best")
    for name, metric in run.best.items():
        if "/" not in name and name != "epoch":
            print(f"  {name} = {metric:.4f}")
    for line in advice:
        print(f"note: {line}")
    print(f"checkpoint\n  {run.checkpoint}\nsettings")
    _print_config_paths(flatten_spec(run.config), describe_settings(run.config))
