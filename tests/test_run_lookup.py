"""Sweeps, trials and training runs are found by the same names everywhere."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import raysweep
from raysweep.cli import main
from raysweep.leases import hold_folder_lease, is_folder_in_use
from raysweep.models import MODELS
from raysweep.result_loading import load_training_run
from raysweep.run_lookup import find_run, list_runs
from raysweep.spec import SpecError
from raysweep.stores import open_path
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial
from raysweep.training.checkpoint import RunDirectory
from raysweep.training.presets import resolve_training_config
from raysweep.training.trainer import train_model

LR = "optim.lr"
SMALL = {
    "epochs": 2,
    "data.train_size": 32,
    "data.val_size": 20,
    "*.attacks.*.steps": 1,
    "validation.finish.*.steps": 1,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_model(resolve_training_config("at", SMALL), folder)
    assert RunDirectory(folder).run_key
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the training run `mine`, and a sweep `lrat` of two trials, of which
    the first has ended.
    """
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    shutil.copytree(trained, runs / "mine")
    space = {
        "method": "at", "trials": 2, "space": {LR: {"float": [0.01, 0.5]}}, "base": SMALL,
    }  # fmt: skip
    ledger = Ledger.create(runs / "lrat", SearchSpace.from_data(space))
    best_epoch = float(load_training_run(trained).best["epoch"])
    best = {"epoch": best_epoch, "clean": 0.5, "robust_worst": 0.25}
    ledger.save_trial(Trial(0, {LR: 0.1}, state="finished", epoch=2, best=best))
    ledger.save_trial(Trial(1, {LR: 0.2}, state="running", epoch=1, best={**best, "epoch": 1.0}))
    shutil.copytree(trained, runs / "lrat" / "trials" / "0000", dirs_exist_ok=True)
    (runs / "lrat" / "trials" / "0000" / "run.json").unlink()
    return tmp_path


def weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return list(model.state_dict().values())


def test_names_of_everything(folder: Path) -> None:
    runs = open_path(folder / "runs")
    for prefix in ("", "runs/"):
        kinds = {}
        for name in ("lrat", "lrat/0001", "lrat/1", "mine", "mine/"):
            found = find_run(prefix + name, runs)
            assert found is not None
            kinds[name] = (found.kind, found.path.name)
        assert kinds == {
            "lrat": ("sweep", "lrat"),
            "lrat/0001": ("trial", "0001"),
            "lrat/1": ("trial", "0001"),
            "mine": ("training run", "mine"),
            "mine/": ("training run", "mine"),
        }
    assert [find_run(name, runs) for name in ("", "runs/", "nothing", "../runs/mine")] == [None] * 4
    elsewhere = open_path(folder / "elsewhere")
    for path in (folder / "runs", "./runs", f"../{folder.name}/runs"):
        kinds = {}
        for name in ("lrat", "lrat/trials/0001", "mine"):
            found = find_run(f"{path}/{name}", elsewhere)
            assert found is not None
            kinds[name] = (found.kind, found.path.name, found.run_key)
        assert kinds == {
            "lrat": ("sweep", "lrat", ""),
            "lrat/trials/0001": ("trial", "0001", "0001"),
            "mine": ("training run", "mine", ""),
        }
    assert find_run(str(folder / "runs"), runs) is None
    with pytest.raises(SpecError, match="lrat has no trial 0002: it has 2"):
        find_run("runs/lrat/2", runs)
    assert [(run.path.name, run.kind) for run in list_runs(runs)] == [
        ("lrat", "sweep"), ("mine", "training run"),
    ]  # fmt: skip


