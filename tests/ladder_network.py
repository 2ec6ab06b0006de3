"""A network with known robustness: each image has a chosen distance to the decision boundary."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Of 2 x 2 pixels: moving all of them by r along these signs raises the height by r.
SIGNS = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
STEEPNESS = 10.0
# Logits of the classes that never win.
NEVER = (-1e6, -1.1e6)


class LadderNetwork(nn.Module):
    """Logits (N, 4) of images (N, C, 2, 2): -10 h, 10 h and two far smaller ones, for an image of
    height h.

    An image of class 1 at height d > 0 (or of class 0 at -d) has the margin 20 d. It is broken by a
    move of r in Linf if r > d, and in L2 if r > 2 d: all four pixels move by the same amount. With
    a second channel of ones the logits are 10,000 times as large, and the cross-entropy has no
    gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(STEEPNESS))
        self.register_buffer("middle", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        height = ((x[:, 0] - self.middle) * SIGNS.to(x)).mean((1, 2))
        value = self.scale * height
        if x.shape[1] > 1:
            value = value * torch.where(x[:, 1].mean((1, 2)) > 0.5, 1e4, 1.0)
        return torch.stack([-value, value, *(0 * value + low for low in NEVER)], 1)


def ladder_images(
    distances: Sequence[float], labels: Sequence[int], steep: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 2, 2), or (N, 2, 2, 2) if some are `steep`, and labels. Rows with a negative
    distance are wrong.
    """
    heights = torch.tensor(
        [d if label == 1 else -d for d, label in zip(distances, labels, strict=True)]
    )
    x = 0.5 + heights[:, None, None, None] * SIGNS
    if len(steep):
        x = torch.cat(
            [x, torch.tensor(steep, dtype=torch.float32)[:, None, None, None].expand(-1, 1, 2, 2)],
            1,
        )
    return x, torch.tensor(labels)
