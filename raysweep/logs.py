"""The log of raysweep: warnings on the terminal, and all records in the folder of the work.

Modules call `logging.getLogger(__name__)`; only this module decides where their records go.

- On the terminal: warnings, or what `--verbose` and $RAYSWEEP_LOG_LEVEL ask for.
- In `log.jsonl` of a folder: all records of raysweep, and the warnings of other libraries, one JSON
  object a line. A sweep's drivers write the sweep's `log.jsonl`; each trial's process writes that
  of its trial, and `log.txt` for people. So no file has two writers, also where the machines share
  nothing but a bucket.

A file that has reached its limit is renamed to `log.jsonl.TIME-HOST-PROCESS`, so that the machines
that use one bucket never choose the same name; the oldest of too many are deleted. Files in a
bucket are uploaded by a thread, twice a minute at most, and at the end. A log that cannot be
written or uploaded never ends the work.
"""

import contextlib
import logging
import os
import re
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from raysweep.errors import ExitCode
from raysweep.log_records import (
    JsonEntry,
    describe_process,
    format_entry,
    format_json_line,
    read_entries,
    redact_log_text,
    summarize_process,
)

if TYPE_CHECKING:
    from raysweep.stores import Location, StorePath

LEVEL_VARIABLE = "RAYSWEEP_LOG_LEVEL"
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
# Size of a log file at which a new one is started, and number of full ones that are kept: of a
# sweep, training run or pipeline about 40 MiB, of a trial about 4 MiB.
_MAX_BYTES, _N_FULL_FILES = 4 * 2**20, 9
_TRIAL_MAX_BYTES, _TRIAL_N_FULL_FILES = 2**20, 3
# Seconds between two uploads of a log to a bucket, and for how long its end waits for the last one.
_UPLOAD_INTERVAL, _LAST_UPLOAD_TIMEOUT = 30.0, 20.0
# Part of an earlier log that is searched for the end of the process that wrote it.
_TAIL_BYTES = 2**18
# Records before the first folder is known.
_MAX_EARLY_RECORDS = 1000
_FILE_PATTERN = re.compile(r"log(?:-[\w-]+)?\.jsonl(?:\.\d{8}T[\w.-]+)?")

_package_logger = logging.getLogger("raysweep")
logger = logging.getLogger(__name__)


class _State:
    """What this process logs to.

    Attributes:
        folders: Open logs by folder.
        command: The command of this process, if it is one of raysweep.
        early_records: Records that no folder has yet.
        pass_on: Passes records on to the handlers of the program that uses raysweep.
    """

    folders: ClassVar[dict["StorePath", "_FolderLog"]] = {}
    command: "CommandLog | None" = None
    early_records: "_EarlyRecords | None" = None
    pass_on: "_PassOnHandler | None" = None


