"""A store in a folder of this machine, or of a file system that machines share."""

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raysweep.atomic_files import atomic_folder, atomic_open, link_or_copy
from raysweep.stores.errors import StoredFileNotFound
from raysweep.stores.protocol import (
    META_FILE,
    StoredCheckpoint,
    StoredFile,
    VersionedContent,
)


class FolderStore:
    """Store in a folder. The version of a file is a digest of its content.

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
        return str(self.path / key)

    def local_path(self, key: str) -> Path | None:
        return self.path / key

    def scratch_path(self, key: str) -> Path:
        return self.path / key

    def has_file(self, key: str) -> bool:
        return (self.path / key).is_file()

    def read_bytes(self, key: str) -> bytes:
        try:
            return (self.path / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise StoredFileNotFound(f"{self.uri_of(key)}: there is no such file") from error

    def read_versioned(self, key: str) -> VersionedContent | None:
        try:
            data = self.read_bytes(key)
        except StoredFileNotFound:
            return None
        return VersionedContent(data, _digest(data))

    def read_matching(self, prefix: str, pattern: str) -> dict[str, bytes]:
        contents = {}
        for path in sorted((self.path / prefix).glob(pattern)):
            with suppress(FileNotFoundError, IsADirectoryError):
                contents[self._key_of(path)] = path.read_bytes()
        return contents

    def write_bytes(self, key: str, data: bytes) -> None:
        with atomic_open(self.path / key) as stream:
            stream.write(data)

    def create(self, key: str, data: bytes) -> str | None:
        path = self.path / key
        with _hold_file_lock(path):
            if path.exists():
                return None
            self.write_bytes(key, data)
            return _digest(data)

    def replace(self, key: str, data: bytes, version: str) -> str | None:
        with _hold_file_lock(self.path / key):
            if not self._has_version(key, version):
                return None
            self.write_bytes(key, data)
            return _digest(data)

    def delete(self, key: str, version: str | None = None) -> bool:
        path = self.path / key
        if not path.exists():
            return version is None
        with _hold_file_lock(path):
            if version is not None and not self._has_version(key, version):
                return False
            path.unlink(missing_ok=True)
            return True

    def list_files(self, prefix: str = "", pattern: str = "**/*") -> list[StoredFile]:
        files = []
        for path in (self.path / prefix).glob(pattern):
            with suppress(FileNotFoundError):
                if path.is_file() and not path.name.endswith((".part", ".lock~")):
                    status = path.stat()
                    files.append(StoredFile(self._key_of(path), status.st_size, status.st_mtime))
        return sorted(files, key=lambda file: file.key)

    def list_subfolders(self, prefix: str) -> list[str]:
        with suppress(FileNotFoundError, NotADirectoryError):
            return sorted(child.name for child in (self.path / prefix).iterdir() if child.is_dir())
        return []

    def delete_folder(self, prefix: str) -> None:
        # Renamed first, so that no process finds a partly deleted checkpoint.
        path = self.path / prefix
        hidden = path.with_name(f".{path.name}.{os.getpid()}")
        with suppress(FileNotFoundError):
            path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    @contextmanager
    def write_checkpoint(
        self, key: str, copy_from: str | None = None, overwrite: bool = True
    ) -> Iterator[Path]:
        with atomic_folder(self.path / key, overwrite) as partial:
            if copy_from is not None:
                link_files(self.path / copy_from, partial)
            yield partial

    def fetch_checkpoint(self, key: str) -> Path | None:
        path = self.path / key
        return path if (path / META_FILE).is_file() else None

    def mark_used(self, key: str) -> None:
        with suppress(FileNotFoundError):
            os.utime(self.path / key)

    def list_checkpoints(self, prefix: str) -> list[StoredCheckpoint]:
        checkpoints = []
        for meta_file in sorted((self.path / prefix).glob(f"[!.]*/{META_FILE}")):
            folder = meta_file.parent
            with suppress(FileNotFoundError):
                size = sum(file.stat().st_size for file in folder.iterdir())
                last_used = folder.stat().st_mtime
                checkpoints.append(StoredCheckpoint(self._key_of(folder), size, last_used))
        return checkpoints

    def delete_unfinished(self, prefix: str, min_age: float = 0.0) -> None:
        delete_unfinished_folders(self.path / prefix, min_age)

    def _key_of(self, path: Path) -> str:
        """Return the key of a file below the folder."""
        return path.relative_to(self.path).as_posix()

    def _has_version(self, key: str, version: str) -> bool:
        """Return whether a file exists and has a version."""
        current = self.read_versioned(key)
        return current is not None and current.version == version


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


def _digest(data: bytes) -> str:
    """Return the version of a content."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def _hold_file_lock(path: Path) -> Iterator[None]:
    """Hold a lock for a file that need not exist; the lock's own file is gone afterwards."""
    lock_file = path.with_name(f".{path.name}.lock~")
    while True:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        with lock_file.open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            # The previous holder may have deleted the file that this process has locked.
            if os.fstat(stream.fileno()).st_nlink:
                try:
                    yield
                    return
                finally:
                    lock_file.unlink()
