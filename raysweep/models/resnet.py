"""Residual networks for CIFAR (He et al. 2016): a 3x3 stem, no max pooling, four stages."""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from raysweep.models.layers import Logits, conv1x1, conv3x3


class ResidualBlock(Protocol):
    """Interface of the classes of residual blocks: `BasicBlock` and `Bottleneck`.

    Attributes:
        expansion: Number of output channels divided by `width`.
    """

    expansion: int

    def __call__(self, channels_in: int, width: int, stride: int) -> nn.Module:
        """Build a block.

        Args:
            channels_in: Channels of the input.
            width: Channels of the 3x3 convolutions.
            stride: Stride of the first 3x3 convolution.

        Returns:
            A module that maps feature maps (N, channels_in, H, W) to
            (N, expansion x width, H / stride, W / stride).
        """
        ...


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (`ResidualBlock`)."""

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        """Build the block; see `ResidualBlock`."""
        super().__init__()
        self.conv1, self.bn1 = conv3x3(channels_in, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.shortcut = _build_shortcut(channels_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map feature maps (N, channels_in, H, W) to (N, width, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 and 1x1 (`ResidualBlock`)."""

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        """Build the block; see `ResidualBlock`."""
        super().__init__()
        self.conv1, self.bn1 = conv1x1(channels_in, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv1x1(width, 4 * width), nn.BatchNorm2d(4 * width)
        self.shortcut = _build_shortcut(channels_in, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map feature maps (N, channels_in, H, W) to (N, 4 width, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """A 3x3 convolution, stages of residual blocks, a global average and a linear layer."""

    def __init__(
        self, block: ResidualBlock, blocks_per_stage: tuple[int, ...], channels: int, classes: int
    ) -> None:
        """Build the network.

        Args:
            block: Class of the blocks.
            blocks_per_stage: Number of blocks of each stage; widths are 64, 128, 256, ...
            channels: Channels of the images.
            classes: Number of classes.
        """
        super().__init__()
        self.conv1, self.bn1 = conv3x3(channels, 64), nn.BatchNorm2d(64)
        stages: list[nn.Module] = []
        channels_in = 64
        for stage, depth in enumerate(blocks_per_stage):
            width = 64 * 2**stage
            blocks: list[nn.Module] = []
            for position in range(depth):
                blocks.append(block(channels_in, width, 2 if stage and not position else 1))
                channels_in = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.linear = Logits(channels_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, channels, H, W) to logits (N, classes)."""
        out = self.stages(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


def _build_shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    """Return the identity, or a 1x1 convolution with batch norm where the shape changes."""
    if stride == 1 and channels_in == channels_out:
        return nn.Identity()
    return nn.Sequential(conv1x1(channels_in, channels_out, stride), nn.BatchNorm2d(channels_out))
