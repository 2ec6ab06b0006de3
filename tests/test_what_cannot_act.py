"""Settings that cannot act are said: steps that do not reach epsilon, changes after the last epoch,
searched ranges by their ends. Step sizes in units of epsilon.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raysweep.attacks import PGD
from raysweep.cli import main
from raysweep.pipeline.pipeline import load_pipeline
from raysweep.rng import ExampleRng
from raysweep.spec import SpecError
from raysweep.sweep.search_space import SearchSpace, list_builtin_spaces, load_space
from raysweep.sweep.space_warnings import list_space_warnings
from raysweep.training.config import build_training_config
from raysweep.training.presets import list_presets, resolve_training_config

BURN_IN = "method.terms.pgd.weight.burn_in"
CIFAR = {"data.name": "cifar10"}


@pytest.mark.parametrize(
    ("text", "factor"),
    [("eps/4", 0.25), ("0.25 eps", 0.25), ("2.5*eps/10", 0.25), ("eps", 1.0), (" .5 eps ", 0.5),
     ({"kind": "eps", "factor": "1/10"}, 0.1)],
)  # fmt: skip
def test_a_step_size_in_units_of_epsilon(text: Any, factor: float) -> None:
    config = build_training_config("at", {"*.eps": 0.2, "*.step_size": text})
    attack = config.method.attacks["pgd"]
    assert isinstance(attack, PGD)
    assert attack.to_json_dict()["step_size"] == {"kind": "eps", "factor": factor}
    assert PGD.from_data(attack.to_stored_dict()) == attack
    now = attack.resolve_at(3)
    assert now.step_size == pytest.approx(0.2 * factor)
    assert config.validation.attacks["cw"] == PGD(
        eps=0.2, step_size={"kind": "eps", "factor": factor}, steps=20, loss="cw"
    )


@pytest.mark.parametrize("text", ["eps/0", "0 eps", "-1 eps", "eps/x", "4/eps", "epsilon"])
def test_other_text_is_no_step_size(text: str) -> None:
    with pytest.raises(SpecError, match=r"attacks\.pgd\.step_size") as error:
        build_training_config("at", {"method.attacks.pgd.step_size": text})
    assert len(error.value.problems) == 1


def test_it_follows_a_radius_that_grows() -> None:
    ramp = {"kind": "linear", "first": 0.1, "last": 0.3, "start": 0, "end": 4}
    attack = PGD.from_data({"eps": ramp, "step_size": "eps/4"})
    assert [attack.resolve_at(epoch).step_size for epoch in (0, 2, 9)] == pytest.approx(
        [0.025, 0.05, 0.075]
    )


def test_the_attack_takes_steps_of_that_length() -> None:
    """With one step from the image itself, each pixel moves by the step size."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.tensor([0, 1, 0])
    rng = ExampleRng.for_examples(torch.arange(3), 0, "test")
    for step_size, length in (("eps/4", 0.05), (0.05, 0.05), ("eps", 0.2)):
        attack = PGD.from_data({"eps": 0.2, "step_size": step_size, "steps": 1, "start": "natural"})
        moved = (attack(model, x, y, rng).x_adv - x).abs()
        assert torch.allclose(moved, torch.full_like(moved, length))


def test_the_forms_before_keep_their_digests() -> None:
    assert PGD(step_size=0.01).to_stored_dict()["step_size"] == 0.01
    assert PGD(eps=0.1, step_size=0.025) != PGD.from_data({"eps": 0.1, "step_size": "eps/4"})


