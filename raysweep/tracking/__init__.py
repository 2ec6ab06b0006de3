"""MLflow: the only package that imports it."""

from raysweep.tracking.null import NullTracker
from raysweep.tracking.store import Tracker, embedded_store, masked, store_version
from raysweep.tracking.sweeps import SweepTracker, run_tags, train_tags

__all__ = [
    "NullTracker",
    "SweepTracker",
    "Tracker",
    "embedded_store",
    "masked",
    "run_tags",
    "store_version",
    "train_tags",
]