class CommandLog:
    """The log of one command of raysweep, from its start to its exit code.

    Attributes:
        name: Name of the command, such as `tune`.
        command_line: The whole command without secrets.
        exit_code: The command's exit code; None until it is known.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.name = arguments[0] if arguments else ""
        # Quotes could hide the secrets of an argument.
        plain_arguments = map(redact_log_text, arguments)
        self.command_line = redact_log_text(shlex.join(["raysweep", *plain_arguments]))
        self.exit_code: int | None = None
        self.folders = contextlib.ExitStack()


@contextmanager
def command_log(arguments: Sequence[str], verbose: bool = False) -> Iterator[CommandLog]:
    """Context manager for a command: shows records on the terminal, and logs the command's end.

    Args:
        arguments: The command line without `raysweep`.
        verbose: Whether `--verbose` was given.

    Yields:
        The command's log. The caller sets its `exit_code`.

    Raises:
        SpecError: $RAYSWEEP_LOG_LEVEL is not a level.
    """
    level = _choose_terminal_level(verbose)
    command = CommandLog(arguments)
    terminal, early = _TerminalHandler(level), _EarlyRecords()
    outer = _State.command, _State.early_records
    _State.command, _State.early_records = command, early
    _attach(terminal, early)
    started_at = time.monotonic()
    try:
        with command.folders:
            try:
                yield command
            except BaseException as error:
                _log_command_end(command, started_at, error)
                raise
            _log_command_end(command, started_at, None)
    finally:
        _detach(terminal, early)
        _State.command, _State.early_records = outer
        _update_level()


@contextmanager
def log_to_folder(folder: "Location", **context: Any) -> Iterator[None]:
    """Context manager that writes all records into `log.jsonl` of a folder.

    Inside a block for the same folder it does nothing. The outermost folder of a command gets all
    records until the command has ended, also its exit code.

    Args:
        folder: Folder on this machine or in a bucket; created if it is missing.
        context: Keys that every entry gets.
    """
    from raysweep.stores import open_path

    folder = open_path(folder)
    if folder in _State.folders:
        yield
        return
    command = _State.command
    writer = command.name if command is not None else "driver"
    folder_log = _FolderLog(folder, "log", False, {"writer": writer, **context})
    if command is not None and not _State.folders:
        command.folders.enter_context(_open_folder_log(folder_log))
        yield
        return
    with _open_folder_log(folder_log):
        yield


@contextmanager
def log_trial(run_path: "Location", *, rank: int | None = None, role: str = "") -> Iterator[None]:
    """Context manager that writes all records of a trial's process into the trial's folder.

    Args:
        run_path: Folder of the trial, whose name is its number.
        rank: Rank of this process among the workers of the trial; None for a trial in one process.
        role: What this process does besides training, as part of its files' names.
    """
    from raysweep.stores import open_path

    run_path = open_path(run_path)
    context: dict[str, Any] = {"writer": "trial", "trial": int(run_path.name)}
    if rank is not None:
        context["rank"] = rank
    suffix = role or (f"worker-{rank}" if rank else "")
    stem = f"log-{suffix}" if suffix else "log"
    with _open_folder_log(_FolderLog(run_path, stem, True, context)):
        yield


def discard_log(folder: "StorePath") -> None:
    """Stop logging into a folder and delete its log, because the work there was never started.

    Args:
        folder: The folder.
    """
    folder_log = _State.folders.pop(folder, None)
    if folder_log is not None:
        folder_log.discard()


def close_logs() -> None:
    """Write and upload the last records of this process, which ends without leaving its blocks."""
    while _State.folders:
        _, folder_log = _State.folders.popitem()
        folder_log.log_end()
        folder_log.close()


def read_log(folder: "Location", with_trials: bool = True) -> list[JsonEntry]:
    """Read the log of a folder.

    Args:
        folder: Folder of a sweep, trial, training run or pipeline.
        with_trials: Whether to add the entries of the sweep's trials.

    Returns:
        The entries in the order of their times; empty if there is no log.
    """
    from raysweep.stores import open_path

    files = _find_log_files(open_path(folder), with_trials)
    return read_entries(_read_log_file(file) for file in files)


def _find_log_files(folder: "StorePath", with_trials: bool) -> list["StorePath"]:
    """Return the log files of a folder, of this machine or of its bucket."""
    patterns = ("*", "trials/*/*") if with_trials else ("*",)
    local_folder = folder.scratch_path
    names = set()
    for pattern in patterns:
        names |= {path.relative_to(local_folder).as_posix() for path in local_folder.glob(pattern)}
        if folder.local_path is None:
            prefix = f"{folder.key}/"
            names |= {file.key.removeprefix(prefix) for file in folder.list_files(pattern)}
    return [
        folder / name for name in sorted(names) if _FILE_PATTERN.fullmatch(name.rpartition("/")[2])
    ]


def _read_log_file(file: "StorePath") -> str:
    """Return the lines of a log file; of one in a bucket, also those on this machine only."""
    local_file = file.scratch_path
    content = local_file.read_bytes() if local_file.exists() else b""
    if file.local_path is None:
        stored = file.store.read_versioned(file.key)
        content = _join_lines(stored.data if stored else b"", content)
    return content.decode(errors="replace")


class _FolderLog:
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
        local_folder = folder.scratch_path
        limits = (
            (_TRIAL_MAX_BYTES, _TRIAL_N_FULL_FILES) if with_text else (_MAX_BYTES, _N_FULL_FILES)
        )
        self._handlers = [
            _LogFile(local_folder / f"{stem}.jsonl", _JsonFormatter(context), *limits)
        ]
        if with_text:
            self._handlers.append(
                _LogFile(local_folder / f"{stem}.txt", _TextFormatter(context), *limits)
            )
        self._uploader: _Uploader | None = None
        self._other_libraries = _OtherLibrariesHandler(self._handlers[0])

    def open(self) -> None:
        """Begin to write; entries of earlier processes are kept."""
        try:
            self.folder.scratch_path.mkdir(parents=True, exist_ok=True)
        except OSError:
            # Each file reports the same problem once, when its first record is written.
            logger.debug("%s cannot be created", self.folder, exc_info=True)
        if self.folder.local_path is None:
            self._uploader = _Uploader(self.folder, self._handlers)
            self._uploader.start()
        _attach(*self._handlers)
        logging.getLogger().addHandler(self._other_libraries)
        self._log_start()

    def close(self) -> None:
        """Write and upload the last records."""
        logging.getLogger().removeHandler(self._other_libraries)
        _detach(*self._handlers)
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
            for path in _list_rotated_files(handler.path):
                path.unlink()
                (self.folder / path.name).delete()

    def _log_start(self) -> None:
        """Write what was logged before this folder was known, and what runs here."""
        record = logger.makeRecord(
            logger.name, logging.INFO, __file__, 0, "%s", (self._describe_start(),), None,
            extra={**describe_process(), "event": "start"},
        )  # fmt: skip
        self._log_missing_end()
        early = _State.early_records
        if early is not None and early.records:
            record.created = min(record.created, early.records[0].created)
        for handler in self._handlers:
            handler.handle(record)
            for early_record in early.records if early else ():
                handler.handle(early_record)
        if early is not None:
            early.stop()

    def log_end(self) -> None:
        """Write that this process leaves the log, so that a killed one can be told by its absence.

        The outermost log of a command has the command's end instead.
        """
        self._write(logging.INFO, "this process leaves the log", event="end")

    def _log_missing_end(self) -> None:
        """Write that the last process in this log was killed, if it left no end."""
        last = _find_last_process(self._handlers[0].path)
        if last is not None and last.get("event") == "start":
            self._write(
                logging.WARNING,
                f"the process before, {last.get('process')} on {last.get('host')}, was killed or "
                f"lost its machine: it started at {last.get('time')} and left no end",
                event="killed",
                killed_process=last.get("process"),
            )

    def _write(self, level: int, message: str, **fields: Any) -> None:
        """Write a record about this log into it, and nowhere else."""
        record = logger.makeRecord(
            logger.name, level, __file__, 0, "%s", (message,), None, extra=fields
        )
        for handler in self._handlers:
            handler.handle(record)

    def _describe_start(self) -> str:
        """Return the line that makes each start visible."""
        command = _State.command.command_line if _State.command else "process"
        return f"{command} started: {summarize_process()}"


class _LogFile(RotatingFileHandler):
    """A log file that is rotated by size, and never raises."""

    def __init__(
        self, path: Path, formatter: logging.Formatter, max_bytes: int, n_full_files: int
    ) -> None:
        super().__init__(
            path, maxBytes=max_bytes, backupCount=n_full_files, encoding="utf-8", delay=True
        )
        self.path = path
        self.setFormatter(formatter)
        self._n_lost = 0

    def _open(self) -> Any:
        """Open the file; end the line that a killed process or a full disk cut off."""
        is_cut_off = _ends_within_line(self.path)
        stream = super()._open()
        if is_cut_off:
            stream.write("\n")
        return stream

    def doRollover(self) -> None:  # noqa: N802 - logging's name
        """Start a new file; keep the full one under a name of its own, and not too many of them."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        writer = f"{socket.gethostname()}-{os.getpid()}"
        self.path.rename(self.path.with_name(f"{self.path.name}.{now}-{writer}"))
        for file in _list_outdated_files(_list_rotated_files(self.path), self.backupCount):
            file.unlink(missing_ok=True)
        self.stream = self._open()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Drop the record; say so once on the terminal."""
        stream: TextIO | None = self.stream
        # Otherwise the buffer would keep the record for ever.
        self.stream = None
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.close()
        self._n_lost += 1
        if self._n_lost == 1:
            error = sys.exc_info()[1]
            reason = getattr(error, "strerror", None) or error
            logger.warning("the log %s cannot be written: %s; the work goes on", self.path, reason)


class _JsonFormatter(logging.Formatter):
    """Formats records as JSON lines with some keys in common."""

    def __init__(self, context: dict[str, Any]) -> None:
        super().__init__()
        self._context = context

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        return format_json_line(record, self._context)


class _TextFormatter(_JsonFormatter):
    """Formats records for people."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text, with the traceback of its exception."""
        import json

        entry = json.loads(super().format(record))
        text = format_entry(entry)
        if "exception" in entry:
            text += f"\n{entry['exception']['traceback'].rstrip()}"
        return text


