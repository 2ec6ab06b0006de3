"""Layers that every architecture shares."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std per channel, inside the model, so that attacks and epsilon live in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Logits(nn.Linear):
    """The last layer, exempt from autocast: rounded to 8 bits, logits of two classes would often be
    equal.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class AveragePool(nn.AdaptiveAvgPool2d):
    """Averages to a square of `output_size`. What has that size already passes through: torch's own
    is slow at that.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[-2:] == (self.output_size, self.output_size) else super().forward(x)


def conv3x3(channels_in: int, channels_out: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=bias)


def conv1x1(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
