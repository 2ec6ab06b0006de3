"""Handlers that write no files: for the terminal, other libraries, and before a folder is known."""

import contextlib
import logging
import sys

from raysweep.redaction import redact_secrets

# Records before the first folder is known.
_MAX_EARLY_RECORDS = 1000


class TerminalHandler(logging.Handler):
    """Prints records in the form of raysweep's other messages, on the current stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, unless the user is shown the same in another way."""
        if getattr(record, "is_shown_elsewhere", False):
            return
        level = record.levelname.lower()
        for line in redact_secrets(record.getMessage()).splitlines():
            # The reader of a pipe may be gone.
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"raysweep: {level}: {line}\n")


class EarlyRecordBuffer(logging.Handler):
    """Keeps the records from before the first folder is known."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self._is_stopped = False

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record; very many are not kept."""
        if not self._is_stopped and len(self.records) < _MAX_EARLY_RECORDS:
            self.records.append(record)

    def stop(self) -> None:
        """Forget the records: a folder has them."""
        self._is_stopped = True
        self.records.clear()


class OtherLibrariesHandler(logging.Handler):
    """Passes on the warnings of other libraries, such as retries of MLflow's requests."""

    def __init__(self, target: logging.Handler) -> None:
        super().__init__(logging.WARNING)
        self._target = target

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record; also print it if nothing else would."""
        if record.name.partition(".")[0] == "raysweep":
            return
        self._target.handle(record)
        others = [
            handler
            for handler in logging.getLogger().handlers
            if not isinstance(handler, OtherLibrariesHandler)
        ]
        # Python prints warnings by itself only while no logger has a handler.
        if not others and logging.lastResort is not None and self._is_first_such_handler():
            logging.lastResort.handle(record)

    def _is_first_such_handler(self) -> bool:
        """Return whether no other folder's handler comes before this one."""
        same_kind = (
            handler
            for handler in logging.getLogger().handlers
            if isinstance(handler, OtherLibrariesHandler)
        )
        return next(same_kind, self) is self
