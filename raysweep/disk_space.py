"""Free space of disks: how much a sweep needs, and errors that mean a full disk."""

import errno
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

from raysweep.errors import list_causes

logger = logging.getLogger(__name__)

_FULL_DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
# What libraries make of these errors: Rust, SQLite, the C library.
_FULL_DISK_WORDS = ("no space left on device", "os error 28", "disk is full", "quota exceeded")
_GIB = 2**30


def find_free_bytes(path: Path) -> int:
    """Return the free bytes of the disk of a path, as far as this user may use them.

    Args:
        path: File or folder; it may not exist yet.

    Raises:
        OSError: The disk does not answer.
    """
    folder = path.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def is_disk_full_error(error: BaseException) -> bool:
    """Return whether an error, or one that caused it, says that a disk is full.

    Args:
        error: Any error, also of a library that does not raise OSError.
    """
    for cause in (error, *list_causes(error), error.__context__):
        if isinstance(cause, OSError) and cause.errno in _FULL_DISK_ERRNOS:
            return True
        text = str(cause).lower() if isinstance(cause, Exception) else ""
        if any(words in text for words in _FULL_DISK_WORDS):
            return True
    return False


class SpareSpace:
    """Disk space that is occupied until it is needed, for example to record that the disk is full.

    It is a file without a name, which the system deletes when this process ends.

    Args:
        folder: A folder on the disk.
        n_bytes: Size in bytes. If the disk has less room, nothing is occupied.
    """

    def __init__(self, folder: Path, n_bytes: int) -> None:
        self._folder = folder
        self._n_bytes = n_bytes
        self._file: IO[bytes] | None = None
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
            # Some file systems store zeros in no space.
            self._file.write(os.urandom(n_bytes))
        except OSError as error:
            logger.info("no spare space on the disk of %s: %s", folder, error)
            self.release()

    def is_needed(self) -> bool:
        """Return whether the disk has less free space than this object was to occupy."""
        return find_free_bytes(self._folder) < self._n_bytes

    def release(self) -> None:
        """Free the space."""
        if self._file is not None:
            self._file.close()


def format_bytes(n_bytes: float) -> str:
    """Format a size in words, such as `3.2 GiB` or `12 MiB`."""
    if n_bytes >= _GIB:
        return f"{n_bytes / _GIB:.1f} GiB"
    return f"{n_bytes / 2**20:.0f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:.0f} KiB"


def describe_needed_space(needed_bytes: int, folder: Path | None, prefix_bytes: int = 0) -> str:
    """Return the line of a plan about the space that checkpoints take.

    Args:
        needed_bytes: Size of the checkpoints that are still to be written.
        folder: Their folder on this machine; it may not exist yet. None for a bucket.
        prefix_bytes: Largest size of the states that go into the prefix cache.
    """
    line = f"checkpoints take about {format_bytes(needed_bytes)}"
    if prefix_bytes:
        line += f", and states that trials share up to {format_bytes(prefix_bytes)}"
    if folder is None:
        return line
    return f"{line}; the disk of {folder} has {format_bytes(find_free_bytes(folder))} free"


def describe_missing_space(path: Path, needed_bytes: int, reserve_gib: float) -> str:
    """Return a line if a disk has less than what work needs and the reserve; "" otherwise.

    Args:
        path: Folder of the work.
        needed_bytes: What the work will write.
        reserve_gib: What is to be left, in GiB.
    """
    free_bytes = find_free_bytes(path)
    if free_bytes - needed_bytes >= reserve_gib * _GIB:
        return ""
    needed = f"needed are about {format_bytes(needed_bytes)}, and " if needed_bytes else ""
    return (
        f"{path}: its disk has {format_bytes(free_bytes)} free; "
        f"{needed}disk_reserve_gib = {reserve_gib:g} is to be left"
    )
