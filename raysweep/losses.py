"""Per-example training losses: (logits, natural_logits, y) -> (N,). Reduction and weights are the
method's business.

`logits` are those of the view that a term looks at, `natural_logits` those of the natural data (N,
C), y (N,) int64.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
LossName = Literal["ce", "margin", "bce", "kl", "kl_misclassified"]


def cross_entropy(logits: Tensor, natural_logits: Tensor, y: Tensor) -> Tensor:
    """-log p_y: cross-entropy (G eq. 1)."""
    return F.cross_entropy(logits, y, reduction="none")


def mart_margin(logits: Tensor, natural_logits: Tensor, y: Tensor) -> Tensor:
    """-log(1 - max_{k != y} p_k): MART's margin term (G eq. 9), with MART's 1e-4 against log 0."""
    wrong = F.softmax(logits, 1).scatter(1, y[:, None], 0.0).amax(1)
    return -torch.log(1.0001 - wrong + 1e-12)


def boosted_cross_entropy(logits: Tensor, natural_logits: Tensor, y: Tensor) -> Tensor:
    """Boosted cross-entropy, the sum of `ce` and `margin` (G eq. 9, l_margin)."""
    return cross_entropy(logits, natural_logits, y) + mart_margin(logits, natural_logits, y)


def kl_divergence(logits: Tensor, natural_logits: Tensor, y: Tensor) -> Tensor:
    """KL(p(x) || p(x~)) (L eq. 16); the gradient flows into both."""
    natural = F.log_softmax(natural_logits, 1)
    return (natural.exp() * (natural - F.log_softmax(logits, 1))).sum(1)


def misclassification_weighted_kl(logits: Tensor, natural_logits: Tensor, y: Tensor) -> Tensor:
    """KL times 1 - p_y(x) (G eq. 9). The factor is part of the loss, not a weight: MART
    differentiates it.
    """
    natural_true = F.softmax(natural_logits, 1).gather(1, y[:, None])[:, 0]
    return kl_divergence(logits, natural_logits, y) * (1.0000001 - natural_true)


LOSSES: dict[LossName, LossFunction] = {
    "ce": cross_entropy,
    "margin": mart_margin,
    "bce": boosted_cross_entropy,
    "kl": kl_divergence,
    "kl_misclassified": misclassification_weighted_kl,
}
