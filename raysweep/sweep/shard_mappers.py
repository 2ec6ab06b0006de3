"""Choose where the shards of an evaluation run: a Ray cluster, processes, or this process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import joblib
import torch

from raysweep.evaluation import ProcessPoolMap, ShardMapper


@contextmanager
def open_executor(address: str | None, gpus_per_task: float = 1.0) -> Iterator[ShardMapper | None]:
    """Open an executor for the shards of an evaluation in this block.

    Args:
        address: Ray cluster, `auto` or `host:port`; None for `RAY_ADDRESS` if that is set.
        gpus_per_task: GPUs that a task holds on a Ray cluster that has any; a fraction lets several
            tasks share one.

    Yields:
        A mapper over the workers of the Ray cluster, if there is one; None (run in this process) on
        a machine with a GPU, or if this process may use a single core; otherwise a mapper over one
        process for each core that it may use.

    Raises:
        SpecError: If no cluster answers at the address.
    """
    if address or os.environ.get("RAY_ADDRESS"):
        from raysweep.sweep.cluster import connect_to_cluster
        from raysweep.sweep.ray_map import RayMap

        with connect_to_cluster(address) as cluster:
            yield RayMap(gpus=gpus_per_task if cluster.get("GPU") else 0)
        return
    n_cores = joblib.cpu_count()
    if torch.cuda.is_available() or n_cores == 1:
        yield None
        return
    with ProcessPoolMap(n_cores) as process_map:
        yield process_map
