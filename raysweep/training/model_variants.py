"""Variants of one network: the model itself, a module for training, and a module for attacks."""

import copy
import logging
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from raysweep.attacks import fp32_precision, freeze_model, set_mode
from raysweep.evaluation.attack_model import changes_its_buffers, copy_empty_dicts
from raysweep.evaluation.batchnorm_folding import find_foldable_batch_norms
from raysweep.training.speed_checks import (
    can_be_compiled,
    follows_model,
    needs_adapter,
    preserve_state,
)
from raysweep.training.speed_settings import ComputeSpec, Precision

logger = logging.getLogger(__name__)


class ModelVariants:
    """A model, and the modules that training and attacks call instead of it.

    Args:
        model: The network. Its memory format may be changed.
        images: A few images, (N, C, H, W), to find batch norms to fold and to check the folded
            module: if its logits or gradients differ, attacks run on the model itself.
        compute: Speed settings without `auto` (see `ComputeSpec.resolve`).

    Attributes:
        model: The network that is saved and evaluated.
        train_module: Runs `model` with the settings of `compute` for training. Its backward pass
            computes the gradients of the weights of `model`.
        attack_module: A faster module for attacks in eval mode, with the outputs of `model` up to
            rounding. Call `sync_folded_weights` after each change of the weights of `model`.
        memory_format: Memory format of the weights; images should have the same.
    """

    def __init__(self, model: nn.Module, images: Tensor, compute: ComputeSpec) -> None:
        self._uses_tf32 = compute.tf32
        self.memory_format = (
            torch.channels_last if compute.channels_last else torch.contiguous_format
        )
        self.model = model.to(memory_format=self.memory_format)
        self._folded_layers: list[tuple[nn.Conv2d, _BatchNorm, nn.Conv2d]] = []
        images = images.contiguous(memory_format=self.memory_format)
        attacked = self._choose_attack_module(images, compute.attack) if compute.fold else model
        is_adapted = needs_adapter(model, images)
        use_compile = compute.compile and can_be_compiled(attacked, images)
        self.train_module, self.attack_module = (
            _apply_compute_options(
                _AdaptedModule(module) if is_adapted else module, precision, use_compile
            )
            for module, precision in ((model, compute.train), (attacked, compute.attack))
        )

    def sync_folded_weights(self) -> None:
        """Copy the current weights and running statistics of `model` into `attack_module`."""
        with torch.no_grad():
            for conv, norm, folded in self._folded_layers:
                mean, variance = norm.running_mean, norm.running_var
                assert mean is not None and variance is not None and folded.bias is not None
                weight, bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
                )
                folded.weight.copy_(weight)
                folded.bias.copy_(bias)

    def training_precision(self) -> AbstractContextManager[None]:
        """Return a context manager that sets the float32 precision of training on NVIDIA GPUs."""
        return fp32_precision("tf32" if self._uses_tf32 else "ieee")

    def _choose_attack_module(self, images: Tensor, precision: Precision) -> nn.Module:
        """Return a folded copy of the model, or the model if a copy computes something else."""
        with freeze_model(self.model):
            if changes_its_buffers(self.model, images):
                logger.info("fallback: attacks run without a copy: it has buffers that change")
                return self.model
        try:
            folded_model = self._build_folded_module(images)
        except Exception as error:
            logger.info("fallback: attacks run without folded batch norms: %s", error)
            self._folded_layers = []
            return self.model
        if not self._folded_layers:
            return self.model
        if not follows_model(folded_model, self.model, images, self.sync_folded_weights):
            self._folded_layers = []
            return self.model
        if precision == "bf16":
            for _, _, folded in self._folded_layers:
                folded.bfloat16()
        return folded_model

    def _build_folded_module(self, images: Tensor) -> nn.Module:
        """Build a copy of the model with batch norms folded into the convolutions before them.

        Folded convolutions have their own tensors; all others are shared with the model.
        """
        with preserve_state(self.model), freeze_model(self.model):
            conv_by_norm = find_foldable_batch_norms(self.model, images)
        n_norms = sum(isinstance(module, _BatchNorm) for module in self.model.modules())
        if len(conv_by_norm) < n_norms:
            logger.info("folded only %d of %d batch norms for attacks", len(conv_by_norm), n_norms)
        folded_model = _copy_sharing_tensors(self.model)
        set_mode(folded_model, False)
        for norm_name, conv_name in conv_by_norm.items():
            conv = folded_model.get_submodule(conv_name)
            folded = copy.deepcopy(conv, copy_empty_dicts(conv))
            assert isinstance(folded, nn.Conv2d)
            folded.bias = nn.Parameter(
                folded.weight.new_zeros(folded.out_channels), requires_grad=False
            )
            folded_model.set_submodule(conv_name, folded)
            folded_model.set_submodule(norm_name, nn.Identity())
            conv, norm = self.model.get_submodule(conv_name), self.model.get_submodule(norm_name)
            self._folded_layers.append((conv, norm, folded))  # type: ignore[arg-type]
        self.sync_folded_weights()
        return folded_model


class _AdaptedModule(nn.Module):
    """Gives a module a copy of the images, and returns logits in their number type."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.clone()).to(x.dtype)  # type: ignore[no-any-return]


class _Bf16Autocast(nn.Module):
    """Runs a module under autocast to bf16; the output has the dtype of the input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.module(x).to(x.dtype)  # type: ignore[no-any-return]


def _apply_compute_options(module: nn.Module, precision: Precision, use_compile: bool) -> nn.Module:
    """Wrap a module in torch.compile and autocast, if they are on."""
    if use_compile:
        # On a GPU this mode records CUDA graphs. Replays see new weights because all updates of
        # weights are in place.
        module = torch.compile(module, mode="reduce-overhead")  # type: ignore[assignment]
    return _Bf16Autocast(module) if precision == "bf16" else module


def _copy_sharing_tensors(model: nn.Module) -> nn.Module:
    """Copy the modules of a model, but share its tensors; the copy needs no gradients."""
    # deepcopy uses the values of `memo` instead of copies of the objects with these ids.
    memo = copy_empty_dicts(model) | {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return copy.deepcopy(model, memo)
