"""A sweep survives its driver's death: nothing lost, nothing run twice, MLflow with one run a trial
and none open.
"""

import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import forked_processes
import pytest
import ray
from conftest import count_reported_epochs
from forked_processes import ForkedProcess
from moto.server import ThreadedMotoServer

from raysweep import leases
from raysweep.bucket_lease import LeaseTimes
from raysweep.cli import main
from raysweep.logs import read_log
from raysweep.stores import open_path
from raysweep.sweep.ledger import Ledger

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SETTINGS = (
    "epochs=6",
    "data.train_size=320",
    "data.val_size=50",
    "*.attacks.*.steps=3",
    "validation.finish.*.steps=2",
    "validation.finish.*.runs=1",
    "finalists=0",
    "base_runs=0",
)
SMALL = [part for setting in SETTINGS for part in ("--set", setting)]


@pytest.fixture
def tune(ray_cluster, empty_store, workdir: Path, monkeypatch: pytest.MonkeyPatch):
    """Function that starts `raysweep tune gairat ...` in a process, on the running cluster."""
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    empty_store(workdir / "mlflow.db")
    started = []

    def start(*arguments: str) -> ForkedProcess:
        started.append(forked_processes.start_command(["tune", "gairat", *arguments], workdir))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def has_ended_trial(sweep: Path) -> bool:
    return any(
        json.loads(file.read_text())["state"] != "running"
        for file in sweep.glob("trials/*/trial.json")
    )


def wait_until(condition: Callable[[], bool], process: ForkedProcess) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_epochs(sweep: Path, count: int, process: ForkedProcess) -> None:
    wait_until(lambda: count_reported_epochs(sweep) >= count, process)


def test_kill_9_ctrl_c_a_sigterm_and_a_budget_in_the_life_of_one_sweep(
    tune, workdir: Path, capsys
) -> None:
    sweep = workdir / "runs" / "s"
    first = tune(*SMALL, "--trials", "5", "--name", "s")
    wait_for_epochs(sweep, 5, first)
    wait_until(lambda: has_ended_trial(sweep), first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    killed = {trial.number: trial for trial in Ledger.open(sweep).load_trials()}
    assert {trial.state for trial in killed.values()} > {"running"}, (
        "some have ended, some have not"
    )

    for end in (signal.SIGINT, signal.SIGTERM):
        before = count_reported_epochs(sweep)
        again = tune("--resume", "s", "--max-time", "1h")
        wait_for_epochs(sweep, before + 1, again)
        again.send_signal(end)
        assert again.wait() == 130, "Ctrl-C is not the budget's end"
        assert "raysweep tune --resume s" in again.err
        assert "Traceback" not in again.err and "SIGTERM received" not in again.err

    assert main(["tune", "gairat", "--resume", "s", "--max-time", "0.1s"]) == 0
    assert "resume with" in capsys.readouterr().err
    stopped = Ledger.open(sweep).load_trials()
    assert sum(trial.state != "running" for trial in stopped) < 5

    assert main(["tune", "gairat", "--resume", "s", "--json"]) == 0
    trials = Ledger.open(sweep).load_trials()
    assert [trial.number for trial in trials] == [0, 1, 2, 3, 4]
    assert all(trial.state in ("finished", "stopped") for trial in trials)
    for trial in [*killed.values(), *stopped]:
        assert trials[trial.number].params == trial.params, "its own settings, under its own number"
        if trial.state != "running":
            assert trials[trial.number] == trial, "what had ended is left alone"
    for trial in trials:
        epochs = [epoch for epoch, _ in trial.curve]
        assert epochs == sorted(set(epochs)), "no epoch is counted twice"
    check_mlflow(workdir, 5)
    check_log(sweep)


def check_log(sweep: Path) -> None:
    """One start for each driver; the exit code of all but the one that was killed."""
    driver = read_log(sweep, with_trials=False)
    starts = [entry for entry in driver if entry.get("event") == "start"]
    assert len(starts) == 5 and all("torch" in entry["versions"] for entry in starts)
    assert [entry["exit_code"] for entry in driver if entry.get("event") == "end"] == [
        130, 130, 0, 0
    ]  # fmt: skip
    ends = [entry["reason"] for entry in driver if entry.get("event") == "sweep_end"]
    assert ends == ["interrupted", "interrupted", "budget", "done"]
    assert sum(entry["message"].startswith("received SIGTERM") for entry in driver) == 1
    found = [entry["states"] for entry in driver if entry.get("event") == "sweep_start"]
    assert found[0] == {} and all(states["running"] for states in found[1:])
    trials = [entry for entry in read_log(sweep) if entry["writer"] == "trial"]
    assert {entry["trial"] for entry in trials} == {0, 1, 2, 3, 4}
    assert any(entry["message"].startswith("resuming after epoch ") for entry in trials)
    assert any(entry.get("event") == "prefix_reused" for entry in trials)


def check_mlflow(workdir: Path, trials: int) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{workdir}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("raysweep").experiment_id])
    assert sorted(run.info.run_name for run in runs) == [
        *(f"{number:04d} s" for number in range(trials)),
        "s",
    ]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.tags.get("state") for run in runs if " " in run.info.run_name} <= {
        "finished",
        "stopped",
    }


