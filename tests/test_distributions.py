"""Distributions, conditions, grids and starting points of a search space, against Optuna's and
lists by hand.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from raysweep.spec import SpecError
from raysweep.sweep.search_space import Distribution, SearchSpace, load_space

LR = "optim.lr"
DECAY = "optim.weight_decay"
SHAPE = "method.terms.pgd.weight.shape"
LAM = "method.terms.pgd.weight.lam"
BURN_IN = "method.terms.pgd.weight.burn_in"


def gairat(**changes: Any) -> SearchSpace:
    space = {
        SHAPE: {"categorical": ["tanh", "sigmoid", "linear"]},
        LAM: {"float": [-2.0, 2.0], "when": {SHAPE: ["tanh", "sigmoid"]}},
        BURN_IN: {"int": [0, 6]},
    }
    return SearchSpace.from_data({"method": "gairat", "trials": 4, "space": space, **changes})


HELD: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    (
        {"float": [0.5, 4.0]},
        [0.5, 4.0, 1, 3.999],
        [0.4999999, 4.0000001, -1, "1", None, float("nan"), [1.0]],
    ),
    ({"float": [0.001, 1.0], "log": True}, [0.001, 0.5, 1.0], [0.0009, 1.001, 0.0]),
    ({"float": [0.0, 1.0], "step": 0.25}, [0.0, 0.25, 0.5, 1.0, 1], [0.3, 0.125, 1.25, -0.25]),
    ({"float": [0.1, 0.9], "step": 0.2}, [0.1, 0.3, 0.7, 0.9], [0.2, 0.4, 0.8]),
    ({"float": [0.0, 1.0], "step": 0.3}, [0.0, 0.3, 0.6, 0.9], [1.0, 0.35]),
    ({"int": [1, 6]}, [1, 6, 3, 3.0], [0, 7, 2.5, "3"]),
    ({"int": [1, 9], "step": 2}, [1, 3, 9], [2, 4, 8, 10, -1]),
    ({"int": [2, 9], "step": 3}, [2, 5, 8], [9, 3, 6]),
    ({"int": [16, 256], "log": True}, [16, 17, 256], [15, 257, 16.5]),
    (
        {"categorical": ["a", 1.5, None, [1, 2]]},
        ["a", 1.5, None, [1, 2]],
        ["b", 1, [2, 1], "[1, 2]", (1, 2)],
    ),
    ({"categorical": [True, False]}, [True, False], ["True", None, 2]),
]


@pytest.mark.parametrize(
    ("entry", "inside", "outside"), HELD, ids=[str(entry) for entry, *_ in HELD]
)
def test_what_a_distribution_holds(entry: dict, inside: list, outside: list) -> None:
    distribution = Distribution.from_data(entry)
    assert [value for value in inside if not distribution.can_propose(value)] == []
    assert [value for value in outside if distribution.can_propose(value)] == []


@pytest.mark.filterwarnings("ignore:The distribution is specified")
@pytest.mark.parametrize(
    "entry", [entry for entry, *_ in HELD if "categorical" not in entry], ids=str
)
def test_a_range_holds_what_optuna_holds(entry: dict) -> None:
    distribution = Distribution.from_data(entry)
    theirs = distribution.to_optuna()
    low, high = distribution.bounds_or_choices()
    numbers = [low + (high - low) * part / 240 for part in range(-20, 261)]
    if "int" in entry:
        numbers = [round(number) for number in numbers]
    elif "step" not in entry:
        numbers += [low, high]
    differ = [
        number
        for number in numbers
        if distribution.can_propose(number) != bool(theirs._contains(number))
    ]
    assert differ == []


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"float": [0.5, 4.0]}, FloatDistribution(0.5, 4.0)),
        ({"float": ["1/4", 4], "log": True}, FloatDistribution(0.25, 4.0, log=True)),
        ({"float": [0, 1], "step": 0.25}, FloatDistribution(0.0, 1.0, step=0.25)),
        ({"int": [1, 6]}, IntDistribution(1, 6)),
        ({"int": [1, 9], "step": 2}, IntDistribution(1, 9, step=2)),
        ({"int": [16, 256], "log": True}, IntDistribution(16, 256, log=True)),
        ({"categorical": [1, "a", None, True]}, CategoricalDistribution([1, "a", None, True])),
        ({"categorical": [[1, 2], [3]]}, CategoricalDistribution(["[1, 2]", "[3]"])),
    ],
)
def test_a_distribution_in_optunas_terms(entry: dict, expected: Any) -> None:
    distribution = Distribution.from_data(entry)
    assert distribution.to_optuna() == expected and type(distribution.to_optuna()) is type(expected)
    # `log` and `step` must also reach Optuna through `suggest`.
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    SearchSpace.from_data({"method": "at", "space": {LR: entry}}).suggest_params(study.ask())
    assert study.get_trials()[0].distributions == {LR: expected}


def test_every_choice_comes_back_as_it_was_written() -> None:
    choices = [[0.1, 0.01], [0.1], {"kind": "x"}, "0.1]", 2, "2", None, False]
    distribution = Distribution.from_data({"categorical": choices})
    texts = ["[0.1, 0.01]", "[0.1]", "{'kind': 'x'}", "0.1]", 2, "2", None, False]
    assert distribution.to_optuna().choices == tuple(texts)  # type: ignore[attr-defined]
    assert [distribution.from_optuna(text) for text in texts] == choices
    assert Distribution.from_data({"float": [0, 1]}).from_optuna(0.25) == 0.25
    assert (distribution.kind, distribution.bounds_or_choices()) == ("categorical", choices)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"int": [1, 5], "step": 0.5}, "step = 0.5: steps of an int range are whole numbers"),
        ({"int": [1, 5], "step": 1.5}, "step = 1.5: steps of an int range are whole numbers"),
        ({"int": [1, 5], "step": 0}, "step = 0: must be greater than 0"),
        ({"float": [0, 1], "step": 0}, "step = 0: must be greater than 0"),
        ({"float": [0, 1], "step": -0.5}, "step = -0.5: must be greater than 0"),
        ({"categorical": [1, 2], "step": 1}, "log and step belong to float and int"),
        ({"int": [0, 8], "log": True}, "a log range must be positive"),
        ({"int": [3, 3]}, "is empty"),
        ({"int": [1, 2.5]}, "int.1 = 2.5"),
    ],
)
def test_a_step_that_cannot_be_taken_is_refused(entry: dict, words: str) -> None:
    with pytest.raises(SpecError) as error:
        SearchSpace.from_data({"method": "gairat", "space": {BURN_IN: entry}})
    assert len(error.value.problems) == 1 and words in error.value.problems[0]
    assert error.value.problems[0].startswith(f"space.{BURN_IN}")


@pytest.mark.parametrize(
    ("entry", "value", "refused"),
    [
        ({"float": [0.0, 1.0], "step": 0.25}, 0.3, True),
        ({"float": [0.0, 1.0], "step": 0.25}, 0.75, False),
        ({"float": [0.05, 1.0], "step": 0.25}, 0.5, True),
        ({"float": [0.05, 1.0]}, 1.0, False),
        ({"float": [0.05, 1.0]}, 0.05, False),
        ({"float": [0.05, 1.0]}, 1.01, True),
        ({"categorical": [0.1, 0.2]}, 0.15, True),
    ],
)
def test_a_starting_point_off_its_distribution_is_refused(
    entry: dict, value: float, refused: bool
) -> None:
    space = SearchSpace.from_data(
        {"method": "at", "space": {LR: entry}, "points_to_evaluate": [{}, {LR: value}]}
    )
    if refused:
        (line,) = space.find_problems()
        assert line.startswith(f"points_to_evaluate.1.{LR} = {value!r}: outside the searched ")
    else:
        assert space.find_problems() == []


def test_a_starting_point_must_be_valid_settings_of_a_run() -> None:
    data = {
        "method": "at",
        "space": {"batch_size": {"categorical": [16, 32]}, LR: {"float": [0.01, 0.1]}},
    }
    assert (
        SearchSpace.from_data(
            {**data, "points_to_evaluate": [{"batch_size": 16, LR: 0.05}]}
        ).find_problems()
        == []
    )
    wrong = {**data, "space": {"batch_size": {"categorical": [1, 16]}, LR: {"float": [0.01, 0.1]}}}
    lines = SearchSpace.from_data(
        {**wrong, "points_to_evaluate": [{"batch_size": 1}]}
    ).find_problems()
    assert [line.partition(":")[0] for line in lines] == [
        "space.batch_size",
        "points_to_evaluate.0.batch_size",
    ]


def test_a_condition_names_a_searched_setting_before_it() -> None:
    late = {
        LAM: {"float": [-2.0, 2.0], "when": {SHAPE: "tanh"}},
        SHAPE: {"categorical": ["tanh", "linear"]},
    }
    (line,) = SearchSpace.from_data({"method": "gairat", "space": late}).find_problems()
    assert line == f"space.{LAM}.when: {SHAPE!r} is not a searched setting before it"


def test_settings_are_drawn_where_their_conditions_hold() -> None:
    """A chain: the third setting needs the second, which needs one of two choices of the first."""
    space = SearchSpace.from_data({
        "method": "gairat",
        "space": {
            SHAPE: {"categorical": ["tanh", "sigmoid", "linear"]},
            LAM: {"categorical": [-1.0, 1.0], "when": {SHAPE: ["tanh", "sigmoid"]}},
            BURN_IN: {"int": [1, 6], "when": {LAM: 1.0, SHAPE: "sigmoid"}},
        },
    })  # fmt: skip
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(60):
        settings = space.suggest_params(study.ask())
        seen.add((settings[SHAPE], settings.get(LAM), BURN_IN in settings))
        assert list(settings) == [path for path in space.space if path in settings], (
            "in the order of the file"
        )
    assert seen == {
        ("linear", None, False),
        ("tanh", -1.0, False),
        ("tanh", 1.0, False),
        ("sigmoid", -1.0, False),
        ("sigmoid", 1.0, True),
    }


def test_a_condition_on_a_choice_that_is_a_list() -> None:
    values, momentum = "optim.lr.values", "optim.momentum"
    space = {
        values: {"categorical": [[0.1, 0.01, 0.001], [0.2, 0.02, 0.002]]},
        momentum: {"float": [0.5, 0.9], "when": {values: [[0.1, 0.01, 0.001]]}},
    }
    found = SearchSpace.from_data({"method": "at", "space": space})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [found.suggest_params(study.ask()) for _ in range(20)]
    assert {(settings[values][0], momentum in settings) for settings in drawn} == {
        (0.1, True),
        (0.2, False),
    }
    assert found.optuna_params(drawn[0]) | {momentum: 0} == {
        values: str(drawn[0][values]),
        momentum: 0,
    }


def test_starting_points_lose_inactive_settings_and_are_tried_once() -> None:
    start = [
        {SHAPE: "linear", LAM: 1.0},
        {SHAPE: "linear", LAM: -1.0},
        {BURN_IN: 3, SHAPE: "tanh", LAM: 1.0},
        {LAM: 2.0},
        {SHAPE: "tanh", LAM: 1.0, BURN_IN: 3},
    ]
    assert gairat(start=start).initial_points == [
        {SHAPE: "linear"},
        {SHAPE: "tanh", LAM: 1.0, BURN_IN: 3},
        {LAM: 2.0},
    ]


def test_a_condition_on_a_setting_that_a_point_does_not_have_is_not_met() -> None:
    chain = {
        SHAPE: {"categorical": ["tanh", "linear"]},
        LAM: {"categorical": [-1.0, 1.0], "when": {SHAPE: "tanh"}},
        BURN_IN: {"categorical": [1, 2], "when": {LAM: 1.0}},
    }
    points = [
        {SHAPE: "tanh", LAM: -1.0},
        *({SHAPE: "tanh", LAM: 1.0, BURN_IN: n} for n in (1, 2)),
        {SHAPE: "linear"},
    ]
    assert gairat(space=chain, sampler={"kind": "grid"}).initial_points == points
    start = [{SHAPE: "linear", LAM: 1.0, BURN_IN: 1}, {SHAPE: "tanh", LAM: 1.0, BURN_IN: 1}]
    assert gairat(space=chain, start=start).initial_points == [{SHAPE: "linear"}, start[1]]


@pytest.mark.parametrize(("trials", "total"), [(3, 3), (7, 7), (8, 8), (100, 8)])
def test_a_grid_has_its_points_or_as_many_as_trials_allows(trials: int, total: int) -> None:
    """Two with a lambda of two values at two burn-ins each, one without."""
    space = gairat(
        sampler={"kind": "grid"},
        trials=trials,
        space={
            SHAPE: {"categorical": ["tanh", "linear", "sigmoid"]},
            LAM: {"categorical": [-1.0, 1.0], "when": {SHAPE: ["tanh", "sigmoid"]}},
            BURN_IN: {"categorical": [1, 2], "when": {SHAPE: ["sigmoid", "linear"]}},
        },
    )
    assert space.initial_points == [
        {SHAPE: "tanh", LAM: -1.0},
        {SHAPE: "tanh", LAM: 1.0},
        {SHAPE: "linear", BURN_IN: 1},
        {SHAPE: "linear", BURN_IN: 2},
        {SHAPE: "sigmoid", LAM: -1.0, BURN_IN: 1},
        {SHAPE: "sigmoid", LAM: -1.0, BURN_IN: 2},
        {SHAPE: "sigmoid", LAM: 1.0, BURN_IN: 1},
        {SHAPE: "sigmoid", LAM: 1.0, BURN_IN: 2},
    ]
    assert space.n_trials == total and space.find_problems() == []
    tpe = space.model_copy(update={"sampler": space.sampler.model_copy(update={"kind": "tpe"})})
    assert tpe.n_trials == trials and tpe.initial_points == []


def test_a_setting_of_the_trial_wins_over_the_base_and_that_over_the_metric() -> None:
    space = gairat(base={BURN_IN: 4, LAM: 0.5, "epochs": 6}, metric="clean")
    config = space.trial_config({BURN_IN: 2})
    weight = config.method.terms["pgd"].weight
    assert (weight.burn_in, weight.lam, config.epochs) == (2, 0.5, 6)
    assert config.validation.objective == "clean" and space.trial_config({"epochs": 3}).epochs == 3
    (line,) = gairat(base={"validation.objective": "pgd"}).find_problems()
    assert line.startswith(
        "validation.objective = 'pgd': the space maximises metric = 'robust_worst'"
    )
    assert gairat(metric=["clean", "pgd"]).objectives == (
        "clean",
        "pgd",
    ) and gairat().objectives == ("robust_worst",)


def test_what_is_fixed_leaves_the_other_conditions_and_the_rest_of_the_starting_points() -> None:
    two = {
        SHAPE: {"categorical": ["tanh", "sigmoid", "linear"]},
        "seed": {"int": [0, 3]},
        LAM: {"float": [-2.0, 2.0], "when": {SHAPE: ["tanh", "sigmoid"], "seed": [0, 1]}},
    }
    start = [{SHAPE: "tanh", "seed": 0, LAM: 1.0}, {SHAPE: "tanh"}, {SHAPE: "linear", "seed": 2}]
    space = gairat(space=two, start=start)
    tanh = space.with_overrides({SHAPE: "tanh", "epochs": 5})
    assert tanh.space[LAM].when == {"seed": [0, 1]} and list(tanh.space) == ["seed", LAM]
    assert tanh.points_to_evaluate == ({"seed": 0, LAM: 1.0}, {"seed": 2}) and tanh.base == {
        SHAPE: "tanh",
        "epochs": 5,
    }
    linear = space.with_overrides({SHAPE: "linear"})
    assert list(linear.space) == ["seed"] and linear.points_to_evaluate == (
        {"seed": 0},
        {"seed": 2},
    )
    assert space.with_overrides({}) == space
    assert space.with_overrides({"seed": 3}).space.keys() == {SHAPE}


def test_sections_for_data_sets_add_entries_and_replace_the_rest(tmp_path: Path) -> None:
    data = {
        "method": "at",
        "trials": 3,
        "base": {"epochs": 4, "batch_size": 64},
        "space": {LR: {"float": [0.01, 0.1]}, DECAY: {"float": [0.0, 0.1]}},
        "points_to_evaluate": [{LR: 0.05}],
        "for": {
            "cifar10": {
                "trials": 9,
                "base": {"epochs": 40},
                "space": {LR: {"float": [0.1, 1.0]}},
                "points_to_evaluate": [],
            }
        },
    }
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump(data))
    digits, images = load_space("", {}, file), load_space("", {"data.name": "cifar10"}, file)
    assert (digits.trials, digits.base, digits.points_to_evaluate) == (
        3,
        {"epochs": 4, "batch_size": 64},
        ({LR: 0.05},),
    )
    assert (images.trials, images.points_to_evaluate) == (9, ())
    assert images.base == {"epochs": 40, "batch_size": 64, "data.name": "cifar10"}
    assert [images.space[path].float for path in (LR, DECAY)] == [(0.1, 1.0), (0.0, 0.1)]
    file.write_text(yaml.safe_dump({**data, "base": {"data.name": "cifar10"}}))
    assert load_space("", {}, file).base == {"data.name": "cifar10", "epochs": 40}, (
        "the data set that the file names"
    )
    assert load_space("", {"data.name": "digits"}, file).trials == 3, (
        "what is set wins over the file"
    )


def test_the_folder_of_a_sweeps_data_is_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials run in other folders, and a sweep may be resumed from another folder."""
    monkeypatch.chdir(tmp_path)
    space = SearchSpace.from_data({
        "method": "at",
        "base": {"data.name": "arrays", "data.data_dir": "images", "epochs": 3},
        "space": {LR: {"float": [0.01, 0.1]}},
    })  # fmt: skip
    rooted = space.with_absolute_paths()
    assert rooted.base == {
        "data.name": "arrays",
        "data.data_dir": str(tmp_path / "images"),
        "epochs": 3,
    }
    monkeypatch.chdir("/")
    assert rooted.with_absolute_paths() == rooted
    plain = SearchSpace.from_data({"method": "at", "space": {LR: {"float": [0.01, 0.1]}}})
    assert plain.with_absolute_paths() is plain


