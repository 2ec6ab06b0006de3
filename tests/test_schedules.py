"""Schedules, with those of the papers as values."""

import math

import pytest
import yaml

from raysweep.schedules import Cosine, Interpolated, Linear, Piecewise, at, extremes
from raysweep.spec import SpecError
from raysweep.training.config import Optim, RunConfig, run_config


def test_piecewise_starts_each_value_at_its_boundary():
    """L section 5.2: 0.01, divided by 10 at epochs 60 and 90."""
    lr = Piecewise(boundaries=(60, 90), values=(0.01, 0.001, 0.0001))
    assert [at(lr, e) for e in (0, 59, 60, 89, 90, 99)] == [0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]


def test_tau_of_fat():
    """G C.6: tau 0-3-6 at epochs 0, 40, 70."""
    fat = RunConfig.load({"method": "fat"}).method
    assert [fat.at(e).attacks["pgd"].tau for e in (0, 39, 40, 69, 70, 119)] == [0, 0, 3, 3, 6, 6]


def test_linear_and_cosine():
    linear = Linear(first=0.1, last=0.0, end=200)
    assert at(linear, 100) == pytest.approx(0.05)
    assert [at(linear, e) for e in (0, 200, 400)] == [0.1, 0.0, 0.0]
    cosine = Cosine(first=0.1, end=200)
    assert at(cosine, 50) == pytest.approx(0.05 * (1 + math.cos(math.pi / 4)))
    assert at(cosine, 100) == pytest.approx(0.05)
    assert at(cosine, 200) == pytest.approx(0.0)


def test_cyclic_and_many_decays():
    """G fig. 11 after Rice et al. 2020: up to 0.4 of the way, then down to 0; and a step every so many epochs."""
    cyclic = Interpolated(epochs=(0, 80, 200), values=(0, 0.2, 0))
    assert [at(cyclic, e) for e in (0, 40, 80, 140, 200)] == pytest.approx([0, 0.1, 0.2, 0.1, 0])
    values = tuple(round(0.1 - 0.01 * i, 2) for i in range(10))
    decays = Piecewise(boundaries=tuple(range(20, 200, 20)), values=values)
    assert [at(decays, e) for e in (0, 19, 20, 100, 199)] == [0.1, 0.1, 0.09, 0.05, 0.01]


@pytest.mark.parametrize("schedule", [
    Piecewise(boundaries=(1,), values=(3, 1)),
    Linear(first=1, last=5, end=7),
    Cosine(first=1, last=0.2, end=7),
    Interpolated(epochs=(0, 3, 9), values=(0, 2, 1)),
])  # fmt: skip
def test_values_stay_within_the_extremes_and_survive_yaml(schedule):
    low, high = min(extremes(schedule)), max(extremes(schedule))
    assert all(low - 1e-12 <= at(schedule, e) <= high + 1e-12 for e in range(20))
    again = Optim.load(yaml.safe_load(yaml.safe_dump({"lr": schedule.json_dict()}))).lr
    assert again == schedule


def test_fractions_and_infinity():
    config = run_config("gairat", {"method.attacks.pgd.eps": "8/255", "method.terms.pgd.weight.lam": "inf"})
    assert config.method.attacks["pgd"].eps == 8 / 255
    assert config.method.terms["pgd"].weight.lam == math.inf


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "piecewise", "boundaries": [3, 2], "values": [1, 2, 3]},
        {"kind": "piecewise", "boundaries": [3], "values": [1]},
        {"kind": "linear", "first": 0, "last": 1, "start": 4, "end": 4},
        {"kind": "cosine", "first": -1, "end": 4},
        {"kind": "interpolated", "epochs": [0, 4], "values": [1]},
        {"kind": "spiral"},
        -0.1,
    ],
)
def test_wrong_schedules_are_refused(bad):
    with pytest.raises(SpecError, match="lr"):
        Optim.load({"lr": bad})