class _TerminalHandler(logging.Handler):
    """Prints records in the form of raysweep's other messages, on the current stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, unless the user is shown the same in another way."""
        if getattr(record, "shown", False):
            return
        level = record.levelname.lower()
        for line in redact_log_text(record.getMessage()).splitlines():
            # The reader of a pipe may be gone.
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"raysweep: {level}: {line}\n")


class _EarlyRecords(logging.Handler):
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


class _OtherLibrariesHandler(logging.Handler):
    """Passes on the warnings of other libraries, such as retries of MLflow's requests."""

    def __init__(self, target: logging.Handler) -> None:
        super().__init__(logging.WARNING)
        self._target = target

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record; also print it if nothing else would."""
        if record.name.partition(".")[0] == _package_logger.name:
            return
        self._target.handle(record)
        others = [
            handler
            for handler in logging.getLogger().handlers
            if not isinstance(handler, _OtherLibrariesHandler)
        ]
        # Python prints warnings by itself only while no logger has a handler.
        if not others and logging.lastResort is not None and self._is_first():
            logging.lastResort.handle(record)

    def _is_first(self) -> bool:
        """Return whether no other folder's handler comes before this one."""
        same_kind = (
            handler
            for handler in logging.getLogger().handlers
            if isinstance(handler, _OtherLibrariesHandler)
        )
        return next(same_kind, self) is self


