"""The contract of stores, which a folder, an S3 bucket and a bucket of Google's protocol keep."""

import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import forked_processes
import pytest
from gcs_server import GcsServer, serve_gcs
from moto.backends import get_backend
from moto.server import DomainDispatcherApplication, ThreadedMotoServer, create_backend_app
from werkzeug.serving import make_server

from raysweep.cli import main
from raysweep.errors import SpecError
from raysweep.stores import (
    BucketStore,
    FolderStore,
    Store,
    StoreAccessRefused,
    StoredFile,
    StoredFileNotFound,
    StorePath,
    StoreUnavailable,
    VersionedContent,
    folder_store,
    open_path,
    open_store,
    require_conditional_writes,
)
from raysweep.stores.bucket_store import RetrySettings
from raysweep.stores.opening import parse_bucket_uri

PATIENCE = RetrySettings(total_seconds=20.0, request_seconds=10.0, longest_pause=0.1)


@pytest.fixture(scope="module")
def s3_host() -> Iterator[str]:
    """Host and port of an S3 server."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    assert server._server is not None
    answer, lock = server._server.app, threading.Lock()

    def answer_alone(environ: Any, start_response: Any) -> list[bytes]:
        # The server's check of a condition and the write after it are not one step.
        with lock:
            return list(answer(environ, start_response))

    server._server.app = answer_alone
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def gcs() -> Iterator[GcsServer]:
    with serve_gcs() as server:
        yield server


def create_s3_bucket(host: str, bucket: str) -> None:
    urlopen(Request(f"http://{host}/{bucket}", method="PUT")).read()


def open_bucket(uri: str) -> Store:
    """Open a bucket that may be unavailable for a short time only."""
    return BucketStore(parse_bucket_uri(uri), PATIENCE)


@pytest.fixture(params=["folder", "s3", "gs"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store of each kind, seen from a machine without copies of it."""
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "copy"))
    bucket = f"b{abs(hash(tmp_path))}"
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    if request.param == "s3":
        host = request.getfixturevalue("s3_host")
        create_s3_bucket(host, bucket)
        return open_bucket(f"s3://{bucket}/some/where?endpoint_override={host}&scheme=http")
    server = request.getfixturevalue("gcs")
    server.create_bucket(bucket)
    return open_bucket(
        f"gs://anonymous@{bucket}/some/where?endpoint_override={server.address}&scheme=http"
    )


def run_together(count: int, act: Callable[[int], object]) -> list[object]:
    """Call a function in several threads that start at the same moment."""
    barrier = threading.Barrier(count)

    def wait_and_act(number: int) -> object:
        barrier.wait()
        return act(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(wait_and_act, range(count)))