@pytest.mark.parametrize(
    ("method", "changes", "expected"),
    [
        # 10 steps of 0.007 reach 0.07; validation takes 20 steps of 2/255: 0.157.
        ("at", {"*.eps": 0.25, "method.attacks.pgd.step_size": 0.007},
         ["method.attacks.pgd.step_size = 0.007: 10 steps reach 0.07, not eps = 0.25; "
          "set it to eps/4, or take more steps"]),
        ("at", CIFAR | {"*.eps": 0.25},
         ["method.attacks.pgd.step_size = 0.007843: 10 steps reach 0.07843, not eps = 0.25; "
          "set it to eps/4, or take more steps"]),
        ("at", CIFAR | {"*.eps": 0.25, "*.step_size": "eps/4"}, []),
        # Exactly epsilon, as in LRAT.
        ("lrat", CIFAR | {"*.eps": 8 / 255, "method.attacks.*.step_size": 8 / 2550}, []),
        ("at", {"method.attacks.pgd.steps": 2},
         ["method.attacks.pgd.step_size = 0.03: 2 steps reach 0.06, not eps = 0.15; "
          "set it to eps, or take more steps"]),
        ("at", {"method.attacks.pgd.eps": {"kind": "linear", "first": 0.1, "last": 0.4, "end": 6}},
         ["method.attacks.pgd.step_size = 0.03: 10 steps reach 0.3 in epoch 5, not eps = 0.35; "
          "set it to eps/4, or take more steps"]),
        ("mma", {"method.attacks.minimal.step_scale": 0.9},
         ["method.attacks.minimal.step_scale = 0.9: its steps together are shorter than its "
          "radius; set it to 2.5"]),
        ("at", {"validation.finish": {"all": {"kind": "worst_case", "attacks": {
            "weak": {"steps": 3, "step_size": 0.01, "eps": 0.15}}}}},
         ["validation.finish.all.attacks.weak.step_size = 0.01: 3 steps reach 0.03, "
          "not eps = 0.15; set it to eps, or take more steps"]),
        ("at", {"epochs": 4},
         ["optim.lr.boundaries = [5, 7]: in 4 epochs (0 to 3) it never becomes 0.01, 0.002"]),
        ("at", {"epochs": 6},
         ["optim.lr.boundaries = [5, 7]: in 6 epochs (0 to 5) it never becomes 0.002"]),
        ("at", {"optim.lr": {"kind": "cosine", "first": 0.1, "end": 8}}, []),
        # Half of the way.
        ("at", {"optim.lr": {"kind": "linear", "first": 0.0, "last": 0.2, "end": 14}},
         ["optim.lr.end = 14: in 8 epochs it gets to 0.1, not to 0.2"]),
        ("trades", {"method.terms.kl.coef":
                    {"kind": "interpolated", "epochs": [0, 14], "values": [0, 6]}},
         ["method.terms.kl.coef.epochs = [0, 14]: in 8 epochs it gets to 3, not to 6"]),
        ("fat", {"*.tau.boundaries": [3, 9]},
         ["method.attacks.pgd.tau.boundaries = [3, 9]: in 8 epochs (0 to 7) it never becomes 6"]),
    ],
)  # fmt: skip
def test_what_cannot_act(method: str, changes: dict[str, Any], expected: list[str]) -> None:
    assert build_training_config(method, changes).list_warnings() == expected


def test_nothing_is_said_of_the_papers_and_of_the_defaults() -> None:
    for name in list_presets():
        assert resolve_training_config(name, {}).list_warnings() == [], name
    for name in list_builtin_spaces():
        for data_name in ("digits", "cifar10", "svhn"):
            lines = list_space_warnings(load_space(name, {"data.name": data_name}))
            assert all("data.unlabeled is not set" in line for line in lines), name


