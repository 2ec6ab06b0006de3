"""Atomic writes: after a crash, no file or folder is partly written."""

import logging
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)


@contextmanager
def atomic_open(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary stream that replaces `path` when the block ends without an error.

    After a crash or an exception, the earlier content of `path` is unchanged.

    Args:
        path: File to write. Missing parent folders are created.

    Yields:
        The stream, which writes into a hidden file beside `path`.

    Raises:
        OSError: If the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.part")
    try:
        # What a crashed process left, or somebody else has put there, is not written into.
        partial.unlink(missing_ok=True)
        with partial.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file with `atomic_open`.

    Args:
        path: File to write. Missing parent folders are created.
        text: The whole content.

    Raises:
        OSError: If the file cannot be written.
    """
    with atomic_open(path) as stream:
        stream.write(text.encode())


def link_or_copy(source: Path, target: Path) -> None:
    """Create a hard link, or a copy if the file system does not support hard links.

    Args:
        source: The file.
        target: Path of the link or copy.
    """
    try:
        os.link(source, target)
    except OSError as error:
        logger.debug("fallback: %s is copied, not linked: %s", source, error)
        shutil.copy2(source, target)


@contextmanager
def atomic_folder(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """Create a folder that replaces `path` when the block ends without an error.

    After an exception, the earlier `path` is unchanged, and the new hidden folder remains until the
    next call of the same process for the same path. A crash between the renaming of the earlier
    folder and that of the new one leaves no `path`.

    Args:
        path: Folder to write. Missing parent folders are created.
        overwrite: Whether an earlier folder is replaced. If not, the new one is given up.

    Yields:
        A new, empty, hidden folder beside `path`.

    Raises:
        OSError: If the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for file in filter(Path.is_file, partial.rglob("*")):
        if file.stat().st_nlink > 1:
            # A hard link to a file of another atomic folder, which is on the disk already.
            continue
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    earlier = partial.with_name(f"{partial.name}-0")
    if overwrite and path.exists():
        # Moved first: a crash while its files are deleted must not leave a part of it.
        shutil.rmtree(earlier, ignore_errors=True)
        path.replace(earlier)
    try:
        partial.replace(path)
    except OSError:
        if overwrite or not path.exists():
            raise
        shutil.rmtree(partial)
    shutil.rmtree(earlier, ignore_errors=True)
