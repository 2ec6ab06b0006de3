"""`raysweep eval`: from a checkpoint to a report, files and MLflow."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from strangers import HoldsALock

import raysweep
from raysweep.attacks import build_named_attack
from raysweep.checkpoint_evaluation import (
    choose_evaluation_folder,
    describe_evaluation,
    evaluate_checkpoint,
    log_evaluation,
    save_evaluation_files,
)
from raysweep.cli import main
from raysweep.spec import SpecError
from raysweep.stores import open_path
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import load_space
from raysweep.sweep.trial import Trial
from raysweep.tracking import Tracker, checkpoint_run_tags, tracking_uri
from raysweep.training.checkpoint import RunDirectory
from raysweep.training.model_loading import load_checkpoint_target

SETTINGS = (
    "epochs=2",
    "data.train_size=200",
    "data.val_size=50",
    "*.attacks.*.steps=2",
    "validation.finish.*.steps=2",
    "validation.finish.*.runs=1",
)
SMALL = [part for setting in SETTINGS for part in ("--set", setting)]
QUICK = ["--attack", "apgd-ce", "--n", "40", "--json"]


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory) -> Path:
    """A working folder after `raysweep train`, with its MLflow store."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert main(["train", "at", *SMALL, "--name", "mine"]) == 0
    return folder


@pytest.fixture
def trained_run(trained_once: Path, workdir: Path) -> Path:
    """The run's folder in a copy that is the test's own."""
    shutil.copytree(trained_once, workdir, dirs_exist_ok=True)
    return workdir / "runs" / "mine"


