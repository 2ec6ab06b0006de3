"""Fast paths hold to the plain computation: the same attack, the same step, and no say in any
verdict.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import ONE_RUN, TINY, tiny
from torch import Tensor, nn

from raysweep.attacks import PGD, AttackCascade
from raysweep.data import DatasetSplits, load_data
from raysweep.models import MODELS, ModelSpec
from raysweep.models.layers import Logits, conv3x3
from raysweep.rng import ExampleRng
from raysweep.spec import SpecError, apply_overrides
from raysweep.training.config import build_training_config
from raysweep.training.model_variants import ModelVariants
from raysweep.training.prefix_cache import prefix_keys
from raysweep.training.speed_settings import ComputeSpec
from raysweep.training.trainer import build_model_variants, compute_step_gradients, train_model

CPU = torch.device("cpu")
BF16 = {"compute.attack": "bf16", "compute.train": "bf16"}
OFF = {f"compute.{name}": False for name in ("channels_last", "fold", "tf32")}


def lived_in(model: nn.Module, seed: int = 0) -> nn.Module:
    """With weights and statistics of batch norms that training could have left."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model


def build_narrow(name: str) -> nn.Module:
    """Build the network with an eighth of the channels where it has 64 or more: what can be folded
    depends on how layers are connected, not on their widths.
    """

    def narrow(width: int) -> int:
        return width // 8 if width >= 64 else width

    if name in ("digits_cnn", "small_cnn"):
        return ModelSpec(name=name).build_model(3, 10, 0)
    with torch.device("meta"):
        model = MODELS[name](3, 10)
    torch.manual_seed(0)
    for place, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d):
            assert layer.groups == 1
            widths = narrow(layer.in_channels), narrow(layer.out_channels)
            shape = layer.kernel_size, layer.stride, layer.padding
            built: nn.Module = nn.Conv2d(*widths, *shape, bias=layer.bias is not None)
        elif isinstance(layer, nn.BatchNorm2d):
            built = nn.BatchNorm2d(narrow(layer.num_features))
        elif isinstance(layer, nn.Linear):
            built = type(layer)(narrow(layer.in_features), narrow(layer.out_features))
        else:
            continue
        model.set_submodule(place, built)
    return model


