"""Workers of Ray that are forks of a server: what they inherit, and what ends with what."""

import array
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import forked_processes
import psutil
import pytest

from raysweep.spec import SpecError
from raysweep.sweep import worker_server
from raysweep.sweep.worker_server import SOCKET_VARIABLE, WorkerServer, run_worker_server

WORKER = """
import json, os, sys, threading, time
from pathlib import Path
facts = {
    "arguments": sys.argv[1:],
    "folder": os.getcwd(),
    "parent": os.getppid(),
    "niceness": os.getpriority(os.PRIO_PROCESS, 0),
    "variable": os.environ.get("ANSWER"),
    "has_torch": "torch" in sys.modules,
}
if "ray" in sys.modules:
    from ray import ObjectID
    ids = facts["ids"] = [ObjectID.from_random().hex()]
    for _ in range(2):
        thread = threading.Thread(target=lambda: ids.append(ObjectID.from_random().hex()))
        thread.start()
        thread.join()
print(json.dumps(facts), flush=True)
while Path(sys.argv[1]).exists():
    time.sleep(0.01)
"""


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def launch(folder: Path, environment: dict[str, str], niceness: int = 0) -> subprocess.Popen[bytes]:
    """Start a worker as a raylet does. It ends when the file `runs` is gone."""
    (folder / "worker.py").write_text(WORKER)
    (folder / "runs").touch()
    context = json.dumps({"env_vars": {"ANSWER": "42"}, "py_executable": sys.executable})
    command = [
        *(sys.executable, worker_server.__file__, str(folder / "worker.py"), str(folder / "runs")),
        *(f"--serialized-runtime-env-context={context}", "--language=PYTHON"),
    ]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: os.nice(niceness),
    )


def read_facts(worker: subprocess.Popen[bytes]) -> dict[str, object]:
    assert worker.stdout is not None
    facts: dict[str, object] = json.loads(worker.stdout.readline())
    return facts


@pytest.fixture
def server(ray_cluster: object) -> psutil.Process:
    """The server of the cluster of these tests."""
    (running,) = worker_server._running_servers
    return psutil.Process(running._process.pid)


@pytest.mark.ray
def test_a_worker_is_a_fork_with_the_environment_of_its_launcher(
    server: psutil.Process, tmp_path: Path
) -> None:
    worker = launch(tmp_path, {}, niceness=7)
    facts = read_facts(worker)
    facts.pop("ids")
    assert facts == {
        "arguments": [str(tmp_path / "runs")],
        "folder": str(tmp_path),
        "parent": server.pid,
        "niceness": os.getpriority(os.PRIO_PROCESS, 0) + 7,
        "variable": "42",
        "has_torch": True,
    }
    assert "ANSWER" not in server.environ()
    (tmp_path / "runs").unlink()
    assert worker.wait() == 0


@pytest.mark.ray
def test_worker_and_launcher_end_with_each_other(server: psutil.Process, tmp_path: Path) -> None:
    for ended in ("launcher", "worker"):
        before = set(server.children())
        launcher = launch(tmp_path, {})
        read_facts(launcher)
        (worker,) = set(server.children()) - before
        (launcher if ended == "launcher" else worker).kill()
        wait_until(lambda worker=worker: not worker.is_running())
        launcher.wait()


@pytest.mark.needs_ray
@pytest.mark.parametrize("path", ["", "/nonexistent/socket"])
def test_without_a_server_a_worker_is_an_ordinary_one(tmp_path: Path, path: str) -> None:
    # Ray has both scripts in one folder.
    script = Path(import_module("ray._private.workers.setup_worker").__file__ or "")
    shutil.copy(script, tmp_path)
    worker = launch(tmp_path, {SOCKET_VARIABLE: path})
    facts = read_facts(worker)
    assert facts["variable"] == "42" and facts["arguments"] == [str(tmp_path / "runs")]
    assert facts["parent"] == os.getpid() and not facts["has_torch"]
    (tmp_path / "runs").unlink()
    assert worker.wait() == 0


