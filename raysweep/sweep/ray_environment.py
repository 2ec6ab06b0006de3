"""Environment variables that raysweep sets for Ray."""

import os

_RAY_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Sweeps resume from the ledger: snapshots and result files of Tune would only take time.
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # The objective may be measured every few epochs only, and a failed trial reports none.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    # raysweep reports a lost process in one line. Ray would print tracebacks and logs, some of them
    # on stdout.
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": (
        "worker died or was killed|Raylet is terminated|node with node id|memory pressure"
    ),
    # Ray Train: notice a report soon after it is made, and start no actors that are not used.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}


def set_ray_environment() -> None:
    """Set the variables that Ray reads, some of them when it is imported.

    Every module that imports ray calls this function first. Variables that the user has set keep
    their values.
    """
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
