"""Data-parallel training with torch.distributed: sums over workers, and averaged gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raysweep.errors import WorkFailed
from raysweep.method import Method
from raysweep.spec import SpecError
from raysweep.worker_group import WorkerGroup

# Gradients that are summed together: fewer sums than parameters, and enough to begin early.
_BUCKET_BYTES = 4 * 2**20


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
            # With Gloo, sums in the background have connections of their own, so that small sums do
            # not wait for them. NCCL runs the sums of a group in order.
            is_gloo = dist.get_backend() == "gloo"
            self._background_group: dist.ProcessGroup | None = None
            if is_gloo:
                self._background_group = cast(dist.ProcessGroup, dist.new_group())

    def __deepcopy__(self, memo: dict[int, object]) -> "DistributedWorkerGroup":
        """Return this group: copies of a model, whose batch norms have it, use its connections."""
        return self

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

    def start_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Start to sum a tensor over all processes (see `WorkerGroup`).

        Args:
            tensor: Contiguous tensor of the same shape on each process; the sum replaces its
                content.

        Returns:
            A function that waits for the sum and returns it.

        Raises:
            WorkerLost: Another process died; the function may also raise it.
        """
        with collective_errors():
            work = dist.all_reduce(tensor, group=self._background_group, async_op=True)
        assert work is not None

        def wait() -> Tensor:
            with collective_errors():
                work.wait()
            return tensor

        return wait


@contextmanager
def average_gradients(model: nn.Module, workers: WorkerGroup) -> Iterator[None]:
    """Context manager for a backward pass, after which each gradient is its mean over workers.

    The gradients are summed in buckets while the backward pass computes those of earlier layers.

    torch's DistributedDataParallel cannot be used: it expects one forward pass per backward pass,
    and broadcasts batch norm's buffers at each forward pass. A step here has several forward passes
    before its only backward pass, and attacks differentiate the model in between.

    Args:
        model: A model whose gradients are None. The block runs one backward pass.
        workers: The processes that train the model.

    Yields:
        Nothing.

    Raises:
        WorkerLost: Another worker died.
    """
    if workers.size == 1:
        yield
        return
    buckets = _GradientBuckets(model, workers)
    with buckets.observe_backward():
        yield
    buckets.finish()


class _GradientBuckets:
    """Groups of parameters (buckets) whose gradients are summed over workers in one operation.

    The last layers come first, as in the backward pass. All workers sum the buckets in this order,
    whichever is complete first.
    """

    def __init__(self, model: nn.Module, workers: WorkerGroup) -> None:
        self._workers = workers
        self._buckets: list[list[nn.Parameter]] = []
        self._sums: list[tuple[list[nn.Parameter], Callable[[], Tensor]]] = []
        self._n_started = 0
        self._is_stale = False
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        n_bytes = 0
        for parameter in reversed(parameters):
            last = self._buckets[-1] if self._buckets else []
            if not last or n_bytes >= _BUCKET_BYTES or last[0].dtype != parameter.dtype:
                self._buckets.append([])
                n_bytes = 0
            self._buckets[-1].append(parameter)
            n_bytes += parameter.numel() * parameter.element_size()
        self._missing = [set(bucket) for bucket in self._buckets]

    @contextmanager
    def observe_backward(self) -> Iterator[None]:
        """Context manager that starts to sum each bucket when all its gradients are computed."""
        hooks = [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(self._note_gradient, number)
            )
            for number, bucket in enumerate(self._buckets)
            for parameter in bucket
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def finish(self) -> None:
        """Sum the buckets that are left, and replace the gradients by their means."""
        if self._is_stale:
            # All workers run the same backward passes, so this is the case on all of them.
            for _, wait in self._sums:
                wait()
            self._sums, self._n_started = [], 0
        while self._n_started < len(self._buckets):
            self._start_next()
        for parameters, wait in self._sums:
            mean = wait().div_(self._workers.size)
            for parameter, part in zip(parameters, _split_like(mean, parameters), strict=True):
                parameter.grad = part

    def _note_gradient(self, number: int, parameter: nn.Parameter) -> None:
        """Note a new gradient of a bucket; start the sums of complete buckets in order.

        It comes once, unless the network recomputes activations in backward passes of their own
        (`torch.utils.checkpoint` with `use_reentrant=True`).
        """
        self._is_stale |= number < self._n_started
        self._missing[number].discard(parameter)
        while self._n_started < len(self._buckets) and not self._missing[self._n_started]:
            self._start_next()

    def _start_next(self) -> None:
        """Start to sum the next bucket, without parameters that the loss does not use."""
        used = [p for p in self._buckets[self._n_started] if p.grad is not None]
        self._n_started += 1
        if not used:
            return
        flat = used[0].new_empty(sum(parameter.numel() for parameter in used))
        for parameter, part in zip(used, _split_like(flat, used), strict=True):
            assert parameter.grad is not None
            part.copy_(parameter.grad)
        self._sums.append((used, self._workers.start_sum(flat)))


def _split_like(flat: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return views of a vector that have the shapes and strides of parameters."""
    views, start = [], 0
    for parameter in parameters:
        # Not the parameter's own strides: it may have gaps or overlap itself.
        strides = torch.empty_like(parameter, device="meta").stride()
        views.append(flat.as_strided(parameter.shape, strides, start))
        start += parameter.numel()
    return views


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
