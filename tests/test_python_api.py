"""`raysweep.tune`, `train` and `run`: what they do is what the commands of their names do."""

import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ONE_RUN, TINY, count_reported_epochs

import raysweep
from raysweep.cli import main
from raysweep.errors import SpecError, WorkInterrupted
from raysweep.spec import JsonDict
from raysweep.sweep.ledger import Ledger

SETTINGS: dict[str, Any] = {**TINY, **ONE_RUN, "finalists": 0, "base_runs": 0}


def set_flags(settings: dict[str, Any]) -> list[str]:
    """What the command line is given for the same settings."""
    return [word for path, value in settings.items() for word in ("--set", f"{path}={value}")]


def make_images(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8), np.arange(n) % 4


def nest(depth: int) -> list[Any]:
    return [nest(depth - 1)] if depth else []


def read_results(ledger: Ledger) -> list[JsonDict]:
    """What must be equal in equal sweeps: everything but times."""
    names = ("params", "state", "epoch", "clean", "pgd", "robust_worst", "train/loss")
    rows = [{**vars(trial), **trial.best} for trial in ledger.load_trials()]
    return [{name: row[name] for name in names} for row in rows]


def test_the_package_imports_nothing_heavy_until_a_name_is_used() -> None:
    code = (
        "import sys, raysweep\n"
        "assert {'tune', 'train', 'run', 'compare', 'Sweep'} <= set(dir(raysweep))\n"
        "error = raysweep.RaysweepError('x')\n"
        "heavy = {'torch', 'ray', 'mlflow', 'optuna', 'pydantic', 'rich', 'numpy', 'pandas'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.mlflow
def test_arrays_train_as_a_folder_with_them_does(workdir: Path, capsys) -> None:
    (x, y), test = make_images(120, 0), make_images(40, 1)
    settings = {**TINY, **ONE_RUN, "epochs": np.int64(1), np.str_("optim.lr"): np.float64(0.05)}
    settings["optim.momentum"] = np.longdouble(0.9)
    run = raysweep.train(
        "at",
        data={"train": (torch.from_numpy(x), y.tolist()), "test": test},
        settings=settings,
        name="arrays",
    )
    assert run.state == "finished" and run.n_epochs == 1 and run.checkpoint is not None
    assert "<TrainingRun arrays: finished after 1 epoch, best epoch 1 with" in repr(run)
    (folder,) = (workdir / "runs" / ".arrays").iterdir()
    written_at = (folder / "train.npz").stat().st_mtime_ns
    Path("mine").mkdir()
    for name, (images, labels) in {"train": (x, y), "test": test}.items():
        np.savez(Path("mine") / f"{name}.npz", x=images, y=labels)
    arguments = [
        "--data-dir",
        "mine",
        "--name",
        "folder",
        *set_flags({**settings, "epochs": 1, "optim.lr": 0.05}),
    ]
    assert main(["train", "at", *arguments]) == 0
    weights = [
        (workdir / "runs" / name / "epoch-0001" / "weights.safetensors").read_bytes()
        for name in ("arrays", "folder")
    ]
    assert weights[0] == weights[1]
    capsys.readouterr()
    again = raysweep.train("at", data=((x, y), test), settings=settings, name="arrays")
    assert again.best == run.best and (folder / "train.npz").stat().st_mtime_ns == written_at
    model = raysweep.load(again.path.local_path)
    assert model(torch.from_numpy(test[0][:3]) / 255).shape == (3, 4)


@pytest.mark.mlflow
def test_images_without_a_test_set_train_and_are_not_evaluated(workdir: Path, capsys) -> None:
    x, y = make_images(120, 0)
    settings = {**TINY, **ONE_RUN, "epochs": 1}
    run = raysweep.train("at", data=(x, y), settings=settings, name="r")
    assert run.state == "finished" and run.best["clean"] >= 0
    again = raysweep.train("at", data={"train": (x, y)}, settings=settings, name="r")
    assert again.best == run.best, "the same images"
    assert main(["eval", "r"]) == 2
    assert "has no test images to evaluate on: put test.npz" in capsys.readouterr().err
    (image_folder,) = (workdir / "runs" / ".arrays").iterdir()
    assert main(["train", "at", "--data-dir", str(image_folder), "--plan"]) == 0
    assert "none for test" in capsys.readouterr().out
    Path("p.yaml").write_text(
        "stages: [{kind: train, runs: {AT: {method: at}}}, {kind: autoattack, n: 4}]"
    )
    with pytest.raises(SpecError, match="has no test images"):
        raysweep.run("p.yaml", data=(x, y), settings=TINY)
    assert not list(workdir.glob("runs/pipelines/*/0*")), "nothing was started"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"trials": 0}, "trials = 0: is not a whole number of at least 1"),
        ({"trials": True}, "trials = True: is not a whole number"),
        ({"trials": np.int64(0)}, "trials = 0: is not a whole number of at least 1"),
        ({"trials": np.float64(2)}, "trials = 2.0: is not a whole number"),
        ({"max_seconds": torch.tensor(0)}, "max_seconds = 0: is not a number above 0"),
        ({"retry_failed": np.bool_(True)}, "--retry-failed: names no sweep"),
        ({"workers": 1.5}, "workers = 1.5: is not a whole number"),
        ({"max_seconds": 0}, "max_seconds = 0: is not a number above 0"),
        ({"max_gpu_hours": float("nan")}, "max_gpu_hours = nan: is not a number of at least 0"),
        ({"settings": {"epochs": "x"}}, "epochs = 'x'"),
        ({"settings": {"epochs": np.clongdouble(1)}}, "epochs = np.clongdouble('1+0j'): expected"),
        ({"settings": {3: 1}}, "3: expected the name of a setting"),
        ({"resume": "no"}, "no sweep in"),
        ({"retry_failed": True}, "--retry-failed: names no sweep"),
        ({"data": "digitz"}, "data: no data set 'digitz'; nearest: digits, and there is no such"),
        ({"data": make_images(8, 0)[0]}, "data: is not a pair; expected"),
        ({"data": {"test": make_images(8, 0)}}, "data: has 'test'; expected"),
        ({"data": {"train": 3, "test": 4}}, "data['train']: is not a pair (x, y) of arrays"),
        # Not two pairs, so it is taken for one.
        ({"data": (make_images(8, 0), 3)}, "data['train']: is not a pair (x, y) of arrays"),
        (
            {"data": {"train": (np.zeros((4, 8, 8)), [0] * 4), "test": make_images(8, 0)}},
            "data['train']: x must be uint8 of shape (N, C, H, W), got float64 of shape (4, 8, 8)",
        ),
        ({"code": print}, "code = print: has no file"),
        ({"code": 3}, "code = 3: is not a file or a function"),
        ({"method": ["at"]}, "method = ['at']: is not a name or a file"),
        ({"settings": "epochs=3"}, "settings = 'epochs=3': is not a mapping {dotted path: value}"),
        ({"settings": []}, "settings = []: is not a mapping"),
        ({"settings": {"epochs": print}}, "epochs = <built-in function print>: expected a number"),
        ({"settings": {"epochs": {1, 2}}}, "epochs = {1, 2}: expected a number, a text, a path"),
        ({"settings": {"epochs": np.zeros(2)}}, "epochs = [0.0, 0.0]"),
        ({"settings": {"epochs": "\udc80"}}, "epochs = '\\udc80': is not UTF-8"),
        ({"settings": {"epochs": nest(200)}}, "epochs: has more than 100 lists and mappings"),
        ({"name": 3}, "name = 3: is not a text"),
        ({"name": "g1", "resume": "g1"}, "name: has no effect with resume"),
        ({"resume": Path("g1")}, "resume = PosixPath('g1'): is not a text"),
        ({"retry_failed": "no"}, "retry_failed = 'no': is not True or False"),
        ({"warm_start": "g1"}, "warm_start = 'g1': is not a list of names"),
        ({"warm_start": [1]}, "warm_start = 1: is not a text"),
        ({"workers": None}, "workers = None: is not a whole number"),
        ({"cpus_per_trial": None}, "cpus_per_trial = None: is not a number"),
        ({"out": None}, "out = None: is not a path"),
        ({"out": "a\0b"}, "'a\\x00b': a path cannot have the character \\0"),
        ({"space": 3}, "space = 3: is not a path"),
        ({"address": 6379}, "address = 6379: is not a text"),
        ({"data": 3}, "data: is not a pair; expected"),
        ({"data": "x" * 300}, "is too long for a path"),
        (
            {"data": {"train": (torch.zeros(2, requires_grad=True), [0, 1]), "test": (1, 2)}},
            "data['train']: is not a pair (x, y) of arrays: Can't call numpy()",
        ),
    ],
)
def test_a_wrong_request_is_an_error_of_one_line_and_starts_nothing(
    arguments: dict[str, Any], line: str, workdir: Path
) -> None:
    with pytest.raises(raysweep.RaysweepError) as caught:
        raysweep.tune(**{"method": "at", **arguments})
    assert isinstance(caught.value, SpecError)
    (problem,) = caught.value.problems
    assert line in problem
    assert not list(workdir.rglob("sweep.json"))


