import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysweep.catalog import METHODS
from raysweep.instance_weights import GeometryWeight, UniformWeight
from raysweep.method import Method, Term
from raysweep.schedules import (
    CosineSchedule,
    InterpolatedSchedule,
    LinearSchedule,
    PiecewiseSchedule,
)
from raysweep.spec import SpecError, apply_overrides, flatten_spec
from raysweep.training.config import TrainingConfig, build_training_config
from raysweep.yaml_files import parse_yaml


def problems(method: str, changes: dict) -> list[str]:
    with pytest.raises(SpecError) as error:
        build_training_config(method, changes)
    return error.value.problems


@pytest.mark.parametrize("method", METHODS)
def test_a_config_survives_json_and_keeps_its_digest(method: str) -> None:
    config = build_training_config(method)
    again = TrainingConfig.from_data(config.to_json_dict())
    assert again == config
    assert again.digest() == config.digest()


def test_infinity_survives_json() -> None:
    config = build_training_config("gairat", {"method.terms.pgd.weight.lam": math.inf})
    assert (
        TrainingConfig.from_data(config.to_json_dict()).method.terms["pgd"].weight.lam == math.inf
    )


def test_digest_changes_with_any_setting() -> None:
    base = build_training_config("lrat")
    assert base.digest() != apply_overrides(base, {"seed": 1}).digest()
    assert base.digest() != apply_overrides(base, {"method.attacks.cw.steps": 9}).digest()


def test_at_replaces_schedules_by_numbers_everywhere() -> None:
    config = build_training_config(
        "at", {"*.eps": {"kind": "linear", "first": 0.0, "last": 0.1, "end": 10}, "epochs": 20}
    )
    assert config.resolve_at(5).method.attacks["pgd"].eps == pytest.approx(0.05)
    assert config.resolve_at(50).validation.attacks["cw"].eps == pytest.approx(0.1)
    assert config.resolve_at(0).optim.lr == 0.05


def test_burn_in_epochs_have_the_settings_of_adversarial_training() -> None:
    weight = GeometryWeight(lam=-1.0, burn_in=3)
    assert weight.resolve_at(2) == UniformWeight()
    assert weight.resolve_at(3) == GeometryWeight(lam=-1.0)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (PiecewiseSchedule(boundaries=(2, 4), values=(1, 2, 3)), [1, 1, 2, 2, 3, 3]),
        (LinearSchedule(first=0, last=4, end=4), [0, 1, 2, 3, 4, 4]),
        (LinearSchedule(first=1, last=0, start=2, end=4), [1, 1, 1, 0.5, 0, 0]),
        (
            CosineSchedule(first=1, last=0, end=4),
            [1, 0.8535533905932737, 0.5, 0.14644660940672624, 0, 0],
        ),
        (InterpolatedSchedule(epochs=(0, 2, 4), values=(0, 1, 0)), [0, 0.5, 1, 0.5, 0, 0]),
    ],
    ids=lambda case: getattr(case, "kind", ""),
)
def test_schedules(schedule, expected) -> None:
    assert [schedule.value_at(epoch) for epoch in range(6)] == pytest.approx(expected)


def test_fractions_are_numbers() -> None:
    assert build_training_config("lrat", {"*.eps": "8/255"}).method.attacks["cw"].eps == 8 / 255


def test_all_problems_are_reported_at_once_with_the_nearest_names() -> None:
    lines = problems(
        "lrat", {"epochz": 1, "method.terms.pgd.weight.alhpa": 2, "method.attacks.cw.steps": 0}
    )
    assert "no setting 'epochz'; nearest: epochs" in lines
    assert (
        "no setting 'method.terms.pgd.weight.alhpa'; nearest: method.terms.pgd.weight.alpha"
        in lines
    )
    assert "method.attacks.cw.steps = 0: must be greater than or equal to 1" in lines


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"method.attacks.pgd.loss": "cee"},
            ["method.attacks.pgd.loss = 'cee'", "'ce', 'cw', 'kl' or 'slm'"],
        ),
        ({"method.terms.pgd.weight.kind": "geomety"}, ["no kind 'geomety'", "nearest: geometry"]),
        ({"method.terms.bound.on": "naturl"}, ["no input 'naturl'", "natural"]),
        ({"method.terms.pgd.weight.alpha": -1}, ["alpha = -1", "at least 0"]),
        (
            {"optim.lr": {"kind": "piecewise", "boundaries": [3], "values": [1]}},
            ["1 boundaries need 2 values"],
        ),
        ({"optim.lr.values": [1, 2, float("nan")]}, ["optim.lr", "at least 0"]),
        ({"model.name": "resnet19"}, ["no model 'resnet19'", "resnet18"]),
        ({"data.name": "cifar"}, ["no data set 'cifar'", "cifar10"]),
        ({"batch_size": "many"}, ["batch_size = 'many'", "integer"]),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_a_wrong_setting_is_one_line_that_says_what_is_allowed(changes, words) -> None:
    (line,) = problems("lrat", changes)
    assert all(word in line for word in words), line


