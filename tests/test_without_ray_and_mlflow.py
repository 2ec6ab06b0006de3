"""Without Ray and MLflow, commands that need neither work, and commands that need one say so in one
line.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny
from core_environment import LEFT_OUT, make_core_environment

from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial
from raysweep.training.selection import SelectionRule
from raysweep.training.trainer import train_model

SMALL = "--set epochs=1 --set data.train_size=64 --set data.val_size=50 --set *.attacks.*.steps=2"
SMALL += " --set validation.finish.*.steps=2 --set validation.finish.*.runs=1"
MODEL = """\
import torch
def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
"""
WORK = [
    "list",
    "show lrat",
    "show space:lrat",
    f"train at {SMALL} --name mine",
    f"tune lrat --plan {SMALL}",
    "run digits --plan --set epochs=1",
    "eval runs/mine --attack pgd20 --n 10 --bundle claim",
    "eval claim --verify",
    "eval mine:make --attack pgd20 --eps 0.1 --n 10",
    "eval runs/mine --pseudo-label more.npz",
    "show one --storage sweeps",
    "show one/0000 --storage sweeps",
    "show one --storage sweeps --json",
    "eval one --storage sweeps --attack pgd20 --n 10",
    f"train at {SMALL} --name stored --storage runs/others",
]
# What the commands above write to standard output, beside more.
SAYS = {
    "show lrat": "method.name = lrat",
    "eval runs/mine --pseudo-label more.npz": "data.unlabeled=",
    "show one --storage sweeps": "one: 1 of 1 trials ended",
    "show one/0000 --storage sweeps": "one/0000 finished after 1 epoch, 1 trained here",
    "show one --storage sweeps --json": '"number": 0',
}
# Test files that cannot be imported without Ray or MLflow: the quick run without them leaves these
# out, and no others.
IMPORT_RAY_OR_MLFLOW = {
    "test_clusters.py",
    "test_doctor.py",
    "test_kills.py",
    "test_mlflow_models.py",
    "test_ray_internals.py",
    "test_ray_workers.py",
    "test_resume.py",
    "test_sweep.py",
    "test_threads.py",
    "test_two_users.py",
}
NEED = [f"tune lrat --trials 1 {SMALL}", "doctor", "eval models:/robust@champion"]
SCRIPT = """\
import contextlib, io, json, os, sys
from raysweep.cli import main
# Attacks run in this process: starting others takes longer than such small attacks do.
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
results = []
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(command.split())
    results.append([code, out.getvalue(), err.getvalue()])
import torch, raysweep
x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
report = raysweep.evaluate(__import__("mine").make(), x, y, attack="pgd20", eps=0.1)
sweep = raysweep.load_sweep("sweeps/one")
tables = [list(sweep.trials["state"]), [list(index) for index in sweep.epochs.index]]
paths = ("runs/mine", "runs/others/stored", sweep.best)
shapes = [list(raysweep.load(path)(x).shape) for path in paths]
modules = sorted({"ray", "mlflow"} & set(sys.modules))
# The test files that are left out here. One process for all of this, because imports take seconds.
import shutil
from pathlib import Path
tests = Path(sys.argv[2])
sys.path.insert(0, str(tests))
import conftest
shutil.rmtree(os.environ["RAYSWEEP_CACHE"])
left_out = [f.name for f in tests.glob("test_*.py") if conftest.pytest_ignore_collect(f)]
print(json.dumps([results, report.robust_accuracy, modules, tables, shapes, left_out]))
"""


@pytest.fixture(scope="module")
def core_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has neither Ray nor MLflow: this one, if it is so."""
    here = all(importlib.util.find_spec(name) is None for name in LEFT_OUT)
    return (
        Path(sys.executable)
        if here
        else make_core_environment(tmp_path_factory.mktemp("core") / "environment")
    )


def run_in(python: Path, folder: Path, script: str, *arguments: str) -> list:
    """What a script prints, as JSON."""
    done = subprocess.run(
        [python, "-c", script, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def make_sweep(path: Path) -> None:
    """A sweep with one trial that has ended."""
    config = tiny("at", epochs=1)
    space = {
        "method": "at",
        "trials": 1,
        "base": {"data.val_size": 50},
        "space": {"optim.lr": {"float": [0.1, 0.3]}},
    }
    ledger = Ledger.create(path, SearchSpace.from_data(space))
    (row,) = train_model(config, ledger.trial_path(0)).last_checkpoint.history
    trial = Trial(0, {"optim.lr": 0.2}, state="finished")
    ledger.save_trial(trial.with_epoch(row, SelectionRule("robust_worst")))


@pytest.fixture(scope="module")
def results(
    core_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, list], list]:
    """Exit code, output and errors of each command; then what the functions of a notebook gave, and
    imports.
    """
    folder = tmp_path_factory.mktemp("commands")
    (folder / "mine.py").write_text(MODEL)
    np.savez(
        folder / "more.npz",
        x=np.random.default_rng(0).integers(0, 17, (40, 1, 8, 8), dtype=np.uint8),
    )
    make_sweep(folder / "sweeps" / "one")
    tests = str(Path(__file__).parent)
    found, *more = run_in(core_python, folder, SCRIPT, json.dumps([*WORK, *NEED]), tests)
    return dict(zip([*WORK, *NEED], found, strict=True)), more


@pytest.mark.parametrize("command", WORK)
def test_commands_that_need_neither_work(results, command: str) -> None:
    code, out, err = results[0][command]
    assert code == 0 and out, err
    assert SAYS.get(command, "") in out
    tracks = (
        command.startswith(("train", "eval"))
        and "--verify" not in command
        and "--pseudo-label" not in command
    )
    assert ("MLflow is not installed, nothing is tracked" in err) == tracks


def test_what_a_notebook_calls_works_and_neither_was_imported(results) -> None:
    robust, modules, tables, shapes, _ = results[1]
    assert 0 <= robust <= 1 and modules == []
    assert tables == [["finished"], [[0, 1]]], "a row for each trial, and for each trial and epoch"
    assert shapes == [[8, 10]] * 3, "the run's, the stored run's and the sweep's best network"


def test_only_test_files_that_import_ray_or_mlflow_are_left_out(results) -> None:
    """A library that a file of tests imports by mistake would take it out of the quick run without
    Ray and MLflow.
    """
    assert set(results[1][-1]) == IMPORT_RAY_OR_MLFLOW


@pytest.mark.parametrize(
    ("command", "line"),
    zip(NEED, ["needs Ray", "needs Ray", "MLflow is not installed"], strict=True),
)
def test_commands_that_need_one_say_so_in_one_line(results, command: str, line: str) -> None:
    code, out, err = results[0][command]
    assert code == 3 and out == ""
    *_, message = err.splitlines()
    assert message.startswith("raysweep: error: ") and line in message and "pip install" in message
