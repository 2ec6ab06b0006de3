"""A cheap symptom of masked gradients: an attack that gets stronger when the logits it sees are
scaled.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysweep.attacks import PGD
from raysweep.data import Split
from raysweep.rng import ExampleRng


class ScaledLogits(nn.Module):
    """The same decisions from logits times `factor`."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model = model
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
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
    """About which share of the split's first examples survive `attack`, but not on logits times one
    of `scales`.

    survived: (N,) bool, for the first N examples; of these only a `share` is looked at, drawn by
    example, so that workers who divide a split among them look at the same. A cross-entropy that is
    flat where it saturates, as reweighted models have it, hides its gradient from PGD; a scaled one
    shows it (Hitaj et al. 2021).
    """
    draw = ExampleRng.for_examples(
        split.index[: len(survivor_mask)], 0, "validation", "share"
    ).uniform((1, 1, 1))[:, 0, 0, 0]
    broken = 0
    for rows in torch.split((survivor_mask & (draw < sample_fraction)).nonzero()[:, 0], batch_size):
        left = rows
        for factor in logit_scales if len(rows) else ():
            rng = ExampleRng.for_examples(split.index[left], 0, "validation", "scaled")
            found = attack(
                ScaledLogits(model, factor), split.get_float_images(left), split.y[left], rng
            )
            with torch.no_grad():
                left = left[model(found.x_adv).argmax(1) == split.y[left]]
            if not len(left):
                break
        broken += len(rows) - len(left)
    return broken / (sample_fraction * len(survivor_mask))
