"""Choice of N examples of a split, such as the test examples of an evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from raysweep.data.split_tensors import Split
from raysweep.lazy_modules import torch
from raysweep.rng import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

SubsetChoice = Literal["balanced", "proportional", "first"]
SUBSET_CHOICES: tuple[SubsetChoice, ...] = ("balanced", "proportional", "first")
DEFAULT_SUBSET: SubsetChoice = "balanced"
# All evaluations use the same examples, so that models can be compared on them.
_SUBSET_SEED = 0
_MAX_LISTED_CLASSES = 5


def choose_subset_rows(y: Tensor, n_examples: int, choice: SubsetChoice = DEFAULT_SUBSET) -> Tensor:
    """Choose examples, the same ones in each call.

    Args:
        y: Labels, (N,) int64.
        n_examples: Number of examples, 1 or more; at most N are chosen.
        choice: "balanced" for equally many of each class (plus or minus one) as far as a class has
            enough, "proportional" for the shares that the classes have among all examples, "first"
            for the first ones. The first two draw at random with a fixed seed, and a larger number
            of balanced examples includes a smaller one.

    Returns:
        Row numbers in ascending order, (min(n_examples, N),) int64, on the device of `y`.
    """
    labels = y.cpu()
    n_total = len(labels)
    if choice == "first" or n_examples >= n_total:
        return torch.arange(min(n_examples, n_total), device=y.device)
    generator = torch.Generator().manual_seed(derive_seed(_SUBSET_SEED, "test subset"))
    draws = torch.rand(n_total, generator=generator, dtype=torch.float64)
    shuffled = draws.argsort()
    # Rank of each example among those of its class, in random order.
    rank = torch.empty(n_total, dtype=torch.float64)
    for label in torch.unique(labels):
        members = shuffled[labels[shuffled] == label]
        position = torch.arange(len(members), dtype=torch.float64)
        # Proportional: the k-th of n members comes after a share of (k + 1/2) / n of all examples.
        is_balanced = choice == "balanced"
        rank[members] = position if is_balanced else (position + 0.5) / len(members)
    by_rank = shuffled[rank[shuffled].argsort(stable=True)]
    return by_rank[:n_examples].sort().values.to(y.device)


def choose_covering_rows(split: Split, n_examples: int) -> Tensor | slice:
    """Choose examples of a split for a measurement, with all its classes if there are enough.

    Args:
        split: The split.
        n_examples: Number of examples; all of a smaller split.

    Returns:
        The first examples, as a slice, if these have all classes of the split; otherwise row
        numbers of equally many examples of each class.
    """
    if n_examples >= len(split):
        return slice(0, len(split))
    if len(torch.unique(split.y[:n_examples])) == len(torch.unique(split.y)):
        return slice(0, n_examples)
    return choose_subset_rows(split.y, n_examples)


def find_subset_warnings(y: Tensor, rows: Tensor, choice: SubsetChoice) -> list[str]:
    """Describe why accuracies on a subset may not be those on all examples.

    Args:
        y: Labels of all examples, (N,) int64.
        rows: Row numbers of the chosen ones, (M,) int64.
        choice: How they were chosen.

    Returns:
        One line for missing classes, and one if a balanced subset is of examples that are not.
    """
    warnings = []
    present, counts = torch.unique(y, return_counts=True)
    chosen = torch.unique(y[rows])
    missing = present[~torch.isin(present, chosen)]
    if len(missing):
        warnings.append(
            f"the {len(rows)} examples (subset {choice!r}) have no example of "
            f"{format_classes(missing.tolist())} of the {len(present)} classes of the test set"
        )
    elif choice == "balanced" and int(counts.max()) > 1.5 * int(counts.min()):
        warnings.append(
            f"the {len(rows)} examples (subset 'balanced') have equally many of each class as far "
            f"as possible, the whole test set has {int(counts.min())} to {int(counts.max())}: its "
            "accuracy differs; subset 'proportional' keeps the shares"
        )
    return warnings


def format_classes(classes: list[int]) -> str:
    """Format some class numbers, the first few of many, as `class 1, 2 and 3 more`."""
    shown = ", ".join(str(label) for label in classes[:_MAX_LISTED_CLASSES])
    n_others = len(classes) - _MAX_LISTED_CLASSES
    return f"class {shown}" if n_others <= 0 else f"class {shown} and {n_others} more"
