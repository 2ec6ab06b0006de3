"""MLflow and Optuna stores that fail during the work: it goes on, and they get all of it later."""

import json
import os
import re
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked_processes
import optuna
import pytest
from mlflow_server import MlflowServer
from pipeline_builders import build_candidate, build_evaluation_result

from raysweep.cli import main
from raysweep.errors import ExitCode
from raysweep.pipeline.artifact import Artifact
from raysweep.pipeline.facts import ReportFacts
from raysweep.pipeline.report.stage import HTML_FILE, MARKDOWN_FILE
from raysweep.record_queue import RecordQueue, RecordStoreUnavailable
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.optuna_export import OptunaExporter
from raysweep.sweep.search_space import load_space
from raysweep.sweep.trial import Trial
from raysweep.tracking import SweepTracker, Tracker
from raysweep.training import trainer
from raysweep.training.trainer import compute_step_gradients, train_model
from raysweep.unrecorded_folders import UNRECORDED_FILE, note_unrecorded

pytestmark = pytest.mark.mlflow
TINY = ["data.val_size=50", "data.train_size=64", "batch_size=32", "*.attacks.*.steps=1"]
TINY += ["validation.finish.*.steps=1", "validation.finish.*.runs=1"]


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory, empty_store) -> Iterator[MlflowServer]:
    """A server, which takes many seconds to start."""
    folder = tmp_path_factory.mktemp("server")
    empty_store(folder / "server.db")
    server = MlflowServer(folder)
    yield server
    server.kill()


