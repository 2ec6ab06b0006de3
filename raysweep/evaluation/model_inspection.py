"""Checks of a model before the attacks, and warnings that a robustness result may be unreliable.

"Official" refers to the AutoAttack package of Croce & Hein (2020a), whose checks these extend.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysweep.attacks import (
    APGD,
    FAB,
    PGD,
    MultiTargeted,
    SingleAttack,
    Square,
    freeze_model,
    true_class_margin,
)
from raysweep.evaluation.attack_model import (
    TILE_HINT,
    BorrowedModel,
    FixedSizeBatches,
    describe_wrong_output,
    forward_uses_autograd,
)
from raysweep.rng import ExampleRng
from raysweep.spec import SpecError

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]
# A model is random if the logits of repeated forward passes of one batch differ by more than the
# tolerance times the largest logit (official). Here the scale is the largest gap between the first
# and the second class of a row, because this gap decides the class, not the size of the logits.
N_REPEATED_FORWARDS, REPEATED_FORWARD_TOLERANCE = 5, 1e-5
# The same for the logits of an image in batches with different other images.
_BATCH_DEPENDENCE_TOLERANCE = 1e-3
# Fraction of examples that Square may break after the white-box attacks without a warning
# (official).
MAX_SQUARE_DROP = 0.002
# Largest deviation of a probability from [0, 1], and of their sum from 1 (official).
PROBABILITY_TOLERANCE = 1e-5
# A model is constant if the logits of all examples differ by at most this number times the largest
# gap between the first and the second class of a row.
# A warning of no right answer comes only where chance gives that this rarely.
_MAX_CHANCE = 0.01
_CONSTANT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ModelProperties:
    """Properties of a model that decide which attacks can run.

    Attributes:
        n_classes: Number of logits.
        is_random: Whether repeated forward passes give different logits.
        is_differentiable: Whether the logits have a gradient with respect to the images. Not
            checked, and True, if all attacks are Square.
        warnings: Reasons why a robustness result may be unreliable, one line each.
    """

    n_classes: int
    is_random: bool
    is_differentiable: bool
    warnings: tuple[str, ...]


def inspect_model(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: ExampleRng,
    eps: float,
    attacks: Collection[SingleAttack],
    batch_size: int = 256,
    tile: int | None = None,
) -> ModelProperties:
    """Inspect a model on a few examples before any attack.

    Args:
        model: The model.
        x: Images, (N, C, H, W) float32 in [0, 1], on the device of the model.
        y: Labels, (N,) int64.
        rng: Random numbers of these examples.
        eps: Radius of the attacks, in pixels of [0, 1]. Gradients are computed at random points
            within eps of `x`.
        attacks: The attacks that are planned.
        batch_size: Largest number of images in a forward pass.
        tile: Compute on batches of exactly this many images (see `FixedSizeBatches`).

    Returns:
        The properties of the model.

    Raises:
        SpecError: If no attack can run: the forward pass fails, or the output is not a tensor of
            finite logits (N, 2 or more), or a label has no logit.
    """
    with freeze_model(model):
        if tile is not None:
            model = FixedSizeBatches(model, tile).eval()
        # Each answer comes from the buffers that the model has now.
        model = BorrowedModel(model)
        outputs, uses_autograd = _run_repeated_forwards(model, x, batch_size)
        logits = outputs[0]
        _check_logits(logits, y)
        is_random = any(
            _logits_differ(output, logits, REPEATED_FORWARD_TOLERANCE) for output in outputs[1:]
        )
        warnings = []
        if not is_random and _depends_on_batch(model, x[:batch_size]):
            warnings.append(
                "the logits of an image depend on the others of its batch, as with batch norms on "
                "batch statistics: results depend on the batch size and on the order of the images"
            )
        averages_outputs = all(
            isinstance(attack, APGD) and attack.samples > 1 for attack in attacks
        )
        if is_random and not averages_outputs:
            warnings.append(
                "the model answers differently each time: "
                "use version 'rand' for a randomised defence"
            )
        if uses_autograd:
            warnings.append(
                "the model computes gradients in its forward pass: AutoAttack is not reliable for "
                "defences that adapt to their input; run an adaptive attack"
            )
        warnings += _find_output_warnings(logits)
        is_differentiable = True
        if not all(isinstance(attack, Square) for attack in attacks):
            is_differentiable, zero_counts = _count_zero_gradients(
                model, x, y, rng, eps, batch_size
            )
            warnings += _find_gradient_warnings(is_differentiable, zero_counts, len(x))
    return ModelProperties(logits.shape[1], is_random, is_differentiable, tuple(warnings))


def adapt_attack(
    attack: SingleAttack, properties: ModelProperties
) -> tuple[SingleAttack | None, str | None]:
    """Replace or skip an attack that cannot run on a model.

    Args:
        attack: The planned attack.
        properties: Properties of the model.

    Returns:
        The attack to run (None to skip it), and a warning (None if `attack` runs unchanged).
    """
    if not properties.is_differentiable and isinstance(attack, PGD | APGD | MultiTargeted | FAB):
        return None, "left out: it needs a gradient"
    if isinstance(attack, APGD):
        min_classes = {"dlr": 3, "dlr-targeted": 4}.get(attack.loss, 2)
        if properties.n_classes < min_classes:
            warning = (
                f"the {attack.loss} loss needs {min_classes} logits, "
                f"the model has {properties.n_classes}: run with the cw loss"
            )
            return attack.replace(loss="cw"), warning
    return attack, None


def check_labels(labels: IntArray | Tensor, n_classes: int) -> None:
    """Check that the model has a logit for each label.

    Args:
        labels: Labels, (N,) integers, N at least 1.
        n_classes: Number of logits.

    Raises:
        SpecError: If a label is not in 0..n_classes-1.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= n_classes:
        raise SpecError(
            f"y must lie in 0..{n_classes - 1}, as the model has {n_classes} logits; "
            f"got {low} to {high}"
        )