@pytest.mark.ray
def test_a_server_survives_launchers_that_are_killed_while_they_ask(
    server: psutil.Process, tmp_path: Path
) -> None:
    """Each of these asks with less than a whole request, and ends."""
    path = str(worker_server._running_servers[0].socket_path)
    for part in (b"", b"\0" * 4, (10_000).to_bytes(8, "big"), (10_000).to_bytes(8, "big") + b"{"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            if part:
                streams = array.array("i", [1, 2])
                connection.sendmsg([part], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    worker = launch(tmp_path, {})
    assert read_facts(worker)["parent"] == server.pid
    (tmp_path / "runs").unlink()
    assert worker.wait() == 0


@pytest.mark.needs_ray
def test_a_worker_is_an_ordinary_one_if_the_server_dies_before_it_forks(tmp_path: Path) -> None:
    script = Path(import_module("ray._private.workers.setup_worker").__file__ or "")
    shutil.copy(script, tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        worker = launch(tmp_path, {SOCKET_VARIABLE: str(tmp_path / "s")})
        connection, _ = listener.accept()
        connection.recv(8)
        connection.close()
    assert read_facts(worker)["parent"] == os.getpid()
    (tmp_path / "runs").unlink()
    assert worker.wait() == 0


def test_the_switch_is_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("no", "2"):
        monkeypatch.setenv(worker_server.SWITCH_VARIABLE, value)
        with pytest.raises(SpecError, match=f"FORK_WORKERS = '{value}': expected 0 or 1"):
            worker_server.can_fork_workers()
    monkeypatch.setenv(worker_server.SWITCH_VARIABLE, "0")
    assert not worker_server.can_fork_workers()


def test_a_server_leaves_the_sockets_of_others_that_live(tmp_path: Path) -> None:
    """Even if their process has its own id, or one that does not exist here: in a container."""
    names = [f"workers-{os.getpid()}", "workers-4999999"]
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        for listener, name in zip((first, second), names, strict=True):
            listener.bind(str(tmp_path / name))
            listener.listen()
        WorkerServer(tmp_path).stop()
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    WorkerServer(tmp_path).stop()
    assert not list(tmp_path.iterdir())


def start_server_and_wait(folder: Path) -> None:
    """Be a command that is killed while its server imports."""
    with run_worker_server(folder) as server:
        (folder / "pid").write_text(str(server._process.pid))
        time.sleep(600)


def test_a_server_ends_with_its_command(tmp_path: Path) -> None:
    command = forked_processes.start_function(start_server_and_wait, tmp_path)
    wait_until(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()))
    server = psutil.Process(int((tmp_path / "pid").read_text()))
    os.kill(command.pid, signal.SIGKILL)
    wait_until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)
    (path,) = tmp_path.glob("workers-*")
    WorkerServer(tmp_path).stop()
    assert not path.exists() and not list(tmp_path.glob("workers-*")), "the next one tidies up"


def test_blocks_share_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_server, "_running_servers", [])
    monkeypatch.delenv(SOCKET_VARIABLE, raising=False)
    with run_worker_server(tmp_path) as outer:
        assert os.environ[SOCKET_VARIABLE] == str(outer.socket_path)
        assert outer.socket_path.stat().st_mode & 0o777 == 0o600
        with run_worker_server(tmp_path) as inner:
            assert inner is outer
        assert outer._process.poll() is None
    assert SOCKET_VARIABLE not in os.environ
    assert outer._process.poll() == -signal.SIGKILL and not outer.socket_path.exists()


def print_ids_of_forks(n_forks: int, n_threads: int) -> None:
    """Print what each fork draws in its main thread and in new threads."""
    from ray import ObjectID

    found: list[str] = []

    def draw() -> None:
        found.append(ObjectID.from_random().hex())

    for _ in range(n_forks):
        worker_server._skip_random_ids()
        child = os.fork()
        if child == 0:
            draw()
            for _ in range(n_threads):
                thread = threading.Thread(target=draw)
                thread.start()
                thread.join()
            os.write(1, "".join(f"{name}\n" for name in found).encode())
            os._exit(0)
        os.waitpid(child, 0)


@pytest.mark.slow
@pytest.mark.needs_ray
def test_no_two_forks_draw_the_same_ids() -> None:
    done = forked_processes.start_function(
        print_ids_of_forks, 4, 24, imports=forked_processes.COMMANDS
    )
    assert done.wait() == 0, done.err
    ids = done.out.split()
    assert len(ids) == 4 * 25 and len(set(ids)) == len(ids)