class TestStore:
    def test_a_file_is_read_as_it_was_written(self, store: Store) -> None:
        store.write_bytes("a/b c~%20$/x.json", b"first")
        store.write_bytes("a/b c~%20$/x.json", b"\0\xff second")
        assert store.read_bytes("a/b c~%20$/x.json") == b"\0\xff second"
        assert [(file.key, file.size) for file in store.list_files()] == [("a/b c~%20$/x.json", 9)]

    def test_a_file_that_is_missing_has_an_error_and_no_version(self, store: Store) -> None:
        store.write_bytes("a/x", b"")
        for key in ("x", "a", "a/x/y"):
            assert store.read_versioned(key) is None
            with pytest.raises(StoredFileNotFound, match="there is no such file"):
                store.read_bytes(key)
        assert store.replace("x", b"new", "1") is None
        store.delete("x")

    def test_one_of_eight_threads_creates_a_file(self, store: Store) -> None:
        versions = run_together(8, lambda number: store.create("a/claim", f"{number}".encode()))
        (winner,) = [number for number, version in enumerate(versions) if version is not None]
        assert store.read_versioned("a/claim") == VersionedContent(
            f"{winner}".encode(), str(versions[winner])
        )
        assert store.create("a/claim", b"late") is None

    def test_one_of_eight_threads_replaces_a_version(self, store: Store) -> None:
        first = store.create("claim", b"dead")
        assert first is not None
        versions = run_together(
            8, lambda number: store.replace("claim", f"{number}".encode(), first)
        )
        (winner,) = [number for number, version in enumerate(versions) if version is not None]
        assert store.read_versioned("claim") == VersionedContent(
            f"{winner}".encode(), str(versions[winner])
        )
        second = str(versions[winner])
        assert store.replace("claim", b"late", first) is None
        assert store.replace("claim", b"again", second) not in (None, second)

    def test_a_file_is_deleted_if_there_is_one(self, store: Store) -> None:
        store.write_bytes("a/claim", b"1")
        store.delete("a")
        assert store.read_bytes("a/claim") == b"1", "a folder is no file"
        store.delete("a/claim")
        store.delete("a/claim")
        assert store.read_versioned("a/claim") is None
        assert store.create("claim", b"1") is not None
        assert [file.key for file in store.list_files()] == ["claim"], "no other file is left"

    @pytest.mark.parametrize(
        "key", ["../x", "/abs", "a/../../x", "a//x", "./x", "a/.", "a/", "a\nb", "a\0b", ".."]
    )
    def test_what_is_no_key_is_refused(self, key: str, store: Store, tmp_path: Path) -> None:
        operations: list[Callable[[], object]] = [
            *list_operations(store, key),
            lambda: store.delete_folder(key),
            lambda: store.list_subfolders(key),
            lambda: store.list_checkpoints(key),
            lambda: store.delete_unfinished(key),
            lambda: store.read_matching(key, "*"),
            lambda: store.working_path(key),
        ]
        for operation in operations:
            with pytest.raises(SpecError, match="expected a path relative to its folder"):
                operation()
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    def test_a_path_stays_in_its_store(self, store: Store) -> None:
        folder = StorePath(store, "s1")
        (folder / "./a//b/").write_bytes(b"1")
        assert [file.key for file in store.list_files()] == ["s1/a/b"]
        for part in ("..", "../../x", "/etc/passwd"):
            with pytest.raises(SpecError, match="expected a path relative to its folder"):
                (folder / part).is_file()

    def test_files_are_listed_below_a_folder_and_by_pattern(self, store: Store) -> None:
        for key in ("s/trials/0/trial.json", "s/trials/1/trial.json", "s/trials/1/x/trial.json"):
            store.write_bytes(key, key.encode())
        store.write_bytes("s/trials2/0/trial.json", b"of a neighbour")
        keys = [file.key for file in store.list_files("s/trials")]
        assert keys == [
            "s/trials/0/trial.json",
            "s/trials/1/trial.json",
            "s/trials/1/x/trial.json",
        ]
        assert [file.key for file in store.list_files("s/trials", "*/trial.json")] == keys[:2]
        assert store.read_matching("s/trials", "*/trial.json") == {
            key: key.encode() for key in keys[:2]
        }
        assert len(store.list_files("", "**/trial.json")) == 4
        assert store.list_files("none") == [] and store.list_files("s", "none") == []

    def test_more_files_are_listed_than_a_server_sends_at_once(self, store: Store) -> None:
        if isinstance(store, BucketStore) and store.location.scheme == "s3":
            # The server runs in this process; requests for so many would take 7 s.
            backend = get_backend("s3")["123456789012"]["aws"]
            for number in range(1005):
                backend.put_object(store.location.bucket, f"some/where/f/{number:04d}", b"1")
        elif isinstance(store, FolderStore):
            (store.path / "f").mkdir(parents=True)
            for number in range(1005):
                (store.path / "f" / f"{number:04d}").write_bytes(b"1")
        else:
            for number in range(1005):
                store.write_bytes(f"f/{number:04d}", b"1")
        assert [file.key for file in store.list_files()] == [f"f/{n:04d}" for n in range(1005)]

    def test_subfolders_are_those_with_files_below_them(self, store: Store) -> None:
        for key in ("a/x/1", "a/y/z/2", "a/.hidden/3", "a/file", "ab/4"):
            store.write_bytes(key, b"")
        assert store.list_subfolders("a") == [".hidden", "x", "y"]
        assert store.list_subfolders("a/x") == [] and store.list_subfolders("none") == []
        found = [store.has_file(key) for key in ("a/file", "a/x/1", "a", "a/fi", "b")]
        assert found == [True, True, False, False, False]

    def test_a_folder_is_deleted_with_everything_in_it_and_its_neighbours_stay(
        self, store: Store
    ) -> None:
        for key in ("a/prefixes/k/x", "a/sweep/0/meta.json", "a2/x", "b"):
            store.write_bytes(key, b"1")
        store.delete_folder("a/prefixes")
        store.delete_folder("none")
        assert [file.key for file in store.list_files()] == ["a/sweep/0/meta.json", "a2/x", "b"]
        store.delete_folder("a")
        assert [file.key for file in store.list_files()] == ["a2/x", "b"]

    def test_a_checkpoint_comes_back_whole(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_checkpoint(store, "run/epoch-1", "one")
        assert read_checkpoint(store, "run/epoch-1") == content("one")
        monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "another machine"))
        assert read_checkpoint(store, "run/epoch-1") == content("one")
        write_checkpoint(store, "run/epoch-1", "two")
        monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "copy"))
        assert read_checkpoint(store, "run/epoch-1") == content("two")
        store.delete_folder("run/epoch-1")
        assert store.fetch_checkpoint("run/epoch-1") is None
        assert store.list_files() == []

    def test_a_checkpoint_without_its_meta_file_is_none(self, store: Store) -> None:
        write_checkpoint(store, "run/epoch-1", "one")
        write_checkpoint(store, "run/epoch-2", "two")
        store.delete("run/epoch-1/meta.json")
        assert store.fetch_checkpoint("run/epoch-1") is None
        (checkpoint,) = store.list_checkpoints("run")
        assert checkpoint.key == "run/epoch-2"
        assert checkpoint.size == sum(len(data) for data in content("two").values())

    def test_a_checkpoint_that_is_given_up_leaves_nothing(self, store: Store) -> None:
        with pytest.raises(ZeroDivisionError), store.write_checkpoint("run/epoch-1") as folder:
            (folder / "meta.json").write_bytes(b"{}")
            raise ZeroDivisionError
        assert store.fetch_checkpoint("run/epoch-1") is None
        assert store.list_checkpoints("run") == []
        store.delete_unfinished("run")
        assert not list(store.working_path("run").glob(".epoch*"))

    def test_a_copied_checkpoint_has_its_own_meta_file(self, store: Store) -> None:
        write_checkpoint(store, "run/epoch-1", "one")
        with store.write_checkpoint("prefixes/key", copy_from="run/epoch-1") as folder:
            assert sorted(file.name for file in folder.iterdir()) == ["a.bin", "weights.bin"]
            (folder / "meta.json").write_bytes(b"meta two")
        expected = content("one") | {"meta.json": b"meta two"}
        assert read_checkpoint(store, "prefixes/key") == expected
        assert read_checkpoint(store, "run/epoch-1") == content("one")
        with (
            pytest.raises(FileNotFoundError),
            store.write_checkpoint("prefixes/other", copy_from="run/none"),
        ):
            pass

    def test_no_file_of_an_earlier_checkpoint_stays(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with store.write_checkpoint("run/last") as folder:
            for name in ("meta.json", "old.bin"):
                (folder / name).write_bytes(b"old")
        write_checkpoint(store, "run/last", "one")
        monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "another machine"))
        assert read_checkpoint(store, "run/last") == content("one")

    def test_a_checkpoint_of_another_process_stays_if_it_was_there_first(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with store.write_checkpoint("prefixes/key", overwrite=False) as folder:
            for name, data in content("late").items():
                (folder / name).write_bytes(data)
            with monkeypatch.context() as patch:
                # The names of unfinished folders contain the process.
                patch.setattr(os, "getpid", lambda: 1)
                write_checkpoint(store, "prefixes/key", "first")
        assert read_checkpoint(store, "prefixes/key") == content("first")

    def test_a_checkpoint_that_is_replaced_during_a_download_is_not_mixed(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_checkpoint(store, "run/last", "the first and longer one")
        monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "reader"))
        writer, list_files = pickle.loads(pickle.dumps(store)), store.list_files
        texts = ["two", "three"]

        def replace_after_listing(prefix: str = "", pattern: str = "**/*") -> list[StoredFile]:
            files = list_files(prefix, pattern)
            if texts:
                with monkeypatch.context() as patch:
                    patch.setenv("RAYSWEEP_CACHE", str(tmp_path / "writer"))
                    write_checkpoint(writer, "run/last", texts.pop(0))
            return files

        monkeypatch.setattr(store, "list_files", replace_after_listing)
        expected = content(
            "three" if isinstance(store, BucketStore) else "the first and longer one"
        )
        assert read_checkpoint(store, "run/last") == expected

    def test_names_with_words_of_error_messages_are_names(self, store: Store) -> None:
        for name in ("credential-lab", "NoSuchBucket", "token request", "AccessDenied 4"):
            key = f"{name}/sweep.json"
            assert not store.has_file(key) and store.read_versioned(key) is None
            version = store.create(key, b"1")
            assert version is not None and store.create(key, b"2") is None
            assert store.replace(key, b"2", version) is not None
            store.delete(key)
            assert store.list_files(name) == []

    def test_the_least_recently_used_checkpoint_is_told(self, store: Store) -> None:
        for key in ("a", "b"):
            write_checkpoint(store, f"p/{key}", key)
        write_checkpoint(store, "p/.hidden", "c")
        listed = {entry.key: entry.last_used for entry in store.list_checkpoints("p")}
        assert list(listed) == ["p/a", "p/b"]
        assert all(abs(last_used - time.time()) < 60 for last_used in listed.values())


FILES = ("a.bin", "meta.json", "weights.bin")


def content(text: str) -> dict[str, bytes]:
    return {name: f"{name} {text}".encode() for name in FILES}


def write_checkpoint(store: Store, key: str, text: str) -> None:
    with store.write_checkpoint(key) as folder:
        for name, data in content(text).items():
            (folder / name).write_bytes(data)


def read_checkpoint(store: Store, key: str) -> dict[str, bytes]:
    folder = store.fetch_checkpoint(key)
    assert folder is not None
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def count_up(location: str, times: int) -> None:
    """Add 1 to a number in a file again and again, in a process of its own."""
    store = open_store(location)
    for _ in range(times):
        while True:
            current = store.read_versioned("number")
            assert current is not None
            new = str(int(current.data) + 1).encode()
            if store.replace("number", new, current.version) is not None:
                break


def test_no_update_of_four_processes_in_a_folder_is_lost(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write_bytes("number", b"0")
    processes = [forked_processes.start_function(count_up, str(tmp_path), 5) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert store.read_bytes("number") == b"20"
    assert [file.name for file in tmp_path.iterdir()] == ["number"], "no lock is left"


def list_operations(store: Store, key: str = "a") -> list[Callable[[], object]]:
    return [
        lambda: store.read_bytes(key),
        lambda: store.read_versioned(key),
        lambda: store.read_matching(key, "*"),
        lambda: store.write_bytes(key, b"1"),
        lambda: store.create(key, b"1"),
        lambda: store.replace(key, b"1", "1"),
        lambda: store.delete(key),
        lambda: store.list_files(key),
        lambda: store.list_subfolders(key),
        lambda: store.fetch_checkpoint(key),
        lambda: write_checkpoint(store, key, "text"),
    ]


class TestFolder:
    """Errors of a file system are those of a bucket."""

    def test_a_file_system_that_reports_an_error(self, tmp_path: Path) -> None:
        store = FolderStore(tmp_path)
        (tmp_path / "loop").symlink_to("loop")
        (tmp_path / "file").write_bytes(b"1")
        for key in ("loop/x", "file/x"):
            for write in (
                lambda key=key: store.write_bytes(key, b"1"),
                lambda key=key: store.create(key, b"1"),
                lambda key=key: write_checkpoint(store, key, "text"),
            ):
                with pytest.raises(StoreUnavailable) as caught:
                    write()
                (line,) = caught.value.problems
                assert line.startswith(f"{tmp_path / key}: ") and "\n" not in line
                assert isinstance(caught.value.__cause__, OSError)
        with pytest.raises(StoreUnavailable, match="symbolic links"):
            store.read_bytes("loop")

    @pytest.mark.skipif(not Path("/proc/sys").exists(), reason="needs a read-only file system")
    def test_a_file_system_that_refuses_writes(self) -> None:
        store = FolderStore(Path("/proc/sys"))
        with pytest.raises((StoreAccessRefused, StoreUnavailable), match=r"^/proc/sys/a: "):
            store.write_bytes("a", b"1")

    def test_an_error_of_the_writer_of_a_checkpoint_stays_what_it_is(self, tmp_path: Path) -> None:
        store = FolderStore(tmp_path)
        with (
            pytest.raises(BlockingIOError) as caught,
            store.write_checkpoint("a"),
        ):
            raise BlockingIOError("of the caller")
        assert caught.value.__cause__ is None and caught.value.__context__ is None

    def test_a_stopped_process_does_not_keep_a_file_for_ever(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(folder_store.hold_file_lock.__wrapped__, "__defaults__", (0.3,))
        holder = forked_processes.start_function(hold_file_lock, tmp_path)
        try:
            wait_for(tmp_path / "held", holder)
            holder.send_signal(signal.SIGSTOP)
            store = FolderStore(tmp_path)
            for operation in (
                lambda: store.create("x", b"2"),
                lambda: store.replace("x", b"2", "1"),
            ):
                with pytest.raises(
                    StoreUnavailable, match=rf"x: process {holder.pid} on .* kept it locked for"
                ):
                    operation()
            assert store.create("y", b"2") is not None, "other files are free"
        finally:
            holder.kill()
        assert store.create("x", b"2") is not None


def hold_file_lock(folder: Path) -> None:
    """Hold the lock of the file `x` until this process is killed."""
    with folder_store.hold_file_lock(folder / "x"):
        (folder / "held").touch()
        time.sleep(600)


def wait_for(file: Path, process: forked_processes.ForkedProcess) -> None:
    deadline = time.monotonic() + 600
    while not file.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.err
        time.sleep(0.01)


@contextmanager
def refusing(store: BucketStore, request: pytest.FixtureRequest) -> Iterator[None]:
    """Let a server refuse all requests."""
    if store.location.scheme == "gs":
        server = request.getfixturevalue("gcs")
        server.refuses = True
        try:
            yield
        finally:
            server.refuses = False
        return

    def check_credentials_after(n_requests: str) -> None:
        url = f"http://{request.getfixturevalue('s3_host')}/moto-api/reset-auth"
        urlopen(Request(url, n_requests.encode(), {"Content-Type": "text/plain"})).read()

    check_credentials_after("0")
    try:
        yield
    finally:
        check_credentials_after("inf")


@pytest.mark.parametrize("store", ["s3", "gs"], indirect=True)
def test_a_refusal_is_an_error_of_its_own_at_once(
    store: BucketStore, request: pytest.FixtureRequest
) -> None:
    with refusing(store, request):
        for operation in list_operations(store):
            with pytest.raises(StoreAccessRefused, match="credentials come from the environment"):
                operation()


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_an_outage_is_an_error_of_its_own_after_a_while(scheme: str, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        login = "anonymous@" if scheme == "gs" else ""
        uri = f"{scheme}://{login}bucket/x?endpoint_override={address}&scheme=http"
        store = BucketStore(parse_bucket_uri(uri), RetrySettings(0.3, 0.2, 0.1))
        operations = list_operations(store)
        began = time.monotonic()
        with ThreadPoolExecutor(len(operations)) as pool:
            for answer in [pool.submit(operation) for operation in operations]:
                with pytest.raises(StoreUnavailable, match="the bucket does not answer"):
                    answer.result()
        assert time.monotonic() - began > 0.3


def test_an_upload_whose_answer_is_lost_is_not_taken_for_anothers(gcs: GcsServer) -> None:
    gcs.create_bucket("lost")
    store = open_bucket(f"gs://anonymous@lost/x?endpoint_override={gcs.address}&scheme=http")
    gcs.n_answers_to_lose = 1
    first = store.create("claim", b"1")
    assert gcs.n_answers_to_lose == 0 and first is not None
    assert store.read_versioned("claim") == VersionedContent(b"1", first)
    gcs.n_answers_to_lose = 1
    second = store.replace("claim", b"2", first)
    assert store.read_versioned("claim") == VersionedContent(b"2", str(second))
    assert store.create("claim", b"3") is None


class IgnoringServer:
    """An S3 server that writes objects whatever the conditions of requests are."""

    def __init__(self) -> None:
        self._application = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        environ.pop("HTTP_IF_NONE_MATCH", None)
        environ.pop("HTTP_IF_MATCH", None)
        return self._application(environ, start_response)


@pytest.fixture(params=["s3", "gs"])
def ignoring_uri(request: pytest.FixtureRequest) -> Iterator[str]:
    """A bucket without conditional writes."""
    if request.param == "gs":
        server = request.getfixturevalue("gcs")
        server.create_bucket("ignoring")
        server.ignores_conditions = True
        yield f"gs://anonymous@ignoring/x?endpoint_override={server.address}&scheme=http"
        server.ignores_conditions = False
        return
    server = make_server("127.0.0.1", 0, IgnoringServer(), threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    create_s3_bucket(f"127.0.0.1:{server.port}", "ignoring")
    yield f"s3://ignoring/x?endpoint_override=127.0.0.1:{server.port}&scheme=http"
    server.shutdown()
    thread.join()


def test_a_bucket_without_conditional_writes_is_refused_in_one_line(
    ignoring_uri: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workdir / "small.yaml").write_text("stages: [{kind: tune, space: at, trials: 1}]")
    for command in (["tune", "at"], ["train", "at"], ["run", "small.yaml"]):
        assert main([*command, "--storage", ignoring_uri]) == 3, command
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "overwrites a file" in line and "conditional writes" in line
    assert open_path(ignoring_uri).list_files() == [], "the probe is gone"


@pytest.mark.needs_ray
def test_doctor_finds_a_bucket_without_conditional_writes(
    ignoring_uri: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--storage", ignoring_uri]) == 3
    out = capsys.readouterr().out
    assert "BROKEN storage" in out and "overwrites a file" in out
    assert open_path(ignoring_uri).list_files() == [], "the probe is gone"


@pytest.mark.parametrize("store", ["s3", "gs"], indirect=True)
def test_a_bucket_with_conditional_writes_is_accepted(store: BucketStore) -> None:
    path = open_path(store.uri)
    require_conditional_writes(path)
    assert path.list_files() == []
