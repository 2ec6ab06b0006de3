"""Real faults through the real command line: each ends with its exit code and one line."""

import ast
import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import forked_processes
import numpy as np
import pytest
from conftest import tiny

from raysweep.cli import main
from raysweep.errors import ExitCode, InfrastructureError, RaysweepError, list_causes
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import load_space
from raysweep.training.trainer import train_model

ROOT = Path(__file__).parent.parent
SMALL = [
    word
    for setting in (
        "epochs=1",
        "data.train_size=64",
        "data.val_size=50",
        "*.attacks.*.steps=2",
        "validation.finish.*.steps=2",
        "validation.finish.*.runs=1",
    )
    for word in ("--set", setting)
]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "robust"
    train_model(tiny("at", epochs=1), folder)
    return folder


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """What raysweep logs."""
    handler = logging.Handler()
    found: list[logging.LogRecord] = []
    handler.emit = found.append
    logging.getLogger("raysweep").addHandler(handler)
    yield found
    logging.getLogger("raysweep").removeHandler(handler)


def write_sweep(text: str) -> Callable[[Path, Path], None]:
    def write(workdir: Path, run: Path) -> None:
        Ledger.create(workdir / "runs" / "night", load_space("lrat", {}))
        (workdir / "runs" / "night" / "sweep.json").write_text(text)

    return write


def add_checkpoint(workdir: Path, run: Path) -> None:
    """A checkpoint whose weights lost their end."""
    weights = shutil.copytree(run, workdir / "robust") / "epoch-0001" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def add_half_a_setting(workdir: Path, run: Path) -> None:
    """A checkpoint with a setting that no version knows."""
    file = shutil.copytree(run, workdir / "robust") / "epoch-0001" / "meta.json"
    meta = json.loads(file.read_text())
    meta["config"]["epochs"] = "many"
    file.write_text(json.dumps(meta))


