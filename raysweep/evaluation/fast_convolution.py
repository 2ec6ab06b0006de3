"""Convolutions of images whose gradient with respect to the image is cheap on a CPU.

The library's gradient of a convolution with one or three input channels takes two to seven times as
long as a matrix product (what each output pixel sends to each of the k x k places it saw) and k x k
shifted sums. Attacks need this gradient in every pass; nothing else does.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Where it was measured to pay: input channels and places of a window at most.
MAX_INPUT_CHANNELS, MAX_KERNEL_AREA = 4, 25


class FastInputGradConv2d(nn.Conv2d):
    """A Conv2d with constant weights, and the same numbers in the forward pass."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not input.requires_grad:
            return F.conv2d(input, weight, bias, self.stride, self.padding)
        output: Tensor = _FastInputGradConvFunction.apply(
            input, weight, bias, self.stride, self.padding
        )
        return output


def replace_image_convolutions(model: nn.Module) -> None:
    """Make an ImageConv, in place, of each convolution of a frozen model that may be one."""
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_replaceable(module):
            module.__class__ = FastInputGradConv2d


def _is_replaceable(conv: nn.Conv2d) -> bool:
    """Few channels and places, on a CPU, and none of a convolution's rarer settings."""
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    small = (
        conv.in_channels <= MAX_INPUT_CHANNELS
        and conv.kernel_size[0] * conv.kernel_size[1] <= MAX_KERNEL_AREA
    )
    return (
        plain and small and not isinstance(conv.padding, str) and conv.weight.device.type == "cpu"
    )


class _FastInputGradConvFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.stride, ctx.padding = x.shape, stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (grad,) = ctx.saved_tensors, grads
        (count, channels, height, width), (down, right), (top, left) = (
            ctx.shape,
            ctx.stride,
            ctx.padding,
        )
        rows, columns = grad.shape[2:]
        outputs = grad.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])
        sent = (weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0]) @ outputs.T).view(
            *weight.shape[2:], channels, count, rows, columns
        )
        padded = grad.new_zeros(channels, count, height + 2 * top, width + 2 * left)
        for i in range(weight.shape[2]):
            for j in range(weight.shape[3]):
                padded[..., i : i + down * rows : down, j : j + right * columns : right] += sent[
                    i, j
                ]
        return (
            padded[..., top : top + height, left : left + width].transpose(0, 1),
            None,
            None,
            None,
            None,
        )
