"""Data-parallel training with torch.distributed: sums over workers, and averaged gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raysweep.errors import WorkFailed
from raysweep.method import Method
from raysweep.spec import SpecError
from raysweep.worker_group import WorkerGroup


class WorkerLost(WorkFailed):
    """A collective operation failed because another worker died."""


@contextmanager
def collective_errors() -> Iterator[None]:
    """Context manager for collective operations, which turns every error into WorkerLost.

    If a worker dies, torch raises RuntimeError (broken connection) or ValueError (the group is
    destroyed already), and Ray raises its own errors.

    Yields:
        Nothing.

    Raises:
        WorkerLost: The operation failed.
    """
    try:
        yield
    except Exception as error:
        raise WorkerLost(str(error)) from error


class DistributedWorkerGroup:
    """The processes of torch.distributed's default group (see `WorkerGroup`).

    Attributes:
        size: Number of processes.
        rank: Number of this process, from 0.
    """

    def __init__(self) -> None:
        with collective_errors():
            self.size = dist.get_world_size()
            self.rank = dist.get_rank()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes (see `WorkerGroup`).

        Args:
            tensor: Tensor of the same shape on each process; it is not changed.

        Returns:
            The sum, without gradient.

        Raises:
            WorkerLost: Another process died.
        """
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        with collective_errors():
            dist.all_reduce(total)
        return total


def average_gradients(model: nn.Module, workers: WorkerGroup) -> None:
    """Replace each gradient by its mean over workers, with one sum for each dtype.

    torch's DistributedDataParallel cannot be used: it expects one forward pass per backward pass,
    and broadcasts batch norm's buffers at each forward pass. A step here has several forward passes
    before its only backward pass, and attacks differentiate the model in between.

    Args:
        model: Its gradients are changed in place.
        workers: The processes that train the model.
    """
    if workers.size == 1:
        return
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    grads.sort(key=lambda grad: str(grad.dtype))
    for _, group in groupby(grads, key=lambda grad: grad.dtype):
        same_dtype = list(group)
        flat = torch.cat([grad.reshape(-1) for grad in same_dtype])
        mean = workers.all_reduce_sum(flat) / workers.size
        parts = torch.split(mean, [grad.numel() for grad in same_dtype])
        for grad, part in zip(same_dtype, parts, strict=True):
            grad.copy_(part.view_as(grad))


def check_method_distributable(method: Method, workers: WorkerGroup) -> None:
    """Check that several workers can train a method.

    An attack in train mode with tau stops at a different step on each worker. The workers would run
    different numbers of synchronised forward passes, and wait for each other forever.

    Args:
        method: The method.
        workers: The processes that train it together.

    Raises:
        SpecError: The method has such an attack, and there are several workers.
    """
    if workers.size == 1:
        return
    for name, attack in method.attacks.items():
        is_train_mode = getattr(attack, "mode", "eval") == "train"
        if is_train_mode and getattr(attack, "tau", None) is not None:
            raise SpecError(
                f"method.attacks.{name}: mode train with tau stops at different steps on different "
                "workers: take one worker, mode eval, or tau null"
            )


def broadcast_int(value: int, workers: WorkerGroup, device: torch.device) -> int:
    """Send an integer from the first worker to all. It is also a barrier: all workers must call it.

    Args:
        value: The integer; ignored on all workers but the first.
        workers: The processes.
        device: Device on which the sum is computed.

    Returns:
        The first worker's `value`.

    Raises:
        WorkerLost: Another worker died.
    """
    if workers.size == 1:
        return value
    summand = torch.tensor(value if workers.rank == 0 else 0, device=device)
    return int(workers.all_reduce_sum(summand))


def average_metrics(
    metrics: dict[str, float], n_rows: int, workers: WorkerGroup, device: torch.device
) -> dict[str, float]:
    """Combine the workers' mean metrics into means over the rows of all workers.

    Args:
        metrics: Means over this worker's rows; all workers have the same keys.
        n_rows: Number of this worker's rows.
        workers: The processes.
        device: Where the sums are computed.

    Returns:
        The means; with several workers rounded to 6 decimals.

    Raises:
        WorkerLost: Another worker died.
    """
    if workers.size == 1:
        return metrics
    row_sums = [float(n_rows), *(n_rows * value for value in metrics.values())]
    sums = workers.all_reduce_sum(torch.tensor(row_sums, device=device, dtype=torch.float64))
    # Sums in another order differ in the last digits. Rounding makes equal epochs compare as equal,
    # as they do with one worker.
    return {
        name: round((total / sums[0]).item(), 6)
        for name, total in zip(metrics, sums[1:], strict=True)
    }


def gather_tensors(tensor: Tensor, workers: WorkerGroup) -> Tensor:
    """Collect a tensor of each worker.

    Args:
        tensor: Tensor of the same shape and dtype on each worker.
        workers: The processes.

    Returns:
        The tensors in the order of the ranks, (`workers.size`, ...), the same on each worker.

    Raises:
        WorkerLost: Another worker died.
    """
    rows = tensor.new_zeros(workers.size, *tensor.shape)
    rows[workers.rank] = tensor
    return workers.all_reduce_sum(rows)


def gather_rows(share: torch.Tensor, n_rows: int, workers: WorkerGroup) -> torch.Tensor:
    """Collect the rows that were divided among the workers.

    Args:
        share: Rows `rank`, `rank + size`, `rank + 2 size`, ... of all, which this worker has, (M,)
            bool.
        n_rows: Number of rows of all workers together, N.
        workers: The processes.

    Returns:
        All rows in order, (N,) bool, the same on each worker.

    Raises:
        WorkerLost: Another worker died.
    """
    rows = torch.zeros(n_rows, device=share.device)
    rows[workers.rank :: workers.size] = share.float()
    return workers.all_reduce_sum(rows).bool()
