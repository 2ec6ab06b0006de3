"""The config of a run: layers of settings, defaults of data sets, settings without effect."""

from typing import Any

import pytest
import torch

from raysweep.catalog import METHODS
from raysweep.spec import SpecError
from raysweep.training.config import OptimizerSpec, TrainingConfig, build_training_config
from raysweep.training.speed_settings import ComputeSpec

WRITTEN_OUT: dict[str, Any] = {
    "attacks": {"pgd": {"kind": "pgd"}},
    "terms": {
        "a": {"on": "pgd", "weight": {"kind": "geometry", "burn_in": 2}},
        "b": {"on": "pgd", "weight": {"kind": "margin", "burn_in": 5}},
        "c": {"on": "natural"},
    },
}


def test_later_layers_win_over_earlier_ones_and_all_over_the_defaults_of_the_data_set() -> None:
    assert build_training_config("at").epochs == 8
    assert build_training_config("at", {"epochs": 3}).epochs == 3
    assert build_training_config(
        "at", {"epochs": 3, "seed": 1}, {"epochs": 4}
    ) == build_training_config("at", {"epochs": 4, "seed": 1})
    assert build_training_config(
        "at", {"data.name": "cifar10"}, {"data.name": "digits"}
    ) == build_training_config("at")


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        # Madry et al. 2018 attack MNIST with 0.3, CIFAR-10 with 8/255.
        (
            "mnist",
            {
                "eps": 0.3,
                "lr": [0.05, 0.005, 0.0005],
                "at": [19, 20, 27],
                "every": 1,
                "val_size": 5000,
            },
        ),
        # Rice et al. 2020 carve 1,000 examples for validation.
        (
            "cifar10",
            {
                "eps": 8 / 255,
                "lr": [0.1, 0.01, 0.001],
                "at": [28, 29, 59],
                "every": 2,
                "val_size": 1000,
            },
        ),
        # G appendix C.3: a tenth of the rate, which falls at epochs 30 and 60, counted from 1.
        (
            "svhn",
            {
                "eps": 8 / 255,
                "lr": [0.01, 0.001, 0.0001],
                "at": [28, 29, 59],
                "every": 1,
                "val_size": 1000,
            },
        ),
    ],
)
def test_defaults_of_data_sets(name: str, facts: dict[str, Any]) -> None:
    config = build_training_config("at", {"data.name": name})
    assert config.method.attacks["pgd"].eps == config.validation.attacks["cw"].eps == facts["eps"]
    assert [config.resolve_at(epoch).optim.lr for epoch in facts["at"]] == facts["lr"]
    assert (config.validation.every, config.data.val_size) == (facts["every"], facts["val_size"])
    assert (config.optim.momentum, config.optim.weight_decay, config.batch_size) == (0.9, 5e-4, 128)


@pytest.mark.parametrize("data", ["digits", "mnist", "cifar10", "svhn", "arrays"])
def test_bare_methods_differ_in_nothing_but_the_method(data: str) -> None:
    """One threat model, attack, network and optimizer for each data set."""
    configs = [build_training_config(name, {"data.name": data}) for name in METHODS]
    rests = {config.replace(method=METHODS["at"]()).digest() for config in configs}
    assert len(rests) == 1
    attacks = [attack for config in configs for attack in config.method.attacks.values()]
    sizes = {(a.eps, a.step_size, a.steps) for a in attacks if hasattr(a, "eps")}
    assert len(sizes) == 1
    (eps, _, steps), validation = sizes.pop(), configs[0].validation
    tests = [*validation.attacks.values(), *validation.finish.values()]
    assert {attack.eps for attack in tests} == {eps} and steps == 10


def test_bare_methods_on_cifar10() -> None:
    """The threat model of G section 4.1 and the optimizer of G appendix C.3."""
    config = build_training_config("gairat", {"data.name": "cifar10"})
    attack = config.method.attacks["pgd"]
    assert (attack.norm, attack.eps, attack.step_size) == ("Linf", 8 / 255, 2 / 255)
    assert config.epochs == 100 and config.model.name == "resnet18"


def test_validation_has_the_epsilon_of_the_last_epoch_unless_it_is_set() -> None:
    growing = {"method.attacks.pgd.eps": {"kind": "linear", "first": 0.0, "last": 0.1, "end": 10}}
    config = build_training_config("at", {"epochs": 5, **growing})
    assert [attack.eps for attack in config.validation.attacks.values()] == pytest.approx(
        [0.04, 0.04]
    )
    assert config.validation.finish["multi_targeted"].eps == pytest.approx(0.04)
    assert build_training_config("at", {"epochs": 30, **growing}).validation.attacks[
        "pgd"
    ].eps == pytest.approx(0.1)
    chosen = build_training_config(
        "at", {"epochs": 5, **growing, "validation.attacks.pgd.eps": 0.2}
    ).validation
    assert (chosen.attacks["pgd"].eps, chosen.attacks["cw"].eps) == (0.2, 0.15)
    everywhere = build_training_config("at", {"*.eps": 0.07})
    assert everywhere.method.attacks["pgd"].eps == everywhere.validation.attacks["cw"].eps == 0.07
    assert build_training_config("standard").validation.attacks["pgd"].eps == 0.15, (
        "without an attack in training, the epsilon of the data set"
    )


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(SpecError, match=r"optim\.nesterov needs optim\.momentum > 0"):
        build_training_config("at", {"optim.nesterov": True, "optim.momentum": 0.0})
    assert build_training_config("at", {"optim.momentum": 0.0}).optim.nesterov is False
    assert build_training_config("at", {"optim.nesterov": True}).optim.nesterov is True
    for wrong in ({"momentum": 1.0}, {"momentum": -0.1}, {"weight_decay": -1e-4}, {"lr": -0.1}):
        with pytest.raises(SpecError):
            OptimizerSpec.from_data(wrong)


