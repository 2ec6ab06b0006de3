"""Weight functions against the authors' code and the printed equations, and what all of them
promise.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import stored
from pydantic import TypeAdapter

from raysweep.attacks import true_class_confidence
from raysweep.instance_weights import (
    AnyWeight,
    GeometryWeight,
    ProbabilisticMarginWeight,
    RemainderWeight,
    UniformWeight,
    VulnerabilityWeight,
    WeightInputs,
    WithinMarginWeight,
)
from raysweep.schedules import LinearSchedule, PiecewiseSchedule
from raysweep.spec import SpecError

SHAPES = {"Tanh": "tanh", "Sigmoid": "sigmoid", "Discrete": "linear"}
EVERY = [
    UniformWeight(),
    GeometryWeight(),
    GeometryWeight(shape="linear"),
    GeometryWeight(shape="sigmoid", lam=-1.0),
    GeometryWeight(shape="piecewise", table=(1.0, 1.0, 0.5, 0.2)),
    GeometryWeight(official=True),
    VulnerabilityWeight(),
    ProbabilisticMarginWeight(),
    WithinMarginWeight(),
    RemainderWeight(total=1.0, of=("first",)),
]


def weight_inputs(kappa, steps):
    kappa = torch.as_tensor(kappa)
    return WeightInputs(
        torch.zeros(len(kappa), 10, dtype=torch.float64), torch.zeros_like(kappa), kappa, steps
    )


@pytest.mark.parametrize("steps", [5, 7, 10])
@pytest.mark.parametrize("function", SHAPES)
@pytest.mark.parametrize("lam", ["-3.0", "-1.0", "-0.5", "0.0", "1.0", "3.0", "inf"])
def test_official_geometry_weights(steps, function, lam):
    """The authors' GAIR(K, kappa, lambda, function), normalised; the paper's for even K."""
    data = stored("weights")
    kappa = data[f"gair.K{steps}.kappa"].long()
    settings = {} if function == "Discrete" else {"lam": float(lam)}
    for official in (True, False) if steps % 2 == 0 else (True,):
        weight = GeometryWeight(shape=SHAPES[function], official=official, **settings)(
            weight_inputs(kappa, steps)
        )
        expected = data[f"gair.K{steps}.lam{lam}.{function}.f64"]
        torch.testing.assert_close(weight / weight.mean(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lam", ["-1.0", "0.0", "3.0"])
def test_gair_rst_weights(lam):
    """GAIR-RST's own formula, (tanh(lambda + K/2 - kappa) + 1) / 2, is G eq. 6 for K = 10, which it
    trains with.
    """
    data = stored("weights")
    weight = GeometryWeight(lam=float(lam))(weight_inputs(data["gair.K10.kappa"].long(), 10))
    expected = data[f"gair.K10.lam{lam}.RST_unnormalised"].double()
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 5, 10])
def test_geometry_equations(steps):
    """G eq. 6, 7, 8 as printed, for every kappa."""
    kappa = list(range(steps + 1))
    for lam in (-1.0, 0.0, 2.5):
        a = [lam + 5 * (1 - 2 * k / steps) for k in kappa]
        equations = {
            "tanh": [(1 + math.tanh(v)) / 2 for v in a],
            "sigmoid": [1 / (1 + math.exp(-v)) for v in a],
            "linear": [1 - k / (steps + 1) for k in kappa],
        }
        for shape, expected in equations.items():
            weight = GeometryWeight(shape=shape, lam=lam)(weight_inputs(kappa, steps))
            torch.testing.assert_close(
                weight, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-14
            )


def test_piecewise_table():
    weight = GeometryWeight(shape="piecewise", table=(1.0, 0.8, 0.1))(
        weight_inputs([0, 1, 2, 9], 10)
    )
    assert weight.tolist() == [1.0, 0.8, 0.1, 0.1]
    for bad in (
        {"table": (0.1, 0.2), "shape": "piecewise"},
        {"table": (1.0,)},
        {"shape": "piecewise"},
    ):
        with pytest.raises(SpecError):
            GeometryWeight.from_data(bad)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(-30, 30),
    st.integers(1, 20),
    st.sampled_from(["tanh", "sigmoid", "linear"]),
    st.booleans(),
)
def test_geometry_never_increases_and_never_vanishes(lam, steps, shape, official):
    """Non-increasing in kappa (G section 3.2); positive even where float32's tanh saturates."""
    if official and steps == 1:
        return
    kappa = torch.arange(steps + 1)
    seen = WeightInputs(torch.zeros(steps + 1, 2), torch.zeros_like(kappa), kappa, steps)
    weight = GeometryWeight(shape=shape, lam=lam, official=official)(seen)
    assert bool((weight[1:] <= weight[:-1]).all())
    assert bool((weight > 0).all()) or official


