"""raysweep: distributed sweeps for instance-reweighted adversarial training, proven with AutoAttack."""

import os
from typing import Any

__version__ = "0.1.0"

# Ray and MLflow report usage unless told not to, before they are imported. A user's own setting wins.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def __getattr__(name: str) -> Any:
    """`raysweep.evaluate`, without importing torch before it is used."""
    if name == "evaluate":
        from raysweep.evaluation import evaluate

        return evaluate
    raise AttributeError(f"module 'raysweep' has no attribute {name!r}")
