"""The optimizer without PyTorch's compiler: same results, and no import of the compiler."""

import sys

import pytest
import torch
from torch import nn

from raysweep.training.eager_sgd import EagerSGD


def train(make: type[torch.optim.SGD], nesterov: bool) -> tuple[list[torch.Tensor], list[object]]:
    """Return the weights after each of three steps, and the momentum buffers."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    images = torch.randn(6, 5, generator=generator)
    optimizer = make(model.parameters(), lr=0.0, momentum=0.9, nesterov=nesterov)
    weights = []
    for step in range(3):
        for group in optimizer.param_groups:
            group |= {"lr": 0.1 / (step + 1), "weight_decay": 1e-3}
        model.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return weights, [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]


@pytest.mark.parametrize("nesterov", [False, True])
def test_results_are_those_of_pytorch_without_its_compiler(
    monkeypatch: pytest.MonkeyPatch, nesterov: bool
) -> None:
    expected_weights, expected_momentum = train(torch.optim.SGD, nesterov)
    # From here on, an import of the compiler fails.
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    weights, momentum = train(EagerSGD, nesterov)
    for found, expected in zip(
        [*weights, *momentum], [*expected_weights, *expected_momentum], strict=True
    ):
        assert torch.equal(found, expected)
        assert not found.requires_grad
