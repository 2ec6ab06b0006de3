"""Upload log files to the bucket of their folder, and merge what other machines have written."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.logs.log_files import LogFile, is_rotation_of, list_outdated_files, list_rotated_files

if TYPE_CHECKING:
    from raysweep.stores import StorePath

logger = logging.getLogger(__name__)

# Seconds between two uploads, and for how long the end of a log waits for the last one.
_UPLOAD_INTERVAL, _LAST_UPLOAD_TIMEOUT = 30.0, 20.0


class LogUploader(threading.Thread):
    """Uploads log files that have changed, twice a minute at most and at the end."""

    def __init__(self, folder: "StorePath", log_files: list["LogFile"]) -> None:
        """Prepare the thread.

        Args:
            folder: Folder in a bucket.
            log_files: Log files of this machine for this folder.
        """
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
        # Whatever it is, the work continues without the upload.
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
            for file in list_rotated_files(log_file.path):
                self._upload_if_changed(file, log_file)

    def _upload_if_changed(self, file: Path, log_file: "LogFile") -> None:
        """Upload a file unless the bucket has it; after a full one, make room in the bucket."""
        state = file.stat()
        version = (state.st_size, state.st_mtime_ns)
        if self._uploaded.get(file) == version:
            return
        (self._folder / file.name).write_bytes(file.read_bytes())
        self._uploaded[file] = version
        if file != log_file.path:
            _delete_outdated_remote_files(self._folder, log_file)


def _delete_outdated_remote_files(folder: "StorePath", log_file: LogFile) -> None:
    """Delete the oldest full files of a log from its bucket, also those of other machines."""
    path = log_file.path
    files = [Path(stored.key) for stored in folder.list_files(f"{path.name}*")]
    files = [file for file in files if is_rotation_of(path.with_name(file.name), path)]
    for file in list_outdated_files(files, log_file.backupCount):
        (folder / file.name).delete()


def _merge_remote_log(folder: "StorePath", log_file: LogFile) -> None:
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
            full_files = [file for file in list_rotated_files(path) if file != path]
            elsewhere = {line for file in full_files for line in file.read_bytes().splitlines()}
            lines = [line + b"\n" for line in content.splitlines() if line not in elsewhere]
            _prepend_missing_lines(path, b"".join(lines))
        finally:
            log_file.release()


def _prepend_missing_lines(file: Path, content: bytes) -> None:
    """Make a file begin with `content`, followed by those of its own lines that are not in it."""
    local = file.read_bytes() if file.exists() else b""
    merged = merge_lines(content, local)
    # This process has the file open and appends to it, so it must stay the same file.
    with file.open("r+b" if file.exists() else "wb") as stream:
        stream.write(merged)
        stream.truncate()


def merge_lines(remote: bytes, local: bytes) -> bytes:
    """Merge two versions of a log file.

    Args:
        remote: Content of the bucket's file.
        local: Content of this machine's file.

    Returns:
        The lines of the bucket's file, then those that only the local file has.
    """
    if local.startswith(remote):
        return local
    known = set(remote.splitlines())
    added = [line for line in local.splitlines() if line not in known]
    return b"".join(line + b"\n" for line in [*remote.splitlines(), *added])