@pytest.fixture
def server(
    shared_server: MlflowServer, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> MlflowServer:
    """A server that runs, for clients that give up after some seconds."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shared_server.uri)
    shared_server.ensure_running()
    return shared_server


def list_runs(uri: str) -> dict[str, Any]:
    """Return the runs of the experiment by name, as MLflow itself reads them."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("raysweep")
    if experiment is None:
        return {}
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def list_epochs(uri: str, run: Any) -> list[int]:
    from mlflow import MlflowClient

    history = MlflowClient(tracking_uri=uri).get_metric_history(run.info.run_id, "train/loss")
    return sorted({point.step for point in history})


class TestQueue:
    def test_records_wait_for_the_store_in_their_order(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("raysweep.record_queue._MIN_PAUSE", 3600.0)
        written, attempts, is_up = [], [], [True]
        queue = RecordQueue("the", "store")

        def write(number: int) -> None:
            def record() -> None:
                attempts.append(number)
                if not is_up[0]:
                    raise RecordStoreUnavailable("no answer")
                written.append(number)

            queue.write(record)

        write(1)
        assert queue.flush()
        is_up[0] = False
        for number in (2, 3, 4):
            write(number)
        assert not queue.flush() and attempts == [1, 2]
        write(5)
        assert not queue.flush(retry=False), "during an outage this waits for nothing"
        assert attempts == [1, 2] and written == [1] and queue.n_waiting == 4
        is_up[0] = True
        assert queue.flush()
        assert written == [1, 2, 3, 4, 5] and queue.n_waiting == 0
        assert queue.finish() == 0
        assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == [
            "no answer; the work continues, and its records are written later"
        ]

    def test_a_store_that_hangs_holds_up_neither_the_work_nor_its_end(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        queue, written = RecordQueue("MLflow store", "x", flush_seconds=0.01), []
        begun, answers = threading.Event(), threading.Event()

        def hang() -> None:
            begun.set()
            answers.wait()
            written.append("late")

        queue.write(hang)
        begun.wait()
        queue.write(lambda: written.append("never"))
        assert queue.finish("; say so") == 2 and written == []
        assert "lacks the last 2 records" in caplog.records[-1].getMessage()
        writers = [thread for thread in threading.enumerate() if thread.name == "MLflow store x"]
        answers.set()
        for thread in writers:
            thread.join(60)
        assert written == ["late"], "its thread ends with the request that was under way"

    def test_records_that_come_during_a_request_wait_and_the_work_does_not(self) -> None:
        queue, written = RecordQueue("the", "store"), []
        begun, answers = threading.Event(), threading.Event()

        def slow() -> None:
            begun.set()
            answers.wait()

        queue.write(slow)
        begun.wait()
        for number in range(1000):
            queue.write(lambda number=number: written.append(number))
        assert written == []
        answers.set()
        assert queue.flush() and written == list(range(1000))
        queue.finish()

    def test_what_the_store_lacks_at_the_end_is_one_line(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        queue, written = RecordQueue("MLflow store", "x"), []

        def fail(is_final: bool) -> None:
            raise RecordStoreUnavailable("refused", is_final)

        queue.write(lambda: fail(True))
        queue.write(lambda: written.append(1))
        queue.write(lambda: fail(False))
        queue.write(lambda: written.append(2))
        queue.finish("; say so")
        assert written == [1], "a record that can never be written holds no other up"
        assert caplog.records[-1].getMessage() == (
            "MLflow store x lacks the last 3 records of this work, which is complete without "
            "them; say so"
        )

    def test_a_fault_in_a_record_costs_this_record(self, caplog: pytest.LogCaptureFixture) -> None:
        queue, written = RecordQueue("MLflow store", "x"), []
        queue.write(lambda: written.append(1 / 0))
        queue.write(lambda: written.append(2.0))
        assert queue.flush() and written == [2.0]
        assert queue.finish() == 1
        (fault,) = [record for record in caplog.records if record.levelname == "ERROR"]
        assert fault.exc_info[0] is ZeroDivisionError


def train(name: str, epochs: int) -> list[str]:
    values = (*TINY, f"epochs={epochs}", "*.step_size=eps", "optim.lr=0.1")
    settings = [word for value in values for word in ("--set", value)]
    return ["train", "at", "--name", name, *settings]


def run_command_that_waits(arguments: list[str], stopped: Path) -> int:
    """Run a command whose training waits after two epochs, of two steps each, until `stopped` is
    there. By then the first epoch is reported; the second one only after a step of the third.
    """
    steps: list[int] = []

    def wait_and_step(*values: Any, **options: Any) -> Any:
        steps.append(len(steps))
        while len(steps) == 5 and not stopped.exists():
            time.sleep(0.02)
        if stopped.exists():
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "1"
        return compute_step_gradients(*values, **options)

    trainer.compute_step_gradients = wait_and_step
    return main(arguments)


@pytest.mark.slow
def test_training_goes_on_without_a_server_and_the_same_command_tells_it(
    server: MlflowServer, workdir: Path
) -> None:
    stopped = workdir / "stopped"
    process = forked_processes.start_function(
        run_command_that_waits, train("run", 8), stopped, imports=forked_processes.COMMANDS
    )
    deadline = time.monotonic() + 600
    while not (run := list_runs(server.database_uri).get("run")) or not list_epochs(
        server.database_uri, run
    ):
        assert process.poll() is None and time.monotonic() < deadline, process.err
        time.sleep(0.05)
    server.send_signal(signal.SIGSTOP)
    stopped.touch()
    try:
        assert process.wait() == 0, process.err
    finally:
        server.send_signal(signal.SIGCONT)
    lines = [line for line in process.err.splitlines() if "warning" in line]
    assert len(lines) == 2 and "the work continues" in lines[0] and "lacks the last" in lines[1]
    assert list_epochs(server.database_uri, run) == [1]
    assert main(["sync", "run"]) == 0
    run = list_runs(server.database_uri)["run"]
    assert (
        list_epochs(server.database_uri, run) == list(range(1, 9)) and run.info.status == "FINISHED"
    )


def test_training_does_not_start_without_a_server(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hushhush@127.0.0.1:1")
    assert main(train("none", 1)) == 3
    *_, line = capsys.readouterr().err.splitlines()
    assert "MLflow store http://***@127.0.0.1:1: does not answer: Connection refused" in line


def make_ledger(folder: Path, name: str = "s1") -> Ledger:
    settings = {"data.val_size": 50, "data.train_size": 64, "batch_size": 32, "epochs": 3}
    return Ledger.create(folder / "runs" / name, load_space("at", {**settings, "*.steps": 1}))


def run_trial(ledger: Ledger, number: int, listeners: list[Any]) -> None:
    """Train a trial, tell the ledger and then the listeners, as the driver of a sweep does."""
    config = ledger.space.trial_config({})
    rule = ledger.space.find_selection_rule({})
    trial, told = Trial(number, {}), []
    history = train_model(config, ledger.trial_path(number)).last_checkpoint.history
    told = [(trial, None)]
    for metrics in history:
        trial = trial.with_epoch(metrics, rule)
        told.append((trial, metrics))
    told.append((replace(trial, state="finished"), None))
    for trial, metrics in told:
        ledger.save_trial(trial)
        for listener in listeners:
            listener.on_trial_update(trial, metrics)


def test_damaged_work_keeps_no_other_from_mlflow(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The damaged folders come first in the order of their names."""
    ledger = make_ledger(workdir)
    run_trial(ledger, 0, [])
    note_unrecorded(ledger.path)
    for name in ("a", "b"):
        note_unrecorded(workdir / "runs" / name)
        (workdir / "runs" / name / "sweep.json").write_text("{")
    assert main(["sync"]) == ExitCode.DAMAGED_FILE
    out, err = capsys.readouterr()
    assert out == "MLflow has all records of sweep s1\n"
    damaged = [line for line in err.splitlines() if "is damaged" in line]
    assert ["/a/sweep.json" in damaged[0], "/b/sweep.json" in damaged[1]] == [True, True]
    assert len(damaged) == 2
    assert main(["sync", "--json"]) == ExitCode.DAMAGED_FILE
    result = json.loads(capsys.readouterr().out)
    assert result["written"] == [] and len(result["failed"]) == 2
    assert all("is damaged" in line for line in result["failed"])
    runs = list_runs(f"sqlite:///{workdir / 'mlflow.db'}")
    assert runs["0000 s1"].info.status == "FINISHED"


def test_a_refused_record_keeps_neither_pipelines_nor_nightly_sweeps_from_mlflow(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLflow refuses a metric with such a long name. The evaluation comes before the pipeline."""
    ledger = make_ledger(workdir, "pipelines/p/sweeps/night/at")
    run_trial(ledger, 0, [])
    evaluation, pipeline = workdir / "runs" / "r" / "eval-1", workdir / "runs" / "pipelines" / "p"
    note = {"name": "r", "metrics": {"x" * 300: 0.5}, "run_id": None, "run_tags": {}}
    for folder, content in ((ledger.path, {}), (evaluation, note), (pipeline, {})):
        note_unrecorded(folder, content)
    best = build_evaluation_result(build_candidate("AT"), 0.5)
    facts = ReportFacts(best=best, verdict="AT is the best").to_stored_dict()

    def write_reports(folder: Path) -> None:
        for name in (HTML_FILE, MARKDOWN_FILE):
            (folder / name).write_text(f"the report, {name}")

    artifact = Artifact(kind="report", key="f00d", stage={}, inputs=(), facts=facts)
    artifact.write(pipeline / "02-report-f00d", write_reports)
    assert main(["sync"]) == ExitCode.INFRASTRUCTURE
    out, err = capsys.readouterr()
    assert out == "MLflow has all records of sweep at\nMLflow has all records of pipeline p\n"
    problems = [line for line in err.splitlines() if line.startswith("raysweep: error: ")]
    assert problems == ["raysweep: error: evaluation r/eval-1: MLflow lacks 1 record"]
    runs = list_runs(f"sqlite:///{workdir / 'mlflow.db'}")
    assert {"at", "0000 at", "p report"} <= runs.keys()
    assert {runs[name].info.status for name in ("0000 at", "p report")} == {"FINISHED"}
    assert runs["p report"].data.tags["mlflow.note.content"] == "- AT is the best"
    artifacts = Path(runs["p report"].info.artifact_uri.removeprefix("file://"))
    found = {file.name: file.read_text() for file in artifacts.glob("report/*")}
    assert found == {name: f"the report, {name}" for name in (HTML_FILE, MARKDOWN_FILE)}
    (left,) = workdir.rglob(UNRECORDED_FILE)
    assert left.parent == evaluation


@pytest.mark.slow
def test_a_sweep_whose_server_is_killed_has_all_of_it_later(
    server: MlflowServer,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "100")
    ledger = make_ledger(workdir)
    listener = SweepTracker(Tracker(server.uri, workdir / "mlruns"))
    listener.on_sweep_start(ledger, 1)
    run_trial(ledger, 0, [listener])
    assert listener.flush()
    server.kill()
    run_trial(ledger, 1, [listener])
    run_trial(ledger, 2, [listener])
    listener.on_sweep_end(ledger)
    messages = [record.getMessage() for record in caplog.records]
    (line,) = [message for message in messages if "lacks the last" in message]
    assert re.fullmatch(
        rf"MLflow store {server.uri} lacks the last \d+ records of this work, which is complete "
        "without them; `raysweep sync s1` writes them",
        line,
    )
    assert sum("the work continues" in message for message in messages) == 1
    server.start()
    before = list_runs(server.database_uri)
    assert before["s1"].info.status == "RUNNING" and "0001 s1" not in before
    assert main(["sync"]) == 0
    assert capsys.readouterr().out == "MLflow has all records of sweep s1\n"
    assert main(["sync", "s1"]) == 0 and capsys.readouterr().out == "MLflow lacks nothing\n"
    runs = list_runs(server.database_uri)
    for number in range(3):
        run = runs[f"{number:04d} s1"]
        assert list_epochs(server.database_uri, run) == [1, 2, 3] and run.info.status == "FINISHED"
        assert run.data.metrics["best/robust_worst"] == pytest.approx(
            ledger.load_trials()[number].best["robust_worst"], abs=1e-6
        )


@pytest.mark.slow
def test_a_server_that_comes_back_during_a_sweep_gets_what_it_missed(
    server: MlflowServer, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raysweep.record_queue._MIN_PAUSE", 0.0)
    monkeypatch.setattr("raysweep.record_queue._PAUSE_FACTOR", 0.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "100")
    ledger = make_ledger(workdir, "s2")
    listener = SweepTracker(Tracker(server.uri, workdir / "mlruns"))
    listener.on_sweep_start(ledger, 1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    server.send_signal(signal.SIGSTOP)
    run_trial(ledger, 0, [listener])
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "100")
    server.send_signal(signal.SIGCONT)
    run_trial(ledger, 1, [listener])
    listener.on_sweep_end(ledger)
    runs = list_runs(server.database_uri)
    for name in ("0000 s2", "0001 s2"):
        assert list_epochs(server.database_uri, runs[name]) == [1, 2, 3]
        assert runs[name].info.status == "FINISHED"


def test_a_locked_optuna_storage_gets_the_trials_at_the_end(
    workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = make_ledger(workdir)
    file = workdir / "optuna.db"
    exporter = OptunaExporter(f"sqlite:///{file}?timeout=0.2")
    exporter.on_sweep_start(ledger, 1)
    with closing(sqlite3.connect(file, timeout=60)) as other:
        other.execute("BEGIN EXCLUSIVE")
        run_trial(ledger, 0, [exporter])
        run_trial(ledger, 1, [exporter])
        # The writer's thread must meet the lock, however late it runs.
        deadline = time.monotonic() + 600
        while not any("the work continues" in record.getMessage() for record in caplog.records):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        other.rollback()
    exporter.on_sweep_end(ledger)
    (study,) = optuna.get_all_study_names(f"sqlite:///{file}")
    trials = optuna.load_study(study_name=study, storage=f"sqlite:///{file}").trials
    assert [trial.user_attrs["raysweep.number"] for trial in trials] == [0, 1]


def open_store(uri: str, folder: Path, go: Path) -> None:
    while not go.exists():
        time.sleep(0.001)
    Tracker(uri, folder / "mlruns").wait_until_ready().get_or_create_run("x", {"a": "b"})


def open_storage(url: str, go: Path) -> None:
    while not go.exists():
        time.sleep(0.001)
    OptunaExporter(url)


@pytest.mark.slow
def test_several_that_start_at_once_in_a_fresh_folder(tmp_path: Path) -> None:
    go, database = tmp_path / "go", tmp_path / "mlflow.db"
    processes = [
        forked_processes.start_function(open_store, f"sqlite:///{database}", tmp_path, go)
        for _ in range(3)
    ]
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    processes += [forked_processes.start_function(open_storage, url, go) for _ in range(3)]
    go.touch()
    codes = [process.wait(400) for process in processes]
    assert codes == [0] * 6, [process.err for process in processes]
    assert len(list_runs(f"sqlite:///{database}")) >= 1
    assert sorted(file.name for file in tmp_path.glob(".*lock*")) == [], "no lock is left"


def train_impatiently(arguments: list[str], locked: Path) -> int:
    """Run the command, which waits until `locked` is there; MLflow, which waits 20 s for a locked
    database, waits half a second.
    """
    from sqlalchemy import Engine, event

    def shorten(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> tuple[str, Any]:
        return statement.replace("busy_timeout = 20000", "busy_timeout = 500"), parameters

    event.listen(Engine, "before_cursor_execute", shorten, retval=True)
    return run_command_that_waits(arguments, locked)


def test_a_locked_database_neither_ends_nor_delays_a_run(
    workdir: Path, empty_store: Callable[[Path], None]
) -> None:
    database, locked = workdir / "mlflow.db", workdir / "locked"
    empty_store(database)
    process = forked_processes.start_function(
        train_impatiently, train("second", 4), locked, imports=forked_processes.COMMANDS
    )
    uri, deadline = f"sqlite:///{database}", time.monotonic() + 600
    while not (workdir / "runs" / "second").is_dir() or "second" not in list_runs(uri):
        assert process.poll() is None and time.monotonic() < deadline, process.err
        time.sleep(0.1)
    with closing(sqlite3.connect(database, timeout=60)) as other:
        other.execute("BEGIN EXCLUSIVE")
        locked.touch()
        assert process.wait(400) == 0, process.err
        other.rollback()
    assert "lacks the last" in process.err and "Traceback" not in process.err
    assert main(train("second", 4)) == 0
    run = list_runs(uri)["second"]
    assert list_epochs(uri, run) == [1, 2, 3, 4] and run.info.status == "FINISHED"


@pytest.mark.slow
def test_an_outage_does_not_mean_that_there_is_no_champion(
    server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    tracker = Tracker(server.uri, Path("mlruns")).wait_until_ready()
    assert tracker.find_model_by_alias("model", "champion") is None
    server.send_signal(signal.SIGSTOP)
    try:
        for ask in (
            lambda: tracker.find_model_by_alias("model", "champion"),
            lambda: tracker.register_model("model", "0" * 32, {}),
        ):
            with pytest.raises(RecordStoreUnavailable, match=f"^MLflow store {server.uri}: "):
                ask()
    finally:
        server.send_signal(signal.SIGCONT)
