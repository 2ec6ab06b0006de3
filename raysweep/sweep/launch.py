"""Work items over the workers of a Ray cluster."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import ray

from raysweep.sweep.cluster import capacity

Item = TypeVar("Item")
Result = TypeVar("Result")


class RayMap:
    """`evaluate(..., map=RayMap())`: a task for each item, results as they come; a lost worker's task is done again.

    cpus, gpus: what a task holds; a fraction of a GPU lets several share one.
    """

    def __init__(self, cpus: float = 1, gpus: float = 0, retries: int = 5) -> None:
        self._options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": retries}
        self._threads = max(1, int(cpus))

    @property
    def width(self) -> int:
        """Tasks that the cluster runs at once."""
        held = {"CPU": self._options["num_cpus"], "GPU": self._options["num_gpus"]}
        cluster = capacity()
        return max(1, int(min(cluster.get(kind, 0) / amount for kind, amount in held.items() if amount)))

    def __call__(self, run: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        task = ray.remote(_call).options(**self._options)
        shared = ray.put(run)
        waiting = [task.remote(shared, item, self._threads) for item in items]
        while waiting:
            (done,), waiting = ray.wait(waiting, num_returns=1)
            yield ray.get(done)


def _call(run: Callable[[Item], Result], item: Item, threads: int) -> Result:
    import torch

    torch.set_num_threads(threads)
    model = getattr(run, "model", None)
    if model is not None and ray.get_gpu_ids():
        model.to("cuda")
    return run(item)