@pytest.mark.mlflow
def test_a_second_call_at_once_is_refused_and_leaves_the_process_as_it_was(workdir: Path) -> None:
    """The umask and the function that shows warnings belong to the whole process."""

    def get_process_state() -> tuple[int, object]:
        umask = os.umask(0o22)
        os.umask(umask)
        return umask, warnings.showwarning

    (x, y), test = make_images(120, 0), make_images(40, 1)

    class HeldImages:
        """Images that the first call asks for, and gets when the second one has been refused."""

        def __array__(self, *_: object, **__: object) -> np.ndarray:
            is_running.set()
            is_refused.wait()
            return x

    is_running, is_refused = threading.Event(), threading.Event()
    before = get_process_state()
    settings = {**TINY, **ONE_RUN, "epochs": 1}
    data = {"train": (HeldImages(), y), "test": test}
    first = threading.Thread(
        target=lambda: raysweep.train("at", name="first", settings=settings, data=data), daemon=True
    )
    first.start()
    is_running.wait()
    try:
        with pytest.raises(SpecError, match=r"raysweep\.train: this process runs another call of"):
            raysweep.train("at", name="second", settings=settings)
    finally:
        is_refused.set()
        first.join()
    assert get_process_state() == before and not (workdir / "runs" / "second").exists()
    data = {"train": (x, y), "test": test}
    assert raysweep.train("at", name="first", settings=settings, data=data).n_epochs == 1


