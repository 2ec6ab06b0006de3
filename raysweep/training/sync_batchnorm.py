"""Batch norm over the global batch, with exact statistics and gradients on any device.

torch.nn.SyncBatchNorm does not support the CPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from raysweep.attacks.base import is_on_cpu
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
        out: Tensor = _SyncBatchNormFunction.apply(
            x, self.weight, self.bias, statistics, self.eps, self._workers
        )
        return out

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


class _SyncBatchNormFunction(torch.autograd.Function):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias with the statistics of all workers."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Tensor,
        eps: float,
        workers: WorkerGroup,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, statistics)
        ctx.eps, ctx.workers = eps, workers
        if not x.numel():
            return x.clone()
        _, mean, variance = _unpack_statistics(statistics)
        weight, bias = (None if v is None else v.to(mean.dtype) for v in (weight, bias))
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x over all rows, and of weight and bias over this worker's rows.

        With g = dL/dy and z = (x - mean) / sqrt(variance + eps), dL/dx is
        weight / sqrt(variance + eps) * (g - mean(g) - z * mean(g z)): a x + b g + c by channel.
        """
        (grad,) = grads
        x, weight, statistics = ctx.saved_tensors
        count, mean, variance = _unpack_statistics(statistics)
        own_sums = _sum_channel_gradients(grad, x, mean, variance, ctx.eps)
        grad_mean, grad_z_mean = ctx.workers.all_reduce_sum(own_sums) / count
        scale = (variance + ctx.eps).rsqrt()
        grad_factor = scale if weight is None else scale * weight
        x_factor = -grad_factor * scale * grad_z_mean
        shift = -grad_factor * grad_mean - x_factor * mean
        grad_factor, x_factor, shift = (
            _broadcast_channels(values, x) for values in (grad_factor, x_factor, shift)
        )
        x_grad = torch.addcmul(shift, x, x_factor).addcmul_(grad, grad_factor).to(x.dtype)
        if weight is None:
            return x_grad, None, None, None, None, None
        bias_grad, weight_grad = own_sums.to(weight.dtype)
        return x_grad, weight_grad, bias_grad, None, None, None


def _sum_channel_gradients(
    grad: Tensor, x: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    """Sum g and g (x - mean) / sqrt(variance + eps) over this worker's rows.

    Returns:
        (2, C), in the dtype of the statistics, which is float32 also for 16-bit inputs.
    """
    if x.numel() and is_on_cpu(x):
        # In eval mode this kernel computes just these sums, many times faster than `sum`.
        _, product_sum, grad_sum = torch.ops.aten.native_batch_norm_backward(
            grad, x, None, mean, variance, None, None, False, eps, [False, True, True]
        )
        return torch.stack([grad_sum, product_sum])
    dims = [d for d in range(grad.dim()) if d != 1]
    scale = _broadcast_channels((variance + eps).rsqrt(), x)
    normalized = (x - _broadcast_channels(mean, x)) * scale
    return torch.stack(
        [grad.sum(dims, dtype=mean.dtype), (grad * normalized).sum(dims, dtype=mean.dtype)]
    )


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
        if is_on_cpu(x):
            mean, variance = torch.batch_norm_update_stats(wide, None, None, 0.0)
        else:
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