class _PassOnHandler(logging.Handler):
    """Passes records on to the root logger's handlers, unless a command of raysweep runs."""

    def __init__(self, logger_level: int, effective_level: int) -> None:
        """Remember the levels of the package's logger, to restore and to apply them.

        Args:
            logger_level: The logger's own level.
            effective_level: Level from which records are passed on.
        """
        super().__init__(effective_level)
        self.logger_level = logger_level

    def emit(self, record: logging.LogRecord) -> None:
        """Pass the record on."""
        if _State.command is None:
            for handler in logging.getLogger().handlers:
                if record.levelno >= handler.level:
                    handler.handle(record)


class _Uploader(threading.Thread):
    """Uploads log files to their bucket from time to time, if they have changed."""

    def __init__(self, folder: "StorePath", log_files: list["_LogFile"]) -> None:
        super().__init__(name="raysweep-log", daemon=True)
        self._folder = folder
        self._log_files = log_files
        self._stop_requested = threading.Event()
        self._is_cancelled = False
        self._uploaded: dict[Path, tuple[int, int]] = {}
        self._has_merged = False
        self._is_failing = False

    def run(self) -> None:
        """Fetch earlier entries; upload at each interval, and once more at the end."""
        self._try(self._merge_earlier_entries)
        while not self._stop_requested.wait(_UPLOAD_INTERVAL):
            self._try(self._upload_changed_files)
        if not self._is_cancelled:
            self._try(self._upload_changed_files)

    def finish(self) -> None:
        """Upload the last records; give up after a while if the bucket does not answer."""
        self._stop_requested.set()
        self.join(_LAST_UPLOAD_TIMEOUT)

    def cancel(self) -> None:
        """End without an upload."""
        self._is_cancelled = True

    def _try(self, operation: Callable[[], None]) -> None:
        """Use the bucket; the beginning and the end of an outage are logged."""
        from raysweep.bucket_lease import LeaseLost

        try:
            operation()
        except LeaseLost as error:
            # The error ends the work by itself.
            logger.info("the log is not uploaded any more: %s", error)
        # Whatever it is, the work goes on without the upload.
        except Exception as error:
            if not self._is_failing:
                logger.warning(
                    "the log could not be uploaded: %s; it is tried again", error, exc_info=error
                )
            self._is_failing = True
        else:
            if self._is_failing:
                logger.info("the log can be uploaded again")
            self._is_failing = False

    def _merge_earlier_entries(self) -> None:
        """Fetch what other processes have written. Nothing is uploaded before: it would be lost."""
        if not self._has_merged:
            for log_file in self._log_files:
                _merge_remote_log(self._folder, log_file)
            self._has_merged = True

    def _upload_changed_files(self) -> None:
        """Upload what has changed since the last time."""
        self._merge_earlier_entries()
        for log_file in self._log_files:
            for file in _list_rotated_files(log_file.path):
                self._upload_if_changed(file, log_file)

    def _upload_if_changed(self, file: Path, log_file: "_LogFile") -> None:
        """Upload a file unless the bucket has it; after a full one, make room in the bucket."""
        state = file.stat()
        version = (state.st_size, state.st_mtime_ns)
        if self._uploaded.get(file) == version:
            return
        (self._folder / file.name).write_bytes(file.read_bytes())
        self._uploaded[file] = version
        if file != log_file.path:
            _delete_outdated_remote_files(self._folder, log_file)


