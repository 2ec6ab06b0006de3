import re
from pathlib import Path

import optuna
import pytest
import yaml

from raysweep.cli import main
from raysweep.spec import SpecError
from raysweep.sweep.search_space import (
    SearchSpace,
    list_builtin_spaces,
    load_space,
    param_labels,
)
from raysweep.sweep.space_warnings import list_space_warnings

ALPHA = "method.terms.pgd.weight.alpha"
BETA = "method.terms.pgd.weight.beta"


def write(path: Path, data: dict) -> Path:
    file = path / "space.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


@pytest.mark.parametrize("name", list_builtin_spaces())
def test_shipped_spaces_are_valid_at_both_ends_of_every_range(name) -> None:
    space = load_space(name, {})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for point in space.initial_points:
        study.enqueue_trial(space.optuna_params(point))
    for _ in range(len(space.points_to_evaluate) + 5):
        settings = space.suggest_params(study.ask())
        config = space.trial_config(settings)
        assert config.method.name == space.method


def test_all_problems_of_a_file_come_at_once(tmp_path) -> None:
    data = {
        "method": "lrat",
        "trials": 0,
        "metrc": "clean",
        "space": {
            ALPHA: {"float": [4.0, 0.25]},
            "method.terms.pgd.weight.betta": {"float": [0.25, 4.0]},
            "method.terms.cw.weight.beta": {"float": [-1, 4.0]},
            "epochs": {"categorical": []},
            "seed": {"int": [1, 2], "log": True, "step": 1},
        },
    }
    with pytest.raises(SpecError) as error:
        load_space("lrat", {}, write(tmp_path, data))
    text = "\n".join(error.value.problems)
    for expected in (
        "trials = 0: must be greater than or equal to 1",
        "the range [4, 0.25] is empty: low must be below high",
        "no setting 'metrc'; nearest: metric",
        "nearest: method.terms.pgd.weight.beta",
        "method.terms.cw.weight.beta = -1.0: must be at least 0",
        "space.epochs.categorical = []: must have at least 1 item",
        "log and step exclude each other",
    ):
        assert expected in text
    assert len(error.value.problems) == 7


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({}, "needs exactly one of"),
        ({"float": [0, 1], "int": [0, 1]}, "needs exactly one of"),
        ({"categorical": [1, 2], "log": True}, "log and step belong to float and int"),
        ({"float": [0, 1], "log": True}, "a log range must be positive"),
        ({"float": [1, 1]}, "is empty"),
    ],
)
def test_a_distribution_is_checked_by_itself(entry, words, tmp_path) -> None:
    with pytest.raises(SpecError, match=words):
        load_space("lrat", {}, write(tmp_path, {"method": "lrat", "space": {ALPHA: entry}}))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"points_to_evaluate": [{ALPHA: 9.0}]},
            r"points_to_evaluate.0.*alpha = 9.0: outside the searched \[0.5, 4.0\]",
        ),
        (
            {"points_to_evaluate": [{"epochs": 3}]},
            "points_to_evaluate.0.epochs: no searched setting 'epochs'",
        ),
        ({"sampler": {"kind": "grid"}}, r"a grid needs `categorical"),
        ({"sampler": {"kind": "tpee"}}, "'tpe', 'gp', 'random', 'grid' or 'nsga2'"),
        ({"method": "gairat"}, "space for method 'gairat', not for 'lrat'"),
        ({"base": {"epochs": 0}}, "epochs = 0"),
    ],
)
def test_the_rest_of_a_space_is_checked_too(more, words, tmp_path) -> None:
    data = {"method": "lrat", "space": {ALPHA: {"float": [0.5, 4.0]}}, **more}
    with pytest.raises(SpecError, match=words):
        load_space("lrat", {}, write(tmp_path, data))


def test_what_is_set_is_searched_no_more(tmp_path) -> None:
    space = load_space("lrat", {ALPHA: 1.0, "epochs": 3})
    assert ALPHA not in space.space and ALPHA not in space.points_to_evaluate[0]
    config = space.trial_config({BETA: 2.0})
    assert config.epochs == 3 and config.method.terms["pgd"].weight.alpha == 1.0
    only = write(tmp_path, {"method": "lrat", "space": {ALPHA: {"float": [0.5, 4.0]}}})
    with pytest.raises(SpecError, match="nothing is left to search"):
        load_space("lrat", {ALPHA: 1.0}, only)


def test_what_is_set_meets_or_breaks_a_condition() -> None:
    shape, lam = "method.terms.pgd.weight.shape", "method.terms.pgd.weight.lam"
    assert lam in load_space("gairat", {shape: "tanh"}).space
    assert lam not in load_space("gairat", {shape: "linear"}).space


