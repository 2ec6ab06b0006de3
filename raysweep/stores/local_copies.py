"""Copies of a bucket's checkpoints on this machine, in $RAYSWEEP_CACHE (or ~/.cache/raysweep).

The processes of a machine share the copies; machines must not share them. The folder may be deleted
at any time, because the bucket has everything.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from raysweep.stores.protocol import META_FILE
from raysweep.user_folders import find_cache_folder

_MAX_BYTES = 50 * 2**30
# A copy may be evicted this number of seconds after its last use.
_EVICTION_MIN_AGE = 3600.0
# File with the approximate size of all copies: adding up a thousand of them takes 0.2 s.
_TOTAL_FILE = ".bytes"


def copies_root() -> Path:
    """Return the folder of all copies."""
    return Path(os.environ.get("RAYSWEEP_CACHE") or find_cache_folder("raysweep")).resolve()


def bucket_copies_folder(server: str, bucket: str) -> Path:
    """Return the folder of a bucket's copies.

    Args:
        server: Scheme and options of the bucket's URI.
        bucket: Name of the bucket.
    """
    # A folder name that Ray, which parses paths as URIs, accepts.
    escaped = quote(server, safe="").replace("~", "%7E").replace("%", "~")
    return copies_root() / escaped / bucket


def read_meta(folder: Path) -> bytes | None:
    """Return the content of a copy's `meta.json`; None if there is no copy."""
    try:
        return (folder / META_FILE).read_bytes()
    except OSError:
        return None


def touch_copy_if_current(folder: Path, meta: bytes) -> bool:
    """Protect a copy from eviction for an hour, if the bucket still has the same checkpoint.

    Args:
        folder: Folder of the copy.
        meta: Content of the checkpoint's `meta.json` in the bucket.

    Returns:
        Whether the copy exists and has this `meta.json`.
    """
    with _hold_copies_lock():
        if read_meta(folder) != meta:
            return False
        os.utime(folder)
        return True


def place_copy(partial: Path, folder: Path) -> None:
    """Make a complete download the copy of a checkpoint, and evict others if necessary.

    If another process has placed the same copy meanwhile, that one stays, because its files may be
    open.

    Args:
        partial: Folder of the download, beside `folder`; it is moved or deleted.
        folder: Folder of the copy.
    """
    meta = read_meta(partial)
    assert meta is not None
    is_small = True
    if not touch_copy_if_current(folder, meta):
        n_bytes = sum(file.stat().st_size for file in partial.iterdir())
        with _hold_copies_lock():
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            os.utime(folder)
            is_small = _add_to_total(n_bytes)
    shutil.rmtree(partial, ignore_errors=True)
    if not is_small:
        evict_copies()


def delete_copy(folder: Path) -> None:
    """Delete a copy, or all copies below a folder."""
    with _hold_copies_lock():
        shutil.rmtree(folder, ignore_errors=True)


def _add_to_total(n_bytes: int) -> bool:
    """Count a copy; return whether all copies are known to be below 50 GiB. Needs the lock."""
    file = copies_root() / _TOTAL_FILE
    try:
        total_bytes = int(file.read_text()) + n_bytes
    except (OSError, ValueError):
        # The first copy, or a cache of an earlier version: `evict_copies` counts.
        return False
    file.write_text(str(total_bytes))
    return total_bytes <= _MAX_BYTES


def evict_copies() -> None:
    """Delete the least recently used copies until all copies together are below 50 GiB."""
    copies: list[tuple[float, int, Path]] = []
    with suppress(OSError):  # Other processes may delete files meanwhile.
        for folder in [meta_file.parent for meta_file in copies_root().rglob(META_FILE)]:
            n_bytes = sum(file.stat().st_size for file in folder.iterdir())
            copies.append((folder.stat().st_mtime, n_bytes, folder))
    total_bytes = sum(n_bytes for _, n_bytes, _ in copies)
    for _, n_bytes, folder in sorted(copies):
        if total_bytes <= _MAX_BYTES:
            break
        with _hold_copies_lock(), suppress(FileNotFoundError):
            # Read again, because another process may have used the copy meanwhile.
            if time.time() - folder.stat().st_mtime >= _EVICTION_MIN_AGE:
                shutil.rmtree(folder)
                total_bytes -= n_bytes
    with _hold_copies_lock():
        (copies_root() / _TOTAL_FILE).write_text(str(total_bytes))


@contextmanager
def _hold_copies_lock() -> Iterator[None]:
    """Hold the lock that orders use, replacement and eviction of all copies of this machine."""
    root = copies_root()
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
