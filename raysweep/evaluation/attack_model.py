"""The copy of a model that attacks run on.

It is frozen and in eval mode, and computes a row's result independently of the other rows of the
batch. Fast convolutions and folded batch norms replace the model's own where they give the same
logits and gradients. A model that cannot be copied is attacked as it is.
"""

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raysweep.attacks import restore_mode, set_mode
from raysweep.evaluation.batchnorm_folding import fold_batch_norms_
from raysweep.evaluation.fast_convolution import replace_image_convolutions
from raysweep.models.device import seeded_generators
from raysweep.spec import SpecError

logger = logging.getLogger(__name__)

# For small batches PyTorch uses kernels that add numbers in another order. Measured for forward and
# backward passes of five networks on CPUs: a row's result does not depend on the batch if that has
# 7 rows or more.
MIN_BATCH_ROWS = 16
# A fast path may change a logit, beyond rounding, by at most this number times the mean difference
# of the two largest logits, and a row's gradient by ten times this number times its largest
# component.
FAST_PATH_TOLERANCE = 1e-3


# For models that take batches of one size.
TILE_HINT = "if it needs N images at a time: evaluate(..., tile=N)"


def describe_wrong_output(output: object) -> str:
    """Describe what a model returned instead of logits, in one line.

    Args:
        output: No tensor.
    """
    return (
        f"the model must return a tensor of logits, it returned {type(output).__name__}: wrap it "
        "in a module that returns the logits alone"
    )


