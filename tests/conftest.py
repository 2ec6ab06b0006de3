"""What the tests share: a small network, a batch of digits, one Ray cluster for the session."""

import gc
import importlib.util
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The background jobs of a script ignore SIGINT; some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Threads of OpenMP that have nothing to do sleep. By default they spin, and two threads that share
# two cores with other tests take ten times as long for a small network.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
# By Ray's default its workers get one second for each 28 that the tests beside theirs use.
os.environ.setdefault("RAY_worker_niceness", "0")
# Buckets are those of a server on this machine, their copies out of the way of the user's own.
os.environ.update(
    AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="hush", AWS_EC2_METADATA_DISABLED="true"
)
if multiprocessing.parent_process() is None:
    # Checkpoints, ledgers and databases are forced onto the disk at each write, tens of thousands
    # of times. In memory this takes no time.
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free >= 4 * 2**30
    if has_room and "TMPDIR" not in os.environ:
        tempfile.tempdir = os.environ["TMPDIR"] = str(memory)
    os.environ["RAYSWEEP_CACHE"] = tempfile.mkdtemp(prefix="raysweep-copies-")
    os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="raysweep-state-")

import _pytest.logging
import forked_processes
import pytest
import torch
from filelock import FileLock
from import_graph import is_importable
from oracle import Oracle
from torch import nn

from raysweep.data import DatasetSplits, DataSpec, load_data
from raysweep.rng import ExampleRng
from raysweep.sweep import epoch_timing, worker_server
from raysweep.training.config import TrainingConfig, build_training_config

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

    from raysweep.sweep.ledger import Ledger
    from raysweep.sweep.trial import Trial
    from raysweep.tracking import Tracker

# Nearly all that imports and the collection of tests make stays: looking through it for garbage
# as often as by default takes a tenth of the suite's time.
gc.set_threshold(10_000, 20, 50)

# Small enough for one epoch in a fraction of a second, through the same code as the real thing.
TINY: dict[str, Any] = {
    "epochs": 2,
    "data.train_size": 64,
    "data.val_size": 50,
    "batch_size": 32,
    "*.attacks.*.steps": 2,
    "validation.finish.*.steps": 2,
}
# Plans time steps also on a machine that is busy with other tests.
epoch_timing.LIMIT_SECONDS = 600.0
# For today's objective: that of spaces that no file holds is of 0.1, and its last attack has no
# `runs`.
ONE_RUN: dict[str, Any] = {"validation.finish.*.runs": 1}


