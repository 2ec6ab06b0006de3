"""Models as other people write them, in training: the weights of a plain loop by hand."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from strangers import (
    STRANGERS,
    AutocastsInside,
    CachesInEvalMode,
    ChangesItsInput,
    FlattensByView,
    KeepsBatchNormsInTrainMode,
    Plain,
)
from torch import Tensor, nn

from raysweep.data import load_data
from raysweep.models import MODELS
from raysweep.rng import ExampleRng
from raysweep.spec import SpecError
from raysweep.training.config import TrainingConfig
from raysweep.training.model_variants import ModelVariants
from raysweep.training.trainer import build_model_variants, train_model

CPU = torch.device("cpu")
TRAINED: dict[str, Callable[[], nn.Module]] = {
    name: (lambda make=make: make()[0]) for name, make in STRANGERS.items() if name != "exported"
} | {
    "autocast inside": AutocastsInside,
    "batch norms in train mode": KeepsBatchNormsInTrainMode,
    "plain": Plain,
}

# In bf16, rounding decides the sign of a few gradients.
TOLERANCES = {"autocast inside": 0.03}


def config_of(**changes: object) -> TrainingConfig:
    settings = {"model.name": "stranger", "data.train_size": 64, "batch_size": 32, "epochs": 1}
    return tiny("at", **settings | {"*.lr": 0.05, "*.eps": 0.1} | changes)


@pytest.fixture(autouse=True)
def register(monkeypatch) -> Callable[[nn.Module], nn.Module]:
    """Function that makes a model the one that training builds."""

    def make(model: nn.Module) -> nn.Module:
        monkeypatch.setitem(MODELS, "stranger", lambda channels, classes: model)
        return model

    make(Plain())
    return make


class CopiesImages(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.clone()).to(x.dtype)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key.removeprefix("0."): value.clone() for key, value in model.state_dict().items()}


def train_by_hand(model: nn.Module, config: TrainingConfig) -> None:
    """PGD-AT of Madry et al.: no fast path, no variant; a copy of the images in each call."""
    data, optim = load_data(config.data), config.resolve_at(0).optim
    method = config.resolve_at(0).method
    optimizer = torch.optim.SGD(
        model.parameters(), optim.lr, optim.momentum, weight_decay=optim.weight_decay
    )

    def call(x: Tensor) -> Tensor:
        return model(x.clone())

    for batch in data.iter_train_batches(config.batch_size, config.seed, 0):
        rng = ExampleRng.for_examples(batch.index, config.seed, "train", 0)
        ((name, attack),) = method.attacks.items()
        draws = rng.derive_stream("attack", name).symmetric_uniform(batch.x.shape[1:])
        x_adv = (batch.x + attack.eps * draws).clamp(0, 1)
        model.eval()
        for _ in range(attack.steps):
            x_adv = x_adv.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(call(x_adv), batch.y), x_adv)
            moved = x_adv + attack.step_size * gradient.sign()
            x_adv = batch.x + (moved - batch.x).clamp(-attack.eps, attack.eps)
            x_adv = x_adv.clamp(0, 1).detach()
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(call(x_adv), batch.y).backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", sorted(TRAINED))
def test_a_strangers_model_is_trained_as_by_hand(name: str, register, tmp_path: Path) -> None:
    model, by_hand = TRAINED[name](), TRAINED[name]()
    register(model)
    before = state_of(model)
    config = config_of()
    train_by_hand(by_hand, config)
    result = train_model(config, tmp_path)
    found, expected = state_of(model), state_of(by_hand)
    assert found.keys() == expected.keys()
    changed = [key for key in found if not torch.equal(before[key], expected[key])]
    assert len(changed) >= 6, "the loop by hand has trained"
    for key, value in found.items():
        assert torch.allclose(value, expected[key], rtol=1e-3, atol=TOLERANCES.get(name, 1e-4)), key
    # The objective of a sweep: a copy of the images in each call, no other fast path.
    validation_set = config.validation.select_split(load_data(config.data))
    by_hand.eval()
    expected_metrics = config.validation(CopiesImages(by_hand), validation_set)
    for metric in ("clean", "pgd", "cw", "robust_worst"):
        # One image of 50 may lie on the boundary.
        assert result.last_checkpoint.last_metrics[metric] == pytest.approx(
            expected_metrics[metric], abs=0.021
        ), metric


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        (FlattensByView, ["channels-last memory: RuntimeError: view size is not compatible"]),
        (Plain, []),
    ],
)
def test_what_is_left_out_is_said(model_type, words, register, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    register(model_type())
    config = config_of()
    variants = build_model_variants(config, load_data(config.data), CPU)
    lines = [record.getMessage() for record in caplog.records]
    fallbacks = [line for line in lines if line.startswith("fallback")]
    assert len(fallbacks) == len(words)
    assert all(word in line for word, line in zip(words, fallbacks, strict=True))
    folded = [m for m in variants.attack_module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not folded, "batch norms are folded whatever the memory format is"
    is_channels_last = variants.memory_format is torch.channels_last
    assert is_channels_last == (not words)


class KeepsItsFirstWeights(Plain):
    """In eval mode it computes with a tensor that it made from its weights once."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = self.head.weight.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.head.weight if self.training else self.scale.copy_(self.head.weight)
        return F.linear(self.features(x).flatten(1), weight, self.head.bias)


