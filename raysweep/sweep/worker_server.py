"""Start Ray's worker processes as forks of one process that has imported what they need.

An ordinary worker takes five processor seconds to import Ray, PyTorch and raysweep. A fork takes a
tenth of a second, and shares the memory of the imports. Only nodes that raysweep starts on this
machine have such workers: their raylet runs this file, by its path, as the launcher of each worker
and of its two agents, that of the dashboard and that of runtime environments
(`ray_internals.use_worker_script`). A launcher asks the server for a fork; where there is no
server, it becomes an ordinary worker or agent. So this file imports the standard library only. What
is said of workers below holds for agents, too.
"""

import array
import errno
import gc
import json
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from raysweep.sweep.server_process import ForkedProcess, NewInterpreter

SOCKET_VARIABLE = "RAYSWEEP_WORKER_SERVER"
"""Environment variable of a raylet with the path of the server's socket."""
SWITCH_VARIABLE = "RAYSWEEP_FORK_WORKERS"
"""Environment variable of the user; 0 makes all workers ordinary ones."""
# What needs no variable of Ray is imported before the first request.
_EARLY_IMPORTS = ("torch", "raysweep.training.distributed")
_RAY_IMPORTS = ("ray.train.torch", "raysweep.sweep.tuner")
# Ray keeps the job that it finds in the environment when it is imported. Forks of a server with a
# job would serve that job only, and other drivers would wait forever.
_NO_JOB = {"RAY_JOB_ID": "ffffffff"}
_CONTEXT_OPTION = "--serialized-runtime-env-context="
_SOCKET_PREFIX = "workers-"
# What a fork tells its launcher first.
_STARTED = b"1"
# Seconds between two checks that another process still runs.
_POLL_SECONDS = 1.0
# Upper bounds: random ids that the main thread of a worker draws, and further threads of a worker
# that draw any.
_N_SKIPPED_IDS = 2_000
_N_SKIPPED_THREADS = 64
# Upper bound: threads of a driver that draw random ids.
_N_DRIVER_THREADS = 1_000


class WorkerServer:
    """Starts and stops the server's process, which ends with the process that started it.

    Args:
        folder: Private folder for its socket, with a path that is short enough for one.
    """

    def __init__(self, folder: Path) -> None:
        # Imported here, because launchers run this file, too, and do not need it.
        import secrets

        _delete_stale_sockets(folder)
        # Containers that share the folder may have equal process ids.
        name = f"{os.getpid()}-{secrets.token_hex(4)}"
        self.socket_path = folder / f"{_SOCKET_PREFIX}{name}"
        with socket.socket(socket.AF_UNIX) as listener:
            # Other commands delete sockets that nobody listens to.
            new_path = folder / f".{name}"
            listener.bind(str(new_path))
            new_path.chmod(0o600)
            # Requests wait in it until the server has imported what it needs.
            listener.listen(256)
            new_path.rename(self.socket_path)
            self._process = _start_process(listener)

    def import_ray(self) -> None:
        """Let the server import Ray before the cluster starts, and wait until it has done so.

        Without this call, the server imports Ray when it is asked for the first fork. That may be
        too late for the agents of a node, which have half a minute to start. And at its import Ray
        would read the variables of that fork: whether clusters require a token, which `ray.init`
        turns on, and the process whose end also ends a worker.
        """
        with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
            connection.connect(str(self.socket_path))
            _send_request(connection, {"environment": _make_import_environment()})
            # The server sends nothing, but closes the connection when it has imported Ray.
            connection.recv(1)

    def stop(self) -> None:
        """End the server; workers that it has forked keep running."""
        self._process.stop()
        self.socket_path.unlink(missing_ok=True)


def _start_process(listener: socket.socket) -> "ForkedProcess | NewInterpreter":
    """Start the server's process: a fork of this one, after its imports, where that is safe."""
    from raysweep.sweep.ray_environment import set_environment
    from raysweep.sweep.server_process import (
        ForkedProcess,
        NewInterpreter,
        can_fork_this_process,
        import_in_thread,
    )

    if not can_fork_this_process():
        arguments = [__file__, "serve", str(listener.fileno())]
        return NewInterpreter(arguments, listener, _NO_JOB)
    with set_environment(_make_import_environment() | _NO_JOB):
        import_in_thread((*_EARLY_IMPORTS, *_RAY_IMPORTS))
    return ForkedProcess(lambda: _serve_as_fork(listener), listener)


def _make_import_environment() -> dict[str, str]:
    """Return the environment in which a server imports Ray before the cluster starts."""
    return {"RAY_AUTH_MODE": "token", "RAY_RAYLET_PID": str(os.getpid())} | os.environ