@pytest.mark.ray
@pytest.mark.mlflow
def test_a_sweep_of_a_thread_equals_that_of_the_command_line(ray_cluster, workdir: Path) -> None:
    """Only the main thread may set signal handlers: a sweep of another one runs without."""
    found: list[raysweep.Sweep] = []
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def work() -> None:
        found.append(raysweep.tune("at", trials=2, name="python", settings=SETTINGS))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (sweep,) = found
    assert sweep.state == "finished" and list(sweep.trials["state"]) == ["finished"] * 2
    assert repr(sweep).startswith("<Sweep python: 2 of 2 trials ended, best trial 000")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    arguments = ["--trials", "2", "--name", "shell", *set_flags(SETTINGS)]
    assert main(["tune", "at", *arguments]) == 0
    shell = Ledger.open(workdir / "runs" / "shell")
    assert read_results(sweep.ledger) == read_results(shell)
    log = (workdir / "runs" / "python" / "log.jsonl").read_text().splitlines()
    start = next(entry for entry in map(json.loads, log) if entry.get("event") == "start")
    assert "raysweep.tune(method='at', trials=2" in start["message"]


@pytest.mark.ray
@pytest.mark.mlflow
def test_an_interrupted_sweep_is_an_error_and_resumes(ray_cluster, workdir: Path) -> None:
    def interrupt_after_an_epoch() -> None:
        while not count_reported_epochs(workdir / "runs" / "g1"):
            is_over.wait(0.02)
        signal.raise_signal(signal.SIGINT)

    is_over = threading.Event()
    thread = threading.Thread(target=interrupt_after_an_epoch)
    thread.start()
    settings = {**SETTINGS, "epochs": 10, "scheduler.kind": "none"}
    with pytest.raises(WorkInterrupted, match=r"of 2 trials done; resume .*tune\(resume='g1'"):
        raysweep.tune("at", trials=2, name="g1", settings=settings)
    thread.join()
    sweep = raysweep.load_sweep("g1")
    assert sweep.state == "interrupted" and len(sweep.epochs)
    assert raysweep.tune(resume="g1").state == "finished"
    assert list(sweep.trials["epochs"]) == [10, 10]


@pytest.mark.ray
@pytest.mark.mlflow
@pytest.mark.usefixtures("undrawn_figures")
def test_a_pipeline_returns_its_stages_and_results(ray_cluster, one_core, workdir: Path) -> None:
    stages = """\
stages:
  - {kind: train, runs: {AT: {method: at}}, seeds: [0]}
  - {kind: autoattack, attacks: {PGD: pgd20}, n: 20}
  - {kind: report}
"""
    Path("small.yaml").write_text(stages)
    settings = {**TINY, **ONE_RUN, "epochs": 1, "*.eps": 0.02}
    result = raysweep.run("small.yaml", settings=settings)
    assert [stage.kind for stage in result.stages] == ["train", "autoattack", "report"]
    assert result.report is not None and result.report.is_file() and result.regressions == ()
    (row,) = result.evaluations.to_dict("records")
    assert row["attack"] == "PGD" and row["examples"] == 20
    # An independent evaluation of the same checkpoint on the same examples.
    from raysweep.data import DataSpec, load_data

    test = load_data(DataSpec(name="digits")).test
    model = raysweep.load(row["checkpoint"])
    predicted = model(test.get_float_images(slice(0, len(test)))).argmax(1)
    assert 0 <= row["robust"] <= row["clean"] <= 1
    assert abs(row["clean"] - (predicted == test.y).float().mean().item()) < 0.35
    again = raysweep.run("small.yaml", settings=settings)
    assert all(stage.was_done_before for stage in again.stages)
    assert again.evaluations.equals(result.evaluations)
