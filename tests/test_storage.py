"""Buckets, against real servers of both protocols: whole checkpoints or none, machines that share
nothing else.
"""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from urllib.request import Request, urlopen

import forked_processes
import optuna
import pytest
import torch
from conftest import tiny
from forked_processes import ForkedProcess
from gcs_server import serve_gcs
from moto.backends import get_backend
from moto.server import ThreadedMotoServer
from process_tree import find_descendants
from pyarrow import fs
from safetensors.torch import load_file
from test_prefix import record_answers, wait_for_refusals
from test_workers import in_processes

from raysweep.atomic_files import atomic_write_text
from raysweep.bucket_lease import BucketLease, LeaseTimes
from raysweep.cli import main
from raysweep.errors import DamagedFileError
from raysweep.leases import hold_folder_lease
from raysweep.spec import SpecError
from raysweep.stores import BucketStore, StorePath, StoreUnavailable, local_copies, open_path
from raysweep.stores.bucket_store import RetrySettings
from raysweep.stores.opening import parse_bucket_uri
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.trial import Trial
from raysweep.training import checkpoint, prefix_cache
from raysweep.training.callbacks import FunctionCallback
from raysweep.training.checkpoint import META_FILE, WEIGHTS_FILE, RunDirectory
from raysweep.training.config import TrainingConfig
from raysweep.training.distributed import DistributedWorkerGroup
from raysweep.training.prefix_cache import PrefixCache
from raysweep.training.trainer import train_model

LAM, BURN_IN = "method__terms__pgd__weight__lam", "method__terms__pgd__weight__burn_in"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Host and port of an S3 server."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def gs() -> Iterator[str]:
    """Host and port of a server of Google's storage protocol."""
    with serve_gcs() as server:
        yield server.address


def bucket_on(host: str, protocol: str, tmp_path: Path) -> str:
    """The URI of a place in a new bucket."""
    bucket = f"b{abs(hash(tmp_path))}"
    urlopen(Request(f"http://{host}/{bucket}", method="PUT")).read()
    login = "anonymous@" if protocol == "gs" else ""
    return f"{protocol}://{login}{bucket}/some/where?endpoint_override={host}&scheme=http"


@pytest.fixture
def uri(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of its own, seen from a machine without a copy of it."""
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "copy"))
    return bucket_on(s3, "s3", tmp_path)


@pytest.fixture(params=["s3", "gs"])
def any_uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, of either protocol."""
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "copy"))
    return bucket_on(request.getfixturevalue(request.param), request.param, tmp_path)


def join_uri(uri: str, *steps: str) -> str:
    path, _, query = uri.partition("?")
    return "/".join((path, *steps)) + (f"?{query}" if query else "")


def delete_local_copy(tmp_path: Path) -> None:
    """As on another machine."""
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)


def make_objects_older(uri: str) -> None:
    """Make objects that are written later newer than those of now, also in S3, which keeps times in
    whole seconds.
    """
    location = parse_bucket_uri(uri)
    if location.scheme == "s3":
        bucket = get_backend("s3")["123456789012"]["aws"].buckets[location.bucket]
        for stored in bucket.keys.values():
            stored.last_modified -= timedelta(seconds=2)
    else:
        time.sleep(0.002)


def in_bucket(path: StorePath) -> list[str]:
    return [file.key.removeprefix(f"{path.key}/") for file in path.list_files()]


@pytest.mark.parametrize(
    "where",
    [
        "s3://b",
        "s3://b/x/y",
        "gs://b/x",
        "gs://anonymous@b/x",
        "s3://b/x~1/y?endpoint_override=h:1&scheme=http",
    ],
)
def test_a_place_has_one_name_on_every_machine(where: str) -> None:
    path = open_path(where)
    assert path.local_path is None and str(path) == where
    assert str(path / "s" / "trials") == join_uri(where, "s", "trials")
    assert not set("?&=%") & set(str(path.working_path)), "Ray takes paths for URIs"


def test_the_variables_of_amazons_tools_name_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    assert str(open_path("s3://b/x")) == "s3://b/x?endpoint_override=minio:9000&scheme=http"
    assert str(open_path("s3://b/x?endpoint_override=h")) == "s3://b/x?endpoint_override=h"
    assert str(open_path("gs://b/x")) == "gs://b/x"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "minio:9000")
    with pytest.raises(
        SpecError, match=r"AWS_ENDPOINT_URL_S3: expected http://HOST:PORT or https://"
    ):
        open_path("s3://b/x")


def test_a_checkpoint_comes_back_on_another_machine(any_uri: str, tmp_path: Path) -> None:
    config, path = tiny("at", epochs=3), open_path(any_uri) / "run"
    there = train_model(config, path)
    alone = train_model(config, tmp_path / "alone")
    kept = {f"epoch-{epoch:04d}" for epoch in (3, there.best_checkpoint.epoch)}
    assert {Path(name).parts[0] for name in in_bucket(path)} == {*kept, "histograms"}
    delete_local_copy(tmp_path)
    last = RunDirectory(path).read_last_checkpoint()
    assert last is not None and last.epoch == 3 and last.config == config
    one, two = (
        load_file(saved.local_folder / WEIGHTS_FILE) for saved in (last, alone.last_checkpoint)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    delete_local_copy(tmp_path)
    rows = []
    train_model(
        tiny("at", epochs=3), path, FunctionCallback(lambda metrics, saved: rows.append(metrics))
    )
    assert rows == last.history, "nothing is trained again"


def test_what_earlier_versions_wrote_is_read(uri: str) -> None:
    """They used pyarrow, which leaves empty objects for folders."""
    host = uri.partition("endpoint_override=")[2].partition("&")[0]
    files = fs.S3FileSystem(endpoint_override=host, scheme="http", allow_delayed_open=True)
    root = open_path(uri) / "s"
    bucket_path = f"{parse_bucket_uri(uri).bucket}/{root.key}"

    def write(key: str) -> None:
        with files.open_output_stream(f"{bucket_path}/{key}") as stream:
            stream.write(key.encode())

    for key in ("sweep.json", "trials/0000/trial.json", "trials/0000/epoch-0001/meta.json"):
        write(key)
    write("trials/0000/epoch-0001/weights.bin")
    write("trials/0000/epoch-0002/meta.json")
    files.delete_file(f"{bucket_path}/trials/0000/epoch-0002/meta.json")
    write("gone/x")
    files.delete_file(f"{bucket_path}/gone/x")
    assert in_bucket(root) == [
        "sweep.json",
        "trials/0000/epoch-0001/meta.json",
        "trials/0000/epoch-0001/weights.bin",
        "trials/0000/trial.json",
    ]
    assert (root / "trials" / "0000").list_folders_containing() == ["epoch-0001"]
    folder = (root / "trials" / "0000" / "epoch-0001").fetch_checkpoint()
    assert folder is not None
    assert sorted(file.name for file in folder.iterdir()) == ["meta.json", "weights.bin"]
    root.delete_folder()
    assert in_bucket(root) == []


def test_half_a_push_is_no_checkpoint(any_uri: str, tmp_path: Path) -> None:
    config, path = tiny("at", epochs=2), open_path(any_uri) / "run"
    train_model(tiny("at", epochs=2), path, FunctionCallback(lambda metrics, saved: None))
    whole = checkpoint.read_checkpoint(path / "epoch-0002")
    # The process dies between two files: of a push, and of a drop.
    for file in (path / "epoch-0002" / META_FILE, path / "epoch-0002" / "state.safetensors"):
        file.delete()
        assert 2 not in RunDirectory(path).list_saved_epochs()
        assert (path / "epoch-0002").fetch_checkpoint() is None
        assert not (path / "epoch-0002").working_path.exists()
    assert "epoch-0002/weights.safetensors" in in_bucket(path)
    again = train_model(config, path).last_checkpoint
    assert again.history[-1]["robust_worst"] == whole.last_metrics["robust_worst"]
    assert (
        again.meta["sha256"] == whole.meta["sha256"]
        and RunDirectory(path).list_saved_epochs()[-1] == 2
    )


def test_what_the_bucket_has_wins_over_an_old_copy(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = open_path(uri) / "run"
    train_model(tiny("at", epochs=1), path)
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "other machine"))
    other = open_path(uri) / "run"
    (other / "epoch-0001").delete_folder()
    train_model(tiny("at", epochs=1, seed=1), other)
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "copy"))
    old = json.loads((path / "epoch-0001" / META_FILE).working_path.read_text())
    assert old["config"]["seed"] == 0
    assert checkpoint.read_checkpoint(path / "epoch-0001").config.seed == 1


