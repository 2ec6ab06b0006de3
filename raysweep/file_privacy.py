"""Keep the files that raysweep writes to the user who runs it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from raysweep.errors import SpecError

UMASK_VARIABLE = "RAYSWEEP_UMASK"
"""Environment variable: umask of all processes of raysweep, as an octal number."""

_PRIVATE_UMASK = 0o077


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
