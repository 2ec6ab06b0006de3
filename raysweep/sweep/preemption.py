"""A trial's process that is told to end, because its machine is taken away: it writes down how far
it is, and ends.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# What a shell calls the end by SIGTERM.
_SIGTERM_EXIT_CODE = 128 + signal.SIGTERM


class _SigtermState:
    requested = False
    deferred = False


def termination_requested() -> bool:
    """Whether this process was told to end."""
    return _SigtermState.requested


@contextmanager
def defer_sigterm() -> Iterator[None]:
    """In this block SIGTERM waits for somebody to ask `told`, and then to `leave`."""
    _SigtermState.deferred = True
    try:
        yield
    finally:
        _SigtermState.deferred = False


def exit_preempted() -> None:
    """End this process now, as it was told to: Tune sees a process that died, and starts the trial
    elsewhere.
    """
    os._exit(_SIGTERM_EXIT_CODE)


class PreemptibleMixin:
    """Mixed into the class that Tune makes of a function, whose trials run in a thread: signals
    want the main one.
    """

    def setup(self, config: dict[str, Any]) -> None:
        signal.signal(signal.SIGTERM, _handle_sigterm)
        super().setup(config)  # type: ignore[misc]


def _handle_sigterm(signal_number: int, frame: FrameType | None) -> None:
    _SigtermState.requested = True
    if not _SigtermState.deferred:
        sys.exit(_SIGTERM_EXIT_CODE)
