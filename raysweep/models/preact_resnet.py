"""Pre-activation residual networks in their CIFAR form (He et al. 2016b), as G fig. 11 trains them."""

import torch.nn.functional as F
from torch import Tensor, nn

from raysweep.models.layers import Logits, conv1x1, conv3x3


class PreActBlock(nn.Module):
    """bn-relu-conv twice; where the shape changes, a 1x1 convolution of the activated input is the
    shortcut.
    """

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels_in), conv3x3(channels_in, width, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv3x3(width, width)
        same = stride == 1 and channels_in == width
        self.shortcut = None if same else conv1x1(channels_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class PreActResNet(nn.Module):
    """Four stages of pre-activation blocks; `final_bn` activates the last one's sum before it is
    averaged.
    """

    def __init__(
        self, blocks_per_stage: tuple[int, ...], channels: int, classes: int, final_bn: bool
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, 64)
        blocks: list[nn.Module] = []
        channels_in = 64
        for stage, depth in enumerate(blocks_per_stage):
            width = 64 * 2**stage
            for position in range(depth):
                blocks.append(PreActBlock(channels_in, width, 2 if stage and not position else 1))
                channels_in = width
        self.blocks = nn.Sequential(*blocks)
        self.end = (
            nn.Sequential(nn.BatchNorm2d(channels_in), nn.ReLU()) if final_bn else nn.Identity()
        )
        self.linear = Logits(channels_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.end(self.blocks(self.conv1(x)))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


def preact_resnet18(channels: int, classes: int) -> nn.Module:
    """The form most CIFAR code has, without a last batch norm: 11,171,146 parameters."""
    return PreActResNet((2, 2, 2, 2), channels, classes, final_bn=False)


def preact_resnet18_bn(channels: int, classes: int) -> nn.Module:
    """With the last batch norm and ReLU of He et al. 2016b, as Rice et al. 2020 train it:
    11,172,170 parameters.
    """
    return PreActResNet((2, 2, 2, 2), channels, classes, final_bn=True)
