"""The small network of G appendix C.5: 6 convolutions and 2 linear layers."""

from torch import nn

from raysweep.models.layers import AveragePool, Logits, conv3x3


def small_cnn(channels: int, classes: int) -> nn.Module:
    """Widths 64, 128, 196, two convolutions each, then max pooling; 256 hidden units.

    The paper gives the number of layers only; the widths are those of FAT's code. Images other than
    32x32 are pooled to the same 4x4.
    """
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
