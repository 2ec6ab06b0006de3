"""Signals that end work which can be resumed: SIGTERM, SIGHUP of a lost terminal, and Ctrl-C."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_ReentrantLock = type(threading.RLock())


def is_main_thread() -> bool:
    """Return whether this is the main thread, the only one that may set signal handlers."""
    return threading.current_thread() is threading.main_thread()


def list_termination_signals() -> list[signal.Signals]:
    """List SIGTERM and SIGHUP, the latter unless this process ignores it, as below `nohup`."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return [signal.SIGTERM]
    return [signal.SIGTERM, signal.SIGHUP]


@contextmanager
def handle_termination_signals(
    handler: Callable[[int, FrameType | None], None],
) -> Iterator[None]:
    """Context manager that calls a function for each signal of `list_termination_signals`.

    At SIGHUP the terminal is gone, and what this process would print is dropped: an error about
    that must not keep it from saving its work. In other threads than the main one, which may set no
    handlers, it changes nothing.

    Args:
        handler: The function, with the arguments of a signal handler.
    """
    if not is_main_thread():
        yield
        return
    terminals = [stream for stream in (sys.stdout, sys.stderr) if stream and stream.isatty()]

    def handle_signal(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            for stream in terminals:
                with suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        handler(number, frame)

    numbers = list_termination_signals()
    previous_handlers = {number: signal.signal(number, handle_signal) for number in numbers}
    try:
        yield
    finally:
        for number, previous_handler in previous_handlers.items():
            signal.signal(number, previous_handler)


def release_logging_locks() -> None:
    """Release the locks of `logging` that this thread holds, before it waits for other threads.

    Ctrl-C may interrupt `logging` just after it has acquired a lock, so that the lock is never
    released. All other threads would then wait forever as soon as they log or import a module. A
    handler of `logging` must not call this.
    """
    handlers = [reference() for reference in logging._handlerList]  # type: ignore[attr-defined]
    locks = [handler.lock for handler in handlers if handler is not None]
    for lock in [logging._lock, *locks]:  # type: ignore[attr-defined]
        # Other locks can be released by threads that do not hold them.
        if isinstance(lock, _ReentrantLock):
            # Raised if this thread does not hold it, or no longer.
            with suppress(RuntimeError):
                while True:
                    lock.release()