def _delete_outdated_remote_files(folder: "StorePath", log_file: _LogFile) -> None:
    """Delete the oldest full files of a log from its bucket, also those of other machines."""
    path = log_file.path
    files = [Path(stored.key) for stored in folder.list_files(f"{path.name}*")]
    files = [file for file in files if _is_rotation_of(path.with_name(file.name), path)]
    for file in _list_outdated_files(files, log_file.backupCount):
        (folder / file.name).delete()


def _merge_remote_log(folder: "StorePath", log_file: _LogFile) -> None:
    """Put the entries that only the bucket has before those of this machine.

    Another machine may have written them, or an earlier process of this one. The last entries of a
    process that was killed may be on this machine only.
    """
    path = log_file.path
    stored = folder.store.read_versioned((folder / path.name).key)
    if stored is not None:
        content = stored.data
        log_file.acquire()
        try:
            # The file may have become a full one before the bucket answered.
            full_files = [file for file in _list_rotated_files(path) if file != path]
            elsewhere = {line for file in full_files for line in file.read_bytes().splitlines()}
            lines = [line + b"\n" for line in content.splitlines() if line not in elsewhere]
            _prepend_missing_lines(path, b"".join(lines))
        finally:
            log_file.release()


def _prepend_missing_lines(file: Path, content: bytes) -> None:
    """Make a file begin with `content`, followed by those of its own lines that are not in it."""
    local = file.read_bytes() if file.exists() else b""
    merged = _join_lines(content, local)
    # This process has the file open and appends to it, so it must stay the same file.
    with file.open("r+b" if file.exists() else "wb") as stream:
        stream.write(merged)
        stream.truncate()


def _join_lines(remote: bytes, local: bytes) -> bytes:
    """Return the lines of the bucket's file, then those that only the local file has."""
    if local.startswith(remote):
        return local
    known = set(remote.splitlines())
    added = [line for line in local.splitlines() if line not in known]
    return b"".join(line + b"\n" for line in [*remote.splitlines(), *added])


def _is_rotation_of(file: Path, path: Path) -> bool:
    """Return whether `file` is the log file `path` or a full one of it."""
    return file == path or file.name.startswith(f"{path.name}.")


def _list_outdated_files(files: list[Path], n_full_files: int) -> list[Path]:
    """Return the oldest full log files, as far as there are more than `n_full_files`."""
    # The names end with the time. The file that is being written has none.
    full_files = sorted(file for file in files if file.suffix not in (".jsonl", ".txt"))
    return full_files[: max(0, len(full_files) - n_full_files)]


