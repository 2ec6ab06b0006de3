"""Reports about failed training runs: bad settings, too little memory, or a bug in the code.

A report is a dict of strings: one line under `FAILURE_KEY`, for a bug its traceback under
`BUG_TRACEBACK_KEY`, and `INFRASTRUCTURE_KEY` if the same run may succeed later.
"""

from __future__ import annotations

import logging
import traceback

from raysweep.disk_space import is_disk_full_error
from raysweep.errors import (
    InfrastructureError,
    RaysweepError,
    describe_os_error,
    get_first_line,
    is_infrastructure_error,
)
from raysweep.lazy_modules import torch
from raysweep.redaction import redact_secrets
from raysweep.stored_data import check_stored_types
from raysweep.stores import StoredFileNotFound, StorePath
from raysweep.training.config import TrainingConfig

logger = logging.getLogger(__name__)

FAILURE_KEY = "failed"
"""Key of the reason, one line for users."""

BUG_TRACEBACK_KEY = "bug"
"""Key of the traceback; only reports of what looks like a bug have it."""

INFRASTRUCTURE_KEY = "infrastructure"
"""Key that only reports of a failure of the surroundings have, such as a full disk or memory."""

TRACEBACK_FILE = "error.txt"
"""File in the run's folder with the traceback of a bug."""

_REPORT_FILE = "failed.json"


def failure_report(
    error: Exception, config: TrainingConfig, run_path: StorePath, is_sweep_trial: bool = True
) -> dict[str, str]:
    """Describe why a training run failed. Write the traceback to a file if it looks like a bug.

    Args:
        error: Exception that the run raised.
        config: The run's config.
        run_path: The run's folder, in which `error.txt` is written for a bug.
        is_sweep_trial: Whether hints may name options of `raysweep tune`.

    Returns:
        The report.
    """
    logger.error("training failed: %s", error, exc_info=error, extra={"is_shown_elsewhere": True})
    if isinstance(error, InfrastructureError):
        return _describe_infrastructure_failure(str(error))
    if isinstance(error, RaysweepError):
        return {FAILURE_KEY: str(error)}
    if isinstance(error, OSError) and is_infrastructure_error(error):
        # On a full disk a traceback could not be written either.
        return _describe_infrastructure_failure(redact_secrets(describe_os_error(error)))
    if is_disk_full_error(error):
        return _describe_infrastructure_failure(redact_secrets(get_first_line(error)))
    hint = f"lower batch_size (now {config.batch_size})"
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        if is_sweep_trial:
            hint += " or raise --gpus-per-trial"
        device = torch.cuda.get_device_name()
        return _describe_infrastructure_failure(f"out of memory on {device}: {hint}")
    if _is_cpu_out_of_memory(error):
        if is_sweep_trial:
            hint += " or raise --cpus-per-trial, so that fewer run at once"
        return _describe_infrastructure_failure(f"out of memory: {hint}")
    report = describe_bug(error)
    (run_path / TRACEBACK_FILE).write_text(report[BUG_TRACEBACK_KEY])
    return report


def describe_bug(error: Exception) -> dict[str, str]:
    """Describe an error in the code; nothing is written.

    Args:
        error: The exception.

    Returns:
        The report, with the traceback.
    """
    return {
        FAILURE_KEY: redact_secrets(traceback.format_exception_only(error)[0].splitlines()[0]),
        BUG_TRACEBACK_KEY: redact_secrets("".join(traceback.format_exception(error))),
    }


def save_failure_report(run_path: StorePath, report: dict[str, str]) -> None:
    """Write a report into the run's folder, where other workers of the run read it.

    Args:
        run_path: The run's folder.
        report: What `failure_report` returned.
    """
    (run_path / _REPORT_FILE).write_json(report)


def load_failure_report(run_path: StorePath) -> dict[str, str]:
    """Read the report that `save_failure_report` wrote.

    Args:
        run_path: The run's folder.

    Returns:
        The report; an empty dict if there is none.
    """
    try:
        report = (run_path / _REPORT_FILE).read_json()
        check_stored_types({"report": report}, {"report": dict[str, str]}, str(run_path))
        return report
    except StoredFileNotFound:
        return {}


def clear_failure_report(run_path: StorePath) -> None:
    """Delete the run's report.

    Args:
        run_path: The run's folder.
    """
    (run_path / _REPORT_FILE).delete()


def _describe_infrastructure_failure(reason: str) -> dict[str, str]:
    """Return the report of a failure that is not due to the run's settings or code."""
    return {FAILURE_KEY: reason, INFRASTRUCTURE_KEY: "yes"}


def _is_cpu_out_of_memory(error: Exception) -> bool:
    """Return whether the machine's memory ran out; torch raises a plain RuntimeError for it."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
