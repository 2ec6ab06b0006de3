"""The log of one process in one folder."""

import logging
import os
from typing import TYPE_CHECKING, Any, ClassVar

from raysweep.logs.entries import format_time
from raysweep.logs.handlers import OtherLibrariesHandler
from raysweep.logs.log_files import (
    JsonFormatter,
    LogFile,
    TextFormatter,
    find_last_process,
    list_rotated_files,
)
from raysweep.logs.log_upload import LogUploader
from raysweep.logs.package_logger import attach_handlers, detach_handlers
from raysweep.logs.process_description import describe_process, summarize_process
from raysweep.logs.running_command import CommandLog

if TYPE_CHECKING:
    from raysweep.stores import StorePath

logger = logging.getLogger(__name__)

# Size of a log file at which a new one is started, and number of full ones that are kept: of a
# sweep, training run or pipeline about 40 MiB, of a trial about 4 MiB.
_MAX_BYTES, _N_FULL_FILES = 4 * 2**20, 9
_TRIAL_MAX_BYTES, _TRIAL_N_FULL_FILES = 2**20, 3


class _Described:
    """Attributes:
    process: The process whose machine and versions a message has named.
    """

    process: ClassVar[int | None] = None


class FolderLog:
    """Handlers that write one process's records into a folder."""

    def __init__(
        self, folder: "StorePath", stem: str, with_text: bool, context: dict[str, Any]
    ) -> None:
        """Prepare the handlers; nothing is written yet.

        Args:
            folder: The folder.
            stem: Name of the files without suffix.
            with_text: Whether to also write a file for people; the files are a trial's.
            context: Keys of every entry.
        """
        self.folder = folder
        self._context = context
        local_folder = folder.working_path
        limits = (
            (_TRIAL_MAX_BYTES, _TRIAL_N_FULL_FILES) if with_text else (_MAX_BYTES, _N_FULL_FILES)
        )
        self._handlers = [LogFile(local_folder / f"{stem}.jsonl", JsonFormatter(context), *limits)]
        if with_text:
            self._handlers.append(
                LogFile(local_folder / f"{stem}.txt", TextFormatter(context), *limits)
            )
        self._uploader: LogUploader | None = None
        self._other_libraries = OtherLibrariesHandler(self._handlers[0])

    def open(self) -> None:
        """Begin to write; entries of earlier processes are kept."""
        try:
            self.folder.working_path.mkdir(parents=True, exist_ok=True)
        except OSError:
            # Each file reports the same problem once, when its first record is written.
            logger.debug("%s cannot be created", self.folder, exc_info=True)
        if self.folder.local_path is None:
            self._uploader = LogUploader(self.folder, self._handlers)
            self._uploader.start()
        attach_handlers(*self._handlers)
        logging.getLogger().addHandler(self._other_libraries)
        self._log_start()

    def close(self) -> None:
        """Write and upload the last records."""
        logging.getLogger().removeHandler(self._other_libraries)
        detach_handlers(*self._handlers)
        for handler in self._handlers:
            handler.close()
        if self._uploader is not None:
            self._uploader.finish()

    def discard(self) -> None:
        """Stop without an upload, and delete the files."""
        if self._uploader is not None:
            self._uploader.cancel()
        self.close()
        for handler in self._handlers:
            for path in list_rotated_files(handler.path):
                path.unlink()
                (self.folder / path.name).delete()

    def _log_start(self) -> None:
        """Write what was logged before this folder was known, and what runs here."""
        record = logger.makeRecord(
            logger.name, logging.INFO, __file__, 0, "%s", (self._describe_start(),), None,
            extra={**describe_process(), "event": "start"},
        )  # fmt: skip
        command = CommandLog.running
        early_records = command.early_records.records if command is not None else []
        if early_records:
            record.created = min(record.created, early_records[0].created)
        self._log_missing_end(record.created)
        for handler in self._handlers:
            handler.handle(record)
            for early_record in early_records:
                handler.handle(early_record)
        if command is not None:
            command.early_records.stop()

    def log_end(self) -> None:
        """Write that this process leaves the log, so that a killed one can be told by its absence.

        The outermost log of a command has the command's end instead.
        """
        self._write(logging.INFO, "this process leaves the log", event="end")

    def _log_missing_end(self, created: float) -> None:
        """Write that the last process in this log was killed, if it left no end.

        The record has the time of this process's start, which it precedes.
        """
        last = find_last_process(self._handlers[0].path)
        if last is not None and last.get("event") == "start":
            self._write(
                logging.WARNING,
                f"the process before, {last.get('process')} on {last.get('host')}, was killed or "
                f"lost its machine: it started at {last.get('time')} and left no end",
                created,
                event="killed",
                killed_process=last.get("process"),
            )

    def _write(self, level: int, message: str, created: float | None = None, **fields: Any) -> None:
        """Write a record about this log into it, and nowhere else."""
        record = logger.makeRecord(
            logger.name, level, __file__, 0, "%s", (message,), None, extra=fields
        )
        if created is not None:
            record.created = created
        for handler in self._handlers:
            handler.handle(record)

    def _describe_start(self) -> str:
        """Return the line that makes each start visible."""
        command = CommandLog.running
        if command is not None:
            started_at = format_time(command.started_at)
            return f"{command.command_line} started at {started_at}: {summarize_process()}"
        work = "its work"
        if "trial" in self._context:
            work = f"{self._context['writer']} {self._context['trial']:04d}"
        if _Described.process == os.getpid():
            return f"this process begins {work}; it did other work before"
        _Described.process = os.getpid()
        started_at = describe_process()["process_started_at"]
        return f"this process begins {work}; it started at {started_at}: {summarize_process()}"
