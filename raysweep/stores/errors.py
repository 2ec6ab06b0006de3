"""Errors of stores, which are the same for a folder and a bucket."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from raysweep.errors import InfrastructureError, RaysweepError

# Errors of the system that a repetition does not mend.
_REFUSALS = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EROFS),
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    }
)


class StoreAccessRefused(InfrastructureError, OSError):
    """The store refuses a request, and would refuse it again.

    The bucket does not exist, rights are missing, or a disk is full or read-only.
    """


class StoreUnavailable(InfrastructureError, OSError):
    """The store did not answer any of several attempts, or does not accept a request."""


class ConditionalWritesUnsupported(InfrastructureError):
    """The bucket ignores the conditions of writes, so that leases cannot work in it."""


class StoredFileNotFound(InfrastructureError, FileNotFoundError):
    """The store answered, and has no such file."""


@contextmanager
def translate_os_errors(location: str) -> Iterator[None]:
    """Context manager that raises errors of stores in place of the file system's.

    Args:
        location: What is read or written, for the message.

    Yields:
        Nothing.

    Raises:
        StoreAccessRefused: The disk is full or read-only, or rights are missing. One line.
        StoreUnavailable: Another error of the system. One line.
    """
    try:
        yield
    except RaysweepError:
        raise
    except OSError as error:
        error_type = StoreAccessRefused if error.errno in _REFUSALS else StoreUnavailable
        reason = error.strerror or str(error) or type(error).__name__
        raise error_type(f"{location}: {reason}") from error