def test_a_space_has_sections_for_data_sets() -> None:
    burn_in = "method.terms.pgd.weight.burn_in"
    assert load_space("gairat", {}).space[burn_in].int == (1, 6)
    images = load_space("gairat", {"data.name": "cifar10"})
    assert images.space[burn_in].int == (20, 75) and images.scheduler.grace_period == 30
    assert images.trial_config(images.points_to_evaluate[0]).epochs == 100


def test_conditions_decide_what_is_asked() -> None:
    space = SearchSpace.from_data(
        {
            "method": "gairat",
            "space": {
                "method.terms.pgd.weight.shape": {"categorical": ["tanh", "linear"]},
                "method.terms.pgd.weight.lam": {
                    "float": [-2, 2],
                    "when": {"method.terms.pgd.weight.shape": "tanh"},
                },
            },
        }
    )
    assert not space.find_problems()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(12):
        settings = space.suggest_params(study.ask())
        has_lambda = "method.terms.pgd.weight.lam" in settings
        assert has_lambda == (settings["method.terms.pgd.weight.shape"] == "tanh")


def test_labels_are_short_and_unique() -> None:
    bound = ("method.terms.bound.weight.total", "method.terms.bound.on")
    assert param_labels(["optim.lr.values", "optim.weight_decay"]) == {
        "optim.lr.values": "lr.values",
        "optim.weight_decay": "weight_decay",
    }
    assert param_labels([ALPHA, BETA, "method.terms.cw.weight.alpha", "optim.lr", *bound]) == {
        ALPHA: "pgd.alpha",
        BETA: "beta",
        "method.terms.cw.weight.alpha": "cw.alpha",
        "optim.lr": "lr",
        "method.terms.bound.weight.total": "bound.total",
        "method.terms.bound.on": "bound.on",
    }
    vague = [
        "optim.lr.values",
        "method.attacks.pgd.tau.values",
        "method.attacks.cw.steps",
        "epochs",
    ]
    assert list(param_labels(vague).values()) == ["lr.values", "tau.values", "cw.steps", "epochs"]
    both = ["method.attacks.pgd.coef", "method.terms.pgd.coef"]
    assert list(param_labels(both).values()) == both


def test_another_objective_than_the_metric_is_refused() -> None:
    data = {
        "method": "at",
        "base": {"validation.objective": "clean"},
        "space": {"optim.lr": {"float": [0.01, 0.1]}},
    }
    (line,) = SearchSpace.from_data(data).find_problems()
    assert "validation.objective = 'clean': the space maximises metric = 'robust_worst'" in line
    assert SearchSpace.from_data({**data, "metric": "clean"}).find_problems() == []


def test_a_rung_that_validation_leaves_out_is_refused() -> None:
    data = {
        "method": "at",
        "base": {"validation.every": 2},
        "space": {"optim.lr": {"float": [0.01, 0.1]}},
    }
    assert SearchSpace.from_data({**data, "scheduler": {"grace_period": 4}}).find_problems() == []
    (line,) = SearchSpace.from_data({**data, "scheduler": {"grace_period": 3}}).find_problems()
    assert "cannot be compared at epoch 3" in line and "multiple of 2" in line
    assert (
        SearchSpace.from_data(
            {**data, "scheduler": {"grace_period": 3, "kind": "none"}}
        ).find_problems()
        == []
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"for": 3}, "for = 3: must be a mapping of settings"),
        ({"for": {"digits": [1]}}, "for.digits = [1]: must be a mapping of settings"),
        ({"for": {"digits": {"space": 2}}}, "for.digits.space = 2: must be a mapping of settings"),
        ({"base": "x"}, "base = 'x': must be a mapping of settings"),
        ({"space": [1], "for": {"digits": {"space": {}}}}, "space = [1]: must be a mapping"),
    ],
)
def test_parts_of_a_file_that_must_be_mappings(changes: dict, problem: str, tmp_path: Path) -> None:
    content = {"method": "at", "space": {"optim.lr": {"float": [0.1, 0.2]}}} | changes
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(SpecError, match=rf"{re.escape(str(file))}:\d+: {re.escape(problem)}"):
        load_space("", {}, file)


