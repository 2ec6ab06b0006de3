"""How steep the loss is where the model is weak (G appendix C.1, fig. 4 and 10)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysweep.attacks import PGD, freeze_model
from raysweep.attacks.base import l2_norms
from raysweep.data import Split
from raysweep.rng import ExampleRng


def input_gradient_norm(
    model: nn.Module, split: Split, attack: PGD, n_examples: int, batch_size: int = 512
) -> dict[str, float]:
    """Mean Euclidean norm of the CE's gradient at friendly (PGD-20-0) and most adversarial data
    (PGD-20).

    Over the first `count` examples of the split, with `attack`'s eps, step size and start; larger
    is more curved.
    """
    most = attack.replace(loss="ce", steps=20, tau=None)
    kinds = {
        "flatness_friendly": most.replace(tau=0.0),
        "flatness_adversarial": most,
    }
    totals = dict.fromkeys(kinds, 0.0)
    with freeze_model(model):
        for start in range(0, n_examples, batch_size):
            rows = slice(start, min(start + batch_size, n_examples))
            x, y = split.get_float_images(rows), split.y[rows]
            for name, kind in kinds.items():
                rng = ExampleRng.for_examples(split.index[rows], 0, "flatness")
                totals[name] += (
                    _per_example_gradient_norms(model, kind(model, x, y, rng).x_adv, y).sum().item()
                )
    return {name: total / n_examples for name, total in totals.items()}


def _per_example_gradient_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Norm of the gradient of each row's CE at x, (N,)."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    return l2_norms(grad).flatten()