# The files that use Ray run in two processes, each with a cluster of its own: one set of files in
# each process.
CLUSTERS = (
    {
        "test_kills.py",
        "test_preemption.py",
        "test_ray_workers.py",
        "test_resume.py",
        "test_storage.py",
        "test_sweep.py",
        "test_worker_server.py",
    },
    {
        "test_benchmarks.py",
        "test_cli.py",
        "test_clusters.py",
        "test_doctor.py",
        "test_eval.py",
        "test_notebook.py",
        "test_python_api.py",
    }
    | {"test_pipelines.py", "test_security.py"},
)
# Each of these files takes half a minute. As the last one it would keep one process waiting.
LONG_FILES = {
    "test_bucket_lease.py",
    "test_evaluation.py",
    "test_faces.py",
    "test_files_of_0_1.py",
    "test_output_streams.py",
    "test_ray_internals.py",
    "test_tracker_outages.py",
}
UMASK = os.umask(0)
os.umask(UMASK)
HAS_RAY = importlib.util.find_spec("ray") is not None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the test files that import Ray or MLflow where these are not installed."""
    left_out = (
        not HAS_RAY and collection_path.suffix == ".py" and not is_importable(collection_path)
    )
    return True if left_out else None


def count_reported_epochs(sweep: Path) -> int:
    """Return the number of epochs that a running sweep has in its ledger. A checkpoint exists a
    moment before its epoch is reported.
    """
    return sum(json.loads(file.read_text())["epoch"] for file in sweep.glob("trials/*/trial.json"))


class LogsOfRootLogger:
    """Context manager that attaches a handler to the root logger, and nothing else.

    It replaces pytest's `catching_logs`, which does the same in pytest 8. Later versions also look
    for loggers that do not propagate. Among all loggers of Ray, MLflow and PyTorch, at each step of
    a test, that takes as long as the median test.
    """

    def __init__(self, handler: logging.Handler, level: int | None = None) -> None:
        self.handler = handler
        self.level = level
        self.former_level = logging.NOTSET

    def __enter__(self) -> logging.Handler:
        root = logging.getLogger()
        self.former_level = root.level
        if self.level is not None:
            self.handler.setLevel(self.level)
            root.setLevel(min(root.level, self.level))
        root.addHandler(self.handler)
        return self.handler

    def __exit__(self, *error: object) -> None:
        root = logging.getLogger()
        if self.level is not None:
            root.setLevel(self.former_level)
        root.removeHandler(self.handler)


_pytest.logging.catching_logs = LogsOfRootLogger


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files that use Ray first, because they take longest, then the other long ones."""
    if any(item.get_closest_marker("ray") for item in items):
        forked_processes.ALWAYS[:] = forked_processes.COMMANDS
    use_ray = set().union(*CLUSTERS)
    items.sort(key=lambda item: (item.path.name not in use_ray, item.path.name not in LONG_FILES))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Look for garbage only in what comes after the first test begins."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """Look for garbage once more at the end: pytest does five times, for seconds."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print how to repeat the order of the tests: with `-q`, pytest-randomly does not."""
    if config.pluginmanager.hasplugin("randomly"):
        seed = config.getoption("randomly_seed")
        terminalreporter.write_line(f"--randomly-seed={seed} repeats this order of the tests")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Compute with one thread, whatever the test before has set: with two, FAB's images differ in
    their last bits when the rows of a batch are in another order.
    """
    torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Fail a test that leaves another umask: the files of later tests would have other modes."""
    umask = os.umask(UMASK)
    assert umask == UMASK, f"this test left the umask {umask:03o}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run the tests of one file in one process, and those of files that share a cluster, too."""
    from xdist.scheduler import LoadScopeScheduling

    class ByCluster(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.split("::")[0]).name
            return next(
                (f"cluster {number}" for number, files in enumerate(CLUSTERS) if file in files),
                file,
            )

    return ByCluster(config, log)


@pytest.fixture(scope="session", autouse=True)
def _no_copies_left() -> Iterator[None]:
    folders = [os.environ["RAYSWEEP_CACHE"], os.environ["XDG_STATE_HOME"]]
    yield
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Function that creates an MLflow store without runs. It copies one: MLflow takes seconds to
    create it.
    """
    folder = tmp_path_factory.getbasetemp()
    # pytest-xdist gives each of its processes a folder in one that they share.
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    store, first, half = (folder / f"{name}.db" for name in ("empty", "first", "half"))

    def make(file: Path) -> None:
        with FileLock(folder / "empty.lock"):
            if not store.exists():
                from mlflow import MlflowClient

                for name in ("alembic", "mlflow.store.db.utils"):
                    logging.getLogger(name).setLevel(logging.WARNING)
                MlflowClient(tracking_uri=f"sqlite:///{first}").search_experiments()
                with (
                    closing(sqlite3.connect(first)) as made,
                    closing(sqlite3.connect(half)) as copy,
                ):
                    made.backup(copy)
                half.rename(store)
        shutil.copy(store, file)

    return make


@pytest.fixture(scope="session", autouse=True)
def _new_stores_are_copies(empty_store: Callable[[Path], None]) -> Iterator[None]:
    """Create new stores of this process by copying an empty one; a command in test_eval lets MLflow
    make its own.
    """
    from raysweep.tracking.mlflow_tracker import Tracker

    connect = Tracker._connect

    def copied(tracker: "Tracker") -> Any:
        file = Path(tracker.uri.removeprefix("sqlite:///"))
        if tracker.uri.startswith("sqlite:///") and file.parent.is_dir() and not file.exists():
            empty_store(file)
        return connect(tracker)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "_connect", copied)
        yield


@pytest.fixture(scope="session", autouse=True)
def training_plots() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Leave the figures of runs out of MLflow: drawing them takes longer than a small training. A
    test that reads them records its run in a block `with training_plots():`.
    """
    from raysweep.tracking.mlflow_tracker import Tracker

    log_training_plots = Tracker.log_training_plots

    @contextmanager
    def draw() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tracker, "log_training_plots", log_training_plots)
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "log_training_plots", lambda *arguments: None)
        yield draw


