"""Batch norm over the global batch, with exact statistics and gradients on any device.

torch.nn.SyncBatchNorm does not support the CPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from raysweep.worker_group import WorkerGroup


def convert_sync_batchnorm(model: nn.Module, workers: WorkerGroup) -> nn.Module:
    """Replace all batch norms of a model by synchronised ones.

    Args:
        model: Changed in place. The new modules use the same parameters and buffers, with the same
            names.
        workers: The processes that share the global batch.

    Returns:
        `model`, or its replacement if `model` itself is a batch norm.
    """
    if isinstance(model, _BatchNorm):
        return SyncBatchNorm(model, workers)
    for name, child in model.named_children():
        setattr(model, name, convert_sync_batchnorm(child, workers))
    return model


class SyncBatchNorm(_BatchNorm):
    """Batch norm with the statistics of all workers' rows; in eval mode plain batch norm.

    In training all workers must run the same forward passes, with 0 rows if they have none.

    Args:
        batch_norm: The module whose parameters and buffers are used.
        workers: The processes that share the global batch.
    """

    def __init__(self, batch_norm: _BatchNorm, workers: WorkerGroup) -> None:
        super().__init__(
            batch_norm.num_features,
            batch_norm.eps,
            batch_norm.momentum,
            batch_norm.affine,
            batch_norm.track_running_stats,
            device="meta",
        )
        self._parameters, self._buffers = batch_norm._parameters, batch_norm._buffers
        self.training = batch_norm.training
        self._workers = workers

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x`, (N, C, ...), and in training update the running statistics."""
        if not self.training and self.running_mean is not None:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        statistics = _compute_global_statistics(x.detach(), self._workers)
        if self.training and self.running_mean is not None:
            self._update_running_stats(statistics)
        out: Tensor = _SyncNormalizeFunction.apply(x, statistics, self.eps, self._workers)
        if self.weight is None:
            return out
        weight, bias = _broadcast_channels(self.weight, x), _broadcast_channels(self.bias, x)
        return (out * weight + bias).to(x.dtype)

    def _update_running_stats(self, statistics: Tensor) -> None:
        """Move the running mean and the unbiased running variance towards the batch's."""
        assert (
            self.running_mean is not None
            and self.running_var is not None
            and self.num_batches_tracked is not None
        )
        count, mean, variance = _unpack_statistics(statistics)
        self.num_batches_tracked += 1
        momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        unbiased = variance * count / (count - 1).clamp_min(1)
        self.running_mean += momentum * (mean.to(self.running_mean.dtype) - self.running_mean)
        self.running_var += momentum * (unbiased.to(self.running_var.dtype) - self.running_var)


class _SyncNormalizeFunction(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) with the mean and variance of all workers' rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, statistics: Tensor, eps: float, workers: WorkerGroup
    ) -> Tensor:
        count, mean, variance = _unpack_statistics(statistics)
        scale = (variance + eps).rsqrt()
        out = ((x - _broadcast_channels(mean, x)) * _broadcast_channels(scale, x)).to(x.dtype)
        ctx.save_for_backward(out, scale, count)
        ctx.workers = workers
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        out, scale, count = ctx.saved_tensors
        dims = [d for d in range(grad.dim()) if d != 1]
        # Summed in the dtype of the statistics, which is float32 also for 16-bit inputs.
        sums = torch.stack(
            [grad.sum(dims, dtype=count.dtype), (grad * out).sum(dims, dtype=count.dtype)]
        )
        means = ctx.workers.all_reduce_sum(sums) / count
        centred = (
            grad - _broadcast_channels(means[0], grad) - out * _broadcast_channels(means[1], grad)
        )
        return (centred * _broadcast_channels(scale, grad)).to(grad.dtype), None, None, None


def _compute_global_statistics(x: Tensor, workers: WorkerGroup) -> Tensor:
    """Compute element count, means and biased variances of the global batch's channels.

    Each worker writes its statistics into its own row of a zero matrix; the sum over workers has
    all rows. For accuracy, only differences from a mean are squared.

    Returns:
        (1 + 2 C,): elements per channel, C means, C variances (see `_unpack_statistics`).
    """
    dims = [d for d in range(x.dim()) if d != 1]
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    rows = wide.new_zeros(workers.size, 1 + 2 * x.shape[1])
    if x.numel():
        variance, mean = torch.var_mean(wide, dims, correction=0)
        rows[workers.rank] = torch.cat(
            [wide.new_full((1,), x.numel() / x.shape[1]), mean, variance]
        )
    count, means, variances = _unpack_statistics(workers.all_reduce_sum(rows))
    total = count.sum()
    share = count / total.clamp_min(1)
    mean = (share * means).sum(0)
    variance = (share * (variances + (means - mean) ** 2)).sum(0)
    return torch.cat([total[None], mean, variance])


def _unpack_statistics(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split (..., 1 + 2 C) into count (..., 1), means (..., C) and variances (..., C)."""
    channels = statistics.shape[-1] // 2
    return statistics[..., :1], statistics[..., 1 : 1 + channels], statistics[..., 1 + channels :]


def _broadcast_channels(values: Tensor, target: Tensor) -> Tensor:
    """Reshape (C,) so that it broadcasts against `target`, (N, C, ...)."""
    return values.view(1, -1, *[1] * (target.dim() - 2))