def test_ranges_are_judged_by_their_ends() -> None:
    assert list_space_warnings(load_space("gairat", CIFAR | {"epochs": 4})) == [
        "optim.lr.boundaries = [29, 59]: in 4 epochs (0 to 3) it never becomes 0.01, 0.001",
        f"{BURN_IN} in [20, 75]: the weights never act in 4 epochs",
        "scheduler.grace_period = 30: trials of 4 epochs are never compared, so none is stopped "
        "early",
    ]
    changes = {"epochs": 4, "optim.lr": 0.1, "scheduler.grace_period": 2}
    lines = list_space_warnings(load_space("gairat", changes))
    assert lines == [f"{BURN_IN} in [1, 6]: at 4 to 6: the weights never act in 4 epochs"]
    # The learning rate of digits drops after epoch 5.
    assert list_space_warnings(load_space("lrat", {"scheduler.grace_period": 3})) == [
        "scheduler.grace_period = 3: trials are compared before the learning rate drops in epoch "
        "6, when their order says little about the end; set it to 6, or scheduler.kind to none"
    ]
    # FAT's trials are in order from epoch 4, where that was measured: on digits with 8 epochs.
    assert list_space_warnings(load_space("fat", {})) == []
    elsewhere = {"scheduler.grace_period": 4, "optim.lr.boundaries": [5, 7]}
    for changes in (
        {"scheduler.grace_period": 3},
        {"scheduler.grace_period": 4, "epochs": 16},
        {"scheduler.grace_period": 4, "optim.lr.boundaries": [6, 7]},
        {**elsewhere, "data.name": "mnist", "epochs": 8},
        {**elsewhere, **CIFAR, "epochs": 8},
    ):
        lines = list_space_warnings(load_space("fat", changes))
        warned = [line for line in lines if "before the learning rate drops" in line]
        assert len(warned) == 1, (changes, lines)
    # Only a fall counts, and all rungs after the advice are validated.
    rates = {"optim.lr": {"boundaries": [2, 5], "values": [0.01, 0.1, 0.01]}}
    asha = {"scheduler.grace_period": 2, "scheduler.reduction_factor": 2}
    for changes, remedy in [
        (rates, "epoch 6, when their order says little about the end; set it to 6, or"),
        (rates | {"validation.every": 2, "epochs": 16}, "the end; set it to 6, or"),
        (rates | {"epochs": 6}, "the end; set scheduler.kind to none"),
        ({"optim.lr": {"boundaries": [], "values": [0.1]}}, ""),
        ({"optim.lr": {"boundaries": [3], "values": [0.01, 0.1]}}, ""),
    ]:
        lines = list_space_warnings(load_space("at", changes | asha))
        assert [remedy in line for line in lines] == [True] * bool(remedy), lines
    # The base has a burn-in of 30 in 8 epochs, but each trial has another one.
    data = {"method": "gairat", "base": {BURN_IN: 30}, "scheduler": {"kind": "none"}}
    space = SearchSpace.from_data({**data, "space": {"*.burn_in": {"int": [1, 2]}}, "base": {}})
    assert list_space_warnings(space) == []
    fixed = SearchSpace.from_data({**data, "space": {"seed": {"int": [0, 1]}}})
    assert list_space_warnings(fixed) == [f"{BURN_IN} = 30: the weights never act in 8 epochs"]
    radius = {"method.attacks.pgd.eps": {"float": [0.1, 0.5]}}
    (line,) = list_space_warnings(
        SearchSpace.from_data({"method": "at", "scheduler": {"kind": "none"}, "space": radius})
    )[:1]
    assert line.startswith(
        "method.attacks.pgd.eps in [0.1, 0.5]: at 0.5: method.attacks.pgd.step_size = 0.03: "
        "10 steps reach 0.3, not eps = 0.5"
    )


def test_the_commands_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text("stages: [{kind: tune, space: gairat, set: {epochs: 4}}]\n")
    _, pipeline, overrides = load_pipeline("p.yaml", {})
    assert f"{BURN_IN} in [1, 6]: at 4 to 6: the weights never act in 4 epochs" in (
        pipeline.stages[0].list_warnings(overrides)
    )
    assert main(["tune", "gairat", "--set", "epochs=4", "--plan"]) == 0
    assert "at 4 to 6: the weights never act in 4 epochs" in " ".join(
        capsys.readouterr().out.split()
    )
