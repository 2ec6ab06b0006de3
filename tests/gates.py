"""Gates at which processes wait without using the processor, to pass them in the same moment."""

import os
from contextlib import ExitStack
from pathlib import Path


def make_gate(path: Path) -> None:
    """Create a closed gate: a FIFO that nobody can write to yet."""
    os.mkfifo(path)


def wait_at_gate(path: Path) -> None:
    """Wait until the gate is open; return at once if it is."""
    os.close(os.open(path, os.O_RDONLY))


def open_gate(path: Path, stack: ExitStack) -> None:
    """Let everybody through until the stack ends."""
    stack.callback(os.close, os.open(path, os.O_RDWR))
