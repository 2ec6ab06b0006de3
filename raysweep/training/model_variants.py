"""The faces of one network: as it is trained, as attacks meet it, and the model itself, as it is
saved and judged.
"""

import copy
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from raysweep.attacks import fp32_precision, freeze_model
from raysweep.evaluation.batchnorm_folding import find_foldable_batch_norms
from raysweep.training.compute import ComputeSpec, Precision


class ModelVariants:
    """model: what is saved and judged, here only laid out anew. trained: runs `model` for its
    weights' gradient.

    attacked: what attacks in eval mode meet: `model` in eval mode, up to the rounding that
    `compute` allows. compute: decided for the device. images: a few, (N, C, H, W), to find out
    which batch norms follow a convolution.
    """

    def __init__(self, model: nn.Module, images: Tensor, compute: ComputeSpec) -> None:
        self._uses_tf32 = compute.tf32
        self.memory_format = (
            torch.channels_last if compute.channels_last else torch.contiguous_format
        )
        self.model = model.to(memory_format=self.memory_format)
        self.train_module = _apply_compute_options(model, compute.train, compute.compile)
        self._folded_layers: list[tuple[nn.Conv2d, _BatchNorm, nn.Conv2d]] = []
        met = self._build_folded_module(images, compute.attack) if compute.fold else model
        self.attack_module = _apply_compute_options(met, compute.attack, compute.compile)

    def sync_folded_weights(self) -> None:
        """Bring `attacked` up to the model's weights and running statistics: before each step."""
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
        """What training makes of float32 on NVIDIA's GPUs."""
        return fp32_precision("tf32" if self._uses_tf32 else "ieee")

    def _build_folded_module(self, images: Tensor, precision: Precision) -> nn.Module:
        """A mirror of the model in which convolutions that a batch norm follows have tensors of
        their own.
        """
        with freeze_model(self.model):
            pairs = find_foldable_batch_norms(self.model, images)
        net = _copy_sharing_tensors(self.model).eval()
        for norm, conv in pairs.items():
            folded = copy.deepcopy(net.get_submodule(conv))
            assert isinstance(folded, nn.Conv2d)
            folded.bias = nn.Parameter(
                folded.weight.new_zeros(folded.out_channels), requires_grad=False
            )
            if precision == "bf16":
                folded.bfloat16()
            net.set_submodule(conv, folded)
            net.set_submodule(norm, nn.Identity())
            trained_conv, trained_norm = (self.model.get_submodule(name) for name in (conv, norm))
            self._folded_layers.append((trained_conv, trained_norm, folded))  # type: ignore[arg-type]
        self.sync_folded_weights()
        return net


class _Bf16Autocast(nn.Module):
    """A network under autocast to bf16, whose output has its input's type."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.module(x).to(x.dtype)  # type: ignore[no-any-return]


def _apply_compute_options(module: nn.Module, precision: Precision, use_compile: bool) -> nn.Module:
    if use_compile:
        # On a GPU as CUDA graphs; weights and folded weights are changed in place, so that replays
        # see them.
        module = torch.compile(module, mode="reduce-overhead")  # type: ignore[assignment]
    return _Bf16Autocast(module) if precision == "bf16" else module


def _copy_sharing_tensors(model: nn.Module) -> nn.Module:
    """Modules of its own around the model's very tensors, which need no gradient here."""
    shared: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, shared)
