"""Convolutions whose gradient with respect to the image is cheap on a CPU.

Attacks need this gradient in every step. One matrix product computes the contribution of each
output pixel to each of the k x k input pixels in its window; k x k shifted additions sum the
contributions. For one or three input channels, PyTorch's own gradient takes two to seven times as
long.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Largest sizes at which this method was measured to be faster than PyTorch's.
MAX_INPUT_CHANNELS, MAX_KERNEL_AREA = 4, 25


class FastInputGradConv2d(nn.Conv2d):
    """A Conv2d with constant weights and a fast gradient with respect to its input.

    The output is identical to that of nn.Conv2d. The weights get no gradient.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Override nn.Conv2d's implementation of the forward pass."""
        if not input.requires_grad:
            return F.conv2d(input, weight, bias, self.stride, self.padding)
        output: Tensor = _FastInputGradConvFunction.apply(
            input, weight, bias, self.stride, self.padding
        )
        return output


def replace_image_convolutions(model: nn.Module) -> None:
    """Turn each small convolution on a CPU into a FastInputGradConv2d, in place.

    Args:
        model: A model whose parameters need no gradient.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_replaceable(module):
            module.__class__ = FastInputGradConv2d


def _is_replaceable(conv: nn.Conv2d) -> bool:
    """Return whether `conv` is small, on a CPU, and uses no groups, dilation or special padding."""
    is_plain = (
        conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )
    is_small = (
        conv.in_channels <= MAX_INPUT_CHANNELS
        and conv.kernel_size[0] * conv.kernel_size[1] <= MAX_KERNEL_AREA
    )
    return is_plain and is_small and conv.weight.device.type == "cpu"


class _FastInputGradConvFunction(torch.autograd.Function):
    """Convolution whose backward pass only computes the gradient of the input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        """Return the convolution of x (N, C, H, W) with weight (C_out, C, k_h, k_w)."""
        ctx.save_for_backward(weight)
        ctx.shape, ctx.stride, ctx.padding = x.shape, stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x, and None for the other arguments."""
        (weight,), (grad,) = ctx.saved_tensors, grads
        n, channels, height, width = ctx.shape
        (stride_y, stride_x), (pad_y, pad_x) = ctx.stride, ctx.padding
        out_channels, _, kernel_height, kernel_width = weight.shape
        rows, columns = grad.shape[2:]
        grad_rows = grad.permute(0, 2, 3, 1).reshape(-1, out_channels)
        contributions = weight.permute(2, 3, 1, 0).reshape(-1, out_channels) @ grad_rows.T
        contributions = contributions.view(kernel_height, kernel_width, channels, n, rows, columns)
        padded = grad.new_zeros(channels, n, height + 2 * pad_y, width + 2 * pad_x)
        for i in range(kernel_height):
            for j in range(kernel_width):
                y_slice = slice(i, i + stride_y * rows, stride_y)
                x_slice = slice(j, j + stride_x * columns, stride_x)
                padded[..., y_slice, x_slice] += contributions[i, j]
        x_grad = padded[..., pad_y : pad_y + height, pad_x : pad_x + width].transpose(0, 1)
        return x_grad, None, None, None, None
