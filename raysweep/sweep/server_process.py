"""The process of the worker server: a fork of this one if it has one thread, else an interpreter.

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

from raysweep.logs import forget_command

# A fork has none of the threads that these libraries may have started, but waits for them.
_THREADED_LIBRARIES = ("numpy", "torch", "ray")
_HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def can_fork_this_process() -> bool:
    """Return whether a fork of this process can do all that a new process could.

    It cannot if this process has other threads, or has used a library that may have started some:
    a program of the user that calls `raysweep.tune`, for example.
    """
    has_used_libraries = any(name in sys.modules for name in _THREADED_LIBRARIES)
    return len(list(Path("/proc/self/task").iterdir())) == 1 and not has_used_libraries


def import_in_thread(modules: Sequence[str]) -> None:
    """Import modules in a thread of their own, and wait for it.

    Ray draws random ids from a generator of each thread, and some of its modules draw one when they
    are imported. A fork after that would draw the same ids as this process.

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

    def __init__(self, run: Callable[[], None], kept: socket.socket) -> None:
        """Fork this process, which has one thread.

        Args:
            run: What runs in the fork, with a pipe as standard input that ends with this process.
            kept: The only other descriptor that the fork keeps.
        """
        read_end, self._write_end = os.pipe()
        _flush_output()
        with _signals_blocked(), warnings.catch_warnings():
            # The threads of NumPy's linear algebra end before a fork, and start again after it.
            warnings.simplefilter("ignore", DeprecationWarning)
            gc.freeze()
            self.pid = os.fork()
            if self.pid == 0:
                _run_in_fork(run, read_end, kept.fileno())
            gc.unfreeze()
        os.close(read_end)
        self._exit_code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or minus the signal that ended it; None while it runs."""
        return self._wait(os.WNOHANG)

    def stop(self) -> None:
        """End the process. What it has forked lives on."""
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

    def __init__(self, arguments: list[str], kept: socket.socket, changed: dict[str, str]) -> None:
        """Start it, with a pipe as standard input that ends with this process.

        Args:
            arguments: What Python runs.
            kept: The only other descriptor that the process has.
            changed: Environment variables, in addition to those of this process.
        """
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[kept.fileno()],
            env=os.environ | changed,
            # Ctrl-C is for the command, which decides when workers end.
            start_new_session=True,
        )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, or minus the signal that ended it; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """End the process. What it has forked lives on."""
        assert self._process.stdin is not None
        self._process.kill()
        self._process.wait()
        with suppress(OSError):
            self._process.stdin.close()


def _flush_output() -> None:
    """Write what is buffered, which the fork would write again."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Hold signals back in this block, so that the fork never runs a handler of this process."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _run_in_fork(run: Callable[[], None], read_end: int, kept: int) -> NoReturn:
    """Make this fork like a new process, run the function, and end as an interpreter does.

    Whatever the function raises must not reach the functions of the driver that called this one.
    """
    exit_code = 1
    try:
        os.setsid()
        _replace_descriptors(read_end, kept)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        sys.excepthook = sys.__excepthook__
        forget_command()
        for number in _HANDLED_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED_SIGNALS)
        exit_code = _call_as_main(run)
    finally:
        os._exit(exit_code)


def _call_as_main(run: Callable[[], None]) -> int:
    """Call a function, then what is to be done at the end of a process; return the exit code."""
    exit_code = 0
    try:
        run()
    except SystemExit as error:
        exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        exit_code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    _flush_output()
    return exit_code


def _replace_descriptors(read_end: int, kept: int) -> None:
    """Make the pipe the standard input, and /dev/null all descriptors but that and `kept`.

    Locks and pipes of the driver must end with the driver. Its files keep their numbers: they would
    otherwise be closed in place of others that get the same numbers.
    """
    os.dup2(read_end, 0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if number not in (0, kept, nothing):
            with suppress(OSError):
                os.fstat(number)
                os.dup2(nothing, number, inheritable=number < 3)