def _list_rotated_files(path: Path) -> list[Path]:
    """Return the log file and its full ones, as far as they exist."""
    return [file for file in path.parent.glob(f"{path.name}*") if _is_rotation_of(file, path)]


def _find_last_process(path: Path) -> JsonEntry | None:
    """Return the last start or end in a log file, as far as it is near the end of the file."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            # A device, such as /dev/full, has no end.
            text = stream.read(_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return None
    marks = [entry for entry in read_entries([text]) if entry.get("event") in ("start", "end")]
    return marks[-1] if marks else None


def _ends_within_line(path: Path) -> bool:
    """Return whether the file's last line has no end."""
    try:
        with path.open("rb") as stream:
            if stream.seek(0, os.SEEK_END) == 0:
                return False
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) != b"\n"
    except OSError:
        return False


@contextmanager
def _open_folder_log(folder_log: _FolderLog) -> Iterator[None]:
    """Write to a folder in this block."""
    is_outermost = _State.command is not None and not _State.folders
    _State.folders[folder_log.folder] = folder_log
    folder_log.open()
    try:
        yield
    finally:
        if _State.folders.pop(folder_log.folder, None) is not None:
            if not is_outermost:
                folder_log.log_end()
            folder_log.close()
        _update_level()


def _log_command_end(command: CommandLog, started_at: float, error: BaseException | None) -> None:
    """Log how a command ended, after how many seconds and with which exit code."""
    seconds = round(time.monotonic() - started_at, 1)
    exit_code, level, reason = command.exit_code, logging.INFO, ""
    if error is not None:
        is_interrupt = isinstance(error, KeyboardInterrupt)
        default = ExitCode.INTERRUPTED if is_interrupt else ExitCode.WORK_FAILED
        exit_code = int(getattr(error, "exit_code", default))
        is_failure = exit_code not in (ExitCode.INTERRUPTED, ExitCode.REGRESSION)
        level = logging.ERROR if is_failure else logging.WARNING
        reason = f": {type(error).__name__}: {error}".rstrip(": ")
    logger.log(
        level,
        "%s ended after %s s with exit code %s%s",
        command.command_line,
        seconds,
        exit_code,
        reason,
        exc_info=error,
        extra={"event": "end", "exit_code": exit_code, "seconds": seconds, "shown": True},
    )


def _choose_terminal_level(verbose: bool) -> int:
    """Return the level of the terminal; SpecError if the environment variable is wrong."""
    name = os.environ.get(LEVEL_VARIABLE, "").lower()
    if name and name not in _LEVELS:
        from raysweep.spec import SpecError

        raise SpecError(
            f"{LEVEL_VARIABLE}={os.environ[LEVEL_VARIABLE]!r}: expected {', '.join(_LEVELS)}"
        )
    level = _LEVELS.get(name, logging.WARNING)
    return min(level, logging.INFO) if verbose else level


def _attach(*handlers: logging.Handler) -> None:
    """Add handlers to the logger of the package."""
    for handler in handlers:
        _package_logger.addHandler(handler)
    _update_level()


def _detach(*handlers: logging.Handler) -> None:
    """Remove handlers from the logger of the package."""
    for handler in handlers:
        _package_logger.removeHandler(handler)


def _update_level() -> None:
    """Let all records pass while a command runs or a folder is open.

    In this time the handlers of the program that uses raysweep get the records that they would have
    got without: other libraries configure the root logger, and would print every record again.
    """
    is_recording = bool(_State.folders) or _State.command is not None
    if is_recording and _State.pass_on is None:
        _State.pass_on = _PassOnHandler(_package_logger.level, _package_logger.getEffectiveLevel())
        _package_logger.addHandler(_State.pass_on)
        _package_logger.setLevel(logging.DEBUG)
        _package_logger.propagate = False
    elif not is_recording and _State.pass_on is not None:
        _package_logger.removeHandler(_State.pass_on)
        _package_logger.setLevel(_State.pass_on.logger_level)
        _package_logger.propagate = True
        _State.pass_on = None
