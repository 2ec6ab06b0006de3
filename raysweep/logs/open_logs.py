"""The folders that this process logs to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from raysweep.logs.folder_log import FolderLog
from raysweep.logs.running_command import CommandLog

if TYPE_CHECKING:
    from raysweep.stores import Location, StorePath


class _OpenLogs:
    """Attributes:
    by_folder: The folders that this process logs to.
    """

    by_folder: ClassVar[dict["StorePath", FolderLog]] = {}


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
    if folder in _OpenLogs.by_folder:
        yield
        return
    command = CommandLog.running
    writer = command.name if command is not None else "driver"
    folder_log = FolderLog(folder, "log", False, {"writer": writer, **context})
    if command is not None and not _OpenLogs.by_folder:
        command.folders.enter_context(_open_folder_log(folder_log))
        yield
        return
    with _open_folder_log(folder_log):
        yield


@contextmanager
def log_trial(run_path: "Location", *, rank: int | None = None, role: str = "") -> Iterator[None]:
    """Context manager that writes all records of a trial's process into the trial's folder.

    Args:
        run_path: Folder of a trial, base run or repeat. Its name has the number, and the seed of a
            repeat.
        rank: Rank of this process among the workers of the trial; None for a trial in one process.
        role: What this process does besides training, as part of its files' names.
    """
    from raysweep.stores import open_path

    run_path = open_path(run_path)
    writer = {"base": "base run", "repeats": "repeat"}.get(run_path.parent.name, "trial")
    number, _, seed = run_path.name.partition("-seed-")
    context: dict[str, Any] = {"writer": writer, "trial": int(number)}
    if seed:
        context["seed"] = int(seed)
    if rank is not None:
        context["rank"] = rank
    suffix = role or (f"worker-{rank}" if rank else "")
    stem = f"log-{suffix}" if suffix else "log"
    with _open_folder_log(FolderLog(run_path, stem, True, context)):
        yield


def discard_log(folder: "StorePath") -> None:
    """Stop logging into a folder and delete its log, because the work there was never started.

    Args:
        folder: The folder.
    """
    folder_log = _OpenLogs.by_folder.pop(folder, None)
    if folder_log is not None:
        folder_log.discard()


def close_logs() -> None:
    """Write and upload the last records of this process, which ends without leaving its blocks."""
    while _OpenLogs.by_folder:
        _, folder_log = _OpenLogs.by_folder.popitem()
        folder_log.log_end()
        folder_log.close()


@contextmanager
def _open_folder_log(folder_log: FolderLog) -> Iterator[None]:
    """Write to a folder in this block."""
    is_outermost = CommandLog.running is not None and not _OpenLogs.by_folder
    _OpenLogs.by_folder[folder_log.folder] = folder_log
    folder_log.open()
    try:
        yield
    finally:
        if _OpenLogs.by_folder.pop(folder_log.folder, None) is not None:
            if not is_outermost:
                folder_log.log_end()
            folder_log.close()
