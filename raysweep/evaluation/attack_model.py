"""The copy of a model that attacks run on: frozen, batch norms folded, and computing each row the
same in any batch.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raysweep.evaluation.batchnorm_folding import _has_same_logits, fold_batch_norms
from raysweep.evaluation.fast_convolution import replace_image_convolutions

# Kernels for fewer rows add in another order; from 7 rows on, rows were bit for bit the same in
# every batch (CPU, forward and backward, five networks).
MIN_BATCH_ROWS = 16


class FixedSizeBatches(nn.Module):
    """A model whose batches are padded to at least LEAST_ROWS, or cut and padded to exactly `tile`
    rows.
    """

    def __init__(self, model: nn.Module, tile: int | None = None) -> None:
        super().__init__()
        self.model, self.tile = model, tile

    def forward(self, x: Tensor) -> Tensor:
        rows = len(x)
        if self.tile is None:
            return self._forward_padded(x, MIN_BATCH_ROWS)
        return (
            torch.cat([self._forward_padded(part, self.tile) for part in torch.split(x, self.tile)])
            if rows
            else self.model(x)
        )

    def _forward_padded(self, x: Tensor, min_rows: int) -> Tensor:
        missing = min_rows - len(x)
        if missing > 0:
            x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing))
        logits: Tensor = self.model(x).to(x.dtype)
        return logits[: len(logits) - missing] if missing > 0 else logits


class InferenceModeGuard(nn.Module):
    """A model that differentiates by itself, for attacks that run it in inference mode, where
    nothing can be.
    """

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


def make_attack_model(
    model: nn.Module, x: Tensor, fold: bool = True, tile: int | None = None
) -> nn.Module:
    """A frozen copy in eval mode.

    `fold` makes it fast: channels last, batch norms folded where that is exact enough, gradients to
    images cheap.
    """
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    if fold:
        plain = plain.to(memory_format=torch.channels_last)
        folded = copy.deepcopy(plain)
        if fold_batch_norms(folded, x) and _has_same_logits(plain, folded, x):
            plain = folded
        replace_image_convolutions(plain)
    return FixedSizeBatches(
        InferenceModeGuard(plain) if forward_uses_autograd(plain, x) else plain, tile
    ).eval()


def forward_uses_autograd(model: nn.Module, x: Tensor) -> bool:
    """Whether a forward of x takes gradients of its own: a defence that adapts to its input."""
    gradients = _AutogradCallDetector()
    with torch.no_grad(), gradients:
        model(x)
    return gradients.has_autograd_call


class _AutogradCallDetector(TorchFunctionMode):
    """Whether a gradient was taken."""

    has_autograd_call = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.has_autograd_call |= func in (
            torch.autograd.grad,
            torch.autograd.backward,
            Tensor.backward,
        )
        return func(*args, **(kwargs or {}))
