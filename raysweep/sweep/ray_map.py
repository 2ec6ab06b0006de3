"""Map a function over items with tasks on a Ray cluster."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import ray

from raysweep.sweep.cluster import cluster_capacity

Item = TypeVar("Item")
Result = TypeVar("Result")


class RayMap:
    """A parallel map, one task for each item, for `evaluate(..., map=RayMap())`.

    Args:
        cpus: CPUs that a task holds; also sets its number of threads.
        gpus: GPUs that a task holds; a fraction lets several tasks share one.
        retries: How often a task is run again when it loses its worker.
    """

    def __init__(self, cpus: float = 1, gpus: float = 0, retries: int = 5) -> None:
        self._task_options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": retries}
        self._n_threads = max(1, int(cpus))

    @property
    def width(self) -> int:
        """Number of tasks that the cluster runs at the same time, at least 1."""
        amounts = {"CPU": self._task_options["num_cpus"], "GPU": self._task_options["num_gpus"]}
        cluster = cluster_capacity()
        ratios = [cluster.get(kind, 0) / amount for kind, amount in amounts.items() if amount]
        return max(1, int(min(ratios)))

    def __call__(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[Result]:
        """Apply the function to each item.

        Args:
            function: Function that can be pickled. If it has an attribute `model`, the model is
                moved to the GPU where a task holds one.
            items: Its arguments.

        Yields:
            The results, in the order in which tasks finish.
        """
        task = ray.remote(_run_item).options(**self._task_options)
        function_reference = ray.put(function)
        pending = [task.remote(function_reference, item, self._n_threads) for item in items]
        while pending:
            (finished,), pending = ray.wait(pending, num_returns=1)
            yield ray.get(finished)


def _run_item(function: Callable[[Item], Result], item: Item, n_threads: int) -> Result:
    """Apply the function to one item, in a task on a worker."""
    import torch

    torch.set_num_threads(n_threads)
    model = getattr(function, "model", None)
    if model is not None and ray.get_gpu_ids():
        model.to("cuda")
    return function(item)