class FixedSizeBatches(nn.Module):
    """Wraps a model so that it only computes on batches of a fixed or minimal size.

    The model gets a copy of the images, because some models change their input in place.

    Attributes:
        model: The model.
        tile: Rows of each batch that the model computes: larger inputs are split, smaller ones
            filled up with repeated rows. If None, inputs are only filled up to `min_rows` rows.
        min_rows: Least number of rows without `tile`.
    """

    def __init__(
        self, model: nn.Module, tile: int | None = None, min_rows: int = MIN_BATCH_ROWS
    ) -> None:
        super().__init__()
        self.model, self.tile, self.min_rows = model, tile, min_rows

    def forward(self, x: Tensor) -> Tensor:
        """Run the model.

        Args:
            x: Images, (N, C, H, W).

        Returns:
            Logits, (N, classes), in the type of `x`.
        """
        if not len(x):
            logits: Tensor = self.model(x.clone())
            return logits
        if self.tile is None:
            return self._forward_filled(x, self.min_rows)
        return torch.cat(
            [self._forward_filled(part, self.tile) for part in torch.split(x, self.tile)]
        )

    def train(self, mode: bool = True) -> "FixedSizeBatches":
        """Set the mode of this module and of the model, if that has modes."""
        self.training = mode
        set_mode(self.model, mode)
        return self

    def _forward_filled(self, x: Tensor, min_rows: int) -> Tensor:
        """Fill up `x` to at least `min_rows` rows and return the outputs of the original rows.

        The rows themselves are repeated: with other images, batch norms on batch statistics would
        give other outputs.
        """
        n_rows = len(x)
        x = _repeat_rows(x, min_rows) if n_rows < min_rows else x.clone()
        try:
            logits: Tensor = self.model(x)
        except (SpecError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            line = str(error).partition("\n")[0]
            remedy = "" if self.tile else f"; {TILE_HINT}"
            raise SpecError(
                f"the model cannot take {len(x)} images at once ({type(error).__name__}: {line})"
                f"{remedy}"
            ) from error
        if not isinstance(logits, Tensor):
            raise SpecError(describe_wrong_output(logits))
        return logits[:n_rows].to(x.dtype)


def _repeat_rows(x: Tensor, n_rows: int) -> Tensor:
    """Return `n_rows` rows, by repeating those of `x`; of more rows, the first ones."""
    return x.repeat(-(-n_rows // len(x)), *(1 for _ in x.shape[1:]))[:n_rows]


class InferenceModeDisabler(nn.Module):
    """Wraps a model whose forward pass uses autograd, for attacks that run in inference mode.

    Autograd does not work in inference mode. This module turns the mode off for the forward pass.

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


class BorrowedModel(nn.Module):
    """A model that cannot be copied, or that changes its buffers in eval mode.

    It is not registered as a submodule, so `train`, `to` and the like do not change it. Each
    forward pass restores its mode and its buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._borrowed = [model]

    def forward(self, x: Tensor) -> Tensor:
        """Run the model in eval mode.

        Args:
            x: Images, (N, C, H, W).

        Returns:
            Logits, (N, classes).
        """
        (model,) = self._borrowed
        flags = [(module, module.training) for module in model.modules()]
        with preserve_buffers(model):
            set_mode(model, False)
            try:
                logits: Tensor = model(x)
                return logits
            finally:
                restore_mode(model, flags)


@contextmanager
def preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Context manager that puts back the buffers of a model.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                if getattr(module, name, None) is not buffer:
                    setattr(module, name, buffer)
                if not torch.equal(buffer, value):
                    # Writing to `data` keeps the version that the backward pass checks.
                    buffer.data.copy_(value)


def changes_its_buffers(model: nn.Module, x: Tensor) -> bool:
    """Return whether a forward pass changes the buffers of a model, whatever its mode.

    Args:
        model: The model in eval mode; its buffers are put back.
        x: Example images, (N, C, H, W), on the device of the model.
    """
    with preserve_buffers(model), torch.no_grad():
        before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        model(x.clone())
        after = list(model.buffers())
        if len(after) != len(before):
            return True
        return any(
            now is not buffer or not torch.equal(now, value)
            for now, (buffer, value) in zip(after, before, strict=True)
        )


def hold_buffers(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a module that computes as the model, with the same buffers in each forward pass.

    Args:
        model: The model in eval mode.
        x: Example images, (N, C, H, W), on the device of the model.

    Returns:
        The model itself, or a `BorrowedModel` if it changes its buffers in eval mode.
    """
    return BorrowedModel(model) if changes_its_buffers(model, x) else model


def make_attack_model(
    model: nn.Module,
    x: Tensor,
    fold: bool = True,
    tile: int | None = None,
    min_rows: int = MIN_BATCH_ROWS,
) -> nn.Module:
    """Copy a model for attacks: frozen, in eval mode, and independent of the batch composition.

    Args:
        model: The model; it is not changed. One that cannot be copied is used as it is, and its
            mode and buffers are put back after each forward pass.
        x: Example images, (N, C, H, W), on the device of the model.
        fold: Whether to make the copy faster: channels-last memory format, batch norms folded into
            convolutions, and cheap gradients of image convolutions on CPUs. Each is left out if the
            logits or gradients of `x` differ from those of the model.
        tile: Compute on batches of exactly this many rows (see `FixedSizeBatches`).
        min_rows: Least number of rows of a batch without `tile`.

    Returns:
        The copy, on the same device. It returns logits in the type of its input.
    """
    if tile is not None:
        x = _repeat_rows(x, tile)
    attack_model = copy_model(model) or BorrowedModel(model)
    if fold and not isinstance(attack_model, BorrowedModel):
        attack_model = _apply_fast_paths(attack_model, x)
    if not isinstance(attack_model, BorrowedModel):
        attack_model = hold_buffers(attack_model, x)
    if forward_uses_autograd(attack_model, x):
        attack_model = InferenceModeDisabler(attack_model)
    return FixedSizeBatches(attack_model, tile, min_rows).eval()


def copy_model(model: nn.Module) -> nn.Module | None:
    """Copy a model in eval mode, with parameters that need no gradient.

    Args:
        model: The model; it is not changed.

    Returns:
        The copy; None if the model cannot be copied, for example because it holds a lock.
    """
    memo = copy_empty_dicts(model)
    # deepcopy refuses tensors that autograd computed, as some models cache in eval mode.
    for module in model.modules():
        for value in _iter_tensors(vars(module)):
            if not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        copied = copy.deepcopy(model, memo)
        set_mode(copied, False)
        for parameter in copied.parameters():
            parameter.requires_grad_(False)
    except Exception as error:
        logger.info("fallback: the model cannot be copied and is attacked as it is: %s", error)
        return None
    return copied


def copy_empty_dicts(model: nn.Module) -> dict[int, Any]:
    """Copy the empty ordered dicts of a model's modules in advance, for `copy.deepcopy`.

    A module has a dozen of them, for hooks. Without this, `deepcopy` spends most of its time on
    them.

    Args:
        model: The model to copy.

    Returns:
        The second argument of `deepcopy`: id of an object -> its copy.
    """
    return {
        id(value): OrderedDict()
        for module in model.modules()
        for value in vars(module).values()
        if type(value) is OrderedDict and not value
    }


def _iter_tensors(values: Any, depth: int = 2) -> list[Tensor]:
    """List the tensors in an object's attributes, also in dicts and lists."""
    if isinstance(values, Tensor):
        return [values]
    if depth < 0 or not isinstance(values, (dict, list, tuple)):
        return []
    items = values.values() if isinstance(values, dict) else values
    return [tensor for item in items for tensor in _iter_tensors(item, depth - 1)]


def _use_channels_last(model: nn.Module, x: Tensor) -> nn.Module:
    """Return the model with weights in the channels-last memory format."""
    return model.to(memory_format=torch.channels_last)


def _fold_batch_norms(model: nn.Module, x: Tensor) -> nn.Module:
    """Return the model with folded batch norms."""
    with preserve_buffers(model):
        fold_batch_norms_(model, x)
    return model


def _use_fast_convolutions(model: nn.Module, x: Tensor) -> nn.Module:
    """Return the model with cheap gradients of image convolutions."""
    replace_image_convolutions(model)
    return model


_FAST_PATHS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "channels-last memory": _use_channels_last,
    "folded batch norms": _fold_batch_norms,
    "fast image gradients": _use_fast_convolutions,
}


def _apply_fast_paths(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a faster copy that computes the same logits and gradients on `x`.

    All fast paths are tried together; if that fails, one after the other.
    """
    expected = compute_logits_and_gradient(model, x)
    fast_model, problem = _try_fast_paths(model, list(_FAST_PATHS), x, expected)
    if fast_model is not None:
        return fast_model
    best = model
    for name in _FAST_PATHS:
        fast_model, problem = _try_fast_paths(best, [name], x, expected)
        if fast_model is None:
            logger.info("fallback: attacks run without %s: %s", name, problem)
        else:
            best = fast_model
    return best


LogitsAndGradient = tuple[Tensor, Tensor | None]


def _try_fast_paths(
    model: nn.Module, names: list[str], x: Tensor, expected: LogitsAndGradient
) -> tuple[nn.Module | None, str]:
    """Return a copy with some fast paths, or None and why it cannot be used."""
    fast_model = copy_model(model)
    if fast_model is None:
        return None, "it cannot be copied"
    try:
        for name in names:
            fast_model = _FAST_PATHS[name](fast_model, x)
        found = compute_logits_and_gradient(fast_model, x)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    return (fast_model, "") if results_agree(found, expected) else (None, "the results differ")


def compute_logits_and_gradient(model: nn.Module, x: Tensor) -> LogitsAndGradient:
    """Compute what a fast path must not change. The model's random numbers are those of each call.

    Args:
        model: The model, in the mode to compare.
        x: Images, (N, C, H, W), on the device of the model.

    Returns:
        The logits, (N, classes), and the gradient of a sum of logits, (N, C, H, W); None if there
        is no gradient.
    """
    with preserve_buffers(model), seeded_generators(0, x.device), torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        try:
            logits: Tensor = model(point.clone())
            # Coefficients that differ between classes: the sum of probabilities is constant.
            coefficients = torch.linspace(-1, 1, logits.shape[-1]).to(logits)
            weighted_sum = (logits * coefficients).sum()
            (gradient,) = torch.autograd.grad(weighted_sum, point, allow_unused=True)
            return logits.detach(), gradient
        except Exception as error:
            logger.debug("the model has no gradient: %s", error)
    with preserve_buffers(model), seeded_generators(0, x.device), torch.no_grad():
        return model(x.clone()), None


def results_agree(found: LogitsAndGradient, expected: LogitsAndGradient) -> bool:
    """Return whether logits and gradients agree up to rounding.

    Args:
        found: Result of `compute_logits_and_gradient` with a fast path.
        expected: The same without it.
    """
    (logits, gradient), (expected_logits, expected_gradient) = found, expected
    if not isinstance(expected_logits, Tensor) or logits.shape != expected_logits.shape:
        return False
    top = expected_logits.topk(2, dim=-1).values
    scale = (top[..., 0] - top[..., 1]).mean()
    rounding = 64 * torch.finfo(expected_logits.dtype).eps * expected_logits.abs()
    difference = (logits - expected_logits).abs() - rounding
    # Not `(difference > ...).any()`: nan must count as a difference.
    if not bool((difference <= FAST_PATH_TOLERANCE * scale).all()):
        return False
    if gradient is None or expected_gradient is None:
        return gradient is expected_gradient
    size = expected_gradient.abs().flatten(1).amax(1)
    largest_change = (gradient - expected_gradient).abs().flatten(1).amax(1)
    # Where a ReLU or a maximum is at its kink, rounding decides the gradient of a few rows.
    is_equal = largest_change <= 10 * FAST_PATH_TOLERANCE * size
    return bool(is_equal.float().mean() >= 0.75)


def forward_uses_autograd(model: nn.Module, x: Tensor) -> bool:
    """Return whether the forward pass computes gradients, as test-time defences do.

    Args:
        model: The model.
        x: Example images, (N, C, H, W), on the device of the model.

    Returns:
        True if the forward pass calls `torch.autograd.grad` or a `backward`.
    """
    detector = _AutogradCallDetector()
    with preserve_buffers(model), torch.no_grad(), detector:
        model(x.clone())
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