def test_a_wrong_key_in_a_written_out_method_is_named() -> None:
    inline = {
        "terms": {"a": {"on": "pgd", "wieght": {"kind": "uniform"}}},
        "attacks": {"pgd": {"kind": "pgd"}},
    }
    with pytest.raises(
        SpecError, match=r"no setting 'method.terms.a.wieght'; nearest: method.terms.a.weight"
    ):
        build_training_config(inline)


def test_setting_a_kind_puts_the_rest_of_that_part_to_its_defaults() -> None:
    changes = {"method.terms.pgd.weight.kind": "geometry", "method.terms.pgd.weight.lam": "inf"}
    assert build_training_config("lrat", changes).method.terms["pgd"].weight == GeometryWeight(
        lam=math.inf
    )


def test_terms_must_name_what_exists_and_remainders_what_came_before() -> None:
    with pytest.raises(SpecError, match="'pgd' is not a term before it"):
        Method.from_data(
            {
                "attacks": {"pgd": {"kind": "pgd"}},
                "terms": {
                    "bound": {
                        "on": "natural",
                        "weight": {"kind": "remainder", "total": 1, "of": ["pgd"]},
                    },
                    "pgd": {"on": "pgd"},
                },
            }
        )
    with pytest.raises(SpecError, match="no term uses it"):
        Method.from_data(
            {"attacks": {"pgd": {"kind": "pgd"}}, "terms": {"clean": {"on": "natural"}}}
        )
    with pytest.raises(SpecError, match="need kappa"):
        Method.from_data({"terms": {"clean": {"on": "natural", "weight": {"kind": "geometry"}}}})


@pytest.mark.parametrize(
    ("attack", "weight", "message"),
    [
        (
            {"kind": "apgd"},
            {"kind": "within_margin"},
            "take kappa from pgd or minimal; 'made' is apgd",
        ),
        ({"kind": "minimal"}, {"kind": "geometry"}, "take kappa from pgd; 'made' is minimal"),
        ({"kind": "pgd", "steps": 1}, {"kind": "geometry", "official": True}, "must be 2 or more"),
    ],
)
def test_weights_that_no_step_could_compute_are_refused(attack, weight, message) -> None:
    with pytest.raises(SpecError, match=message):
        Method.from_data(
            {"attacks": {"made": attack}, "terms": {"robust": {"on": "made", "weight": weight}}}
        )


def test_validation_is_judged_by_what_it_measures() -> None:
    with pytest.raises(SpecError, match=r"objective = 'cw': none of `attacks`: pgd"):
        build_training_config(
            "at", {"validation.objective": "cw", "validation.attacks": {"pgd": {"kind": "pgd"}}}
        )


def test_flatten_gives_every_leaf_under_the_path_that_override_takes() -> None:
    config = build_training_config("lrat")
    for path, value in flatten_spec(config).items():
        if isinstance(value, int | float | bool) and "." in path:
            assert apply_overrides(config, {path: value}) == config


@given(st.floats(0, 10), st.integers(1, 50))
def test_override_sets_what_it_is_told_and_nothing_else(alpha: float, steps: int) -> None:
    base = METHODS["lrat"]()
    changed = apply_overrides(base, {"terms.pgd.weight.alpha": alpha, "attacks.*.steps": steps})
    assert changed.terms["pgd"].weight.alpha == alpha
    assert {attack.steps for attack in changed.attacks.values()} == {steps}
    assert changed.terms["cw"] == base.terms["cw"]
    assert isinstance(changed.terms["bound"], Term)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{on: natural, off: no}", {"on": "natural", "off": "no"}),
        ("[true, False, yes]", [True, False, "yes"]),
        (
            "[1e-3, 1.5e2, -1E+2, 1., .5, -.inf, 10, 1_000]",
            [1e-3, 150.0, -100.0, 1.0, 0.5, float("-inf"), 10, "1_000"],
        ),
        ("[8/255, 2026-11-21x, v1.2.3, e5, 1e]", ["8/255", "2026-11-21x", "v1.2.3", "e5", "1e"]),
    ],
)
def test_yaml_has_words_that_are_words_and_numbers_that_are_numbers(text, value) -> None:
    assert parse_yaml(text) == value
