"""Read the log of a folder on this machine or in a bucket."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.bounded_files import read_regular_file
from raysweep.errors import DamagedFileError
from raysweep.logs.entries import JsonEntry, read_entries
from raysweep.logs.log_upload import merge_lines

if TYPE_CHECKING:
    from raysweep.stores import Location, StorePath

_FILE_PATTERN = re.compile(r"log(?:-[\w-]+)?\.jsonl(?:\.\d{8}T[\w.-]+)?")


def read_log(folder: "Location", with_trials: bool = True) -> list[JsonEntry]:
    """Read the log of a folder.

    Args:
        folder: Folder of a sweep, trial, training run or pipeline.
        with_trials: Whether to add the entries of the sweep's trials.

    Returns:
        The entries in the order of their times; empty if there is no log.

    Raises:
        DamagedFileError: A file is too long for a log of raysweep. One line.
    """
    from raysweep.stores import open_path

    files = _find_log_files(open_path(folder), with_trials)
    return read_entries(_read_log_file(file) for file in files)


def _find_log_files(folder: "StorePath", with_trials: bool) -> list["StorePath"]:
    """Return the log files of a folder, of this machine or of its bucket."""
    patterns = ("*", "trials/*/*", "base/*/*", "repeats/*/*") if with_trials else ("*",)
    local_folder = folder.working_path
    names = set()
    for pattern in patterns:
        files = filter(Path.is_file, local_folder.glob(pattern))
        names |= {path.relative_to(local_folder).as_posix() for path in files}
        if folder.local_path is None:
            prefix = f"{folder.key}/"
            names |= {file.key.removeprefix(prefix) for file in folder.list_files(pattern)}
    found = [name for name in names if _FILE_PATTERN.fullmatch(name.rpartition("/")[2])]
    # Full files are older than the one that is being written. This decides between equal times.
    found.sort(key=lambda name: (name.endswith(".jsonl"), name))
    return [folder / name for name in found]


def _read_log_file(file: "StorePath") -> str:
    """Return the lines of a log file; of one in a bucket, also those on this machine only."""
    local_file = file.working_path
    try:
        content = read_regular_file(local_file) if local_file.exists() else b""
    except ValueError as error:
        raise DamagedFileError(f"{local_file}: cannot be read: {error}") from error
    if file.local_path is None:
        stored = file.store.read_versioned(file.key)
        content = merge_lines(stored.data if stored else b"", content)
    return content.decode(errors="replace")
