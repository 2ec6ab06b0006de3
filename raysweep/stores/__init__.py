"""Stores: where sweeps and checkpoints are kept, a folder or a bucket, behind one protocol."""

from raysweep.stores.bucket_store import BucketStore
from raysweep.stores.errors import (
    ConditionalWritesUnsupported,
    StoreAccessRefused,
    StoredFileNotFound,
    StoreUnavailable,
)
from raysweep.stores.folder_store import FolderStore
from raysweep.stores.opening import Location, is_uri, open_path, open_store
from raysweep.stores.probe import require_conditional_writes, require_reachable
from raysweep.stores.protocol import (
    META_FILE,
    Store,
    StoredCheckpoint,
    StoredFile,
    VersionedContent,
)
from raysweep.stores.store_path import StorePath

__all__ = [
    "META_FILE",
    "BucketStore",
    "ConditionalWritesUnsupported",
    "FolderStore",
    "Location",
    "Store",
    "StoreAccessRefused",
    "StorePath",
    "StoreUnavailable",
    "StoredCheckpoint",
    "StoredFile",
    "StoredFileNotFound",
    "VersionedContent",
    "is_uri",
    "open_path",
    "open_store",
    "require_conditional_writes",
    "require_reachable",
]
