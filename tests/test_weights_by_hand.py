"""Losses and weights by hand: few classes, odd numbers of steps, ends of their ranges."""

import math

import pytest
import torch

from raysweep.instance_weights import (
    GeometryWeight,
    ProbabilisticMarginWeight,
    RemainderWeight,
    UniformWeight,
    VulnerabilityWeight,
    WeightInputs,
    WithinMarginWeight,
)
from raysweep.losses import LOSSES
from raysweep.schedules import LinearSchedule
from raysweep.spec import SpecError


def log_of(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def weight_inputs(p, y, **settings):
    return WeightInputs(log_of(*p) + 3, torch.tensor(y), **settings)


def test_losses_by_name():
    """p = (.5, .3, .2) of the view, q = (.7, .2, .1) of the natural data; y is the first class,
    then the last.
    """
    view, natural, y = (
        log_of([0.5, 0.3, 0.2], [0.5, 0.3, 0.2]),
        log_of([0.7, 0.2, 0.1], [0.7, 0.2, 0.1]),
        [0, 2],
    )
    kl = 0.7 * math.log(0.7 / 0.5) + 0.2 * math.log(0.2 / 0.3) + 0.1 * math.log(0.1 / 0.2)
    ce = [-math.log(0.5), -math.log(0.2)]
    margin = [-math.log(1.0001 - 0.3), -math.log(1.0001 - 0.5)]
    expected = {
        "ce": ce,
        "margin": margin,
        "bce": [a + b for a, b in zip(ce, margin, strict=True)],
        "kl": [kl, kl],
        "kl_misclassified": [kl * (1 - 0.7), kl * (1 - 0.1)],
    }
    assert set(LOSSES) == set(expected)
    for name, values in expected.items():
        assert LOSSES[name](view + 2, natural - 1, torch.tensor(y)).tolist() == pytest.approx(
            values, rel=1e-6
        )


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_two_classes_and_of_a_hundred(name):
    """For two classes margin and cross-entropy agree: 1 - p_other = p_y. For a hundred equal ones
    all are known.
    """
    view, natural, y = log_of([0.8, 0.2]), log_of([0.6, 0.4]), torch.tensor([1])
    kl = 0.6 * math.log(0.6 / 0.8) + 0.4 * math.log(0.4 / 0.2)
    two = {"ce": -math.log(0.2), "margin": -math.log(0.2), "kl": kl, "kl_misclassified": 0.6 * kl}
    two["bce"] = -2 * math.log(0.2)
    assert LOSSES[name](view, natural, y).item() == pytest.approx(two[name], abs=1e-3)
    equal = torch.zeros(1, 100, dtype=torch.float64)
    hundred = {"ce": math.log(100), "margin": -math.log(0.9901), "kl": 0.0, "kl_misclassified": 0.0}
    hundred["bce"] = math.log(100) - math.log(0.9901)
    assert LOSSES[name](equal, equal, torch.tensor([99])).item() == pytest.approx(
        hundred[name], abs=1e-9
    )


def test_gradients_flow_into_both_sides_of_the_divergence():
    """MART's factor 1 - p_y(x) is part of the loss: it is differentiated too."""
    view, natural = (
        log_of([0.5, 0.3, 0.2]).requires_grad_(),
        log_of([0.7, 0.2, 0.1]).requires_grad_(),
    )
    for name in ("kl", "kl_misclassified"):
        for tensor in (view, natural):
            (slope,) = torch.autograd.grad(
                LOSSES[name](view, natural, torch.tensor([0])).sum(), tensor
            )
            for k in range(3):
                step = torch.zeros(1, 3, dtype=torch.float64)
                step[0, k] = 1e-6
                up, down = (
                    LOSSES[name](
                        view.detach() + (s * step if tensor is view else 0),
                        natural.detach() + (s * step if tensor is natural else 0),
                        torch.tensor([0]),
                    ).item()
                    for s in (1, -1)
                )
                assert slope[0, k].item() == pytest.approx((up - down) / 2e-6, abs=1e-7)


def geometry(steps, kappas, **settings):
    seen = WeightInputs(
        torch.zeros(len(kappas), 3, dtype=torch.float64),
        torch.zeros(len(kappas)),
        torch.tensor(kappas),
        steps,
    )
    return GeometryWeight(**settings)(seen).tolist()


@pytest.mark.parametrize(
    ("steps", "official", "arguments"),
    [
        # 5 (1 - 2 kappa / K), the paper's, and 5 (h - kappa) / h with h = floor(K / 2), the code's.
        (1, False, [5, -5]),
        (2, False, [5, 0, -5]),
        (2, True, [5, 0, -5]),
        (3, False, [5, 5 / 3, -5 / 3, -5]),
        (3, True, [5, 0, -5, -10]),
        (5, False, [5, 3, 1, -1, -3, -5]),
        (5, True, [5, 2.5, 0, -2.5, -5, -7.5]),
        (4, True, [5, 2.5, 0, -2.5, -5]),
    ],
)
def test_geometry_weights_of_few_steps(steps, official, arguments):
    kappas = list(range(steps + 1))
    for lam in (0.0, -2.0):
        tanh = [(1 + math.tanh(lam + a)) / 2 for a in arguments]
        sigmoid = [1 / (1 + math.exp(-lam - a)) for a in arguments]
        assert geometry(steps, kappas, lam=lam, official=official) == pytest.approx(tanh, rel=1e-9)
        assert geometry(
            steps, kappas, lam=lam, official=official, shape="sigmoid"
        ) == pytest.approx(sigmoid, rel=1e-9)
    linear = [1 - k / (steps + 1) for k in kappas]
    assert geometry(steps, kappas, official=official, shape="linear") == pytest.approx(
        linear, rel=1e-12
    )


def test_tables_of_weights():
    """An entry for each kappa, the last one for all larger; entries may be equal but must not
    increase.
    """
    table = (2.0, 2.0, 0.5, 0.0)
    assert geometry(10, [0, 1, 2, 3, 4, 10], shape="piecewise", table=table) == [2, 2, 0.5, 0, 0, 0]
    with pytest.raises(SpecError, match="must not increase"):
        GeometryWeight.from_data({"shape": "piecewise", "table": [1.0, 0.5, 0.6]})
    with pytest.raises(SpecError):
        GeometryWeight.from_data({"shape": "piecewise", "table": [1.0, -0.1]})


P = [[0.5, 0.3, 0.2]] * 3


def test_vulnerability_weights():
    """alpha (1 - V)^beta with V = p_y, or p_y - max p_other: .5 .3 .2, or .2 -.2 -.3."""
    for view, v in (("probability", (0.5, 0.3, 0.2)), ("margin", (0.2, -0.2, -0.3))):
        for alpha, beta in ((2.0, 0.5), (1.5, 3.0), (0.0, 1.0), (2.0, 0.0)):
            weight = VulnerabilityWeight(alpha=alpha, beta=beta)(
                weight_inputs(P, [0, 1, 2], vulnerability_kind=view)
            )
            assert weight.tolist() == pytest.approx([alpha * (1 - a) ** beta for a in v], rel=1e-9)
    assert VulnerabilityWeight().alpha == 2.0 and VulnerabilityWeight().beta == 0.5


def test_vulnerability_weight_of_a_certain_row_is_near_zero():
    """p_y = 1 up to rounding, in both types and views: no root of a negative number."""
    for dtype in (torch.float32, torch.float64):
        for gap in (10.0, 17.0, 30.0, 200.0):
            logits = torch.zeros(1000, 7, dtype=dtype)
            logits[:, 3] = gap + torch.linspace(0, 1, 1000, dtype=dtype)
            for view in ("probability", "margin"):
                weight = VulnerabilityWeight()(
                    WeightInputs(logits, torch.full((1000,), 3), vulnerability_kind=view)
                )
                assert weight.isfinite().all() and weight.min() >= 0 and weight.max() < 0.1


def test_margin_weights():
    """MAIL: sigma(slope (PM + bias)), PM = max p_other - p_y: -.2 .2 .3; larger where another class
    is likelier.
    """
    pm = (-0.2, 0.2, 0.3)
    for slope, bias, scale in ((10.0, -0.5, 1.0), (2.0, 0.1, 3.0)):
        weight = ProbabilisticMarginWeight(slope=slope, bias=bias, scale=scale)(
            weight_inputs(P, [0, 1, 2])
        ).tolist()
        assert weight == pytest.approx(
            [scale / (1 + math.exp(-slope * (m + bias))) for m in pm], rel=1e-9
        )
        assert weight[0] < weight[1] < weight[2]
    assert ProbabilisticMarginWeight().to_json_dict() == {
        "kind": "margin", "by": None, "normalise": True, "burn_in": 0, "slope": 10.0, "bias": -0.5,
        "scale": 1.0,
    }  # fmt: skip


def test_remainder():
    """[total - w_1 - w_2]_+, of the named terms only."""
    weights = {
        name: torch.tensor([value, 0.1]) for name, value in (("a", 0.5), ("b", 0.4), ("c", 9.0))
    }
    seen = weight_inputs(P[:2], [0, 1], earlier_weights=weights)
    assert RemainderWeight(total=1.0, of=("a", "b"))(seen).tolist() == pytest.approx([0.1, 0.8])
    assert RemainderWeight(total=1.0, of=("a", "c"))(seen).tolist() == pytest.approx([0.0, 0.8])
    assert RemainderWeight(total=0.0, of=("a",))(seen).tolist() == [0.0, 0.0]


def test_uniform_and_within_margin():
    assert UniformWeight()(weight_inputs(P, [0, 1, 2])).tolist() == [1, 1, 1]
    assert UniformWeight()(weight_inputs(P, [0, 1, 2])).dtype == torch.float64
    seen = weight_inputs(
        [[0.5, 0.5]] * 4, [0, 0, 0, 0], kappa=torch.tensor([0, 4, 5, 6]), attack_steps=5
    )
    assert WithinMarginWeight()(seen).tolist() == [1, 1, 0, 0]


def test_weights_that_need_kappa_say_so():
    for weight in (GeometryWeight(), WithinMarginWeight()):
        with pytest.raises(TypeError, match="need the kappa of an attack"):
            weight(weight_inputs(P, [0, 1, 2]))


def test_settings_follow_the_epoch():
    """Every setting of a weight may be a schedule; a burn-in ends at the epoch that it names
    (counted from 0).
    """
    ramp = LinearSchedule(first=0.0, last=4.0, end=4)
    late = GeometryWeight(lam=ramp, burn_in=3)
    assert [late.resolve_at(epoch) for epoch in (0, 2)] == [UniformWeight(), UniformWeight()]
    assert late.resolve_at(3) == GeometryWeight(lam=3.0) and late.resolve_at(9) == GeometryWeight(
        lam=4.0
    )
    assert ProbabilisticMarginWeight(slope=ramp, bias=ramp, burn_in=1).resolve_at(
        1
    ) == ProbabilisticMarginWeight(slope=1.0, bias=1.0)
    assert ProbabilisticMarginWeight(burn_in=1).resolve_at(0) == UniformWeight()
    assert VulnerabilityWeight(alpha=ramp, beta=ramp).resolve_at(2) == VulnerabilityWeight(
        alpha=2.0, beta=2.0
    )
    assert RemainderWeight(total=ramp, of=("a",)).resolve_at(1) == RemainderWeight(
        total=1.0, of=("a",)
    )
    with pytest.raises(TypeError, match="changes with the epoch"):
        VulnerabilityWeight(alpha=ramp)(weight_inputs(P, [0, 1, 2]))


def test_which_weights_are_normalised():
    """GAIRAT's and MAIL's are, LRAT's is not: it divides by the mean of the pair."""
    assert (
        GeometryWeight().normalise,
        ProbabilisticMarginWeight().normalise,
        VulnerabilityWeight().normalise,
    ) == (True, True, False)
    assert not hasattr(UniformWeight(), "normalise") and not hasattr(
        RemainderWeight(total=1, of=("a",)), "normalise"
    )
