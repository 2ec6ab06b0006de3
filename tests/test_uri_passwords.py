"""Passwords in the environment or in a file, in place of a URI that everybody sees."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from raysweep.cli import main
from raysweep.errors import InfrastructureError, SpecError
from raysweep.tracking import get_mlflow_version
from raysweep.uri_passwords import fill_in_passwords

PASSWORD = "hu/sh@ :1"


def test_a_variable_or_a_file_holds_the_password(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri = "postgresql://me:${DB_PASSWORD}@h/db"
    monkeypatch.setenv("DB_PASSWORD", PASSWORD)
    expected = "postgresql://me:hu%2Fsh%40%20%3A1@h/db"
    assert fill_in_passwords(uri, "--optuna") == expected
    monkeypatch.delenv("DB_PASSWORD")
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    monkeypatch.setenv("DB_PASSWORD_FILE", str(tmp_path / "password"))
    assert fill_in_passwords(uri, "--optuna") == expected
    assert fill_in_passwords("sqlite:///a$b{c}.db", "x") == "sqlite:///a$b{c}.db"


@pytest.mark.needs_ray
def test_a_variable_that_is_missing_is_one_line(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tune", "at", "--trials", "1", "--optuna", "postgresql://me:${NO_SUCH}@h/db"]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "raysweep: error: --optuna: ${NO_SUCH}: set the environment variable NO_SUCH or "
        "NO_SUCH_FILE"
    )
    monkeypatch.setenv("NO_SUCH_FILE", str(workdir / "none"))
    with pytest.raises(SpecError, match=r"NO_SUCH_FILE=.*none: cannot be read: No such file"):
        fill_in_passwords("x://${NO_SUCH}@h", "--optuna")


@contextmanager
def serve_with_password() -> Iterator[str]:
    """Run a server that answers the version of MLflow to those who know the password."""
    expected = "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.headers.get("Authorization") == expected else 401)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"3.0.0")

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.mlflow
def test_mlflow_gets_the_password_and_nobody_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_with_password() as host:
        monkeypatch.setenv("TEAM_WORD", PASSWORD)
        uri = f"http://me:${{TEAM_WORD}}@{host}"
        assert get_mlflow_version(uri) == "3.0.0"
        monkeypatch.setenv("TEAM_WORD", "an/other")
        with pytest.raises(InfrastructureError) as refused:
            get_mlflow_version(uri)
    assert "answers 401" in str(refused.value)
    assert "an/other" not in str(refused.value) and "an%2Fother" not in str(refused.value)
