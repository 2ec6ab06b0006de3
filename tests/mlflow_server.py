"""A real MLflow server that tests kill, stop and start again, with the same store."""

import os
import signal
import time
from pathlib import Path
from urllib.request import urlopen

import forked_processes
from forked_processes import ForkedProcess
from free_ports import choose_free_port


class MlflowServer:
    """The server.

    Attributes:
        uri: Its URI, which stays the same when it is started again.
        database_uri: URI of its database, which can be read while the server is gone.
    """

    def __init__(self, folder: Path) -> None:
        """Choose a port; the database and the artifacts are in a folder."""
        self._folder = folder
        self._port = choose_free_port()
        self.database_uri = f"sqlite:///{folder / 'server.db'}"
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: ForkedProcess | None = None

    def ensure_running(self) -> None:
        """Start the server unless it runs."""
        if self._process is None:
            self.start()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        arguments = ["server", "--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        arguments += ["--backend-store-uri", self.database_uri]
        arguments += ["--artifacts-destination", str(self._folder / "artifacts")]
        self._process = forked_processes.start_function(
            _run_mlflow,
            arguments,
            folder=self._folder,
            environment={
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "MLFLOW_TRACKING_URI": "",
                # It would start seven processes for jobs, which no test has.
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            },
            imports=forked_processes.COMMANDS,
        )
        deadline = time.monotonic() + 600
        while True:
            try:
                urlopen(f"{self.uri}/health", timeout=5).read()
                return
            except OSError:
                assert self._process.poll() is None, self._process.err
                assert time.monotonic() < deadline
                time.sleep(0.1)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the server."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill the server, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process = None


def _run_mlflow(arguments: list[str]) -> None:
    """Run `mlflow ARGUMENTS` and its server in this process.

    mlflow itself would start the server in another one, which would import everything again.
    """
    import mlflow.server
    from mlflow.cli import cli
    from uvicorn.main import main as run_uvicorn

    def run_here(command: list[str], extra_env: dict[str, str], **options: object) -> None:
        os.environ.update(extra_env)
        assert command[1:3] == ["-m", "uvicorn"]
        run_uvicorn(command[3:])

    mlflow.server._exec_cmd = run_here
    cli(arguments)
