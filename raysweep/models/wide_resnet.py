"""Wide residual networks (Zagoruyko & Komodakis 2016): three stages of pre-activation blocks."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from raysweep.models.layers import Logits, conv3x3
from raysweep.models.preact_resnet import PreActBlock


class WideResNet(nn.Module):
    """A stem of 16 channels, three stages, batch norm, a global average and a linear layer.

    All stages have the same number of blocks.
    """

    def __init__(
        self, blocks_per_stage: int, width_factor: int, channels: int, classes: int
    ) -> None:
        """Build the network.

        Args:
            blocks_per_stage: Number of blocks of each stage, (depth - 4) / 6.
            width_factor: Factor k of the widths 16 k, 32 k and 64 k.
            channels: Channels of the images.
            classes: Number of classes.
        """
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
        """Map images (N, channels, H, W) to logits (N, classes)."""
        out = F.relu(self.bn(self.stages(self.conv1(x))))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits
