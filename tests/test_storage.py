"""Buckets, against real servers of both protocols: whole checkpoints or none, machines that share
nothing else.
"""

import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

import forked_processes
import optuna
import psutil
import pytest
import torch
from conftest import tiny
from forked_processes import ForkedProcess
from gcp_storage_emulator.server import create_server
from moto.server import ThreadedMotoServer
from pyarrow import fs
from safetensors.torch import load_file
from test_prefix import record_answers, wait_for_refusals
from test_workers import in_processes

from raysweep import storage
from raysweep.atomic_files import atomic_write_text
from raysweep.cli import main
from raysweep.errors import DamagedFileError
from raysweep.leases import BucketLease, hold_folder_lease
from raysweep.spec import SpecError
from raysweep.sweep.ledger import Ledger, Trial
from raysweep.training import checkpoint
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop()


def bucket_on(host: str, protocol: str, tmp_path: Path) -> str:
    """The URI of a place in a new bucket."""
    bucket, query = f"b{abs(hash(tmp_path))}", f"endpoint_override={host}&scheme=http"
    if protocol == "s3":
        fs.FileSystem.from_uri(f"s3://{bucket}?allow_bucket_creation=true&{query}")[0].create_dir(
            bucket
        )
        return f"s3://{bucket}/some/where?{query}"
    header = {"Content-Type": "application/json"}
    urlopen(
        Request(f"http://{host}/storage/v1/b", json.dumps({"name": bucket}).encode(), header)
    ).read()
    return f"gs://anonymous@{bucket}/some/where?{query}"


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
    shutil.rmtree(tmp_path / "copy")


def in_bucket(path: Path) -> list[str]:
    return sorted(str(entry.path.relative_to(path)) for entry in storage.list_remote_files(path))


@pytest.mark.parametrize(
    "where",
    [
        "s3://b",
        "s3://b/x/y",
        "gs://b/x",
        "gs://anonymous@b/x",
        "s3://b/x?endpoint_override=h:1&scheme=http~1%20",
    ],
)
def test_a_place_has_one_name_on_every_machine(where: str) -> None:
    path = storage.local_path(where)
    assert storage.is_bucket_copy(path) and storage.uri_of(path) == where
    assert storage.uri_of(path / "s" / "trials") == join_uri(where, "s", "trials")
    assert not set("?&=%") & set(str(path)), "Ray takes paths for URIs"


def test_the_variables_of_amazons_tools_name_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    assert (
        storage.uri_of(storage.local_path("s3://b/x"))
        == "s3://b/x?endpoint_override=minio:9000&scheme=http"
    )
    assert (
        storage.uri_of(storage.local_path("s3://b/x?endpoint_override=h"))
        == "s3://b/x?endpoint_override=h"
    )
    assert storage.uri_of(storage.local_path("gs://b/x")) == "gs://b/x"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "minio:9000")
    with pytest.raises(
        SpecError, match=r"AWS_ENDPOINT_URL_S3: expected http://HOST:PORT or https://"
    ):
        storage.local_path("s3://b/x")


def test_a_folder_is_itself(tmp_path: Path) -> None:
    path = storage.local_path(str(tmp_path / "x"))
    assert (
        path == tmp_path / "x"
        and storage.uri_of(path) == str(path)
        and not storage.is_bucket_copy(path)
    )
    for nothing in (
        storage.push_to_bucket,
        storage.delete_remote,
        storage.delete_remote_file,
        storage.pull_checkpoint,
        storage.pull_file,
    ):
        nothing(path)
    assert not path.exists()


