"""Leases: exclusive rights of one process to train a shared prefix or to work in a folder.

A lease ends with its process. Another process of the same machine sees that the process is gone,
one of another machine that its heartbeat has stopped.
"""

import fcntl
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from raysweep import storage
from raysweep.spec import SpecError

_POLL_SECONDS = 0.5
_RENEWAL_INTERVAL, _EXPIRES_AFTER = 5.0, 30.0
# How often, and how many seconds apart, a claimant looks whether another that came at once
# withdraws.
_N_CONTEST_CHECKS, _CONTEST_INTERVAL = 10, 0.1


class Lease(Protocol):
    """Taken by one process; dead if its process is gone (seen from the same machine) or its
    heartbeat stopped.
    """

    def try_acquire(self) -> bool:
        """Try to take it: whether this process holds it now."""
        ...

    def renew(self) -> None: ...

    def release(self) -> None: ...


def make_lease(folder: Path, key: str) -> Lease:
    """The claim on `key` among those who share a folder or bucket."""
    return (
        BucketLease(folder / ".claims" / key)
        if storage.is_bucket_copy(folder)
        else FileLease(folder / f"{key}.claim")
    )


class LeaseHeartbeat:
    """`with Heart(claim): ...` keeps a claim that was taken, and gives it back at the end."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        # A beat after the end would be a claim again.
        self._thread.join()
        self._lease.release()

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(_RENEWAL_INTERVAL):
            with suppress(OSError):
                self._lease.renew()


class FileLease:
    """A file that only one process can create."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def try_acquire(self) -> bool:
        if self._is_expired():
            self._path.unlink(missing_ok=True)
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{socket.gethostname()} {os.getpid()}")
        return True

    def renew(self) -> None:
        os.utime(self._path)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)

    def _is_expired(self) -> bool:
        try:
            owner = self._path.read_text().split()
            age = time.time() - self._path.stat().st_mtime
        except OSError:
            return False
        return age > _EXPIRES_AFTER or (len(owner) == 2 and _is_process_gone(*owner))


class BucketLease:
    """Buckets cannot create exclusively: each claimant leaves a file of its own, and holds the
    claim if it is alone.

    Of several that come at once the one with the earliest clock stays, the others withdraw.
    """

    def __init__(self, folder: Path) -> None:
        self._own_file = folder / f"{time.time():.6f} {socket.gethostname()} {os.getpid()}"
        # When this process first saw a beat of another: clocks need not agree.
        self._first_seen: dict[tuple[Path, float], float] = {}

    def try_acquire(self) -> bool:
        if self._list_live_competitors():
            return False
        self.renew()
        # Of two that came at once the later withdraws; one that is here to stay did not see this
        # one when it came.
        for _ in range(_N_CONTEST_CHECKS):
            others = self._list_live_competitors()
            if not others:
                return True
            if any(other.name < self._own_file.name for other in others):
                break
            time.sleep(_CONTEST_INTERVAL)
        self.release()
        return False

    def live_holder(self) -> str:
        """Another whose heart was seen to beat since this process first asked; empty if none was
        yet.
        """
        beats = Counter(path for path, _ in self._first_seen)
        return next(
            ("process {2} on {1}".format(*path.name.split()) for path in beats if beats[path] > 1),
            "",
        )

    def renew(self) -> None:
        self._own_file.parent.mkdir(parents=True, exist_ok=True)
        self._own_file.touch()
        storage.push_to_bucket(self._own_file)

    def release(self) -> None:
        storage.delete_remote_file(self._own_file)
        self._own_file.unlink(missing_ok=True)

    def _list_live_competitors(self) -> list[Path]:
        living = []
        for entry in storage.list_remote_files(self._own_file.parent):
            if entry.path == self._own_file:
                continue
            since = self._first_seen.setdefault((entry.path, entry.modified), time.monotonic())
            if time.monotonic() - since > _EXPIRES_AFTER or _is_process_gone(
                *entry.path.name.split()[1:]
            ):
                storage.delete_remote_file(entry.path)
            else:
                living.append(entry.path)
        return living


def _is_process_gone(host: str, pid: str) -> bool:
    """Whether a process of this machine is no more; others cannot be told from here."""
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


@contextmanager
def hold_pipeline_lease(folder: Path, wait: bool) -> Iterator[None]:
    """Hold a pipeline's `folder`. Raises SpecError naming the holder if it is taken, unless told to
    wait.
    """
    with _hold_file_lock(folder, f"pipeline {folder.name!r}", "; --wait waits for its end", wait):
        yield


@contextmanager
def hold_folder_lease(folder: Path) -> Iterator[None]:
    """Hold the folder of a sweep or run, here or in a bucket. Raises SpecError naming the holder if
    it is taken.
    """
    with (
        _hold_bucket_lease(folder)
        if storage.is_bucket_copy(folder)
        else _hold_file_lock(folder, repr(folder.name))
    ):
        try:
            yield
        finally:
            # Where nothing came to be, nothing stays.
            if list(folder.glob("*")) == [folder / "lock"]:
                (folder / "lock").unlink()
                folder.rmdir()


@contextmanager
def _hold_file_lock(
    folder: Path, description: str, hint: str = "", wait: bool = False
) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+")
    except OSError as error:
        raise SpecError(f"{folder} cannot be written: {error.strerror or error}") from None
    with file:
        while not _try_lock_descriptor(file.fileno()):
            if not wait:
                file.seek(0)
                raise SpecError(
                    f"{description} is running already ({file.read().strip() or 'just started'}){hint}"
                )
            time.sleep(_POLL_SECONDS)
        file.seek(0)
        file.truncate()
        file.write(
            f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        )
        file.flush()
        yield


def _try_lock_descriptor(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks: nobody holds one.
        return True
    return True


@contextmanager
def _hold_bucket_lease(folder: Path) -> Iterator[None]:
    """In a bucket: who is there lives if its heart beats, and is taken over if it does not."""
    claim = BucketLease(folder / ".claims" / "alone")
    while not claim.try_acquire():
        if holder := claim.live_holder():
            raise SpecError(f"{folder.name!r} is running already ({holder})")
        time.sleep(_POLL_SECONDS)
    with LeaseHeartbeat(claim):
        yield
