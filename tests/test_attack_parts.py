"""The parts that attacks share, and the settings of the named evaluations, by hand."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from raysweep.attacks import (
    APGD,
    ATTACK_DESCRIPTIONS,
    FAB,
    PGD,
    MinimalPerturbation,
    Square,
    autoattack,
    build_custom_cascade,
    build_named_attack,
    freeze_model,
    true_class_confidence,
    true_class_margin,
)
from raysweep.attacks.base import (
    l2_norms,
    masked_assign_,
    project_to_ball,
    soft_logit_margin,
    steepest_ascent_direction,
)
from raysweep.rng import ExampleRng
from raysweep.schedules import LinearSchedule, PiecewiseSchedule
from raysweep.spec import SpecError


def images(*rows):
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), 2, 1, 2)


def test_margin_and_vulnerability():
    """p = (.5, .3, .2): the true class first, second and last."""
    logits = torch.tensor([[0.5, 0.3, 0.2]] * 3, dtype=torch.float64).log() + 7
    y = torch.tensor([0, 1, 2])
    assert true_class_margin(
        torch.tensor([[4.0, -1, 2], [4, -1, 2], [4, 4, 2]]), torch.tensor([0, 1, 0])
    ).tolist() == [2, -5, 0]
    assert true_class_confidence(logits, y, "probability").tolist() == pytest.approx(
        [0.5, 0.3, 0.2]
    )
    assert true_class_confidence(logits, y, "margin").tolist() == pytest.approx([0.2, -0.2, -0.3])


def test_each_attack_says_how_vulnerability_to_it_is_measured():
    """L eq. 8 for those that lower p_y, eq. 9 for those that raise another class."""
    probability = [PGD(), PGD(loss="kl"), APGD()]
    by_margin = [
        PGD(loss="cw"),
        APGD(loss="cw"),
        APGD(loss="dlr"),
        APGD(loss="dlr-targeted"),
        FAB(),
        Square(),
    ]
    assert {attack.vulnerability_kind for attack in probability} == {"probability"}
    assert {attack.vulnerability_kind for attack in by_margin} == {"margin"}


def test_projection():
    """Linf: pixel by pixel. L2: by length over all axes, then the box. Points inside stay."""
    x, far = images([0.5, 0.95, 0.1, 0.5]), images([0.9, 1.25, -0.4, 0.45])
    assert project_to_ball(far, x, 0.2, "Linf").flatten().tolist() == pytest.approx(
        [0.7, 1.0, 0.0, 0.45]
    )
    length = (0.4**2 + 0.3**2 + 0.5**2 + 0.05**2) ** 0.5
    expected = [0.5 + 0.4 / length * 0.2, 1.0, 0.0, 0.5 - 0.05 / length * 0.2]
    assert 0.95 + 0.3 / length * 0.2 > 1 and 0.1 - 0.5 / length * 0.2 < 0
    assert project_to_ball(far, x, 0.2, "L2").flatten().tolist() == pytest.approx(expected)
    near = images([0.51, 0.95, 0.1, 0.5])
    for norm in ("Linf", "L2"):
        assert project_to_ball(near, x, 0.2, norm).flatten().tolist() == pytest.approx(
            near.flatten().tolist(), rel=1e-12
        )
        assert torch.equal(project_to_ball(x, x, 0.0, norm), x)
        assert project_to_ball(far, x, 0.0, norm).flatten().tolist() == pytest.approx(
            x.flatten().tolist(), rel=1e-12
        )


def test_direction_of_a_step():
    grad = images([3.0, 0.0, -4.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1e-3, -1e-3, 1e-3, -1e-3])
    assert steepest_ascent_direction(grad, "Linf").view(3, 4).tolist() == [
        [1, 0, -1, 0],
        [0, 0, 0, 0],
        [1, -1, 1, -1],
    ]
    assert steepest_ascent_direction(grad, "L2").flatten().tolist() == pytest.approx(
        [0.6, 0, -0.8, 0, 0, 0, 0, 0, 0.5, -0.5, 0.5, -0.5]
    )
    assert l2_norms(grad).shape == (3, 1, 1, 1) and l2_norms(
        grad
    ).flatten().tolist() == pytest.approx([5, 0, 0.002])


def test_put_writes_the_rows_of_a_mask_only():
    into = torch.zeros(3, 2)
    masked_assign_(
        into, torch.tensor([True, False, True]), torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    )
    assert into.tolist() == [[1, 2], [0, 0], [5, 6]]
    masked_assign_(into, torch.tensor([False] * 3), torch.ones(3, 2))
    assert into.tolist() == [[1, 2], [0, 0], [5, 6]]


@pytest.mark.parametrize("kind", [PGD, APGD, FAB, Square])
def test_a_radius_of_more_than_one_pixel_range(kind):
    """An error in Linf, allowed in L2; of a schedule every value is checked."""
    assert kind(eps=1.0).eps == 1.0 and kind(eps=8, norm="L2").eps == 8
    ramp = {"kind": "linear", "first": 0.1, "last": 8, "end": 5}
    for eps in (8, 1.01, ramp, {"boundaries": [3], "values": [4, 0.1]}):
        with pytest.raises(SpecError, match="epsilon means pixels in"):
            kind.from_data({"eps": eps})
        kind.from_data({"eps": eps, "norm": "L2"})
    with pytest.raises(SpecError, match="at least 0"):
        kind.from_data({"eps": -0.1})
    assert kind(eps=LinearSchedule(first=0.0, last=1.0, end=4)).resolve_at(2).eps == 0.5
    assert kind(eps=PiecewiseSchedule(boundaries=(2,), values=(0.1, 0.2))).resolve_at(1).eps == 0.1


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_frozen_restores_modes_and_gradients_even_after_an_error(mode):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2)).train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    before = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), freeze_model(model, mode) as inside:
        assert inside is model
        assert {m.training for m in model.modules()} == {mode == "train"}
        assert not any(p.requires_grad for p in model.parameters())
        raise KeyError
    assert (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
    ) == before


def settings(attack):
    """All settings of an attack but radius and norm, as plain data."""
    return {
        key: value for key, value in attack.to_json_dict().items() if key not in ("eps", "norm")
    }


CE = {
    "kind": "apgd",
    "steps": 100,
    "loss": "ce",
    "restarts": 1,
    "targets": 9,
    "rho": 0.75,
    "samples": 1,
}
T = CE | {"loss": "dlr-targeted"}
FAB_T = {
    "kind": "fab",
    "steps": 100,
    "targets": 9,
    "restarts": 1,
    "alpha_max": 0.1,
    "eta": 1.05,
    "beta": 0.9,
}
SQUARE = {"kind": "square", "queries": 5000, "restarts": 1, "p_init": 0.8}
PGD20 = {
    "kind": "pgd", "step_size": 0.075, "steps": 20, "loss": "ce", "start": "uniform", "tau": None,
    "confidence": 50.0, "mode": "eval",
}  # fmt: skip
VERSIONS = {
    "standard": {"apgd-ce": CE, "apgd-t": T, "fab-t": FAB_T, "square": SQUARE},
    "plus": {
        "apgd-ce": CE | {"restarts": 5}, "apgd-dlr": CE | {"loss": "dlr", "restarts": 5},
        "fab": FAB_T | {"targets": None, "restarts": 5}, "square": SQUARE, "apgd-t": T,
        "fab-t": FAB_T,
    },
    "rand": {"apgd-ce": CE | {"samples": 20}, "apgd-dlr": CE | {"loss": "dlr", "samples": 20}},
}  # fmt: skip
NAMED = {
    **{name: {name: one} for name, one in VERSIONS["standard"].items()},
    "autoattack": VERSIONS["standard"],
    "apgd-dlr": {"apgd-dlr": CE | {"loss": "dlr"}},
    "apgd-cw": {"apgd-cw": CE | {"loss": "cw"}},
    "fab": {"fab": FAB_T | {"targets": None}},
    "pgd20": {"pgd20": PGD20},
    "cw20": {"cw20": PGD20 | {"loss": "cw"}},
    "objective": {
        "pgd": PGD20 | {"step_size": {"kind": "eps", "factor": 0.25}},
        "cw": PGD20 | {"step_size": {"kind": "eps", "factor": 0.25}, "loss": "cw"},
        "multi_targeted": {
            **{"kind": "multi-targeted", "steps": 5, "runs": 40, "targets": 5, "reach": 2.0},
        },
    },
    "pgd+": {f"pgd+-{i}": PGD20 | {"steps": 40, "step_size": 0.01, "tau": 0} for i in range(1, 6)},
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_versions_of_autoattack(version, norm):
    """All settings of the official versions, in order, with the requested radius and norm."""
    cascade = autoattack(0.3, norm, version)
    assert {name: settings(attack) for name, attack in cascade.attacks.items()} == VERSIONS[version]
    assert list(cascade.attacks) == list(VERSIONS[version]) and not cascade.tf32
    assert {(attack.eps, attack.norm) for attack in cascade.attacks.values()} == {(0.3, norm)}
    assert build_named_attack("autoattack", 0.3, norm, version) == cascade


def test_tf32_is_the_standard_version_in_tf32():
    assert autoattack(0.3, "L2", "tf32").to_json_dict() == autoattack(0.3, "L2").to_json_dict() | {
        "tf32": True
    }


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_every_named_evaluation(norm):
    assert set(NAMED) == set(ATTACK_DESCRIPTIONS)
    for name, expected in NAMED.items():
        attacks = build_named_attack(name, 0.3, norm).attacks
        assert {key: settings(attack) for key, attack in attacks.items()} == expected
        assert list(attacks) == list(expected)
        assert {(attack.eps, attack.norm) for attack in attacks.values()} == {(0.3, norm)}
    assert {attack.eps for attack in build_named_attack("autoattack").attacks.values()} == {8 / 255}


def test_lists_keep_their_order():
    assert list(build_custom_cascade(["square", "pgd20", "square", "pgd20", "pgd20"]).attacks) == [
        "square", "pgd20", "square-2", "pgd20-2", "pgd20-3",
    ]  # fmt: skip
    with pytest.raises(SpecError, match="at least one attack"):
        build_custom_cascade([])
    with pytest.raises(SpecError, match="AutoAttack version"):
        autoattack(version="standart")


class Slope(nn.Module):
    """One pixel x, three classes: logits 4 (x - 0.5), 0 and 0. Class 0 is the largest above 0.5,
    and has more than half of the probability above 0.5 + log(2) / 4 = 0.673.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros_like(x.flatten())
        return torch.stack([4 * (x.flatten() - 0.5), zero, zero], 1)


