"""Environment variables that raysweep sets for Ray while it uses a cluster."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

PREEMPTION_POLL_VARIABLE = "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"
"""Environment variable: interval in seconds at which Ray Train polls for preempted nodes."""

RAY_ENVIRONMENT = {
    # Otherwise Ray sends usage statistics to its makers.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Sweeps resume from the ledger: snapshots and result files of Tune would only take time.
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # The objective may be measured every few epochs only, and a failed trial reports none.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    # raysweep reports a lost process in one line. Ray would print tracebacks on stdout.
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # Ray Train: notice a report or a preemption soon, and start no actors that are not used.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    PREEMPTION_POLL_VARIABLE: "2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
"""The variables and their values. Ray reads all of them when it uses them, none at its import."""


@contextmanager
def ray_environment() -> Iterator[None]:
    """Set `RAY_ENVIRONMENT` in this block, for this process and those that it starts.

    Variables that the user has set keep their values. Afterwards the environment is as before.
    """
    values = {name: value for name, value in RAY_ENVIRONMENT.items() if name not in os.environ}
    with set_environment(values):
        yield


@contextmanager
def set_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables in this block, for this process and those that it starts.

    Args:
        values: {name: value}. Afterwards the variables have their former values.
    """
    former_values = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, former_value in former_values.items():
            if former_value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = former_value
