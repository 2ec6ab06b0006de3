"""Residual networks in their CIFAR form: a 3x3 stem, no max pooling, four stages (He et al. 2016)."""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from raysweep.models.layers import Logits, conv1x1, conv3x3


class ResidualBlock(Protocol):
    expansion: int

    def __call__(self, channels_in: int, width: int, stride: int) -> nn.Module: ...


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(channels_in, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.shortcut = _build_shortcut(channels_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv1x1(channels_in, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv1x1(width, 4 * width), nn.BatchNorm2d(4 * width)
        self.shortcut = _build_shortcut(channels_in, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(
        self, block: ResidualBlock, blocks_per_stage: tuple[int, ...], channels: int, classes: int
    ) -> None:
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
        out = self.stages(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


def resnet18(channels: int, classes: int) -> nn.Module:
    """CIFAR's form, without max pooling: two blocks of two 3x3 convolutions in each stage,
    11,173,962 parameters.
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), channels, classes)


def resnet34(channels: int, classes: int) -> nn.Module:
    """CIFAR's form, without max pooling: 3, 4, 6 and 3 blocks of two 3x3 convolutions, 21,282,122
    parameters.
    """
    return ResNet(BasicBlock, (3, 4, 6, 3), channels, classes)


def resnet50(channels: int, classes: int) -> nn.Module:
    """CIFAR's form, without max pooling: 3, 4, 6 and 3 bottlenecks, 23,520,842 parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), channels, classes)


def _build_shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    if stride == 1 and channels_in == channels_out:
        return nn.Identity()
    return nn.Sequential(conv1x1(channels_in, channels_out, stride), nn.BatchNorm2d(channels_out))