def draw_nothing(figure: Any, renderer: Any) -> None:
    """Replace `TextFigure.draw` in a test, or in a process that it starts to write a report."""


@pytest.fixture
def undrawn_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures of reports empty, for a test that reads only the text: drawing them takes
    longer than its small trainings.
    """
    monkeypatch.setattr("raysweep.text_figure.TextFigure.draw", draw_nothing)


@pytest.fixture(scope="session")
def digits() -> DatasetSplits:
    return load_data(DataSpec(name="digits", val_size=50, train_size=64))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)
    ).eval()


@pytest.fixture
def batch(digits: DatasetSplits) -> tuple[torch.Tensor, torch.Tensor, ExampleRng]:
    rows = slice(0, 32)
    return (
        digits.train.get_float_images(rows),
        digits.train.y[rows],
        ExampleRng.for_examples(digits.train.index[rows], 0),
    )


@pytest.fixture
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator["Cluster"]:
    """A cluster of one node with two CPUs, on loopback. As in clusters that raysweep starts, there
    is no dashboard, and none of its agents. A test that adds nodes removes them again.
    """
    from ray.cluster_utils import Cluster

    from raysweep.sweep.cluster import connect_to_cluster
    from raysweep.sweep.ray_environment import (
        PREEMPTION_POLL_VARIABLE,
        ray_environment,
        set_environment,
    )
    from raysweep.sweep.ray_internals import (
        listen_on_loopback,
        skip_unused_processes,
        use_worker_script,
    )

    class ClusterOfForks(Cluster):
        """Ray's cluster for tests, with nodes whose workers and agents are forks."""

        def add_node(self, **options: Any) -> Any:
            """Start a node; `Cluster` also calls this for the head node."""
            with use_worker_script(Path(worker_server.__file__)):
                return super().add_node(**options)

    with (
        set_environment({PREEMPTION_POLL_VARIABLE: "0.2"}),
        ray_environment(),
        listen_on_loopback(),
        skip_unused_processes(),
        tempfile.TemporaryDirectory(prefix="forks-") as sockets,
        worker_server.run_worker_server(Path(sockets)) as server,
    ):
        # The server imports Ray as for a cluster without a token, which this one is.
        with set_environment({"RAY_AUTH_MODE": "disabled"}):
            server.import_ray()
        # Ray counts a node as dead once five checks in a row have failed: 15 s at its own period.
        # A driver whose node gives up its first workers, by default after 60 s, waits forever.
        system = {"health_check_period_ms": 500, "worker_register_timeout_seconds": 600}
        head = {"num_cpus": 2, "_system_config": system}
        cluster = ClusterOfForks(initialize_head=True, head_node_args=head)
        with connect_to_cluster(cluster.address):
            yield cluster
        cluster.shutdown()


class TrialUpdateListener:
    """A listener that calls `act(trial)` after each change of a trial."""

    def __init__(self, callback: Callable[["Trial"], None]) -> None:
        self.callback = callback

    def on_sweep_start(self, ledger: "Ledger", concurrency: int) -> None:
        pass

    def on_trial_update(self, trial: "Trial", epoch_metrics: dict[str, float] | None) -> None:
        self.callback(trial)

    def on_base_run_update(self, run: "Trial", epoch_metrics: dict[str, float] | None) -> None:
        pass

    def on_repeat_update(self, run: "Trial", epoch_metrics: dict[str, float] | None) -> None:
        pass

    def on_finalist_update(self, trial: "Trial", n_left: int) -> None:
        pass

    def on_sweep_end(self, ledger: "Ledger", error: BaseException | None = None) -> None:
        pass


@pytest.fixture(scope="module")
def one_core() -> Iterator[None]:
    """Attacks run in this process: starting a pool takes longer than small attacks do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.sched_getaffinity", lambda pid: {0})
        yield


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def tiny(method: str, **changes: Any) -> TrainingConfig:
    """A config that trains in about a second; `__` in a name stands for a dot."""
    return build_training_config(
        method, TINY, ONE_RUN, {key.replace("__", "."): value for key, value in changes.items()}
    )