def test_ctrl_c_in_a_pipeline_is_no_budgets_end(
    ray_cluster, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    Path("p.yaml").write_text("stages: [{kind: tune, space: at, trials: 4, max_hours: 1}]")

    def ctrl_c() -> None:
        while not list(workdir.glob("runs/*/trials/*/epoch-0001")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=ctrl_c, daemon=True).start()
    assert main(["run", "p.yaml", *SMALL]) == 130
    assert capsys.readouterr().err.endswith(
        "raysweep: interrupted; run the same command to resume\n"
    )
    assert not list(workdir.glob("runs/pipelines/p/*-tune-*")), (
        "it goes on where it was, not to the next stage"
    )


@pytest.fixture
def bucket() -> Iterator[str]:
    """URI of a folder in a bucket."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host = "{}:{}".format(*server.get_host_and_port())
    urlopen(Request(f"http://{host}/bucket", method="PUT")).read()
    yield f"s3://bucket/sweeps?endpoint_override={host}&scheme=http"
    server.stop()


def tune_with_short_leases(arguments: list[str]) -> int:
    """Run `raysweep tune gairat ARGUMENTS`; its leases expire after two seconds."""
    hold = functools.partial(leases.hold_folder_lease, times=LeaseTimes(0.2, 2.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leases, "hold_folder_lease", hold)
        return main(["tune", "gairat", *arguments])


def test_a_driver_that_was_paused_leaves_its_sweep_to_the_one_that_resumed_it(
    tune, empty_store, bucket: str, workdir: Path
) -> None:
    """The trials of the first hold the cluster until it wakes and ends. Each has an MLflow store of
    its own: the first may be paused while it has locked its.
    """

    def start(*arguments: str, store: str) -> ForkedProcess:
        command = [*arguments, "--storage", bucket]
        empty_store(workdir / store)
        return forked_processes.start_function(
            tune_with_short_leases,
            command,
            folder=workdir,
            environment={"MLFLOW_TRACKING_URI": f"sqlite:///{workdir / store}"},
            imports=forked_processes.COMMANDS,
        )

    sweep = open_path(bucket) / "s"

    def count_epochs() -> int:
        files = sweep.read_matching("trials/*/trial.json")
        return sum(json.loads(content)["epoch"] for content in files.values())

    def read_holder() -> int:
        files = sweep.read_matching(".claims/*.lease")
        return sum(json.loads(content or b'{"pid": 0}')["pid"] for content in files.values())

    few = [setting.replace("epochs=6", "epochs=3") for setting in SMALL]
    first = start(*few, "--trials", "3", "--name", "s", store="first.db")
    wait_until(lambda: count_epochs() >= 2, first)
    first.send_signal(signal.SIGSTOP)
    second = start("--resume", "s", store="mlflow.db")
    wait_until(lambda: read_holder() == second.pid, second)
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 1
    (line,) = [line for line in first.err.splitlines() if "was taken over by" in line]
    assert f"'s' was taken over by process {second.pid} on " in line
    assert "Traceback" not in first.err
    assert second.wait() == 0, second.err
    trials = Ledger.open(sweep).load_trials()
    assert [trial.number for trial in trials] == [0, 1, 2]
    for trial in trials:
        epochs = [epoch for epoch, _ in trial.curve]
        assert trial.state in ("finished", "stopped") and epochs == sorted(set(epochs))
    check_mlflow(workdir, 3)
