"""Write records to a store that may be slow or may not answer, such as MLflow's.

A thread writes them, so that the work never waits for the store. The work never depends on such
records: its own folder has everything that they are made of.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from raysweep.disk_space import SpareSpace
from raysweep.errors import InfrastructureError
from raysweep.stores.folder_store import find_sqlite_file
from raysweep.termination_signals import release_logging_locks

logger = logging.getLogger(__name__)

# Seconds after a failed attempt in which no other is made, at least, and in relation to the seconds
# that it took: a store that hangs costs at most a tenth of the time.
_MIN_PAUSE, _PAUSE_FACTOR = 10.0, 9.0
# Shortest pause in seconds between two rounds of writing, and its length in relation to the last
# round. Records that come meanwhile share a request, and the work keeps most of the interpreter's
# time.
_MIN_REST, _REST_FACTOR = 0.5, 2.0
# Seconds that the end of the work waits for its records, by default.
_FLUSH_SECONDS = 60.0
# Records of an endless outage must not fill the memory.
_MAX_WAITING = 100_000
# A run that a full disk has ended must still be closed in MLflow.
_SPARE_BYTES = 2 * 2**20


class RecordStoreUnavailable(InfrastructureError):
    """A store of records does not answer, or refuses a record.

    Attributes:
        is_final: Whether a repetition of the same request cannot succeed.
    """

    def __init__(self, problems: str | list[str], is_final: bool = False) -> None:
        """Store the problems and whether they are final."""
        super().__init__(problems)
        self.is_final = is_final


class RecordQueue:
    """Records that a thread writes, in their order. During an outage of the store they wait.

    Attributes:
        n_waiting: Number of records that are not written yet.
    """

    def __init__(
        self,
        kind: str,
        uri: str,
        flush_seconds: float | None = _FLUSH_SECONDS,
        start_delay_seconds: float = 0.0,
    ) -> None:
        """Make an empty queue. For a SQLite database, it reserves disk space for the last records.

        Args:
            kind: What messages call the store, such as `MLflow store`.
            uri: URI of the store.
            flush_seconds: Longest time that `flush` and `finish` wait; None for no limit.
            start_delay_seconds: Time before the first record is written, in which the writer's
                thread takes no time from the start of the work; `flush` ends it early.
        """
        self._start_delay_seconds = start_delay_seconds
        self._flush_seconds = flush_seconds
        self._store_name = f"{kind} {uri}"
        database = find_sqlite_file(uri)
        self._spare_space = SpareSpace(database.parent, _SPARE_BYTES) if database else None
        self._waiting: deque[Callable[[], object]] = deque()
        self._n_lost = 0
        # Guards all fields; notified when records come, are written, or fail.
        self._changed = threading.Condition()
        self._writer: threading.Thread | None = None
        self._n_failures = 0
        self._is_failing = False
        self._is_flushing = False

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_lost_records(self) -> bool:
        """Whether a record was dropped that the store refused, or that could not be written."""
        return self._n_lost > 0

    def write(self, record: Callable[[], object]) -> None:
        """Add a record to those that wait to be written. Returns at once.

        Args:
            record: Writes it, in the queue's thread. It raises RecordStoreUnavailable if the store
                does not answer, and is called again later, so it must be possible to write it
                twice.
        """
        with self._changed:
            if len(self._waiting) >= _MAX_WAITING:
                self._n_lost += 1
                return
            self._waiting.append(record)
            if self._writer is None:
                # A daemon: a store that hangs must not keep the process alive.
                self._writer = threading.Thread(
                    target=self._write_records, name=self._store_name, daemon=True
                )
                self._writer.start()
            self._changed.notify_all()

    def flush(self, retry: bool = True) -> bool:
        """Wait until all records are written, the store fails, or `flush_seconds` have passed.

        Args:
            retry: Whether to make another attempt during an outage.

        Returns:
            Whether no record waits any more.
        """
        release_logging_locks()
        with self._changed:
            n_failures = self._n_failures
            self._is_flushing = retry or not self._is_failing
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: (
                    not self._waiting
                    or self._n_failures > n_failures
                    or (self._is_failing and not retry)
                ),
                self._flush_seconds,
            )
            self._is_flushing = False
            return not self._waiting

    def finish(self, hint: str = "") -> int:
        """Write all records that wait, and end the thread; say in one line what the store lacks.

        It waits as `flush` does; an outage is given one more attempt.

        Args:
            hint: How the user can have the rest written, such as "; the same command writes them".

        Returns:
            The number of records that the store lacks.
        """
        if self.n_waiting:
            logger.info("%s: %d records are left to write", self._store_name, self.n_waiting)
        self.flush()
        if self._spare_space is not None:
            is_needed = self.n_waiting > 0 and self._spare_space.is_needed()
            self._spare_space.release()
            if is_needed:
                self.flush()
        n_missing = self.n_waiting + self._n_lost
        if n_missing:
            logger.warning(
                "%s lacks the last %d records of this work, which is complete without them%s",
                self._store_name,
                n_missing,
                hint,
                extra={"event": "records_missing", "records": n_missing},
            )
        self.discard()
        return n_missing

    def discard(self) -> None:
        """Drop the records that wait, and end the thread."""
        with self._changed:
            self._waiting.clear()
            self._n_lost = 0
            self._writer = None
            self._changed.notify_all()

    def _write_records(self) -> None:
        """Write records in rounds, until this thread is no longer the queue's writer."""
        this_thread = threading.current_thread()
        self._pause_writer(self._start_delay_seconds)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._writer is not this_thread)
                if self._writer is not this_thread:
                    return
                n_records = len(self._waiting)
            started_at = time.monotonic()
            is_written = self._write_round(n_records)
            seconds = time.monotonic() - started_at
            if is_written:
                pause = max(_MIN_REST, _REST_FACTOR * seconds)
            else:
                pause = max(_MIN_PAUSE, _PAUSE_FACTOR * seconds)
            self._pause_writer(pause)

    def _pause_writer(self, seconds: float) -> None:
        """Wait in the writer's thread; `flush` and the end of the queue end the wait early."""
        this_thread = threading.current_thread()
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_flushing or self._writer is not this_thread, seconds
            )

    def _write_round(self, n_records: int) -> bool:
        """Write a number of records; return False when the store fails."""
        for _ in range(n_records):
            with self._changed:
                if self._writer is not threading.current_thread() or not self._waiting:
                    return True
                record = self._waiting[0]
            try:
                record()
            except RecordStoreUnavailable as error:
                if not error.is_final:
                    self._note_failure(error)
                    return False
                logger.warning("%s; the work continues without this record", error)
                self._remove_record(record, is_lost=True)
            except Exception:
                logger.exception("%s: a record cannot be written", self._store_name)
                self._remove_record(record, is_lost=True)
            else:
                self._remove_record(record)
        return True

    def _remove_record(self, record: Callable[[], object], is_lost: bool = False) -> None:
        """Remove a record that was written, or never can be."""
        with self._changed:
            if self._waiting and self._waiting[0] is record:
                self._waiting.popleft()
                self._n_lost += is_lost
            if self._is_failing and not self._waiting:
                logger.info("%s answers again and has all records", self._store_name)
                self._is_failing = False
            self._changed.notify_all()

    def _note_failure(self, error: RecordStoreUnavailable) -> None:
        """Log the beginning of an outage."""
        if not self._is_failing:
            logger.warning(
                "%s; the work continues, and its records are written later", error, exc_info=error
            )
        with self._changed:
            self._is_failing = True
            self._n_failures += 1
            self._is_flushing = False
            self._changed.notify_all()
