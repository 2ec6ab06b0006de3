"""A cheap test for masked gradients: an attack that is stronger on scaled logits indicates them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysweep.attacks import PGD
from raysweep.data import Split
from raysweep.rng import ExampleRng


class ScaledLogits(nn.Module):
    """A model whose logits are multiplied by a positive factor; its decisions are unchanged.

    Args:
        model: The model.
        factor: The factor.
    """

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model = model
        self.factor = factor
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to scaled logits (N, classes)."""
        logits: Tensor = self.model(x)
        return self.factor * logits


def estimate_scaling_gap(
    model: nn.Module,
    split: Split,
    attack: PGD,
    survivor_mask: Tensor,
    logit_scales: Sequence[float],
    sample_fraction: float = 1.0,
    batch_size: int = 512,
) -> float:
    """Estimate the share of examples that `attack` breaks only if the logits are scaled.

    Where the cross-entropy is saturated, as in reweighted models, its gradient is nearly 0, and PGD
    fails. The cross-entropy of scaled logits is not saturated there (Hitaj et al. 2021).

    Args:
        model: Maps images in [0, 1], (N, C, H, W), to logits.
        split: The examples, of which the first N are used.
        attack: PGD on the cross-entropy.
        survivor_mask: (N,) bool: which examples are correct under `attack`.
        logit_scales: Positive factors for the logits, tried in order.
        sample_fraction: Share of the examples to test, in (0, 1]. Whether an example is tested
            depends on its id only, and not on how workers divide the split.
        batch_size: Examples in a batch.

    Returns:
        The share of the N examples, in [0, 1], extrapolated from the tested ones.
    """
    n_examples = len(survivor_mask)
    sample_rng = ExampleRng.for_examples(split.index[:n_examples], 0, "validation", "share")
    draws = sample_rng.uniform((1, 1, 1))[:, 0, 0, 0]
    tested = (survivor_mask & (draws < sample_fraction)).nonzero()[:, 0]
    n_broken = 0
    for rows in torch.split(tested, batch_size):
        survivors = rows
        for factor in logit_scales:
            if not len(survivors):
                break
            x, y = split.get_float_images(survivors), split.y[survivors]
            rng = ExampleRng.for_examples(split.index[survivors], 0, "validation", "scaled")
            x_adv = attack(ScaledLogits(model, factor), x, y, rng).x_adv
            with torch.no_grad():
                survivors = survivors[model(x_adv).argmax(1) == y]
        n_broken += len(rows) - len(survivors)
    return n_broken / (sample_fraction * n_examples)
