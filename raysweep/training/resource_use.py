"""Memory and GPU use of a training process, under MLflow's names of system metrics."""

import importlib.util

import psutil

from raysweep.lazy_modules import torch

SYSTEM_PREFIX = "system/"
"""Prefix of these metrics; MLflow shows them apart from the others."""
_MEGABYTE = 1e6


def measure_resource_use() -> dict[str, float]:
    """Measure this process, once for each epoch.

    Returns:
        Its memory, and on a GPU the largest memory of its tensors since the last call, and the
        memory of the GPU that all processes together hold. If the package `nvidia-ml-py` is
        installed, also the share of the last second in which the GPU worked. Megabytes and
        percentages by name.
    """
    use = {"process_memory_megabytes": psutil.Process().memory_info().rss / _MEGABYTE}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        use["gpu_memory_peak_megabytes"] = torch.cuda.max_memory_allocated() / _MEGABYTE
        use["gpu_memory_usage_megabytes"] = (total - free) / _MEGABYTE
        use["gpu_memory_usage_percentage"] = 100 * (total - free) / total
        torch.cuda.reset_peak_memory_stats()
        if importlib.util.find_spec("pynvml") is not None:
            use["gpu_utilization_percentage"] = float(torch.cuda.utilization())
    return {f"{SYSTEM_PREFIX}{name}": value for name, value in use.items()}