def find_collapse_warning(predicted: IntArray, labels: IntArray) -> str | None:
    """Return a warning if a model predicts one class for examples of several classes.

    Args:
        predicted: Predicted classes, (N,).
        labels: Labels, (N,).

    Returns:
        One line, or None.
    """
    classes = set(predicted.tolist())
    if len(predicted) > 1 and len(classes) == 1 and len(set(labels.tolist())) > 1:
        return f"the model predicts class {classes.pop()} for every example: it has collapsed"
    return None


def find_all_wrong_warning(predicted: IntArray, labels: IntArray, n_classes: int) -> str | None:
    """Return a warning if a model is right on no example, and chance would be on some.

    Args:
        predicted: Predicted classes, (N,).
        labels: Labels, (N,).
        n_classes: Number of logits.

    Returns:
        One line, or None.
    """
    if (predicted == labels).any() or (1 - 1 / n_classes) ** len(labels) > _MAX_CHANCE:
        return None
    return (
        f"the model is right on none of the {len(labels)} examples: its order of classes (labels "
        "from 0?), range of pixels or normalisation may be another"
    )


def find_square_masking_warning(accuracy_before: float, accuracy_after: float) -> str | None:
    """Return a warning if Square broke many examples that white-box attacks did not break.

    Args:
        accuracy_before: Robust accuracy before Square, in [0, 1].
        accuracy_after: Robust accuracy after Square, in [0, 1].

    Returns:
        One line, or None if the difference is at most MAX_SQUARE_DROP.
    """
    drop = accuracy_before - accuracy_after
    if drop > MAX_SQUARE_DROP:
        return (
            f"Square lowered robust accuracy by {100 * drop:.2f} points after the white-box "
            "attacks: gradients are masked, and the true robust accuracy may be lower; "
            "run an adaptive attack"
        )
    return None


def _run_repeated_forwards(
    model: nn.Module, x: Tensor, batch_size: int
) -> tuple[list[Tensor], bool]:
    """Return the outputs of repeated forward passes, and whether a pass computes gradients."""
    parts = torch.split(x, batch_size)
    with torch.no_grad():
        try:
            outputs = []
            for _ in range(N_REPEATED_FORWARDS):
                # A model gets a copy of the images, because it may change them.
                answers = [model(part.clone()) for part in parts]
                are_tensors = all(isinstance(answer, Tensor) for answer in answers)
                outputs.append(torch.cat(answers) if are_tensors else answers[0])
            return outputs, forward_uses_autograd(model, parts[0])
        except SpecError:
            raise
        except Exception as error:
            line = str(error).partition("\n")[0]
            raise SpecError(
                f"the model cannot take float32 images of shape {tuple(x.shape[1:])}: {line}; "
                f"{TILE_HINT}"
            ) from error


def _check_logits(logits: object, y: Tensor) -> None:
    """Raise SpecError unless `logits` is a finite tensor (N, 2 or more) that covers all labels."""
    if not isinstance(logits, Tensor):
        raise SpecError(describe_wrong_output(logits))
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise SpecError(
            f"the model must return (N, 2 or more) logits, it returned {tuple(logits.shape)}"
        )
    check_labels(y, logits.shape[1])
    if not torch.isfinite(logits).all():
        raise SpecError("the model returns logits that are not finite: no attack can be run on it")


