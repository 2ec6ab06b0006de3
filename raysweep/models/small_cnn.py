"""The small CNN of G app. C.5."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def small_cnn(channels: int, classes: int) -> nn.Module:
    """Small CNN with 6 convolutions of widths 64, 128 and 196 and 2 linear layers (G app. C.5).

    Max pooling follows each pair of convolutions; the hidden linear layer has 256 units. The GAIRAT
    paper (G) only gives the number of layers; the widths are from FAT's code. For any image size,
    the last feature maps are averaged to 4x4 pixels.
    """
    from torch import nn

    from raysweep.models.layers import AveragePool, Logits, conv3x3

    layers: list[nn.Module] = []
    for channels_in, width in ((channels, 64), (64, 128), (128, 196)):
        layers += [conv3x3(channels_in, width, bias=True), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [
            conv3x3(width, width, bias=True),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    head = [AveragePool(4), nn.Flatten(), nn.Linear(196 * 16, 256), nn.ReLU(), Logits(256, classes)]
    return nn.Sequential(*layers, *head)
