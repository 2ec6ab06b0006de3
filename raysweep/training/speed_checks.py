"""Checks that faster ways to compute a training step do not change what a model computes.

Models of other people may depend on the memory format of their input, change it in place, or be
impossible to copy. Each fast path is tried on a few images, forward and backward, and left out if
it raises or gives other results than the plain model.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from raysweep.attacks import freeze_model, restore_mode, set_mode
from raysweep.evaluation.attack_model import (
    LogitsAndGradient,
    compute_logits_and_gradient,
    preserve_buffers,
    results_agree,
)
from raysweep.models.device import seeded_generators
from raysweep.spec import SpecError

logger = logging.getLogger(__name__)

# Largest relative change of the weights' gradient, in training mode.
_GRADIENT_TOLERANCE = 0.05
# Factor on all weights for a second comparison, which shows whether a copy follows the weights.
_WEIGHT_CHANGE = 1.25


def check_model_output(model: nn.Module, images: Tensor, n_classes: int, name: str) -> None:
    """Check that a model can be trained on a data set.

    Args:
        model: The model; its state is not changed.
        images: Images, (N, C, H, W), on its device.
        n_classes: Number of classes of the data set.
        name: Name of the model, for messages.

    Raises:
        SpecError: The model has no training mode, or does not return logits (N, `n_classes`) or
            more.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.train(model.training)
    except NotImplementedError as error:
        raise SpecError(
            f"model {name!r} has no training mode, as programs of torch.export: train the model "
            "that was exported"
        ) from error
    finally:
        for module, training in flags:
            module.training = training
    with preserve_state(model), freeze_model(model), torch.no_grad():
        logits = model(images.clone())
    if not isinstance(logits, Tensor):
        raise SpecError(
            f"model {name!r} returns {type(logits).__name__}: return the logits alone, one tensor "
            "of shape (N, classes)"
        )
    if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < n_classes:
        raise SpecError(
            f"model {name!r} returns shape {tuple(logits.shape)} for {len(images)} images: return "
            f"logits of shape ({len(images)}, {n_classes})"
        )


def needs_adapter(model: nn.Module, images: Tensor) -> bool:
    """Return whether a model changes its images in place, or answers in another number type.

    Args:
        model: The model; its state is not changed.
        images: Images, (N, C, H, W), on its device.
    """
    given = images.clone()
    with preserve_state(model), freeze_model(model), torch.no_grad():
        logits: Tensor = model(given)
    return logits.dtype != images.dtype or not torch.equal(given, images)


def can_use_channels_last(model: nn.Module, images: Tensor) -> bool:
    """Return whether a model computes the same in the channels-last memory format.

    Args:
        model: The model; its weights are contiguous afterwards.
        images: Images, (N, C, H, W), on its device.

    Returns:
        True if logits and gradients agree, in eval and in training mode. Otherwise the log says
        why not.
    """
    try:
        plain = _compute_in_eval_mode(model, images), _compute_training_step(model, images)
    except Exception as error:
        logger.info("fallback: no channels-last memory, the model cannot be tried: %s", error)
        return False
    problem = "the results differ"
    try:
        model.to(memory_format=torch.channels_last)
        x = images.contiguous(memory_format=torch.channels_last)
        fast = _compute_in_eval_mode(model, x), _compute_training_step(model, x)
        is_equal = results_agree(fast[0], plain[0]) and _training_steps_agree(fast[1], plain[1])
    except Exception as error:
        problem, is_equal = f"{type(error).__name__}: {error}", False
    finally:
        model.to(memory_format=torch.contiguous_format)
    if not is_equal:
        logger.info("fallback: training without channels-last memory: %s", problem)
    return is_equal


def follows_model(
    module: nn.Module, model: nn.Module, images: Tensor, sync: Callable[[], None]
) -> bool:
    """Return whether a module for attacks computes the same as a model, also for other weights.

    Args:
        module: The module.
        model: The model; its weights are changed and put back.
        images: Images, (N, C, H, W), in the memory format of both.
        sync: Called after each change of the weights, as in training.

    Returns:
        True if logits and gradients agree. Otherwise the log says why not.
    """
    parameters = list(model.parameters())
    values = [parameter.detach().clone() for parameter in parameters]
    problem = "the results differ"
    try:
        is_equal = _agrees_in_eval_mode(module, model, images)
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(_WEIGHT_CHANGE)
        sync()
        is_equal = is_equal and _agrees_in_eval_mode(module, model, images)
    except Exception as error:
        problem, is_equal = f"{type(error).__name__}: {error}", False
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
        sync()
    if not is_equal:
        logger.info("fallback: attacks run without folded batch norms: %s", problem)
    return is_equal


def can_be_compiled(module: nn.Module, images: Tensor) -> bool:
    """Return whether torch.compile leaves the results of a module as they are.

    Args:
        module: The module; its state is not changed.
        images: Images, (N, C, H, W), in the memory format of its weights.

    Returns:
        True if logits and gradients agree. Otherwise the log says why not.
    """
    problem = "the results differ"
    try:
        is_equal = _agrees_in_eval_mode(torch.compile(module), module, images)  # type: ignore[arg-type]
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        problem, is_equal = f"{type(error).__name__}: {reason}", False
    finally:
        # Otherwise sizes of batches that it saw here would count as variable.
        torch._dynamo.reset()
    if not is_equal:
        logger.warning("fallback: computing without torch.compile: %s", problem)
    return is_equal


def _agrees_in_eval_mode(module: nn.Module, model: nn.Module, images: Tensor) -> bool:
    """Return whether two modules compute the same logits and gradients of the images."""
    return results_agree(
        _compute_in_eval_mode(module, images), _compute_in_eval_mode(model, images)
    )


def _compute_in_eval_mode(model: nn.Module, x: Tensor) -> LogitsAndGradient:
    """Return the logits and the gradient of the images, as attacks see them."""
    with preserve_state(model), freeze_model(model):
        return compute_logits_and_gradient(model, x)


_TrainingStep = tuple[Tensor, list[Tensor | None]]


def _compute_training_step(model: nn.Module, x: Tensor) -> _TrainingStep:
    """Return the logits in training mode, and the gradients of the weights."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with preserve_state(model), seeded_generators(0, x.device), torch.enable_grad():
        set_mode(model, True)
        logits: Tensor = model(x.clone())
        coefficients = torch.linspace(-1, 1, logits.shape[-1]).to(logits)
        loss = (logits * coefficients).log_softmax(-1)[:, 0].sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return logits.detach(), list(gradients)


def _training_steps_agree(found: _TrainingStep, expected: _TrainingStep) -> bool:
    """Return whether logits and gradients agree up to rounding."""
    if not results_agree((found[0], None), (expected[0], None)):
        return False
    difference, size = 0.0, 0.0
    for gradient, wanted in zip(found[1], expected[1], strict=True):
        if gradient is None or wanted is None:
            if gradient is not wanted:
                return False
            continue
        difference += float((gradient - wanted).double().square().sum())
        size += float(wanted.double().square().sum())
    return difference <= _GRADIENT_TOLERANCE**2 * size


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Context manager that puts back the mode and the buffers of a model.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    flags = [(module, module.training) for module in model.modules()]
    with preserve_buffers(model):
        try:
            yield
        finally:
            restore_mode(model, flags)
