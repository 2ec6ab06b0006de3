"""Work items over the workers of a Ray cluster."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import ray

from raysweep.sweep.cluster import cluster_capacity

Item = TypeVar("Item")
Result = TypeVar("Result")


class RayMap:
    """`evaluate(..., map=RayMap())`: a task for each item, results as they come; a lost worker's
    task is done again.

    cpus, gpus: what a task holds; a fraction of a GPU lets several share one.
    """

    def __init__(self, cpus: float = 1, gpus: float = 0, retries: int = 5) -> None:
        self._task_options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": retries}
        self._n_threads = max(1, int(cpus))

    @property
    def width(self) -> int:
        """Tasks that the cluster runs at once."""
        held = {"CPU": self._task_options["num_cpus"], "GPU": self._task_options["num_gpus"]}
        cluster = cluster_capacity()
        return max(
            1, int(min(cluster.get(kind, 0) / amount for kind, amount in held.items() if amount))
        )

    def __call__(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[Result]:
        task = ray.remote(_run_item).options(**self._task_options)
        shared = ray.put(function)
        waiting = [task.remote(shared, item, self._n_threads) for item in items]
        while waiting:
            (done,), waiting = ray.wait(waiting, num_returns=1)
            yield ray.get(done)


def _run_item(function: Callable[[Item], Result], item: Item, n_threads: int) -> Result:
    import torch

    torch.set_num_threads(n_threads)
    model = getattr(function, "model", None)
    if model is not None and ray.get_gpu_ids():
        model.to("cuda")
    return function(item)
