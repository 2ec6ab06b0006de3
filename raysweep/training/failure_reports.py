"""Why a trial failed, told apart: its settings, the memory of the machine, or the code."""

import json
import traceback
from pathlib import Path

import torch

from raysweep import storage
from raysweep.atomic_files import atomic_write_text
from raysweep.spec import SpecError
from raysweep.training.config import TrainingConfig
from raysweep.training.trainer import TrainingFailed

# What a trial reports to Tune when it has failed: why, and for what looks like a bug its traceback.
FAILURE_KEY, BUG_TRACEBACK_KEY = "failed", "bug"
# In a failed trial's folder: the traceback of what looks like a bug; and the report, for other
# workers.
TRACEBACK_FILE, _REPORT_FILE = "error.txt", "failed.json"


def failure_report(
    error: Exception, config: TrainingConfig, run_path: Path, is_sweep_trial: bool = True
) -> dict[str, str]:
    """What a trial that met `error` reports: one line, and of a bug its traceback, which
    `path`/error.txt keeps.

    trial: of a sweep, whose command says what it holds.
    """
    smaller = f"lower batch_size (now {config.batch_size})"
    if isinstance(error, TrainingFailed | SpecError):
        return {FAILURE_KEY: str(error)}
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        hint = f"{smaller} or raise --gpus-per-trial" if is_sweep_trial else smaller
        return {FAILURE_KEY: f"out of memory on {torch.cuda.get_device_name()}: {hint}"}
    # torch has no class of its own for this.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        hint = (
            f"{smaller} or raise --cpus-per-trial, so that fewer run at once"
            if is_sweep_trial
            else smaller
        )
        return {FAILURE_KEY: f"out of memory: {hint}"}
    account = "".join(traceback.format_exception(error))
    atomic_write_text(run_path / TRACEBACK_FILE, account)
    storage.push_to_bucket(run_path / TRACEBACK_FILE)
    return {
        FAILURE_KEY: traceback.format_exception_only(error)[0].splitlines()[0],
        BUG_TRACEBACK_KEY: account,
    }


def save_failure_report(run_path: Path, report: dict[str, str]) -> None:
    """Leave a report for the workers that are started after this one's end."""
    atomic_write_text(run_path / _REPORT_FILE, json.dumps(report))
    storage.push_to_bucket(run_path / _REPORT_FILE)


def load_failure_report(run_path: Path) -> dict[str, str]:
    """What `keep` left; empty if nothing."""
    return (
        dict(json.loads((run_path / _REPORT_FILE).read_text()))
        if storage.pull_file(run_path / _REPORT_FILE)
        else {}
    )


def clear_failure_report(run_path: Path) -> None:
    storage.delete_remote_file(run_path / _REPORT_FILE)
    (run_path / _REPORT_FILE).unlink(missing_ok=True)


def describe_process_loss(ray_error: str) -> str:
    """What became of a trial's process, in a few words, by Ray's account of it."""
    if "running low on memory" in ray_error:
        return "its process was killed because the node ran out of memory"
    if "preempted" in ray_error:
        return "its node was preempted"
    return "its process or its node died"
