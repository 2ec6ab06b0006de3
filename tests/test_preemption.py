"""SIGTERM in mid-epoch: everything is kept at once, and the run that goes on ends with the same
bits.
"""

import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import TINY, tiny
from process_tree import find_descendants

from raysweep.cli import main
from raysweep.logs import read_log
from raysweep.stores import open_path
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace
from raysweep.training import trainer
from raysweep.training.callbacks import FunctionCallback
from raysweep.training.checkpoint import OPTIMIZER_FILE, WEIGHTS_FILE, RunDirectory
from raysweep.training.config import build_training_config
from raysweep.training.diagnostics import read_histograms
from raysweep.training.mid_epoch_checkpoint import TrainingInterrupted, catch_termination_signals
from raysweep.training.trainer import compute_step_gradients, train_model


def same_run(one: Path, other: Path) -> None:
    """Weights, momentum, metrics and histograms, bit for bit; times aside."""
    a, b = RunDirectory(one).read_last_checkpoint(), RunDirectory(other).read_last_checkpoint()
    assert a is not None and b is not None and a.epoch == b.epoch
    for name in (WEIGHTS_FILE, OPTIMIZER_FILE):
        assert a.meta["sha256"][name] == b.meta["sha256"][name]
    rows = [
        [{k: v for k, v in row.items() if "seconds" not in k} for row in saved.history]
        for saved in (a, b)
    ]
    assert rows[0] == rows[1]
    assert read_histograms(open_path(one)) == read_histograms(open_path(other))


@pytest.mark.parametrize("method", ["gairat", "lrat", "fat"])
def test_left_at_any_step_it_ends_with_the_same_bits(method: str, tmp_path: Path, digits) -> None:
    config = tiny(method, epochs=3, batch_size=10)
    train_model(config, tmp_path / "whole", data=digits)
    countdown = 0

    def is_interrupted() -> bool:
        nonlocal countdown
        countdown -= 1
        return countdown == 0

    for steps in (3, 4, 7):
        countdown = steps
        with pytest.raises(TrainingInterrupted, match="all progress is saved"):
            train_model(
                config,
                tmp_path / "left",
                FunctionCallback(should_interrupt=is_interrupted),
                data=digits,
            )
        assert (tmp_path / "left" / "half").is_dir()
    seen = []
    train_model(
        config,
        tmp_path / "left",
        FunctionCallback(lambda row, saved: seen.append(row["epoch"])),
        data=digits,
    )
    assert seen == [1, 2, 3] or seen == [2, 3], "14 of 21 steps were done before"
    same_run(tmp_path / "whole", tmp_path / "left")
    assert not (tmp_path / "left" / "half").exists()


def test_a_half_of_something_else_is_left_alone(tmp_path: Path, digits) -> None:
    config = tiny("at", batch_size=10)
    with pytest.raises(TrainingInterrupted):
        train_model(
            config, tmp_path / "run", FunctionCallback(should_interrupt=lambda: True), data=digits
        )
    other = tiny("at", batch_size=10, optim__lr=0.05)
    train_model(other, tmp_path / "run", data=digits)
    train_model(other, tmp_path / "whole", data=digits)
    same_run(tmp_path / "whole", tmp_path / "run")
    with pytest.raises(TrainingInterrupted):
        train_model(
            config,
            tmp_path / "damaged",
            FunctionCallback(should_interrupt=lambda: True),
            data=digits,
        )
    (tmp_path / "damaged" / "half" / WEIGHTS_FILE).write_bytes(b"half")
    train_model(config, tmp_path / "damaged", data=digits)
    train_model(config, tmp_path / "fresh", data=digits)
    same_run(tmp_path / "fresh", tmp_path / "damaged")


OF_25_STEPS = {
    "epochs": 1,
    "data.train_size": 200,
    "data.val_size": 50,
    "batch_size": 8,
    "*.attacks.*.steps": 3,
    "validation.finish.*.steps": 3,
    "validation.finish.*.runs": 1,
}