def test_a_damaged_object_is_one_line_with_its_uri(any_uri: str, tmp_path: Path) -> None:
    path = open_path(any_uri) / "run"
    train_model(tiny("at", epochs=1), path)
    (path / "epoch-0001" / WEIGHTS_FILE).write_bytes(b"half")
    delete_local_copy(tmp_path)
    with pytest.raises(DamagedFileError) as error:
        checkpoint.read_checkpoint(path / "epoch-0001")
    assert str(error.value).startswith(
        join_uri(any_uri, "run", "epoch-0001")
    ) and "truncated or altered" in str(error.value)


def train_beside_another(config: TrainingConfig, uri: str, name: str, told: Path) -> None:
    """What each of two machines does; the rows that were reported go to the file `told`."""
    torch.set_num_threads(1)
    prefix_cache._BUCKET_POLL_SECONDS = 0.1
    rows: list[dict[str, float]] = []
    root = open_path(uri)
    train_model(
        config,
        root / name,
        FunctionCallback(lambda metrics, saved: rows.append(metrics)),
        prefix_cache=PrefixCache(root / ".prefixes"),
    )
    told.write_text(json.dumps(rows))


def test_two_machines_train_a_common_prefix_once(any_uri: str, tmp_path: Path) -> None:
    configs = [tiny("gairat", epochs=3, **{BURN_IN: 2, LAM: lam}) for lam in (-1.0, 1.0)]
    told = [tmp_path / f"{number}.json" for number in range(2)]
    processes = [
        forked_processes.start_function(
            train_beside_another,
            config,
            any_uri,
            str(number),
            told[number],
            environment={"RAYSWEEP_CACHE": str(tmp_path / f"machine{number}")},
        )
        for number, config in enumerate(configs)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    rows = [json.loads(file.read_text()) for file in told]
    assert sum(not row.get("shared") for part in rows for row in part) == 2 + 1 + 1
    assert [row["robust_worst"] for row in rows[0][:2]] == [
        row["robust_worst"] for row in rows[1][:2]
    ]
    alone = train_model(configs[1], tmp_path / "alone").last_checkpoint
    assert (
        checkpoint.read_checkpoint(open_path(any_uri) / "1" / "epoch-0003").meta["sha256"]
        == alone.meta["sha256"]
    )
    leases = open_path(any_uri).read_matching("**/*.lease").values()
    assert leases and all(json.loads(lease)["released"] for lease in leases)


def test_a_living_owners_claim_is_waited_for(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefixes, got = PrefixCache(open_path(uri) / ".prefixes"), []
    answers = record_answers(monkeypatch, BucketLease)
    monkeypatch.setattr("raysweep.training.prefix_cache._BUCKET_POLL_SECONDS", 0.1)
    state = train_model(tiny("at", epochs=1), open_path(uri) / "run").last_checkpoint.path

    def second() -> None:
        with prefixes.acquire_training_lease("key") as ours:
            got.append(ours)

    with prefixes.acquire_training_lease("key") as ours:
        assert ours
        thread = threading.Thread(target=second)
        thread.start()
        wait_for_refusals(answers, 3, thread)
        assert not got and thread.is_alive()
        prefixes.store_state("key", state)
    thread.join()
    assert got == [False]


def test_a_run_that_waits_for_a_state_leaves_alone_what_is_being_stored(
    any_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials of one machine share its copy of the bucket: one stores a state, another asks for it
    again and again.
    """
    prefixes, asked = PrefixCache(open_path(any_uri) / ".prefixes"), []
    state = train_model(tiny("at", epochs=1), open_path(any_uri) / "run").last_checkpoint

    def ask_before(do):
        def step(*arguments: object) -> object:
            asked.append(prefixes.find_state("key"))
            return do(*arguments)

        return step

    for name in ("_copy", "_upload"):
        monkeypatch.setattr(BucketStore, name, ask_before(getattr(BucketStore, name)))
    prefixes.store_state("key", state.path)
    assert asked == [None] * 3, "before each of its files, meta.json last"
    stored = prefixes.find_state("key")
    assert stored is not None and checkpoint.read_checkpoint(stored).meta == state.meta


def test_of_two_processes_that_download_the_same_the_second_leaves_the_firsts_copy(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = train_model(tiny("at", epochs=1), open_path(uri) / "run").last_checkpoint
    folder = saved.local_folder
    shutil.move(folder, tmp_path / "first")
    first, place_copy = (tmp_path / "first").stat().st_ino, local_copies.place_copy

    def place_second(partial: Path, target: Path) -> None:
        (tmp_path / "first").rename(target)
        place_copy(partial, target)

    monkeypatch.setattr(local_copies, "place_copy", place_second)
    assert saved.path.fetch_checkpoint() == folder and folder.stat().st_ino == first
    names = [file.name for file in folder.parent.iterdir() if "epoch" in file.name]
    assert names == [folder.name]


def test_two_at_once_in_one_folder_of_a_bucket(uri: str) -> None:
    sweep, times = open_path(uri) / "g1", LeaseTimes(renewal_interval=0.1, expires_after=5.0)
    with (
        hold_folder_lease(sweep, times),
        pytest.raises(SpecError, match=rf"'g1' is running already \(process {os.getpid()} on "),
        hold_folder_lease(sweep, times),
    ):
        pass
    with hold_folder_lease(sweep, times):
        assert in_bucket(sweep) == [".claims/alone.lease"]
    assert in_bucket(sweep) == [".claims/alone.lease"]
    assert (sweep / ".claims/alone.lease").read_json()["released"] is True


def test_a_bucket_of_prefixes_that_is_full_forgets_the_oldest(any_uri: str, tmp_path: Path) -> None:
    state = train_model(
        tiny("at", epochs=1), open_path(any_uri) / "run"
    ).last_checkpoint.local_folder
    size = sum(file.stat().st_size for file in state.iterdir())
    run = open_path(any_uri) / "run" / "epoch-0001"
    prefixes = PrefixCache(open_path(any_uri) / ".prefixes", max_bytes=int(2.5 * size))
    for key in ("a", "b", "c"):
        make_objects_older(any_uri)
        prefixes.store_state(key, run)
    assert prefixes.path.list_folders_containing() == ["b", "c"]
    delete_local_copy(tmp_path)
    assert prefixes.find_stored_positions(["b", "a", "c"]) == [2, 0]
    assert prefixes.find_state("a") is None and prefixes.find_state("b") is not None


def test_copies_are_kept_small_and_come_again(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_copies, "_MAX_BYTES", 1)
    first, second = (
        train_model(tiny("at", epochs=1), open_path(uri) / name).last_checkpoint
        for name in ("first", "second")
    )
    copies = [saved.path.working_path for saved in (first, second)]
    assert all(copy.exists() for copy in copies), "both are in use"
    two_hours_ago = time.time() - 7200
    os.utime(copies[0], (two_hours_ago, two_hours_ago))
    third = train_model(tiny("at", epochs=1), open_path(uri) / "third").last_checkpoint
    assert third.path.working_path.exists()
    assert copies[1].exists() and not copies[0].exists()
    assert checkpoint.read_checkpoint(first.path).meta == first.meta


def test_copies_are_counted_again_only_near_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "cache"))
    bucket = local_copies.bucket_copies_folder("s3://", "b")
    counts = []
    evict_copies = local_copies.evict_copies
    monkeypatch.setattr(local_copies, "evict_copies", lambda: counts.append(evict_copies()))

    def place(name: str, n_bytes: int) -> None:
        partial = bucket / f".{name}"
        partial.mkdir(parents=True)
        (partial / "meta.json").write_text("{}" + " " * (n_bytes - 2))
        local_copies.place_copy(partial, bucket / name)

    for number in range(5):
        place(f"c{number}", 100 + number)
    assert len(counts) == 1, "only the first, of whose cache nothing was known"
    total = sum(file.stat().st_size for file in bucket.rglob("meta.json"))
    assert total == 510 and int((tmp_path / "cache" / ".bytes").read_text()) == total
    monkeypatch.setattr(local_copies, "_MAX_BYTES", 600)
    place("c5", 80)
    assert len(counts) == 1
    os.utime(bucket / "c0", (0, 0))
    place("c6", 80)
    assert len(counts) == 2 and not (bucket / "c0").exists() and (bucket / "c1").exists()
    assert int((tmp_path / "cache" / ".bytes").read_text()) == 510 + 80 + 80 - 100


def test_a_copy_that_another_process_has_just_used_is_not_evicted(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is used between the moment at which its age is read and its turn to be deleted."""
    saved = train_model(tiny("at", epochs=1), open_path(uri) / "run").last_checkpoint
    two_hours_ago = time.time() - 7200
    os.utime(saved.path.working_path, (two_hours_ago, two_hours_ago))
    monkeypatch.setattr(local_copies, "_MAX_BYTES", 1)
    locked = local_copies._hold_copies_lock

    def use_first() -> AbstractContextManager[None]:
        monkeypatch.setattr(local_copies, "_hold_copies_lock", locked)
        assert saved.path.fetch_checkpoint() is not None
        return locked()

    monkeypatch.setattr(local_copies, "_hold_copies_lock", use_first)
    local_copies.evict_copies()
    assert local_copies._hold_copies_lock is locked and saved.path.working_path.exists()
    os.utime(saved.path.working_path, (two_hours_ago, two_hours_ago))
    local_copies.evict_copies()
    assert not saved.path.working_path.exists()


def on_its_own_machine(uri: str, root: Path) -> None:
    """What each of two workers does."""
    workers = DistributedWorkerGroup()
    os.environ["RAYSWEEP_CACHE"] = str(root / f"machine{workers.rank}")
    for epochs in (2, 2):
        fitted = train_model(tiny("at", epochs=epochs), open_path(uri) / "run", workers=workers)
    (root / f"{workers.rank}.json").write_text(
        json.dumps([fitted.last_checkpoint.history, fitted.best_checkpoint.meta["sha256"]])
    )


def test_two_workers_on_two_machines_need_only_the_bucket(uri: str, tmp_path: Path) -> None:
    in_processes(2, on_its_own_machine, uri, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second and len(first[0]) == 2
    assert RunDirectory(open_path(uri) / "run").list_saved_epochs()[-1] == 2


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("ftp://host/x", "ftp://host/x: expected a folder, s3://BUCKET/PATH or gs://BUCKET/PATH"),
        ("s3:///x", "expected a folder, s3://BUCKET/PATH"),
        ("s3://b/../../x", "expected a folder, s3://BUCKET/PATH"),
        ("s3://b/x?endpoint=h", "no option of s3:// URIs 'endpoint'; nearest: endpoint_override"),
        ("s3://me:secret@b/x", "s3://...@b: credentials belong in the environment"),
        ("s3://no-such-bucket/x?{s3}", "there is no bucket 'no-such-bucket'"),
        ("gs://anonymous@no-such-bucket/x?{gs}", "there is no bucket 'no-such-bucket'"),
        ("s3://b/x?endpoint_override=127.0.0.1:9&scheme=http", "does not answer"),
        (
            "gs://anonymous@b/x?endpoint_override=127.0.0.1:9&scheme=http&retry_limit_seconds=0.2",
            "does not answer",
        ),
        ("gs://b/x?{gs}", "credentials come from the environment"),
    ],
)
def test_a_place_that_cannot_be_is_one_line_before_anything_runs(
    where: str, line: str, s3: str, gs: str, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(workdir / "none.json"))
    queries = {
        name: f"endpoint_override={host}&scheme=http" for name, host in (("s3", s3), ("gs", gs))
    }
    malformed = ("credentials belong", "expected a folder", "no option of")
    code = 2 if any(words in line for words in malformed) else 3
    assert main(["tune", "lrat", "--storage", where.format(**queries)]) == code
    out, err = capsys.readouterr()
    (message,) = err.strip().splitlines()
    assert message.startswith("raysweep: error: ") and line in message
    assert "secret" not in message and out == "" and not list(workdir.iterdir())


def test_credentials_that_are_refused_are_one_line(uri: str, workdir: Path, capsys) -> None:
    """The server takes any credentials until it is told to check them."""

    def check_from(request: str) -> None:
        host = uri.partition("endpoint_override=")[2].partition("&")[0]
        urlopen(
            Request(
                f"http://{host}/moto-api/reset-auth",
                request.encode(),
                {"Content-Type": "text/plain"},
            )
        ).read()

    check_from("0")
    try:
        assert main(["tune", "lrat", "--storage", uri]) == 3
    finally:
        check_from("inf")
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert (
        "credentials come from the environment" in message
        and os.environ["AWS_SECRET_ACCESS_KEY"] not in message
    )


def tune(folder: Path, *arguments: str) -> ForkedProcess:
    """A driver on a machine of its own: its folder, its copy of the bucket."""
    folder.mkdir()
    return forked_processes.start_command(
        ["tune", "gairat", *arguments], folder, {"RAYSWEEP_CACHE": str(folder / "copy")}
    )


@pytest.fixture(scope="module")
def nodes_copy() -> Path:
    """Where the nodes of the session's cluster keep their copies; theirs is the environment that it
    started in.
    """
    return Path(os.environ["RAYSWEEP_CACHE"])


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_sweep_goes_on_elsewhere_from_the_bucket_alone(
    nodes_copy: Path,
    ray_cluster,
    one_core,
    empty_store,
    uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    store = f"sqlite:///{tmp_path}/shared.db"
    empty_store(tmp_path / "shared.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    settings = (
        "epochs=6",
        "data.train_size=320",
        "data.val_size=50",
        "*.attacks.*.steps=3",
        "validation.finish.*.steps=2",
        "validation.finish.*.runs=1",
        "finalists=0",
        "base_runs=0",
    )
    small = [part for setting in settings for part in ("--set", setting)]
    study = f"sqlite:///{tmp_path}/optuna.db"
    places = ["--storage", uri, "--optuna", study]
    process = tune(tmp_path / "one", *small, "--trials", "4", "--name", "s", *places)
    sweep, deadline = open_path(uri) / "s", time.monotonic() + 600
    trials: list[Trial] = []
    while sum(trial.epoch for trial in trials) < 5 or all(
        trial.state == "running" for trial in trials
    ):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.3)
        trials = Ledger.open(sweep).load_trials() if (sweep / "sweep.json").is_file() else []
    process.kill()
    before = {trial.number: trial for trial in Ledger.open(sweep).load_trials()}
    assert {trial.state for trial in before.values()} > {"running"}, (
        "some have ended, some have not"
    )
    deadline = time.monotonic() + 600
    while find_descendants("ray::Implicit"):
        assert time.monotonic() < deadline, "the cluster ends the trials of a driver that is gone"
        time.sleep(0.1)
    shutil.rmtree(nodes_copy / sweep.working_path.relative_to(tmp_path / "copy").parts[0])
    shutil.rmtree(tmp_path / "one")

    again = tune(tmp_path / "two", "--resume", "s", "--json", *places)
    assert again.wait(300) == 0, again.err
    trials = Ledger.open(sweep).load_trials()
    assert [trial.number for trial in trials] == [0, 1, 2, 3]
    ends = [(trial.state, trial.reason) for trial in trials]
    assert {state for state, _ in ends} <= {"finished", "stopped"}, ends
    for number, trial in before.items():
        assert trials[number].params == trial.params
        if trial.state != "running":
            assert trials[number] == trial, "what had ended is left alone"
        assert trials[number].curve[: len(trial.curve)] == trial.curve, (
            "no epoch that was reported is redone"
        )
    for trial in trials:
        epochs = [epoch for epoch, _ in trial.curve]
        assert epochs == sorted(set(epochs)), "no epoch is counted twice"
    assert not list((tmp_path / "two").glob("runs/*"))

    from mlflow import MlflowClient

    client = MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("raysweep").experiment_id])
    assert sorted(run.info.run_name for run in runs) == [
        "0000 s",
        "0001 s",
        "0002 s",
        "0003 s",
        "s",
    ]
    assert {run.info.status for run in runs} == {"FINISHED"}

    (name,) = optuna.get_all_study_names(study)
    told = optuna.load_study(study_name=name, storage=study).get_trials()
    # A trial that never leaves its burn-in has no result.
    space = Ledger.open(sweep).space
    rules = {t.number: space.find_selection_rule(t.params) for t in trials}
    eligible = [t for t in trials if t.rank_best_epoch(rules[t.number]).is_eligible]
    scores = [t.score("robust_worst") for t in eligible]
    assert sorted(trial.value for trial in told if trial.value is not None) == sorted(scores)
    assert len(told) == len(trials)

    delete_local_copy(tmp_path)
    best = json.loads(again.out)["trials"][0]
    assert best["checkpoint"].startswith(join_uri(uri, "s", "trials").partition("?")[0])
    monkeypatch.chdir(tmp_path / "two")
    assert main(["show", "s", "--storage", uri]) == 0
    assert "4 of 4 trials ended" in capsys.readouterr().out
    monkeypatch.delenv("RAY_ADDRESS")
    command = ["--attack", "pgd20", "--n", "20", "--json"]
    assert main(["eval", join_uri(uri, "s", "trials", f"{best['number']:04d}"), *command]) == 0
    judged = json.loads(capsys.readouterr().out)
    assert judged["examples"] == 20
    assert Path(judged["folder"]).is_relative_to(tmp_path / "two"), (
        "results are the user's, not the copy's"
    )
    run = client.search_runs([runs[0].info.experiment_id], f"run_name = '{best['number']:04d} s'")[
        0
    ]
    assert any(name.startswith("eval/") for name in run.data.metrics), (
        "beside what the trial reported itself"
    )


