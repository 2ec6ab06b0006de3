"""A checkpoint in a bucket is whole or absent at every moment: a push or a drop is cut off at each
of its requests.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from conftest import tiny
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from raysweep.stores import StoreAccessRefused, StorePath, open_path
from raysweep.training.failure_reports import (
    TRACEBACK_FILE,
    clear_failure_report,
    failure_report,
    load_failure_report,
    save_failure_report,
)

BUCKET = "order"
# `meta.json` is neither the first nor the last in the alphabet, nor in the order in which a folder
# is listed.
FILES = ("config.json", "a.bin", "meta.json", "weights.bin", "state.bin")


class Gate:
    """The S3 test server. Records each request for a change, and refuses all after the first
    `allowed`.
    """

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self.changes: list[str] = []
        self.allowed = 1000
        self.n_bytes_received = 0

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        method, path, query = (
            environ[key] for key in ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING")
        )
        if method in ("PUT", "DELETE") or (method == "POST" and "delete" in query):
            self.changes.append(f"{method} {path.rpartition('/')[2]}")
            self.n_bytes_received += int(environ.get("CONTENT_LENGTH") or 0)
            if len(self.changes) > self.allowed:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response("403 Forbidden", [("Content-Type", "application/xml")])
                return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        return self._application(environ, start_response)

    def allow(self, count: int) -> None:
        self.changes.clear()
        self.n_bytes_received = 0
        self.allowed = count


@pytest.fixture(scope="module")
def bucket_server() -> Iterator[tuple[Gate, str]]:
    """The server, and the URI of a folder in a bucket on it."""
    gate = Gate(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, gate, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    query = f"endpoint_override=127.0.0.1:{server.port}&scheme=http"
    urlopen(Request(f"http://127.0.0.1:{server.port}/{BUCKET}", method="PUT")).read()
    yield gate, f"s3://{BUCKET}/run?{query}"
    server.shutdown()
    thread.join()


def write_checkpoint(path: StorePath, text: str) -> None:
    with path.write_checkpoint() as folder:
        for name in FILES:
            (folder / name).write_text(f"{name} {text}")


@pytest.fixture
def machines(
    bucket_server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], StorePath]:
    """Function that switches to the named machine (its own local copy) and returns the run's folder
    there.
    """

    def act_as(machine: str) -> StorePath:
        monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / machine))
        return open_path(bucket_server[1])

    return act_as


def assert_seen(path: StorePath, text: str | None) -> None:
    """Check what a machine finds: no checkpoint (None), or all of its files."""
    assert path.parent.list_folders_containing() == ([] if text is None else [path.name])
    folder = path.fetch_checkpoint()
    if text is None:
        assert folder is None
        assert not path.working_path.exists(), "the local copy has no incomplete checkpoint either"
    else:
        assert folder is not None
        assert {file.name: file.read_text() for file in folder.iterdir()} == {
            name: f"{name} {text}" for name in FILES
        }


def test_a_push_that_is_cut_off_is_no_checkpoint_until_its_last_file(
    bucket_server, machines
) -> None:
    """The first change deletes an earlier `meta.json`."""
    gate, _ = bucket_server
    for allowed in (0, 1, 2, len(FILES)):
        path = machines("one") / f"epoch-{allowed}"
        gate.allow(allowed)
        with pytest.raises(StoreAccessRefused, match="AccessDenied"):
            write_checkpoint(path, "new")
        assert "PUT meta.json" not in gate.changes[:allowed]
        gate.allow(1000)
        other = machines("other") / f"epoch-{allowed}"
        assert other.fetch_checkpoint() is None and not other.working_path.exists()
        assert f"epoch-{allowed}" not in other.parent.list_folders_containing()
        machines("one")
        gate.allow(1000)
        write_checkpoint(path, "new")
        assert gate.changes[0] == "DELETE meta.json" and gate.changes[-1] == "PUT meta.json"
        assert len(gate.changes) == 1 + len(FILES)
        assert (machines("other") / f"epoch-{allowed}").fetch_checkpoint() is not None
    machines("one").delete_folder()


def test_a_copy_within_the_bucket_is_no_checkpoint_until_its_last_file(
    bucket_server, machines
) -> None:
    """Files that the bucket has already are not sent; `meta.json` is sent, and last."""
    gate, _ = bucket_server
    root = machines("one")
    write_checkpoint(root / "first", "old")

    def copy_first() -> None:
        with (root / "second").write_checkpoint(copy_from=root / "first") as folder:
            (folder / "meta.json").write_text("meta.json new")

    gate.allow(len(FILES))
    with pytest.raises(StoreAccessRefused, match="AccessDenied"):
        copy_first()
    assert gate.n_bytes_received < 100, "the server has copied the files"
    gate.allow(1000)
    assert (machines("other") / "second").fetch_checkpoint() is None
    machines("one")
    copy_first()
    other = machines("other")
    folder = (other / "second").fetch_checkpoint()
    assert folder is not None and other.list_folders_containing() == ["first", "second"]
    assert (folder / "meta.json").read_text() == "meta.json new"
    assert (folder / "a.bin").read_text() == "a.bin old"
    other.delete_folder()


def test_a_drop_that_is_cut_off_leaves_no_checkpoint(bucket_server, machines) -> None:
    gate, _ = bucket_server
    write_checkpoint(machines("one") / "run", "new")
    gate.allow(1)
    with pytest.raises(StoreAccessRefused, match="AccessDenied"):
        (machines("one") / "run").delete_folder()
    assert gate.changes[0] == "DELETE meta.json" and len(gate.changes) > 1
    gate.allow(1000)
    assert_seen(machines("other") / "run", None)
    left = {file.key.rpartition("/")[2] for file in (machines("one") / "run").list_files()}
    assert left == {*FILES} - {"meta.json"}, "the next try deletes the rest"
    (machines("one") / "run").delete_folder()
    assert not (machines("one") / "run").list_files()


def test_a_machine_sees_a_new_checkpoint_only_when_all_of_it_is_there(
    bucket_server, machines
) -> None:
    gate, _ = bucket_server
    write_checkpoint(machines("one") / "run", "old")
    assert_seen(machines("other") / "run", "old")
    gate.allow(2)
    with pytest.raises(StoreAccessRefused, match="AccessDenied"):
        write_checkpoint(machines("one") / "run", "new")
    gate.allow(1000)
    assert_seen(machines("other") / "run", None)
    write_checkpoint(machines("one") / "run", "new")
    assert_seen(machines("other") / "run", "new")
    machines("one").delete_folder()
    assert not machines("one").working_path.exists()
    assert_seen(machines("other") / "run", None)


def test_other_machines_learn_why_a_trial_failed(machines) -> None:
    path = machines("one")
    report = failure_report(KeyError("no"), tiny("at"), path)
    save_failure_report(path, report)
    there = machines("other")
    assert load_failure_report(there) == report and report["failed"] == "KeyError: 'no'"
    assert (there / TRACEBACK_FILE).read_text() == report["bug"]
    clear_failure_report(there)
    assert load_failure_report(machines("one")) == {}
    machines("one").delete_folder()


def test_the_checkpoints_of_a_bucket_are_the_folders_that_hold_the_file_themselves(
    bucket_server, machines
) -> None:
    root = machines("one")
    for file in (
        "b/meta.json",
        "a/deep/meta.json",
        ".hidden/meta.json",
        "c/other.json",
        "meta.json",
    ):
        (root / file).write_text("{}")
    other = machines("other")
    assert other.list_folders_containing() == ["b"]
    assert (other / "a").list_folders_containing() == ["deep"]
    assert other.list_folders_containing("other.json") == ["c"]
    assert other.list_subfolders() == [".hidden", "a", "b", "c"]
    assert [file.key for file in (other / "a").list_files()] == ["run/a/deep/meta.json"]
    other.delete_folder()
