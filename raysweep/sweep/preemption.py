"""A trial's process that is told to end, because its machine is taken away: it writes down how far it is, and ends."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# What a shell calls the end by SIGTERM.
_EXIT = 128 + signal.SIGTERM


class _Notice:
    told = False
    busy = False


def told() -> bool:
    """Whether this process was told to end."""
    return _Notice.told


@contextmanager
def busy() -> Iterator[None]:
    """In this block SIGTERM waits for somebody to ask `told`, and then to `leave`."""
    _Notice.busy = True
    try:
        yield
    finally:
        _Notice.busy = False


def leave() -> None:
    """End this process now, as it was told to: Tune sees a process that died, and starts the trial elsewhere."""
    os._exit(_EXIT)


class Preemptible:
    """Mixed into the class that Tune makes of a function, whose trials run in a thread: signals want the main one."""

    def setup(self, config: dict[str, Any]) -> None:
        signal.signal(signal.SIGTERM, _note)
        super().setup(config)  # type: ignore[misc]


def _note(number: int, frame: FrameType | None) -> None:
    _Notice.told = True
    if not _Notice.busy:
        sys.exit(_EXIT)
