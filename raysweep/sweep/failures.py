"""Why a trial failed, told apart: its settings, the memory of the machine, or the code."""

import json
import traceback
from pathlib import Path

import torch

from raysweep import storage
from raysweep.files import write_whole
from raysweep.spec import SpecError
from raysweep.training.config import RunConfig
from raysweep.training.trainer import TrainingFailed

# What a trial reports to Tune when it has failed: why, and for what looks like a bug its traceback.
FAILED, BUG = "failed", "bug"
# In a failed trial's folder: the traceback of what looks like a bug; and the report, for other workers.
ERROR, _FILE = "error.txt", "failed.json"


def explain(error: Exception, config: RunConfig, path: Path, trial: bool = True) -> dict[str, str]:
    """What a trial that met `error` reports: one line, and of a bug its traceback, which `path`/error.txt keeps.

    trial: of a sweep, whose command says what it holds.
    """
    smaller = f"lower batch_size (now {config.batch_size})"
    if isinstance(error, TrainingFailed | SpecError):
        return {FAILED: str(error)}
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        hint = f"{smaller} or raise --gpus-per-trial" if trial else smaller
        return {FAILED: f"out of memory on {torch.cuda.get_device_name()}: {hint}"}
    # torch has no class of its own for this.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        hint = f"{smaller} or raise --cpus-per-trial, so that fewer run at once" if trial else smaller
        return {FAILED: f"out of memory: {hint}"}
    account = "".join(traceback.format_exception(error))
    write_whole(path / ERROR, account)
    storage.push(path / ERROR)
    return {FAILED: traceback.format_exception_only(error)[0].splitlines()[0], BUG: account}


def keep(path: Path, report: dict[str, str]) -> None:
    """Leave a report for the workers that are started after this one's end."""
    write_whole(path / _FILE, json.dumps(report))
    storage.push(path / _FILE)


def kept(path: Path) -> dict[str, str]:
    """What `keep` left; empty if nothing."""
    return dict(json.loads((path / _FILE).read_text())) if storage.pull_file(path / _FILE) else {}


def forget(path: Path) -> None:
    storage.drop_file(path / _FILE)
    (path / _FILE).unlink(missing_ok=True)


def lost(account: str) -> str:
    """What became of a trial's process, in a few words, by Ray's account of it."""
    if "running low on memory" in account:
        return "its process was killed because the node ran out of memory"
    if "preempted" in account:
        return "its node was preempted"
    return "its process or its node died"
