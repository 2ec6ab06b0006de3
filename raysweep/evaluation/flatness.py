"""How steep the loss is where the model is weak (G appendix C.1, fig. 4 and 10)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysweep.attacks import PGD, frozen
from raysweep.attacks.base import norms
from raysweep.data import Split
from raysweep.rng import Rng


def flatness(model: nn.Module, split: Split, attack: PGD, count: int, batch_size: int = 512) -> dict[str, float]:
    """Mean Euclidean norm of the CE's gradient at friendly (PGD-20-0) and most adversarial data (PGD-20).

    Over the first `count` examples of the split, with `attack`'s eps, step size and start; larger is more curved.
    """
    most = attack.model_copy(update={"loss": "ce", "steps": 20, "tau": None})
    kinds = {"flatness_friendly": most.model_copy(update={"tau": 0.0}), "flatness_adversarial": most}
    totals = dict.fromkeys(kinds, 0.0)
    with frozen(model):
        for start in range(0, count, batch_size):
            rows = slice(start, min(start + batch_size, count))
            x, y = split.images(rows), split.y[rows]
            for name, kind in kinds.items():
                rng = Rng.for_examples(split.index[rows], 0, "flatness")
                totals[name] += _slopes(model, kind(model, x, y, rng).x, y).sum().item()
    return {name: total / count for name, total in totals.items()}


def _slopes(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Norm of the gradient of each row's CE at x, (N,)."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    return norms(grad).flatten()
