"""Several processes that train one model: sums over a torch.distributed group, and the mean of
their gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raysweep.method import Method
from raysweep.spec import SpecError
from raysweep.worker_group import WorkerGroup


class WorkerLost(RuntimeError):
    """Another worker is gone: not this one's fault."""


@contextmanager
def collective_errors() -> Iterator[None]:
    """For what all workers do at once: whatever goes wrong in it raises PeerLost.

    By the moment at which the group ends, torch raises RuntimeError (a broken connection) or
    ValueError (a group that Ray Train has already destroyed), and Ray its own.
    """
    try:
        yield
    except Exception as error:
        raise WorkerLost(str(error)) from error


class DistributedWorkerGroup:
    """The processes of torch.distributed's default group."""

    def __init__(self) -> None:
        with collective_errors():
            self.size = dist.get_world_size()
            self.rank = dist.get_rank()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        with collective_errors():
            dist.all_reduce(total)
        return total


def average_gradients(model: nn.Module, workers: WorkerGroup) -> None:
    """Replace each gradient by its mean over workers, in one sum for each dtype.

    Not DistributedDataParallel: a step does several forwards before its one backward, and attacks
    differentiate the model in between; DDP hooks one forward to one backward and broadcasts
    buffers, batch norm's own, at each forward.
    """
    if workers.size == 1:
        return
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for _, group in groupby(sorted(grads, key=lambda g: str(g.dtype)), key=lambda g: g.dtype):
        alike = list(group)
        mean = (
            workers.all_reduce_sum(torch.cat([grad.reshape(-1) for grad in alike])) / workers.size
        )
        for grad, part in zip(
            alike, torch.split(mean, [grad.numel() for grad in alike]), strict=True
        ):
            grad.copy_(part.view_as(grad))


def check_method_distributable(method: Method, workers: WorkerGroup) -> None:
    """Raises SpecError for a method whose workers would do unequal numbers of synchronised
    forwards.
    """
    for name, attack in method.attacks.items():
        if (
            workers.size > 1
            and getattr(attack, "mode", "eval") == "train"
            and getattr(attack, "tau", None) is not None
        ):
            raise SpecError(
                f"method.attacks.{name}: mode train with tau stops at different steps on different workers: "
                "take one worker, mode eval, or tau null"
            )


def broadcast_int(value: int, workers: WorkerGroup, device: torch.device) -> int:
    """The first worker's number, on all of them; nobody goes on before the first has got here."""
    if workers.size == 1:
        return value
    return int(
        workers.all_reduce_sum(torch.tensor(value if workers.rank == 0 else 0, device=device))
    )


def average_metrics(
    metrics: dict[str, float], n_rows: int, workers: WorkerGroup, device: torch.device
) -> dict[str, float]:
    """Means over all workers' rows from means over each worker's own."""
    if workers.size == 1:
        return metrics
    shares = [float(n_rows), *(n_rows * value for value in metrics.values())]
    sums = workers.all_reduce_sum(torch.tensor(shares, device=device, dtype=torch.float64))
    # Rounded, so that epochs that tie with one worker tie with several.
    return {
        name: round((total / sums[0]).item(), 6)
        for name, total in zip(metrics, sums[1:], strict=True)
    }
