"""Folders of data sets that this user has named, by the fingerprint of what was read there.

Checkpoints come from anybody, so the folder that one names is not used: its data are looked for
where the user has read data of the same fingerprint before.
"""

import logging
import re
from contextlib import suppress
from pathlib import Path

from raysweep.file_privacy import (
    find_state_folder,
    make_folder_private,
    read_private_file,
    write_new_private_file,
)

logger = logging.getLogger(__name__)

_FOLDER_NAME = "data_folders"
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
# Of this process, which may have no place for files.
_folders: dict[str, Path] = {}


def remember_data_folder(fingerprint: str, folder: Path) -> None:
    """Remember a folder for later commands of this user.

    Args:
        fingerprint: `DatasetSplits.fingerprint` of the data that were read there.
        folder: The folder.
    """
    folder = folder.resolve()
    if find_data_folder(fingerprint) == folder:
        return
    _folders[fingerprint] = folder
    try:
        file = find_state_folder() / _FOLDER_NAME / fingerprint
        make_folder_private(file.parent.parent)
        make_folder_private(file.parent)
        with suppress(FileNotFoundError):
            file.unlink()
        write_new_private_file(file, str(folder).encode())
    except (OSError, RuntimeError) as error:
        logger.info("later commands need --data-dir %s again: %s", folder, error)


def find_data_folder(fingerprint: object) -> Path | None:
    """Find the folder in which this user has read data.

    Args:
        fingerprint: Fingerprint of the data, as a checkpoint has it; it may be anything.

    Returns:
        The folder, which may be gone or changed meanwhile; None if the user has named none.
    """
    if not isinstance(fingerprint, str) or not _FINGERPRINT.fullmatch(fingerprint):
        return None
    if fingerprint in _folders:
        return _folders[fingerprint]
    try:
        saved = read_private_file(find_state_folder() / _FOLDER_NAME / fingerprint)
    except (OSError, RuntimeError) as error:
        logger.debug("folders of data sets of earlier commands are not known: %s", error)
        return None
    if saved is None or saved.exposed_mode & 0o022:
        return None
    folder = Path(saved.content.decode(errors="replace"))
    return folder if folder.is_absolute() and "\0" not in str(folder) else None