class DependsOnTheFormat(Plain):
    def forward(self, x: Tensor) -> Tensor:
        is_contiguous = self.features(x).is_contiguous()
        return super().forward(x) * (1 if is_contiguous else -1)


class CountsItsCopies(Plain):
    """A copy that computes something else."""

    def __deepcopy__(self, memo: dict) -> "CountsItsCopies":
        other = CountsItsCopies()
        other.load_state_dict(self.state_dict())
        return other


class DiffersWhenCompiled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        logits = x.flatten(1)[:, :10]
        return -logits if torch.compiler.is_compiling() else logits


def test_a_copy_that_does_not_follow_the_weights_is_left_out(register, caplog) -> None:
    """It equals the model when it is made; after the first step it would be attacked as it was."""
    caplog.set_level("INFO")
    model = register(CountsItsCopies())
    before = copy.deepcopy(model.state_dict())
    config = config_of()
    variants = build_model_variants(config, load_data(config.data), CPU)
    assert variants.attack_module is variants.model
    assert "without folded batch norms: the results differ" in caplog.text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("model_type", [KeepsItsFirstWeights, DependsOnTheFormat, CachesInEvalMode])
def test_attacks_of_training_see_the_present_weights(model_type, register, tmp_path) -> None:
    by_hand = model_type()
    model = register(model_type())
    config = config_of(**{"data.train_size": 128})
    train_by_hand(by_hand, config)
    train_model(config, tmp_path)
    for key, value in state_of(model).items():
        assert torch.allclose(value, by_hand.state_dict()[key], rtol=1e-3, atol=1e-4), key


def test_images_stay_as_they_are_where_a_model_changes_them(register) -> None:
    """TRADES computes the natural images twice, beside the adversarial ones."""
    register(ChangesItsInput())
    config = config_of()
    variants = build_model_variants(config, load_data(config.data), CPU)
    x = torch.rand(4, 1, 8, 8)
    given = x.clone()
    for module in (variants.train_module, variants.attack_module):
        module(given)
        assert torch.equal(given, x)


@pytest.mark.slow
def test_what_computes_something_else_when_compiled_is_not_compiled(caplog) -> None:
    x, compute = torch.rand(8, 1, 8, 8), config_of().compute.replace(compile=True).resolve(CPU)
    variants = ModelVariants(DiffersWhenCompiled(), x, compute)
    assert "computing without torch.compile: " in caplog.text
    assert torch.equal(variants.train_module(x), variants.model(x))


class ReturnsTuple(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return 4 * self.head(features.flatten(1)), features


class ReturnsFewLogits(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :7]


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (ReturnsTuple, "model 'stranger' returns tuple: return the logits alone"),
        (ReturnsFewLogits, "returns shape (8, 7) for 8 images: return logits of shape (8, 10)"),
        (lambda: STRANGERS["exported"]()[0], "model 'stranger' has no training mode"),
    ],
)
def test_what_cannot_be_trained_is_one_line(make, line: str, register, tmp_path: Path) -> None:
    register(make())
    with pytest.raises(SpecError) as error:
        train_model(config_of(), tmp_path)
    (problem,) = error.value.problems
    assert line in problem
