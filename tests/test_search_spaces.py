"""Every method has a search space whose every end, choice and starting point is a valid run."""

from functools import cache

import optuna
import pytest

from raysweep.catalog import METHODS
from raysweep.spec import SpecError
from raysweep.sweep.search_space import list_builtin_spaces, load_space

optuna.logging.set_verbosity(optuna.logging.WARNING)


@cache
def load_builtin_space(name):
    return load_space(name, {})


def test_every_method_has_one_and_lrat_its_papers_grid():
    assert set(list_builtin_spaces()) == {*METHODS, "lrat-grid"}
    grid = load_builtin_space("lrat-grid")
    points = {grid.trial_config(point).digest() for point in grid.initial_points}
    assert len(points) == grid.n_trials == 5 * 5 * 4
    for attack in ("pgd", "cw"):
        weights = [
            grid.trial_config(point).method.terms[attack].weight for point in grid.initial_points
        ]
        assert {w.alpha for w in weights} == {w.beta for w in weights} == {0.25, 0.5, 1.5, 2.0, 4.0}
    assert {
        grid.trial_config(point).method.terms["bound"].weight.total for point in grid.initial_points
    } == {0.1, 0.2, 0.4, 0.6}
    with pytest.raises(
        SpecError,
        match=r"pgd\.weight\.alpha: a part of the searched method\.terms\.\*\.weight\.alpha; set ",
    ):
        grid.with_overrides({"method.terms.pgd.weight.alpha": 2.0})
    assert grid.with_overrides({"method.terms.*.weight.alpha": 2.0}).n_trials == 20


@pytest.mark.parametrize("name", METHODS)
def test_space(name):
    """Both ends of every range validate (`load_space`); what is searched belongs to the method or
    the optimiser.
    """
    space = load_builtin_space(name)
    assert space.method == name
    assert space.points_to_evaluate, "a sweep starts from the paper's setting"
    assert all(set(point) == set(space.space) for point in space.points_to_evaluate)
    assert all(path.startswith(("method.", "optim.")) for path in space.space)


@pytest.mark.parametrize("name", METHODS)
def test_suggestions_are_valid_and_differ(name):
    space = load_builtin_space(name)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    digests = {space.trial_config(space.suggest_params(study.ask())).digest() for _ in range(4)}
    digests |= {space.trial_config(point).digest() for point in space.points_to_evaluate}
    assert len(digests) >= 3


@pytest.mark.parametrize("name", METHODS)
def test_weights_act_within_the_epochs(name):
    """No starting point and no end of a range leaves the weights unused."""
    space = load_builtin_space(name)
    ends = [{path: value} for path, d in space.space.items() for value in d.bounds_or_choices()]
    for settings in (*space.points_to_evaluate, *ends):
        assert not [
            line for line in space.trial_config(settings).list_warnings() if "never act" in line
        ]


@pytest.mark.parametrize("name", METHODS)
def test_spaces_fit_other_data_sets(name):
    """A space is for digits as it stands, and keeps its meaning with another network and more
    epochs.
    """
    space = load_builtin_space(name).with_overrides(
        {"data.name": "cifar10", "model.name": "resnet18", "epochs": 100}
    )
    config = space.trial_config({})
    assert (config.data.name, config.model.name, config.epochs) == ("cifar10", "resnet18", 100)
    assert set(space.space) == set(load_builtin_space(name).space)


def test_a_typo_costs_nothing(tmp_path):
    wrong = tmp_path / "gairat.yaml"
    wrong.write_text("method: gairat\nspace:\n  method.terms.pgd.weight.lamda: {float: [0, 1]}\n")
    with pytest.raises(SpecError, match="lam"):
        load_space("gairat", {}, wrong)
