"""Residual networks for CIFAR by name: their depths and widths."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def resnet18(channels: int, classes: int) -> nn.Module:
    """ResNet-18 for CIFAR: 2 basic blocks in each stage, 11,173,962 parameters."""
    from raysweep.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, (2, 2, 2, 2), channels, classes)


def resnet34(channels: int, classes: int) -> nn.Module:
    """ResNet-34 for CIFAR: stages of 3, 4, 6 and 3 basic blocks, 21,282,122 parameters."""
    from raysweep.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, (3, 4, 6, 3), channels, classes)


def resnet50(channels: int, classes: int) -> nn.Module:
    """ResNet-50 for CIFAR: stages of 3, 4, 6 and 3 bottlenecks, 23,520,842 parameters."""
    from raysweep.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, (3, 4, 6, 3), channels, classes)


def preact_resnet18(channels: int, classes: int) -> nn.Module:
    """Pre-activation ResNet-18 as in most CIFAR code, no last batch norm: 11,171,146 parameters."""
    from raysweep.models.preact_resnet import PreActResNet

    return PreActResNet((2, 2, 2, 2), channels, classes, final_bn=False)


def preact_resnet18_bn(channels: int, classes: int) -> nn.Module:
    """Pre-activation ResNet-18 with a last batch norm and ReLU: 11,172,170 parameters.

    This is the form of He et al. 2016b and of Rice et al. 2020.
    """
    from raysweep.models.preact_resnet import PreActResNet

    return PreActResNet((2, 2, 2, 2), channels, classes, final_bn=True)


def wrn_28_10(channels: int, classes: int) -> nn.Module:
    """Wide ResNet with 28 = 4 + 6 x 4 layers and width factor 10: 36,479,194 parameters."""
    from raysweep.models.wide_resnet import WideResNet

    return WideResNet(4, 10, channels, classes)


def wrn_32_10(channels: int, classes: int) -> nn.Module:
    """The network `wrn_34_10` under the name that LRAT and Madry et al. use.

    They do not count the layers of the shortcuts: 32 = 2 + 6 x 5.
    """
    from raysweep.models.wide_resnet import WideResNet

    return WideResNet(5, 10, channels, classes)


def wrn_34_10(channels: int, classes: int) -> nn.Module:
    """Wide ResNet with 34 = 4 + 6 x 5 layers and width factor 10: 46,160,474 parameters."""
    from raysweep.models.wide_resnet import WideResNet

    return WideResNet(5, 10, channels, classes)
