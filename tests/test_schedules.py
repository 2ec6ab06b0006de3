"""Schedules, with those of the papers as values."""

import math
from typing import Annotated

import pytest
import yaml

from raysweep.schedules import (
    CosineSchedule,
    InterpolatedSchedule,
    LinearSchedule,
    Number,
    PiecewiseSchedule,
    Schedule,
    bounded,
    bounding_values,
    resolved_value,
    schedule_value_at,
)
from raysweep.spec import Spec, SpecError
from raysweep.training.config import OptimizerSpec, TrainingConfig, build_training_config


def test_piecewise_starts_each_value_at_its_boundary():
    """L section 5.2: 0.01, divided by 10 at epochs 60 and 90."""
    lr = PiecewiseSchedule(boundaries=(60, 90), values=(0.01, 0.001, 0.0001))
    assert [schedule_value_at(lr, e) for e in (0, 59, 60, 89, 90, 99)] == [
        0.01,
        0.01,
        0.001,
        0.001,
        0.0001,
        0.0001,
    ]


def test_tau_of_fat():
    """G C.6: tau 0-3-6 at epochs 0, 40, 70."""
    fat = TrainingConfig.from_data({"method": "fat"}).method
    assert [fat.resolve_at(e).attacks["pgd"].tau for e in (0, 39, 40, 69, 70, 119)] == [
        0,
        0,
        3,
        3,
        6,
        6,
    ]


def test_linear_and_cosine():
    linear = LinearSchedule(first=0.1, last=0.0, end=200)
    assert schedule_value_at(linear, 100) == pytest.approx(0.05)
    assert [schedule_value_at(linear, e) for e in (0, 200, 400)] == [0.1, 0.0, 0.0]
    cosine = CosineSchedule(first=0.1, end=200)
    assert schedule_value_at(cosine, 50) == pytest.approx(0.05 * (1 + math.cos(math.pi / 4)))
    assert schedule_value_at(cosine, 100) == pytest.approx(0.05)
    assert schedule_value_at(cosine, 200) == pytest.approx(0.0)


def test_cyclic_and_many_decays():
    """G fig. 11 after Rice et al. 2020: up to 0.4 of the way, then down to 0; and a step every so
    many epochs.
    """
    cyclic = InterpolatedSchedule(epochs=(0, 80, 200), values=(0, 0.2, 0))
    assert [schedule_value_at(cyclic, e) for e in (0, 40, 80, 140, 200)] == pytest.approx(
        [0, 0.1, 0.2, 0.1, 0]
    )
    values = tuple(round(0.1 - 0.01 * i, 2) for i in range(10))
    decays = PiecewiseSchedule(boundaries=tuple(range(20, 200, 20)), values=values)
    assert [schedule_value_at(decays, e) for e in (0, 19, 20, 100, 199)] == [
        0.1,
        0.1,
        0.09,
        0.05,
        0.01,
    ]


@pytest.mark.parametrize("schedule", [
    PiecewiseSchedule(boundaries=(1,), values=(3, 1)),
    LinearSchedule(first=1, last=5, end=7),
    CosineSchedule(first=1, last=0.2, end=7),
    InterpolatedSchedule(epochs=(0, 3, 9), values=(0, 2, 1)),
])  # fmt: skip
def test_values_stay_within_the_extremes_and_survive_yaml(schedule):
    low, high = min(bounding_values(schedule)), max(bounding_values(schedule))
    assert all(low - 1e-12 <= schedule_value_at(schedule, e) <= high + 1e-12 for e in range(20))
    again = OptimizerSpec.from_data(
        yaml.safe_load(yaml.safe_dump({"lr": schedule.to_json_dict()}))
    ).lr
    assert again == schedule


