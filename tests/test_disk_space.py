"""Disks that are full or nearly full."""

import errno
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from raysweep import disk_space
from raysweep.commands.session import find_expected_error
from raysweep.disk_space import describe_missing_space, find_free_bytes, is_disk_full_error
from raysweep.errors import InfrastructureError
from raysweep.spec import SpecError
from raysweep.stores import open_path
from raysweep.training.failure_reports import INFRASTRUCTURE_KEY, failure_report


def wrap(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"),
        sqlite3.OperationalError("database or disk is full"),
        wrap(RuntimeError("cannot log"), OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_a_full_disk_in_any_library_is_one_of_the_surroundings(
    error: Exception, tmp_path: Path
) -> None:
    assert is_disk_full_error(error)
    config = SimpleNamespace(batch_size=2)
    report = failure_report(error, config, open_path(tmp_path))  # type: ignore[arg-type]
    assert INFRASTRUCTURE_KEY in report and not [*tmp_path.iterdir()]
    assert isinstance(find_expected_error(error, "tune"), InfrastructureError)


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "x"), ValueError("3"), KeyError("disk")])
def test_others_are_not(error: Exception) -> None:
    assert not is_disk_full_error(error)


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    free = find_free_bytes(tmp_path / "a" / "b")
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)


def test_what_lacks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_space, "find_free_bytes", lambda path: 2**30)
    assert describe_missing_space(tmp_path, 2**29, 0.5) == ""
    line = describe_missing_space(tmp_path, 2**29 + 1, 0.5)
    assert line.startswith(f"{tmp_path}: its disk has 1.0 GiB free; needed are about 512 MiB")


@pytest.mark.needs_ray
def test_a_sweep_ends_at_its_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raysweep.sweep import tune_callbacks
    from raysweep.sweep.ledger import Ledger
    from raysweep.sweep.search_space import SearchSpace

    data = {"method": "at", "space": {"seed": {"int": [0, 3]}}, "disk_reserve_gib": 1}
    space = SearchSpace.from_data(data)
    ledger = Ledger.create(open_path(tmp_path / "s"), space)
    free_bytes = 2**30
    monkeypatch.setattr(tune_callbacks, "find_free_bytes", lambda path: free_bytes)
    monkeypatch.setattr(tune_callbacks, "_DISK_LOOK_SECONDS", 0.0)
    callback = tune_callbacks.LedgerCallback(ledger, 3, [], 0, tune_callbacks.Budget())
    assert not callback.update_limit_reached()
    free_bytes -= 1
    assert callback.update_limit_reached() and callback.lacks_disk_space
    with pytest.raises(SpecError, match="disk_reserve_gib"):
        SearchSpace.from_data({**data, "disk_reserve_gib": -1})
    later = {key: value for key, value in data.items() if key != "disk_reserve_gib"}
    assert "disk_reserve_gib" not in SearchSpace.from_data(later).to_stored_dict()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB, which only root can make."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.mlflow
def test_a_run_that_a_full_disk_ended_is_not_called_running(
    small_disk: Path, empty_store: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    from raysweep.stores import open_path
    from raysweep.tracking import RunRecorder, Tracker, tracking_uri

    empty_store(small_disk / "mlflow.db")
    tracker = Tracker(tracking_uri(small_disk), small_disk / "mlruns")
    folder = open_path(small_disk / "r")
    recorder = RunRecorder(tracker, "r", {"raysweep.kind": "train"}, folder)
    recorder.write(lambda tracker, run_id: tracker.set_tags(run_id, {"a": "b"}))
    assert recorder.flush()
    with pytest.raises(OSError, match="No space left"), (small_disk / "fill").open("wb", 0) as file:
        while True:
            file.write(bytes(512))
    recorder.end("FAILED")
    assert not recorder.flush()
    uri = tracking_uri(small_disk)
    assert caplog.messages[-1].startswith(
        f"MLflow store {uri}: its disk is full; the work continues"
    )
    recorder.finish()
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("raysweep").experiment_id])
    assert run.info.status == "FAILED" and run.data.tags["a"] == "b"
    assert not [record for record in caplog.records if "lacks the last" in record.getMessage()]


def test_a_disk_that_is_full_keeps_no_spare_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = disk_space.SpareSpace(tmp_path / "missing", 2**20)
    space.release()
    with monkeypatch.context() as patch:

        def fill_disk(n_bytes: int) -> bytes:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr("os.urandom", fill_disk)
        half_full = disk_space.SpareSpace(tmp_path, 2**20)
    assert half_full._file is not None and half_full._file.closed, "what was written is free again"
    held = disk_space.SpareSpace(tmp_path, 2**20)
    assert not [*tmp_path.iterdir()] and not held.is_needed()
    held.release()