def _logits_differ(logits: Tensor, reference: Tensor, tolerance: float) -> bool:
    """Return whether logits differ beyond rounding, relative to the gap between two classes.

    Each logit has its own rounding error, and the scale is a gap between two classes. So a common
    offset, or classes that are masked by -1e9, do not hide a difference.
    """
    if logits.shape != reference.shape:
        return True
    first, second = reference.double(), logits.double()
    rounding = 8 * torch.finfo(reference.dtype).eps * torch.maximum(first.abs(), second.abs())
    top = first.topk(2, dim=1).values
    scale = (top[:, 0] - top[:, 1]).max()
    return bool(((first - second).abs() - rounding > tolerance * scale).any())


def _depends_on_batch(model: nn.Module, x: Tensor) -> bool:
    """Return whether the logits of an image depend on the other images of its batch."""
    n_rows = max(1, len(x) // 2)
    others = x.flip(1, 2, 3) if len(x) == 1 else x[n_rows:]
    with torch.no_grad():
        alone = model(x[:n_rows].repeat(2, 1, 1, 1))[:n_rows]
        among_others = model(torch.cat([x[:n_rows], others]))[:n_rows]
    return _logits_differ(alone, among_others, _BATCH_DEPENDENCE_TOLERANCE)


def _find_output_warnings(logits: Tensor) -> list[str]:
    """Return warnings for outputs that are probabilities or the same for every example."""
    warnings = []
    sum_errors = (logits.sum(1) - 1).abs()
    is_in_unit_range = bool(
        (logits >= -PROBABILITY_TOLERANCE).all() and (logits <= 1 + PROBABILITY_TOLERANCE).all()
    )
    if is_in_unit_range and bool((sum_errors <= PROBABILITY_TOLERANCE).all()):
        warnings.append(
            "the outputs are probabilities: give the logits, or losses lose their gradient"
        )
    elif is_in_unit_range:
        warnings.append(
            "all outputs lie in [0, 1]: if they are probabilities, as of sigmoids, give the "
            "logits, or losses lose their gradient"
        )
    if len(logits) > 1 and not _logits_differ(
        logits, logits[:1].expand_as(logits), _CONSTANT_TOLERANCE
    ):
        warnings.append("the model returns the same logits for every example: it is constant")
    return warnings


def _find_gradient_warnings(
    is_differentiable: bool, zero_counts: dict[str, int], n_examples: int
) -> list[str]:
    """Return warnings for a missing gradient, or for losses whose gradient is zero on some rows."""
    if not is_differentiable:
        return ["the model has no gradient with respect to its input: only Square can be run"]
    # The margin has no softmax that can saturate.
    reason = "its gradient is masked" if zero_counts["margin"] else "its softmax saturates"
    return [
        f"{count} of {n_examples} examples looked at have zero {loss} gradient ({reason}): "
        f"attacks on the {loss} loss are unreliable"
        for loss, count in zero_counts.items()
        if count
    ]


def _count_zero_gradients(
    model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng, eps: float, batch_size: int
) -> tuple[bool, dict[str, int]]:
    """Return whether logits have a gradient, and {loss name: number of rows with zero gradient}.

    Only rows that are classified correctly are counted. Gradients are computed at random points
    within eps of x.
    """
    noise = rng.symmetric_uniform(tuple(x.shape[1:]), x.dtype)
    points = (x + eps * noise).clamp(0, 1)
    zero_counts = {"CE": 0, "margin": 0}
    parts = zip(torch.split(points, batch_size), torch.split(y, batch_size), strict=True)
    for point, labels in parts:
        try:
            gradients = _compute_loss_gradients(model, point, labels)
        except Exception as error:
            logger.info("no gradient: the model fails for images that require one: %s", error)
            gradients = None
        if gradients is None:
            return False, {}
        is_correct, gradient_by_loss = gradients
        for loss, grad in gradient_by_loss.items():
            is_zero = (grad.flatten(1) == 0).all(1) & is_correct
            zero_counts[loss] += int(is_zero.sum())
    return True, zero_counts


def _compute_loss_gradients(
    model: nn.Module, point: Tensor, y: Tensor
) -> tuple[Tensor, dict[str, Tensor]] | None:
    """Return whether rows are correct, (N,), and the gradients of two losses; None without any.

    A model may detach its input and still return logits that require a gradient.
    """
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(point.clone()).to(point.dtype)
        if not logits.requires_grad:
            return None
        cross_entropy = F.cross_entropy(logits, y, reduction="sum")
        (ce_grad,) = torch.autograd.grad(cross_entropy, point, retain_graph=True, allow_unused=True)
        margin = true_class_margin(logits, y).sum()
        (margin_grad,) = torch.autograd.grad(margin, point, allow_unused=True)
    if ce_grad is None or margin_grad is None:
        return None
    return logits.detach().argmax(1) == y, {"CE": ce_grad, "margin": margin_grad}