def test_the_burn_in_of_a_run_is_its_longest() -> None:
    assert TrainingConfig.from_data({"method": WRITTEN_OUT}).burn_in == 5
    assert (
        build_training_config(WRITTEN_OUT, {"*.burn_in": 0}).burn_in
        == build_training_config("at").burn_in
        == 0
    )


@pytest.mark.parametrize(
    ("method", "changes", "starts"),
    [
        ("gairat", {"*.burn_in": 8},
         ["method.terms.pgd.weight.burn_in = 8: the weights never act in 8 epochs"]),
        ("gairat", {"*.burn_in": 7}, []),
        ("gairat", {"*.burn_in": 1, "epochs": 1, "optim.lr": 0.1},
         ["method.terms.pgd.weight.burn_in = 1: the weights never act in 1"]),
        ("at", {"data.data_dir": "/there", "data.name": "digits"},
         ["data.data_dir = /there: not read: digits come with scikit-learn"]),
        ("rst", {"data.data_dir": "/there", "data.unlabeled": "more.npz"}, []),
        ("rst", {}, ["data.unlabeled is not set: rst trains on labelled data alone"]),
        ("gair-rst", {"*.burn_in": 1},
         ["data.unlabeled is not set: gair-rst trains on labelled data alone"]),
        ("mma", {"compute.compile": True},
         ["compute.compile = true: method.attacks.minimal shrinks its batch"]),
        ("at", {"compute.compile": True}, []),
        ("at", {"compute.compile": True, "method.attacks.pgd.tau": 0},

         ["compute.compile = true: method.attacks.pgd"]),
        ("trades", {"compute.train": "bf16"}, []),
    ],
)  # fmt: skip
def test_settings_that_do_nothing_are_named(
    method: str, changes: dict[str, Any], starts: list[str]
) -> None:
    lines = build_training_config(method, changes).list_warnings()
    assert len(lines) == len(starts) and all(map(str.startswith, lines, starts)), lines


def test_auto_is_resolved_for_a_device_and_explicit_choices_stay() -> None:
    cpu = torch.device("cpu")
    assert ComputeSpec().resolve(cpu) == ComputeSpec(channels_last=True, fold=True, tf32=False)
    chosen = ComputeSpec(channels_last=False, fold=False, tf32=False, attack="bf16", compile=True)
    assert chosen.resolve(cpu) == chosen
    assert ComputeSpec(fold=False).resolve(cpu) == ComputeSpec(
        channels_last=True, fold=False, tf32=False
    )


def test_a_config_without_settings_has_the_documented_defaults() -> None:
    """G appendix C.3's: 100 epochs, batches of 128, lower rates from epochs 30 and 60."""
    config = TrainingConfig.from_data({"method": "at"})
    assert (config.epochs, config.batch_size, config.seed, config.collapse_after) == (
        100,
        128,
        0,
        20,
    )
    assert [config.resolve_at(epoch).optim.lr for epoch in (0, 28, 29, 58, 59)] == [
        0.1,
        0.1,
        0.01,
        0.01,
        0.001,
    ]
    assert config.optim.nesterov is False and config.validation.objective == "robust_worst"


def test_defaults_of_mnist_and_svhn() -> None:
    """Madry et al.'s threat model for MNIST; for SVHN the learning rates of G appendix C.3."""
    mnist = build_training_config("gairat", {"data.name": "mnist"})
    attack = mnist.method.attacks["pgd"]
    assert (attack.eps, attack.step_size, mnist.method.terms["pgd"].weight.burn_in) == (
        0.3,
        0.04,
        10,
    )
    assert (mnist.data.val_size, mnist.model.name, mnist.epochs, mnist.batch_size) == (
        5000,
        "digits_cnn",
        30,
        128,
    )
    assert [mnist.resolve_at(epoch).optim.lr for epoch in (19, 20, 26, 27)] == [
        0.05,
        0.005,
        0.005,
        0.0005,
    ]
    assert (
        build_training_config("mma", {"data.name": "mnist"}).method.attacks["minimal"].d_max == 0.45
    )
    fat = build_training_config("fat", {"data.name": "mnist"})
    assert [fat.resolve_at(epoch).method.attacks["pgd"].tau for epoch in (9, 10, 19, 20)] == [
        0,
        3,
        3,
        6,
    ]
    svhn = build_training_config("gairat", {"data.name": "svhn"})
    assert [svhn.resolve_at(epoch).optim.lr for epoch in (28, 29, 58, 59)] == [
        0.01,
        0.001,
        0.001,
        0.0001,
    ]
    assert (svhn.model.name, svhn.data.val_size, svhn.epochs) == ("resnet18", 1000, 100)
