"""Notes in folders of which MLflow may lack records: work that runs, was killed, or had an outage.

The note is written before the first record and deleted after the last, so that no end of a process
can prevent it. `raysweep sync` looks for it.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from raysweep.spec import JsonDict
from raysweep.stores import Location, StoredFileNotFound, open_path

UNRECORDED_FILE = "unrecorded.json"
"""Name of the note in the folder of a sweep, training run, evaluation or pipeline."""


def note_unrecorded(folder: Location, content: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Note that MLflow may lack records of a folder.

    Args:
        folder: Folder of a sweep, training run, evaluation or pipeline.
        content: What `raysweep sync` needs besides the files of the folder.
    """
    (open_path(folder) / UNRECORDED_FILE).write_json(dict(content))


def read_unrecorded(
    folder: Location, types: Mapping[str, Any] = MappingProxyType({})
) -> JsonDict | None:
    """Read the note of a folder; None if there is none.

    Args:
        folder: The folder.
        types: Type of each key that the note must have.

    Raises:
        DamagedFileError: The note is damaged; one line.
    """
    try:
        return (open_path(folder) / UNRECORDED_FILE).read_json(types)
    except StoredFileNotFound:
        return None


def clear_unrecorded(folder: Location) -> None:
    """Delete the note of a folder, because MLflow has all its records."""
    # Opened anew by its name: the lease of the given path may have ended with the work.
    (open_path(str(folder)) / UNRECORDED_FILE).delete()