@pytest.fixture(scope="module")
def run_of_25_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_model(build_training_config("gairat", OF_25_STEPS), folder)
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.mlflow
def test_a_signal_to_a_training_run(
    number: signal.Signals, run_of_25_steps: Path, workdir: Path, capsys
) -> None:
    """The signal comes at the tenth of the 25 steps of an epoch."""
    flags = [part for path, value in OF_25_STEPS.items() for part in ("--set", f"{path}={value}")]
    command = ["train", "gairat", *flags, "--name", "r", "--json"]

    steps: list[int] = []

    def step_and_signal(*arguments: Any, **options: Any) -> Any:
        steps.append(len(steps))
        if len(steps) == 10:
            signal.raise_signal(number)
        return compute_step_gradients(*arguments, **options)

    # Under nohup SIGHUP is ignored, and then it is no reason to end.
    handler = signal.signal(number, signal.SIG_DFL) if number == signal.SIGHUP else None
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "compute_step_gradients", step_and_signal)
            assert main(command) == 130
    finally:
        if handler is not None:
            signal.signal(number, handler)
    assert "raysweep: interrupted in epoch 1 after 10 steps" in capsys.readouterr().err
    assert statuses(workdir) == ["KILLED"]
    assert (workdir / "runs/r/half").is_dir() and not list(workdir.glob("runs/r/epoch-*"))
    assert main(command) == 0
    assert statuses(workdir) == ["FINISHED"]
    same_run(run_of_25_steps, workdir / "runs/r")


def statuses(folder: Path) -> list[str]:
    """Of all runs in MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return [
        run.info.status
        for run in client.search_runs([client.get_experiment_by_name("raysweep").experiment_id])
    ]


def test_who_cannot_wait_says_ctrl_c_twice() -> None:
    # Shells start what runs in the background with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with catch_termination_signals() as told:
        assert not told()
        # To this very thread: to the process, another thread may take it, and later.
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert told()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.mlflow
def test_a_training_run_that_fails_is_closed_and_says_where_to_look(
    workdir: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("raysweep.training.trainer.compute_step_gradients", fail)
    command = [
        "train",
        "at",
        "--set",
        "epochs=1",
        "--set",
        "data.train_size=64",
        "--set",
        "data.val_size=50",
        "--set",
        "optim.lr=0.1",
    ]
    assert main([*command, "--name", "r"]) == 1
    first, last = capsys.readouterr().err.strip().splitlines()
    assert first == f"at on digits: 1 epoch of 1 step, in {workdir}/runs/r"
    file = workdir / "runs" / "r" / "error.txt"
    assert last.startswith("raysweep: training failed: ") and last.endswith(
        f"; its traceback is in {file}"
    )
    assert "no such kernel" in last and "in train_model" in file.read_text()
    assert statuses(workdir) == ["FAILED"]


@pytest.mark.ray
@pytest.mark.slow
def test_sigterm_to_a_trial_costs_it_nothing(ray_cluster, tmp_path: Path) -> None:
    from raysweep.sweep.tuner import run_sweep

    alpha = "method.terms.pgd.weight.alpha"
    base = {**TINY, "epochs": 2, "data.train_size": 400, "batch_size": 8, "*.attacks.*.steps": 3}
    settings = SearchSpace.from_data(
        {
            "method": "lrat",
            "trials": 1,
            "base": base,
            "share_prefixes": False,
            "scheduler": {"kind": "none"},
            "space": {alpha: {"float": [0.5, 4.0]}},
            "start": [{alpha: 2.0}],
        }
    )
    ledger = Ledger.create(tmp_path / "sweep", settings)
    ended: list[int] = []
    kept: list[Path] = []

    def processor_seconds(processes: list[psutil.Process]) -> float:
        return sum(process.cpu_times().user for process in processes)

    def take_the_machine_away() -> None:
        while not (tmp_path / "sweep/trials/0000/epoch-0001").exists():
            time.sleep(0.05)
        # Amid the second epoch, or between its end and the next report: either way the trial ends
        # as if left alone.
        processes = find_descendants("ray::ImplicitFu")
        began = processor_seconds(processes)
        while processor_seconds(processes) < began + 0.1:
            time.sleep(0.01)
        for process in processes:
            process.terminate()
            ended.append(process.pid)
        deadline = time.monotonic() + 600
        while not kept and time.monotonic() < deadline:
            time.sleep(0.01)
            kept.extend((tmp_path / "sweep/trials/0000").glob("half"))

    threading.Thread(target=take_the_machine_away, daemon=True).start()
    run_sweep(ledger, [])
    (trial,) = ledger.load_trials()
    assert ended and kept, "its epoch was kept at once"
    assert trial.state == "finished" and trial.reason == ""
    assert [epoch for epoch, _ in trial.curve] == [1, 2]
    config = ledger.space.trial_config(trial.params)
    train_model(config, tmp_path / "whole")
    same_run(tmp_path / "whole", ledger.trial_path(0))
    messages = [entry["message"] for entry in read_log(ledger.trial_path(0))]
    assert "received SIGTERM" in messages
    (saved,) = (m for m in messages if m.startswith("interrupted in epoch "))
    (resumed,) = (m for m in messages if m.startswith("resuming within epoch "))
    step = re.findall(r"step (\d+)", saved)
    assert step == re.findall(r"step (\d+)", resumed) and int(step[0]) > 0
    assert sum(m.startswith("this process begins trial 0000") for m in messages) == 2
