"""Lease in a bucket, or any other store: one file that only one process can create.

The file names its holder, which replaces it every 5 seconds under the condition that nobody else
has. Other processes compare the file's version with the one they saw before. They take a lease over
by replacing it, again conditionally, when it has not changed for 30 seconds of their own clock. So
two processes never hold it at the same time unless one of them does not notice that it was paused;
`BucketLease.require_held` notices that. Clocks of different machines are never compared.

A holder that releases the lease replaces the file once more, by one that says so. The file is not
deleted: buckets cannot delete under a condition, and a deletion that is repeated after a lost
answer could delete the file of the next holder. It goes when its folder is deleted.
"""

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import psutil

from raysweep.errors import RaysweepError, WorkFailed
from raysweep.process_identity import ProcessIdentity
from raysweep.stores import Store
from raysweep.stores.protocol import StoredFile, VersionedContent

logger = logging.getLogger(__name__)

# Name of a claim of version 0.1: time, host and process.
_LEGACY_CLAIM_PATTERN = re.compile(r"\S+ (\S+) (\d{1,9})")


@dataclass(frozen=True)
class LeaseTimes:
    """How often a lease is renewed. All processes that share a store must agree on it.

    Attributes:
        renewal_interval: Seconds between renewals.
        expires_after: Seconds without a renewal after which other processes take a lease over.
    """

    renewal_interval: float = 5.0
    expires_after: float = 30.0


DEFAULT_LEASE_TIMES = LeaseTimes()


class LeaseLost(WorkFailed):
    """Another process has taken over a lease that this process held."""


