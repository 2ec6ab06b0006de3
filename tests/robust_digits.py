"""A small robust digits network, its test images and the official AutoAttack's verdicts on it
(tests/data/aa).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DATA = Path(__file__).parent / "data" / "aa" / "digits.npz"
with np.load(DATA) as _arrays:
    OFFICIAL = dict(_arrays)


class RobustDigits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 2, 1)
        self.conv3 = nn.Conv2d(64, 64, 3, 2, 1)
        self.fc1 = nn.Linear(256, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu(conv(x))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Wrapped(nn.Module):
    """f(model, x): a defence round the network."""

    def __init__(self, f: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.f = robust_digits(), f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.model, x)


# What is wrapped round the network to fool an evaluation; the official verdicts on the first four
# are in OFFICIAL.
DEFENCES = {
    "quant4": lambda model, x: model((4 * x).round() / 4),
    "scale1000": lambda model, x: 1000 * model(x),
    "softmax": lambda model, x: model(x).softmax(1),
    "random": lambda model, x: model(x + 0.05 * torch.randn_like(x)),
    "constant": lambda model, x: 0 * model(x) + torch.arange(10.0),
    "no gradient": lambda model, x: model(x.detach()),
    "adaptive": lambda model, x: model(x + 0.01 * _confidence_gradient(model, x).sign()),
}


def _confidence_gradient(model: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        return torch.autograd.grad(model(point).amax(1).sum(), point)[0]


def robust_digits() -> RobustDigits:
    model = RobustDigits()
    params = {
        name.removeprefix("param."): torch.tensor(OFFICIAL[name])
        for name in OFFICIAL
        if name.startswith("param.")
    }
    model.load_state_dict(params)
    return model


def digits(count: int = 450, first: int = 0) -> tuple[Tensor, Tensor]:
    rows = slice(first, first + count)
    return torch.tensor(OFFICIAL["x_test"][rows]).float() / 16, torch.tensor(
        OFFICIAL["y_test"][rows]
    )
