"""A store in a folder of this machine, or of a file system that machines share."""

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from raysweep.atomic_files import atomic_folder, atomic_open, link_or_copy
from raysweep.bounded_files import read_regular_file
from raysweep.errors import DamagedFileError
from raysweep.process_identity import ProcessIdentity
from raysweep.stores.errors import StoredFileNotFound, StoreUnavailable, translate_os_errors
from raysweep.stores.protocol import (
    META_FILE,
    StoredCheckpoint,
    StoredFile,
    VersionedContent,
    check_key,
)

# Seconds for which a lock is waited for; holders need milliseconds.
_LOCK_TIMEOUT = 30.0
_SHORTEST_LOCK_POLL, _LONGEST_LOCK_POLL = 0.001, 0.05


class FolderStore:
    """Store in a folder. The version of a file is a digest of its content.

    No symbolic link below the folder is followed: a folder that somebody else has made could lead
    anywhere. Listings leave out what is behind a link; DamagedFileError tells of the first one on
    the way to a file.

    `create`, `replace` and `delete` lock a hidden file beside the file with flock.

    Attributes:
        path: The folder; it need not exist before the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def require_writable(self) -> None:
        pass

    def __reduce__(self) -> Any:
        return FolderStore, (self.path,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FolderStore) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)

    @property
    def uri(self) -> str:
        return str(self.path)

    def uri_of(self, key: str) -> str:
        return str(self.path / check_key(key))

    def local_path(self, key: str) -> Path | None:
        return self._path_of(key)

    def working_path(self, key: str) -> Path:
        return self._path_of(key)

    def has_file(self, key: str) -> bool:
        with self._translate_errors(key) as path:
            return path.is_file()

    def read_bytes(self, key: str) -> bytes:
        with self._translate_errors(key) as path:
            try:
                return _read_file(path)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
                raise StoredFileNotFound(f"{path}: there is no such file") from error

    def read_versioned(self, key: str) -> VersionedContent | None:
        try:
            data = self.read_bytes(key)
        except StoredFileNotFound:
            return None
        return VersionedContent(data, _digest(data))

    def read_matching(self, prefix: str, pattern: str) -> dict[str, bytes]:
        contents = {}
        with self._translate_errors(prefix) as folder:
            for path in sorted(folder.glob(pattern)):
                if self._is_behind_link(path):
                    continue
                with suppress(FileNotFoundError, IsADirectoryError):
                    contents[self._key_of(path)] = _read_file(path)
        return contents

    def write_bytes(self, key: str, data: bytes) -> None:
        with self._translate_errors(key) as path, atomic_open(path) as stream:
            stream.write(data)

    def create(self, key: str, data: bytes) -> str | None:
        with self._translate_errors(key) as path, hold_file_lock(path):
            if path.exists():
                return None
            self.write_bytes(key, data)
            return _digest(data)

    def replace(self, key: str, data: bytes, version: str) -> str | None:
        with self._translate_errors(key) as path, hold_file_lock(path):
            current = self.read_versioned(key)
            if current is None or current.version != version:
                return None
            self.write_bytes(key, data)
            return _digest(data)

    def delete(self, key: str) -> None:
        with self._translate_errors(key) as path:
            # In a bucket, a folder is no file either.
            if os.path.lexists(path) and not path.is_dir():
                with hold_file_lock(path):
                    path.unlink(missing_ok=True)

    def list_files(self, prefix: str = "", pattern: str = "**/*") -> list[StoredFile]:
        files = []
        with self._translate_errors(prefix) as folder:
            for path in folder.glob(pattern):
                if path.name.endswith((".part", ".lock~")) or self._is_behind_link(path):
                    continue
                with suppress(FileNotFoundError):
                    if path.is_file():
                        status = path.stat()
                        files.append(
                            StoredFile(self._key_of(path), status.st_size, status.st_mtime)
                        )
        return sorted(files, key=lambda file: file.key)

    def list_subfolders(self, prefix: str) -> list[str]:
        with (
            self._translate_errors(prefix) as folder,
            suppress(FileNotFoundError, NotADirectoryError),
        ):
            return sorted(child.name for child in folder.iterdir() if child.is_dir())
        return []

    def delete_folder(self, prefix: str) -> None:
        with self._translate_errors(prefix) as path:
            # Renamed first, so that no process finds a partly deleted checkpoint.
            hidden = path.with_name(f".{path.name}.{os.getpid()}")
            with suppress(FileNotFoundError):
                path.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    @contextmanager
    def write_checkpoint(
        self, key: str, copy_from: str | None = None, overwrite: bool = True
    ) -> Iterator[Path]:
        with ExitStack() as stack:
            with self._translate_errors(key) as path:
                partial = stack.enter_context(atomic_folder(path, overwrite))
                if copy_from is not None:
                    self._link_checkpoint(copy_from, partial)
            # Errors of the block may have nothing to do with this store.
            yield partial
            with self._translate_errors(key):
                stack.close()

    def fetch_checkpoint(self, key: str) -> Path | None:
        with self._translate_errors(key) as path:
            return path if (path / META_FILE).is_file() else None

    def mark_used(self, key: str) -> None:
        with self._translate_errors(key) as path, suppress(FileNotFoundError):
            os.utime(path)

    def list_checkpoints(self, prefix: str) -> list[StoredCheckpoint]:
        checkpoints = []
        with self._translate_errors(prefix) as path:
            for meta_file in sorted(path.glob(f"[!.]*/{META_FILE}")):
                folder = meta_file.parent
                if self._is_behind_link(folder):
                    continue
                with suppress(FileNotFoundError):
                    size = sum(file.stat().st_size for file in folder.iterdir())
                    last_used = folder.stat().st_mtime
                    checkpoints.append(StoredCheckpoint(self._key_of(folder), size, last_used))
        return checkpoints

    def delete_unfinished(self, prefix: str, min_age: float = 0.0) -> None:
        with self._translate_errors(prefix) as folder:
            delete_unfinished_folders(folder, min_age)

    def _link_checkpoint(self, key: str, target: Path) -> None:
        """Link a checkpoint's files into a folder; StoredFileNotFound if there is none."""
        path = self._path_of(key)
        try:
            link_files(path, target)
        except FileNotFoundError as error:
            raise StoredFileNotFound(f"{path}: there is no checkpoint") from error

    def _path_of(self, key: str) -> Path:
        """Return the path of a key.

        Raises SpecError for what is no key, and DamagedFileError if a link is on the way.
        """
        path = self.path / check_key(key)
        if self._is_behind_link(path):
            links = [part for part in (path, *path.parents) if part.is_symlink()]
            link = links[-1] if links else path
            raise DamagedFileError(
                f"{link}: is a symbolic link, and raysweep follows none here; put the folder "
                "itself in its place, or name the folder to which it leads"
            )
        return path

    def _is_behind_link(self, path: Path) -> bool:
        """Return whether a part of a path below the folder is a symbolic link."""
        # `Path.resolve` would raise RuntimeError for links that form a loop.
        root = Path(os.path.realpath(self.path))
        return os.path.realpath(path) != str(root / path.relative_to(self.path))

    def _key_of(self, path: Path) -> str:
        """Return the key of a file below the folder."""
        return path.relative_to(self.path).as_posix()

    @contextmanager
    def _translate_errors(self, key: str) -> Iterator[Path]:
        """Yield the path of a key; raise the errors of stores in place of the file system's."""
        path = self._path_of(key)
        with translate_os_errors(str(path)):
            yield path


