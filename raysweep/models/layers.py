"""Layers that the architectures share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Normalize(nn.Module):
    """First layer of a model: (x - mean) / std. Attacks therefore work on images in [0, 1].

    Attributes:
        mean: Mean of each channel, (C, 1, 1).
        std: Standard deviation of each channel, (C, 1, 1).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Build the layer.

        Args:
            mean: Mean of each channel.
            std: Standard deviation of each channel.
        """
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise images (N, C, H, W)."""
        return (x - self.mean) / self.std


class Logits(nn.Linear):
    """Last layer of a model. It computes in float32 also under autocast.

    bfloat16 has 8 bits of precision: the logits of two classes would often be equal.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map features (N, in_features) to logits (N, classes)."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class AveragePool(nn.AdaptiveAvgPool2d):
    """Average pooling to a square of `output_size` pixels.

    Input of that size is returned unchanged, because torch's layer is slow even then.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Pool feature maps (N, C, H, W)."""
        return x if x.shape[-2:] == (self.output_size, self.output_size) else super().forward(x)


def conv3x3(channels_in: int, channels_out: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """Build a 3x3 convolution with one pixel of padding, so that stride 1 keeps the image size."""
    return nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=bias)


def conv1x1(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """Build a 1x1 convolution without bias and padding."""
    return nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
