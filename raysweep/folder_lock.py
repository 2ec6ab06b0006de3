"""Lock of a folder on this machine or a network file system: one process works there at a time.

The lock is `flock` on the file `lock`, which the system releases when the process ends. Where a
mount has no `flock`, as Lustre without the option `flock`, a strict lock of filelock replaces it:
files below `.lock.strict.filelock/` that no process removes but their owner, or another one that
sees that the owner has ended. The file `lock` names the holder in both cases.

Neither lock protects across machines if a mount keeps `flock` to itself (NFS with `nolock` or
`local_lock`, Lustre with `localflock`, sshfs).
"""

import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TextIO

from filelock import (
    BaseFileLock,
    FileLock,
    SoftFileLockProtocolError,
    StrictSoftFileLock,
    Timeout,
)

from raysweep.atomic_files import atomic_write_text
from raysweep.errors import DamagedFileError, InfrastructureError, SpecError
from raysweep.process_identity import ProcessIdentity

logger = logging.getLogger(__name__)

LOCK_FILE = "lock"
_STRICT_LOCK_FILE = ".lock.strict"
_STRICT_CLAIMS_FOLDER = f"{_STRICT_LOCK_FILE}.filelock"
# Endings of the other files that are written in place.
_WRITTEN_IN_PLACE = (".jsonl", ".txt", ".lock~")
# Characters of a lock file that are read.
_MAX_LOCK_LENGTH = 10_000
# Seconds between two attempts to acquire a lock.
_POLL_SECONDS = 0.5
# Time for which processes compete for the strict lock of a dead one.
_CONTEST_SECONDS = 1.0
# The mount has no flock, and never will.
_NO_FLOCK = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})


@contextmanager
def hold_folder_lock(
    folder: Path,
    description: str,
    hint: str = "",
    wait: bool = False,
    delete_if_unused: bool = False,
) -> Iterator[None]:
    """Context manager that holds the lock of a folder.

    Args:
        folder: The folder; created if it is missing.
        description: What the folder is, for messages.
        hint: What the user can do if another process holds the lock; added to the message.
        wait: Whether to wait until another process releases the lock.
        delete_if_unused: Whether to delete the folder if it has no other files at the end.

    Yields:
        Nothing.

    Raises:
        SpecError: Another process holds the lock and `wait` is False. The message names the holder.
        InfrastructureError: The folder cannot be written, or its file system has no locks.
        DamagedFileError: There is a symbolic link below the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        require_no_links(folder)
        started_at = time.monotonic()
        holder = ""
        lock = _try_lock(folder)
        while lock is None:
            current_holder = _describe_holder(folder)
            if not wait:
                raise SpecError(f"{description} is running already {current_holder}{hint}")
            if current_holder != holder:
                logger.info("%s is running already %s: waiting", description, current_holder)
                holder = current_holder
            time.sleep(_POLL_SECONDS)
            lock = _try_lock(folder)
        if holder:
            seconds = time.monotonic() - started_at
            logger.info("%s is free, after %.1f s of waiting", description, seconds)
    except OSError as error:
        raise InfrastructureError(_describe_problem(folder, error)) from error
    try:
        yield
    finally:
        with suppress(OSError):
            if delete_if_unused and list(folder.iterdir()) == [folder / LOCK_FILE]:
                (folder / LOCK_FILE).unlink()
                folder.rmdir()
            else:
                os.truncate(folder / LOCK_FILE, 0)
        lock.release()


def require_no_links(folder: Path, root: Path | None = None) -> None:
    """Check that work in a folder, which a stranger may have made, stays in it and ends.

    Args:
        folder: The folder; it may be missing if there is a `root`.
        root: Folder that the user has named and that contains `folder`; it may be a link itself.
            None if the user has named `folder`.

    Raises:
        DamagedFileError: One line. The folder contains a symbolic link, a pipe, a socket or a
            device, or a file that raysweep writes in place and that has a second name elsewhere; or
            something below `root` on the path of the folder is a link or no folder.
        OSError: The folder cannot be read.
    """
    if root is not None:
        _require_plain_path(folder, root)
        if not folder.exists():
            return
    subfolders = [str(folder)]
    while subfolders:
        with os.scandir(subfolders.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    raise DamagedFileError(
                        f"{entry.path}: is a symbolic link, and raysweep follows none in a folder "
                        "where it works; put what it leads to in its place, or delete it"
                    )
                if entry.is_dir(follow_symlinks=False):
                    subfolders.append(entry.path)
                elif problem := _find_file_problem(entry):
                    raise DamagedFileError(f"{entry.path}: {problem}; delete it")


def _require_plain_path(folder: Path, root: Path) -> None:
    """Raise DamagedFileError if a part of the path below `root` is a link or no folder."""
    n_parts = len(folder.relative_to(root).parts)
    for part in reversed([folder, *folder.parents][:n_parts]):
        if part.is_symlink() or (part.exists() and not part.is_dir()):
            kind = "a symbolic link" if part.is_symlink() else "no folder"
            raise DamagedFileError(f"{part}: is {kind}, where raysweep writes a folder; delete it")


def _find_file_problem(entry: os.DirEntry[str]) -> str:
    """Describe why an entry, which is no link or folder, must not be opened; "" if it may be."""
    if not entry.is_file(follow_symlinks=False):
        return "is a pipe, a socket or a device, which is no file of raysweep"
    is_written_in_place = entry.name == LOCK_FILE or entry.name.endswith(_WRITTEN_IN_PLACE)
    if is_written_in_place and entry.stat(follow_symlinks=False).st_nlink > 1:
        return "has a second name (a hard link), and raysweep would write into both"
    return ""


def is_folder_locked(folder: Path) -> bool:
    """Return whether a process holds the lock of a folder. Nothing is written.

    Args:
        folder: The folder, which may be missing.
    """
    try:
        with _open_lock_file(folder) as stream:
            # A holder that ends by itself empties the file. So the lock itself is tried only where
            # a holder works or was killed, and no process that starts finds it held by this one.
            if not stream.read(_MAX_LOCK_LENGTH):
                return False
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise InfrastructureError(_describe_problem(folder, error)) from error
    return _has_live_strict_holder(folder)


def _open_lock_file(folder: Path) -> TextIO:
    """Open the lock file for reading, whatever it is: opening a pipe would wait for a writer."""
    handle = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return os.fdopen(handle, encoding="utf-8", errors="replace")


@dataclass(frozen=True)
class _StrictHolder:
    """Holder of a strict lock, as the file `lock` describes it.

    Attributes:
        token: Identifies the strict lock's claim.
        process: The process that made the claim.
    """

    token: str
    process: ProcessIdentity

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the holder; None if the file describes none, or one that used flock."""
        try:
            with _open_lock_file(folder) as stream:
                values = json.loads(stream.read(_MAX_LOCK_LENGTH).partition("\n")[2])
            return cls(str(values["token"]), ProcessIdentity.from_json_dict(values))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None