def test_a_checkpoint_comes_back_on_another_machine(any_uri: str, tmp_path: Path) -> None:
    config, path = tiny("at", epochs=4), storage.local_path(any_uri) / "run"
    there = train_model(config, path)
    alone = train_model(config, tmp_path / "alone")
    kept = {f"epoch-{epoch:04d}" for epoch in (4, there.best_checkpoint.epoch)}
    assert {Path(name).parts[0] for name in in_bucket(path)} == {*kept, "histograms"}
    delete_local_copy(tmp_path)
    last = RunDirectory(path).read_last_checkpoint()
    assert last is not None and last.epoch == 4 and last.config == config
    one, two = (load_file(saved.path / WEIGHTS_FILE) for saved in (last, alone.last_checkpoint))
    assert all(torch.equal(one[name], two[name]) for name in one)
    delete_local_copy(tmp_path)
    rows = []
    train_model(
        tiny("at", epochs=4), path, FunctionCallback(lambda metrics, saved: rows.append(metrics))
    )
    assert rows == last.history, "nothing is trained again"


def test_half_a_push_is_no_checkpoint(any_uri: str, tmp_path: Path) -> None:
    config, path = tiny("at", epochs=3), storage.local_path(any_uri) / "run"
    train_model(tiny("at", epochs=3), path, FunctionCallback(lambda metrics, saved: None))
    whole = checkpoint.read_checkpoint(path / "epoch-0003")
    # The process dies between two files: of a push, and of a drop.
    for file in (path / "epoch-0003" / META_FILE, path / "epoch-0003" / "state.safetensors"):
        storage.delete_remote_file(file)
        assert 3 not in RunDirectory(path).list_saved_epochs()
        assert (
            not storage.pull_checkpoint(path / "epoch-0003") and not (path / "epoch-0003").exists()
        )
    assert "epoch-0003/weights.safetensors" in in_bucket(path)
    again = train_model(config, path).last_checkpoint
    assert again.history[-1]["robust_worst"] == whole.last_metrics["robust_worst"]
    assert (
        again.meta["sha256"] == whole.meta["sha256"]
        and RunDirectory(path).list_saved_epochs()[-1] == 3
    )


def test_what_the_bucket_has_wins_over_an_old_copy(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = storage.local_path(uri) / "run"
    train_model(tiny("at", epochs=1), path)
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "other machine"))
    other = storage.local_path(uri) / "run"
    storage.delete_remote(other / "epoch-0001")
    train_model(tiny("at", epochs=1, seed=1), other)
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "copy"))
    assert checkpoint.read_local_checkpoint(path / "epoch-0001").config.seed == 0
    assert checkpoint.read_checkpoint(path / "epoch-0001").config.seed == 1


def test_a_damaged_object_is_one_line_with_its_uri(any_uri: str, tmp_path: Path) -> None:
    path = storage.local_path(any_uri) / "run"
    train_model(tiny("at", epochs=1), path)
    (path / "epoch-0001" / WEIGHTS_FILE).unlink()
    (path / "epoch-0001" / WEIGHTS_FILE).write_bytes(b"half")
    storage.push_to_bucket(path / "epoch-0001" / WEIGHTS_FILE)
    delete_local_copy(tmp_path)
    with pytest.raises(DamagedFileError) as error:
        checkpoint.read_checkpoint(path / "epoch-0001")
    assert str(error.value).startswith(
        join_uri(any_uri, "run", "epoch-0001")
    ) and "truncated or altered" in str(error.value)


def train_beside_another(config: TrainingConfig, uri: str, name: str, told: Path) -> None:
    """What each of two machines does; the rows that were reported go to the file `told`."""
    torch.set_num_threads(1)
    rows: list[dict[str, float]] = []
    root = storage.local_path(uri)
    train_model(
        config,
        root / name,
        FunctionCallback(lambda metrics, saved: rows.append(metrics)),
        prefix_cache=PrefixCache(root / ".prefixes"),
    )
    told.write_text(json.dumps(rows))


