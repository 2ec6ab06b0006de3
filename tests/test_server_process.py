"""A worker server that is a fork of the command: what it shares, and what it must not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from test_worker_server import launch, read_facts, wait_until

from raysweep.sweep.worker_server import SOCKET_VARIABLE

# A new interpreter that has one thread and has imported no library.
BEGINNING = """
import atexit, fcntl, json, os, signal, socket, sys, threading, time
from pathlib import Path
from raysweep.sweep.server_process import ForkedProcess, can_fork_this_process
from raysweep.sweep.worker_server import run_worker_server
folder = Path(sys.argv[1])
lock = open(folder / "lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
assert can_fork_this_process()
"""

ENDS = """
def fail():
    raise ValueError("a bug")
signal.signal(signal.SIGTERM, lambda *_: None)
atexit.register(lambda: (folder / f"ended-{os.getpid()}").touch())
codes = []
for run in (lambda: None, lambda: sys.exit(3), lambda: sys.exit("words"), fail,
            lambda: os.kill(os.getpid(), signal.SIGTERM), lambda: sys.stdin.read()):
    kept, other = socket.socketpair()
    print("once", end="")
    process = ForkedProcess(run, kept)
    has_ended = len(codes) < 5
    while has_ended and process.poll() is None:
        time.sleep(0.01)
    process.stop()
    ended = (folder / f"ended-{process.pid}").exists()
    codes.append((process.poll(), ended))
    # It held no copy of this end, and has closed its own.
    kept.close()
    assert other.recv(1) == b""
waiting = threading.Event()
threading.Thread(target=waiting.wait).start()
can_fork = can_fork_this_process()
waiting.set()
sys.stdout.write("\\n" + json.dumps([codes, can_fork]))
"""

SERVES = """
with run_worker_server(folder) as server:
    assert type(server._process) is ForkedProcess
    from ray import ObjectID
    ids = [ObjectID.from_random().hex() for _ in range(10_000)]
    for _ in range(300):
        thread = threading.Thread(target=lambda: ids.append(ObjectID.from_random().hex()))
        thread.start()
        thread.join()
    facts = [server._process.pid, str(server.socket_path), "torch" in sys.modules, ids]
    print(json.dumps(facts), flush=True)
    time.sleep(600)
"""


def start(code: str, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", BEGINNING + code, str(folder)],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forks on Linux only")
def test_a_fork_ends_as_a_process_of_its_own(tmp_path: Path) -> None:
    output, _ = start(ENDS, tmp_path).communicate()
    printed, _, found = output.decode().rpartition("\n")
    codes, can_fork = json.loads(found)
    assert printed == "once" * 6, "forks print nothing that this process has buffered"
    # The signal ends it without the function that the command had installed.
    assert codes == [
        *([0, True], [3, True], [1, True], [1, True]),
        *([-signal.SIGTERM, False], [-signal.SIGKILL, False]),
    ]
    assert not can_fork, "a fork would lack the other thread"


@pytest.mark.needs_ray
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="workers are forks on Linux only")
def test_workers_of_a_forked_server_share_its_imports_and_nothing_else(tmp_path: Path) -> None:
    command = start(SERVES, tmp_path)
    assert command.stdout is not None
    pid, socket_path, has_torch, ids = json.loads(command.stdout.readline())
    assert has_torch, "the command does not import it again"
    worker = launch(tmp_path, {SOCKET_VARIABLE: socket_path})
    facts = read_facts(worker)
    assert facts["parent"] == pid and facts["has_torch"] and facts["variable"] == "42"
    assert facts["arguments"] == [str(tmp_path / "runs")]
    assert len({*ids, *facts["ids"]}) == 10_303, "Ray's random ids of both differ"
    server = psutil.Process(pid)
    command.kill()
    command.wait()
    wait_until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)
    with (tmp_path / "lock").open("w") as lock:
        import fcntl

        # The worker lives on, and holds no lock of the command.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert worker.poll() is None
    (tmp_path / "runs").unlink()
    assert worker.wait() == 0
