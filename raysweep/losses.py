"""Training losses per example: functions (logits, natural_logits, y) -> losses (N,).

All losses have the same arguments, but some ignore a part of them:

- logits (N, classes): logits of the input of the term, natural or adversarial images.
- natural_logits (N, classes): logits of the natural images.
- y (N,) int64: true labels.

The method multiplies the losses by instance weights and averages them. p is the softmax of the
logits. "G eq." and "L eq." cite the papers of GAIRAT and LRAT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeAlias

from raysweep.lazy_modules import F, torch

if TYPE_CHECKING:
    from torch import Tensor

LossFunction: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"
LossName = Literal["ce", "margin", "bce", "kl", "kl_misclassified"]


def cross_entropy(logits: Tensor, natural_logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy -log p_y (L eq. 11)."""
    return F.cross_entropy(logits, y, reduction="none")


def mart_margin(logits: Tensor, natural_logits: Tensor, y: Tensor) -> Tensor:
    """Return MART's margin term -log(1 - max_{k != y} p_k), the second summand in G eq. 9.

    As in MART's code, the constant is 1.0001 instead of 1, which keeps the logarithm finite.
    """
    max_wrong = F.softmax(logits, 1).scatter(1, y[:, None], 0.0).amax(1)
    return -torch.log(1.0001 - max_wrong + 1e-12)


def boosted_cross_entropy(logits: Tensor, natural_logits: Tensor, y: Tensor) -> Tensor:
    """Return MART's boosted cross-entropy l_margin, the sum of `ce` and `margin` (G eq. 9)."""
    return cross_entropy(logits, natural_logits, y) + mart_margin(logits, natural_logits, y)


def kl_divergence(logits: Tensor, natural_logits: Tensor, y: Tensor) -> Tensor:
    """Return KL(p(x) || p(x~)) (L eq. 16); the gradient flows into both logits."""
    natural = F.log_softmax(natural_logits, 1)
    return (natural.exp() * (natural - F.log_softmax(logits, 1))).sum(1)


def misclassification_weighted_kl(logits: Tensor, natural_logits: Tensor, y: Tensor) -> Tensor:
    """Return KL(p(x) || p(x~)) (1 - p_y(x)), the second term of MART (G eq. 9).

    The factor 1 - p_y(x) is a part of the loss and not an instance weight, because MART's gradient
    includes it.
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
