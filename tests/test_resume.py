"""A sweep survives its driver's death: nothing lost, nothing run twice, MLflow with one run a trial and none open."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from raysweep.sweep.ledger import Ledger

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SMALL = ["--set", "epochs=6", "--set", "data.val_size=100", "--set", "*.attacks.*.steps=3"]


@pytest.fixture(autouse=True)
def _on_the_sessions_cluster(ray_cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drivers are processes of their own; the cluster they use is already up."""
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)


def tune(workdir: Path, *arguments: str) -> subprocess.Popen:
    environment = dict(os.environ)
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "raysweep.cli", "tune", "gairat", *arguments]
    return subprocess.Popen(
        command, cwd=workdir, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def epochs_done(path: Path) -> int:
    return sum(json.loads(file.read_text())["epoch"] for file in path.glob("trials/*/trial.json"))


def test_kill_9_of_the_driver_in_mid_sweep(tmp_path: Path) -> None:
    sweep = tmp_path / "runs" / "s"
    process = tune(tmp_path, *SMALL, "--trials", "4", "--name", "s")
    deadline = time.monotonic() + 120
    while epochs_done(sweep) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {trial.number: trial for trial in Ledger.open(sweep).trials()}
    assert any(trial.state == "running" for trial in before.values())

    again = tune(tmp_path, "--resume", "s", "--json")
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    trials = Ledger.open(sweep).trials()
    assert [trial.number for trial in trials] == [0, 1, 2, 3]
    assert all(trial.state in ("finished", "stopped") for trial in trials)
    for number, trial in before.items():
        assert trials[number].settings == trial.settings, "its own settings, under its own number"
        if trial.state != "running":
            assert trials[number] == trial, "what had ended is left alone"
    for trial in trials:
        epochs = [epoch for epoch, _ in trial.curve]
        assert epochs == sorted(set(epochs)), "no epoch is counted twice"

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("raysweep").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["s", "s/0000", "s/0001", "s/0002", "s/0003"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.tags.get("state") for run in runs if "/" in run.info.run_name} <= {"finished", "stopped"}


def test_a_budget_ends_a_sweep_that_resume_goes_on_with(tmp_path: Path) -> None:
    process = tune(tmp_path, *SMALL, "--trials", "4", "--name", "s", "--max-time", "4s")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0 and "go on with" in err
    assert sum(trial.state != "running" for trial in Ledger.open(tmp_path / "runs" / "s").trials()) < 4
    again = tune(tmp_path, "--resume", "s")
    again.communicate(timeout=300)
    assert again.returncode == 0
    trials = Ledger.open(tmp_path / "runs" / "s").trials()
    assert len(trials) == 4 and all(trial.state in ("finished", "stopped") for trial in trials)


def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = tune(tmp_path, *SMALL, "--trials", "8", "--name", "s")
    while epochs_done(tmp_path / "runs" / "s") < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "raysweep tune gairat --resume s" in err
    assert "Traceback" not in err
