"""Leases: exclusive rights of one process to train a shared prefix or to work in a folder.

`FileLease` and `BucketLease` guard one key in a folder or bucket that machines share; the holder
renews them with a heartbeat. `hold_pipeline_lease` and `hold_folder_lease` guard a whole folder: a
local one with a lock of the operating system, one in a bucket with a `BucketLease`.

A lease ends when its process ends. Processes of the same machine see that the process is gone;
those of other machines see that its heartbeat has stopped, or that its lock is free.
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
from raysweep.errors import InfrastructureError
from raysweep.spec import SpecError

# Seconds between two attempts to acquire the lease of a folder.
_POLL_SECONDS = 0.5
# Seconds between heartbeats, and seconds without one after which a lease has expired.
_RENEWAL_INTERVAL, _EXPIRES_AFTER = 5.0, 30.0
# If several processes try to acquire a bucket's lease at the same time, each checks this number of
# times, at this interval in seconds, whether the others have withdrawn.
_N_CONTEST_CHECKS, _CONTEST_INTERVAL = 10, 0.1


class Lease(Protocol):
    """Exclusive right of one process.

    A lease expires when its process is gone (visible on the same machine only) or when its
    heartbeat has stopped for 30 seconds.
    """

    def try_acquire(self) -> bool:
        """Try once to acquire the lease, without waiting for its holder.

        Returns:
            Whether this process has acquired the lease.

        Raises:
            OSError: The lease cannot be written, or the bucket does not answer.
            SpecError: The bucket refuses access.
        """
        ...

    def renew(self) -> None:
        """Record a heartbeat. Only the holder may call this, at least every 30 seconds.

        Raises:
            OSError: The heartbeat cannot be written. `LeaseHeartbeat` then tries again later.
        """
        ...

    def release(self) -> None:
        """Give the lease back. Do nothing if the lease does not exist."""
        ...


def make_lease(folder: Path, key: str) -> Lease:
    """Create a lease; the caller still has to acquire it.

    Args:
        folder: Folder that the competing processes share, or a bucket's working copy.
        key: What the lease guards; a file name.

    Returns:
        A `BucketLease` below `.claims/` for a bucket, otherwise a `FileLease`.
    """
    if storage.is_bucket_copy(folder):
        return BucketLease(folder / ".claims" / key)
    return FileLease(folder / f"{key}.claim")


class LeaseHeartbeat:
    """Context manager that renews an acquired lease every 5 seconds and releases it on exit."""

    def __init__(self, lease: Lease) -> None:
        """Prepare the heartbeat.

        Args:
            lease: A lease that this process has acquired.
        """
        self._lease = lease
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        # A renewal after the release would create the lease again.
        self._thread.join()
        self._lease.release()

    def _renew_until_stopped(self) -> None:
        """Renew the lease at each interval; a failed renewal is tried again at the next one."""
        while not self._stop.wait(_RENEWAL_INTERVAL):
            with suppress(OSError):
                self._lease.renew()


class FileLease:
    """Lease in a folder: a file that only one process can create.

    The file holds the host name and process number of its owner; its time of modification is the
    last heartbeat.
    """

    def __init__(self, path: Path) -> None:
        """Describe the lease without acquiring it.

        Args:
            path: The lease's file; its folder must exist when the lease is acquired.
        """
        self._path = path

    def try_acquire(self) -> bool:
        """Delete the file if its lease has expired, then try to create it.

        Returns:
            Whether this call created the file; False also if this process holds the lease already.
        """
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
        """Set the file's time of modification to now."""
        os.utime(self._path)

    def release(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)

    def _is_expired(self) -> bool:
        """Return whether the file exists and its owner has died or stopped its heartbeat."""
        try:
            owner = self._path.read_text().split()
            age = time.time() - self._path.stat().st_mtime
        except OSError:
            return False
        return age > _EXPIRES_AFTER or (len(owner) == 2 and _is_process_gone(*owner))


