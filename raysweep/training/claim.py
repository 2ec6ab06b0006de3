"""The right to train a shared prefix, or to work in a folder of a bucket: one holder at a time, as long as it lives."""

import os
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from raysweep import storage

_BEAT, _STALE = 5.0, 30.0
# How often, and how many seconds apart, a claimant looks whether another that came at once withdraws.
_LOOKS, _PAUSE = 10, 0.1


class Claim(Protocol):
    """Taken by one process; dead if its process is gone (seen from the same machine) or its heartbeat stopped."""

    def taken(self) -> bool:
        """Try to take it: whether this process holds it now."""
        ...

    def beat(self) -> None: ...

    def release(self) -> None: ...


def claim_on(folder: Path, key: str) -> Claim:
    """The claim on `key` among those who share a folder or bucket."""
    return BucketClaim(folder / ".claims" / key) if storage.is_copy(folder) else FileClaim(folder / f"{key}.claim")


class Heart:
    """`with Heart(claim): ...` keeps a claim that was taken, and gives it back at the end."""

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        # A beat after the end would be a claim again.
        self._thread.join()
        self._claim.release()

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT):
            with suppress(OSError):
                self._claim.beat()


class FileClaim:
    """A file that only one process can create."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def taken(self) -> bool:
        if self._dead():
            self._path.unlink(missing_ok=True)
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{socket.gethostname()} {os.getpid()}")
        return True

    def beat(self) -> None:
        os.utime(self._path)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)

    def _dead(self) -> bool:
        try:
            owner = self._path.read_text().split()
            age = time.time() - self._path.stat().st_mtime
        except OSError:
            return False
        return age > _STALE or (len(owner) == 2 and _gone(*owner))


class BucketClaim:
    """Buckets cannot create exclusively: each claimant leaves a file of its own, and holds the claim if it is alone.

    Of several that come at once the one with the earliest clock stays, the others withdraw.
    """

    def __init__(self, folder: Path) -> None:
        self._mine = folder / f"{time.time():.6f} {socket.gethostname()} {os.getpid()}"
        # When this process first saw a beat of another: clocks need not agree.
        self._seen: dict[tuple[Path, float], float] = {}

    def taken(self) -> bool:
        if self._others():
            return False
        self.beat()
        # Of two that came at once the later withdraws; one that is here to stay did not see this one when it came.
        for _ in range(_LOOKS):
            others = self._others()
            if not others:
                return True
            if any(other.name < self._mine.name for other in others):
                break
            time.sleep(_PAUSE)
        self.release()
        return False

    def alive(self) -> str:
        """Another whose heart was seen to beat since this process first asked; empty if none was yet."""
        beats = Counter(path for path, _ in self._seen)
        return next(("process {2} on {1}".format(*path.name.split()) for path in beats if beats[path] > 1), "")

    def beat(self) -> None:
        self._mine.parent.mkdir(parents=True, exist_ok=True)
        self._mine.touch()
        storage.push(self._mine)

    def release(self) -> None:
        storage.drop_file(self._mine)
        self._mine.unlink(missing_ok=True)

    def _others(self) -> list[Path]:
        living = []
        for entry in storage.listing(self._mine.parent):
            if entry.path == self._mine:
                continue
            since = self._seen.setdefault((entry.path, entry.changed), time.monotonic())
            if time.monotonic() - since > _STALE or _gone(*entry.path.name.split()[1:]):
                storage.drop_file(entry.path)
            else:
                living.append(entry.path)
        return living


def _gone(host: str, process: str) -> bool:
    """Whether a process of this machine is no more; others cannot be told from here."""
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
