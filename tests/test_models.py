"""Every architecture: parameter count, shapes, seeds."""

import pytest
import torch

from raysweep.evaluation.attack_model import make_attack_model
from raysweep.models import MODELS, ModelSpec
from raysweep.spec import SpecError

# CIFAR form, 3 channels and 10 classes. SmallCNN and digits_cnn are sums of their layers by hand;
# the others are the figures published with the architectures.
PARAMETERS = {
    "digits_cnn": 864 + 18_432 + 36_864 + 2 * (32 + 64 + 64) + 32_896 + 1_290,
    "small_cnn": 1_792
    + 36_928
    + 73_856
    + 147_584
    + 225_988
    + 345_940
    + 2 * 2 * (64 + 128 + 196)
    + 803_072
    + 2_570,
    "vgg13": 9_416_010,
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "preact_resnet18": 11_171_146,
    "preact_resnet18_bn": 11_172_170,
    "wrn_28_10": 36_479_194,
    "wrn_32_10": 46_160_474,
    "wrn_34_10": 46_160_474,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = MODELS[name](3, 10)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", [n for n in MODELS if not n.startswith("wrn")])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_logits_for_small_and_full_images(name, channels, size):
    model = ModelSpec(name=name).build_model(channels, 10, seed=0).eval()
    with torch.no_grad():
        assert model(torch.rand(2, channels, size, size)).shape == (2, 10)


def test_a_narrow_wide_resnet_runs():
    from raysweep.models.wide_resnet import WideResNet

    assert WideResNet(1, 1, 3, 10)(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_weights_depend_on_the_seed_alone():
    first, again, other = (ModelSpec().build_model(1, 10, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_normalisation_is_a_layer_and_is_checked():
    spec = ModelSpec(mean=(0.5,), std=(0.25,))
    x = torch.rand(2, 1, 8, 8)
    plain, normalised = ModelSpec().build_model(1, 10, 0).eval(), spec.build_model(1, 10, 0).eval()
    torch.testing.assert_close(normalised(x), plain((x - 0.5) / 0.25))
    with pytest.raises(SpecError, match=r"model\.mean"):
        spec.build_model(3, 10, 0)


def test_unknown_names_get_a_suggestion():
    with pytest.raises(SpecError, match="resnet18"):
        ModelSpec.from_data({"name": "resnet8"})


def test_networks_and_checks_leave_torchs_generators_and_no_stack_traces_behind() -> None:
    torch.manual_seed(5)
    queued, state = len(torch.cuda._queued_calls), torch.get_rng_state()
    weights = [ModelSpec().build_model(1, 10, seed).state_dict() for seed in (3, 3, 4)]
    make_attack_model(ModelSpec().build_model(1, 10, 3), torch.zeros(2, 1, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(torch.cuda._queued_calls) == queued
    same, other = (
        all(torch.equal(weights[0][key], two[key]) for key in two) for two in weights[1:]
    )
    assert same and not other
