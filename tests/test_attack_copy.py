"""The copy of a model that attacks run on: which batch norms it folds, and that it computes what
the model does.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysweep.evaluation.attack_model import (
    FixedSizeBatches,
    copy_model,
    forward_uses_autograd,
    make_attack_model,
)
from raysweep.evaluation.batchnorm_folding import find_foldable_batch_norms, fold_batch_norms_
from raysweep.evaluation.float32_precision import disable_tf32_and_autocast
from raysweep.models.device import get_model_device


class Net(nn.Module):
    """Some convolutions and norms, put together by f(self, x)."""

    def __init__(self, f: Callable[["Net", Tensor], Tensor], **norm: object) -> None:
        super().__init__()
        self.f = f
        self.conv, self.conv2 = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
        )
        self.norm, self.norm2 = nn.BatchNorm2d(4, **norm), nn.BatchNorm2d(4, **norm)  # type: ignore[arg-type]
        self.head = nn.Linear(4, 5)
        generator = torch.Generator().manual_seed(0)
        for norm_ in (self.norm, self.norm2):
            if norm_.running_mean is not None:
                norm_.running_mean.copy_(torch.randn(4, generator=generator))
                norm_.running_var.copy_(torch.rand(4, generator=generator) + 0.1)  # type: ignore[union-attr]
            if norm_.affine:
                norm_.weight.data.copy_(torch.randn(4, generator=generator))
                norm_.bias.data.copy_(torch.randn(4, generator=generator))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.f(self, x).mean((2, 3)))


X = torch.rand(20, 3, 6, 6, generator=torch.Generator().manual_seed(1))
BOTH = {"norm": "conv", "norm2": "conv2"}


def chain(net: Net, x: Tensor) -> Tensor:
    return net.norm2(net.conv2(net.norm(net.conv(x)).relu())).relu()


def changed_in_place(net: Net, x: Tensor) -> Tensor:
    z = net.conv(x)
    z.add_(1.0)
    return net.norm(z)


def concatenated(net: Net, x: Tensor) -> Tensor:
    z = net.conv(x)
    return net.norm(z) + torch.cat([z, z], 1)[:, :4]


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (chain, BOTH),
        (lambda net, x: net.norm2(net.conv2(net.norm(net.conv(x)))), BOTH),
        # The skip connection uses the output of the norm, not that of the convolution.
        (lambda net, x: (z := net.norm(net.conv(x))) + net.norm2(net.conv2(z.relu())), BOTH),
        (lambda net, x: net.norm(net.conv(x).relu()), {}),
        (lambda net, x: net.norm(net.conv(x) + 1), {}),
        (lambda net, x: net.conv2(net.norm(net.conv(x).relu())), {}),
        (lambda net, x: net.norm2(net.conv2(net.norm(net.conv(x).relu()))), {"norm2": "conv2"}),
        (lambda net, x: net.norm(net.conv(x)) + net.norm2(net.conv(x)), {}),
        (lambda net, x: net.norm(net.conv(x)) + net.conv(x), {}),
        (lambda net, x: net.norm2(net.conv2(net.norm(net.conv(x)))) + net.norm2(net.conv(x)), {}),
        (lambda net, x: net.norm(net.conv2(net.norm(net.conv(x)))), {}),
        (lambda net, x: net.norm(z := net.conv(x)) + z, {}),
        (lambda net, x: net.norm(z := net.conv(x)) + z.mean(), {}),
        (lambda net, x: net.norm(net.conv(x)) * F.relu(input=net.conv2(net.conv(x))), {}),
        (lambda net, x: net.norm(z := net.conv(x)) + torch.relu(input=z), {}),
        (changed_in_place, {}),
        (concatenated, {}),
    ],
)
def test_which_batch_norms_can_be_folded(f, expected) -> None:
    """A norm that is the only consumer of a convolution's output, if both run once. Outputs never
    change.
    """
    net = Net(f)
    assert find_foldable_batch_norms(net, X) == expected
    assert not any(module._forward_hooks for module in net.modules())
    copied = make_attack_model(net, X)
    assert len([m for m in copied.modules() if isinstance(m, nn.BatchNorm2d)]) == 2 - len(expected)
    assert torch.allclose(copied(X), net(X), atol=1e-5)
    assert (
        fold_batch_norms_(net, X)
        == len(expected)
        == sum(isinstance(m, nn.Identity) for m in net.modules())
    )


@pytest.mark.parametrize("settings", [{"eps": 0.3}, {"affine": False}, {"momentum": None}])
def test_a_folded_norm_is_the_formula(settings) -> None:
    """(conv(x) - mean) / sqrt(var + eps) * weight + bias in float64, in the outputs and in the
    image's gradient.
    """
    net = Net(chain, **settings)
    double = {name: value.double() for name, value in net.state_dict().items()}

    def normalised(z: Tensor, name: str) -> Tensor:
        by_channel = {
            key: double.get(f"{name}.{key}")
            for key in ("running_mean", "running_var", "weight", "bias")
        }
        mean, var, weight, bias = (
            None if v is None else v[:, None, None] for v in by_channel.values()
        )
        z = (z - mean) / (var + settings.get("eps", 1e-5)).sqrt()
        return z if weight is None else z * weight + bias

    def by_hand(x: Tensor) -> Tensor:
        z = normalised(
            F.conv2d(x, double["conv.weight"], double["conv.bias"], padding=1), "norm"
        ).relu()
        z = normalised(F.conv2d(z, double["conv2.weight"], padding=1, groups=2), "norm2").relu()
        return z.mean((2, 3)) @ double["head.weight"].T + double["head.bias"]

    copied = make_attack_model(net, X)
    assert not [m for m in copied.modules() if isinstance(m, nn.BatchNorm2d)]
    point, exact = X.clone().requires_grad_(), X.double().requires_grad_()
    logits, expected = copied(point), by_hand(exact)
    assert torch.allclose(logits.double(), expected, atol=1e-5)
    (grad,) = torch.autograd.grad(logits.square().sum(), point)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), exact)
    assert torch.allclose(grad.double(), expected_grad, atol=1e-5)


def test_a_norm_without_running_statistics_is_not_folded() -> None:
    """It normalises by the statistics of each batch: there is nothing to fold."""
    net = Net(lambda net, x: net.norm(net.conv(x)), track_running_stats=False)
    assert find_foldable_batch_norms(net, X) == {}
    assert torch.allclose(make_attack_model(net, X)(X), net(X), atol=1e-5)


def test_names_of_nested_parts() -> None:
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    net = nn.Sequential(block, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    assert find_foldable_batch_norms(net, X) == {"0.1": "0.0", "3": "2"}
    assert (
        fold_batch_norms_(net, X) == 2
        and isinstance(net[0][1], nn.Identity)
        and isinstance(net[1], nn.BatchNorm2d)
    )


def test_a_norm_is_not_folded_where_that_is_too_inexact() -> None:
    """Where statistics are far larger than the outputs' spread, rounding makes the folded copy
    differ.
    """
    net = Net(lambda net, x: net.norm(net.conv(x)))
    net.conv.weight.data.mul_(1e-3)
    net.norm.running_mean.fill_(1e5)
    net.norm.running_var.fill_(1e-6)
    net.norm.weight.data.fill_(1.0)
    net.conv.bias.data.fill_(1e5)
    assert find_foldable_batch_norms(net, X) == {"norm": "conv"}
    copied = make_attack_model(net, X)
    assert [m for m in copied.modules() if isinstance(m, nn.BatchNorm2d)]
    assert torch.allclose(copied(X), net(X), rtol=1e-4)


def test_a_model_that_reads_its_parts_weights_is_copied_as_it_is() -> None:
    """In a folded copy it would find other weights, or none."""
    for f in (
        lambda net, x: net.norm(net.conv(x)) + net.norm.running_mean[:, None, None],
        lambda net, x: net.norm(net.conv(x)) + F.conv2d(x, net.conv.weight, padding=1),
    ):
        net = Net(f)
        copied = make_attack_model(net, X)
        assert torch.allclose(copied(X), net(X), atol=1e-5)


def test_a_copy_is_frozen_in_eval_mode_and_the_model_is_not() -> None:
    net = Net(chain).train()
    net.norm.eval()
    values = {name: value.clone() for name, value in net.state_dict().items()}
    for fold in (True, False):
        copied = make_attack_model(net, X, fold)
        assert not any(m.training for m in copied.modules())
        assert not any(p.requires_grad for p in copied.parameters())
        copied(X)
    assert net.training and not net.norm.training and all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(value, values[name]) for name, value in net.state_dict().items())
    assert all(p.is_contiguous() for p in net.parameters())


class Caching(nn.Module):
    """Keeps what it computed last, as some models do for their visualizations."""

    def __init__(self, wrap: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.linear, self.wrap, self.last = nn.Linear(2, 2), wrap, None

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        self.last = self.wrap(out)
        return out


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: [x], lambda x: {"scores": x}, lambda x: {"scores": [x]}]
)
def test_a_model_that_keeps_computed_tensors_is_copied(wrap: Callable[[Tensor], object]) -> None:
    model = Caching(wrap).eval()
    expected = model(torch.eye(2))
    copied = copy_model(model)
    assert copied is not None and torch.equal(copied(torch.eye(2)), expected)


def test_batches_are_cut_and_padded_to_the_tile() -> None:
    sizes: list[int] = []

    def f(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x.flatten(1).double()

    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return f(x)

    for tile, rows, expected in (
        (None, 3, [16]),
        (None, 16, [16]),
        (None, 17, [17]),
        (4, 3, [4]),
        (4, 4, [4]),
        (4, 9, [4, 4, 4]),
        (4, 0, [0]),
        (32, 20, [32]),
    ):
        sizes.clear()
        out = FixedSizeBatches(Counted(), tile)(X[:rows])
        assert sizes == expected, (tile, rows)
        assert torch.equal(out, X[:rows].flatten(1)) and (out.dtype == torch.float32 or not rows)


def test_models_that_compute_gradients_in_their_forward() -> None:
    def by_grad(net: Net, x: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x.clone().requires_grad_()
            return x + torch.autograd.grad(point.sum(), point)[0]

    def by_backward(net: Net, x: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x.clone().requires_grad_()
            point.square().sum().backward()
        return x + point.grad

    assert not forward_uses_autograd(Net(chain), X)
    for f in (by_grad, by_backward):
        net = Net(lambda net, x, f=f: chain(net, f(net, x)))
        assert forward_uses_autograd(net, X)
        copied = make_attack_model(net, X)
        with torch.inference_mode():
            logits = copied(X)
        assert torch.allclose(logits, net(X), atol=1e-5)


def test_full_precision_ends_with_its_block() -> None:
    settings = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with disable_tf32_and_autocast(torch.device("cpu")):
                assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        assert [setting.fp32_precision for setting in settings] == ["tf32", "tf32"]
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def test_the_device_of_a_model() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(1, device="meta"))

    assert get_model_device(nn.Flatten()) == torch.device("cpu")
    assert (
        get_model_device(nn.Linear(2, 2, device="meta")).type
        == get_model_device(Buffered()).type
        == "meta"
    )