@pytest.mark.mlflow
def test_the_objective_of_sweeps_by_name(trained_run: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    command = ["eval", "mine", "--attack", "objective", "--n", "10", "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["robust_after"]) == ["pgd", "cw", "multi_targeted"]
    assert report["examples"] == 10 and report["eps"] == 0.15


@pytest.mark.mlflow
def test_a_checkpoint_is_attacked_and_the_numbers_go_to_its_run(
    trained_run: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert main(["eval", str(trained_run), *QUICK, "--keep-adversarial"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["examples"] == 40 and report["eps"] == 0.15
    assert report["robust_accuracy"] < report["clean_accuracy"]
    folder = Path(report["folder"])
    table = pq.read_table(folder / "examples.parquet").to_pandas()
    assert (table.broken_by.isna().mean()) == pytest.approx(report["robust_accuracy"])
    saved = np.load(folder / "adversarial.npz")
    assert saved["x_adv"].shape == (40, 1, 8, 8)
    assert json.loads((folder / "card.json").read_text())["dataset"] == "digits"

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{trained_run.parent.parent}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("raysweep").experiment_id])
    assert (
        run.data.metrics["eval/apgd-ce-Linf-0.15-n40-balanced/robust_accuracy"]
        == report["robust_accuracy"]
    )
    assert not [name for name in run.data.metrics if name.startswith("aa/")], (
        "that is AutoAttack's alone"
    )
    assert run.info.status == "FINISHED"

    client.create_registered_model("robust")
    client.create_model_version("robust", f"{run.info.artifact_uri}/checkpoint", run.info.run_id)
    client.set_registered_model_alias("robust", "champion", "1")
    for what in (run.info.run_id, "models:/robust@champion", "models:/robust/1"):
        assert main(["eval", what, *QUICK]) == 0, what
        assert json.loads(capsys.readouterr().out)["robust_accuracy"] == report["robust_accuracy"]
        assert main(["show", what, "--json"]) == 0, what
        shown = json.loads(capsys.readouterr().out)
        assert (
            shown["mlflow_run"] == run.info.run_id and shown["config"]["data"]["name"] == "digits"
        )
        history = RunDirectory(trained_run).read_history()
        assert shown["metrics"]["clean"] == history[shown["epoch"] - 1]["clean"]
    assert main(["show", "models:/robust"]) == 0
    assert f"  clean = {shown['metrics']['clean']:.4f}\n" in capsys.readouterr().out


def test_a_finished_evaluation_is_not_run_again(trained_run: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert main(["eval", str(trained_run), *QUICK]) == 0
    first = json.loads(capsys.readouterr().out)

    def refuse(*args, **kwargs):
        raise AssertionError("an attack ran again")

    monkeypatch.setattr("raysweep.attacks.apgd.APGD.__call__", refuse)
    assert main(["eval", str(trained_run), *QUICK]) == 0
    assert json.loads(capsys.readouterr().out)["robust_accuracy"] == first["robust_accuracy"]


@pytest.mark.mlflow
def test_neither_seeds_nor_versions_overwrite_each_other(
    trained_run: Path, workdir: Path, monkeypatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    tracker, subject = (
        Tracker(tracking_uri(workdir), workdir / "mlruns"),
        load_checkpoint_target(trained_run, {}),
    )
    assert subject.checkpoint and subject.data and subject.config
    run, attack, folders = (
        tracker.find_run(checkpoint_run_tags(subject.checkpoint)),
        build_named_attack("pgd20", 0.15),
        set(),
    )
    for seed in (0, 1):
        folder = choose_evaluation_folder(workdir, subject, attack, subject.config.data, 4, seed)
        report = evaluate_checkpoint(subject, subject.data, attack, 4, folder, None, seed=seed)
        save_evaluation_files(report, folder, subject, subject.config.data)
        record = describe_evaluation(subject, report, "pgd20", False)
        assert log_evaluation(tracker, record, folder) == run, "found by the checkpoint"
        folders.add(folder)
    assert len(folders) == 2
    assert main(["eval", str(trained_run), "--version", "rand", "--n", "1"]) == 0

    from mlflow import MlflowClient

    assert run is not None
    logged = MlflowClient(f"sqlite:///{workdir}/mlflow.db").get_run(run).data.metrics
    names = {name.split("/")[1] for name in logged if name.startswith("eval/")}
    assert names == {
        "pgd20-Linf-0.15-n4",
        "pgd20-Linf-0.15-n4-seed1",
        "autoattack-rand-Linf-0.15-n1-balanced",
    }


@pytest.mark.mlflow
def test_sync_writes_the_evaluation_that_a_killed_command_left_out(
    trained_run: Path, workdir: Path, monkeypatch, capsys
) -> None:
    from mlflow import MlflowClient

    from raysweep.commands.doctor import DoctorRequest, _diagnose_unrecorded_work
    from raysweep.unrecorded_folders import UNRECORDED_FILE

    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    written = []

    def kill(tracker, record, folder) -> None:
        written.append(folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("raysweep.record_queue.RecordQueue.write", lambda self, record: record())
        patched.setattr("raysweep.checkpoint_evaluation.log_evaluation", kill)
        assert main(["eval", str(trained_run), "--attack", "pgd20", "--n", "4"]) == 130
    ((folder,), name) = (written, trained_run.name)
    assert (folder / UNRECORDED_FILE).is_file()
    request = DoctorRequest(None, {}, Path(), None, False)
    (finding,) = _diagnose_unrecorded_work(request, open_path(workdir / "runs"))
    assert (
        not finding.ok
        and finding.text == (f"lacks records of evaluation {name}/{folder.name}")
        and finding.remedy == "raysweep sync"
    )
    capsys.readouterr()
    assert main(["sync", name]) == 0
    assert capsys.readouterr().out == f"MLflow has all records of evaluation {name}/{folder.name}\n"
    client = MlflowClient(f"sqlite:///{workdir}/mlflow.db")
    tags = checkpoint_run_tags(load_checkpoint_target(trained_run, {}).checkpoint)
    (run,) = client.search_runs(
        [client.get_experiment_by_name("raysweep").experiment_id],
        f"tags.`raysweep.run` = '{tags['raysweep.run']}'",
    )
    rows = pq.read_table(folder / "examples.parquet").to_pandas()
    found = run.data.metrics["eval/pgd20-Linf-0.15-n4-balanced/clean_accuracy"]
    assert found == (rows["broken_by"] != "clean").mean() == 0.25
    assert list(_diagnose_unrecorded_work(request, open_path(workdir / "runs"))) == []
    assert main(["sync", "nobody"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"no sweep, training run or pipeline 'nobody'; known: {name}")


@pytest.mark.ray
def test_over_a_ray_cluster_the_verdict_is_the_same(
    trained_run: Path, ray_cluster, capsys, monkeypatch
) -> None:
    from raysweep.evaluation import evaluate
    from raysweep.sweep.ray_map import RayMap

    subject = load_checkpoint_target(trained_run, {})
    from raysweep.data import load_data

    test = load_data(subject.config.data).test
    x, y = test.get_float_images(slice(0, 60)), test.y[:60]
    alone = evaluate(subject.model, x, y, "apgd-ce,square", 0.15, batch_size=60, shards=1)
    spread = evaluate(
        subject.model, x, y, "apgd-ce,square", 0.15, batch_size=20, shards=3, map=RayMap()
    )
    assert np.array_equal(alone.robust, spread.robust)


class CountsItsReading:
    """A function that writes a line whenever a process reads it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.file = state["file"]
        with self.file.open("a") as stream:
            stream.write(f"{os.getpid()}\n")

    def __call__(self, item: int) -> tuple[int, int]:
        return item, os.getpid()


@pytest.mark.ray
def test_a_worker_of_a_map_reads_the_model_once(ray_cluster, tmp_path: Path) -> None:
    from raysweep.sweep.ray_map import RayMap

    processes: dict[str, set[int]] = {}
    node = ray_cluster.add_node(num_cpus=1, num_gpus=2)
    for name in ("first", "second", "first on GPUs", "second on GPUs"):
        ray_map = RayMap(cpus=0.5, gpus=1 if "GPUs" in name else 0)
        results = list(ray_map(CountsItsReading(tmp_path / name), range(8)))
        assert sorted(item for item, _ in results) == list(range(8))
        readers = (tmp_path / name).read_text().split()
        assert len(readers) == len(set(readers)) < 8
        processes[name] = {process for _, process in results}
        assert {int(reader) for reader in readers} == processes[name]
    on_gpus = processes["first on GPUs"]
    assert on_gpus.isdisjoint(processes["first"] | processes["second on GPUs"]), (
        "a process that has used a GPU gets no other one"
    )
    ray_cluster.remove_node(node)


LAYERS = """
import torch

SLOPE = 2.0

def soften(x):
    return torch.nn.functional.softplus(SLOPE * x)
"""
OWN_MODEL = """
import torch
from layers_of_one_node import soften

class Mine(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(64, 32), torch.nn.Linear(32, 10)

    def forward(self, x):
        return 4 * self.second(soften(self.first(x.flatten(1))))

def make():
    return Mine()
"""


@pytest.mark.ray
def test_code_of_a_model_travels_to_nodes_that_do_not_have_it(
    workdir: Path, ray_cluster, capsys, monkeypatch
) -> None:
    """Two nodes, and the files are gone once this process has imported them."""
    files = {"layers_of_one_node.py": LAYERS, "model_of_one_node.py": OWN_MODEL}
    for name, text in files.items():
        (workdir / name).write_text(text)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(workdir)
    from model_of_one_node import Mine

    for name in files:
        (workdir / name).unlink()
    x = np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), dtype=np.uint8)
    y = Mine()(torch.from_numpy(x) / 255).argmax(1).numpy()
    np.savez(workdir / "test.npz", x=x, y=y)
    node = ray_cluster.add_node(num_cpus=1)
    try:
        data = ["--set", "data.name=arrays", "--data-dir", str(workdir), "--eps", "0.02", "--json"]
        where = ["--address", ray_cluster.address, "--gpus-per-task", "0", "--batch-size", "20"]
        command = ["eval", "model_of_one_node:make", *data, *where, "--attack", "apgd-ce"]
        assert main(command) == 0
        report = json.loads(capsys.readouterr().out)
        shutil.rmtree(report["folder"])
        monkeypatch.setattr("raysweep.sweep.ray_map._is_users_own", lambda module: False)
        assert main(command) == 3
        assert "the nodes of the cluster have no module" in capsys.readouterr().err
    finally:
        ray_cluster.remove_node(node)
    expected = raysweep.evaluate(Mine(), x, y, "apgd-ce", 0.02)
    assert 0 < report["robust_accuracy"] == expected.robust_accuracy < 1


@pytest.mark.ray
def test_what_cannot_travel_to_a_cluster_is_one_line(ray_cluster) -> None:
    from raysweep.sweep.ray_map import RayMap

    model = HoldsALock()
    x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    with pytest.raises(SpecError, match=r"cannot be sent to the cluster .*lock.*leave --address"):
        raysweep.evaluate(model, x, y, "apgd-ce", 0.02, map=RayMap())


def test_a_sweep_and_a_trial_are_named_as_show_names_them(
    trained_run: Path, workdir: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    ledger = Ledger.create(workdir / "runs" / "g1", load_space("at", {}))
    trial_path = workdir / "runs" / "g1" / "trials" / "0003"
    shutil.move(trained_run, trial_path)
    last = RunDirectory(ledger.trial_path(3)).read_last_checkpoint()
    assert last is not None
    ledger.save_trial(
        Trial(3, {}, "finished", 2, best=max(last.history, key=lambda row: row["robust_worst"]))
    )
    folders = set()
    for what in (
        ["g1/0003"],
        ["g1"],
        ["runs/g1"],
        [str(ledger.trial_path(3))],
        ["g1/3", "--storage", str(workdir / "s")],
    ):
        if "--storage" in what:
            shutil.copytree(workdir / "runs" / "g1", workdir / "s" / "g1")
        assert main(["eval", *what, *QUICK]) == 0, what
        folders.add(
            json.loads(capsys.readouterr().out)["folder"].replace(
                str(workdir / "s"), str(workdir / "runs")
            )
        )
    assert len(folders) == 1 and folders.pop().startswith(str(ledger.trial_path(3)))
    assert main(["show", "g1", "--json"]) == 0
    (trial,) = json.loads(capsys.readouterr().out)["trials"]
    assert Path(trial["checkpoint"]).parent == trial_path
    assert main(["eval", "g1/0004", *QUICK]) == 2
    assert "g1 has no trial 0004: it has 1, counted from 0000" in capsys.readouterr().err
    assert main(["eval", "g2", *QUICK]) == 2
    assert "no sweep, trial, training run or folder 'g2'; nearest: g1" in capsys.readouterr().err


def test_a_users_own_model(tmp_path: Path, capsys, monkeypatch) -> None:
    """In a folder and as a user whose names make trouble: `o'neil`, and none at all, as in some
    containers.
    """
    workdir = tmp_path / "o'neil"
    workdir.mkdir()
    monkeypatch.chdir(workdir)
    for name in ("MLFLOW_TRACKING_URI", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    (workdir / "my_models.py").write_text(
        "import torch\n"
        "def linear():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
        "number = 3\n"
    )
    command = [
        "eval",
        "my_models:linear",
        "--attack",
        "pgd20",
        "--eps",
        "8/255",
        "--n",
        "30",
        "--json",
    ]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["eps"] == 8 / 255 and report["model"] == "my_models:linear"
    for name, count in (("train", 10), ("test", 30)):
        x = np.random.default_rng(0).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)
        np.savez(workdir / f"{name}.npz", x=x, y=np.arange(count) % 10)
    assert main([*command, "--set", "data.name=arrays", "--data-dir", "."]) == 0, (
        "its training set is not used"
    )
    assert json.loads(capsys.readouterr().out)["examples"] == 30
    assert main(["eval", "my_models:nothing"]) == 2
    assert "cannot be imported" in capsys.readouterr().err


def test_pseudo_labels_for_self_training(trained_run: Path, workdir: Path, capsys) -> None:
    x = np.random.default_rng(0).integers(0, 17, (40, 1, 8, 8), dtype=np.uint8)
    np.savez(workdir / "more.npz", x=x)
    assert main(["eval", str(trained_run), "--pseudo-label", str(workdir / "more.npz")]) == 0
    target = capsys.readouterr().out.strip().rpartition("=")[2]
    assert (
        main(["eval", str(trained_run), "--pseudo-label", str(workdir / "more.npz"), "--json"]) == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert said["file"] == target and said["images"] == 40
    assert main(["train", "rst", *SMALL, "--set", f"data.unlabeled={target}", "--name", "rst"]) == 0
    assert "trains on labelled data alone" not in capsys.readouterr().err
    assert main(["train", "rst", *SMALL, "--name", "rst-alone"]) == 0
    assert "rst trains on labelled data alone" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.mlflow
def test_the_command_with_a_class_of_ones_own_and_several_processes(workdir: Path) -> None:
    (workdir / "mine.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        torch.manual_seed(0)\n"
        "        self.linear = torch.nn.Linear(64, 10)\n"
        "    def forward(self, x):\n"
        "        return self.linear(x.flatten(1))\n"
        "def make():\n"
        "    return Net()\n"
    )
    command = Path(sys.executable).parent / "raysweep"
    arguments = [
        "eval",
        "mine:make",
        "--attack",
        "apgd-ce,square",
        "--eps",
        "0.01",
        "--n",
        "40",
        "--json",
    ]
    # The only command here that makes an MLflow store of its own: see conftest.
    environment = {
        name: value for name, value in os.environ.items() if name != "MLFLOW_LOGGING_LEVEL"
    }
    done = subprocess.run(
        [command, *arguments], capture_output=True, text=True, cwd=workdir, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert (workdir / "mlflow.db").exists() and "INFO" not in done.stderr, (
        "MLflow's tables are made without a word"
    )
    report = json.loads(done.stdout)
    assert list(report["robust_after"]) == ["apgd-ce", "square"]
    if len(os.sched_getaffinity(0)) > 1:
        assert len(list(Path(report["folder"]).glob("shards/*/apgd-ce-*.npz"))) > 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--norm", "L2"], "give --eps too"),
        (
            ["--version", "rand"],
            "version 'rand' is only for autoattack: leave it out for 'apgd-ce'",
        ),
        (["--eps", "8"], "did you mean 8/255"),
        (["--set", "epochs=3"], "only data.* settings matter"),
    ],
)
def test_a_wrong_radius_is_refused(arguments, words, trained_run: Path, capsys) -> None:
    assert main(["eval", str(trained_run), *QUICK, *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nowhere", "no such folder"),
        (".", "neither a checkpoint"),
        pytest.param("0" * 32, "no checkpoint in MLflow store", marks=pytest.mark.mlflow),
        pytest.param(
            "models:/none@champion", "no checkpoint in MLflow store", marks=pytest.mark.mlflow
        ),
        ("no_such_module:factory", "cannot be imported"),
        ("weights.pt", "weights.pt: is a file; give the folder"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(what, words, workdir: Path, capsys) -> None:
    (workdir / "weights.pt").write_bytes(b"")
    assert main(["eval", what, *QUICK]) == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert words in message
    assert (workdir / "mlflow.db").exists() == ("MLflow" in words), (
        "a store is made when something is to be written"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--verify", "--n", "3", "--out", "x"], "--verify: leave out --n, --out"),
        (
            ["--verify", "--set", "data.val_size=3"],
            "--verify: leave out --set; only --attack N has a setting, its seed",
        ),
        (
            ["--verify", "--pseudo-label", "x.npz"],
            "--verify: leave out --pseudo-label",
        ),
        (
            ["--pseudo-label", "x.npz", "--attack", "square"],
            "--pseudo-label attacks nothing: leave out --attack",
        ),
        (
            ["--pseudo-label", "x.npz", "--bundle", "b"],
            "--pseudo-label attacks nothing: leave out --bundle",
        ),
    ],
)
def test_what_a_mode_does_not_read_is_refused(arguments, words, workdir: Path, capsys) -> None:
    assert main(["eval", ".", *arguments]) == 2
    assert capsys.readouterr().err == f"raysweep: error: {words}\n"
    assert not list(workdir.iterdir())


def test_a_hostile_checkpoint_is_refused_and_not_unpickled(trained_run: Path, capsys) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path("exploded").touch, ())

    torch.save(Bomb(), trained_run / "epoch-0002" / "weights.safetensors")
    for meta in trained_run.glob("epoch-*"):
        if meta.name != "epoch-0002":
            torch.save(Bomb(), meta / "weights.safetensors")
    assert main(["eval", str(trained_run), *QUICK]) == 4
    assert "truncated or altered" in capsys.readouterr().err
    assert not Path("exploded").exists()
