"""Worker groups: the processes that share one global batch."""

from typing import Protocol

from torch import Tensor


class WorkerGroup(Protocol):
    """The processes that share one global batch; rank counts them from 0."""

    @property
    def size(self) -> int: ...

    @property
    def rank(self) -> int: ...

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum of a detached tensor over all workers, the same on each. All of them call it
        equally often.
        """
        ...


class SingleWorkerGroup:
    """A process by itself: the local batch is the global batch."""

    size = 1
    rank = 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return tensor


SINGLE_WORKER = SingleWorkerGroup()
