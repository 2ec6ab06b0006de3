"""Networks that map images (N, channels, H, W) in [0, 1] to logits (N, classes).

To add a network, write a function (channels, classes) -> nn.Module and list it in `MODELS`. Modules
that this one imports leave PyTorch to functions, so that commands that print names need not wait
for it. `raysweep list` prints the first line of the function's docstring. The numbers of parameters
in docstrings are for 3 channels and 10 classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from pydantic import field_validator

from raysweep.lazy_modules import torch
from raysweep.models.digits_cnn import digits_cnn
from raysweep.models.residual_networks import (
    preact_resnet18,
    preact_resnet18_bn,
    resnet18,
    resnet34,
    resnet50,
    wrn_28_10,
    wrn_32_10,
    wrn_34_10,
)
from raysweep.models.small_cnn import small_cnn
from raysweep.models.vgg import vgg13
from raysweep.spec import Spec, SpecError, describe_unknown_name

if TYPE_CHECKING:
    from torch import nn

# Function (number of image channels, number of classes) -> network with random weights.
ModelFactory: TypeAlias = "Callable[[int, int], nn.Module]"

MODELS: dict[str, ModelFactory] = {
    "digits_cnn": digits_cnn,
    "small_cnn": small_cnn,
    "vgg13": vgg13,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "preact_resnet18": preact_resnet18,
    "preact_resnet18_bn": preact_resnet18_bn,
    "wrn_28_10": wrn_28_10,
    "wrn_32_10": wrn_32_10,
    "wrn_34_10": wrn_34_10,
}


class ModelSpec(Spec):
    """Choice of a network and of the normalisation of its input."""

    name: str = "digits_cnn"
    """Name of the network; `raysweep list` prints all names."""

    mean: tuple[float, ...] = ()
    """Mean of each channel, which the model subtracts from the images. Empty for no normalisation,
    as in the papers of GAIRAT and LRAT."""

    std: tuple[float, ...] = ()
    """Standard deviation of each channel, by which the model divides; empty if `mean` is empty."""

    @field_validator("name")
    @classmethod
    def _check_model_name(cls, name: str) -> str:
        """Reject names that are not in `MODELS`."""
        if name not in MODELS:
            raise SpecError(describe_unknown_name("model", name, list(MODELS)))
        return name

    def build_model(self, channels: int, classes: int, seed: int) -> nn.Module:
        """Build the network with new weights, on the CPU.

        Args:
            channels: Channels of the images.
            classes: Number of classes.
            seed: Seed of the initial weights. They do not depend on the state of torch's global
                generator, which is not changed.

        Returns:
            A model from images (N, channels, H, W) in [0, 1] to logits (N, classes).

        Raises:
            SpecError: If `mean` or `std` does not have a value for each channel.
        """
        from raysweep.models.device import seeded_generators
        from raysweep.models.layers import Normalize

        if {len(self.mean), len(self.std)} not in ({0}, {channels}):
            raise SpecError(f"model.mean and model.std need {channels} values each, or none")
        with seeded_generators(seed, torch.device("cpu")):
            network = MODELS[self.name](channels, classes)
        if not self.mean:
            return torch.nn.Sequential(network)
        return torch.nn.Sequential(Normalize(self.mean, self.std), network)
