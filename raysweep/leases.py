"""Leases: exclusive rights of one process to train a shared prefix or to work in a folder.

Whoever trains a shared prefix holds a lease that expires: if its holder stops without releasing it,
another process takes it over. A holder that was only paused may then train the same prefix again,
which wastes time and changes no result.

Whoever works in a folder holds its lock (see `raysweep.folder_lock`). A bucket has no locks, so
there the folder has a lease, too; a holder that lost it must stop (see `HeldFolder`).
"""

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from filelock import SoftFileLease, Timeout

from raysweep import storage
from raysweep.bucket_lease import DEFAULT_LEASE_TIMES, LeaseHeartbeat, LeaseTimes
from raysweep.errors import SpecError
from raysweep.folder_lock import hold_folder_lock

logger = logging.getLogger(__name__)

# Seconds between two attempts to acquire the lease of a bucket's folder.
_POLL_SECONDS = 0.5
# Seconds between heartbeats of a bucket's lease, and seconds without one after which it expires.
_RENEWAL_INTERVAL, _EXPIRES_AFTER = 5.0, 30.0
# If several processes try to acquire a bucket's lease at the same time, each checks this number of
# times, at this interval in seconds, whether the others have withdrawn.
_N_CONTEST_CHECKS, _CONTEST_INTERVAL = 10, 0.1


class Lease(Protocol):
    """Exclusive right of one process, which renews it in a thread until it is released.

    A lease expires when its process is gone (visible on the same machine only) or when other
    processes saw no renewal for 30 seconds of their own clocks.
    """

    @property
    def is_lost(self) -> bool:
        """Whether another process has taken the lease over since this one acquired it."""
        ...

    def try_acquire(self) -> bool:
        """Try once to acquire the lease, without waiting for its holder.

        A process that wants the lease calls this again and again: only that shows it that the
        holder has stopped.

        Returns:
            Whether this object holds the lease; True again if it held it before.

        Raises:
            OSError: The lease cannot be written, or the bucket does not answer.
            SpecError: The bucket refuses access.
        """
        ...

    def release(self) -> None:
        """Give the lease back. Do nothing if this object does not hold it."""
        ...


class FolderLease:
    """Lease in a folder that processes share: a file, renewed by its time of modification."""

    def __init__(self, path: Path, times: LeaseTimes = DEFAULT_LEASE_TIMES) -> None:
        """Describe the lease without acquiring it.

        Args:
            path: The lease's file; its folder must exist when the lease is acquired. If a later
                version of raysweep has another `expires_after`, its files need another name:
                filelock raises an error for a lease with another number.
            times: How often it is renewed.
        """
        self._lease = SoftFileLease(
            path,
            lease_duration=times.expires_after,
            heartbeat_interval=times.renewal_interval,
            timeout=0,
            thread_local=False,
        )

    @property
    def is_lost(self) -> bool:
        return self._lease.compromise is not None

    def try_acquire(self) -> bool:
        """Create the file, or replace it if its lease has expired."""
        if not self._lease.is_locked:
            had_holder = Path(self._lease.lock_file).exists()
            try:
                self._lease.acquire()
            except Timeout:
                return False
            if had_holder:
                logger.warning(
                    "took over the lease %s: its holder died, stopped renewing it or just gave it "
                    "back",
                    self._lease.lock_file,
                    extra={"event": "lease_taken_over", "shown": True},
                )
        return True

    def release(self) -> None:
        """Delete the file, unless it is another process's by now."""
        self._lease.release()


def make_lease(folder: Path, key: str) -> Lease:
    """Create a lease on a shared prefix; the caller still has to acquire it.

    Args:
        folder: Folder that the competing processes share, or a bucket's working copy.
        key: What the lease guards; a file name.

    Returns:
        A `BucketLease` below `.claims/` for a bucket, otherwise a `FolderLease`.
    """
    if storage.is_bucket_copy(folder):
        return BucketLease(folder / ".claims" / key)
    return FolderLease(folder / f"{key}.claim")


class BucketLease:
    """Lease in a bucket, as long as its callers do not use `raysweep.stores`.

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
        self._heartbeat = LeaseHeartbeat(self.renew, _RENEWAL_INTERVAL)
        self._is_held = False
        self.is_lost = False

    def try_acquire(self) -> bool:
        """Upload this process's file if there is no live competitor.

        If other processes try at the same time, wait for up to about 1 second until they withdraw.

        Returns:
            Whether this process holds the lease; True again if it held it before.

        Raises:
            SpecError: The bucket refuses access.
            storage.BucketUnavailable: The bucket does not answer.
        """
        if self._is_held:
            return True
        if self._list_live_competitors():
            return False
        self.renew()
        # Competitors that uploaded at the same time and have a later name withdraw. If one with a
        # later name stays, it had acquired the lease before this process's file was visible.
        for _ in range(_N_CONTEST_CHECKS):
            competitors = self._list_live_competitors()
            if not competitors:
                self._is_held = True
                self._heartbeat.start()
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
        self._is_held = False
        self._heartbeat.stop()
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
                logger.warning(
                    "removing the lease of a process that has ended: %s", entry.path.name
                )
                storage.delete_remote_file(entry.path)
            else:
                live.append(entry.path)
        return live


class HeldFolder(Protocol):
    """A folder in which only this process works."""

    def require_held(self) -> None:
        """Check that this is still so, before something is written.

        Raises:
            LeaseLost: Another process has taken the folder over, because this one was paused.
            StoreAccessRefused: The bucket refuses access.
            StoreUnavailable: The bucket does not answer.
        """
        ...


class LockedFolder:
    """A folder whose lock this process holds until it ends."""

    def require_held(self) -> None:
        """Do nothing: the system takes a lock from no process that lives."""


@contextmanager
def hold_pipeline_lease(folder: Path, wait: bool) -> Iterator[None]:
    """Context manager that holds the lock of a pipeline's folder.

    Args:
        folder: The pipeline's folder on this machine; created if it is missing.
        wait: Whether to wait until another process releases the folder.

    Yields:
        Nothing.

    Raises:
        SpecError: Another process holds the folder and `wait` is False. The message names it.
        InfrastructureError: The folder cannot be written, or its file system has no locks.
    """
    with hold_folder_lock(folder, f"pipeline {folder.name!r}", "; --wait waits for its end", wait):
        yield


@contextmanager
def hold_folder_lease(folder: Path) -> Iterator[HeldFolder]:
    """Context manager that holds the folder of a sweep or training run.

    If a folder on this machine has no other files at the end, it is deleted.

    Args:
        folder: Folder on this machine or in the working copy of a bucket; created if it is
            missing.

    Yields:
        The held folder: ask it before each write.

    Raises:
        SpecError: Another process holds the folder. The message names it.
        InfrastructureError: The folder cannot be written, or its file system has no locks.
    """
    if storage.is_bucket_copy(folder):
        with _hold_bucket_lease(folder):
            yield LockedFolder()
        return
    with hold_folder_lock(folder, repr(folder.name), delete_if_unused=True):
        yield LockedFolder()


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
    try:
        yield
    finally:
        lease.release()


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
