"""Signals that end work which can be resumed: SIGTERM, and SIGHUP of a lost terminal."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


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
