"""Facts about this process for the log: versions of packages, the machine, when it started."""

import importlib.metadata
import os
import platform
import re
import socket
import sys
from functools import cache
from pathlib import Path

from raysweep.logs.entries import JsonEntry, format_time

_PACKAGES = ("raysweep", "torch", "torchvision", "ray", "mlflow", "optuna", "numpy", "obstore")


def describe_process() -> JsonEntry:
    """Describe the versions of packages and the machine of this process.

    Returns:
        `versions`, `machine` and `process_started_at`. PyTorch is not imported for this, so `cuda`
        (the version for which it was built) is missing where nothing else has imported it.
    """
    versions: JsonEntry = {"python": platform.python_version(), **_package_versions()}
    torch = sys.modules.get("torch")
    if torch is not None:
        versions["cuda"] = torch.version.cuda
    return {
        "versions": versions,
        "machine": _describe_machine(),
        "process_started_at": _describe_process_start(os.getpid()),
    }


def summarize_process() -> str:
    """Summarize `describe_process` in one line."""
    facts = describe_process()
    machine = facts["machine"]
    versions = ", ".join(
        f"{name} {version}"
        for name, version in facts["versions"].items()
        # The version for which PyTorch was built says nothing about a machine without a GPU.
        if name != "cuda" or machine["gpus"]
    )
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    return (
        f"{versions}; {machine['host']}: {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB memory, {gpus}"
    )


@cache
def _describe_process_start(pid: int) -> str:
    """Return when a process started, by the clock of this machine."""
    import psutil

    return format_time(psutil.Process(pid).create_time())


@cache
def _package_versions() -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@cache
def _describe_machine() -> JsonEntry:
    """Describe the machine without starting anything on its GPUs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": _list_gpus(),
        "gpu_driver": _read_gpu_driver(),
    }


def _list_gpus() -> list[str]:
    """Return the names of this machine's NVIDIA GPUs."""
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        match = re.search(r"Model:\s*(.+)", file.read_text(encoding="utf-8", errors="replace"))
        names.append(match[1].strip() if match else "NVIDIA GPU")
    return names


def _read_gpu_driver() -> str:
    """Return the version line of NVIDIA's driver; empty without one."""
    file = Path("/proc/driver/nvidia/version")
    if not file.is_file():
        return ""
    return file.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
