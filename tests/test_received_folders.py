"""A folder from somebody else, with links in it, makes raysweep touch nothing outside of it."""

import hashlib
import json
import os
import shutil
import sqlite3
import sys
import threading
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from raysweep.attacks import PGD
from raysweep.checkpoint_evaluation import choose_evaluation_folder
from raysweep.cli import main
from raysweep.data import DataSpec
from raysweep.errors import DamagedFileError, RaysweepError, SpecError
from raysweep.stores import open_path
from raysweep.training.checkpoint import read_checkpoint

sys.path.insert(0, str(Path(__file__).parent / "security"))

from foreign_references import write_checkpoint

LINKS = ["lock", "log.jsonl", "trials", "trials/0000", "ray", "trials/0000/log.txt", "sweep.json"]
PIPELINE = """
set: {epochs: 1, data.val_size: 50, data.train_size: 64, "*.attacks.*.steps": 1,
      "validation.finish.*.steps": 1, "validation.finish.*.runs": 1}
stages:
  - {kind: train, runs: {own: {method: at}}, seeds: [0]}
  - {kind: autoattack, attacks: {APGD: apgd-ce}, n: 10}
"""
TRAIN = ["train", "at", "--set", "epochs=1", "--set", "data.train_size=64", "--set"]
TRAIN += ["data.val_size=50", "--set", "*.attacks.*.steps=1", "--name", "mine"]
TRAIN += ["--set", "validation.finish.*.steps=1", "--set", "validation.finish.*.runs=1"]


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder with files that must stay as they are."""
    folder = tmp_path / "victim"
    (folder / "photos/epoch-0001").mkdir(parents=True)
    for name in ("diary", "photos/holiday", "photos/epoch-0001/meta.json"):
        (folder / name).write_text(f"dear {name}")
    return folder


def fingerprint(folder: Path) -> dict[str, str]:
    """Digest of each file by its path."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def place_link(sweep: Path, name: str, victim: Path) -> None:
    """Put a link at a place in the sweep's folder where raysweep has a file or folder."""
    is_file = "." in name or name == "lock"
    link = sweep / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(victim / "diary" if is_file else victim / "photos")


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("command", ["resume", "extend", "train"])
def test_no_link_is_followed(
    command: str, name: str, victim: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = workdir / "runs/mine"
    sweep.mkdir(parents=True)
    if name != "sweep.json":
        (sweep / "sweep.json").write_text('{"space": {"method": "at", "space": {}}, "key": "k"}')
    place_link(sweep, name, victim)
    before = fingerprint(victim)
    arguments = {
        "resume": ["tune", "--resume", "mine"],
        "extend": ["tune", "--resume", "mine", "--trials", "9"],
        "train": TRAIN,
    }[command]
    assert main(arguments) in (2, 4)
    assert fingerprint(victim) == before
    message = capsys.readouterr().err
    assert "Traceback" not in message and "dear" not in message
    assert len(message.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["lock", "log.jsonl", "sweep.json", "trials/0000/trial.json"])
@pytest.mark.parametrize("command", ["show", pytest.param("resume", marks=pytest.mark.slow)])
def test_no_pipe_is_waited_for(
    command: str, name: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = workdir / "runs/mine"
    (sweep / "trials/0000").mkdir(parents=True)
    if name != "sweep.json":
        space = {"method": "at", "space": {"optim.lr": {"float": [0.1, 0.2]}}}
        (sweep / "sweep.json").write_text(json.dumps({"space": space, "key": "k"}))
    os.mkfifo(sweep / name)
    arguments = {"show": ["show", "mine"], "resume": ["tune", "--resume", "mine"]}[command]
    read_only = command == "show" and name in ("lock", "log.jsonl")
    assert main(arguments) in ((0,) if read_only else (2, 4))
    assert len(capsys.readouterr().err.strip().splitlines()) == (not read_only)


@pytest.mark.parametrize("name", ["lock", "log.jsonl", "trials/0000/log.txt"])
def test_files_with_a_second_name_are_not_written_in_place(
    name: str, victim: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = workdir / "runs/mine"
    (sweep / name).parent.mkdir(parents=True)
    os.link(victim / "diary", sweep / name)
    before = fingerprint(victim)
    assert main(TRAIN) == 4
    assert fingerprint(victim) == before
    assert "has a second name (a hard link)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        *((name, "link") for name in ("", "shards", "log.jsonl", "report.json")),
        *(("log.jsonl", "hard link"), ("log.jsonl", "pipe"), ("", "pipe"), ("shards", "pipe")),
    ],
)
def test_the_folder_of_an_evaluation_is_no_trap(
    place: str, kind: str, victim: Path, tmp_path: Path
) -> None:
    """Its name follows from the settings: whoever sends a run can put something there."""
    (tmp_path / "runs").mkdir()
    others = SimpleNamespace(checkpoint=None, name="my_models:make")
    (tmp_path / "runs/eval").symlink_to(victim)
    with pytest.raises(DamagedFileError, match="runs/eval: is a symbolic link"):
        choose_evaluation_folder(tmp_path, others, PGD(eps=0.1), DataSpec(), 20)
    saved = write_checkpoint(tmp_path, {})
    target = SimpleNamespace(checkpoint=read_checkpoint(saved), name="mine")
    arguments = (tmp_path, target, PGD(eps=0.1), DataSpec(), 20)
    folder = choose_evaluation_folder(*arguments)
    folder.mkdir()
    assert folder == choose_evaluation_folder(*arguments), "it is resumed there"
    trap = folder / place
    if not place:
        folder.rmdir()
    if kind == "link":
        trap.symlink_to(victim / "photos")
    elif kind == "hard link":
        os.link(victim / "diary", trap)
    else:
        os.mkfifo(trap)
    with pytest.raises(DamagedFileError) as caught:
        choose_evaluation_folder(*arguments)
    (line,) = caught.value.problems
    assert line.startswith(str(trap)) and line.endswith("delete it")


@pytest.mark.parametrize("place", ["pipelines", "pipelines/p", "pipelines/p/log.jsonl"])
def test_the_folder_of_a_pipeline_is_no_trap(
    place: str, victim: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A killed run leaves hidden folders, which the next one deletes: not those of somebody."""
    for folder in (victim / "photos", victim / "photos/p"):
        (folder / ".00-train-0123456789abcdef.1").mkdir(parents=True)
    (workdir / "p.yaml").write_text(PIPELINE)
    trap = workdir / "runs" / place
    trap.parent.mkdir(parents=True)
    trap.symlink_to(victim / ("diary" if "." in place else "photos"))
    before = fingerprint(victim)
    assert main(["run", "p.yaml"]) == 4
    assert fingerprint(victim) == before
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{trap}: is a symbolic link" in line


@pytest.mark.mlflow
def test_the_folder_of_downloads_from_mlflow_is_no_trap(victim: Path, workdir: Path) -> None:
    from raysweep.run_lookup import download_from_mlflow
    from raysweep.tracking import Tracker, tracking_uri

    tracker = Tracker(tracking_uri(workdir), workdir / "mlruns").wait_until_ready()
    run_id = tracker.get_or_create_run("r", {"raysweep.kind": "train"})
    (workdir / "model").mkdir()
    (workdir / "model/a").write_text("theirs")
    tracker.log_folder(run_id, workdir / "model", "checkpoint")
    (workdir / "runs").mkdir()
    for trap in (workdir / "runs/from-mlflow", workdir / "runs/from-mlflow" / run_id):
        trap.parent.mkdir(exist_ok=True)
        trap.symlink_to(victim / "photos")
        before = fingerprint(victim)
        with pytest.raises(DamagedFileError, match="is a symbolic link"):
            download_from_mlflow(run_id, tracker, workdir)
        assert fingerprint(victim) == before
        trap.unlink()
    _, folder = download_from_mlflow(run_id, tracker, workdir)
    assert (folder / "a").read_text() == "theirs"


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
def test_hidden_files_of_writers_are_no_traps(kind: str, victim: Path, tmp_path: Path) -> None:
    """The lock beside a file, and the file that takes its place, whose names can be guessed."""
    folder = open_path(tmp_path) / "runs"
    (folder / "a").write_text("x")
    process = f"{os.getpid()}-{threading.get_native_id()}"
    for trap in (".a.lock~", f".a.{process}.part"):
        path = tmp_path / "runs" / trap
        if kind == "link":
            path.symlink_to(victim / "diary")
        elif kind == "hard link":
            os.link(victim / "diary", path)
        else:
            os.mkfifo(path)
    before = fingerprint(victim)
    (folder / "a").write_text("new")
    assert (tmp_path / "runs/a").read_text() == "new"
    with suppress(OSError, RaysweepError):
        (folder / "a").delete()
    assert fingerprint(victim) == before


@pytest.mark.parametrize("target", ["photos", "missing"])
def test_a_link_among_shared_prefixes_deletes_nothing(
    target: str, victim: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / ".prefixes").symlink_to(victim / target)
    before = fingerprint(victim)
    prefixes = open_path(tmp_path) / "runs" / ".prefixes"
    for action in (
        lambda: (prefixes / "epoch-0001").delete_folder(),
        lambda: prefixes.list_folders_containing(),
        lambda: prefixes.store.list_checkpoints(prefixes.key),
        lambda: (prefixes / "holiday").delete(),
        lambda: (prefixes / "new").write_text("x"),
        lambda: prefixes.write_checkpoint().__enter__(),
        lambda: prefixes.delete_unfinished(),
        lambda: prefixes.working_path,
    ):
        with pytest.raises(DamagedFileError, match=r"\.prefixes: is a symbolic link"):
            action()
    assert fingerprint(victim) == before


def test_links_of_ones_own_above_the_folder_are_followed(tmp_path: Path) -> None:
    """A user's `runs` may be on another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    folder = open_path(tmp_path / "runs")
    (folder / "a/b").write_text("x")
    assert (tmp_path / "disk/a/b").read_text() == "x" == (folder / "a/b").read_text()
    assert [file.name for file in (tmp_path / "disk/a").iterdir()] == ["b"]


def test_listings_leave_out_what_is_behind_a_link(victim: Path, tmp_path: Path) -> None:
    folder = open_path(tmp_path) / "runs"
    (folder / "mine/sweep.json").write_text("{}")
    (folder / "mine/meta.json").write_text("{}")
    (victim / "sweep.json").write_text("{}")
    (tmp_path / "runs/linked").symlink_to(victim)
    (tmp_path / "runs/linked-file").symlink_to(victim / "diary")
    assert folder.list_folders_containing("sweep.json") == ["mine"]
    assert [str(path) for path in folder.read_matching("*/sweep.json")] == [
        str(tmp_path / "runs/mine/sweep.json")
    ]
    names = [Path(file.key).name for file in folder.list_files()]
    assert names == ["meta.json", "sweep.json"]
    assert len(folder.store.list_checkpoints(folder.key)) == 1


@pytest.mark.mlflow
def test_a_received_store_of_mlflow_is_no_trap(
    victim: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its experiment or a run keeps artifacts elsewhere, or a model's run is called `../..`."""
    from raysweep.run_lookup import download_from_mlflow
    from raysweep.tracking import Tracker, tracking_uri

    made = workdir / "made"
    made.mkdir()
    tracker = Tracker(tracking_uri(made), made / "mlruns").wait_until_ready()
    run_id = tracker.get_or_create_run("r", {"raysweep.kind": "train"})
    tracker.log_json(run_id, {}, "a.json")
    before = fingerprint(victim)
    elsewhere = (victim / "photos").as_uri()
    for number, statement in enumerate(
        (
            f"UPDATE experiments SET artifact_location = '{elsewhere}' WHERE name = 'raysweep'",
            f"UPDATE runs SET artifact_uri = '{elsewhere}'",
            "UPDATE runs SET artifact_uri = artifact_uri || '/../../../../../victim'",
            "UPDATE runs SET artifact_uri = artifact_uri || '/%2e%2e/%2e%2e/%2e%2e/%2e%2e/x'",
            f"UPDATE runs SET artifact_uri = '{victim}'",
            "UPDATE runs SET artifact_uri = 's3://somebody/bucket'",
        )
    ):
        received = workdir / f"received-{number}"
        shutil.copytree(made, received)
        with closing(sqlite3.connect(received / "mlflow.db")) as database, database:
            database.execute(statement)
        with pytest.raises(DamagedFileError, match=r"it keeps artifacts in .*outside of"):
            Tracker(tracking_uri(received), received / "mlruns").wait_until_ready()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{received}/mlflow.db")
    Tracker(tracking_uri(received), received / "mlruns").wait_until_ready()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    shutil.copytree(made, workdir / "honest")
    honest = workdir / "honest"
    tracker = Tracker(tracking_uri(honest), honest / "mlruns").wait_until_ready()
    assert tracker.get_or_create_run("r", {"raysweep.kind": "train"}) == run_id
    monkeypatch.setattr(tracker, "_resolve_run_id", lambda reference: "../../victim")
    with pytest.raises(SpecError, match="is no id of an MLflow run"):
        download_from_mlflow("models:/m/1", tracker, workdir)
    assert fingerprint(victim) == before
