"""Errors of stores."""

from raysweep.errors import InfrastructureError


class StoreAccessRefused(InfrastructureError):
    """The store refuses access, or the bucket does not exist."""


class StoreUnavailable(InfrastructureError, OSError):
    """The store did not answer any of several attempts, or its file system reported an error."""


class StoreNotConditional(InfrastructureError):
    """The bucket ignores the conditions of requests, so that it cannot hold leases."""


class StoredFileNotFound(InfrastructureError, FileNotFoundError):
    """The store answered, and has no such file."""
