"""Worker groups: the processes that share one global batch."""

from __future__ import annotations

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


class SingleWorkerGroup:
    """A group of one process: its local batch is the global batch."""

    size = 1
    rank = 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the tensor itself."""
        return tensor


SINGLE_WORKER = SingleWorkerGroup()