def test_fractions_and_infinity():
    config = build_training_config(
        "gairat", {"method.attacks.pgd.eps": "8/255", "method.terms.pgd.weight.lam": "inf"}
    )
    assert config.method.attacks["pgd"].eps == 8 / 255
    assert config.method.terms["pgd"].weight.lam == math.inf


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "piecewise", "boundaries": [3, 2], "values": [1, 2, 3]},
        {"kind": "piecewise", "boundaries": [3, 3], "values": [1, 2, 3]},
        {"kind": "piecewise", "boundaries": [3], "values": [1, 2, 3]},
        {"kind": "piecewise", "boundaries": [-1], "values": [1, 2]},
        {"kind": "piecewise", "boundaries": [2.5], "values": [1, 2]},
        {"kind": "piecewise", "boundaries": [3], "values": [1]},
        {"kind": "linear", "first": 0, "last": 1, "start": 4, "end": 4},
        {"kind": "linear", "first": 0, "last": 1, "start": 4, "end": 3},
        {"kind": "linear", "first": 0, "end": 3},
        {"kind": "linear", "first": 0, "last": -1, "end": 3},
        {"kind": "cosine", "first": -1, "end": 4},
        {"kind": "cosine", "first": 1, "start": 4, "end": 4},
        {"kind": "interpolated", "epochs": [0, 4], "values": [1]},
        {"kind": "interpolated", "epochs": [0, 4, 4], "values": [1, 2, 3]},
        {"kind": "interpolated", "epochs": [4, 0], "values": [1, 2]},
        {"kind": "interpolated", "epochs": [4], "values": [1]},
        {"kind": "spiral"},
        -0.1,
    ],
)
def test_wrong_schedules_are_refused(bad):
    with pytest.raises(SpecError, match="lr"):
        OptimizerSpec.from_data({"lr": bad})


@pytest.mark.parametrize(
    ("schedule", "by_epoch"),
    [
        (PiecewiseSchedule(boundaries=(0, 3), values=(7, 1, 2)), {0: 1, 2: 1, 3: 2, 99: 2}),
        (PiecewiseSchedule(boundaries=(), values=(7,)), {0: 7, 99: 7}),
        (
            LinearSchedule(first=1, last=3, start=2, end=6),
            {0: 1, 2: 1, 3: 1.5, 4: 2, 5: 2.5, 6: 3, 7: 3},
        ),
        # 0.2 + 0.8 (1 + cos(pi / 4)) / 2, the middle, and with cos(3 pi / 4).
        (
            CosineSchedule(first=1, last=0.2, start=2, end=6),
            {0: 1, 2: 1, 3: 0.882842712474619, 4: 0.6, 5: 0.317157287525381, 6: 0.2, 9: 0.2},
        ),
        (
            InterpolatedSchedule(epochs=(2, 4, 8), values=(1, 3, -1)),
            {0: 1, 2: 1, 3: 2, 4: 3, 5: 2, 6: 1, 7: 0, 8: -1, 99: -1},
        ),
    ],
    ids=lambda case: getattr(case, "kind", ""),
)
def test_values_by_hand_at_the_ends_between_and_outside(schedule, by_epoch):
    assert {epoch: schedule_value_at(schedule, epoch) for epoch in by_epoch} == pytest.approx(
        by_epoch, rel=1e-12, abs=1e-12
    )


def test_a_ramp_begins_at_epoch_0_and_a_cosine_ends_at_0_by_default():
    assert LinearSchedule(first=4, last=0, end=4).value_at(1) == 3
    assert CosineSchedule(first=4, end=4) == CosineSchedule(first=4, last=0, start=0, end=4)


