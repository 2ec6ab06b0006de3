"""The attacks that a user's files and commands have to withstand, each as a function.

`test_attacks.py` plays all of them; `python tests/security/play_attacks.py` prints them as a table.
"""

import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from raysweep.bounded_files import UNPACKED_LIMIT_VARIABLE

Play = Callable[[Path], str]
NOT_TRIED = "not tried"


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        point: Number in the list of threats.
        name: What the attacker does.
        before: What the report of threats says of revision d5c5dbc.
        play: Plays it in an empty folder; returns what is seen now. AssertionError if it succeeds.
    """

    point: int
    name: str
    before: str
    play: Play


ATTACKS: list[Attack] = []


def attack(point: int, name: str, before: str = NOT_TRIED) -> Callable[[Play], Play]:
    """Put a function into the table."""

    def add(play: Play) -> Play:
        ATTACKS.append(Attack(point, name, before, play))
        return play

    return add


def refusal_of(action: Callable[[], object]) -> str:
    """Return the line with which an action refuses; AssertionError if it does not, or in more."""
    try:
        result = action()
    except (ValueError, OSError) as error:
        line = str(error)
        assert "\n" not in line and line, f"not one line: {line!r}"
        return line
    raise AssertionError(f"not refused: {result!r}")


@contextmanager
def low_limit(mib: int = 8) -> Iterator[None]:
    """Lower the limit for what files unpack to, so that small and quick bombs exceed it."""
    before = os.environ.get(UNPACKED_LIMIT_VARIABLE)
    os.environ[UNPACKED_LIMIT_VARIABLE] = str(mib)
    try:
        yield
    finally:
        os.environ.pop(UNPACKED_LIMIT_VARIABLE)
        if before is not None:
            os.environ[UNPACKED_LIMIT_VARIABLE] = before


def in_little_memory(action: Callable[[], str], mib: int = 100) -> str:
    """Return the result of an action, which may take this much memory more than there is now."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(action, sender))
    process.start()
    sender.close()
    result, grown_kib = receiver.recv()
    process.join()
    if isinstance(result, BaseException):
        raise result
    assert grown_kib < mib * 1024, f"took {grown_kib / 1024:.0f} MiB: {result}"
    return result


def _measure(action: Callable[[], str], sender) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result: object
    try:
        result = action()
    except BaseException as error:
        result = AssertionError(f"{type(error).__name__}: {error}")
    sender.send((result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
