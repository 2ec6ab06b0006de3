"""The copy of a model that attacks run on: frozen, batch norms folded, and computing each row the same in any batch."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode

from raysweep.attacks import float32_as
from raysweep.evaluation.image_conv import speed_up

# Kernels for fewer rows add in another order; from 7 rows on, rows were bit for bit the same in every batch (CPU,
# forward and backward, five networks).
LEAST_ROWS = 16
# Relative to the largest logit: what folding may change before it is left out.
FOLDING_TOLERANCE = 1e-4


class Tiled(nn.Module):
    """A model whose batches are padded to at least LEAST_ROWS, or cut and padded to exactly `tile` rows."""

    def __init__(self, model: nn.Module, tile: int | None = None) -> None:
        super().__init__()
        self.model, self.tile = model, tile

    def forward(self, x: Tensor) -> Tensor:
        rows = len(x)
        if self.tile is None:
            return self._padded(x, LEAST_ROWS)
        return (
            torch.cat([self._padded(part, self.tile) for part in torch.split(x, self.tile)]) if rows else self.model(x)
        )

    def _padded(self, x: Tensor, rows: int) -> Tensor:
        missing = rows - len(x)
        if missing > 0:
            x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing))
        logits: Tensor = self.model(x).to(x.dtype)
        return logits[: len(logits) - missing] if missing > 0 else logits


class Apart(nn.Module):
    """A model that differentiates by itself, for attacks that run it in inference mode, where nothing can be."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor
        if not torch.is_inference_mode_enabled():
            logits = self.model(x)
            return logits
        with torch.inference_mode(False), torch.no_grad():
            logits = self.model(x.clone())
        return logits


def attack_copy(model: nn.Module, x: Tensor, fold: bool = True, tile: int | None = None) -> nn.Module:
    """A frozen copy in eval mode.

    `fold` makes it fast: channels last, batch norms folded where that is exact enough, gradients to images cheap.
    """
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    if fold:
        plain = plain.to(memory_format=torch.channels_last)
        folded = copy.deepcopy(plain)
        if fold_batch_norms(folded, x) and _agree(plain, folded, x):
            plain = folded
        speed_up(plain)
    return Tiled(Apart(plain) if differentiates(plain, x) else plain, tile).eval()


def fold_batch_norms(model: nn.Module, x: Tensor) -> int:
    """Fold, in place, each batch norm that takes a convolution's output in a forward of x; how many were folded."""
    pairs = foldable(model, x)
    for norm, conv in pairs.items():
        fused = fuse_conv_bn_eval(model.get_submodule(conv), model.get_submodule(norm))  # type: ignore[arg-type,type-var]
        model.set_submodule(conv, fused)
        model.set_submodule(norm, nn.Identity())
    return len(pairs)


def foldable(model: nn.Module, x: Tensor) -> dict[str, str]:
    """Names {batch norm: convolution} where, in a forward of x, the one alone takes the other's output, each once."""
    names = {module: name for name, module in model.named_modules()}
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: dict[_BatchNorm, nn.Conv2d] = {}
    calls: dict[nn.Module, int] = {}
    uses = _Uses()

    def seen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            outputs[id(output)] = (module, output)
            uses.counts[id(output)] = 0
        elif isinstance(module, _BatchNorm) and id(inputs[0]) in outputs:
            pairs[module] = outputs[id(inputs[0])][0]

    hooks = [module.register_forward_hook(seen) for module in names if isinstance(module, (nn.Conv2d, _BatchNorm))]
    try:
        with torch.no_grad(), uses:
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    shared = {conv for number, (conv, _) in outputs.items() if uses.counts[number] > 1}
    return {
        names[norm]: names[conv]
        for norm, conv in pairs.items()
        if calls[norm] == calls[conv] == 1 and conv not in shared
        if norm.track_running_stats and names[norm] and names[conv]
    }


def differentiates(model: nn.Module, x: Tensor) -> bool:
    """Whether a forward of x takes gradients of its own: a defence that adapts to its input."""
    gradients = _Gradients()
    with torch.no_grad(), gradients:
        model(x)
    return gradients.taken


class _Gradients(TorchFunctionMode):
    """Whether a gradient was taken."""

    taken = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.taken |= func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
        return func(*args, **(kwargs or {}))


class _Uses(TorchFunctionMode):
    """How often each tensor, by its id, goes into a function that gives a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            for value in (*args, *(kwargs or {}).values()):
                for item in value if isinstance(value, (list, tuple)) else (value,):
                    self.counts[id(item)] = self.counts.get(id(item), 0) + 1
        return out


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 that is float32: no TF32, no autocast."""
    with float32_as("ieee"), torch.autocast(device.type, enabled=False):
        yield


def has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.cuda is not None


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters (or buffers) are."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _agree(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    """Whether the folded model `other` gives the same outputs as `one`, up to FOLDING_TOLERANCE."""
    with torch.no_grad():
        a = one(x)
        try:
            b = other(x)
        except AttributeError:  # The model itself reads a part that was folded away.
            return False
    return bool((a - b).abs().max() <= FOLDING_TOLERANCE * a.abs().max())
