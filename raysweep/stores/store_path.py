"""Paths of files and folders in a store, with the operations that a path of this machine has."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from raysweep.spec import JsonDict
from raysweep.stored_data import parse_stored_json
from raysweep.stores.protocol import META_FILE, Store, StoredFile


@dataclass(frozen=True)
class StorePath:
    """A file or folder in a store. `str(path)` is its location on every machine: a path or URI.

    It is not a `pathlib.Path` and cannot be opened as one, so that nothing is written beside the
    store by mistake. The operations are those of `Store`; they raise the same errors.

    Attributes:
        store: The store.
        key: Key in the store.
    """

    store: Store
    key: str

    def __truediv__(self, part: str) -> "StorePath":
        # As with pathlib, `a/` and `./a` are `a`; the store refuses `..` and absolute paths.
        names = [name for name in part.split("/") if name not in ("", ".")]
        relative = part if part.startswith("/") else "/".join(names)
        return StorePath(self.store, "/".join(filter(None, (self.key, relative))))

    def __str__(self) -> str:
        return self.store.uri_of(self.key)

    def __repr__(self) -> str:
        return f"StorePath({str(self)!r})"

    @property
    def name(self) -> str:
        """Last part of the key."""
        return PurePosixPath(self.key).name

    @property
    def parent(self) -> "StorePath":
        """The folder that holds this file or folder."""
        return StorePath(self.store, self.key.rpartition("/")[0])

    @property
    def local_path(self) -> Path | None:
        """This path in the file system of this machine; None in a bucket."""
        return self.store.local_path(self.key)

    @property
    def working_path(self) -> Path:
        """Where this machine keeps files of this path (see `Store.working_path`)."""
        return self.store.working_path(self.key)

    def is_file(self) -> bool:
        """Return whether there is such a file."""
        return self.store.has_file(self.key)

    def read_bytes(self) -> bytes:
        """Read the file; StoredFileNotFound if there is none."""
        return self.store.read_bytes(self.key)

    def read_text(self) -> str:
        """Read the UTF-8 text file; StoredFileNotFound if there is none."""
        return self.read_bytes().decode()

    def read_json(self, types: Mapping[str, Any] = MappingProxyType({})) -> JsonDict:
        """Read a JSON object that raysweep wrote.

        Args:
            types: Type of each key that the object must have (see `parse_stored_json`).

        Returns:
            The object.

        Raises:
            DamagedFileError: It is not a JSON object, lacks a key, or a value has another type. One
                line.
            StoredFileNotFound: There is no file.
        """
        return parse_stored_json(self.read_bytes(), str(self), types)

    def read_matching(self, pattern: str) -> dict["StorePath", bytes]:
        """Read all files below this folder that match a pattern.

        Args:
            pattern: Glob relative to this folder, such as `*/trial.json`.

        Returns:
            Content by path, sorted by path.
        """
        contents = self.store.read_matching(self.key, pattern)
        return {StorePath(self.store, key): data for key, data in contents.items()}

    def write_bytes(self, data: bytes) -> None:
        """Write the file atomically."""
        self.store.write_bytes(self.key, data)

    def write_text(self, text: str) -> None:
        """Write the UTF-8 text file atomically."""
        self.write_bytes(text.encode())

    def write_json(self, data: object, indent: int | None = None) -> None:
        """Write the JSON file atomically.

        Args:
            data: What the `json` module can write.
            indent: Spaces per level; None for one line.
        """
        self.write_text(json.dumps(data, indent=indent))

    def delete(self) -> None:
        """Delete the file, if there is one."""
        self.store.delete(self.key)

    def delete_folder(self) -> None:
        """Delete the folder with everything in it, if there is one."""
        self.store.delete_folder(self.key)

    def list_files(self, pattern: str = "**/*") -> list[StoredFile]:
        """List the files below this folder, sorted by key.

        Args:
            pattern: Glob relative to this folder; `*` does not match `/`.
        """
        return self.store.list_files(self.key, pattern)

    def list_subfolders(self) -> list[str]:
        """Return the sorted names of the direct subfolders."""
        return self.store.list_subfolders(self.key)

    def list_folders_containing(self, file_name: str = META_FILE) -> list[str]:
        """Return the sorted names of the direct subfolders with a file, without hidden ones.

        Args:
            file_name: Name of the file; by default the one that makes a folder a checkpoint.
        """
        files = self.list_files(f"[!.]*/{file_name}")
        return [PurePosixPath(file.key).parent.name for file in files]

    def write_checkpoint(
        self, copy_from: "StorePath | None" = None, overwrite: bool = True
    ) -> AbstractContextManager[Path]:
        """Write this checkpoint folder (see `Store.write_checkpoint`).

        Args:
            copy_from: Checkpoint in the same store whose files, except `meta.json`, this one gets.
            overwrite: Whether a folder that exists at the end of the block is replaced.
        """
        source_key = copy_from.key if copy_from is not None else None
        return self.store.write_checkpoint(self.key, source_key, overwrite)

    def delete_unfinished(self, min_age: float = 0.0) -> None:
        """Delete what crashed calls of `write_checkpoint` left directly below this folder.

        Args:
            min_age: Keep what was written to in this number of seconds: another process may still
                be writing it.
        """
        self.store.delete_unfinished(self.key, min_age)

    def fetch_checkpoint(self) -> Path | None:
        """Return a local folder with this checkpoint's files; None if there is no checkpoint."""
        return self.store.fetch_checkpoint(self.key)
