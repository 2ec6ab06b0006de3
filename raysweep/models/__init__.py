"""Models. A new one is a function (channels, classes) -> nn.Module and a line in `MODELS`."""

from collections.abc import Callable

import torch
from pydantic import field_validator
from torch import nn

from raysweep.models.cnn import digits_cnn
from raysweep.models.layers import Normalize
from raysweep.models.preact_resnet import preact_resnet18, preact_resnet18_bn
from raysweep.models.resnet import resnet18, resnet34, resnet50
from raysweep.models.small_cnn import small_cnn
from raysweep.models.vgg import vgg13
from raysweep.models.wide_resnet import wrn_28_10, wrn_32_10, wrn_34_10
from raysweep.spec import Spec, SpecError, describe_unknown_name

MODELS: dict[str, Callable[[int, int], nn.Module]] = {
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
    """Which network; it takes (N, C, H, W) in [0, 1] and gives logits (N, classes).

    mean, std: per-channel normalisation inside the model; empty for none (the papers of this field
    train on [0, 1]).
    """

    name: str = "digits_cnn"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @field_validator("name")
    @classmethod
    def _check_model_name(cls, name: str) -> str:
        if name not in MODELS:
            raise SpecError(describe_unknown_name("model", name, list(MODELS)))
        return name

    def build_model(self, channels: int, classes: int, seed: int) -> nn.Module:
        """The network with initial weights that depend on `seed` alone. Raises SpecError if mean
        and std do not fit.
        """
        if {len(self.mean), len(self.std)} not in ({0}, {channels}):
            raise SpecError(f"model.mean and model.std need {channels} values each, or none")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = MODELS[self.name](channels, classes)
        return (
            nn.Sequential(Normalize(self.mean, self.std), network)
            if self.mean
            else nn.Sequential(network)
        )
