"""Networks of a user's own file (`--code`): they train, are swept and evaluated; nobody else's
code is imported.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ONE_RUN, TINY, tiny

import raysweep
from raysweep.cli import main
from raysweep.code_files import (
    forget_code_afterwards,
    list_code_files,
    open_code_file,
    open_function_file,
)
from raysweep.data import DataSpec, load_data
from raysweep.errors import RaysweepError
from raysweep.models import ModelSpec
from raysweep.training.checkpoint import read_checkpoint
from raysweep.training.config import TrainingConfig
from raysweep.training.trainer import train_model

SOURCE = """\
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

Path({marker!r}).touch()

@dataclass(frozen=True)
class Widths:
    hidden: int = 4

class Net(nn.Module):
    def __init__(self, channels, classes, widths=Widths()):
        super().__init__()
        self.first = nn.Conv2d(channels, widths.hidden, 3, 2, 1)
        self.last = nn.Linear(16 * widths.hidden, classes)

    def forward(self, x):
        return self.last(self.first(x).relu().flatten(1))

def build(channels, classes):
    return Net(channels, classes)

def build_wide(channels, classes):
    return Net(channels, classes, Widths(8))

def digits_cnn(channels, classes):
    return Net(channels, classes)

def fails(channels, classes):
    return [0][channels]

def gives_text(channels, classes):
    return "network"

_private = build
"""
SETTINGS = [f"{path}={value}" for path, value in (TINY | ONE_RUN).items()]
SETTINGS += ["model.name=build"]
SMALL = [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.fixture
def marker(workdir: Path) -> Path:
    """A file that exists once the code has run."""
    return workdir / "it-ran"


@pytest.fixture
def code(workdir: Path, marker: Path) -> Path:
    """A file of the user's own."""
    return write_code(workdir / "my_networks.py", marker)


def write_code(path: Path, marker: Path, end: str = "") -> Path:
    path.write_text(SOURCE.format(marker=str(marker)) + end)
    return path


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """No file that a test names is known to the next one."""
    with forget_code_afterwards():
        yield


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(RaysweepError) as caught:
        call()
    assert len(caught.value.problems) == 1 and "\n" not in caught.value.problems[0]
    return caught.value.problems[0]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that is refused; return its one line."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.mlflow
