"""Pre-activation residual networks for CIFAR (He et al. 2016b), used for G fig. 11."""

import torch.nn.functional as F
from torch import Tensor, nn

from raysweep.models.layers import Logits, conv1x1, conv3x3


class PreActBlock(nn.Module):
    """Residual block: batch norm, ReLU and 3x3 convolution, twice.

    If the block changes the shape, the shortcut is a 1x1 convolution of the input after the first
    batch norm and ReLU; otherwise the input itself.
    """

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        """Build the block.

        Args:
            channels_in: Channels of the input.
            width: Channels of the output.
            stride: Stride of the first convolution.
        """
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels_in), conv3x3(channels_in, width, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv3x3(width, width)
        keeps_shape = stride == 1 and channels_in == width
        self.shortcut = None if keeps_shape else conv1x1(channels_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map feature maps (N, channels_in, H, W) to (N, width, H / stride, W / stride)."""
        active = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class PreActResNet(nn.Module):
    """A 3x3 convolution, stages of pre-activation blocks, a global average and a linear layer."""

    def __init__(
        self, blocks_per_stage: tuple[int, ...], channels: int, classes: int, final_bn: bool
    ) -> None:
        """Build the network.

        Args:
            blocks_per_stage: Number of blocks of each stage; widths are 64, 128, 256, ...
            channels: Channels of the images.
            classes: Number of classes.
            final_bn: Whether batch norm and ReLU follow the last block.
        """
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
        """Map images (N, channels, H, W) to logits (N, classes)."""
        out = self.end(self.blocks(self.conv1(x)))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits
