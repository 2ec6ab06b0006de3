"""One process at a time in a pipeline, a sweep, a run. The lock goes with its process, however that ends."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raysweep import storage
from raysweep.spec import SpecError
from raysweep.training.claim import BucketClaim, Heart

_POLL = 0.5


@contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """Hold a pipeline's `folder`. Raises SpecError naming the holder if it is taken, unless told to wait."""
    with _lock(folder, f"pipeline {folder.name!r}", "; --wait waits for its end", wait):
        yield


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder of a sweep or run, here or in a bucket. Raises SpecError naming the holder if it is taken."""
    with _claim(folder) if storage.is_copy(folder) else _lock(folder, repr(folder.name)):
        try:
            yield
        finally:
            # Where nothing came to be, nothing stays.
            if list(folder.glob("*")) == [folder / "lock"]:
                (folder / "lock").unlink()
                folder.rmdir()


@contextmanager
def _lock(folder: Path, what: str, hint: str = "", wait: bool = False) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+")
    except OSError as error:
        raise SpecError(f"{folder} cannot be written: {error.strerror or error}") from None
    with file:
        while not _taken(file.fileno()):
            if not wait:
                file.seek(0)
                raise SpecError(f"{what} is running already ({file.read().strip() or 'just started'}){hint}")
            time.sleep(_POLL)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks: nobody holds one.
        return True
    return True


@contextmanager
def _claim(folder: Path) -> Iterator[None]:
    """In a bucket: who is there lives if its heart beats, and is taken over if it does not."""
    claim = BucketClaim(folder / ".claims" / "alone")
    while not claim.taken():
        if holder := claim.alive():
            raise SpecError(f"{folder.name!r} is running already ({holder})")
        time.sleep(_POLL)
    with Heart(claim):
        yield