def test_two_machines_train_a_common_prefix_once(any_uri: str, tmp_path: Path) -> None:
    configs = [tiny("gairat", epochs=8, **{BURN_IN: 6, LAM: lam}) for lam in (-1.0, 1.0)]
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
    assert sum(not row.get("shared") for part in rows for row in part) == 6 + 2 + 2
    assert [row["robust_worst"] for row in rows[0][:6]] == [
        row["robust_worst"] for row in rows[1][:6]
    ]
    alone = train_model(configs[1], tmp_path / "alone").last_checkpoint
    assert (
        checkpoint.read_checkpoint(storage.local_path(any_uri) / "1" / "epoch-0008").meta["sha256"]
        == alone.meta["sha256"]
    )
    assert not [name for name in in_bucket(storage.local_path(any_uri)) if ".claims" in name]


def test_a_living_owners_claim_is_waited_for_and_a_dead_ones_is_not(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefixes, got = PrefixCache(storage.local_path(uri) / ".prefixes"), []
    answers = record_answers(monkeypatch, BucketLease)
    monkeypatch.setattr("raysweep.training.prefix_cache._BUCKET_POLL_SECONDS", 0.1)
    state = train_model(tiny("at", epochs=1), storage.local_path(uri) / "run").last_checkpoint.path

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
    # Of a machine that cannot be asked, and whose heart beats no more.
    silent = storage.local_path(uri) / ".prefixes" / ".claims" / "other" / "1.000000 elsewhere 1"
    silent.parent.mkdir(parents=True)
    silent.touch()
    storage.push_to_bucket(silent)
    monkeypatch.setattr("raysweep.leases._EXPIRES_AFTER", 0.3)
    began = time.monotonic()
    with prefixes.acquire_training_lease("other") as ours:
        assert ours and time.monotonic() - began > 0.3


def test_a_run_that_waits_for_a_state_leaves_alone_what_is_being_stored(
    any_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials of one machine share its copy of the bucket: one stores a state, another asks for it
    again and again.
    """
    prefixes, asked = PrefixCache(storage.local_path(any_uri) / ".prefixes"), []
    state = train_model(tiny("at", epochs=1), storage.local_path(any_uri) / "run").last_checkpoint

    def ask_before(do):
        def step(path: Path, *more: Path) -> object:
            asked.append(prefixes.find_state("key"))
            return do(path, *more)

        return step

    for name in ("_copy_remote_file", "_upload_file"):
        monkeypatch.setattr(storage, name, ask_before(getattr(storage, name)))
    prefixes.store_state("key", state.path)
    assert asked == [None] * 3, "before each of its files, meta.json last"
    stored = prefixes.find_state("key")
    assert stored is not None and checkpoint.read_local_checkpoint(stored).meta == state.meta


def test_of_two_processes_that_download_the_same_the_second_leaves_the_firsts_copy(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = train_model(tiny("at", epochs=1), storage.local_path(uri) / "run").last_checkpoint.path
    shutil.move(path, tmp_path / "first")
    first, copy_files = (tmp_path / "first").stat().st_ino, fs.copy_files

    def copy_slowly(*arguments: object, **options: object) -> None:
        copy_files(*arguments, **options)
        (tmp_path / "first").rename(path)

    monkeypatch.setattr(fs, "copy_files", copy_slowly)
    assert storage.pull_checkpoint(path) and path.stat().st_ino == first
    assert [file.name for file in path.parent.iterdir() if "epoch" in file.name] == [path.name]


def test_two_at_once_in_one_folder_of_a_bucket(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = storage.local_path(uri) / "g1"
    monkeypatch.setattr("raysweep.leases._RENEWAL_INTERVAL", 1.1)  # object stores count in seconds
    with (
        hold_folder_lease(sweep),
        pytest.raises(SpecError, match=rf"'g1' is running already \(process {os.getpid()} on "),
        hold_folder_lease(sweep),
    ):
        pass
    # Of a machine that cannot be asked, and whose heart beats no more.
    silent = sweep / ".claims" / "alone" / "1.000000 elsewhere 1"
    silent.touch()
    storage.push_to_bucket(silent)
    monkeypatch.setattr("raysweep.leases._EXPIRES_AFTER", 1.0)
    with hold_folder_lease(sweep):
        assert len(in_bucket(sweep)) == 1
    assert not in_bucket(sweep)


def test_a_bucket_of_prefixes_that_is_full_forgets_the_oldest(any_uri: str, tmp_path: Path) -> None:
    state = train_model(
        tiny("at", epochs=1), storage.local_path(any_uri) / "run"
    ).last_checkpoint.path
    size = sum(file.stat().st_size for file in state.iterdir())
    prefixes = PrefixCache(storage.local_path(any_uri) / ".prefixes", max_bytes=int(2.5 * size))
    for key in ("a", "b", "c"):
        # Object stores keep times in whole seconds.
        time.sleep(1.1 if prefixes.find_stored_positions(["a", "b"]) else 0)
        prefixes.store_state(key, state)
    assert storage.list_folders_containing(prefixes.path) == ["b", "c"]
    delete_local_copy(tmp_path)
    assert prefixes.find_stored_positions(["b", "a", "c"]) == [2, 0]
    assert prefixes.find_state("a") is None and prefixes.find_state("b") is not None


def test_a_folder_goes_with_everything_in_it_and_its_neighbours_stay(any_uri: str) -> None:
    root = storage.local_path(any_uri)
    for file in ("a/.prefixes/key/x", "a/sweep/trials/0000/x", "b/sweep/x"):
        (root / file).parent.mkdir(parents=True)
        (root / file).touch()
        storage.push_to_bucket(root / file)
    assert (
        storage.list_subfolders(root) == ["a", "b"] and storage.list_subfolders(root / "none") == []
    )
    storage.delete_everywhere(root / "a" / ".prefixes")
    storage.delete_everywhere(root / "a" / "none")
    assert in_bucket(root) == ["a/sweep/trials/0000/x", "b/sweep/x"]
    assert not (root / "a" / ".prefixes").exists()
    storage.delete_everywhere(root / "a")
    assert in_bucket(root) == ["b/sweep/x"] and storage.list_subfolders(root) == ["b"]


def test_copies_are_kept_small_and_come_again(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_CACHE_MAX_BYTES", 1)
    first, second = (
        train_model(tiny("at", epochs=1), storage.local_path(uri) / name).last_checkpoint
        for name in ("first", "second")
    )
    assert first.path.exists() and second.path.exists(), "both are in use"
    two_hours_ago = time.time() - 7200
    os.utime(first.path, (two_hours_ago, two_hours_ago))
    third = train_model(tiny("at", epochs=1), storage.local_path(uri) / "third").last_checkpoint
    assert third.path.exists() and second.path.exists() and not first.path.exists()
    assert checkpoint.read_checkpoint(first.path).meta == first.meta


def on_its_own_machine(uri: str, root: Path) -> None:
    """What each of two workers does."""
    workers = DistributedWorkerGroup()
    os.environ["RAYSWEEP_CACHE"] = str(root / f"machine{workers.rank}")
    for epochs in (2, 2):
        fitted = train_model(
            tiny("at", epochs=epochs), storage.local_path(uri) / "run", workers=workers
        )
    (root / f"{workers.rank}.json").write_text(
        json.dumps([fitted.last_checkpoint.history, fitted.best_checkpoint.meta["sha256"]])
    )


def test_two_workers_on_two_machines_need_only_the_bucket(uri: str, tmp_path: Path) -> None:
    in_processes(2, on_its_own_machine, uri, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second and len(first[0]) == 2
    assert RunDirectory(storage.local_path(uri) / "run").list_saved_epochs()[-1] == 2


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("ftp://host/x", "ftp://host/x: expected a folder, s3://BUCKET/PATH or gs://BUCKET/PATH"),
        ("s3:///x", "expected a folder, s3://BUCKET/PATH"),
        ("s3://b/../../x", "expected a folder, s3://BUCKET/PATH"),
        ("s3://b/x?endpoint=h", "no option of an s3:// URI 'endpoint'; nearest: endpoint_override"),
        ("s3://me:secret@b/x", "s3://...@b: credentials belong in the environment"),
        ("s3://no-such-bucket/x?{s3}", "there is no bucket 'no-such-bucket'"),
        ("gs://anonymous@no-such-bucket/x?{gs}", "there is no bucket 'no-such-bucket'"),
        ("s3://b/x?endpoint_override=127.0.0.1:9&scheme=http", "NETWORK_CONNECTION"),
        (
            "gs://anonymous@b/x?endpoint_override=127.0.0.1:9&scheme=http&retry_limit_seconds=1",
            "Could not connect",
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
    settings = ("epochs=6", "data.train_size=320", "data.val_size=50", "*.attacks.*.steps=3")
    small = [part for setting in settings for part in ("--set", setting)]
    study = f"sqlite:///{tmp_path}/optuna.db"
    places = ["--storage", uri, "--optuna", study]
    process = tune(tmp_path / "one", *small, "--trials", "4", "--name", "s", *places)
    sweep, deadline = storage.local_path(uri) / "s", time.monotonic() + 120
    trials: list[Trial] = []
    while sum(trial.epoch for trial in trials) < 5 or all(
        trial.state == "running" for trial in trials
    ):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.3)
        trials = Ledger.open(sweep).load_trials() if storage.pull_file(sweep / "sweep.json") else []
    process.kill()
    before = {trial.number: trial for trial in Ledger.open(sweep).load_trials()}
    assert {trial.state for trial in before.values()} > {"running"}, (
        "some have ended, some have not"
    )
    deadline = time.monotonic() + 60
    while [
        child
        for child in psutil.Process().children(recursive=True)
        if child.name().startswith("ray::Implicit")
    ]:
        assert time.monotonic() < deadline, "the cluster ends the trials of a driver that is gone"
        time.sleep(0.1)
    shutil.rmtree(nodes_copy / sweep.relative_to(tmp_path / "copy").parts[0])
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
    assert sorted(trial.value for trial in told) == sorted(
        trial.score("robust_worst") for trial in trials
    )

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
    monkeypatch.setattr(storage, "_RETRY_DELAYS", ())
    monkeypatch.setattr(storage, "_REQUEST_TIMEOUT", 0.3)
    assert storage._MAX_REQUEST_ATTEMPTS == 3
    monkeypatch.setattr(storage, "_MAX_REQUEST_ATTEMPTS", 1)
    file = storage.local_path(bucket_on(host, "s3", tmp_path)) / "a" / META_FILE
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    server.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(4) as pool:
        steps = [
            pool.submit(step, file)
            for step in (storage.push_to_bucket, storage.pull_file, storage.delete_remote_file)
        ]
        steps.append(pool.submit(storage.list_remote_files, file))
        for step in steps:
            with pytest.raises(storage.BucketUnavailable, match="Timeout"):
                step.result()
    server.send_signal(signal.SIGCONT)
    storage.push_to_bucket(file)
    assert storage.pull_checkpoint(file.parent)


PIPELINE = """\
set: {epochs: 2, data.val_size: 50, data.train_size: 64, batch_size: 32, "*.attacks.*.steps": 2}
stages:
  - {kind: tune, space: at, trials: 2}
  - {kind: promote, top: 1, set: {epochs: 3}}
  - {kind: autoattack, attacks: {APGD: apgd-ce}, n: 20}
  - {kind: report}
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_pipelines_sweeps_live_in_the_bucket(
    ray_cluster, one_core, uri: str, tmp_path: Path, workdir: Path, capsys
) -> None:
    (workdir / "small.yaml").write_text(PIPELINE)
    command = ["run", "small.yaml", "--storage", uri, "--json"]
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert len(storage.list_folders_containing(storage.local_path(uri), "sweep.json")) == 2
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
