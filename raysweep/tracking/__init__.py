"""Track runs and sweeps in MLflow. No other package of raysweep imports mlflow."""

from raysweep.tracking.mlflow_tracker import (
    Tracker,
    get_mlflow_version,
    tracking_uri,
)
from raysweep.tracking.null_tracker import NullTracker
from raysweep.tracking.run_recorder import RunRecorder
from raysweep.tracking.sweep_tracker import SweepTracker, checkpoint_run_tags, training_run_tags

__all__ = [
    "NullTracker",
    "RunRecorder",
    "SweepTracker",
    "Tracker",
    "checkpoint_run_tags",
    "get_mlflow_version",
    "tracking_uri",
    "training_run_tags",
]