def test_a_network_of_ones_own_trains_and_loads_as_that_network(
    code: Path, marker: Path, workdir: Path, capsys, monkeypatch
) -> None:
    train = ["train", "at", *SMALL, "--name", "mine"]
    assert "needs --code FILE" in error_of(capsys, *train)
    assert not marker.exists()
    assert main([*train, "--code", str(code)]) == 0
    assert list_code_files() == [], "the next call has to name it again"
    folder = json.loads((workdir / "runs/mine/epoch-0001/meta.json").read_text())
    digest = hashlib.sha256(code.read_bytes()).hexdigest()
    assert folder["config"]["model"]["code"] == digest
    assert (workdir / "runs/mine/epoch-0001/network.source").read_bytes() == code.read_bytes()

    model = raysweep.load("mine", code=code)
    saved = read_checkpoint(workdir / "runs/mine/epoch-0001")
    tensors = saved.load_weights(torch.nn.Sequential(model[0])).state_dict()
    x = load_data(DataSpec()).test.get_float_images(slice(0, 4))
    by_hand = torch.nn.functional.conv2d(
        x, tensors["0.first.weight"], tensors["0.first.bias"], stride=2, padding=1
    )
    by_hand = by_hand.relu().flatten(1) @ tensors["0.last.weight"].T + tensors["0.last.bias"]
    torch.testing.assert_close(model(x), by_hand)

    # Without the file, with another, and with the right name but another content.
    marker.unlink()
    assert f"'build' is a function of a file with SHA-256 {digest[:12]}" in refusal(
        lambda: raysweep.load("mine")
    )
    other = write_code(workdir / "others.py", marker, "# another\n")
    other_digest = hashlib.sha256(other.read_bytes()).hexdigest()
    evaluate = ["eval", "mine", "--attack", "pgd20", "--n", "20", "--json"]
    assert "runs only if you name it: --code FILE" in error_of(capsys, *evaluate)
    assert other_digest[:12] in error_of(capsys, *evaluate, "--code", str(other))
    line = error_of(capsys, *train, "--set", "epochs=2", "--code", str(other))
    assert "holds a run with other settings" in line
    assert not marker.exists()

    # The copy in the checkpoint is a file like any other that the user names.
    copy = workdir / "runs/mine/epoch-0001/network.source"
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert main([*evaluate, "--code", str(copy), "--bundle", "b"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 20

    # A bundle holds the code as text, which its reader may name, too.
    verify = ["eval", "b", "--verify"]
    assert "runs only if you name it" in error_of(capsys, *verify)
    assert other_digest[:12] in error_of(capsys, *verify, "--code", str(other))
    assert not marker.exists()
    assert main([*verify, "--code", "b/checkpoint/network.source"]) == 0
    assert "robust at most" in capsys.readouterr().out


def test_the_function_in_python_is_ones_word_if_its_file_is_the_recorded_one(
    code: Path, workdir: Path, marker: Path, monkeypatch
) -> None:
    sha256 = open_code_file(code).sha256
    config = tiny("at", model__name="build_wide", model__code=sha256, epochs=1)
    train_model(config, workdir / "runs/wide")
    monkeypatch.syspath_prepend(str(workdir))
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    import my_networks

    plain = tiny("at", epochs=1)
    train_model(plain, workdir / "runs/plain")
    line = refusal(lambda: raysweep.load("runs/plain", code=code))
    assert line.endswith("my_networks.py: has no effect: plain/epoch-0001 needs no code")
    with forget_code_afterwards():
        adopted = raysweep.load("runs/wide", code=my_networks.build_wide)
        assert type(adopted[0]) is my_networks.Net and adopted[0].first.out_channels == 8
        assert "has no file" in refusal(lambda: raysweep.load("runs/wide", code=len))


def test_a_function_of_another_file_than_the_recorded_one_is_refused(
    code: Path, workdir: Path, monkeypatch
) -> None:
    trained = ModelSpec(name="build", code=hashlib.sha256(code.read_bytes()).hexdigest())
    code.write_text(code.read_text() + "# changed\n")
    monkeypatch.syspath_prepend(str(workdir))
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    import my_networks

    open_function_file(my_networks.build)
    assert "or was changed since" in refusal(lambda: trained.build_model(1, 10, 0))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nosuch", "has no function 'nosuch'; it has: Widths, Net, build, build_wide, digits_cnn"),
        ("_private", "has no function '_private'"),
        ("torch", "has no function 'torch'"),
        ("fails", "my_networks.py:32: fails: IndexError: list index out of range"),
        ("gives_text", "model.name = 'gives_text': its function gave str, not a torch.nn.Module"),
    ],
)
def test_wrong_functions_are_one_line(code: Path, name: str, expected: str) -> None:
    model = ModelSpec(name=name, code=open_code_file(code).sha256)
    assert expected in refusal(lambda: model.build_model(1, 10, 0))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def build(:", "own.py:1: SyntaxError: invalid syntax"),
        ("x = 1\n1 / 0", "own.py:2: ZeroDivisionError: division by zero"),
        ("import nosuch_module", "own.py:1: ModuleNotFoundError: No module named 'nosuch_module'"),
        ("", "has no function 'build'; it has: none"),
        ("raise ValueError('two\\nlines')", "own.py:1: ValueError: two lines"),
    ],
)
def test_wrong_files_are_one_line(workdir: Path, source: str, expected: str) -> None:
    (workdir / "own.py").write_text(source)
    model = ModelSpec(name="build", code=open_code_file("own.py").sha256)
    assert expected in refusal(lambda: model.build_model(1, 10, 0))


def test_files_that_cannot_be_read_are_one_line(workdir: Path, capsys) -> None:
    os.mkfifo(workdir / "pipe.py")
    (workdir / "folder.py").mkdir()
    for name, reason in (
        ("none.py", "No such file or directory"),
        ("pipe.py", "it is no regular file"),
        ("folder.py", "Is a directory"),
    ):
        line = error_of(capsys, "train", "at", "--code", name, "--plan")
        assert line.endswith(f"--code {name}: cannot be read: {reason}")


def test_code_without_effect_is_refused(code: Path, capsys, workdir: Path) -> None:
    line = error_of(capsys, "train", "at", "--code", str(code), "--plan")
    assert "has no effect: model.name = digits_cnn is a network of raysweep" in line
    assert line.endswith(
        "of the file: Widths, Net, build, build_wide, digits_cnn, fails, gives_text"
    )
    model = ModelSpec(name="digits_cnn", code="0" * 64)
    assert model.code is None and model.digest() == ModelSpec().digest()
    assert "is no SHA-256" in error_of(capsys, "show", "at", "--set", "model.code=my.py", "--set",
                                       "model.name=build")  # fmt: skip


@pytest.mark.parametrize("name", ["", "x y", "a.b", "x\x1b[2J", "<b>", "my:build", "9", "x" * 101])
def test_names_of_strangers_functions_are_names(name: str) -> None:
    """They are shown in reports, tables and MLflow, also if nobody imports them."""
    with pytest.raises(ValueError, match="is no name of a function") as caught:
        TrainingConfig.from_data({"method": "at", "model": {"name": name, "code": "0" * 64}})
    assert len(str(caught.value).splitlines()) == 1 and "\x1b" not in str(caught.value)


