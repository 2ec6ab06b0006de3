"""Leases: exclusive rights of one process to train a shared prefix or to work in a folder.

Whoever trains a shared prefix holds a lease that expires: if its holder stops without releasing it,
another process takes it over. A holder that was only paused may then train the same prefix again,
which wastes time and changes no result.

Whoever works in a folder holds its lock (see `raysweep.folder_lock`). A bucket has no locks, so
there the folder has a lease, too; a holder that lost it can write nothing more there.
"""

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

import psutil
from filelock import SoftFileLease, Timeout

from raysweep.bucket_lease import (
    DEFAULT_LEASE_TIMES,
    BucketLease,
    LeaseTimes,
    LegacyClaims,
    is_lease_alive,
)
from raysweep.errors import SpecError
from raysweep.folder_lock import hold_folder_lock, is_folder_locked
from raysweep.stores import BucketStore, Location, StorePath, StoreUnavailable, open_path
from raysweep.stores.errors import translate_os_errors

logger = logging.getLogger(__name__)

# Seconds between two attempts to acquire the lease of a bucket's folder.
_POLL_SECONDS = 0.5
# Seconds by which the start of a process and the times of files may differ.
_START_TOLERANCE = 2.0


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
            StoreAccessRefused: The store refuses access, or its disk is full or read-only.
            StoreUnavailable: The store does not answer, or the lease cannot be written.
        """
        ...

    def describe_holder(self) -> str:
        """Return `process PID on HOST` for the holder that the last attempt saw, or ""."""
        ...

    def release(self) -> None:
        """Release the lease. Do nothing if this object does not hold it."""
        ...


@dataclass(frozen=True)
class _FolderLeaseHolder:
    """Holder of a lease in a folder, as the lease's file names it.

    Attributes:
        pid: Process number.
        host: Host name.
        renewed_at: When it last renewed the lease, by the clock of the file system.
    """

    pid: int
    host: str
    renewed_at: float

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read the holder; None if there is no file, or one of another format."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            values = dict(line.split("=", 1) for line in lines if "=" in line)
            return cls(int(values["pid"]), values["host"], path.stat().st_mtime)
        except (OSError, ValueError, KeyError):
            return None

    def has_ended(self) -> bool:
        """Return whether it was a process of this machine that has certainly ended."""
        if self.host != socket.gethostname():
            return False
        try:
            # A later process may have the same number.
            started_at: float = psutil.Process(self.pid).create_time()
            return started_at > self.renewed_at + _START_TOLERANCE
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class FolderLease:
    """Lease in a folder that processes share: a file, renewed by its time of modification."""

    def __init__(self, path: Path, times: LeaseTimes = DEFAULT_LEASE_TIMES) -> None:
        """Describe the lease without acquiring it.

        Args:
            path: The lease's file; its folder must exist when the lease is acquired. A version
                of raysweep that changes `expires_after` must also change the file's name, because
                filelock refuses a file that was written with another number.
            times: How often it is renewed.
        """
        self._expires_after = times.expires_after
        # Inode of the file while it is empty, and since when it was seen to be, by this machine.
        self._empty_file: tuple[int, float] | None = None
        self._lease = SoftFileLease(
            path,
            lease_duration=times.expires_after,
            heartbeat_interval=times.renewal_interval,
            timeout=0,
            thread_local=False,
        )
        self._holder: _FolderLeaseHolder | None = None

    @property
    def is_lost(self) -> bool:
        return self._lease.compromise is not None

    def try_acquire(self) -> bool:
        """Create the file, or replace it if its lease has expired."""
        with translate_os_errors(self._lease.lock_file):
            return self._try_acquire()

    def _try_acquire(self) -> bool:
        """Try to acquire the lease; let errors of the file system pass."""
        if not self._lease.is_locked:
            path = Path(self._lease.lock_file)
            if path.is_dir():
                raise StoreUnavailable(
                    f"{path} is a folder, where raysweep needs a file: rename or delete it"
                )
            had_holder = path.exists()
            self._holder = _FolderLeaseHolder.read(path)
            try:
                self._lease.acquire()
            except Timeout:
                self._spoil_abandoned_file()
                return False
            if had_holder:
                has_ended = self._holder is not None and self._holder.has_ended()
                logger.warning(
                    "took over the lease %s from %s, which %s",
                    path,
                    self.describe_holder() or "another process",
                    "has ended" if has_ended else "stopped renewing it or has just released it",
                    extra={"event": "lease_taken_over", "is_shown_elsewhere": True},
                )
        return True

    def describe_holder(self) -> str:
        return str(self._holder or "")

    def _spoil_abandoned_file(self) -> None:
        """Make filelock delete a file that stays empty: its holder ended before it wrote its name.

        filelock would wait for ever: in its first versions, empty files had living holders.
        """
        try:
            with Path(self._lease.lock_file).open("r+b") as stream:
                status = os.fstat(stream.fileno())
                if status.st_size:
                    self._empty_file = None
                elif self._empty_file is None or self._empty_file[0] != status.st_ino:
                    self._empty_file = status.st_ino, time.monotonic()
                elif time.monotonic() - self._empty_file[1] > self._expires_after:
                    stream.write(b"abandoned\n")
        except FileNotFoundError:
            self._empty_file = None

    def release(self) -> None:
        """Delete the file, unless it is another process's by now."""
        self._lease.release()


