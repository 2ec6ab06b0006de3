"""The command line as its users meet it."""

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import get_args

import joblib
import numpy as np
import pytest
import yaml

from raysweep import __version__
from raysweep.cli import build_parser, main
from raysweep.leases import hold_folder_lease
from raysweep.spec import apply_overrides, flatten_spec
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import load_space
from raysweep.sweep.trial import Trial
from raysweep.training.presets import resolve_training_config
from raysweep.training.validation import ObjectiveName
from raysweep.yaml_files import parse_yaml

ALPHA = "method.terms.cw.weight.alpha"
NEEDS_RAY = pytest.mark.needs_ray
COMMON = {"--set", "--data-dir", "--json"}
FLAGS = {
    "list": {"--json", "--out", "--storage"},
    "show": {*COMMON, "--out", "--storage", "--log"},
    "train": {*COMMON, "--verbose", "--out", "--storage", "--name", "--plan", "--code"},
    "tune": {
        *COMMON, "--verbose", "--out", "--storage", "--name", "--space", "--trials", "--resume",
        "--plan",
        "--address", "--cpus-per-trial", "--gpus-per-trial", "--workers", "--optuna",
        "--max-trials", "--max-time", "--max-gpu-hours", "--retry-failed", "--warm-start", "--code",
    },
    "run": {
        *COMMON, "--verbose", "--out", "--storage", "--plan", "--from", "--wait", "--address",
        "--code",
    },
    "compare": {"--json", "--out", "--storage"},
    "sync": {"--json", "--verbose", "--out", "--storage"},
    "doctor": {*COMMON, "--verbose", "--out", "--storage", "--address"},
    "eval": {
        *COMMON, "--verbose", "--out", "--storage", "--attack", "--version", "--eps", "--norm",
        "--n",
        "--batch-size", "--keep-adversarial", "--pseudo-label", "--address", "--gpus-per-task",
        "--bundle", "--verify", "--sign", "--code",
    },
}  # fmt: skip
BOTH = """\
method:
  name: both
  attacks: {pgd: {kind: pgd}}
  terms: {natural: {on: natural}, robust: {on: pgd}}
base: {epochs: 1, data.train_size: 64, data.val_size: 50, "*.attacks.*.steps": 2}
space: {method.terms.natural.coef: {float: [0.1, 1.0]}}
"""
SMALL = [
    "--set",
    "epochs=1",
    "--set",
    "data.train_size=64",
    "--set",
    "data.val_size=50",
    "--set",
    "*.attacks.*.steps=2",
    "--set",
    "validation.finish.*.steps=2",
    "--set",
    "validation.finish.*.runs=1",
]


