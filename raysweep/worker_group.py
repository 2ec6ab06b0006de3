"""Worker groups: the processes that share one global batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class WorkerGroup(Protocol):
    """The processes that share one global batch; each trains on its local part of it."""

    @property
    def size(self) -> int:
        """Number of processes, at least 1."""
        ...

    @property
    def rank(self) -> int:
        """Number of this process, in 0..size - 1."""
        ...

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all workers.

        A collective operation: it waits until every worker has called it.

        Args:
            tensor: Tensor that needs no gradient, of the same shape and dtype on each worker. It is
                not changed.

        Returns:
            The sum, the same on each worker.

        Raises:
            RuntimeError: Another worker died (`training.distributed.WorkerLost`).
        """
        ...

    def start_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Start to sum a tensor over all workers, while the caller computes something else.

        All workers must start these sums in the same order; other collective operations may come
        between.

        Args:
            tensor: As for `all_reduce_sum`, but the sum replaces its content.

        Returns:
            A function that waits for the sum and returns it. It raises RuntimeError if another
            worker died.
        """
        ...


class SingleWorkerGroup:
    """A group of one process: its local batch is the global batch."""

    size = 1
    rank = 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the tensor itself."""
        return tensor

    def start_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Return a function that returns the tensor itself."""
        return lambda: tensor


SINGLE_WORKER = SingleWorkerGroup()
