"""Folders of this user: home, cache and temporary ones, also for a user without a writable home.

Containers run as users that have no entry in passwd and no home, or `/` as their home.
"""

import logging
import os
import stat
import tempfile
from pathlib import Path

from raysweep.errors import InfrastructureError, SpecError

logger = logging.getLogger(__name__)


def expand_home(path: str | Path) -> Path:
    """Replace `~` or `~USER` at the start of a path by a home folder.

    Args:
        path: Path that a user wrote.

    Raises:
        SpecError: There is no such user, this user has no home folder, or it cannot be a path.
    """
    if "\0" in str(path):
        raise SpecError(f"{str(path)!r}: a path cannot have the character \\0")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0].removeprefix("~")
        reason = f"there is no user {user!r}" if user else "you have no home folder; set HOME"
        raise SpecError(f"{path}: {reason}") from error


def find_home() -> Path | None:
    """Return the home folder of this user; None if it has none."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def can_create(path: Path) -> bool:
    """Return whether this process can create a file or folder, with the folders around it.

    Args:
        path: Absolute path.
    """
    folder = path.parent
    # A folder in one that this user may not search counts as missing; `Path.exists` raises there.
    while not os.access(folder, os.F_OK) and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def find_cache_folder(name: str) -> Path:
    """Return the folder of this user's cache for a purpose; it may not exist yet.

    Args:
        name: Name of the folder.

    Returns:
        It in `XDG_CACHE_HOME` or `~/.cache`; in a private temporary folder if this user has no home
        folder, or one that cannot be written.

    Raises:
        InfrastructureError: There is no folder for temporary files, either.
    """
    if cache_home := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache_home) / name
    home = find_home()
    if home is not None:
        folder = home / ".cache" / name
        if os.access(folder, os.W_OK | os.X_OK) or can_create(folder):
            return folder
    return create_private_folder() / name


def provide_library_folders() -> None:
    """Give libraries a home or a folder of settings where this user's home is none.

    Ray and others cannot be imported without a home: `HOME` is then a private temporary folder.
    matplotlib warns on each start if it cannot write its settings: `MPLCONFIGDIR` then is one.

    Raises:
        InfrastructureError: There is no folder for temporary files.
    """
    home = find_home()
    if home is None:
        os.environ["HOME"] = str(create_private_folder())
    elif not can_create(home / ".config" / "matplotlib") and "MPLCONFIGDIR" not in os.environ:
        os.environ["MPLCONFIGDIR"] = str(create_private_folder() / "matplotlib")


def find_temporary_folder() -> Path:
    """Return the folder for temporary files.

    Raises:
        InfrastructureError: No folder of this machine can be written.
    """
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        raise InfrastructureError(
            "no folder for temporary files can be written; set TMPDIR to one"
        ) from error


def private_folder_name() -> str:
    """Return the name of the temporary folder that only this user can enter."""
    return f"raysweep-{os.geteuid()}"


def create_private_folder(parent: Path | None = None) -> Path:
    """Create the temporary folder that only this user can enter, or return it if it exists.

    Args:
        parent: Folder that holds it; None for the one for temporary files.

    Returns:
        `raysweep-UID` of mode 0700. A new folder in /tmp takes its place if that one is somebody
        else's.

    Raises:
        InfrastructureError: No folder can be created.
    """
    name = private_folder_name()
    folder = (parent or find_temporary_folder()) / name
    try:
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                logger.warning("%s is not yours: a new folder takes its place", folder)
                folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir="/tmp"))
        folder.chmod(0o700)
    except OSError as error:
        raise InfrastructureError(
            f"{folder}: cannot be created for private temporary files: {error.strerror or error}; "
            "set TMPDIR to a folder that you can write"
        ) from error
    return folder
