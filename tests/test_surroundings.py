"""Lost terminals, output to files, and refusals that leave no folder behind."""

import io
import logging
import os
import pty
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raysweep.cli import main
from raysweep.terminal import create_progress_console, training_progress_bar
from raysweep.termination_signals import handle_termination_signals, release_logging_locks

TINY = ["data.val_size=50", "data.train_size=64", "batch_size=32", "*.attacks.*.steps=1"]
TINY += ["validation.finish.*.steps=1", "validation.finish.*.runs=1"]
SETTINGS = [word for value in (*TINY, "epochs=1") for word in ("--set", value)]


@pytest.fixture
def hangup_handler() -> Iterator[None]:
    """Give SIGHUP back what it did before the test."""
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


def test_an_interrupted_log_record_leaves_no_lock() -> None:
    """Ctrl-C has come after `logging` has acquired its locks, in this thread or in others."""
    handler = logging.StreamHandler(io.StringIO())
    log = logging.getLogger("interrupted")
    log.addHandler(handler)
    log.propagate = False

    def log_elsewhere() -> bool:
        thread = threading.Thread(target=log.error, args=["a record"], daemon=True)
        thread.start()
        thread.join(0.1)
        return not thread.is_alive()

    logging._lock.acquire()  # type: ignore[attr-defined]
    assert handler.lock is not None
    for _ in range(2):
        handler.acquire()
    assert not log_elsewhere()
    release_logging_locks()
    assert log_elsewhere() and handler.lock.acquire(blocking=False)
    handler.release()
    elsewhere = threading.Thread(target=handler.acquire)
    elsewhere.start()
    elsewhere.join()
    release_logging_locks()
    assert not handler.lock.acquire(blocking=False), "that of another thread is its own"
    log.removeHandler(handler)


@pytest.mark.usefixtures("hangup_handler")
class TestHangup:
    def test_it_is_handled_and_the_handlers_are_restored(self) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        before = signal.getsignal(signal.SIGTERM)
        received: list[int] = []
        with handle_termination_signals(lambda number, frame: received.append(number)):
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGHUP, signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == before

    def test_below_nohup_it_changes_nothing(self) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        received: list[int] = []
        with handle_termination_signals(lambda number, frame: received.append(number)):
            signal.raise_signal(signal.SIGHUP)
        assert received == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN

    @pytest.mark.needs_ray
    @pytest.mark.parametrize("on_ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
    def test_it_ends_a_driver_as_ctrl_c_does(self, on_ctrl_c: Any) -> None:
        """Also a background job of a script, which ignores Ctrl-C."""
        from raysweep.sweep.cluster import _treat_termination_as_interrupt

        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        before = signal.signal(signal.SIGINT, on_ctrl_c)
        try:
            with pytest.raises(KeyboardInterrupt), _treat_termination_as_interrupt():
                signal.raise_signal(signal.SIGHUP)
        finally:
            signal.signal(signal.SIGINT, before)

    def test_what_is_printed_to_a_lost_terminal_is_dropped(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The last holder of a pseudo terminal closes it: writing there is an error."""
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        holder, terminal = pty.openpty()
        with os.fdopen(terminal, "w") as stream:
            monkeypatch.setattr("sys.stderr", stream)
            with handle_termination_signals(lambda number, frame: None):
                os.close(holder)
                with pytest.raises(OSError, match="Input/output error"):
                    print("lost", file=stream, flush=True)
                signal.raise_signal(signal.SIGHUP)
                print("dropped", file=stream, flush=True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestLiveDisplays:
    def run_bar(self) -> None:
        console = create_progress_console()
        with training_progress_bar(console, 2, 5) as update:
            console.print("[bold]plain[/bold]", markup=True)
            update(1, 5)

    def test_a_file_gets_plain_lines_whatever_the_colors(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        assert Console(stderr=True).is_terminal, "rich itself takes it for a terminal"
        self.run_bar()
        assert capsys.readouterr().err == "plain\n"

    @pytest.mark.parametrize(("kind", "is_live"), [("xterm", True), ("dumb", False)])
    def test_a_terminal_that_can_gets_a_bar(
        self, kind: str, is_live: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setenv("TERM", kind)
        self.run_bar()
        assert ("epoch 1/2" in terminal.getvalue()) == is_live


@pytest.mark.mlflow
class TestRefusals:
    @pytest.fixture
    def deleted_experiment(self, workdir: Path, empty_store: Callable[[Path], None]) -> None:
        from mlflow import MlflowClient

        empty_store(workdir / "mlflow.db")
        client = MlflowClient(f"sqlite:///{workdir / 'mlflow.db'}")
        client.delete_experiment(client.create_experiment("raysweep"))

    @pytest.mark.slow
    @pytest.mark.needs_ray
    @pytest.mark.usefixtures("deleted_experiment")
    @pytest.mark.parametrize(
        "command",
        [["train", "at", "--name", "r"], ["tune", "at", "--trials", "1", "--name", "r"]],
        ids=lambda command: command[0],
    )
    def test_a_deleted_experiment_is_one_line(
        self,
        command: list[str],
        workdir: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def connect(*arguments: Any, **options: Any) -> None:
            raise AssertionError("no cluster is needed to see that MLflow refuses")

        monkeypatch.setattr("ray.init", connect)
        assert main([*command, *SETTINGS]) == 3
        line = capsys.readouterr().err.splitlines()[-1]
        uri = f"sqlite:///{workdir}/mlflow.db"
        assert line == (
            f"raysweep: error: MLflow store {uri}: its experiment 'raysweep' was deleted; restore "
            f"it with `MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id 1`, or "
            "use another --out"
        )
        assert not list((workdir / "runs").iterdir())

    def test_a_model_that_cannot_be_trained_leaves_no_folder(
        self, workdir: Path, empty_store: Callable[[Path], None]
    ) -> None:
        """TF32 on a CPU is only found when the model is built, after the log was opened."""
        empty_store(workdir / "mlflow.db")
        command = ["train", "at", "--name", "r", *SETTINGS, "--set", "compute.tf32=true"]
        assert main(command) == 2
        assert not list((workdir / "runs").iterdir())

    @pytest.mark.parametrize("command", ["train", "tune"])
    def test_a_question_mark_in_the_path_is_refused(
        self, command: str, workdir: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([command, "at", "--out", "what?x=1", *SETTINGS]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            "raysweep: error: --out what?x=1: MLflow's database cannot lie in a path with '?': "
            f"{workdir}/what?x=1; use another folder, or set MLFLOW_TRACKING_URI"
        )
        assert not list(workdir.iterdir())
