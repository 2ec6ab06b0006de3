"""The protocol of all stores: what raysweep needs of a folder or a bucket.

A store holds files by key. A key is a relative path with `/`, such as `s1/trials/0003/trial.json`,
without empty parts, `.`, `..` and control characters; "" is the store's own folder. Every operation
is complete when it returns: there is no separate upload or download.

A checkpoint is a folder with a `meta.json`, which is written last and deleted first: readers find a
complete checkpoint or none.
"""

import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from raysweep.errors import SpecError

# File that makes a folder a checkpoint: written last and deleted first.
META_FILE = "meta.json"
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class StoredFile:
    """A file in a store.

    Attributes:
        key: Its key.
        size: Bytes.
        modified: Time of the last write in Unix seconds, by the clock of the store.
    """

    key: str
    size: int
    modified: float


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint folder in a store.

    Attributes:
        key: Key of the folder.
        size: Bytes of all files in it.
        last_used: Time of its last use in Unix seconds; in a bucket, that of its last upload.
    """

    key: str
    size: int
    last_used: float


@dataclass(frozen=True)
class VersionedContent:
    """Content of a file, and the version that identifies this content.

    Attributes:
        data: The content.
        version: Value for `replace`. Equal contents may have equal versions.
    """

    data: bytes
    version: str


def check_key(key: str) -> str:
    """Check that a text is a key: nothing outside a store has a key.

    Args:
        key: The text.

    Returns:
        The same text.

    Raises:
        SpecError: It is an absolute path, or has an empty part, `.`, `..` or a control character.
    """
    parts = key.split("/") if key else []
    if {"", ".", ".."} & set(parts) or _CONTROL_CHARACTERS.search(key):
        raise SpecError(
            f"{key!r}: expected a path relative to its folder, such as s1/trials, without '..', "
            "'.', '//' and control characters"
        )
    return key


class Store(Protocol):
    """Files by key in a folder or a bucket that several processes and machines share.

    All operations raise these errors, of which the last two are OSErrors, too:

    - `SpecError` for what is no key (see `check_key`);
    - `StoreAccessRefused` if the store refuses access, or its disk is full or read-only;
    - `StoreUnavailable` if a bucket does not answer for about two minutes, another process keeps a
      file of a folder locked, or the file system reports another error.
    """

    @property
    def uri(self) -> str:
        """Location that is the same on every machine: the folder's path, or the bucket's URI."""
        ...

    def uri_of(self, key: str) -> str:
        """Return the location of a key, in the form of `uri`."""
        ...

    def require_writable(self) -> None:
        """Check that this process may write. Each operation that writes or deletes does it, too.

        Raises:
            LeaseLost: Another process has taken over the bucket's folder that this process held
                (see `raysweep.leases.hold_folder_lease`).
        """
        ...

    def local_path(self, key: str) -> Path | None:
        """Return where a key is on this machine; None if the store is not in its file system."""
        ...

    def working_path(self, key: str) -> Path:
        """Return where this machine keeps files of a key.

        In a folder that is the key's own path, for a bucket a path in the cache of its copies.
        """
        ...

    def has_file(self, key: str) -> bool:
        """Return whether there is a file with this key."""
        ...

    def read_bytes(self, key: str) -> bytes:
        """Read a file.

        Args:
            key: Key of the file.

        Returns:
            The whole content.

        Raises:
            StoredFileNotFound: There is no such file.
        """
        ...

    def read_versioned(self, key: str) -> VersionedContent | None:
        """Read a file with its version.

        Args:
            key: Key of the file.

        Returns:
            Content and version; None if there is no such file.
        """
        ...

    def read_matching(self, prefix: str, pattern: str) -> dict[str, bytes]:
        """Read all files below a folder that match a pattern, several at a time.

        Args:
            prefix: Key of the folder; "" for the whole store.
            pattern: Glob relative to the folder, such as `*/trial.json`.

        Returns:
            Content by key, sorted by key; without files that were deleted meanwhile.
        """
        ...

    def write_bytes(self, key: str, data: bytes) -> None:
        """Write a file atomically. Readers find the earlier content or the new one.

        Args:
            key: Key of the file.
            data: The whole content.
        """
        ...

    def create(self, key: str, data: bytes) -> str | None:
        """Create a file unless it exists. Of several simultaneous callers, one succeeds.

        Args:
            key: Key of the file.
            data: The whole content.

        Returns:
            Version of the new file; None if the file exists.
        """
        ...

    def replace(self, key: str, data: bytes, version: str) -> str | None:
        """Replace a file if it still has a version. Of several simultaneous callers, one succeeds.

        Args:
            key: Key of the file.
            data: The new content. It should differ from the earlier one, because equal contents may
                have equal versions.
            version: Expected version, as returned by `create`, `replace` or `read_versioned`.

        Returns:
            The new version; None if the file has another version or is gone.
        """
        ...

    def delete(self, key: str) -> None:
        """Delete a file, if there is one.

        A bucket may repeat the deletion after a lost answer. So no other process may create the
        file again meanwhile (see `raysweep.bucket_lease`).

        Args:
            key: Key of the file.
        """
        ...

    def list_files(self, prefix: str = "", pattern: str = "**/*") -> list[StoredFile]:
        """List the files below a folder.

        Args:
            prefix: Key of the folder; "" for the whole store.
            pattern: Glob relative to the folder. `*` does not match `/`.

        Returns:
            The files, sorted by key; none if the folder does not exist.
        """
        ...

    def list_subfolders(self, prefix: str) -> list[str]:
        """Return the sorted names of the direct subfolders; none if the folder does not exist."""
        ...

    def delete_folder(self, prefix: str) -> None:
        """Delete a folder with all files below it, each `meta.json` first.

        Args:
            prefix: Key of the folder; it need not exist.
        """
        ...

    def write_checkpoint(
        self, key: str, copy_from: str | None = None, overwrite: bool = True
    ) -> AbstractContextManager[Path]:
        """Write a checkpoint folder, which is complete when the block ends without an error.

        Args:
            key: Key of the folder.
            copy_from: Key of a checkpoint. The new one gets its files, except `meta.json`, as hard
                links or as copies inside the bucket where possible.
            overwrite: Whether a folder that exists at the end of the block is replaced. A bucket
                always replaces it.

        Returns:
            A context manager. It yields a local folder for the files, of which those from
            `copy_from` must not be changed.

        Raises:
            FileNotFoundError: There is no checkpoint `copy_from`.
        """
        ...

    def fetch_checkpoint(self, key: str) -> Path | None:
        """Return a checkpoint's files on this machine, downloaded if necessary.

        The files of a bucket stay for at least an hour after the last call.

        Args:
            key: Key of the folder.

        Returns:
            A folder to read from; None if there is no checkpoint.
        """
        ...

    def mark_used(self, key: str) -> None:
        """Set a checkpoint's time of last use. A bucket has none, and nothing happens."""
        ...

    def list_checkpoints(self, prefix: str) -> list[StoredCheckpoint]:
        """List the checkpoints that are direct subfolders of a folder, without hidden ones.

        Args:
            prefix: Key of the folder; it need not exist.
        """
        ...

    def delete_unfinished(self, prefix: str, min_age: float = 0.0) -> None:
        """Delete what crashed calls of `write_checkpoint` left directly below a folder.

        Args:
            prefix: Key of the folder.
            min_age: Keep what was written to in this number of seconds: another process may still
                be writing it.
        """
        ...
