"""Steepness of the loss around adversarial examples (GAIRAT, appendix C.1, figures 4 and 10)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raysweep.attacks import PGD, freeze_model
from raysweep.attacks.base import l2_norms
from raysweep.data import Split
from raysweep.lazy_modules import F, torch
from raysweep.rng import ExampleRng

if TYPE_CHECKING:
    from torch import Tensor, nn


def input_gradient_norm(
    model: nn.Module, split: Split, attack: PGD, n_examples: int, batch_size: int = 512
) -> dict[str, float]:
    """Measure the mean L2 norm of the cross-entropy's input gradient at adversarial examples.

    Args:
        model: Maps images in [0, 1], (N, C, H, W), to logits.
        split: The examples.
        attack: PGD whose eps, step size and start are used, with 20 steps on the cross-entropy.
        n_examples: Number of examples, the first ones of the split.
        batch_size: Examples in a batch.

    Returns:
        `flatness_friendly`, at friendly adversarial examples (PGD-20-0, which stops at the first
        wrong prediction), and `flatness_adversarial`, at those of PGD-20. Larger is steeper.
    """
    pgd20 = attack.replace(loss="ce", steps=20, tau=None)
    attacks = {
        "flatness_friendly": pgd20.replace(tau=0.0),
        "flatness_adversarial": pgd20,
    }
    totals = dict.fromkeys(attacks, 0.0)
    with freeze_model(model):
        for start in range(0, n_examples, batch_size):
            rows = slice(start, min(start + batch_size, n_examples))
            x, y = split.get_float_images(rows), split.y[rows]
            for name, variant in attacks.items():
                rng = ExampleRng.for_examples(split.index[rows], 0, "flatness")
                x_adv = variant(model, x, y, rng).x_adv
                totals[name] += _per_example_gradient_norms(model, x_adv, y).sum().item()
    return {name: total / n_examples for name, total in totals.items()}


def _per_example_gradient_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Compute the L2 norm of each row's input gradient of the cross-entropy at `x`, (N,)."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    return l2_norms(grad).flatten()
