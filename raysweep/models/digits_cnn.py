"""The network for the 8x8 digits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def digits_cnn(channels: int, classes: int) -> nn.Module:
    """Three 3x3 convolutions with batch norm and two linear layers, for 8x8 digits.

    It trains in seconds on a CPU.
    """
    from torch import nn

    from raysweep.models.layers import AveragePool, Logits, conv3x3

    return nn.Sequential(
        conv3x3(channels, 32), nn.BatchNorm2d(32), nn.ReLU(),
        conv3x3(32, 64, 2), nn.BatchNorm2d(64), nn.ReLU(),
        conv3x3(64, 64, 2), nn.BatchNorm2d(64), nn.ReLU(),
        AveragePool(2), nn.Flatten(),
        nn.Linear(256, 128), nn.ReLU(),
        Logits(128, classes),
    )  # fmt: skip