class BucketLease:
    """Lease in a bucket, which has no exclusive creation.

    Each claimant uploads a file named `TIME HOST PROCESS`, and holds the lease if no other live
    claimant has a file. If several claimants upload at the same time, the first file name in
    alphabetical order wins, and the other claimants delete their files. The clocks of machines may
    differ: the claimants only have to agree on one order.
    """

    def __init__(self, folder: Path) -> None:
        """Describe the lease without acquiring it.

        Args:
            folder: Folder of the claimants' files, in the working copy of a bucket.
        """
        self._own_file = folder / f"{time.time():.6f} {socket.gethostname()} {os.getpid()}"
        # (file, time of its heartbeat in the bucket) -> when this process first saw it, by its own
        # monotonic clock: the clocks of machine and bucket may differ.
        self._first_seen: dict[tuple[Path, float], float] = {}

    def try_acquire(self) -> bool:
        """Upload this process's file if there is no live competitor.

        If other processes try at the same time, wait for up to about 1 second until they withdraw.

        Returns:
            Whether this process holds the lease; True again if it held it before.

        Raises:
            SpecError: The bucket refuses access.
            storage.BucketUnavailable: The bucket does not answer.
        """
        if self._list_live_competitors():
            return False
        self.renew()
        # Competitors that uploaded at the same time and have a later name withdraw. If one with a
        # later name stays, it had acquired the lease before this process's file was visible.
        for _ in range(_N_CONTEST_CHECKS):
            competitors = self._list_live_competitors()
            if not competitors:
                return True
            if any(path.name < self._own_file.name for path in competitors):
                break
            time.sleep(_CONTEST_INTERVAL)
        self.release()
        return False

    def live_holder(self) -> str:
        """Return a live holder: a competitor of which this process has seen two heartbeats.

        Returns:
            `process PID on HOST`, or "" if there is none yet.
        """
        n_heartbeats = Counter(path for path, _ in self._first_seen)
        for path, count in n_heartbeats.items():
            if count > 1:
                _, host, pid = path.name.split()
                return f"process {pid} on {host}"
        return ""

    def renew(self) -> None:
        """Upload this process's file again, which gives it a new time of modification."""
        self._own_file.parent.mkdir(parents=True, exist_ok=True)
        self._own_file.touch()
        storage.push_to_bucket(self._own_file)

    def release(self) -> None:
        """Delete this process's file from the bucket and the working copy."""
        storage.delete_remote_file(self._own_file)
        self._own_file.unlink(missing_ok=True)

    def _list_live_competitors(self) -> list[Path]:
        """List the other claimants' files; delete those of dead processes."""
        live = []
        for entry in storage.list_remote_files(self._own_file.parent):
            if entry.path == self._own_file:
                continue
            first_seen = self._first_seen.setdefault((entry.path, entry.modified), time.monotonic())
            is_silent = time.monotonic() - first_seen > _EXPIRES_AFTER
            if is_silent or _is_process_gone(*entry.path.name.split()[1:]):
                storage.delete_remote_file(entry.path)
            else:
                live.append(entry.path)
        return live


@contextmanager
def hold_pipeline_lease(folder: Path, wait: bool) -> Iterator[None]:
    """Context manager that holds the lease of a pipeline's folder.

    Args:
        folder: The pipeline's folder on this machine; created if it is missing.
        wait: Whether to wait until another process releases the folder.

    Yields:
        Nothing.

    Raises:
        SpecError: Another process holds the folder and `wait` is False.
        InfrastructureError: The folder cannot be written.
            The message names the holder.
    """
    with _hold_file_lock(folder, f"pipeline {folder.name!r}", "; --wait waits for its end", wait):
        yield


@contextmanager
def hold_folder_lease(folder: Path) -> Iterator[None]:
    """Context manager that holds the lease of a folder of a sweep or training run.

    If the folder has no other files at the end, it is deleted.

    Args:
        folder: Folder on this machine or in the working copy of a bucket; created if it is
            missing.

    Yields:
        Nothing.

    Raises:
        SpecError: Another process holds the folder. The message names the holder.
        InfrastructureError: The folder cannot be written.
    """
    if storage.is_bucket_copy(folder):
        lease = _hold_bucket_lease(folder)
    else:
        lease = _hold_file_lock(folder, repr(folder.name))
    with lease:
        try:
            yield
        finally:
            if list(folder.glob("*")) == [folder / "lock"]:
                (folder / "lock").unlink()
                folder.rmdir()


@contextmanager
def _hold_file_lock(
    folder: Path, description: str, hint: str = "", wait: bool = False
) -> Iterator[None]:
    """Lock the file `folder/lock` with flock, and write the holder's process into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+")
    except OSError as error:
        raise InfrastructureError(
            f"{folder} cannot be written: {error.strerror or error}"
        ) from error
    with file:
        while not _try_lock_descriptor(file.fileno()):
            if not wait:
                file.seek(0)
                holder = file.read().strip() or "just started"
                raise SpecError(f"{description} is running already ({holder}){hint}")
            time.sleep(_POLL_SECONDS)
        file.seek(0)
        file.truncate()
        start = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {start}")
        file.flush()
        yield


@contextmanager
def _hold_bucket_lease(folder: Path) -> Iterator[None]:
    """Hold the bucket lease of a folder.

    If another process holds it, wait until that lease expires, or raise SpecError as soon as two
    heartbeats show that its holder is alive.
    """
    lease = BucketLease(folder / ".claims" / "alone")
    while not lease.try_acquire():
        if holder := lease.live_holder():
            raise SpecError(f"{folder.name!r} is running already ({holder})")
        time.sleep(_POLL_SECONDS)
    with LeaseHeartbeat(lease):
        yield


def _try_lock_descriptor(descriptor: int) -> bool:
    """Lock an open file; return False if another process has locked it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # The file system has no locks, so no other process can hold one either.
        return True
    return True


def _is_process_gone(host: str, pid: str) -> bool:
    """Return whether a process of this machine has ended; False for those of other machines."""
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