def link_files(source: Path, target: Path) -> None:
    """Link or copy a checkpoint's files, except its `meta.json`, into another folder.

    Args:
        source: Folder of the checkpoint.
        target: The other folder; it must exist.
    """
    for file in source.iterdir():
        if file.name != META_FILE:
            link_or_copy(file, target / file.name)


def delete_unfinished_folders(folder: Path, min_age: float) -> None:
    """Delete the hidden folders `.NAME.PROCESS` that crashed processes left in a folder.

    Args:
        folder: The folder; it need not exist.
        min_age: Keep those that were written to in this number of seconds.
    """
    for partial in folder.glob(".*.*/"):
        with suppress(FileNotFoundError):
            is_old = time.time() - partial.stat().st_mtime >= min_age
            if is_old and re.fullmatch(r"\..+\.\d+(-\d+)?", partial.name):
                shutil.rmtree(partial, ignore_errors=True)


def find_sqlite_file(url: str) -> Path | None:
    """Return the file of a database; None for a URL of anything but SQLite, or without a file.

    Args:
        url: URL as SQLAlchemy and MLflow read it, such as `sqlite:///mlflow.db`.
    """
    scheme, separator, path = url.partition(":///")
    path = path.partition("?")[0]
    is_file = separator and scheme.partition("+")[0] == "sqlite" and path not in ("", ":memory:")
    return Path(path) if is_file else None


def _read_file(path: Path) -> bytes:
    """Read a whole file; DamagedFileError for what is too long, or no file."""
    try:
        return read_regular_file(path)
    except ValueError as error:
        raise DamagedFileError(f"{path}: cannot be read: {error}") from error


def _digest(data: bytes) -> str:
    """Return the version of a content."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def hold_file_lock(path: Path, timeout: float = _LOCK_TIMEOUT) -> Iterator[None]:
    """Context manager that holds a lock for a file that need not exist.

    The lock is a hidden file beside it, which is gone afterwards.

    Args:
        path: The file.
        timeout: Seconds for which other processes may hold the lock.

    Yields:
        Nothing.

    Raises:
        StoreUnavailable: Another process keeps the lock, perhaps because it is stopped.
        OSError: The lock cannot be written.
    """
    lock_file = path.with_name(f".{path.name}.lock~")
    deadline = time.monotonic() + timeout
    while True:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        with open(lock_file, "a+", encoding="utf-8", opener=_open_unless_link) as stream:
            _lock_before(deadline, timeout, stream, path)
            n_names = os.fstat(stream.fileno()).st_nlink
            if n_names > 1:
                raise DamagedFileError(f"{lock_file}: has a second name (a hard link); delete it")
            # The previous holder may have deleted the file that this process has locked.
            if n_names:
                stream.truncate(0)
                stream.write(str(ProcessIdentity.of_this_process()))
                stream.flush()
                try:
                    yield
                    return
                finally:
                    lock_file.unlink()


def _open_unless_link(path: str, flags: int) -> int:
    """Open a file for `open`; OSError for a symbolic link, and no waiting for a pipe's reader."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def _lock_before(deadline: float, timeout: float, stream: IO[str], path: Path) -> None:
    """Lock an open file; StoreUnavailable after a time of the monotonic clock."""
    pause = _SHORTEST_LOCK_POLL
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                stream.seek(0)
                raise StoreUnavailable(
                    f"{path}: {stream.read() or 'another process'} has kept it locked for "
                    f"{timeout:.0f} s: end that process, or continue it if it is stopped"
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_LOCK_POLL)
