"""What the arrays of a bundle show: which examples are broken, and which claims are false."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raysweep.attacks import true_class_margin
from raysweep.data import SUBSET_CHOICES, choose_subset_rows
from raysweep.evaluation.shards import (
    compute_norm_limit,
    compute_perturbation_norms,
    is_in_unit_range,
)
from raysweep.robustness_bundle.loading import LoadedBundle

_BATCH_SIZE = 500
# Tolerance for the rounding of a mean of float32 numbers.
_ACCURACY_TOLERANCE = 1e-6
# Logits that differ by less than this part of the largest one may be in another order elsewhere.
_TIE_TOLERANCE = 1e-5
_MAX_TIE_SHARE = 0.01


@dataclass(frozen=True)
class Predictions:
    """Predictions of a model on N images.

    Attributes:
        label: Predicted classes, (N,) int64.
        is_correct: Whether they are right; never for logits that are not finite, (N,) bool.
        is_tie: Whether another machine's rounding could change that, (N,) bool.
    """

    label: Tensor
    is_correct: Tensor
    is_tie: Tensor


@dataclass(frozen=True)
class Evidence:
    """What the N examples of a bundle are on this machine. Masks are (N,) bool.

    Attributes:
        bundle: The bundle.
        clean: Predictions on the test images.
        adversarial: Predictions on the stored examples.
        is_within_eps: Whether the stored example is within the card's radius.
        is_in_range: Whether all its pixels are in [0, 1].
    """

    bundle: LoadedBundle
    clean: Predictions
    adversarial: Predictions
    is_within_eps: Tensor
    is_in_range: Tensor

    @classmethod
    def collect(cls, bundle: LoadedBundle) -> "Evidence":
        """Classify and measure the examples of a bundle."""
        card, test = bundle.card, bundle.test
        x, y = test.get_float_images(bundle.rows), test.y[bundle.rows]
        x_adv = torch.from_numpy(bundle.arrays["x_adv"])
        distances = compute_perturbation_norms(x_adv, x, card.norm)
        return cls(
            bundle=bundle,
            clean=_predict(bundle.model, x, y),
            adversarial=_predict(bundle.model, x_adv, y),
            is_within_eps=distances <= compute_norm_limit(card.eps_value, card.norm),
            is_in_range=is_in_unit_range(x_adv),
        )

    @property
    def is_broken(self) -> Tensor:
        """Whether an example is misclassified, without an attack or within the radius."""
        is_allowed = self.is_within_eps & self.is_in_range
        return ~self.clean.is_correct | (is_allowed & ~self.adversarial.is_correct)

    def find_problems(self) -> list[str]:
        """Return one line for each false claim about examples, and for each false number."""
        arrays, card = self.bundle.arrays, self.bundle.card
        labels = self.bundle.test.y[self.bundle.rows]
        is_robust, is_undecided = torch.from_numpy(arrays["robust"]), self._find_undecided()
        problems = []
        if not torch.equal(torch.from_numpy(arrays["labels"]), labels):
            problems.append("the labels are not the test set's")
        masks_of_false_claims = {
            f"farther than eps {card.eps_value:.6g} from their images": ~self.is_within_eps,
            "outside [0, 1]": ~self.is_in_range,
            "claimed broken, but classified correctly": (
                ~is_robust & self.adversarial.is_correct & ~is_undecided
            ),
            "claimed robust, but misclassified without an attack": (
                is_robust & ~self.clean.is_correct & ~is_undecided
            ),
            "claimed robust, but broken by their stored adversarial example": (
                is_robust & self.clean.is_correct & self.is_broken & ~is_undecided
            ),
        }
        if "predicted" in arrays:
            is_other = torch.from_numpy(arrays["predicted"]) != self.clean.label
            masks_of_false_claims["classified otherwise than claimed without an attack"] = (
                is_other & ~is_undecided
            )
        for description, mask in masks_of_false_claims.items():
            if mask.any():
                problems.append(f"{int(mask.sum())} examples are {description}")
        return [*problems, *self._find_false_numbers(is_robust, is_undecided)]

    def _find_undecided(self) -> Tensor:
        """Return which examples another machine may have classified otherwise; a few at most."""
        is_tie = self.clean.is_tie | self.adversarial.is_tie
        n_allowed = max(1, int(_MAX_TIE_SHARE * len(is_tie)))
        return is_tie if int(is_tie.sum()) <= n_allowed else torch.zeros_like(is_tie)

    def _find_false_numbers(self, is_robust: Tensor, is_undecided: Tensor) -> list[str]:
        """Return one line for each number of the card that is not what was derived."""
        card, n_examples = self.bundle.card, len(is_robust)
        tolerance = int((self.clean.is_tie & is_undecided).sum()) / n_examples
        accuracies = {
            "robust_accuracy": (is_robust, 0.0),
            "clean_accuracy": (self.clean.is_correct, tolerance),
        }
        problems = []
        for name, (mask, allowed) in accuracies.items():
            accuracy, claimed = float(mask.double().mean()), getattr(card, name)
            if abs(accuracy - claimed) > allowed + _ACCURACY_TOLERANCE:
                problems.append(f"{name} is {accuracy:.4f}, the card says {claimed:.4f}")
        if n_examples != card.examples:
            problems.append(f"there are {n_examples} examples, the card says {card.examples}")
        return problems


def find_subset(bundle: LoadedBundle) -> str | None:
    """Find out how the examples of a bundle were chosen from the test set.

    Args:
        bundle: The bundle.

    Returns:
        "all"; a name of `SUBSET_CHOICES`; None if they are none of these.
    """
    rows, y = bundle.rows.sort().values, bundle.test.y
    if len(rows) == len(y):
        return "all"
    for choice in ("first", *SUBSET_CHOICES):
        if torch.equal(rows, choose_subset_rows(y, len(rows), choice)):
            return choice
    return None


def _predict(model: nn.Module, x: Tensor, y: Tensor) -> Predictions:
    """Classify images, (N, C, H, W), and compare with their labels, (N,)."""
    with torch.no_grad():
        logits = torch.cat([model(part) for part in torch.split(x, _BATCH_SIZE)])
    is_finite = torch.isfinite(logits).all(1)
    margin = true_class_margin(logits, y)
    label = logits.argmax(1)
    return Predictions(
        label=label,
        is_correct=(label == y) & is_finite,
        is_tie=is_finite & (margin.abs() <= _TIE_TOLERANCE * logits.abs().amax(1)),
    )
