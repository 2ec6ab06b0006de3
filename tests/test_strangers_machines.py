"""Machines and sessions as other people have them: no sched_getaffinity, scripts, notebooks."""

import json
import subprocess
import sys
import types
from pathlib import Path

import forked_processes
import numpy as np
import pytest
import torch
from strangers import HoldsALock, Plain

from raysweep.cli import main
from raysweep.evaluation import ProcessPoolMap, evaluate

EPS = 0.06

SCRIPT = """
import torch
from raysweep import evaluate
from raysweep.evaluation import ProcessPoolMap

SCALE = 3.0

class Mine(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(64, 10)

    def forward(self, x):
        return scaled(self.layer(x.flatten(1)))

def scaled(logits):
    return SCALE * logits
"""
# No `if __name__ == "__main__"`: most scripts have none.
MAIN = """
torch.set_num_threads(1)
print("the script runs")
x, y = torch.rand(64, 1, 8, 8), torch.arange(64) % 10
with ProcessPoolMap(2) as processes:
    reports = [evaluate(Mine(), x, y, "apgd-ce", 0.01, map=m) for m in (processes, None)]
assert reports[0].robust.tolist() == reports[1].robust.tolist()
assert len(processes.__dict__) and reports[0].clean.any()
print("equal")
"""


def images() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, Plain().eval()(x).argmax(1)


@pytest.mark.slow
def test_a_model_of_a_script_is_attacked_in_processes(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SCRIPT + MAIN)
    done = subprocess.run(
        [sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["the script runs", "equal"], "it runs once"


def test_a_model_of_a_notebook_is_attacked_in_processes(monkeypatch) -> None:
    """A kernel's `__main__` has no file; its cells' classes are nowhere else."""
    forked_processes.replace_spawn(monkeypatch)
    kernel = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", kernel)
    exec(SCRIPT, kernel.__dict__)
    x, y = images()
    with ProcessPoolMap(2) as processes:
        found = evaluate(kernel.Mine(), x, y, "apgd-ce", EPS, map=processes, shards=2)
        assert len(processes._pool._processes) == 2
    assert sys.modules["__main__"] is kernel
    expected = evaluate(kernel.Mine(), x, y, "apgd-ce", EPS)
    assert found.broken_by.tolist() == expected.broken_by.tolist()


def test_a_model_that_no_other_process_can_have_is_attacked_here(caplog) -> None:
    x, y = images()
    with ProcessPoolMap(2) as processes:
        found = evaluate(HoldsALock(), x, y, "apgd-ce", EPS, map=processes)
        assert processes._pool is None
    assert found.robust.tolist() == evaluate(Plain(), x, y, "apgd-ce", EPS).robust.tolist()
    (line,) = {record.message for record in caplog.records if "in this process" in record.message}
    assert "cannot pickle '_thread.lock' object" in line


@pytest.mark.mlflow
def test_a_whole_evaluation_where_python_has_no_affinity(workdir: Path, monkeypatch, capsys):
    """As on macOS and Windows."""
    forked_processes.replace_spawn(monkeypatch)
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")
    (workdir / "of_a_mac.py").write_text(SCRIPT.replace("from raysweep", "# from raysweep"))
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 1, 8, 8), dtype=np.uint8), np.arange(40) % 10
    np.savez(workdir / "test.npz", x=x, y=y)
    data = ["--set", "data.name=arrays", "--data-dir", str(workdir)]
    attack = ["--attack", "apgd-ce", "--eps", "0.02", "--json"]
    assert main(["eval", "of_a_mac:Mine", *data, *attack]) == 0
    report = json.loads(capsys.readouterr().out)
    from of_a_mac import Mine

    expected = evaluate(Mine(), x, y, "apgd-ce", 0.02)
    assert report["robust_accuracy"] == expected.robust_accuracy