def test_the_digest_of_a_space_names_its_values() -> None:
    plain = {"method": "at", "space": {LR: {"float": [0.01, 0.1]}, DECAY: {"float": [0.0, 0.1]}}}
    space = SearchSpace.from_data(plain)
    canonical = json.dumps(space.to_stored_dict(), sort_keys=True, separators=(",", ":"))
    assert space.digest() == hashlib.sha256(canonical.encode()).hexdigest()[:16]
    same = [
        space.to_json_dict(),
        {"space": dict(reversed(list(plain["space"].items()))), "method": "at"},  # type: ignore[attr-defined]
        {
            **plain,
            "space": {
                LR: {"float": ["1/100", 0.1], "log": False},
                DECAY: {"float": [0, 0.1], "step": None},
            },
        },
    ]
    assert {SearchSpace.from_data(data).digest() for data in same} == {space.digest()}
    other = [
        {**plain, "trials": 17},
        {**plain, "space": {LR: {"float": [0.01, 0.1], "log": True}, DECAY: {"float": [0.0, 0.1]}}},
        {
            **plain,
            "space": {LR: {"float": [0.01, 0.1], "step": 0.01}, DECAY: {"float": [0.0, 0.1]}},
        },
        {**plain, "space": {LR: {"float": [0.01, 0.2]}, DECAY: {"float": [0.0, 0.1]}}},
        {**plain, "base": {"epochs": 8}},
        {**plain, "sampler": {"seed": 1}},
    ]
    assert len({space.digest(), *(SearchSpace.from_data(data).digest() for data in other)}) == 7
