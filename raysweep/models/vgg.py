"""VGG-13 in its CIFAR form (Simonyan & Zisserman 2015): batch norms, one linear layer."""

from torch import nn

from raysweep.models.layers import AveragePool, Logits, conv3x3


def vgg13(channels: int, classes: int) -> nn.Module:
    """Widths 64, 128, 256, 512, 512, two convolutions each, then max pooling."""
    layers: list[nn.Module] = []
    channels_in = channels
    for width in (64, 128, 256, 512, 512):
        for _ in range(2):
            layers += [conv3x3(channels_in, width, bias=True), nn.BatchNorm2d(width), nn.ReLU()]
            channels_in = width
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers, AveragePool(1), nn.Flatten(), Logits(512, classes))