def serve(address: Path) -> None:
    """An S3 server; its host and port go to the file `address`."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    atomic_write_text(address, "{}:{}".format(*server.get_host_and_port()))
    time.sleep(600)


@pytest.fixture
def stoppable_server(tmp_path: Path) -> Iterator[tuple[ForkedProcess, str]]:
    """An S3 server in a process of its own, and its host and port."""
    process, address = (
        forked_processes.start_function(serve, tmp_path / "address"),
        tmp_path / "address",
    )
    while not address.exists():
        assert process.poll() is None, process.err
        time.sleep(0.02)
    yield process, address.read_text()
    process.kill()


def test_a_server_that_does_not_answer_is_given_up(
    stoppable_server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a byte comes back: neither forever nor taken for done."""
    server, host = stoppable_server
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "copy"))
    location = parse_bucket_uri(bucket_on(host, "s3", tmp_path))
    patient = BucketStore(location)
    assert patient.create("claim", b"1") is not None
    server.send_signal(signal.SIGSTOP)
    impatient = RetrySettings(total_seconds=0.5, request_seconds=0.3, longest_pause=0.1)
    store = BucketStore(location, impatient)
    operations: list[Callable[[], object]] = [
        lambda: store.write_bytes("a", b"1"),
        lambda: store.read_bytes("claim"),
        lambda: store.create("b", b"1"),
        lambda: store.delete("claim"),
        lambda: store.list_files(),
        lambda: store.fetch_checkpoint("a"),
    ]
    with ThreadPoolExecutor(len(operations)) as pool:
        for answer in [pool.submit(operation) for operation in operations]:
            with pytest.raises(StoreUnavailable, match="does not answer"):
                answer.result()
    server.send_signal(signal.SIGCONT)
    # The server may still receive what was given up, so this is another file.
    patient.write_bytes("c", b"2")
    assert patient.read_bytes("c") == b"2"


