"""Errors of stores."""

from raysweep.spec import SpecError


class StoreAccessRefused(SpecError):
    """The store exists and refuses access, or the bucket does not exist."""


class StoreUnavailable(OSError):
    """The store did not answer any of several attempts, or the file system reported an error."""


class StoredFileNotFound(FileNotFoundError):
    """The store answered, and has no such file."""
