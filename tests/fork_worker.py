"""Starts Ray's worker processes as forks of one process that has imported what they need: 0.1 s
each instead of 5.

A node of the test cluster is given this file as its `setup_worker_path`. The first worker of all
nodes starts the server, which serves later nodes too, and waits as long as its own node lives, so
that all workers are descendants of the process that started this node.
"""

import array
import fcntl
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

# The variable that names the folder of the server's socket.
FOLDER = "RAYSWEEP_TEST_FORKS"
IMPORTS = (
    "ray._private.workers.default_worker",
    "ray.train.torch",
    "raysweep.sweep.tuner",
    "raysweep.training.distributed",
    # What the first optimiser in a process imports.
    "torch._dynamo",
)
# Seconds between two checks that the raylet still runs.
POLL_SECONDS = 1.0


def launch(arguments: list[str]) -> None:
    """Ask the server to fork a worker. A raylet calls this for each; the first call starts the
    server.
    """
    context = "--serialized-runtime-env-context="
    given = [
        argument.removeprefix(context) for argument in arguments if argument.startswith(context)
    ]
    environment = dict(os.environ) | json.loads(given[0] if given else "{}").get("env_vars", {})
    worker = [
        argument
        for argument in arguments
        if not argument.startswith(("--serialized-runtime", "--language"))
    ]
    path, server = Path(os.environ[FOLDER], "server"), None
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            # Ray keeps the job that it finds in the environment when it is imported. Forks of a
            # server with a job would serve that one only, and other drivers would wait forever.
            server = subprocess.Popen(
                [sys.executable, __file__, "serve", str(path)],
                env={**os.environ, "RAY_JOB_ID": "ffffffff"},
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        message = json.dumps(
            {"argv": worker, "environment": environment, "folder": str(Path.cwd())}
        ).encode()
        streams = array.array("i", [1, 2])
        connection.sendmsg(
            [len(message).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)]
        )
        connection.sendall(message)
        # The raylet started this process and takes its end for the end of the worker, which in turn
        # ends with this process: wait until the worker or the raylet ends.
        raylet = os.getppid()
        while not select.select([connection], [], [], POLL_SECONDS)[0]:
            if os.getppid() != raylet:
                os._exit(1)
    if server is not None:
        server.wait()


def serve(path: Path) -> None:
    """Fork a worker for each request, until the raylet that started this process ends."""
    for name in IMPORTS:
        __import__(name)
    raylet = int(os.environ["RAY_RAYLET_PID"])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path.with_suffix(".new")))
        listener.listen(64)
        path.with_suffix(".new").rename(path)
        while _is_alive(raylet):
            if not select.select([listener], [], [], POLL_SECONDS)[0]:
                continue
            connection, _ = listener.accept()
            _draw_random_ids()
            if os.fork() == 0:
                # When the raylet kills a worker it kills the worker's process group, which must not
                # be the server's.
                os.setsid()
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _become_worker(connection)
            connection.close()
    path.unlink()


def _draw_random_ids() -> None:
    """Draw as many of Ray's random ids as no test's worker does, so that the next fork's are
    others.

    Forks inherit the state of the generator: two that started at once gave their first objects the
    same id, one of them crashed, and the first driver of the node waited for it forever.
    """
    from ray import ObjectID

    for _ in range(2_000):
        ObjectID.from_random()


def _become_worker(connection: socket.socket) -> None:
    """Read the request and run it. The connection stays open: by its end the launcher sees that of
    the worker, and the worker that of the launcher.
    """
    # What the server has imported stays, and its memory is shared until it is touched.
    gc.freeze()
    head, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(8))
    streams = array.array("i")
    streams.frombytes(ancillary[0][2])
    size, message = int.from_bytes(head, "big"), b""
    while len(message) < size:
        message += connection.recv(size - len(message))
    request = json.loads(message)
    for number, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["argv"]
    threading.Thread(target=_exit_with_launcher, args=(connection,), daemon=True).start()
    runpy.run_path(sys.argv[0], run_name="__main__")
    os._exit(0)


def _exit_with_launcher(connection: socket.socket) -> None:
    """End this worker when its launcher has ended, because the raylet of their node is dead.

    A worker of Ray watches its raylet, but a fork watches that of the server's node: without this,
    the trials of a dead node would train on, beside those that replace them.
    """
    connection.recv(1)
    os._exit(1)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    serve(Path(sys.argv[2])) if sys.argv[1] == "serve" else launch(sys.argv[1:])