def _delete_stale_sockets(folder: Path) -> None:
    """Delete the sockets of servers whose command was killed."""
    for path in folder.glob(f"{_SOCKET_PREFIX}*"):
        with socket.socket(socket.AF_UNIX) as connection:
            # A full queue is another error: its server runs.
            connection.setblocking(False)
            if connection.connect_ex(str(path)) == errno.ECONNREFUSED:
                path.unlink(missing_ok=True)


_running_servers: list[WorkerServer] = []


@contextmanager
def run_worker_server(folder: Path) -> Iterator[WorkerServer]:
    """Context manager that runs a server, or uses the one that already runs.

    Args:
        folder: Private folder for its socket, with a path that is short enough for one.

    Yields:
        The server. Raylets that are started in the block find it.
    """
    if _running_servers:
        yield _running_servers[-1]
        return
    server = WorkerServer(folder)
    _running_servers.append(server)
    os.environ[SOCKET_VARIABLE] = str(server.socket_path)
    try:
        yield server
    finally:
        del os.environ[SOCKET_VARIABLE]
        _running_servers.remove(server)
        server.stop()


def can_fork_workers() -> bool:
    """Return whether workers can be forks here: on Linux, unless the user said no.

    Raises:
        SpecError: The user's variable is neither 0 nor 1.
    """
    from raysweep.spec import SpecError

    switch = os.environ.get(SWITCH_VARIABLE) or "1"
    if switch not in ("0", "1"):
        raise SpecError(f"{SWITCH_VARIABLE} = {switch!r}: expected 0 or 1")
    return sys.platform == "linux" and switch == "1"


def _launch_worker(arguments: Sequence[str]) -> None:
    """Ask the server for the worker that a raylet wants, and end when that worker ends.

    The raylet started this process, and takes its end for the end of the worker. Where Ray must set
    up more than environment variables, the worker is an ordinary one.
    """
    contexts = [a.removeprefix(_CONTEXT_OPTION) for a in arguments if a.startswith(_CONTEXT_OPTION)]
    context = json.loads(contexts[0] if contexts else "{}")
    variables = context.pop("env_vars", None) or {}
    worker_arguments = [
        argument
        for argument in arguments
        if not argument.startswith(("--serialized-runtime-env", "--language"))
    ]
    is_plain = (
        not [value for value in context.values() if value not in (None, [], sys.executable)]
        and not any("$" in value for value in variables.values())
        and not worker_arguments[0].startswith("-")
    )
    connection = _connect_to_server() if is_plain else None
    if connection is None or not _request_fork(connection, worker_arguments, variables):
        _become_ordinary_worker(worker_arguments)
    _wait_for_data(connection)


def _request_fork(
    connection: socket.socket, worker_arguments: Sequence[str], variables: dict[str, str]
) -> bool:
    """Ask for a fork and wait for it; return False if the server ends before it has made one."""
    request = {
        "arguments": worker_arguments,
        "environment": os.environ | variables,
        "folder": str(Path.cwd()),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "oom_score_adj": _read_oom_score(),
    }
    try:
        _send_request(connection, request)
        _wait_for_data(connection)
        return connection.recv(1) == _STARTED
    except ConnectionError:
        return False


def _send_request(connection: socket.socket, request: dict[str, Any]) -> None:
    """Send a request to the server, with the standard streams of this process."""
    message = json.dumps(request).encode()
    streams = array.array("i", [0, 1, 2])
    connection.sendmsg(
        [len(message).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)]
    )
    connection.sendall(message)


def _read_oom_score() -> str:
    """Return what Ray has told the kernel of this process; "" where it may not be read."""
    with suppress(OSError):
        return Path("/proc/self/oom_score_adj").read_text(encoding="ascii")
    return ""


def _wait_for_data(connection: socket.socket) -> None:
    """Wait until something can be read, or the other side has ended; end with the raylet."""
    raylet = os.getppid()
    while not select.select([connection], [], [], _POLL_SECONDS)[0]:
        if os.getppid() != raylet:
            os._exit(1)


def _connect_to_server() -> socket.socket | None:
    """Connect to the server; None if there is none."""
    path = os.environ.get(SOCKET_VARIABLE)
    if not path:
        return None
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        return None
    return connection