PIPELINE = """\
set: {epochs: 2, data.val_size: 50, data.train_size: 64, batch_size: 32, "*.attacks.*.steps": 2,
      validation.size: 10, "validation.*.eps": 0.5, "validation.finish.*.steps": 1,
      "validation.finish.*.runs": 1}
stages:
  - {kind: tune, space: at, trials: 2}
  - {kind: promote, top: 1, set: {epochs: 3}}
  - {kind: autoattack, attacks: {APGD: apgd-ce}, n: 20}
  - {kind: report}
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("undrawn_figures")
def test_a_pipelines_sweeps_live_in_the_bucket(
    ray_cluster, one_core, uri: str, tmp_path: Path, workdir: Path, capsys
) -> None:
    (workdir / "small.yaml").write_text(PIPELINE)
    command = ["run", "small.yaml", "--storage", uri, "--json"]
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert len(open_path(uri).list_folders_containing("sweep.json")) == 2
    delete_local_copy(tmp_path)
    assert main([*command, "--from", "promote"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert [stage["done_before"] for stage in second["stages"]] == [True, False, False, False]
    judged = [
        json.loads((Path(run["stages"][2]["folder"]) / "artifact.json").read_text())
        for run in (first, second)
    ]
    assert judged[0]["judged"][0]["robust"] == judged[1]["judged"][0]["robust"]
    assert judged[0]["judged"][0]["candidate"]["checkpoint"].startswith("s3://")
    reports = [Path(run["reports"][0]).with_suffix(".md").read_text() for run in (first, second)]
    assert all("What was searched: at" in text and "Training" in text for text in reports)
