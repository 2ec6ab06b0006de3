"""Write records to a store that may be out of order for a while, such as MLflow's.

The work never depends on such records: its own folder has everything that they are made of.
"""

import logging
import time
from collections import deque
from collections.abc import Callable

from raysweep.disk_space import SpareSpace
from raysweep.errors import InfrastructureError
from raysweep.stores.folder_store import find_sqlite_file

logger = logging.getLogger(__name__)

# Seconds after a failed attempt in which no other is made, at least, and in relation to the seconds
# that it took: a store that hangs costs at most a tenth of the time.
_MIN_PAUSE, _PAUSE_FACTOR = 10.0, 9.0
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
    """Records in the order in which they must be written. During an outage they wait.

    Attributes:
        n_waiting: Number of records that wait.
    """

    def __init__(self, kind: str, uri: str) -> None:
        """Make an empty queue. For a SQLite database, it reserves disk space for the last records.

        Args:
            kind: What messages call the store, such as `MLflow store`.
            uri: URI of the store.
        """
        self._store_name = f"{kind} {uri}"
        database = find_sqlite_file(uri)
        self._spare_space = SpareSpace(database.parent, _SPARE_BYTES) if database else None
        self._waiting: deque[Callable[[], None]] = deque()
        self._n_lost = 0
        self._next_attempt_at = 0.0
        self._is_failing = False

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def write(self, record: Callable[[], None]) -> None:
        """Write a record after those that wait, at once if the store answers.

        Args:
            record: Writes it. It raises RecordStoreUnavailable if the store does not answer, and is
                called again later, so it must be possible to write it twice.
        """
        if len(self._waiting) < _MAX_WAITING:
            self._waiting.append(record)
        else:
            self._n_lost += 1
        if time.monotonic() >= self._next_attempt_at:
            self.write_waiting()

    def finish(self, hint: str = "") -> int:
        """Try once more to write all records that wait; say in one line what the store lacks.

        Args:
            hint: How the user can have the rest written, such as "; the same command writes them".

        Returns:
            The number of records that the store lacks.
        """
        self.write_waiting()
        if self._spare_space is not None:
            is_needed = self.n_waiting > 0 and self._spare_space.is_needed()
            self._spare_space.release()
            if is_needed:
                self.write_waiting()
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
        """Forget the records that wait."""
        self._waiting.clear()
        self._n_lost = 0

    def write_waiting(self) -> None:
        """Write the records that wait, until the store fails."""
        while self._waiting:
            started_at = time.monotonic()
            try:
                self._waiting[0]()
            except RecordStoreUnavailable as error:
                if error.is_final:
                    logger.warning("%s; the work continues without this record", error)
                    self._waiting.popleft()
                    self._n_lost += 1
                    continue
                self._note_failure(error, time.monotonic() - started_at)
                return
            self._waiting.popleft()
        if self._is_failing:
            logger.info("%s answers again and has all records", self._store_name)
        self._is_failing = False

    def _note_failure(self, error: RecordStoreUnavailable, seconds: float) -> None:
        """Log the beginning of an outage, and choose when the store is asked again."""
        if not self._is_failing:
            logger.warning(
                "%s; the work continues, and its records are written later", error, exc_info=error
            )
        self._is_failing = True
        self._next_attempt_at = time.monotonic() + max(_MIN_PAUSE, _PAUSE_FACTOR * seconds)
