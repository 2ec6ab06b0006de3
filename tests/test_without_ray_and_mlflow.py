"""Without Ray and MLflow, commands that need neither work, and commands that need one say so in one line."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from core_environment import LEFT_OUT, make_core_environment

SMALL = "--set epochs=1 --set data.train_size=64 --set data.val_size=50 --set *.attacks.*.steps=2"
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
]
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
print(json.dumps([results, report.robust_accuracy, sorted({"ray", "mlflow"} & set(sys.modules))]))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list], list]:
    """Exit code, output and errors of each command; then the robust accuracy by `raysweep.evaluate`, and imports."""
    folder = tmp_path_factory.mktemp("core")
    here = all(importlib.util.find_spec(name) is None for name in LEFT_OUT)
    python = Path(sys.executable) if here else make_core_environment(folder / "environment")
    (folder / "mine.py").write_text(MODEL)
    command = [python, "-c", SCRIPT, json.dumps([*WORK, *NEED])]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, *more = json.loads(done.stdout)
    return dict(zip([*WORK, *NEED], found, strict=True)), more


@pytest.mark.parametrize("command", WORK)
def test_commands_that_need_neither_work(results, command: str) -> None:
    code, out, err = results[0][command]
    assert code == 0 and out, err
    tracks = command.startswith(("train", "eval")) and "--verify" not in command
    assert ("MLflow is not installed, nothing is tracked" in err) == tracks


def test_evaluate_works_and_neither_was_imported(results) -> None:
    robust, modules = results[1]
    assert 0 <= robust <= 1 and modules == []


@pytest.mark.parametrize(
    ("command", "line"), zip(NEED, ["needs Ray", "needs Ray", "MLflow is not installed"], strict=True)
)
def test_commands_that_need_one_say_so_in_one_line(results, command: str, line: str) -> None:
    code, out, err = results[0][command]
    assert code == 2 and out == ""
    *_, message = err.splitlines()
    assert message.startswith("raysweep: error: ") and line in message and "pip install" in message
