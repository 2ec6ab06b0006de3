"""The faces of one network: as it is trained, as attacks meet it, and the model itself, as it is saved and judged."""

import copy
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from raysweep.attacks import float32_as, frozen
from raysweep.evaluation.copies import foldable
from raysweep.training.compute import Compute, Precision


class Faces:
    """model: what is saved and judged, here only laid out anew. trained: runs `model` for its weights' gradient.

    attacked: what attacks in eval mode meet: `model` in eval mode, up to the rounding that `compute` allows. compute:
    decided for the device. images: a few, (N, C, H, W), to find out which batch norms follow a convolution.
    """

    def __init__(self, model: nn.Module, images: Tensor, compute: Compute) -> None:
        self._tf32 = compute.tf32
        self.layout = torch.channels_last if compute.channels_last else torch.contiguous_format
        self.model = model.to(memory_format=self.layout)
        self.trained = _computed(model, compute.train, compute.compile)
        self._folds: list[tuple[nn.Conv2d, _BatchNorm, nn.Conv2d]] = []
        met = self._folded(images, compute.attack) if compute.fold else model
        self.attacked = _computed(met, compute.attack, compute.compile)

    def refresh(self) -> None:
        """Bring `attacked` up to the model's weights and running statistics: before each step."""
        with torch.no_grad():
            for conv, norm, folded in self._folds:
                mean, variance = norm.running_mean, norm.running_var
                assert mean is not None and variance is not None and folded.bias is not None
                weight, bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
                )
                folded.weight.copy_(weight)
                folded.bias.copy_(bias)

    def float32(self) -> AbstractContextManager[None]:
        """What training makes of float32 on NVIDIA's GPUs."""
        return float32_as("tf32" if self._tf32 else "ieee")

    def _folded(self, images: Tensor, precision: Precision) -> nn.Module:
        """A mirror of the model in which convolutions that a batch norm follows have tensors of their own."""
        with frozen(self.model):
            pairs = foldable(self.model, images)
        net = _mirror(self.model).eval()
        for norm, conv in pairs.items():
            folded = copy.deepcopy(net.get_submodule(conv))
            assert isinstance(folded, nn.Conv2d)
            folded.bias = nn.Parameter(folded.weight.new_zeros(folded.out_channels), requires_grad=False)
            if precision == "bf16":
                folded.bfloat16()
            net.set_submodule(conv, folded)
            net.set_submodule(norm, nn.Identity())
            self._folds.append((self.model.get_submodule(conv), self.model.get_submodule(norm), folded))  # type: ignore[arg-type]
        self.refresh()
        return net


class _Bf16(nn.Module):
    """A network under autocast to bf16, whose output has its input's type."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.training = net.training

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.net(x).to(x.dtype)  # type: ignore[no-any-return]


def _computed(net: nn.Module, precision: Precision, compiled: bool) -> nn.Module:
    if compiled:
        # On a GPU as CUDA graphs; weights and folded weights are changed in place, so that replays see them.
        net = torch.compile(net, mode="reduce-overhead")  # type: ignore[assignment]
    return _Bf16(net) if precision == "bf16" else net


def _mirror(model: nn.Module) -> nn.Module:
    """Modules of its own around the model's very tensors, which need no gradient here."""
    shared: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, shared)
