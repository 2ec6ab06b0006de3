"""Checks of a store before work starts."""

from uuid import uuid4

from raysweep.stores.bucket_store import BucketStore, RetrySettings
from raysweep.stores.errors import ConditionalWritesUnsupported
from raysweep.stores.store_path import StorePath

_QUICK_RETRY = RetrySettings(total_seconds=2.0, request_seconds=5.0, longest_pause=1.0)


def require_reachable(path: StorePath) -> None:
    """Check once that a bucket exists, answers within seconds and grants access.

    Args:
        path: Folder in a store; that of a file system is not checked.

    Raises:
        StoreAccessRefused: The bucket does not exist, or refuses access.
        StoreUnavailable: The bucket does not answer.
    """
    if isinstance(path.store, BucketStore):
        BucketStore(path.store.location, _QUICK_RETRY).list_subfolders(path.key)


def require_conditional_writes(path: StorePath) -> None:
    """Check that a bucket has conditional writes, which leases need.

    Args:
        path: Folder in a store, below which a file is written and deleted; that of a file system is
            not checked.

    Raises:
        ConditionalWritesUnsupported: The bucket ignores conditions.
        StoreAccessRefused: The bucket refuses access.
        StoreUnavailable: The bucket does not answer.
    """
    if not isinstance(path.store, BucketStore):
        return
    probe = path / f".raysweep-probe-{uuid4().hex}"
    store, key = path.store, probe.key
    first = store.create(key, b"1")
    try:
        second = store.create(key, b"2")
        if first is None or second is not None:
            problem = "overwrites a file that a request may only create"
        elif store.replace(key, b"3", "1") is not None:
            problem = "replaces a file whose version is not the one that the request names"
        else:
            return
    finally:
        store.delete(key)
    raise ConditionalWritesUnsupported(
        f"{path}: this bucket {problem}; raysweep needs a server with conditional writes"
    )