def gcs_address() -> str:
    """Of the session's cluster."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def test_flags_are_frozen() -> None:
    """New knobs are settings, reached by --set; a new flag is a decision that shows here."""
    parsers = build_parser()._subparsers._group_actions[0].choices
    found = {
        name: {
            flag
            for a in p._actions
            for flag in a.option_strings
            if flag.startswith("--") and flag != "--help"
        }
        for name, p in parsers.items()
    }
    assert found == FLAGS
    assert all(isinstance(p, argparse.ArgumentParser) for p in parsers.values())


def test_every_command_has_a_manual_page_with_examples_that_parse() -> None:
    parser = build_parser()
    commands = parser._subparsers._group_actions[0].choices
    for name, command in commands.items():
        text = command.format_help()
        examples = importlib.import_module(f"raysweep.commands.{name}").EXAMPLES
        assert len(examples) >= 2 and all(example in text for example in examples)
        assert max(map(len, text.split("options:")[1].splitlines())) <= 120
        for action in command._actions:
            assert action.help, f"{name} {action.option_strings}"
        for example in examples:
            assert parser.parse_args(example.split()[1:]).command == name


@pytest.mark.parametrize("name", FLAGS)
def test_every_field_of_a_request_is_documented(name: str) -> None:
    module = importlib.import_module(f"raysweep.commands.{name}")
    request_class = getattr(module, f"{name.capitalize()}Request")
    for example in module.EXAMPLES:
        request = request_class.from_args(build_parser().parse_args(example.split()[1:]))
        assert isinstance(request, request_class)
    for field in dataclasses.fields(request_class):
        assert f"\n        {field.name}: " in request_class.__doc__


def test_former_names_are_warned_of_in_one_line(workdir: Path, capsys) -> None:
    (workdir / "space.yaml").write_text(
        "method: at\nstart: [{optim.lr: 0.1}]\nspace: {optim.lr: {float: [0.1, 0.2]}}\n"
    )
    original_showwarning = warnings.showwarning
    assert main(["show", "space.yaml"]) == 0
    out, err = capsys.readouterr()
    assert "points_to_evaluate:\n  - " in out
    assert err == "raysweep: warning: space.yaml: 'start' is now called 'points_to_evaluate'\n"
    settings = []
    for setting in ("rerun=daily", "again=daily"):
        assert main(["show", "digits", "--set", setting, "--json"]) == 0
        out, err = capsys.readouterr()
        settings.append(json.loads(out))
        former = setting.startswith("again")
        assert err == former * "raysweep: warning: 'again' is now called 'rerun'\n"
    assert settings[0] == settings[1] and settings[0]["rerun"] == "daily"
    assert warnings.showwarning is original_showwarning


def test_other_warnings_keep_their_place_in_the_source(monkeypatch, capsys) -> None:
    def warn() -> list[str]:
        warnings.warn("odd", stacklevel=1)
        return []

    monkeypatch.setattr("raysweep.training.presets.list_presets", warn)
    with pytest.warns(UserWarning, match="odd") as caught:
        assert main(["list", "--json"]) == 0
    # What earlier tests left open may be collected meanwhile, with a ResourceWarning.
    places = [Path(warning.filename) for warning in caught if warning.category is UserWarning]
    assert places == [Path(__file__)]
    assert capsys.readouterr().err == ""


def test_help_answers_at_once_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, raysweep.cli\n"
        f"for command in [[], *([name] for name in {list(FLAGS)})]:\n"
        "    try: raysweep.cli.main([*command, '--help'])\n    except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'mlflow', 'optuna', 'pydantic', 'yaml', 'rich', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    seconds, heavy = zip(*(_run([sys.executable, "-c", code]) for _ in range(3)), strict=True)
    assert set(heavy) == {"[]"}
    assert min(seconds) < 0.5, "it takes 0.05 processor seconds on an idle machine"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["list"], ["tune", "at", "--plan", "--set", "data.train_size=64"]]
)
def test_what_starts_no_sweep_needs_nothing_of_one(command) -> None:
    code = (
        f"import sys, raysweep.cli\nraysweep.cli.main({command})\n"
        "print(sorted({'ray', 'mlflow', 'optuna', 'pandas'} & set(sys.modules)), file=sys.stderr)"
    )
    assert _run([sys.executable, "-c", code])[1] == "[]"


def _run(command: list[str]) -> tuple[float, str]:
    """The processor seconds of a command, and its last line on stderr."""
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = os.times()
    spent = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    return spent, done.stderr.strip().splitlines()[-1]


def test_list_and_show_in_json(capsys) -> None:
    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"at", "gairat", "lrat"} <= set(listed["methods"]) and "digits" in listed["data"]
    assert set(listed["metrics"]) == set(get_args(ObjectiveName)) and "fab-t" in listed["attacks"]
    about = [
        (name, line)
        for rows in listed.values()
        if isinstance(rows, dict)
        for name, line in rows.items()
    ]
    assert len(about) > 50 and all(line for _, line in about), "a name without a word about it"
    assert main(["show", "lrat", "--set", "epochs=3", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["epochs"] == 3 and shown["method"]["terms"]["bound"]["weight"]["total"] == 0.1


@pytest.mark.parametrize(
    "what", ["gairat", "lrat-trades", "preset:gairat-table1", "preset:lrat-table5"]
)
def test_what_show_prints_is_what_set_takes(what, capsys) -> None:
    assert main(["show", what]) == 0
    out = capsys.readouterr().out
    # In YAML, which --set reads, the description behind a value is a comment.
    lines = [line for line in out.splitlines() if not line.startswith("# ")]
    shown = dict(line.split(" = ", 1) for line in lines)
    note = "# optim.lr: not given by the paper for SVHN; as for CIFAR-10\n"
    assert (note in out) == (what == "preset:lrat-table5")
    config = resolve_training_config(what.removeprefix("preset:"), {})
    assert "\nepochs = " in out and "  # Number of epochs.\n" in out
    assert set(shown) == set(flatten_spec(config))
    assert (
        apply_overrides(config, {path: parse_yaml(value) for path, value in shown.items()})
        == config
    )
    assert {path: parse_yaml(shown[path]) for path in ("epochs", "seed")} == {
        "epochs": config.epochs,
        "seed": 0,
    }


@pytest.mark.parametrize("width", [79, 80, 120])
def test_show_describes_settings_where_the_terminal_is_wide_enough(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["show", "at"]) == 0
    lines = capsys.readouterr().out.splitlines()
    if width < 80:
        assert not any("#" in line for line in lines)
        return
    assert all(len(line) <= width for line in lines)
    behind = "compute.train = float32  # Precision of the forward and backward passes"
    (position,) = (i for i, line in enumerate(lines) if line.startswith("compute.train = "))
    if width == 80:
        assert lines[position] == "compute.train = float32"
        assert lines[position + 1].startswith("    # Precision of the forward and backward passes")
    else:
        assert lines[position].startswith(behind)
    settings = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    assert {line.split(" = ")[0] for line in settings.splitlines()} == set(
        flatten_spec(resolve_training_config("at", {}))
    )


def test_a_space_is_shown_as_yaml_with_descriptions(workdir: Path, capsys) -> None:
    assert main(["show", "space:lrat"]) == 0
    out = capsys.readouterr().out
    text = out[: out.index("\n\n")]
    space = yaml.safe_load(text)
    assert space["sampler"]["kind"] == "tpe" and ALPHA in space["space"]
    for description in ("Seed of the sampler.", "Factor alpha, at least 0 (L eq. 10)."):
        assert f"  # {description}\n" in text
    (workdir / "shown.yaml").write_text(text)
    assert main(["show", "shown.yaml"]) == 0
    assert f"{ALPHA}: " in capsys.readouterr().out


def test_show_tells_names_of_several_things_apart(capsys) -> None:
    assert main(["show", "gairat-table1"]) == 0
    assert "stages:" in capsys.readouterr().out
    assert main(["show", "space:lrat"]) == 0
    said = capsys.readouterr().out
    assert (
        f'{ALPHA}: {{"float": [0.25, 8.0], "log": true}}' in said and "data.name = digits" in said
    )
    assert main(["show", "space:lrat", "--json"]) == 0
    assert ALPHA in json.loads(capsys.readouterr().out)["space"]["space"]
    assert main(["show", "space:lart"]) == 2
    assert "no space 'lart'; nearest: mart, lrat" in capsys.readouterr().err


@pytest.mark.mlflow
def test_train_tracks_and_tells_where(workdir: Path, capsys, training_plots) -> None:
    with training_plots():
        assert main(["train", "lrat", *SMALL, "--name", "mine", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert Path(result["checkpoint"]) == workdir / "runs" / "mine" / "epoch-0001"
    assert "epoch 1/1" in err
    assert main(["train", "lrat", *SMALL, "--name", "mine", "--json"]) == 0, (
        "a finished run is not run again"
    )
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{workdir}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("raysweep").experiment_id])
    assert [(run.info.run_name, run.info.status) for run in runs] == [("mine", "FINISHED")]
    capsys.readouterr()
    assert main(["show", "mine", "--log", "--json"]) == 0
    log = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    events = [entry["event"] for entry in log if "event" in entry]
    assert events == ["start", "end", "start", "end"], "both commands, in one log"
    assert log[0]["versions"]["mlflow"] and "raysweep train lrat" in log[0]["message"]
    (trained,) = (entry for entry in log if "metrics" in entry)
    assert trained["epoch"] == 1
    assert trained["metrics"]["robust_worst"] == pytest.approx(
        result["metrics"]["robust_worst"], abs=1e-4
    )
    digest = json.loads((workdir / "runs" / "mine" / "epoch-0001" / "meta.json").read_text())
    assert {e["config_digest"] for e in log if "config_digest" in e} == {digest["digest"]}
    assert runs[0].data.metrics["best/robust_worst"] == round(result["metrics"]["robust_worst"], 6)
    plots = {Path(item.path).name for item in client.list_artifacts(runs[0].info.run_id, "plots")}
    assert {
        "errors.png",
        "kappa_pgd.png",
        "weight_pgd_histogram.png",
        "V_cw_histogram.png",
    } <= plots


@pytest.mark.mlflow
def test_a_refused_train_leaves_the_earlier_run_as_it_was(workdir: Path, capsys) -> None:
    Ledger.create(workdir / "runs" / "sweep", load_space("lrat", {}))
    assert main(["train", "lrat", *SMALL, "--name", "mine"]) == 0
    before = (workdir / "mlflow.db").read_bytes()
    config = next((workdir / "mlruns").rglob("config.json")).read_text()
    capsys.readouterr()
    for name, change, line in (
        ("mine", "batch_size=16", "mine holds a run with other settings: choose another --name"),
        ("sweep", "batch_size=16", "sweep holds a sweep: choose another --name"),
    ):
        assert main(["train", "lrat", *SMALL, "--name", name, "--set", change]) == 2
        assert line in capsys.readouterr().err
    assert (workdir / "mlflow.db").read_bytes() == before
    assert next((workdir / "mlruns").rglob("config.json")).read_text() == config


def test_a_preset_is_trained_by_its_name(workdir: Path, capsys) -> None:
    digits = ["data.name=digits", "data.data_dir=null", "model.name=digits_cnn", "batch_size=32"]
    flags = [part for setting in digits for part in ("--set", setting)]
    assert main(["train", "lrat-table4-ppc", *SMALL, *flags, "--name", "mine", "--json"]) == 0
    capsys.readouterr()
    meta = json.loads((workdir / "runs" / "mine" / "epoch-0001" / "meta.json").read_text())
    assert meta["config"]["method"]["terms"]["bound"]["on"] == "pgd"
    assert meta["config"]["method"]["attacks"]["pgd"]["eps"] == 8 / 255
    assert main(["train", "lrat-table4-ppx"]) == 2
    assert (
        "no method or preset 'lrat-table4-ppx'; nearest: lrat-table4-ppc" in capsys.readouterr().err
    )


@pytest.mark.ray
def test_tune_ends_with_the_best_trials_and_what_to_type_next(
    ray_cluster, workdir: Path, capsys
) -> None:
    tune = ["tune", "lrat", *SMALL, "--set", "finalists=0", "--trials", "2", "--name", "quick"]
    assert main(tune) == 0
    out, err = capsys.readouterr()
    assert (
        "best 2 of 2 trials by score (the best mean robust worst over 3 consecutive epochs)" in out
    )
    assert str(workdir / "runs" / "quick" / "trials") in out.replace("\n", "")
    assert "  raysweep eval quick/000" in out
    assert "raysweep show quick" in out and "\n  mlflow ui\ncharts\n  http" in out
    assert "trial 0001 finished" in err
    assert main(["show", "quick", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["sweep"] == "quick" and len(shown["trials"]) == 2
    assert all(Path(trial["checkpoint"]).is_dir() for trial in shown["trials"])
    # The base method has trained beside the trials, with two seeds and all epochs.
    assert "at (base) seed 0" in out and "at (base) seed 1 finished" in err
    assert [run["epoch"] for run in shown["base_runs"]] == [1, 1]
    for seed, run in enumerate(shown["base_runs"]):
        meta = json.loads((Path(run["checkpoint"]) / "meta.json").read_text())
        assert (meta["config"]["method"]["name"], meta["config"]["seed"]) == ("at", seed)
        assert run["verdicts"]["n_examples"] == 50
    assert main(["show", "quick", "--log"]) == 0
    assert "[base run 0001 process" in capsys.readouterr().out
    wider = workdir / "wider.yaml"
    shipped = load_space("lrat", {"finalists": 0}).to_json_dict()
    shipped["space"][ALPHA]["float"] = [0.125, 16.0]
    wider.write_text(yaml.safe_dump(shipped))
    grown = ["--trials", "3", "--set", "epochs=2", "--space", str(wider)]
    assert main(["tune", "lrat", "--resume", "quick", *grown, "--json"]) == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    finished = [trial for trial in trials if trial["state"] == "finished"]
    assert len(trials) == 3 and finished and all(trial["epoch"] == 2 for trial in finished)
    runs = Ledger.open(workdir / "runs" / "quick").load_base_runs()
    assert [(run.state, run.epoch) for run in runs] == [("finished", 2)] * 2
    assert Ledger.open(workdir / "runs" / "quick").space.space[ALPHA].float == (0.125, 16.0)
    held = ["--address", gcs_address(), "--workers", "2", "--cpus-per-trial", "1.5"]
    held += ["--gpus-per-trial", "0", "--optuna", f"sqlite:///{workdir}/optuna.db"]
    assert (
        main(["tune", "lrat", "--resume", "quick", "--trials", "4", "--max-time", "0.01s", *held])
        == 0
    )
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "--resume" in line]
    assert line == f"  raysweep tune --resume quick {' '.join(held)}"
    assert main(["tune", "lrat", "--resume", "quick", "--set", "batch_size=16"]) == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert "batch_size = 16: the sweep has 64; choose another --name for that" in message


@pytest.mark.ray
def test_a_sweep_of_a_method_of_ones_own_is_called_after_it(
    ray_cluster, workdir: Path, capsys
) -> None:
    (workdir / "both.yaml").write_text(BOTH)
    assert main(["tune", "--space", "both.yaml", "--trials", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sweep"].startswith("both-2")


@pytest.mark.ray
def test_tune_gairat_on_colour_images_of_ones_own(ray_cluster, workdir: Path, capsys) -> None:
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        x = generator.integers(0, 256, (60, 3, 16, 16), dtype=np.uint8)
        np.savez(workdir / f"{split}.npz", x=x, y=np.arange(60) % 3)
    # A relative folder, though trials work in others.
    settings = [
        "finalists=0",
        "base_runs=0",
        "data.name=arrays",
        "data.val_size=15",
        "model.name=digits_cnn",
        "epochs=2",
        "*.attacks.*.steps=2",
    ]
    flags = [part for setting in [*settings, "data.data_dir=."] for part in ("--set", setting)]
    assert main(["tune", "gairat", *flags, "--trials", "2", "--name", "mine", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["trials"]) == 2
    assert Ledger.open(workdir / "runs" / "mine").space.base["data.data_dir"] == str(workdir)


def test_plan_starts_nothing_and_writes_nothing(workdir: Path, capsys) -> None:
    few_runs = ["--set", "validation.finish.*.runs=1"]
    assert main(["tune", "lrat", "--plan", "--json", *few_runs]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["trials"] == 10 and plan["validation_examples"] == 300
    assert plan["base_runs"] == 2
    assert plan["epochs_expected"] == 70 + 16, "10 x 6, then 5 x 2; and AT twice 8"
    assert plan["objective_95_half_width"] == pytest.approx(1.96 * (0.25 / 300) ** 0.5, abs=1e-4)
    assert plan["trials_at_once"] == min(joblib.cpu_count(), 10)
    assert plan["wall_hours"] == pytest.approx(
        plan["trial_hours"] / plan["trials_at_once"], abs=2e-3
    )
    assert not list(workdir.iterdir())


def test_a_plan_of_a_sweep_to_go_on_with_is_of_what_is_left(workdir: Path, capsys) -> None:
    changes = {"epochs": 3, "scheduler.grace_period": 2, "*.attacks.*.steps": 2}
    changes |= {"validation.finish.*.steps": 2, "validation.finish.*.runs": 1}
    space = load_space("lrat", changes).replace(trials=16)
    ledger = Ledger.create(workdir / "runs" / "g1", space)
    for number, state in enumerate(("finished", "stopped", "running")):
        ledger.save_trial(Trial(number, {ALPHA: 1.0}, state=state, epoch=3 - number))  # type: ignore[arg-type]
    plans = []
    for more in ([], ["--set", "epochs=5"]):
        assert main(["tune", "--resume", "g1", "--plan", "--json", *more]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert [(plan["trials"], plan["trials_left"]) for plan in plans] == [(16, 14), (16, 15)]
    # Rungs at 2 and 4: thirteen new trials, one after its first epoch, and one that had finished
    # after its third.
    assert [plan["epochs_expected"] for plan in plans] == [
        round(13 * 2.5 + 1.5) + 2 * 3,
        round(13 * 3.25 + 2.25 + 1.5) + 2 * 5,
    ]
    assert main(["tune", "--resume", "g1", "--plan"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[0].startswith("14 of 16 trials are left: lrat on digits, 3 epochs each")
    text = " ".join(map(str.strip, lines))
    assert "of these, 6 epochs are 2 base runs of at, with which the best trial is compared" in text
    assert "on the 3 best trials and the base runs" in text


@pytest.mark.ray
def test_plan_counts_the_workers_of_a_trial(ray_cluster, workdir: Path, capsys) -> None:
    """The session's cluster has two CPUs."""
    small = [*SMALL, "--plan", "--json", "--address", gcs_address()]
    plans = []
    for more in ([], ["--workers", "2", "--cpus-per-trial", "2"]):
        assert main(["tune", "lrat", *small, *more]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert [plan["trials_at_once"] for plan in plans] == [2, 1]
    assert [plan["workers_per_trial"] for plan in plans] == [1, 2]
    assert main(["tune", "lrat", *small, "--cpus-per-trial", "9"]) == 3
    assert "a trial needs 9 CPUs and 0 GPUs, the cluster has 2 CPUs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["tune", "lratt"], "no method 'lratt'; nearest: lrat"),
        (
            ["tune"],
            "METHOD is missing: name one of `raysweep list`, or give --space FILE or --resume NAME",
        ),
        (
            ["tune", "lrat", "--space", "both.yaml"],
            "both.yaml is a space for method 'both', not for 'lrat'",
        ),
        (["tune", "at", "--resume", "g1"], "--resume g1: is a sweep of 'both', not of 'at'"),
        pytest.param(
            ["tune", "--space", "both.yaml", "--name", "g1"], "there is a sweep in", marks=NEEDS_RAY
        ),
        (["train", "lrat", "--set", "epochz=3"], "no setting 'epochz'; nearest: epochs"),
        (["train", "lrat", "--set", "epochs"], "--set 'epochs': expected PATH=VALUE"),
        (["train", "lrat", "--set", "epochs=[1"], "--set 'epochs=[1': not valid YAML"),
        (["tune", "lrat", "--set", "data.name=svhn"], "data.data_dir is missing"),
        (
            ["tune", "lrat", "--set", "data.name=svhn", "--data-dir", "nowhere"],
            "data.name 'svhn' is not in",
        ),
        (["tune", "lrat", "--space", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["tune", "lrat", "--name", "../up"], "--name '../up': use letters, digits"),
        (
            ["tune", "lrat", "--name", "pipelines"],
            "--name 'pipelines': raysweep uses this folder itself",
        ),
        (
            ["train", "lrat", "--name", "eval"],
            "--name 'eval': raysweep uses this folder itself",
        ),
        (["tune", "lrat", "--resume", "nothing"], "no sweep in"),
        (["tune", "lrat", "--out", "file/below"], "--out file/below: cannot be made"),
        pytest.param(
            ["tune", "lrat", "--address", "nonsense"],
            "--address 'nonsense': expected auto or host:port",
            marks=NEEDS_RAY,
        ),
        (
            ["tune", "lrat", "--workers", "2", "--gpus-per-trial", "3"],
            "3 GPUs for 2 workers is 1.5 each",
        ),
        (
            ["tune", "lrat", "--workers", "2", "--cpus-per-trial", "0.01"],
            "0.01 CPUs are not enough for 2 workers",
        ),
        (
            ["tune", "lrat", "--cpus-per-trial", "0"],
            "--cpus-per-trial 0: must be more than 0, for example 0.5",
        ),
        (
            ["tune", "lrat", "--plan", "--cpus-per-trial", "0"],
            "--cpus-per-trial 0: must be more than 0",
        ),
        (["train", "odd.yaml"], "odd.yaml:1: 1: expected the name of a setting, got int"),
        (
            ["show", "lart"],
            "no method, preset, space file, pipeline, sweep, trial or training run 'lart'; "
            "nearest: mart, lrat",
        ),
        (
            ["show", "#"],
            "no method, preset, space file, pipeline, sweep, trial or training run '#'; "
            "`raysweep list` names all",
        ),
    ],
    ids=lambda case: " ".join(case) if isinstance(case, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, line, workdir: Path, capsys) -> None:
    (workdir / "file").touch()
    (workdir / "odd.yaml").write_text("1: 2")
    (workdir / "both.yaml").write_text(BOTH)
    Ledger.create(workdir / "runs" / "g1", load_space("", {}, workdir / "both.yaml"))
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 1, err
    assert err.startswith("raysweep: error: ") and line in err
    assert not (workdir / "runs").exists() or not list((workdir / "runs").glob("*/trials/*"))


@pytest.mark.needs_ray
@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--out", "file/below"], "--out file/below: cannot be made"),
        (["--out", "what?x=1"], "cannot lie in a path with '?'"),
        (["--optuna", "nonsense"], "--optuna nonsense: "),
        (["--set", "data.name=svhn"], "data.data_dir is missing"),
        (["--warm-start", "nowhere"], "--warm-start nowhere: there is no sweep of this name"),
    ],
)
def test_a_mistake_is_found_before_ray_starts(
    options: list[str], line: str, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (workdir / "file").touch()
    monkeypatch.setattr(
        "raysweep.sweep.cluster_start.prepare_cluster",
        lambda address: pytest.fail("starting Ray takes seconds"),
    )
    assert main(["tune", "lrat", *options]) == 2
    assert line in capsys.readouterr().err


@pytest.mark.needs_ray
@pytest.mark.parametrize(
    "options",
    [
        ["--set", "data.name=svhn"],
        ["--set", "data.name=arrays", "--data-dir", "nowhere"],
        ["--warm-start", "nowhere"],
        ["--resume", "nowhere"],
        ["--plan", "--set", "data.name=svhn"],
    ],
)
def test_a_refused_sweep_makes_neither_its_folder_nor_an_optuna_storage(
    options: list[str], workdir: Path
) -> None:
    assert main(["tune", "lrat", "--out", "new", "--optuna", "sqlite:///optuna.db", *options]) == 2
    assert not list(workdir.iterdir())


@pytest.mark.needs_ray
def test_a_refused_sweep_takes_back_what_it_made_and_nothing_else(workdir: Path, capsys) -> None:
    run = workdir / "runs" / "first" / "epoch-0001"
    run.mkdir(parents=True)
    (run / "meta.json").write_text("precious")
    assert main(["tune", "lrat", "--name", "first", "--address", "127.0.0.1:1"]) == 2
    assert "holds other files than a sweep: choose another --name" in capsys.readouterr().err
    assert (run / "meta.json").read_text() == "precious"
    assert {path.name for path in (workdir / "runs").rglob("*")} == {
        "first",
        "epoch-0001",
        "meta.json",
    }
    assert main(["tune", "lrat", "--name", "second", "--address", "127.0.0.1:1"]) == 3
    assert [path.name for path in (workdir / "runs").iterdir()] == ["first"]


@pytest.mark.mlflow
def test_out_may_be_below_home(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(workdir / "home"))
    assert main(["train", "at", *SMALL, "--name", "mine", "--out", "~/x"]) == 0
    assert sorted(path.name for path in (workdir / "home" / "x").iterdir()) == [
        "mlflow.db",
        "mlruns",
        "runs",
    ]
    assert [path.name for path in workdir.iterdir()] == ["home"]


@pytest.mark.slow
@pytest.mark.needs_ray
def test_two_at_once_in_one_folder_are_refused(workdir: Path, capsys) -> None:
    sweep = Ledger.create(workdir / "runs" / "g1", load_space("lrat", {}))
    for command in (["tune", "lrat", "--resume", "g1"], ["train", "lrat", "--name", "mine"]):
        with hold_folder_lease(workdir / "runs" / command[-1]):
            assert main(command) == 2
        (message,) = capsys.readouterr().err.strip().splitlines()
        assert f"'{command[-1]}' is running already (process {os.getpid()} on " in message
    assert not sweep.load_trials() and not (workdir / "runs" / "mine").exists()


@pytest.mark.slow
@pytest.mark.needs_ray
def test_a_refused_resume_changes_nothing(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    new, old = (
        Ledger.create(workdir / "runs" / name, load_space("lrat", {"epochs": 3}))
        for name in ("new", "old")
    )
    old.save_trial(Trial(0, {ALPHA: 1.0}, state="finished", epoch=3))
    before = {file: file.read_text() for file in (workdir / "runs").rglob("*.json")}
    for ledger in (new, old):
        assert (
            main(
                [
                    "tune",
                    "lrat",
                    "--resume",
                    ledger.name,
                    "--set",
                    "epochs=40",
                    "--address",
                    "127.0.0.1:1",
                ]
            )
            == 3
        )
        assert "no Ray cluster at --address 127.0.0.1:1" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://x")
    assert main(["tune", "lrat", "--resume", "old", "--set", "epochs=40"]) == 3
    assert "MLflow store nonsense://x" in capsys.readouterr().err
    assert {file: file.read_text() for file in (workdir / "runs").rglob("*.json")} == before


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["tune", "lrat", "--trials", "0"],
            "'0' is not a whole number of at least 1; see `raysweep tune --help`",
        ),
        (["tune", "lrat", "--cpus-per-trial", "-1"], "'-1' is not a number of at least 0"),
        (["tune", "lrat", "--workers", "0"], "'0' is not a whole number"),
        (
            ["tune", "lrat", "--trails=3"],
            "unrecognized arguments: --trails=3; nearest: --trials; see `raysweep tune",
        ),
        (
            ["list", "more"],
            "argument runs: 'more' is not `runs`, the only list of its own; `raysweep list` has",
        ),
        (
            ["tune", "lrat", "--set", "cpus_per_trial=5"],
            "argument --set: use the option --cpus-per-trial in place of cpus_per_trial=...; ",
        ),
        (["tun", "lrat"], "invalid choice: 'tun'"),
    ],
)
def test_argparse_refuses_with_one_line_and_exit_code_2(arguments, line, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("raysweep: error: ") and line in message


def test_without_a_command_the_help_is_printed(capsys) -> None:
    assert main([]) == 2, "as after click's commands: nothing was done"
    out, err = capsys.readouterr()
    assert out == "" and err == build_parser().format_help()


def test_the_package_can_be_run_as_a_module() -> None:
    command = [sys.executable, "-m", "raysweep", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"raysweep {__version__}\n"


def test_a_folder_that_digits_do_not_read_is_told(workdir: Path, capsys) -> None:
    named = [*SMALL, "--set", "data.name=digits"]
    assert main(["train", "at", *named, "--data-dir", "data"]) == 0
    said = capsys.readouterr().err
    assert (
        f"warning: data.data_dir = {workdir}/data: not read: digits come with scikit-learn" in said
    )


def test_a_table_in_a_pipe_is_whole(workdir: Path, capsys) -> None:
    ledger = Ledger.create(workdir / "runs" / "g1", load_space("lrat", {}))
    settings = dict.fromkeys(ledger.space.space, 1.2345)
    ledger.save_trial(
        Trial(0, settings, state="failed", epoch=1, reason="a reason of " + "many words " * 20)
    )
    assert main(["show", "g1"]) == 0
    *_, header, row = capsys.readouterr().out.splitlines()
    assert (
        header.split()[:4] == ["trial", "pgd.beta", "alpha", "cw.beta"] and "robust worst" in header
    )
    assert (
        row.count("1.23") == len(settings) and "many words many words" in row and "\x1b" not in row
    )


def test_a_corrupt_checkpoint_is_one_line(workdir: Path, capsys) -> None:
    assert main(["train", "at", *SMALL, "--name", "mine"]) == 0
    (workdir / "runs" / "mine" / "epoch-0001" / "weights.safetensors").write_bytes(b"half")
    capsys.readouterr()
    assert main(["train", "at", *SMALL, "--name", "mine"]) == 4
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert "weights.safetensors is truncated or altered" in message


TELEMETRY = {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}


@pytest.mark.parametrize("users", [{}, {"MLFLOW_DISABLE_TELEMETRY": "false"}])
def test_commands_do_not_phone_home_unless_the_user_wants_it(users, monkeypatch, capsys) -> None:
    for name in TELEMETRY:
        monkeypatch.delenv(name, raising=False)
    for name, value in users.items():
        monkeypatch.setenv(name, value)
    assert main(["list"]) == 0
    assert {name: os.environ.pop(name) for name in TELEMETRY} == {**TELEMETRY, **users}


@pytest.mark.mlflow
def test_an_mlflow_that_was_imported_before_does_not_phone_home(
    monkeypatch, empty_store, tmp_path: Path
) -> None:
    from mlflow.telemetry import client

    from raysweep.tracking import Tracker

    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    # Only MLflow's own end of a client is needed, not one that has begun to ask its makers.
    monkeypatch.setattr(client, "_MLFLOW_TELEMETRY_CLIENT", object())
    empty_store(tmp_path / "mlflow.db")
    Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path).wait_until_ready()
    assert client.get_telemetry_client() is None
    assert os.environ.pop("MLFLOW_DISABLE_TELEMETRY") == "true"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_scripts_are_sound(shell, capsys, tmp_path) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert end.value.code == 0 and "gair-trades" in script and "--max-gpu-hours" in script
    if shell == "bash":
        complete = "\n".join(
            [
                "COMP_WORDS=(raysweep tune lr)",
                "COMP_CWORD=2",
                "_shtab_raysweep",
                'echo "${COMPREPLY[@]}"',
            ]
        )
        command = ["bash", "-c", f"{script}\n{complete}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.split() == ["lrat", "lrat-trades"], done.stderr