class BucketLease:
    """Lease in a store. While it is held, a thread renews it.

    Attributes:
        is_lost: Whether another process has taken the lease over since this one acquired it.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        description: str = "",
        times: LeaseTimes = DEFAULT_LEASE_TIMES,
    ) -> None:
        """Describe the lease without acquiring it.

        Args:
            store: The store that the competing processes share.
            key: Key of the lease's file.
            description: What the lease guards, for messages; by default its location.
            times: How often it is renewed.
        """
        self.is_lost = False
        self._store = store
        self._key = key
        self._description = description or store.uri_of(key)
        self._times = times
        self._token = uuid4().hex
        self._since = ""
        self._n_writes = 0
        # Version of the file while this object holds the lease.
        self._version: str | None = None
        self._renewed_at = 0.0
        self._renewal_lock = threading.Lock()
        self._heartbeat = LeaseHeartbeat(self.renew, times.renewal_interval)
        self._holder_watch = _HolderWatch(times)

    def try_acquire(self) -> bool:
        """Create the file, or replace it if its lease has expired; do not wait.

        Returns:
            Whether this object holds the lease; True again if it held it before.

        Raises:
            StoreAccessRefused: The store refuses access.
            StoreUnavailable: The store does not answer.
        """
        if self._version is not None:
            return not self.is_lost
        current = self._store.read_versioned(self._key)
        if current is not None and not self._may_replace(current):
            return False
        self.is_lost = False
        self._since = time.strftime("%Y-%m-%d %H:%M:%S")
        content, sent_at = self._make_content(), _read_clock()
        if current is None:
            self._version = self._store.create(self._key, content)
        else:
            self._version = self._store.replace(self._key, content, current.version)
        if self._version is None:
            return False
        if current is not None and not self._holder_watch.is_released:
            logger.warning(
                "took over the lease of %s from %s, which has ended or stopped renewing it",
                self._description,
                self._holder_watch.holder or "another process",
                extra={"event": "lease_taken_over", "is_shown_elsewhere": True},
            )
        self._renewed_at = sent_at
        self._heartbeat.start()
        return True

    def describe_holder(self) -> str:
        """Return `process PID on HOST since TIME` for the holder that was found; "" if unknown."""
        return self._holder_watch.holder

    def describe_live_holder(self) -> str:
        """Describe the holder if this process has seen that it renews the lease.

        Returns:
            `process PID on HOST since TIME`, or "" if no renewal was seen yet: the holder may have
            died.
        """
        return self._holder_watch.holder if self._holder_watch.n_renewals else ""

    def renew(self) -> None:
        """Replace the file. If another process has replaced it, set `is_lost`.

        Raises:
            StoreAccessRefused: The store refuses access.
            StoreUnavailable: The store does not answer.
        """
        with self._renewal_lock:
            if self._version is None or self.is_lost:
                return
            content, sent_at = self._make_content(), _read_clock()
            version = self._replace_own_file(content)
            if version is None:
                self.is_lost = True
                logger.warning(
                    "lost the lease of %s: another process has taken it over",
                    self._description,
                    extra={"event": "lease_lost", "is_shown_elsewhere": True},
                )
                return
            self._version, self._renewed_at = version, sent_at

    def require_held(self) -> None:
        """Check that this process still holds the lease, before it writes what the lease guards.

        If the lease may have expired, because this process was paused or the store did not answer,
        it is renewed first.

        Raises:
            LeaseLost: Another process has taken the lease over. One line.
            StoreAccessRefused: The store refuses access.
            StoreUnavailable: The store does not answer.
        """
        if not self.is_lost and _read_clock() - self._renewed_at > self._times.expires_after / 2:
            self.renew()
        if self.is_lost:
            raise LeaseLost(
                f"{self._description} was taken over by {self._describe_current_holder()}, because "
                f"this process did not renew its lease for {self._times.expires_after:.0f} s: it "
                "was paused or had no connection; it ends and writes nothing more"
            )

    def release(self) -> None:
        """Replace the file by one that says so, unless another process has taken the lease over."""
        if self._version is None:
            return
        self._heartbeat.stop()
        # If the store does not answer, the lease expires by itself.
        try:
            if not self.is_lost:
                self._replace_own_file(self._make_content(is_released=True))
        except (OSError, RaysweepError) as error:
            logger.warning("the lease of %s was not given back: %s", self._description, error)
        self._version = None

    def _may_replace(self, current: VersionedContent) -> bool:
        """Return whether the lease is free, or this object wrote it before the store failed."""
        values = _parse_content(current.data)
        self._holder_watch.observe(current.version, values)
        if self._holder_watch.is_released or values.get("token") == self._token:
            return True
        return self._holder_watch.has_expired or _is_holder_gone(values)

    def _replace_own_file(self, content: bytes) -> str | None:
        """Replace the file if this object wrote it; return its new version, otherwise None."""
        assert self._version is not None
        version = self._store.replace(self._key, content, self._version)
        if version is None:
            # An earlier renewal may have arrived although the store seemed to be unavailable.
            current = self._store.read_versioned(self._key)
            if current is not None and _parse_content(current.data).get("token") == self._token:
                version = self._store.replace(self._key, content, current.version)
        return version

    def _make_content(self, is_released: bool = False) -> bytes:
        """Return a content of the file that no earlier version had."""
        self._n_writes += 1
        values: dict[str, Any] = {
            "token": self._token,
            "since": self._since,
            # Equal contents would have equal versions.
            "renewals": self._n_writes,
            **ProcessIdentity.of_this_process().to_json_dict(),
        }
        if is_released:
            values["released"] = True
        return json.dumps(values).encode()

    def _describe_current_holder(self) -> str:
        with suppress(OSError, RaysweepError):
            current = self._store.read_versioned(self._key)
            if current is not None and (holder := _describe_holder(_parse_content(current.data))):
                return holder
        return "another process"


def is_lease_alive(store: Store, file: StoredFile, times: LeaseTimes = DEFAULT_LEASE_TIMES) -> bool:
    """Return whether a lease's holder still renews it, as far as one look can tell.

    Only who watches a lease by its own clock may take it over; this is for displays.

    Args:
        store: The store of the lease.
        file: The lease's file, with the time of its last renewal by the clock of the store. Clocks
            may differ by as many seconds as a lease lasts.
        times: How often it is renewed.
    """
    current = store.read_versioned(file.key)
    values = {} if current is None else _parse_content(current.data)
    if not values or values.get("released") or _is_holder_gone(values):
        return False
    return time.time() - file.modified < 2 * times.expires_after


class LeaseHeartbeat:
    """Thread that calls a function at regular intervals."""

    def __init__(self, renew: Callable[[], None], interval: float) -> None:
        """Prepare the thread.

        Args:
            renew: The function. It is called again after it raised an error of the store.
            interval: Seconds between two calls.
        """
        self._interval = interval
        self._renew = renew
        self._must_stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread. It must not run."""
        self._must_stop.clear()
        self._thread = threading.Thread(target=self._run, name="lease heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait until a call that it has begun returns."""
        self._must_stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._must_stop.wait(self._interval):
            try:
                self._renew()
            except (OSError, RaysweepError) as error:
                logger.warning("a lease was not renewed, it is tried again: %s", error)


class LegacyClaims:
    """Claims that raysweep 0.1 and earlier versions wrote: files named `TIME HOST PROCESS`.

    Their owners write them again every 5 seconds. As long as they do, they hold the lease.

    Attributes:
        live_owner: `process PID on HOST` of an owner that was seen to write its file again, or "".
    """

    def __init__(
        self, store: Store, folder_key: str, times: LeaseTimes = DEFAULT_LEASE_TIMES
    ) -> None:
        """Describe the claims.

        Args:
            store: The store.
            folder_key: Key of their folder.
            times: How often their owners write them.
        """
        self._times = times
        self.live_owner = ""
        self._store = store
        self._folder_key = folder_key
        self._timers: dict[str, _UnchangedTimer] = {}

    def observe(self) -> bool:
        """Look at the claims, and delete those of dead processes.

        A process is dead if this machine no longer has it, or if repeated calls saw no change of
        its file for 30 seconds.

        Returns:
            Whether there is a claim of a process that may be alive.
        """
        may_be_alive = False
        for file in self._store.list_files(self._folder_key, "*"):
            match = _LEGACY_CLAIM_PATTERN.fullmatch(file.key.rpartition("/")[2])
            if match is None:
                # Some other program's file.
                continue
            host, pid = match.groups()
            is_known = file.key in self._timers
            timer = self._timers.setdefault(file.key, _UnchangedTimer(self._times))
            seconds = timer.observe(file.modified)
            is_local = host == socket.gethostname()
            if seconds > self._times.expires_after or (
                is_local and not psutil.pid_exists(int(pid))
            ):
                self._store.delete(file.key)
                continue
            may_be_alive = True
            if is_known and seconds == 0.0:
                self.live_owner = f"process {pid} on {host}"
        return may_be_alive


class _UnchangedTimer:
    """Measures for how long a value has not changed, by this machine's clock."""

    def __init__(self, times: LeaseTimes) -> None:
        self._longest_gap = times.renewal_interval
        self._value: object = None
        self._seen_at = 0.0
        self._seconds = 0.0

    def observe(self, value: object) -> float:
        """Return for how many seconds the value has not changed.

        A time between two calls that is longer than a holder's renewal interval counts as that
        interval only: if this process was paused or the store did not answer, the holder may not
        have been able to renew its lease either.
        """
        now = time.monotonic()
        if value != self._value:
            self._seconds = 0.0
        else:
            # Never 0, which means a change.
            self._seconds += max(min(now - self._seen_at, self._longest_gap), 1e-9)
        self._value, self._seen_at = value, now
        return self._seconds


class _HolderWatch:
    """What one process has seen of the holder of a lease.

    Attributes:
        holder: Description of the holder, see `_describe_holder`; "" of a lease that is released.
        n_renewals: Number of its renewals that were seen.
        has_expired: Whether it has not renewed the lease for the time after which it expires.
        is_released: Whether it has released the lease.
    """

    def __init__(self, times: LeaseTimes) -> None:
        self.holder = ""
        self.n_renewals = 0
        self.has_expired = False
        self.is_released = False
        self._timer = _UnchangedTimer(times)
        self._expires_after = times.expires_after
        self._token: object = None
        self._version = ""

    def observe(self, version: str, values: dict[str, Any]) -> None:
        """Add an observation: the version of the lease's file, and its content."""
        seconds = self._timer.observe(version)
        self.is_released = values.get("released") is True
        if self.is_released or values.get("token") != self._token:
            self.n_renewals = 0
        elif version != self._version:
            self.n_renewals += 1
        self._token, self._version = values.get("token"), version
        self.holder = "" if self.is_released else _describe_holder(values)
        self.has_expired = seconds > self._expires_after


def _parse_content(data: bytes) -> dict[str, Any]:
    """Return the values in a lease's file; {} if it is damaged."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _describe_holder(values: dict[str, Any]) -> str:
    """Return `process PID on HOST since TIME`; "" without a valid holder."""
    try:
        return f"{ProcessIdentity.from_json_dict(values)} since {values['since']}"
    except (ValueError, KeyError):
        return ""


def _is_holder_gone(values: dict[str, Any]) -> bool:
    """Return whether the holder was a process of this machine that has ended."""
    try:
        return ProcessIdentity.from_json_dict(values).is_gone()
    except ValueError:
        return False


def _read_clock() -> float:
    """Return a time in seconds that also advances while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