def _become_ordinary_worker(worker_arguments: Sequence[str]) -> NoReturn:
    """Run in place of this launcher what Ray would have started without it.

    For a worker this is setup_worker.py with the arguments of the launcher, the first of which is
    the path of the worker's script, in the same folder. For an agent it is the script of the agent.
    """
    first_script = next(argument for argument in worker_arguments if argument.endswith(".py"))
    setup_script = Path(first_script).with_name("setup_worker.py")
    scripts = [str(setup_script)] if setup_script.exists() else []
    os.execv(sys.executable, [sys.executable, *scripts, *sys.argv[1:]])


def _serve(listener: socket.socket) -> None:
    """Import, then serve each request, until the process that started this one ends."""
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for name in _EARLY_IMPORTS:
        __import__(name)
    while os.getppid() == parent:
        ready, _, _ = select.select([listener, sys.stdin], [], [], _POLL_SECONDS)
        if sys.stdin in ready:
            return
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        request, streams = _read_request(connection)
        if request is not None:
            _serve_request(request, streams, connection, listener)
        connection.close()
        for stream in streams:
            os.close(stream)


def _serve_as_fork(listener: socket.socket) -> None:
    """Serve in a fork of the driver, so that no worker draws the same random ids as the driver.

    Each thread that draws ids gets a generator, whose seed is drawn when it draws the first one.
    The fork has a copy of the state that seeds come from. So it first uses up the seeds of all
    threads that the driver may still start, and of its main thread, which has drawn no id yet.
    """
    _draw_in_new_threads(_N_DRIVER_THREADS)
    _serve(listener)


def _serve_request(
    request: dict[str, Any],
    streams: Sequence[int],
    connection: socket.socket,
    listener: socket.socket,
) -> None:
    """Import Ray if that was not done before; fork a worker if the request asks for one."""
    if _RAY_IMPORTS[-1] not in sys.modules:
        os.environ.update(request["environment"] | _NO_JOB)
        for name in _RAY_IMPORTS:
            __import__(name)
    if "arguments" not in request:
        return
    _skip_random_ids()
    if os.fork() == 0:
        # When the raylet kills a worker it kills the worker's process group, which must not be the
        # server's.
        os.setsid()
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _become_worker(request, streams, connection)


def _skip_random_ids() -> None:
    """Draw random ids of Ray, so that the next fork draws others.

    Forks inherit the state of the generator of this thread, and of those that take turns to seed
    the generator of each new thread. If two forks gave objects or calls the same ids, one of the
    forks or an actor that both call would crash, and drivers and trials would wait for it forever.
    """
    from ray import ObjectID

    for _ in range(_N_SKIPPED_IDS):
        ObjectID.from_random()
    _draw_in_new_threads(_N_SKIPPED_THREADS)


def _draw_in_new_threads(n_threads: int) -> None:
    """Draw one random id in each of `n_threads` new threads."""
    from ray import ObjectID

    for _ in range(n_threads):
        thread = threading.Thread(target=ObjectID.from_random)
        thread.start()
        thread.join()


def _read_request(connection: socket.socket) -> tuple[dict[str, Any] | None, Sequence[int]]:
    """Return a launcher's request and its standard streams; None if it was killed meanwhile."""
    streams = array.array("i")
    message = b""
    try:
        head, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * streams.itemsize))
        for _, _, descriptors in ancillary:
            streams.frombytes(descriptors)
        size = int.from_bytes(head, "big")
        while len(message) < size and (part := connection.recv(size - len(message))):
            message += part
    except ConnectionError:
        size = 0
    if size == 0 or len(message) < size:
        for stream in streams:
            os.close(stream)
        return None, ()
    return json.loads(message), streams


def _become_worker(
    request: dict[str, Any], streams: Sequence[int], connection: socket.socket
) -> NoReturn:
    """Run the requested worker in this fork.

    The connection stays open: its end tells the launcher that the worker has ended, and the worker
    that the launcher has.
    """
    import runpy

    connection.sendall(_STARTED)
    # What the server has imported stays, and its memory is shared until it is touched.
    gc.freeze()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    # As Ray has set them for the process that it started: its workers give way to others.
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, request["niceness"])
        Path("/proc/self/oom_score_adj").write_text(request["oom_score_adj"], encoding="ascii")
    threading.Thread(target=_end_with_launcher, args=(connection,), daemon=True).start()
    sys.argv = request["arguments"]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    os._exit(0)


def _end_with_launcher(connection: socket.socket) -> None:
    """End this worker when its launcher has ended, because the raylet of their node is dead.

    Otherwise the trials of a dead node would train on, beside those that replace them.
    """
    connection.recv(1)
    os._exit(1)


if __name__ == "__main__":
    # Python puts the folder of this file first: its modules would hide others of the same name.
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]
    if sys.argv[1] == "serve":
        _serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        _launch_worker(sys.argv[1:])
