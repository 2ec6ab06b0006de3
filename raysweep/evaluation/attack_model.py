"""The copy of a model that attacks run on.

It is frozen and in eval mode, has fast convolutions and folded batch norms, and computes a row's
result independently of the other rows of the batch.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raysweep.evaluation.batchnorm_folding import fold_if_exact
from raysweep.evaluation.fast_convolution import replace_image_convolutions

# For small batches PyTorch uses kernels that add numbers in another order. Measured for forward and
# backward passes of five networks on CPUs: a row's result does not depend on the batch if that has
# 7 rows or more.
MIN_BATCH_ROWS = 16


class FixedSizeBatches(nn.Module):
    """Wraps a model so that it only computes on batches of a fixed or minimal size.

    Attributes:
        model: The model.
        tile: Rows of each batch that the model computes: larger inputs are split, smaller ones
            padded with zeros. If None, inputs are only padded to at least MIN_BATCH_ROWS rows.
    """

    def __init__(self, model: nn.Module, tile: int | None = None) -> None:
        super().__init__()
        self.model, self.tile = model, tile

    def forward(self, x: Tensor) -> Tensor:
        """Run the model.

        Args:
            x: Images, (N, C, H, W).

        Returns:
            Logits, (N, classes), in the type of `x`.
        """
        if self.tile is None:
            return self._forward_padded(x, MIN_BATCH_ROWS)
        if not len(x):
            logits: Tensor = self.model(x)
            return logits
        return torch.cat(
            [self._forward_padded(part, self.tile) for part in torch.split(x, self.tile)]
        )

    def _forward_padded(self, x: Tensor, min_rows: int) -> Tensor:
        """Pad `x` to at least `min_rows` rows and return the outputs of the original rows."""
        n_padding = min_rows - len(x)
        if n_padding > 0:
            x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, n_padding))
        logits: Tensor = self.model(x).to(x.dtype)
        return logits[: len(logits) - n_padding] if n_padding > 0 else logits


class InferenceModeDisabler(nn.Module):
    """Wraps a model whose forward pass uses autograd, for attacks that run in inference mode.

    Autograd does not work in inference mode. The guard turns the mode off for the forward pass.

    Attributes:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Run the model outside of inference mode.

        Args:
            x: Images, (N, C, H, W).

        Returns:
            Logits, (N, classes).
        """
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
    """Copy a model for attacks: frozen, in eval mode, and independent of the batch composition.

    Args:
        model: The model; it is not changed.
        x: Example images, (N, C, H, W), on the device of the model.
        fold: Whether to make the copy faster: channels-last memory format, batch norms folded
            where the logits stay the same, and cheap gradients of image convolutions on CPUs.
        tile: Compute on batches of exactly this many rows (see `FixedSizeBatches`).

    Returns:
        The copy, on the same device. It returns logits in the type of its input.
    """
    attack_model = copy.deepcopy(model).eval().requires_grad_(False)
    if fold:
        attack_model = attack_model.to(memory_format=torch.channels_last)
        attack_model = fold_if_exact(attack_model, x)
        replace_image_convolutions(attack_model)
    if forward_uses_autograd(attack_model, x):
        attack_model = InferenceModeDisabler(attack_model)
    return FixedSizeBatches(attack_model, tile).eval()


def forward_uses_autograd(model: nn.Module, x: Tensor) -> bool:
    """Return whether the forward pass computes gradients, as test-time defences do.

    Args:
        model: The model.
        x: Example images, (N, C, H, W), on the device of the model.

    Returns:
        True if the forward pass calls `torch.autograd.grad` or a `backward`.
    """
    detector = _AutogradCallDetector()
    with torch.no_grad(), detector:
        model(x)
    return detector.has_autograd_call


class _AutogradCallDetector(TorchFunctionMode):
    """Records whether code that runs while it is active computes a gradient."""

    has_autograd_call = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.has_autograd_call |= func in (
            torch.autograd.grad,
            torch.autograd.backward,
            Tensor.backward,
        )
        return func(*args, **(kwargs or {}))