def test_official_weights_need_two_steps():
    with pytest.raises(TypeError, match="2 steps"):
        GeometryWeight(official=True)(weight_inputs([0, 1], 1))


def test_infinite_lambda_is_one():
    assert torch.equal(
        GeometryWeight(lam=math.inf)(weight_inputs(range(11), 10)),
        torch.ones(11, dtype=torch.float64),
    )


def test_lambda_schedules_and_burn_in():
    """fixed, piecewise and linear lambda; before the burn-in ends the settings are those of no
    weights at all.
    """
    assert GeometryWeight(lam=0.5, burn_in=3).resolve_at(2) == UniformWeight()
    assert GeometryWeight(lam=0.5, burn_in=3).resolve_at(3) == GeometryWeight(lam=0.5)
    stepped = GeometryWeight(lam=PiecewiseSchedule(boundaries=(60, 90), values=(0, -1, -2)))
    assert [stepped.resolve_at(e).lam for e in (59, 60, 89, 90)] == [0, -1, -1, -2]
    sloped = GeometryWeight(lam=LinearSchedule(first=1, last=-1, start=0, end=4))
    assert [sloped.resolve_at(e).lam for e in (0, 2, 4, 9)] == [1, 0, -1, -1]


def test_mail_weights():
    """PM and weight as MAIL's code computes them from logits, for three methods' settings."""
    data = stored("weights")
    logits, y = data["mail.logits"].double(), data["mail.y"]
    torch.testing.assert_close(
        -true_class_confidence(logits, y, "margin"), data["mail.PM"].double(), rtol=1e-5, atol=1e-6
    )
    for bias, slope in ((-0.5, 10.0), (-1.5, 1.0), (0.0, 2.0)):
        weight = ProbabilisticMarginWeight(slope=slope, bias=bias, scale=3.0)(
            WeightInputs(logits, y)
        )
        expected = data[f"mail.weight.bias{bias}.slope{slope}"].double()
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
        p = logits.softmax(1)
        for row in range(8):
            other = max(p[row, k] for k in range(10) if k != y[row])
            by_hand = 3 / (1 + torch.exp(-slope * (other - p[row, y[row]] + bias)))
            assert weight[row].item() == pytest.approx(by_hand.item(), rel=1e-12)


def test_vulnerability_equations():
    """L eq. 8, 9, 10."""
    data = stored("lrat")
    for name, view in (("pgd", "probability"), ("cw", "margin")):
        logits, y = data[f"2.logits_{name}"], data["2.y"]
        p = logits.exp() / logits.exp().sum(1, keepdim=True)
        torch.testing.assert_close(
            true_class_confidence(logits, y, view), data[f"2.V_{name}"], rtol=1e-10, atol=1e-12
        )
        weight = VulnerabilityWeight(alpha=1.5, beta=2.0)(
            WeightInputs(logits, y, vulnerability_kind=view)
        )
        for row in range(8):
            v = p[row, y[row]] - (
                max(p[row, k] for k in range(10) if k != y[row]) if view == "margin" else 0
            )
            assert weight[row].item() == pytest.approx((1.5 * (1 - v) ** 2).item(), rel=1e-10)


def test_remainder():
    first = torch.tensor([0.2, 1.5])
    seen = WeightInputs(
        torch.zeros(2, 3),
        torch.zeros(2, dtype=torch.long),
        earlier_weights={"first": first, "second": first},
    )
    torch.testing.assert_close(
        RemainderWeight(total=1.0, of=("first",))(seen), torch.tensor([0.8, 0.0])
    )
    torch.testing.assert_close(
        RemainderWeight(total=1.0, of=("first", "second"))(seen), torch.tensor([0.6, 0.0])
    )


def test_within_margin():
    assert WithinMarginWeight()(weight_inputs([0, 3, 9, 10], 10)).tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("weight", EVERY, ids=repr)
def test_contract(weight):
    """(N,), non-negative, finite, without gradient; the same after a trip through JSON."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 10, generator=generator)
    y = torch.randint(10, (12,), generator=generator)
    kappa = torch.randint(11, (12,), generator=generator)
    seen = WeightInputs(
        logits, y, kappa, 10, earlier_weights={"first": torch.rand(12, generator=generator)}
    )
    result = weight(seen)
    assert result.shape == (12,)
    assert not result.requires_grad
    assert bool(result.isfinite().all() & (result >= 0).all())
    again = TypeAdapter(AnyWeight).validate_python(weight.to_json_dict())
    assert again == weight
    assert torch.equal(again(seen), result)