def largest_difference(faces: ModelVariants, x: Tensor) -> float:
    """Greatest difference between what attacks meet and the model in eval mode, relative to the
    largest logit.
    """
    training = faces.model.training
    with torch.no_grad():
        expected, met = faces.model.eval()(x), faces.attack_module(x)
    faces.model.train(training)
    return float((expected - met).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_every_network_is_attacked_as_it_is(name) -> None:
    side = 16 if name.startswith("vgg") else 8
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    faces = ModelVariants(lived_in(build_narrow(name)), x, ComputeSpec().resolve(CPU))
    norms = [m for m in faces.model.modules() if isinstance(m, nn.BatchNorm2d)]
    left = [m for m in faces.attack_module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(left) < len(norms)
    assert largest_difference(faces, x) < 1e-5
    lived_in(faces.model, seed=1)
    faces.model.get_parameter(next(k for k, _ in faces.model.named_parameters())).data.mul_(1.5)
    assert largest_difference(faces, x) > 1e-3
    faces.sync_folded_weights()
    assert largest_difference(faces, x) < 1e-5


def test_a_norm_that_shares_its_convolutions_output_is_not_folded() -> None:
    x = torch.rand(2, 3, 16, 16)
    faces = ModelVariants(build_narrow("preact_resnet18"), x, ComputeSpec().resolve(CPU))
    assert isinstance(faces.attack_module.get_submodule("blocks.0.bn1"), nn.BatchNorm2d), (
        "the block's shortcut takes it"
    )
    assert isinstance(faces.attack_module.get_submodule("blocks.0.bn2"), nn.Identity)


@cache
def exact_gradient(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and the attack's gradient in float64."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(9, 3, 16, 16, generator=generator), torch.arange(9)
    model = lived_in(build_narrow(name)).eval().requires_grad_(False)
    return x, y, PGD()._compute_gradient(model.double(), x.double(), y, None)[1]


@pytest.mark.parametrize(
    "path", [OFF, {}, {"compute.fold": False}], ids=["plain", "default", "channels last"]
)
@pytest.mark.parametrize("name", ["digits_cnn", "resnet18", "preact_resnet18", "vgg13"])
def test_the_attacks_gradient_is_as_near_to_float64s_as_the_plain_one_is(name, path) -> None:
    x, y, exact = exact_gradient(name)
    model = lived_in(build_narrow(name)).eval().requires_grad_(False)
    faces = ModelVariants(
        model, x, apply_overrides(build_training_config("at"), path).compute.resolve(CPU)
    )
    _, found = PGD()._compute_gradient(faces.attack_module, x, y, None)
    error = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert error.median() < 1e-5, "in a row or two a ReLU may switch"


@pytest.fixture(scope="module")
def trained_network(digits: DatasetSplits) -> dict[str, Tensor]:
    return some_learned(ModelSpec(name="digits_cnn").build_model(1, 10, 0), digits)


def some_learned(model: nn.Module, digits: DatasetSplits) -> dict[str, Tensor]:
    """Weights that have some of the digits right, so that kappa is of several sizes."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1, momentum=0.9)
    for _ in range(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            model(digits.train.get_float_images(slice(None))), digits.train.y
        ).backward()
        optimizer.step()
    return model.state_dict()


class Stepped:
    """One step on digits: its result, gradient as one vector, and batch norm statistics."""

    def __init__(
        self,
        method: str,
        data: DatasetSplits,
        weights: dict[str, Tensor],
        changes: dict[str, object],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = apply_overrides(
            build_training_config(method, TINY),
            {"*.attacks.*.steps": 5, "*.burn_in": 0},
            on_missing="ignore",
        )
        config = apply_overrides(config, changes)
        model = config.model.build_model(data.channels, data.classes, 0).to(dtype)
        model.load_state_dict(weights)
        self.faces = ModelVariants(
            model, data.train.get_float_images(slice(0, 1)).to(dtype), config.compute.resolve(CPU)
        )
        self.faces.model.train()
        self.met = 0
        self.faces.attack_module.register_forward_hook(
            lambda *_: setattr(self, "met", self.met + 1)
        )
        batch = next(iter(data.iter_train_batches(24, 0, 0)))
        batch = replace(batch, x=batch.x.to(dtype))
        rng = ExampleRng.for_examples(batch.index, 0, "train", 0)
        self.step = compute_step_gradients(config.resolve_at(0).method, self.faces, batch, rng)
        self.kappa = torch.cat(
            [a.kappa for a in self.step.attack_results.values() if a.kappa is not None]
        )
        self.grad = torch.cat(
            [p.grad.flatten() for p in self.faces.model.parameters() if p.grad is not None]
        )
        self.statistics = torch.cat([b.flatten().float() for b in self.faces.model.buffers()])

    def largest_differences(self, other: "Stepped") -> dict[str, float]:
        """Share of rows with another kappa; relative differences of the loss, the gradient and the
        statistics.
        """
        return {
            "kappa": (self.kappa != other.kappa).float().mean().item(),
            "loss": abs(self.step.loss.item() / other.step.loss.item() - 1),
            "grad": float((self.grad - other.grad).norm() / other.grad.norm()),
            "statistics": float(
                (self.statistics - other.statistics).norm() / other.statistics.norm()
            ),
        }


@pytest.fixture(scope="module")
def plain_step(
    digits: DatasetSplits, trained_network: dict[str, Tensor]
) -> Callable[[str, str], Stepped]:
    """The step in float64 with all fast paths off, computed once for each method and norm."""
    return cache(
        lambda method, norm: Stepped(
            method, digits, trained_network, OFF | {"method.attacks.*.norm": norm}, torch.float64
        )
    )


METHODS = ["gairat", "lrat", "gair-fat", "trades", "gair-mart", "mma"]
PATHS: dict[str, dict[str, object]] = {
    "default": {},
    "channels last": {"compute.fold": False},
    "folded": {"compute.channels_last": False},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_plain_step(method, path, digits, trained_network, plain_step) -> None:
    """In float64: in float32 a pixel whose gradient is near 0 may move the other way, by the
    machine.
    """
    for norm in ("Linf", "L2"):
        changes = {"method.attacks.*.norm": norm}
        plain = plain_step(method, norm)
        assert len(plain.kappa.unique()) > 2, "a comparison of something"
        found = Stepped(
            method, digits, trained_network, PATHS[path] | changes, torch.float64
        ).largest_differences(plain)
        assert found["kappa"] == 0 and max(found.values()) < 1e-8, found


@pytest.mark.parametrize("method", ["gairat", "lrat"])
def test_bf16_changes_a_step_by_no_more_than_it_says(method, digits, trained_network) -> None:
    """Kappa of one row in twenty, the loss by 5%, the gradient by half: another random start does
    more.
    """
    plain = Stepped(method, digits, trained_network, OFF)
    attack = Stepped(method, digits, trained_network, {"compute.attack": "bf16"})
    both = Stepped(method, digits, trained_network, BF16)
    for fast in (attack, both):
        found = fast.largest_differences(plain)
        assert 0 < found["grad"] < 0.5 and found["loss"] < 0.05 and found["kappa"] <= 0.05
        assert all(a.x_adv.dtype == torch.float32 for a in fast.step.attack_results.values())
        assert fast.step.loss.dtype == fast.grad.dtype == torch.float32


def test_an_attack_in_train_mode_meets_the_model_itself(digits, trained_network) -> None:
    train_mode = {"method.attacks.pgd.mode": "train"}
    plain, fast = (
        Stepped("gairat", digits, trained_network, train_mode | path) for path in (OFF, {})
    )
    assert fast.met == 0 and fast.largest_differences(plain)["statistics"] < 1e-4
    assert Stepped("gairat", digits, trained_network, {}).met == 5
    assert (
        Stepped("gairat", digits, trained_network, {}).largest_differences(plain)["statistics"]
        > 1e-3
    ), "such an attack moves them"


@pytest.mark.slow
def test_a_compiled_attack_is_the_plain_attack(digits, monkeypatch) -> None:
    """On a network with one layer of each kind, because compiling takes seconds for each layer."""
    # Otherwise Inductor compiles a program of its own for each instruction set that /proc/cpuinfo
    # names, to try it.
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", True)

    def network() -> nn.Module:
        torch.manual_seed(0)
        layers = conv3x3(1, 16, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), Logits(256, 10)
        return nn.Sequential(*layers)

    state = some_learned(network(), digits)
    method = apply_overrides(
        build_training_config("gairat", TINY).resolve_at(0).method, {"attacks.pgd.steps": 3}
    )
    found = []
    for changes in (OFF, {"compute.compile": True}):
        compute = build_training_config("gairat", TINY, changes).compute.resolve(CPU)
        faces = ModelVariants(network(), digits.train.get_float_images(slice(0, 1)), compute)
        faces.model.load_state_dict(state)
        faces.sync_folded_weights()
        rows = slice(0, 32)
        rng = ExampleRng.for_examples(digits.train.index[rows], 0)
        found.append(
            method.attacks["pgd"](
                faces.attack_module, digits.train.get_float_images(rows), digits.train.y[rows], rng
            )
        )
    assert torch.equal(found[0].kappa, found[1].kappa) and len(found[0].kappa.unique()) > 1
    assert ((found[0].x_adv - found[1].x_adv).abs() > 1e-5).float().mean() < 0.01


@pytest.mark.parametrize("changes", [OFF, {}, BF16], ids=["plain", "default", "bf16"])
def test_verdicts_are_those_of_the_weights_alone(changes, tmp_path) -> None:
    config = build_training_config("lrat", TINY, ONE_RUN, {"epochs": 1, **changes})
    saved = train_model(config, tmp_path).last_checkpoint
    model = saved.load_weights(config.model.build_model(1, 10, 0))
    again = config.validation(model.eval(), load_data(config.data).val)
    again["robust_margin"] = round(again["robust_margin"], 4)
    assert {name: saved.last_metrics[name] for name in again} == again


def test_training_with_fast_paths_learns_what_plain_training_learns(tmp_path) -> None:
    """Not bit for bit: training makes much of a difference in a last bit, whoever brings it in."""
    losses = {}
    for name, changes in {"plain": OFF, "default": {}, "bf16": BF16}.items():
        config = build_training_config(
            "gairat",
            TINY,
            ONE_RUN,
            {
                "epochs": 3,
                "validation.every": 3,
                "data.train_size": 256,
                "*.burn_in": 1,
                "*.attacks.*.steps": 1,
                **changes,
            },
        )
        rows = train_model(config, tmp_path / name).last_checkpoint.history
        losses[name] = rows[0]["train/loss"]
        assert rows[-1]["clean"] > 0.3
    assert abs(losses["default"] / losses["plain"] - 1) < 0.01
    assert abs(losses["bf16"] / losses["plain"] - 1) < 0.05


def test_momentum_is_laid_out_as_the_parameters_again(tmp_path) -> None:
    config = tiny("at", data__train_size=32, data__val_size=10, epochs=1)
    saved = train_model(config, tmp_path).last_checkpoint
    faces = build_model_variants(config, load_data(config.data), CPU)
    optimizer = torch.optim.SGD(faces.model.parameters(), lr=0.1, momentum=0.9)
    saved.load_training_state(faces.model, optimizer)
    assert not all(parameter.is_contiguous() for parameter in faces.model.parameters())
    for parameter in faces.model.parameters():
        assert optimizer.state[parameter]["momentum_buffer"].stride() == parameter.stride()


def list_compute_warnings(method: str, changes: dict) -> list[str]:
    config = build_training_config(method, TINY, changes)
    return [line for line in config.list_warnings() if line.startswith("compute.")]


def test_a_kl_attack_in_bf16_is_warned_of() -> None:
    assert list_compute_warnings("lrat", BF16) == []
    (line,) = list_compute_warnings("trades", BF16)
    assert line.startswith("compute.attack = bf16: method.attacks.kl starts 0.001 from the image")


def test_compiling_an_attack_whose_batch_shrinks_is_warned_of() -> None:
    compiled = {"compute.compile": True, "*.burn_in": 0}
    assert list_compute_warnings("gairat", compiled) == []
    (line,) = list_compute_warnings("gair-fat", compiled)
    assert line.startswith("compute.compile = true: method.attacks.pgd shrinks its batch")


class Replayed(nn.Module):
    """As a CUDA graph does, each forward overwrites what the last one gave."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.last = net, torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.last.fill_(torch.nan)
        logits: Tensor = self.net(x)
        self.last = logits.detach()
        return logits


@pytest.mark.parametrize("method", METHODS)
def test_an_attack_reads_no_output_after_the_next_forward(method, digits, trained_network) -> None:
    config = apply_overrides(build_training_config(method, TINY), {"*.attacks.*.steps": 5})
    faces, rows = build_model_variants(config, digits, CPU), slice(0, 32)
    faces.model.load_state_dict(trained_network)
    faces.sync_folded_weights()
    x, y, rng = (
        digits.train.get_float_images(rows),
        digits.train.y[rows],
        ExampleRng.for_examples(digits.train.index[rows], 0),
    )
    for attack in config.resolve_at(0).method.attacks.values():
        plain, replayed = (
            attack(net, x, y, rng) for net in (faces.attack_module, Replayed(faces.attack_module))
        )
        assert torch.equal(plain.x_adv, replayed.x_adv) and torch.equal(plain.kappa, replayed.kappa)


def test_the_chain_of_prefixes_names_what_was_computed_not_how_it_was_said() -> None:
    base = prefix_keys(tiny("at"), "data")
    assert base == prefix_keys(
        build_training_config("at", TINY, ONE_RUN, {"compute.fold": True, "compute.tf32": False}),
        "data",
    )
    others = [{"compute.fold": False}, {"compute.channels_last": False}, {"compute.compile": True}]
    others += [{"compute.attack": "bf16"}, {"compute.train": "bf16"}]
    keys = {
        prefix_keys(build_training_config("at", TINY, ONE_RUN, changes), "data")[1]
        for changes in others
    }
    assert len(keys) == 5 and base[1] not in keys


def test_what_a_device_has_not_is_refused(tmp_path) -> None:
    assert ComputeSpec().resolve(torch.device("cpu")).tf32 is False
    with pytest.raises(
        SpecError, match=r"compute.tf32 = true: there is no TF32 on cpu; leave it to auto"
    ):
        train_model(build_training_config("at", TINY, {"compute.tf32": True}), tmp_path, device=CPU)
    with pytest.raises(
        SpecError, match=r"validation.tf32 = true: there is no TF32 on cpu; leave it false"
    ):
        train_model(
            build_training_config("at", TINY, {"validation.tf32": True}), tmp_path, device=CPU
        )
    attack = AttackCascade(
        attacks={"pgd": PGD(eps=0.1, step_size=0.05, steps=1)}, tf32=True
    ).to_json_dict()
    with pytest.raises(
        SpecError, match=r"validation.finish.worst.tf32 = true: there is no TF32 on cpu"
    ):
        train_model(
            build_training_config("at", TINY, {"validation.finish": {"worst": attack}}),
            tmp_path,
            device=CPU,
        )
    with pytest.raises(SpecError, match=r"compute.attack = 'fp16': must be 'float32' or 'bf16'"):
        build_training_config("at", TINY, {"compute.attack": "fp16"})