def test_trials_are_validated_at_one_radius() -> None:
    """The validation has the radius of the training, unless the base gives it one."""
    data = {"method": "at", "space": {"method.attacks.pgd.eps": {"float": [0.1, 0.15]}}}
    remedy = "cannot be ranked; set 'validation.*.eps' in base"
    assert SearchSpace.from_data(data).find_problems() == [
        f"space.method.attacks.pgd.eps: trials that are validated at Linf eps 0.1 and at Linf eps "
        f"0.15 {remedy}"
    ]
    fixed = data | {"base": {"validation.*.eps": 0.15}}
    assert SearchSpace.from_data(fixed).find_problems() == []
    point = fixed | {
        "space": {"validation.*.eps": {"categorical": [0.15]}},
        "points_to_evaluate": [{"validation.*.eps": 0.15}],
    }
    assert SearchSpace.from_data(point).find_problems() == []


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"float": [0.0, float("inf")]}, "the range [0.0, inf] is not finite; give two numbers"),
        ({"float": [float("-inf"), 1.0]}, "the range [-inf, 1.0] is not finite; give two numbers"),
        ({"float": [-1e308, 1e308]}, "the range [-1e+308, 1e+308] is not finite; give two numbers"),
        ({"float": [0.0, 1.0], "step": float("inf")}, "step = inf: must be at most the width"),
        ({"float": [0.0, 1.0], "step": 2.0}, "step = 2: must be at most the width of the range, 1"),
        ({"float": [0.0, 1.0], "step": 1e-320}, "and leave at most 1e+15 values"),
        ({"int": [1, 3], "step": 5}, "step = 5: must be at most the width of the range, 2"),
        ({"int": [1, 10**400]}, "is not finite; give two numbers"),
    ],
)
def test_what_cannot_be_sampled_is_refused(entry: dict, problem: str, tmp_path: Path) -> None:
    """Each of these ends in an error or a constant when Optuna draws from it."""
    (line,) = SearchSpace.from_data({"method": "at", "space": {"optim.lr": entry}}).find_problems()
    assert line.startswith("space.optim.lr: ") and problem in line


@pytest.mark.parametrize(
    "entry",
    [{"float": [0.0, 1.0], "step": 1.0}, {"float": [0.0, 1.0], "step": 1e-12},
     {"int": [1, 3], "step": 2}, {"float": [1e-300, 1e300], "log": True}],
)  # fmt: skip
def test_what_can_be_sampled_is_not_refused(entry: dict) -> None:
    path = "method.terms.pgd.weight.alpha" if "float" in entry else "method.attacks.pgd.steps"
    space = SearchSpace.from_data({"method": "lrat", "space": {path: entry}})
    assert space.find_problems() == []
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(5):
        assert space.space[path].can_propose(space.suggest_params(study.ask())[path])


@pytest.mark.parametrize(
    ("condition", "problem"),
    [
        ({"shape": "linear"}, "= linear: never happens, the searched values are ['tanh', 'sigmoid"),
        ({"shape": ["tanh", "linear"]}, "= linear: never happens"),
        ({"burn_in": 9}, "= 9: never happens, the searched values are [1, 3]"),
    ],
)
def test_a_condition_that_never_holds_is_refused(condition: dict, problem: str) -> None:
    weight = "method.terms.pgd.weight"
    when = {f"{weight}.{name}": value for name, value in condition.items()}
    (name,) = condition
    space = {
        f"{weight}.shape": {"categorical": ["tanh", "sigmoid"]},
        f"{weight}.burn_in": {"int": [1, 3]},
        f"{weight}.lam": {"float": [-1.0, 1.0], "when": when},
    }
    (line,) = SearchSpace.from_data({"method": "gairat", "space": space}).find_problems()
    assert line.startswith(f"space.{weight}.lam.when.{weight}.{name} ") and problem in line


def test_a_grid_is_whole_unless_trials_are_given(tmp_path: Path) -> None:
    grid = {
        "method": "lrat",
        "sampler": {"kind": "grid"},
        "scheduler": {"kind": "none"},
        "space": {
            ALPHA: {"categorical": [0.5, 1.0, 1.5, 2.0, 4.0]},
            BETA: {"categorical": [0.25, 0.5, 1.0, 2.0]},
        },
    }
    whole = load_space("", {}, write(tmp_path, grid))
    assert whole.n_trials == len(whole.initial_points) == 20 and whole.describe_cut_grid() == ""
    cut = load_space("", {}, write(tmp_path, {**grid, "trials": 16}))
    assert cut.n_trials == 16
    assert cut.describe_cut_grid() == "trials = 16: 16 of 20 points of the grid are tried"
    assert cut.describe_cut_grid() in list_space_warnings(cut)
    large = load_space("", {}, write(tmp_path, {**grid, "trials": 50}))
    assert (large.n_trials, large.describe_cut_grid()) == (20, "")
    # What 0.1 stored had 16 trials by default, and keeps them.
    stored = SearchSpace.from_data({**whole.to_stored_dict(), "trials": 16}, stored=True)
    assert stored.n_trials == 16


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["tune", "lrat", "--trials", "9999999999", "--plan"], "trials = 9999999999: must be"),
        (
            ["run", "digits", "--set", "stages.tune.trials=9999999999", "--plan"],
            "trials = 9999999999: must be",
        ),
        (["show", "lrat", "--set", "model.name=[digits_cnn]"], "model.name = "),
        (["show", "lrat", "--set", "model.name={a: 1}"], "model.name"),
    ],
)
def test_values_that_no_setting_allows_are_a_line(
    command: list[str], words: str, workdir: Path, capsys
) -> None:
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
