"""Stores: where sweeps and checkpoints are kept, a folder or a bucket, behind one protocol."""

from raysweep.stores.bucket_store import BucketStore
from raysweep.stores.errors import StoreAccessRefused, StoredFileNotFound, StoreUnavailable
from raysweep.stores.folder_store import FolderStore
from raysweep.stores.opening import open_store
from raysweep.stores.protocol import META_FILE, Store, StoredFile, VersionedContent

__all__ = [
    "META_FILE",
    "BucketStore",
    "FolderStore",
    "Store",
    "StoreAccessRefused",
    "StoreUnavailable",
    "StoredFile",
    "StoredFileNotFound",
    "VersionedContent",
    "open_store",
]
