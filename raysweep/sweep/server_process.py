"""The process of the worker server: a fork of this one where that is safe, else a new interpreter.

A fork shares what this process has imported. So PyTorch, Ray and raysweep are imported once, for
the driver and for all workers on its machine.
"""

import atexit
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from raysweep.logs import detach_command_log

# These libraries may have started threads. A fork lacks them, and would wait for them forever.
_THREADED_LIBRARIES = ("numpy", "torch", "ray")
_HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def can_fork_this_process() -> bool:
    """Return whether a fork of this process can do all that a new process could.

    It cannot if this process has other threads, or has imported a library that may have started
    some. For example, a program of the user that calls `raysweep.tune` may have.
    """
    has_used_libraries = any(name in sys.modules for name in _THREADED_LIBRARIES)
    return len(list(Path("/proc/self/task").iterdir())) == 1 and not has_used_libraries


def import_in_thread(modules: Sequence[str]) -> None:
    """Import modules in a thread of their own, and wait for it.

    Ray draws random ids from one generator per thread, and some of its modules draw an id when they
    are imported. If this thread had drawn one, a fork would draw the same next ids as it.

    Args:
        modules: Names of the modules.

    Raises:
        ImportError: One of them is missing.
    """
    imported: Future[None] = Future()

    def run() -> None:
        try:
            for name in modules:
                import_module(name)
        except BaseException as error:
            imported.set_exception(error)
        else:
            imported.set_result(None)

    thread = threading.Thread(target=run, name="imports")
    thread.start()
    # Unlike `join`, this can be interrupted: Python still waits for the thread at its end.
    imported.result()
    thread.join()


class ForkedProcess:
    """A fork of this process in which a function runs.

    Attributes:
        pid: Its process id.
    """

    def __init__(self, function: Callable[[], None], kept_socket: socket.socket) -> None:
        """Fork this process, which has one thread.

        Args:
            function: Runs in the fork. Its standard input is a pipe that is closed when this
                process ends.
            kept_socket: The only other descriptor that the fork keeps.
        """
        read_end, self._write_end = os.pipe()
        _flush_output()
        with _block_signals(), warnings.catch_warnings():
            # The threads of NumPy's linear algebra end before a fork, and start again after it.
            warnings.simplefilter("ignore", DeprecationWarning)
            gc.freeze()
            self.pid = os.fork()
            if self.pid == 0:
                _run_in_fork(function, read_end, kept_socket.fileno())
            gc.unfreeze()
        os.close(read_end)
        self._exit_code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or minus the signal that ended it; None while it runs."""
        return self._wait(os.WNOHANG)

    def stop(self) -> None:
        """Kill the process. The processes that it has forked keep running."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self._wait(0)
        os.close(self._write_end)

    def _wait(self, options: int) -> int | None:
        """Wait for its end as `os.waitpid` does; return its exit code."""
        if self._exit_code is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self._exit_code = os.waitstatus_to_exitcode(status)
        return self._exit_code


class NewInterpreter:
    """A Python process that shares nothing with this one.

    Attributes:
        pid: Its process id.
    """

    def __init__(
        self, arguments: list[str], kept_socket: socket.socket, variables: dict[str, str]
    ) -> None:
        """Start it. Its standard input is a pipe that is closed when this process ends.

        Args:
            arguments: Arguments of the interpreter.
            kept_socket: The only descriptor that it inherits beside the standard streams.
            variables: Environment variables, in addition to those of this process.
        """
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[kept_socket.fileno()],
            env=os.environ | variables,
            # Ctrl-C is for the command, which decides when workers end.
            start_new_session=True,
        )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, or minus the signal that ended it; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Kill the process. The processes that it has forked keep running."""
        assert self._process.stdin is not None
        self._process.kill()
        self._process.wait()
        with suppress(OSError):
            self._process.stdin.close()


def _flush_output() -> None:
    """Write buffered output, which the fork would otherwise write a second time."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()


@contextmanager
def _block_signals() -> Iterator[None]:
    """Block signals while this context lasts: no handler of this process must run in the fork."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _run_in_fork(function: Callable[[], None], read_end: int, kept_number: int) -> NoReturn:
    """Make this fork like a new process, run the function, and exit as an interpreter does.

    No exception may leave this function: in the fork, its callers are those of the driver.

    Args:
        function: What runs in the fork.
        read_end: Descriptor that becomes the standard input.
        kept_number: Descriptor that stays open.
    """
    exit_code = 1
    try:
        os.setsid()
        _replace_descriptors(read_end, kept_number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        sys.excepthook = sys.__excepthook__
        detach_command_log()
        for number in _HANDLED_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED_SIGNALS)
        exit_code = _call_as_main(function)
    finally:
        os._exit(exit_code)


def _call_as_main(function: Callable[[], None]) -> int:
    """Call a function, then end threads and run exit handlers; return the exit code."""
    exit_code = 0
    try:
        function()
    except SystemExit as error:
        exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        exit_code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    _flush_output()
    return exit_code


def _replace_descriptors(read_end: int, kept_number: int) -> None:
    """Make the pipe the standard input, and point all other descriptors but one to /dev/null.

    A lock or pipe of the driver must end with the driver, so the fork must not hold it open. The
    numbers are not freed: a file object that the fork inherits would later close its number, even
    if that belonged to a new file by then.

    Args:
        read_end: Descriptor that becomes the standard input.
        kept_number: Descriptor that stays as it is.
    """
    os.dup2(read_end, 0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if number not in (0, kept_number, nothing):
            with suppress(OSError):
                os.fstat(number)
                os.dup2(nothing, number, inheritable=number < 3)