def _try_lock(folder: Path) -> BaseFileLock | None:
    """Try once to lock a folder; return None if another process has locked it."""
    lock = FileLock(
        folder / LOCK_FILE, timeout=0, fallback_to_soft=False, on_acquired=_write_flock_holder
    )
    try:
        lock.acquire()
    except Timeout:
        return None
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return _try_strict_lock(folder)
        raise
    if (folder / _STRICT_CLAIMS_FOLDER).is_dir() and _make_strict_lock(folder).claims:
        # A process of another machine, whose mount of this folder has no flock.
        lock.release()
        return None
    return lock


def _try_strict_lock(folder: Path) -> BaseFileLock | None:
    """Try to lock a folder without flock; return None if another process has locked it."""
    lock = _make_strict_lock(folder)
    try:
        lock.acquire()
    except Timeout:
        if not _break_claims_of_ended_process(lock, folder):
            return None
        try:
            # Of several processes that begin at the same moment, none may succeed at once.
            lock.acquire(
                timeout=_CONTEST_SECONDS, cancel_check=lambda: _has_live_strict_holder(folder)
            )
        except Timeout:
            return None
    try:
        if (folder / LOCK_FILE).read_text(encoding="utf-8") and _StrictHolder.read(folder) is None:
            # A process of another machine, whose mount of this folder has flock, may hold that.
            lock.release()
            return None
        token = next(claim.token for claim in lock.claims if claim.state == "held")
        process = ProcessIdentity.of_this_process()
        values = json.dumps({"token": token, **process.to_json_dict()})
        atomic_write_text(folder / LOCK_FILE, f"{_describe_process()}\n{values}")
    except BaseException:
        lock.release()
        raise
    return lock


def _make_strict_lock(folder: Path) -> StrictSoftFileLock:
    return StrictSoftFileLock(folder / _STRICT_LOCK_FILE, timeout=0)


def _break_claims_of_ended_process(lock: StrictSoftFileLock, folder: Path) -> bool:
    """Remove a strict lock's claim if its process has ended; return whether it was removed."""
    holder = _StrictHolder.read(folder)
    if holder is None or not holder.process.is_gone():
        return False
    logger.warning("removing the lock of %s, which has ended, from %s", holder.process, folder)
    for claim in lock.claims:
        if claim.token == holder.token:
            # Several processes may remove the same claim. No later claim has its name.
            with suppress(FileNotFoundError):
                lock.force_break(claim.name)
    return True


def _has_live_strict_holder(folder: Path) -> bool:
    """Return whether the file `lock` names a holder that has not certainly ended."""
    holder = _StrictHolder.read(folder)
    return holder is not None and not holder.process.is_gone()


def _write_flock_holder(descriptor: int) -> None:
    """Write this process into the locked file."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, _describe_process().encode(), 0)


def _describe_process() -> str:
    start = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"{ProcessIdentity.of_this_process()} since {start}"


def _describe_holder(folder: Path) -> str:
    """Return the holder in brackets, and without flock also what to do if it has ended."""
    try:
        with _open_lock_file(folder) as stream:
            first_line = stream.read(_MAX_LOCK_LENGTH).partition("\n")[0]
    except OSError:
        first_line = ""
    description = f"({first_line.strip() or 'just started'})"
    claims_folder = folder / _STRICT_CLAIMS_FOLDER
    if claims_folder.is_dir():
        lock_files = f"{claims_folder} and {folder / LOCK_FILE}"
        description += f", on a file system without flock; if it has ended, delete {lock_files}"
    return description


def _describe_problem(folder: Path, error: OSError) -> str:
    """Return one line for a folder that cannot be locked."""
    reason = error.strerror or str(error)
    if error.errno == errno.ENOLCK:
        return (
            f"{folder} cannot be locked: {reason}; on NFS, start the lock service (rpc.statd) or "
            "mount it with version 4"
        )
    if isinstance(error, SoftFileLockProtocolError):
        return f"{folder} has no flock and cannot be locked without: {error.reason}"
    return f"{folder} cannot be written: {reason}"
