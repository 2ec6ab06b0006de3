"""Run functions and commands in new processes that start in 0.1 s.

They are forks of a server that has imported what commands and training need. Tests of what a fresh
interpreter does start a real one instead (test_cli, test_eval, the notebook).
"""

import atexit
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

FORKS = multiprocessing.get_context("forkserver")
TRAINING = [
    "raysweep.training.trainer",
    "raysweep.training.distributed",
    # Imported by test files with functions that run in forks.
    "pytest",
    "moto.server",
]
# Command modules import these inside functions.
COMMANDS = [
    *TRAINING,
    "raysweep.commands.common",
    "raysweep.pipeline.plan",
    "raysweep.pipeline.pipeline",
    "raysweep.result_loading",
    "raysweep.sweep.tuner",
    "raysweep.terminal",
    "mlflow.tracking",
    "mlflow.pyfunc",
    "mlflow.store.tracking.sqlalchemy_workspace_store",
    "alembic.command",
    "sqlalchemy.dialects.sqlite",
    "raysweep.cli",
    "raysweep.comparison_plots",
    "raysweep.pipeline.report.contents",
    "raysweep.plots",
    "matplotlib.backends.backend_agg",
    "optuna.importance",
    "ray.dag",
    "ray.air.integrations.comet",
    "ray.air.integrations.mlflow",
    "ray.air.integrations.wandb",
    "ray.tune.logger.aim",
]
# What the server imports whoever starts it: all that commands need, where tests use Ray (see
# `conftest`). Each command would import it again in a fork of a server that a test of training had
# started.
ALWAYS: list[str] = []


class ForkedProcess:
    """A running function or command. out, err: what it has printed so far."""

    def __init__(self, process: BaseProcess, output: Path) -> None:
        self._process = process
        self._output = output
        self.pid = process.pid

    @property
    def out(self) -> str:
        return (self._output / "out").read_text(errors="replace")

    @property
    def err(self) -> str:
        # It may be in the middle of a sign.
        return (self._output / "err").read_text(errors="replace")

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float = 600) -> int:
        """Return the exit code. Raises TimeoutError, with what was printed, after `timeout`
        seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"still running after {timeout} s: {self.out}{self.err}")
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def start_function(
    function: Callable[..., object],
    *arguments: Any,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    imports: list[str] = TRAINING,
) -> ForkedProcess:
    """Call `function(*arguments)` in a new process, in `folder`; what it returns is the exit code
    (None: 0).

    environment: variables that differ from those of this process. imports: the modules that the
    fork server imports when it starts; they change nothing if it runs already.
    """
    output = Path(tempfile.mkdtemp(prefix="forked-"))
    atexit.register(shutil.rmtree, output, ignore_errors=True)
    where, variables = folder or Path.cwd(), {**os.environ, **(environment or {})}
    for name in ("out", "err"):
        (output / name).touch()
    FORKS.set_forkserver_preload([*imports, *ALWAYS])
    process = FORKS.Process(
        target=_run_in_fork, args=(output, where, variables, function, arguments)
    )
    process.start()
    return ForkedProcess(process, output)


def start_command(
    arguments: Sequence[str],
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> ForkedProcess:
    """Run `raysweep ARGUMENTS` in a new process."""
    return start_function(
        _run_command_line, list(arguments), folder=folder, environment=environment, imports=COMMANDS
    )


def wait_for_file(file: Path) -> None:
    """Wait in a fork until its test writes a file; fail after ten minutes, if the test has died."""
    deadline = time.monotonic() + 600
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.001)


def replace_spawn(patch: pytest.MonkeyPatch) -> None:
    """Replace multiprocessing's "spawn" context, which starts fresh interpreters, by the fork
    server.
    """
    FORKS.set_forkserver_preload([*TRAINING, *ALWAYS])
    get_context = multiprocessing.get_context
    patch.setattr(
        multiprocessing,
        "get_context",
        lambda method=None: FORKS if method == "spawn" else get_context(method),
    )


def _run_command_line(arguments: list[str]) -> int:
    from raysweep.cli import main

    return main(arguments)


def _run_in_fork(
    output: Path,
    folder: Path,
    variables: dict[str, str],
    function: Callable[..., object],
    arguments: tuple[Any, ...],
) -> None:
    # What the fork server has imported stays, and its memory is shared until it is touched.
    gc.freeze()
    for number, name in enumerate(("out", "err"), start=1):
        file = os.open(output / name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(variables)
    if "ray" in sys.modules:
        # Ray reads this variable when it is imported: in the fork server, perhaps before a test
        # cluster on loopback was started.
        from ray._private import ray_constants

        ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(
            ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, sys.platform == "linux"
        )
    os.chdir(folder)
    # The fork server ignores SIGINT, and so would its forks; a fresh interpreter does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = function(*arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.exit(code)
