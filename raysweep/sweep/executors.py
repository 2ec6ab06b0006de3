"""Choose where the shards of an evaluation run: a Ray cluster, processes, or this process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from raysweep.evaluation import (
    ProcessPoolMap,
)
from raysweep.evaluation.evaluator import ShardMapper


@contextmanager
def open_executor(address: str | None, gpus_per_task: float = 1.0) -> Iterator[ShardMapper | None]:
    """Ray's workers if a cluster was named, else this machine's cores, else (on a GPU) this
    process.
    """
    if address or os.environ.get("RAY_ADDRESS"):
        from raysweep.sweep.cluster import connect_to_cluster
        from raysweep.sweep.ray_map import RayMap

        with connect_to_cluster(address) as cluster:
            yield RayMap(gpus=gpus_per_task if cluster.get("GPU") else 0)
        return
    cores = len(os.sched_getaffinity(0))
    if torch.cuda.is_available() or cores == 1:
        yield None
        return
    with ProcessPoolMap(cores) as processes:
        yield processes