def search_slope(**settings: Any) -> tuple[float, int]:
    """The length that MMA's search finds from x = 0.8, and its kappa."""
    x, y = torch.full((1, 1, 1, 1), 0.8), torch.zeros(1, dtype=torch.int64)
    attack = MinimalPerturbation(start="natural", bisections=30, **settings)
    result = attack(Slope(), x, y, ExampleRng.for_examples(torch.zeros(1, dtype=torch.int64), 0))
    return (x - result.x_adv).item(), int(result.kappa)


def test_the_search_of_mma_with_the_soft_logit_margin():
    """With `slm` an image breaks where p_y falls to one half, as in MMA's code."""
    logits, y = torch.tensor([[1.0, 2.0, -1.0], [3.0, 0.0, 0.5]]), torch.tensor([1, 0])
    p = logits.softmax(1)[torch.arange(2), y]
    assert torch.allclose(soft_logit_margin(logits, y), ((1 - p) / p).log())
    assert search_slope(d_max=0.4, loss="ce") == (pytest.approx(0.3, abs=1e-4), 7)
    to_half = 0.3 - math.log(2) / 4
    assert search_slope(d_max=0.4, loss="slm") == (pytest.approx(to_half, abs=1e-4), 3)


def test_the_search_of_mma_goes_beyond_d_max():
    """An image that breaks between d_max and search_factor x d_max counts as one that does not, but
    gets the images at its boundary.
    """
    assert search_slope(d_max=0.29, search_factor=1.05) == (pytest.approx(0.3, abs=1e-4), 10)
    assert search_slope(d_max=0.31, search_factor=1.05)[1] == 9
    length, kappa = search_slope(d_max=0.29)
    assert (round(length, 5), kappa) == (0.29, 10)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        MinimalPerturbation(search_factor=0.9)
