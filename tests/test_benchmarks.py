"""`python benchmarks` in its smallest form: that it runs and what it claims of results; nothing here is timed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import objective_cost  # noqa: E402
import training_step  # noqa: E402


@pytest.mark.parametrize("method", ["gairat", "lrat"])
def test_the_plain_step_is_written_from_the_papers_and_ours_computes_the_same(method) -> None:
    subject = training_step.prepared(method, 24, small=True)
    plain, ours = training_step.plain(subject, method == "gairat")(), training_step.ours(subject, {})()
    fast = training_step.ours(subject, {"channels_last": True, "fold": True})()
    assert len(plain.kappa.unique()) > 2
    for found in (ours, fast):
        assert torch.equal(plain.kappa.long(), found.kappa)
        assert found.loss == pytest.approx(plain.loss, rel=1e-4)
        assert (found.grad - plain.grad).norm() < 1e-2 * plain.grad.norm()


def test_the_step_and_the_objective_are_measured(capsys) -> None:
    ratios = training_step.run() + objective_cost.run()
    printed = capsys.readouterr().out
    assert [r.goal for r in ratios] == ["2 (float32)", "3.5 (bf16)"] * 2 + ["10%"]
    assert "| + folded batch norms (default) |" in printed and "GFLOP/s in float32" in printed


@pytest.mark.slow
@pytest.mark.parametrize("part", ["autoattack", "sweep", "scaling", "footprint"])
def test_one_command_prints_a_table_of_ratios(part) -> None:
    command = [sys.executable, "benchmarks", part]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *_, last = done.stdout.strip().split("\n\n")
    head, _, *rows = last.splitlines()
    assert head == "| what | measured | goal | n |" and len(rows) >= 2
