"""Choose where the shards of an evaluation run: a Ray cluster, processes, or this process."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from raysweep.lazy_modules import torch

if TYPE_CHECKING:
    from raysweep.evaluation import ShardMapper

logger = logging.getLogger(__name__)


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
            logger.info("shards run on the Ray cluster")
            yield RayMap(gpus=gpus_per_task if cluster.get("GPU") else 0)
        return
    # It imports numpy, which settings do not need.
    import joblib

    n_cores = joblib.cpu_count()
    if torch.cuda.is_available() or n_cores == 1:
        logger.info("shards run in this process, on its GPU or its only core")
        yield None
        return
    from raysweep.evaluation import ProcessPoolMap

    logger.info("shards run in %d processes of this machine", n_cores)
    with ProcessPoolMap(n_cores) as process_map:
        yield process_map