def test_load_takes_all_of_them(folder: Path) -> None:
    names = ("mine", "runs/mine", "lrat", "lrat/0000", "runs/lrat/0000", folder / "runs" / "mine")
    models = [raysweep.load(name) for name in names]
    best = load_training_run(folder / "runs" / "mine").checkpoint
    assert best is not None
    expected = weights_of(raysweep.load(str(best)))
    for model in models:
        assert not model.training
        assert all(map(torch.equal, weights_of(model), expected))
    with pytest.raises(SpecError, match="no sweep, trial, training run or folder 'mien'; nearest"):
        raysweep.load("mien")


def test_load_sweep_takes_a_name(folder: Path) -> None:
    by_name, by_folder = raysweep.load_sweep("lrat"), raysweep.load_sweep(folder / "runs" / "lrat")
    assert by_name.ledger.key == by_folder.ledger.key
    with pytest.raises(SpecError, match="no sweep in"):
        raysweep.load_sweep("mine")


def test_a_training_run_that_failed_says_why_until_it_runs_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [word for path, value in SMALL.items() for word in ("--set", f"{path}={value}")]
    command = ["train", "at", *settings, "--name", "nan", "--set", "optim.lr=1e30"]
    for _ in range(2):
        assert main(command) == 1
        capsys.readouterr()
        run = load_training_run(folder / "runs" / "nan")
        assert run.state == "failed" and "the loss became nan" in run.reason
    assert main(["show", "nan"]) == 0
    assert "nan failed (the loss became nan in epoch " in capsys.readouterr().out
    assert main(["list", "runs", "--json"]) == 0
    (row,) = (row for row in json.loads(capsys.readouterr().out)["runs"] if row["name"] == "nan")
    assert row["state"] == "failed"
    with hold_folder_lease(open_path(folder / "runs" / "nan")):
        assert load_training_run(folder / "runs" / "nan").state == "running"


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("name: mine\nterms: {natural: {on: natural}}\n", "describes a method"),
        ("method: at\nspace: {optim.lr: {float: [0.1, 1]}}\n", "`raysweep tune --space"),
        ("stages: [{kind: tune, space: at}]\n", "`raysweep run"),
    ],
    ids=["method", "search space", "pipeline"],
)
def test_train_says_what_a_file_of_another_kind_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, hint: str
) -> None:
    (tmp_path / "file.yaml").write_text(content)
    assert main(["train", str(tmp_path / "file.yaml"), "--plan"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert hint in line and "file.yaml" in line


def test_list_of_another_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["list", "sweeps"])
    assert "'sweeps' is not `runs`" in capsys.readouterr().err


def test_weights_load_in_plain_pytorch(folder: Path) -> None:
    """The lines of the tutorial, with the architecture by itself."""
    page = (Path(__file__).parent.parent / "docs" / "tutorial.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?load_state_dict.*?)^```", page, re.M | re.S)
    run = load_training_run(folder / "runs" / "mine")
    (folder / "runs" / "first").mkdir()
    shutil.copytree(str(run.checkpoint), folder / "runs" / "first" / "epoch-0004")
    network = MODELS["digits_cnn"](1, 10)
    exec(code, {"network": network})
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(network.eval()(images), raysweep.load("mine")(images))


def test_show_and_list_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "runs", "--json"]) == 0
    history = RunDirectory(folder / "runs" / "mine").read_history()
    best = max(metrics["robust_worst"] for metrics in history)
    assert json.loads(capsys.readouterr().out)["runs"] == [
        {"name": "lrat", "kind": "sweep", "state": "interrupted", "method": "at",
         "done": "1 of 2 trials", "best": "robust_worst 0.250"},
        {"name": "mine", "kind": "training run", "state": "finished", "method": "at",
         "done": "2 of 2 epochs", "best": f"robust_worst {best:.3f}"},
    ]  # fmt: skip
    assert main(["list", "runs"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "name", "lrat", "mine",
    ]  # fmt: skip
    assert main(["list", "runs", "--out", "elsewhere"]) == 0
    assert "no sweep or training run in " in capsys.readouterr().out

    for name in ("mine", "runs/mine", "./runs/mine", str(folder / "runs" / "mine")):
        assert main(["show", name]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("mine finished after 2 of 2 epochs: at on digits\n")
        assert f"  robust_worst = {best:.4f}\n" in shown and "data.train_size = 32" in shown
    assert main(["show", "mine", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["run"], facts["state"], facts["epochs"]) == ("mine", "finished", 2)
    assert Path(facts["checkpoint"]).is_dir() and facts["config"]["epochs"] == 2


def test_a_sweep_goes_before_its_namesakes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", "lrat"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "lrat is a sweep of this folder; for its namesake: `raysweep show method:lrat` or "
        "`raysweep show space:lrat`"
    )
    assert lines[1:4] == [
        "lrat: 1 of 2 trials ended, interrupted", "resume with", "  raysweep tune --resume lrat",
    ]  # fmt: skip
    assert main(["show", "runs/lrat"]) == 0
    assert capsys.readouterr().out.startswith("lrat: 1 of 2 trials")
    assert main(["show", "method:lrat"]) == 0
    assert capsys.readouterr().out.startswith("method.name = lrat")
    (folder / "runs" / "lrat").rename(folder / "runs" / "own.yaml")
    (folder / "own.yaml").write_text("method: at\n")
    assert main(["show", "own.yaml"]) == 0
    assert capsys.readouterr().out.startswith(
        "own.yaml is a sweep of this folder; for its namesake: `raysweep show ./own.yaml`\n"
    )
    assert main(["show", "./own.yaml"]) == 0
    assert capsys.readouterr().out.startswith("method.name = at")
    (folder / "runs" / "own.yaml").rename(folder / "runs" / "digits")
    assert main(["show", "digits"]) == 0
    assert "`raysweep show pipeline:digits`" in capsys.readouterr().out
    assert main(["show", "pipeline:digits"]) == 0
    assert "stages" in capsys.readouterr().out


HOLDER = """
import sys, time
from raysweep.leases import hold_folder_lease
with hold_folder_lease(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_killed_sweep_is_interrupted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The holder is a process that is killed, so that it releases nothing."""
    sweep_folder = folder / "runs" / "lrat"
    sweep = raysweep.load_sweep(sweep_folder)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(sweep_folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert is_folder_in_use(sweep_folder)
        assert sweep.state == "running" and sweep.resume_command == ""
        assert sweep.trials["state"].to_dict() == {0: "finished", 1: "running"}
        assert main(["show", "lrat", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["state"], facts["resume"]) == ("running", None)
    finally:
        holder.kill()
        holder.communicate()
    assert (sweep_folder / "lock").read_text(), "a killed process leaves its name"
    assert not is_folder_in_use(sweep_folder)
    assert sweep.state == "interrupted"
    assert sweep.resume_command == "raysweep tune --resume lrat"
    assert sweep.trials["state"].to_dict() == {0: "finished", 1: "interrupted"}
    assert main(["show", "lrat", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["state"], facts["resume"]) == ("interrupted", "raysweep tune --resume lrat")
    assert [trial["state"] for trial in facts["trials"]] == ["finished", "interrupted"]
    os.chdir(folder.parent)
    assert sweep.resume_command == f"raysweep tune --resume lrat --out {folder}"
    ledger = sweep.ledger
    (running,) = (trial for trial in ledger.load_trials() if trial.state == "running")
    ledger.save_trial(replace(running, state="stopped"))
    assert sweep.state == "finished" and sweep.resume_command == ""


def test_a_folder_is_in_use_while_it_is_held(tmp_path: Path) -> None:
    assert not is_folder_in_use(tmp_path / "nothing")
    with hold_folder_lease(tmp_path / "run") as held:
        (held / "file").write_text("x")
        assert is_folder_in_use(tmp_path / "run")
    assert not is_folder_in_use(tmp_path / "run")
    # Looking takes nothing away from the next process.
    with hold_folder_lease(tmp_path / "run"):
        pass