def make_lease(folder: StorePath, key: str) -> Lease:
    """Create a lease on a shared prefix; the caller still has to acquire it.

    Args:
        folder: Folder that the competing processes share; created if it is missing.
        key: What the lease guards; a file name.

    Returns:
        A `BucketLease` below `.claims/` for a bucket, otherwise a `FolderLease`.
    """
    local_folder = folder.local_path
    if local_folder is None:
        path = folder / ".claims" / f"{key}.lease"
        return BucketLease(path.store, path.key)
    with translate_os_errors(str(local_folder)):
        local_folder.mkdir(parents=True, exist_ok=True)
    return FolderLease(local_folder / f"{key}.claim")


@contextmanager
def hold_pipeline_lock(folder: Path, wait: bool) -> Iterator[None]:
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
def hold_folder_lease(
    folder: Location, times: LeaseTimes = DEFAULT_LEASE_TIMES
) -> Iterator[StorePath]:
    """Context manager that holds the folder of a sweep or training run.

    A folder on this machine is deleted at the end if nothing but the lock is in it.

    Args:
        folder: Folder on this machine or in a bucket; created if it is missing.
        times: How often a bucket's lease is renewed.

    Yields:
        The folder. In a bucket, writes through this path raise LeaseLost as soon as another process
        has taken the folder over, because this one was paused.

    Raises:
        SpecError: Another process holds the folder. The message names it.
        InfrastructureError: The folder cannot be written, its file system has no locks, or the
            bucket does not answer or refuses access.
    """
    path = open_path(folder)
    local_folder = path.local_path
    if local_folder is None:
        assert isinstance(path.store, BucketStore)
        with _hold_bucket_lease(path, times) as lease:
            yield replace(path, store=path.store.with_write_check(lease.require_held))
        return
    with hold_folder_lock(local_folder, repr(path.name), delete_if_unused=True):
        yield path


def is_folder_in_use(folder: Location, times: LeaseTimes = DEFAULT_LEASE_TIMES) -> bool:
    """Return whether a process holds the folder of a sweep or training run. Nothing is written.

    Args:
        folder: Folder on this machine or in a bucket; it may be missing.
        times: How often a bucket's lease is renewed.

    Raises:
        InfrastructureError: The lock cannot be read, or the bucket does not answer.
    """
    path = open_path(folder)
    if path.local_path is not None:
        return is_folder_locked(path.local_path)
    leases = path.list_files(".claims/alone.lease")
    return any(is_lease_alive(path.store, file, times) for file in leases)


@contextmanager
def _hold_bucket_lease(folder: StorePath, times: LeaseTimes) -> Iterator[BucketLease]:
    """Hold the lease of a bucket's folder.

    If another process holds it, wait until that lease expires, or raise SpecError as soon as a
    renewal shows that its holder is alive.
    """
    claims, description = folder / ".claims", repr(folder.name)
    lease = BucketLease(folder.store, (claims / "alone.lease").key, description, times)
    while not lease.try_acquire():
        if holder := lease.describe_live_holder():
            raise SpecError(f"{description} is running already ({holder})")
        time.sleep(_POLL_SECONDS)
    try:
        legacy_claims = LegacyClaims(folder.store, (claims / "alone").key, times)
        while legacy_claims.observe():
            if owner := legacy_claims.live_owner:
                raise SpecError(
                    f"{description} is running already ({owner}, with an earlier version of "
                    "raysweep)"
                )
            time.sleep(_POLL_SECONDS)
        yield lease
    finally:
        lease.release()
