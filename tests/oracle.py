"""Stored results of the authors' code (data/losses), with their network, images and noise."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

DATA = Path(__file__).parent / "data" / "losses"


class OracleNet(nn.Module):
    """The network that the stored numbers were computed with; logits (N, 10) of (N, 3, 32, 32)."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.linear = nn.Linear(256, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.linear(nn.functional.avg_pool2d(x, 2).flatten(1))


@cache
def stored(name):
    """The arrays of tests/data/losses/NAME.npz."""
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


@dataclass(frozen=True)
class Noise:
    """Stands for an `Rng`: the draws are the stored ones, whatever the stream; `cw` has a normal
    draw of its own.
    """

    normals: str = "gauss_noise_1"
    uniforms: torch.Tensor | None = None

    def derive_stream(self, *names):
        return Noise("gauss_noise_2" if names[-1] == "cw" else "gauss_noise_1", self.uniforms)

    def symmetric_uniform(self, shape, dtype):
        if self.uniforms is not None:
            return self.uniforms.to(dtype) * 2 - 1
        return stored("inputs")["uniform_noise"].to(dtype) / 0.031

    def normal(self, shape, dtype):
        return stored("inputs")[self.normals].to(dtype)


class Oracle:
    """Network, images, labels and noise in float64."""

    def __init__(self):
        inputs = stored("inputs")
        self.x, self.y = inputs["x"].double(), inputs["y"]
        self.noise = Noise()
        self.model = OracleNet()
        self.model.load_state_dict({k[6:]: v for k, v in inputs.items() if k.startswith("param.")})
        self.model.double().train()
