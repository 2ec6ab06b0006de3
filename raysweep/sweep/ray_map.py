"""Map a function over items with tasks on a Ray cluster."""

import functools
import logging
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

import ray
from ray import cloudpickle

from raysweep.code_files import is_code_module
from raysweep.errors import InfrastructureError, SpecError
from raysweep.sweep.cluster import cluster_capacity

logger = logging.getLogger(__name__)

_PYTHON_FOLDERS = [sysconfig.get_path(key) for key in ("stdlib", "platstdlib")]

# One reference, in a list.
_FunctionReferences: TypeAlias = "list[ray.ObjectRef[Callable[[Any], Any]]]"

Item = TypeVar("Item")
Result = TypeVar("Result")


class RayMap:
    """A parallel map, one task for each item, for `evaluate(..., map=RayMap())`.

    A worker reads the function once. On GPUs the workers are actors, which end with the map: Ray
    gives a process that runs tasks another GPU in the next map, but CUDA stays on the first one.

    Args:
        cpus: CPUs that a task holds; also sets its number of threads.
        gpus: GPUs that a task holds; a fraction lets several tasks share one.
        retries: How often a task is run again when it loses its worker.
    """

    def __init__(self, cpus: float = 1, gpus: float = 0, retries: int = 5) -> None:
        self._resources = {"num_cpus": cpus, "num_gpus": gpus}
        self._retries = retries
        self._n_threads = max(1, int(cpus))

    @property
    def width(self) -> int:
        """Number of tasks that the cluster runs at the same time, at least 1."""
        amounts = {"CPU": self._resources["num_cpus"], "GPU": self._resources["num_gpus"]}
        cluster = cluster_capacity()
        ratios = [cluster.get(kind, 0) / amount for kind, amount in amounts.items() if amount]
        return max(1, int(min(ratios)))

    def __call__(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[Result]:
        """Apply the function to each item.

        Args:
            function: Function that can be pickled. If it has an attribute `model`, the model is
                moved to the GPU where a task holds one. Code outside of installed packages travels
                with it, so that the nodes need no copy of the user's files.
            items: Its arguments.

        Yields:
            The results, in the order in which tasks finish.

        Raises:
            SpecError: If the function cannot be pickled, for example because its model holds a
                lock.
            InfrastructureError: If it needs a package that the nodes do not have.
        """
        # Within a list a reference stays one, so that a worker reads the function only once.
        references = [_put_with_code(function)]
        iter_finished = self._run_in_actors if self._resources["num_gpus"] else self._run_in_tasks
        for finished in iter_finished(references, items):
            try:
                yield ray.get(finished)
            except ray.exceptions.RayError as error:
                missing = re.search(r"No module named '([\w.]+)'", str(error))
                if missing is None:
                    raise
                raise InfrastructureError(
                    f"the nodes of the cluster have no module {missing[1]!r}, which the model needs"
                ) from error

    def _run_in_tasks(
        self, references: "_FunctionReferences", items: Sequence[Item]
    ) -> Iterator["ray.ObjectRef[Any]"]:
        """Yield the references of the results, in the order in which tasks finish."""
        task = ray.remote(_run_item).options(**self._resources, max_retries=self._retries)
        pending = [task.remote(references, item, self._n_threads) for item in items]
        while pending:
            (finished,), pending = ray.wait(pending, num_returns=1)
            yield finished

    def _run_in_actors(
        self, references: "_FunctionReferences", items: Sequence[Item]
    ) -> Iterator["ray.ObjectRef[Any]"]:
        """Yield the references of the results, in the order in which the actors' calls finish."""
        actor_class = ray.remote(_ItemRunner).options(
            **self._resources, max_restarts=self._retries, max_task_retries=self._retries
        )
        actors = [actor_class.remote() for _ in range(min(self.width, len(items)))]
        # An actor gets an item when it has started: the cluster may have no room for some yet.
        starting = {actor.__ray_ready__.remote(): actor for actor in actors}
        working: dict[ray.ObjectRef[Any], Any] = {}
        waiting = list(reversed(items))
        try:
            while waiting or working:
                (finished,), _ = ray.wait([*starting, *working], num_returns=1)
                actor = starting.pop(finished, None) or working[finished]
                if waiting:
                    reference = actor.run.remote(references, waiting.pop(), self._n_threads)
                    working[reference] = actor
                if working.pop(finished, None) is not None:
                    yield finished
        finally:
            for actor in actors:
                ray.kill(actor)


class _ItemRunner:
    """Actor that applies functions to items, on the same GPU as long as it lives."""

    def run(self, references: "_FunctionReferences", item: Any, n_threads: int) -> Any:
        """Apply the function to one item."""
        return _run_item(references, item, n_threads)


def _put_with_code(function: Callable[[Item], Result]) -> "ray.ObjectRef[Callable[[Item], Result]]":
    """Put a function into Ray's object store, with the code of the user's own modules."""
    modules = [module for module in list(sys.modules.values()) if _is_users_own(module)]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        return ray.put(function)
    except Exception as error:
        # Objects define how they are pickled, so any error may come.
        logger.debug("the code of the user's modules cannot be sent: %s", error)
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)
    try:
        return ray.put(function)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise SpecError(
            f"the model cannot be sent to the cluster ({type(error).__name__}: {reason}): keep "
            "locks, open files and the like out of it, or leave --address out"
        ) from error


def _is_users_own(module: ModuleType) -> bool:
    """Return whether a module is neither raysweep's, Python's, nor of an installed package."""
    if is_code_module(module):
        return True
    name, file = getattr(module, "__name__", ""), getattr(module, "__file__", None)
    if not isinstance(file, str) or "site-packages" in file or "dist-packages" in file:
        return False
    if name.partition(".")[0] in ("__main__", "__mp_main__", "raysweep"):
        return False
    is_pythons = file.startswith(tuple(_PYTHON_FOLDERS))
    # The path comes last: building it takes longest, and thousands of modules are checked.
    return not is_pythons and sys.modules.get(name) is module and Path(file).is_absolute()


def _run_item(references: "_FunctionReferences", item: Any, n_threads: int) -> Any:
    """Apply the function to one item, on a worker."""
    import torch

    torch.set_num_threads(n_threads)
    (function_reference,) = references
    function = _get_function(function_reference)
    model = getattr(function, "model", None)
    if model is not None and ray.get_gpu_ids():
        model.to("cuda")
    return function(item)


@functools.lru_cache(maxsize=1)
def _get_function(function_reference: "ray.ObjectRef[Any]") -> Any:
    """Return the function of a map; a worker keeps that of the last one, with its model."""
    return ray.get(function_reference)