class Knob(Spec):
    x: Annotated[Schedule, bounded(-1, 2)] = 0.0
    y: Annotated[Schedule, bounded(0)] = 0.0
    z: Number = 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8/255", 8 / 255),
        ("8 / 255", 8 / 255),
        (" 8/ 255 ", 8 / 255),
        ("-8/255", -8 / 255),
        ("+8/255", 8 / 255),
        ("- 1 / 2", None),
        ("1.5/3", None),
        ("1/0", None),
        ("0/0", None),
        ("1 6/255", None),
        ("8/25 5", None),
        ("8/-255", None),
        ("inf/2", None),
        ("1/inf", None),
        ("1/2/3", None),
        ("/", None),
        ("8/", None),
        ("eight", None),
        ("inf", math.inf),
        ("-inf", -math.inf),
        ("1e-3", 0.001),
        (" 0.5 ", 0.5),
        ("", None),
    ],
)
def test_which_texts_are_numbers(text, number):
    """A quotient of whole numbers is one, with or without spaces around the slash; other quotients
    are not.
    """
    if number is None:
        with pytest.raises(SpecError) as error:
            Knob.from_data({"z": text})
        assert error.value.problems == [
            f"z = {text!r}: must be a valid number, unable to parse string as a number"
        ]
    else:
        assert Knob.from_data({"z": text}).z == number


def test_quotients_are_numbers_inside_schedules_too():
    assert Knob.from_data(
        {"y": {"boundaries": [3], "values": ["8/255", "4 / 255"]}}
    ).y == PiecewiseSchedule(boundaries=(3,), values=(8 / 255, 4 / 255)), (
        "without `kind` it is piecewise"
    )


@pytest.mark.parametrize(
    "schedule",
    [
        PiecewiseSchedule(boundaries=(1,), values=(3, 1)),
        LinearSchedule(first=1, last=5, end=7),
        CosineSchedule(first=1, end=7),
        InterpolatedSchedule(epochs=(0, 3), values=(0, 2)),
    ],
    ids=lambda case: case.kind,
)
def test_a_schedule_is_not_a_number_before_it_is_resolved(schedule):
    message = rf"kind='{schedule.kind}'.* changes with the epoch: call \.resolve_at\(epoch\)"
    with pytest.raises(TypeError, match=message):
        resolved_value(schedule)
    assert (
        resolved_value(Knob(y=schedule).resolve_at(1).y)
        == schedule_value_at(schedule, 1)
        == schedule.value_at(1)
    )
    assert resolved_value(0.25) == schedule_value_at(0.25, 7) == 0.25


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize(
    ("beyond", "edge"), [(2.0000001, 2.0), (-1.0000001, -1.0), (math.nan, 0.0), (math.inf, 1.0)]
)
def test_a_bound_holds_for_every_value_that_a_schedule_takes(place, beyond, edge):
    def schedules(value):
        values = [0.0, 0.0, 0.0]
        values[place] = value
        yield {"kind": "piecewise", "boundaries": [1, 2], "values": values}
        yield {"kind": "interpolated", "epochs": [1, 2, 3], "values": values}
        if place < 2:
            yield {"kind": "linear", "first": values[0], "last": values[1], "end": 4}
            yield {"kind": "cosine", "first": values[0], "last": values[1], "end": 4}
        yield value

    for schedule in schedules(edge):
        Knob.from_data({"x": schedule})
    for schedule in schedules(beyond):
        with pytest.raises(SpecError, match="must be between -1 and 2"):
            Knob.from_data({"x": schedule})


def test_a_bound_without_an_upper_end_says_at_least():
    with pytest.raises(SpecError, match=r"y = -0.5: must be at least 0"):
        Knob.from_data({"y": -0.5})
    assert Knob.from_data({"y": "inf"}).y == math.inf


def test_extremes_are_the_values_that_bound_it():
    assert bounding_values(PiecewiseSchedule(boundaries=(1, 2), values=(3, 9, 1))) == (3, 9, 1)
    assert bounding_values(InterpolatedSchedule(epochs=(0, 4, 9), values=(0, 2, 1))) == (0, 2, 1)
    assert (
        bounding_values(LinearSchedule(first=5, last=1, end=7))
        == (5, 1)
        == bounding_values(CosineSchedule(first=5, last=1, end=7))
    )
    assert bounding_values(0.25) == (0.25,)
