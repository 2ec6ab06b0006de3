"""Networks that map images (N, channels, H, W) in [0, 1] to logits (N, classes).

A user's own network is a function in a file that `--code` names. To add a network to raysweep,
write a function (channels, classes) -> nn.Module and list it in `MODELS`. Modules that this one
imports leave PyTorch to functions, so that commands that print names need not wait for it.
`raysweep list` prints the first line of the function's docstring. The numbers of parameters in
docstrings are for 3 channels and 10 classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from pydantic import ValidationInfo, field_validator, model_validator

from raysweep.code_files import convert_code_errors, import_code_function, is_code_sha256
from raysweep.formatting import shorten_value
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


# Names are shown in tables and reports.
_MAX_NAME_LENGTH = 100


class ModelSpec(Spec):
    """Choice of a network and of the normalisation of its input."""

    later_fields: ClassVar[frozenset[str]] = frozenset({"code"})

    code: str | None = None
    """SHA-256 of your own Python file with the function `name`; `--code FILE` sets it. null for the
    networks of `raysweep list`."""

    name: str = "digits_cnn"
    """Name of the network; `raysweep list` prints all names. With `--code FILE`, it may also be the
    name of a function (channels, classes) -> network in this file."""

    mean: tuple[float, ...] = ()
    """Mean of each channel, which the model subtracts from the images. Empty for no normalisation,
    as in the papers of GAIRAT and LRAT."""

    std: tuple[float, ...] = ()
    """Standard deviation of each channel, by which the model divides; empty if `mean` is empty."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_unused_code(cls, data: Any) -> Any:
        """Drop `code` for a network of raysweep: a sweep may search over both kinds of networks."""
        if not isinstance(data, dict):
            return data
        name = data.get("name", cls.model_fields["name"].default)
        if isinstance(name, str) and name in MODELS:
            return {key: value for key, value in data.items() if key != "code"}
        return data

    @field_validator("code")
    @classmethod
    def _check_code(cls, code: str | None) -> str | None:
        """Reject what is not a SHA-256, such as the path of a file."""
        if code is not None and not is_code_sha256(code):
            raise SpecError(
                f"{shorten_value(code)} is no SHA-256: leave it out, give the file as --code FILE"
            )
        return code

    @field_validator("name")
    @classmethod
    def _check_model_name(cls, name: str, info: ValidationInfo) -> str:
        """Reject names that are not in `MODELS`, unless they name a function of a code file."""
        if name not in MODELS and info.data.get("code", "") is None:
            line = describe_unknown_name("model", name, list(MODELS))
            raise SpecError(f"{line}; a network of your own needs --code FILE")
        if not name.isidentifier() or len(name) > _MAX_NAME_LENGTH:
            raise SpecError(f"{shorten_value(name)} is no name of a function")
        return name

    def find_factory(self) -> ModelFactory:
        """Find the function that builds the network.

        Raises:
            SpecError: Its code file was not given to this process, or has no such function. One
                line.
        """
        if self.code is None:
            return MODELS[self.name]
        return import_code_function(self.code, self.name)

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
            SpecError: If `mean` or `std` does not have a value for each channel, or the network's
                code file was not given (see `find_factory`), or its function fails.
        """
        from raysweep.models.device import seeded_generators
        from raysweep.models.layers import Normalize

        if {len(self.mean), len(self.std)} not in ({0}, {channels}):
            raise SpecError(f"model.mean and model.std need {channels} values each, or none")
        factory = self.find_factory()
        with seeded_generators(seed, torch.device("cpu")):
            if self.code is None:
                network = factory(channels, classes)
            else:
                network = _build_own_network(self.code, self.name, factory, channels, classes)
        if not self.mean:
            return torch.nn.Sequential(network)
        return torch.nn.Sequential(Normalize(self.mean, self.std), network)


def _build_own_network(
    code: str, name: str, factory: ModelFactory, channels: int, classes: int
) -> nn.Module:
    """Build a network of a code file; SpecError if its function fails or returns no network."""
    with convert_code_errors(code, name):
        network = factory(channels, classes)
    if not isinstance(network, torch.nn.Module):
        kind = type(network).__name__
        raise SpecError(f"model.name = {name!r}: its function gave {kind}, not a torch.nn.Module")
    return network
