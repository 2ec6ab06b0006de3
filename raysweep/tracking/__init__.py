"""MLflow: the only package that imports it."""

from raysweep.tracking.null import open_tracker
from raysweep.tracking.store import Tracker, embedded_store, masked, store_version
from raysweep.tracking.sweeps import SweepTracker, run_tags, train_tags

__all__ = [
    "SweepTracker",
    "Tracker",
    "embedded_store",
    "masked",
    "open_tracker",
    "run_tags",
    "store_version",
    "train_tags",
]
