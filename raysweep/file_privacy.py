"""Keep the files that raysweep writes to the user who runs it."""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from raysweep.errors import SpecError

UMASK_VARIABLE = "RAYSWEEP_UMASK"
"""Environment variable: umask of all processes of raysweep, as an octal number."""

_PRIVATE_UMASK = 0o077
_MAX_SECRET_BYTES = 65_536


def read_umask() -> int:
    """Return the umask for new files and folders.

    Returns:
        The value of `RAYSWEEP_UMASK`; 0o077 without it: files are 0600 and folders 0700.

    Raises:
        SpecError: If the variable is not an octal number between 0 and 777.
    """
    text = os.environ.get(UMASK_VARIABLE, "")
    if not text:
        return _PRIVATE_UMASK
    try:
        umask = int(text, 8)
    except ValueError:
        umask = -1
    if not 0 <= umask <= 0o777:
        raise SpecError(
            f"{UMASK_VARIABLE}={text!r}: expected an octal number such as 077 (only you), "
            "027 (your group may read) or 007 (your group may write)"
        )
    return umask


@contextmanager
def private_files() -> Iterator[None]:
    """Give the files and folders that this process makes in this block the modes of `read_umask`.

    Processes that it starts inherit the umask.

    Raises:
        SpecError: If `RAYSWEEP_UMASK` is malformed.
    """
    previous_umask = os.umask(read_umask())
    try:
        yield
    finally:
        os.umask(previous_umask)


def adopt_umask(umask: int) -> None:
    """Use the umask of the driver in this worker process, and in processes that it starts.

    Args:
        umask: What `read_umask` returned in the driver.
    """
    os.environ[UMASK_VARIABLE] = f"{umask:03o}"
    os.umask(umask)


class PrivateFile(NamedTuple):
    """Content of a file that only its owner can read from now on.

    Attributes:
        content: At most 64 KiB.
        exposed_mode: Mode with which other users could read or write the file before; 0 if none
            could.
    """

    content: bytes
    exposed_mode: int


def find_state_folder() -> Path:
    """Return the folder of what raysweep keeps for its user: `$XDG_STATE_HOME/raysweep`.

    Returns:
        The folder, which need not exist; by default `~/.local/state/raysweep`.

    Raises:
        RuntimeError: If this user has no home folder.
    """
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    # A relative path would lead into whatever folder a command runs in.
    if not state.is_absolute():
        state = Path.home() / ".local" / "state"
    return state / "raysweep"


def make_folder_private(folder: Path) -> None:
    """Create a folder of mode 0700, or give it this mode.

    Args:
        folder: The folder; missing parents are created.

    Raises:
        PermissionError: If the folder belongs to somebody else.
        OSError: If it cannot be created.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.geteuid():
        raise PermissionError(0, f"{folder} belongs to user {status.st_uid}")
    if status.st_mode & 0o077:
        folder.chmod(0o700)


def read_private_file(path: Path) -> PrivateFile | None:
    """Read a secret, and give its file mode 0600.

    Args:
        path: The file. No symbolic link is followed.

    Returns:
        The content, and the mode before if it was too open; None if there is no file.

    Raises:
        PermissionError: If it is not a regular file of this user.
        OSError: If it cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(handle, "rb") as stream:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise PermissionError(0, "it is not a file of your own")
        is_exposed = bool(status.st_mode & 0o077)
        if is_exposed:
            os.fchmod(handle, 0o600)
        exposed_mode = stat.S_IMODE(status.st_mode) if is_exposed else 0
        return PrivateFile(stream.read(_MAX_SECRET_BYTES), exposed_mode)


def write_new_private_file(path: Path, content: bytes) -> None:
    """Write a secret that is whole as soon as its file, of mode 0600, exists.

    Args:
        path: The file. If another process has just created it, its content is kept.
        content: The secret.

    Raises:
        OSError: If the file cannot be written.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        with suppress(FileExistsError):
            os.link(name, path)
    finally:
        Path(name).unlink()