def add_images(workdir: Path, run: Path) -> None:
    np.savez(workdir / "train.npz", x=np.zeros((9, 3, 8, 8), np.uint8), y=np.arange(9) % 3)
    content = (workdir / "train.npz").read_bytes()
    (workdir / "train.npz").write_bytes(content[: len(content) // 2])


def add_yaml(workdir: Path, run: Path) -> None:
    (workdir / "mine.yaml").write_text("epochs: [1")


def add_file(workdir: Path, run: Path) -> None:
    (workdir / "file").touch()


def add_nothing(workdir: Path, run: Path) -> None:
    pass


NO_BUCKET = "gs://anonymous@b/x?endpoint_override=127.0.0.1:9&scheme=http&retry_limit_seconds=0.2"
OWN_DATA = ["--set", "data.name=arrays", "--data-dir", ".", "--set", "data.val_size=3"]
# The preparation, the command line, its exit code, words of its line, and the first cause.
FAULTS = {
    "unknown method": (add_nothing, ["train", "lart"], 2, "no method or preset 'lart'", None),
    "unknown key": (add_nothing, ["train", "at", "--set", "lr=1"], 2, "no setting 'lr'", None),
    "wrong value": (
        add_nothing,
        ["train", "at", "--set", "epochs=0"],
        2,
        "epochs = 0: must be",
        "SpecError",
    ),
    "YAML": (add_yaml, ["train", "mine.yaml"], 2, "not valid YAML", "ParserError"),
    "no such sweep": (
        add_nothing,
        ["tune", "lrat", "--resume", "night"],
        2,
        "no sweep in",
        "StoredFileNotFound",
    ),
    "--out below a file": (
        add_file,
        ["train", "at", *SMALL, "--out", "file/x"],
        2,
        "cannot be made: Not a directory",
        "NotADirectoryError",
    ),
    "--out that nobody can make": (
        add_nothing,
        ["train", "at", *SMALL, "--out", "/proc/x"],
        3,
        "--out /proc/x: cannot be made",
        "FileNotFoundError",
    ),
    "unreachable bucket": (
        add_nothing,
        ["show", "night", "--storage", NO_BUCKET],
        3,
        "the bucket does not answer",
        "GenericError",
    ),
    "no MLflow": (
        add_nothing,
        ["train", "at", *SMALL],
        3,
        "MLflow store nonsense://x",
        "UnsupportedModelRegistryStoreURIException",
    ),
    "no cluster": pytest.param(
        add_nothing,
        ["tune", "lrat", *SMALL],
        3,
        "no Ray cluster at RAY_ADDRESS 127.0.0.1:1",
        "ConnectionRefusedError",
        marks=pytest.mark.needs_ray,
        id="no cluster",
    ),
    "checkpoint cut short": (
        add_checkpoint,
        ["eval", "robust"],
        4,
        "weights.safetensors is truncated or altered",
        None,
    ),
    "settings of a checkpoint": (
        add_half_a_setting,
        ["eval", "robust"],
        4,
        "epochs = 'many'",
        "ValidationError",
    ),
    "sweep.json cut short": (
        write_sweep('{"key": "'),
        ["show", "night"],
        4,
        "sweep.json is damaged: it is no JSON object; restore it, or start anew under another",
        "JSONDecodeError",
    ),
    "sweep.json without keys": (
        write_sweep("{}"),
        ["tune", "lrat", "--resume", "night"],
        4,
        "sweep.json is damaged: it lacks key, space; restore it",
        None,
    ),
    "sweep.json with another space": (
        write_sweep(
            '{"key": "0", "space": {"method": "at", "trials": "many", '
            '"space": {"optim.lr": {"float": [0.1, 0.2]}}}}'
        ),
        ["show", "night"],
        4,
        "trials = 'many'",
        "ValidationError",
    ),
    "images cut short": (
        add_images,
        ["train", "at", *SMALL, *OWN_DATA],
        4,
        "train.npz: cannot be read as .npz",
        "ValueError",
    ),
    "loss of nan": (
        add_nothing,
        ["train", "at", *SMALL, "--set", "epochs=3", "--set", "optim.lr=1.0e+38"],
        1,
        "training failed: the loss became nan",
        "TrainingFailed",
    ),
}


@pytest.mark.mlflow
@pytest.mark.parametrize(
    ("prepare", "arguments", "code", "words", "cause"),
    [
        value if hasattr(value, "marks") else pytest.param(*value, id=name)
        for name, value in FAULTS.items()
    ],
)
def test_a_fault_has_its_exit_code_one_line_and_a_cause(
    prepare: Callable[[Path, Path], None],
    arguments: list[str],
    code: int,
    words: str,
    cause: str | None,
    small_run: Path,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    records: list[logging.LogRecord],
) -> None:
    if "MLflow" in words:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://x")
    if "RAY_ADDRESS" in words:
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        monkeypatch.setattr("ray.is_initialized", lambda: False)
    prepare(workdir, small_run)
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    line = err.strip().splitlines()[-1]
    assert line.startswith("raysweep: ") and words in line, err
    assert "Traceback" not in err
    # The log has the error with its causes, for a file or a verbose terminal.
    (record,) = [r for r in records if getattr(r, "event", "") == "end"]
    assert record.exc_info is not None and isinstance(record.exc_info[1], RaysweepError)
    causes = [type(error).__name__ for error in list_causes(record.exc_info[1])]
    assert causes[:1] == ([] if cause is None else [cause]), causes


@pytest.mark.ray
def test_a_sweep_of_which_every_trial_fails_is_work_that_failed(
    ray_cluster, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = [
        "tune",
        "lrat",
        *SMALL,
        "--set",
        "optim.lr=1.0e+38",
        "--set",
        "epochs=3",
        "--trials",
        "1",
        "--name",
        "night",
    ]
    assert main(sweep) == 1
    assert "raysweep: every trial failed; the first: the loss" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.mlflow
def test_ctrl_c_is_130_and_the_same_command_resumes(workdir: Path) -> None:
    long = ["train", "at", *SMALL[2:], "--set", "epochs=400", "--name", "night"]
    process = forked_processes.start_command(long, workdir)
    deadline = time.monotonic() + 600
    while "epoch 1/400" not in process.err:
        assert process.poll() is None and time.monotonic() < deadline, process.err
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, process.err
    last = process.err.strip().splitlines()[-1]
    assert re.match(r"raysweep: interrupted in epoch \d+ .*; run the same command to resume$", last)


def limit_file_size(limit: int) -> None:
    """Let no file of this process be longer: the system answers EFBIG, as ENOSPC elsewhere."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def train_with_small_database() -> int:
    limit_file_size(2_000)
    return main(["train", "at", *SMALL, "--name", "night"])


def train_with_small_weights() -> None:
    config = tiny("at", epochs=1)
    limit_file_size(50_000)
    train_model(config, Path("night"))


@pytest.mark.mlflow
def test_a_disk_that_takes_no_more_is_one_line(workdir: Path) -> None:
    process = forked_processes.start_function(
        train_with_small_database, folder=workdir, imports=forked_processes.COMMANDS
    )
    assert process.wait() == 3, process.err
    assert "Traceback" not in process.err
    last = process.err.strip().splitlines()[-1]
    assert last.startswith("raysweep: error: MLflow store sqlite:///")


def test_weights_for_which_the_disk_has_no_room_are_no_bug(workdir: Path) -> None:
    process = forked_processes.start_function(train_with_small_weights, folder=workdir)
    assert process.wait() == 1
    last = process.err.strip().splitlines()[-1]
    assert last.startswith("raysweep.errors.InfrastructureError: ")
    assert "weights.safetensors: cannot be written: " in last and "File too large" in last


def test_a_bug_keeps_its_traceback(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError("seed")

    monkeypatch.setattr("raysweep.commands.list._list_described_names", fail)
    with pytest.raises(KeyError, match="seed"):
        main(["list"])


def test_the_documentation_has_the_table_of_all_codes() -> None:
    text = (ROOT / "docs" / "scheduling.md").read_text()
    table = [int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]
    assert table == [int(code) for code in ExitCode]
    unit = (ROOT / "deploy" / "raysweep-nightly.service").read_text()
    (prevented,) = re.findall(r"^RestartPreventExitStatus=(.*)$", unit, re.MULTILINE)
    assert [int(code) for code in prevented.split()] == [
        ExitCode.WORK_FAILED,
        ExitCode.WRONG_SETTINGS,
        ExitCode.DAMAGED_FILE,
        ExitCode.REGRESSION,
        ExitCode.INTERRUPTED,
    ]


class _RaiseFinder(ast.NodeVisitor):
    """Finds the `raise` statements inside `except` that drop the error that was caught."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._depth = 0

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        depth, self._depth = self._depth, 0
        self.generic_visit(node)
        self._depth = depth

    def visit_Raise(self, node: ast.Raise) -> None:
        drops_cause = isinstance(node.cause, ast.Constant)
        names_none = self._depth > 0 and node.exc is not None and node.cause is None
        if drops_cause or names_none:
            self.found.append(ast.unparse(node))


@pytest.mark.parametrize(
    ("text", "n_found"),
    [
        ("raise A('x') from None", 1),
        ("try: f()\nexcept A: raise B('x')", 1),
        ("try: f()\nexcept A as e: raise B('x') from e", 0),
        ("try: f()\nexcept A: raise", 0),
        ("try: f()\nexcept A:\n def g(): raise B('x')", 0),
        ("raise B('x')", 0),
    ],
)
def test_the_check_of_causes_finds_what_it_should(text: str, n_found: int) -> None:
    finder = _RaiseFinder()
    finder.visit(ast.parse(text))
    assert len(finder.found) == n_found


def test_no_error_drops_its_cause() -> None:
    found = {}
    for path in sorted((ROOT / "raysweep").rglob("*.py")):
        finder = _RaiseFinder()
        finder.visit(ast.parse(path.read_text()))
        if finder.found:
            found[str(path.relative_to(ROOT))] = finder.found
    assert found == {}


@pytest.mark.slow
@pytest.mark.needs_ray
def test_a_node_of_ray_that_starts_too_slowly_is_a_fault_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray raises a bare Exception after 30 seconds; this is its text."""
    from raysweep.sweep import cluster

    words = "The current node timed out during startup. This could happen because"

    def fail(**options: object) -> None:
        raise Exception(f"{words} some of the raylet failed to startup.")

    monkeypatch.setattr("ray.init", fail)
    with pytest.raises(InfrastructureError) as caught, ExitStack() as workers:
        cluster.start_local_cluster(workers, 1)
    assert str(caught.value).startswith(f"Ray could not be started on this machine: {words}")
    assert caught.value.exit_code == 3


def test_only_the_top_of_the_command_line_chooses_exit_codes() -> None:
    """Elsewhere only processes end: a worker of a pool with its parent, a trial after SIGTERM."""
    allowed = {
        "__main__.py",
        "cli.py",
        "commands/session.py",
        "errors.py",
        "logs/running_command.py",
        "evaluation/process_pool.py",
        "sweep/preemption.py",
        "sweep/server_process.py",
        "sweep/worker_server.py",
    }
    for path in sorted((ROOT / "raysweep").rglob("*.py")):
        text = path.read_text()
        if str(path.relative_to(ROOT / "raysweep")) not in allowed:
            assert not re.search(
                r"\b(sys\.exit|os\._exit|SystemExit|exit_code|ExitCode)\b", text
            ), path


@pytest.mark.parametrize(("command", "code"), [("list", 0), ("tune", 0)])
def test_output_that_nobody_reads_ends_no_work(
    command: str, code: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as stream:
        monkeypatch.setattr("sys.stdout", stream)
        name = f"raysweep.commands.{command}.run_command"
        monkeypatch.setattr(name, lambda args: print("a line"))
        assert main([command] if command == "list" else [command, "at"]) == code


def test_another_pipe_that_breaks_is_no_success(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def send_to_dead_worker(args: object) -> None:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        receiver.close()
        sender.send("work")

    monkeypatch.setattr("raysweep.commands.tune.run_command", send_to_dead_worker)
    assert main(["tune", "at"]) == ExitCode.INFRASTRUCTURE
    assert capfd.readouterr().err == "raysweep: error: Broken pipe\n"


def test_windows_is_refused_with_a_line() -> None:
    """There are no file locks of POSIX: no module that needs them is imported before the line."""
    program = (
        "import sys; sys.platform = 'win32'; sys.modules['fcntl'] = None; "
        "from raysweep.cli import main; sys.exit(main(['list']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == ExitCode.INFRASTRUCTURE
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "raysweep: error: raysweep runs on Linux and macOS; on Windows, install and run it in WSL"
    ]
