"""A real MLflow server that tests kill, stop and start again, with the same store."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen


class MlflowServer:
    """The server.

    Attributes:
        uri: Its URI, which stays the same when it is started again.
        database_uri: URI of its database, which can be read while the server is gone.
    """

    def __init__(self, folder: Path) -> None:
        """Choose a port; the database and the artifacts are in a folder."""
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.database_uri = f"sqlite:///{folder / 'server.db'}"
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def ensure_running(self) -> None:
        """Start the server unless it runs."""
        if self._process is None:
            self.start()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self._port), "--workers", "1"]
        command += ["--backend-store-uri", self.database_uri]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={
                    **os.environ,
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                    "MLFLOW_TRACKING_URI": "",
                    # It would start seven processes for jobs, which no test has.
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                },
            )
        deadline = time.monotonic() + 600
        while True:
            try:
                urlopen(f"{self.uri}/health", timeout=5).read()
                return
            except OSError:
                assert self._process.poll() is None, (self._folder / "server.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the server."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Kill the server, if it runs."""
        if self._process is not None:
            self.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
