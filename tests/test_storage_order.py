"""A checkpoint in a bucket is whole or absent at every moment: a push or a drop is cut off at each
of its requests.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny
from moto.server import DomainDispatcherApplication, create_backend_app
from pyarrow import fs
from werkzeug.serving import make_server

from raysweep import storage
from raysweep.atomic_files import atomic_write_text
from raysweep.errors import InfrastructureError
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

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        method, path, query = (
            environ[key] for key in ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING")
        )
        if method in ("PUT", "DELETE") or (method == "POST" and "delete" in query):
            self.changes.append(f"{method} {path.rpartition('/')[2]}")
            if len(self.changes) > self.allowed:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response("403 Forbidden", [("Content-Type", "application/xml")])
                return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        return self._application(environ, start_response)

    def allow(self, count: int) -> None:
        self.changes.clear()
        self.allowed = count


@pytest.fixture(scope="module")
def bucket_server() -> Iterator[tuple[Gate, str]]:
    """The server, and the URI of a folder in a bucket on it."""
    gate = Gate(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, gate, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    query = f"endpoint_override=127.0.0.1:{server.port}&scheme=http"
    fs.FileSystem.from_uri(f"s3://{BUCKET}?allow_bucket_creation=true&{query}")[0].create_dir(
        BUCKET
    )
    yield gate, f"s3://{BUCKET}/run?{query}"
    server.shutdown()
    thread.join()


def write_file(path: Path, text: str) -> Path:
    for name in FILES:
        atomic_write_text(path / name, f"{name} {text}")
    return path


@pytest.fixture
def machines(
    bucket_server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """Function that switches to the named machine (its own local copy) and returns the run's folder
    there.
    """

    def act_as(machine: str) -> Path:
        monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / machine))
        return storage.local_path(bucket_server[1])

    return act_as


def assert_seen(path: Path, text: str | None) -> None:
    """Check what a machine finds: no checkpoint (None), or all of its files."""
    assert storage.list_folders_containing(path.parent) == ([] if text is None else [path.name])
    assert storage.pull_checkpoint(path) == (text is not None)
    if text is None:
        assert not path.exists(), "the local copy has no incomplete checkpoint either"
    else:
        assert {file.name: file.read_text() for file in path.iterdir()} == {
            name: f"{name} {text}" for name in FILES
        }


def test_a_push_that_is_cut_off_is_no_checkpoint_until_its_last_file(
    bucket_server, machines
) -> None:
    gate, _ = bucket_server
    for allowed in (1, len(FILES) - 1):
        path = write_file(machines("one") / f"epoch-{allowed}", "new")
        gate.allow(allowed)
        with pytest.raises(InfrastructureError, match="ACCESS_DENIED"):
            storage.push_to_bucket(path)
        assert "PUT meta.json" not in gate.changes[:allowed]
        gate.allow(1000)
        other = machines("other") / f"epoch-{allowed}"
        assert not storage.pull_checkpoint(other) and not other.exists()
        assert f"epoch-{allowed}" not in storage.list_folders_containing(other.parent)
        path = machines("one") / f"epoch-{allowed}"
        gate.allow(1000)
        storage.push_to_bucket(path)
        assert gate.changes[-1] == "PUT meta.json" and len(gate.changes) == len(FILES)
        assert storage.pull_checkpoint(machines("other") / f"epoch-{allowed}")
    storage.delete_everywhere(machines("one"))


def test_a_copy_within_the_bucket_is_no_checkpoint_until_its_last_file(
    bucket_server, machines
) -> None:
    """`like` avoids sending files that the bucket has already; `meta.json` is sent nevertheless,
    and last.
    """
    gate, _ = bucket_server
    root = machines("one")
    first = write_file(root / "first", "old")
    storage.push_to_bucket(first)
    second = write_file(root / "second", "old")
    atomic_write_text(second / "meta.json", "meta.json new")
    gate.allow(len(FILES) - 1)
    with pytest.raises(InfrastructureError, match="ACCESS_DENIED"):
        storage.push_to_bucket(second, copy_from=first)
    gate.allow(1000)
    assert not storage.pull_checkpoint(machines("other") / "second")
    storage.push_to_bucket(machines("one") / "second", copy_from=machines("one") / "first")
    other = machines("other")
    assert storage.pull_checkpoint(other / "second") and storage.list_folders_containing(other) == [
        "first",
        "second",
    ]
    assert (other / "second" / "meta.json").read_text() == "meta.json new"
    assert (other / "second" / "a.bin").read_text() == "a.bin old"
    storage.delete_everywhere(other)


def test_a_drop_that_is_cut_off_leaves_no_checkpoint(bucket_server, machines) -> None:
    gate, _ = bucket_server
    storage.push_to_bucket(write_file(machines("one") / "run", "new"))
    gate.allow(1)
    with pytest.raises(InfrastructureError, match="ACCESS_DENIED"):
        storage.delete_remote(machines("one") / "run")
    assert gate.changes[0] == "DELETE meta.json" and len(gate.changes) > 1
    gate.allow(1000)
    assert_seen(machines("other") / "run", None)
    left = {entry.path.name for entry in storage.list_remote_files(machines("one") / "run")}
    assert left == {*FILES} - {"meta.json"}, "the next try deletes the rest"
    storage.delete_remote(machines("one") / "run")
    assert not storage.list_remote_files(machines("one") / "run")
    assert (machines("one") / "run" / "meta.json").exists(), "the caller keeps its local copy"


def test_a_machine_sees_a_new_checkpoint_only_when_all_of_it_is_there(
    bucket_server, machines
) -> None:
    """The old local copy stays while `meta.json` is the same; then all of it is replaced."""
    gate, _ = bucket_server
    storage.push_to_bucket(write_file(machines("one") / "run", "old"))
    assert_seen(machines("other") / "run", "old")
    path = write_file(machines("one") / "run", "new")
    gate.allow(2)
    with pytest.raises(InfrastructureError, match="ACCESS_DENIED"):
        storage.push_to_bucket(path)
    gate.allow(1000)
    assert_seen(machines("other") / "run", "old")
    storage.push_to_bucket(machines("one") / "run")
    assert_seen(machines("other") / "run", "new")
    storage.delete_everywhere(machines("one"))
    assert not machines("one").exists()
    assert_seen(machines("other") / "run", None)


def test_other_machines_learn_why_a_trial_failed(machines) -> None:
    path = machines("one")
    report = failure_report(KeyError("no"), tiny("at"), path)
    save_failure_report(path, report)
    there = machines("other")
    assert load_failure_report(there) == report and report["failed"] == "KeyError: 'no'"
    assert (
        storage.pull_file(there / TRACEBACK_FILE)
        and (there / TRACEBACK_FILE).read_text() == report["bug"]
    )
    clear_failure_report(there)
    assert load_failure_report(machines("one")) == {}
    storage.delete_everywhere(machines("one"))


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
        atomic_write_text(root / file, "{}")
        storage.push_to_bucket(root / file)
    other = machines("other")
    assert storage.list_folders_containing(other) == ["b"] and storage.list_folders_containing(
        other / "a"
    ) == ["deep"]
    assert storage.list_folders_containing(other, "other.json") == [
        "c"
    ] and storage.list_subfolders(other) == [".hidden", "a", "b", "c"]
    assert {str(path.relative_to(other)) for path in storage.iter_files(other / "a")} == {
        "a/deep/meta.json"
    }
    storage.delete_everywhere(other)
