"""Wide residual networks (Zagoruyko & Komodakis 2016): pre-activation blocks, widths 160, 320, 640
for factor 10.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from raysweep.models.layers import Logits, conv3x3
from raysweep.models.preact_resnet import PreActBlock


class WideResNet(nn.Module):
    """A 16-channel stem, three stages of `blocks` blocks each, a last batch norm, global average."""

    def __init__(
        self, blocks_per_stage: int, width_factor: int, channels: int, classes: int
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, 16)
        stages: list[nn.Module] = []
        channels_in = 16
        for stage in range(3):
            width = 16 * width_factor * 2**stage
            for position in range(blocks_per_stage):
                stages.append(PreActBlock(channels_in, width, 2 if stage and not position else 1))
                channels_in = width
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(channels_in)
        self.linear = Logits(channels_in, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(self.stages(self.conv1(x))))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


def wrn_28_10(channels: int, classes: int) -> nn.Module:
    """28 = 4 + 6 x 4 layers."""
    return WideResNet(4, 10, channels, classes)


def wrn_32_10(channels: int, classes: int) -> nn.Module:
    """Madry et al.'s count, 32 = 2 + 6 x 5 layers (shortcuts not counted): the network that others
    call WRN-34-10.
    """
    return WideResNet(5, 10, channels, classes)


def wrn_34_10(channels: int, classes: int) -> nn.Module:
    """34 = 4 + 6 x 5 layers."""
    return WideResNet(5, 10, channels, classes)
