"""Reasons to doubt a robustness evaluation, told before and after the attacks run."""

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
    SingleAttack,
    Square,
    freeze_model,
    true_class_margin,
)
from raysweep.evaluation.attack_model import forward_uses_autograd
from raysweep.rng import ExampleRng
from raysweep.spec import SpecError

IntArray = npt.NDArray[np.int64]
# Forwards of the same batch that must agree, and by how much relative to the largest logit (as the
# official package).
N_REPEATED_FORWARDS, REPEATED_FORWARD_TOLERANCE = 5, 1e-5
# Share of examples that Square may break after the white-box attacks before they are doubted
# (official).
MAX_SQUARE_DROP = 0.002
# By how much a probability, or the sum of a row of them, may miss (official).
PROBABILITY_TOLERANCE = 1e-5


@dataclass(frozen=True)
class ModelProperties:
    """What a few passes say of a model: warnings, and what decides which attacks make sense."""

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
) -> ModelProperties:
    """Look at a model on some examples, before any attack. Raises SpecError where no attack can be
    run at all.
    """
    with freeze_model(model):
        with torch.no_grad():
            try:
                runs = [model(x) for _ in range(N_REPEATED_FORWARDS)]
                dynamic = forward_uses_autograd(model, x)
            except Exception as error:
                line = str(error).partition("\n")[0]
                raise SpecError(
                    f"the model cannot take float32 images of shape {tuple(x.shape[1:])}: {line}"
                ) from error
        logits = runs[0]
        if not isinstance(logits, Tensor):
            raise SpecError(
                f"the model must return a tensor of logits, it returned {type(logits).__name__}"
            )
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise SpecError(
                f"the model must return (N, 2 or more) logits, it returned {tuple(logits.shape)}"
            )
        check_labels(y, logits.shape[1])
        if not torch.isfinite(logits).all():
            raise SpecError(
                "the model returns logits that are not finite: no attack can be run on it"
            )
        scale = logits.abs().max().clamp_min(1e-12)
        random = any(
            bool((run - logits).abs().max() > REPEATED_FORWARD_TOLERANCE * scale)
            for run in runs[1:]
        )
        warnings = []
        if random and not all(
            isinstance(attack, APGD) and attack.samples > 1 for attack in attacks
        ):
            warnings.append(
                "the model answers differently each time: use version 'rand' for a randomised defence"
            )
        if dynamic:
            warnings.append(
                "the model takes gradients of its own: AutoAttack says little of defences that adapt to their input; "
                "run an adaptive attack"
            )
        if (
            logits.min() >= -PROBABILITY_TOLERANCE
            and ((logits.sum(1) - 1).abs() <= PROBABILITY_TOLERANCE).all()
        ):
            warnings.append(
                "the outputs are probabilities: give the logits, or losses lose their gradient"
            )
        if len(x) > 1 and bool((logits - logits[:1]).abs().max() <= 1e-6 * scale):
            warnings.append("the model returns the same logits for every example: it is constant")
        differentiable = True
        if not all(isinstance(attack, Square) for attack in attacks):
            differentiable, silent = _count_zero_gradients(model, x, y, rng, eps)
            if not differentiable:
                warnings.append(
                    "the model has no gradient with respect to its input: only Square can be run"
                )
            for loss, count in silent.items():
                if count:
                    reason = (
                        "its gradient is masked" if silent["margin"] else "its softmax saturates"
                    )
                    warnings.append(
                        f"{count} of {len(x)} examples looked at have zero {loss} gradient ({reason}): "
                        f"attacks on the {loss} loss are unreliable"
                    )
    return ModelProperties(logits.shape[1], random, differentiable, tuple(warnings))


def adapt_attack(
    attack: SingleAttack, properties: ModelProperties
) -> tuple[SingleAttack | None, str | None]:
    """The attack that this model allows in place of `attack` (None: leave it out), and what to tell
    the user.
    """
    if not properties.is_differentiable and isinstance(attack, PGD | APGD | FAB):
        return None, "left out: it needs a gradient"
    if isinstance(attack, APGD):
        needed = {"dlr": 3, "dlr-targeted": 4}.get(attack.loss, 2)
        if properties.n_classes < needed:
            told = f"the {attack.loss} loss needs {needed} logits, the model has {properties.n_classes}: run with the cw loss"
            return attack.replace(loss="cw"), told
    return attack, None


def check_labels(labels: IntArray | Tensor, n_classes: int) -> None:
    """Raises SpecError for labels that the model has no logit for."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= n_classes:
        raise SpecError(
            f"y must lie in 0..{n_classes - 1}, as the model has {n_classes} logits; got {low} to {high}"
        )


def find_collapse_warning(predicted: IntArray, labels: IntArray) -> str | None:
    """One line if every example gets the same class."""
    classes = set(predicted.tolist())
    if len(predicted) > 1 and len(classes) == 1 and len(set(labels.tolist())) > 1:
        return f"the model predicts class {classes.pop()} for every example: it has collapsed"
    return None


def find_square_masking_warning(accuracy_before: float, accuracy_after: float) -> str | None:
    """One line if a black-box attack broke what the white-box attacks before it left."""
    if accuracy_before - accuracy_after > MAX_SQUARE_DROP:
        return (
            f"Square lowered robust accuracy by {100 * (accuracy_before - accuracy_after):.2f} points after the white-box attacks: "
            "gradients are masked, and the true robust accuracy may be lower; run an adaptive attack"
        )
    return None


def _count_zero_gradients(
    model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng, eps: float
) -> tuple[bool, dict[str, int]]:
    """Whether there is a gradient, and for each loss how many correctly classified rows have none
    near x.
    """
    point = (
        (x + eps * rng.symmetric_uniform(tuple(x.shape[1:]), x.dtype)).clamp(0, 1).requires_grad_()
    )
    with torch.enable_grad():
        logits = model(point).to(point.dtype)
        if not logits.requires_grad:
            return False, {}
        right = logits.detach().argmax(1) == y
        (ce,) = torch.autograd.grad(
            F.cross_entropy(logits, y, reduction="sum"), point, retain_graph=True
        )
        (cw,) = torch.autograd.grad(true_class_margin(logits, y).sum(), point)
    zero = {
        name: (grad.flatten(1) == 0).all(1) & right for name, grad in (("CE", ce), ("margin", cw))
    }
    return True, {name: int(rows.sum()) for name, rows in zero.items()}
