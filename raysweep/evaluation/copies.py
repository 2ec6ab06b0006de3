"""The copy of a model that attacks run on: frozen, batch norms folded, and computing each row the same in any batch."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

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
        logits: Tensor = self.model(x)
        return logits[: len(logits) - missing] if missing > 0 else logits


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
    return Tiled(plain, tile).eval()


def fold_batch_norms(model: nn.Module, x: Tensor) -> int:
    """Fold, in place, each batch norm that takes a convolution's output in a forward of x; how many were folded."""
    names = {module: name for name, module in model.named_modules()}
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: dict[nn.BatchNorm2d, nn.Conv2d] = {}
    calls: dict[nn.Module, int] = {}

    def seen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            outputs[id(output)] = (module, output)
        elif isinstance(module, nn.BatchNorm2d) and id(inputs[0]) in outputs:
            pairs[module] = outputs[id(inputs[0])][0]

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    hooks = [module.register_forward_hook(seen) for module in names if isinstance(module, kinds)]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    folded = 0
    for norm, conv in pairs.items():
        if calls[norm] == calls[conv] == 1 and norm.track_running_stats and names[norm] and names[conv]:
            model.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm))
            model.set_submodule(names[norm], nn.Identity())
            folded += 1
    return folded


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 that is float32: no TF32, no autocast."""
    settings: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters (or buffers) are."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _agree(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        a, b = one(x), other(x)
    return bool((a - b).abs().max() <= FOLDING_TOLERANCE * a.abs().max())
