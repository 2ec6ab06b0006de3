"""Errors of stores."""

from raysweep.errors import InfrastructureError


class StoreAccessRefused(InfrastructureError):
    """The store refuses access, or the bucket does not exist."""


class StoreUnavailable(InfrastructureError, OSError):
    """The bucket did not answer any of several attempts, or does not accept a request."""


class ConditionalWritesUnsupported(InfrastructureError):
    """The bucket ignores the conditions of writes, so that leases cannot work in it."""


class StoredFileNotFound(InfrastructureError, FileNotFoundError):
    """The store answered, and has no such file."""
