"""One run of a pipeline at a time. The lock goes with its process, however that ends."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raysweep.spec import SpecError

_POLL = 0.5


@contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """Hold `folder/lock`. Raises SpecError naming the holder if it is taken, unless told to wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        while not _taken(file.fileno()):
            if not wait:
                file.seek(0)
                raise SpecError(
                    f"pipeline {folder.name!r} is running already ({file.read().strip() or 'just started'}); "
                    "--wait waits for its end"
                )
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
    return True