def test_the_content_that_was_read_is_the_content_that_runs(code: Path, marker: Path) -> None:
    """Between the digest and the import, the file changes."""
    code_file = open_code_file(code)
    code.write_text("raise SystemExit('the wrong content')")
    model = ModelSpec(name="build", code=code_file.sha256).build_model(1, 10, 0)
    assert model[0].first.out_channels == 4 and marker.exists()
    first = model.state_dict()
    again = ModelSpec(name="build", code=code_file.sha256).build_model(1, 10, 0).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first), "seeded as others are"


def test_configs_without_code_keep_their_digests() -> None:
    """Digests of version 0.1, from before there was code of one's own."""
    assert "code" not in ModelSpec().to_stored_dict()
    config = TrainingConfig.from_data({"method": "at"})
    assert "code" not in config.to_stored_dict()["model"]


@pytest.mark.mlflow
@pytest.mark.ray
def test_a_sweep_trains_networks_of_a_file_on_workers(
    ray_cluster, code: Path, workdir: Path, marker: Path, capsys
) -> None:
    """A grid of two own networks and one of raysweep; the finalist is one of the file's."""
    space = {
        "method": "at",
        "trials": 3,
        "finalists": 1,
        "scheduler": {"kind": "none"},
        "sampler": {"kind": "grid"},
        "base": TINY | ONE_RUN | {"epochs": 1, "validation.size": 10},
        "space": {"model.name": {"categorical": ["digits_cnn", "build", "build_wide"]}},
    }
    (workdir / "space.yaml").write_text(json.dumps(space))
    address = ["--address", ray_cluster.address]
    tune = ["tune", "--space", "space.yaml", "--name", "s", *address, "--code", str(code)]
    assert main(tune) == 0, capsys.readouterr().err
    sweep = raysweep.load_sweep("s")
    assert set(sweep.trials["state"]) == {"finished"}
    channels = {}
    for trial in sweep.ledger.load_trials():
        path = sweep.ledger.best_checkpoint_path(trial)
        saved = read_checkpoint(path)
        name = trial.params["model.name"]
        assert (saved.config.model.code is None) == (name == "digits_cnn")
        if name != "digits_cnn":
            model = raysweep.load(str(path), code=code)
            channels[name] = model[0].first.out_channels
    assert channels == {"build": 4, "build_wide": 8}

    resume = ["tune", "--resume", "s", *address, "--set", "epochs=2"]
    marker.unlink()
    line = error_of(capsys, *resume)
    assert "runs only if you name it: --code FILE" in line
    changed = write_code(workdir / "changed.py", marker, "# changed\n")
    assert "model.code = " in error_of(capsys, *resume, "--code", str(changed))
    assert not marker.exists()
    assert np.all(raysweep.load_sweep("s").trials["epochs"] == 1)
    assert main([*resume, "--code", str(code)]) == 0
    assert np.all(raysweep.load_sweep("s").trials["epochs"] == 2)


@pytest.mark.mlflow
def test_a_registered_model_and_its_tags_name_code_in_vain(
    code: Path, marker: Path, workdir: Path, capsys, monkeypatch
) -> None:
    """A stranger's store: the run's tags and the version's tags name modules and files of code."""
    from mlflow import MlflowClient

    from raysweep.tracking import tracking_uri

    with forget_code_afterwards():
        sha256 = open_code_file(code).sha256
        config = tiny("at", model__name="build", model__code=sha256)
        saved = train_model(config, workdir / "strangers").last_checkpoint
    marker.unlink()
    client = MlflowClient(tracking_uri(workdir))
    experiment = client.create_experiment("strangers", str(workdir / "mlruns"))
    run = client.create_run(experiment)
    client.log_artifacts(run.info.run_id, str(saved.local_folder), "checkpoint")
    client.create_registered_model("model")
    version = client.create_model_version(
        "model", f"{run.info.artifact_uri}/checkpoint", run.info.run_id
    )
    for name in ("code", "model.code", "mlflow.source.name", "mlflow.loader_module", "factory"):
        for value in ("my_networks:build", str(code), sha256):
            client.set_tag(run.info.run_id, name, value)
            client.set_model_version_tag("model", version.version, name, value)
    monkeypatch.syspath_prepend(str(workdir))
    sys.modules.pop("my_networks", None)
    import raysweep.code_files as module

    monkeypatch.setattr(module, "_modules", {})
    for reference in (run.info.run_id, f"runs:/{run.info.run_id}", "models:/model/1"):
        line = error_of(capsys, "eval", reference, "--n", "4")
        assert "runs only if you name it: --code FILE" in line
        assert "runs only if you name it" in refusal(lambda name=reference: raysweep.load(name))
    assert not marker.exists() and "my_networks" not in sys.modules
    assert raysweep.load("models:/model/1", code=code)[0].first.out_channels == 4
    assert marker.exists()
