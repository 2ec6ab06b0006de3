"""VGG-13 for CIFAR (Simonyan & Zisserman 2015): with batch norms and one linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def vgg13(channels: int, classes: int) -> nn.Module:
    """VGG-13 with batch norm: pairs of convolutions of widths 64, 128, 256, 512 and 512."""
    from torch import nn

    from raysweep.models.layers import AveragePool, Logits, conv3x3

    layers: list[nn.Module] = []
    channels_in = channels
    for width in (64, 128, 256, 512, 512):
        for _ in range(2):
            layers += [conv3x3(channels_in, width, bias=True), nn.BatchNorm2d(width), nn.ReLU()]
            channels_in = width
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers, AveragePool(1), nn.Flatten(), Logits(512, classes))
