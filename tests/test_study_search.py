"""What Optuna is asked and told by a sweep: real studies in memory, trials whose reports are
written out here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FixedTrial, FrozenTrial

from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import Sampler, SearchSpace
from raysweep.sweep.trial import Trial
from raysweep.training.failure_reports import FAILURE_KEY
from raysweep.training.selection import SelectionRule

pytestmark = pytest.mark.needs_ray

if TYPE_CHECKING:
    from raysweep.sweep.optuna_search import LedgerSearcher

ALPHA = "method.terms.pgd.weight.alpha"
BETA = "method.terms.pgd.weight.beta"
ON = "method.terms.bound.on"
Begin = Callable[..., "LedgerSearcher"]


@pytest.fixture
def begin_search(tmp_path: Path) -> Begin:
    """Function that starts a search on the ledger of a new sweep, which holds the trials `past`."""
    from raysweep.sweep.optuna_search import LedgerSearcher

    def begin_search(*past_trial: Trial, **changes: Any) -> LedgerSearcher:
        data = {
            "method": "lrat",
            "trials": 4,
            "sampler": {"kind": "random"},
            "scheduler": {"kind": "none"},
            "space": {ALPHA: {"float": [0.5, 4.0]}},
        }
        ledger = Ledger.create(tmp_path / "sweep", SearchSpace.from_data({**data, **changes}))
        for trial in past_trial:
            ledger.save_trial(trial)
        return LedgerSearcher(ledger)

    return begin_search


def row(epoch: int, worst: float, clean: float = 0.75, gap: float = 0.0) -> dict[str, Any]:
    """What a trial reports about an epoch, with the keys that Tune adds."""
    ours = {"epoch": float(epoch), "robust_worst": worst, "clean": clean, "masking_gap": gap}
    return {**ours, "training_iteration": epoch, "trial_id": "a", "done": False}


def past_trial(
    number: int, value: float | None = 0.5, alpha: float | None = None, **more: Any
) -> Trial:
    """A trial of an earlier driver. value: of its best epoch; None for a trial that failed before
    it had one.
    """
    best = {} if value is None else {"epoch": 1.0, "robust_worst": value, "masking_gap": 0.0}
    state = "failed" if value is None else "finished"
    return Trial(
        number,
        **{"params": {ALPHA: alpha or 1.0 + number / 4}, "state": state, "best": best, **more},
    )


def run(search: "LedgerSearcher", name: str, *rows: dict[str, Any], **how: Any) -> FrozenTrial:
    """Let a trial report these epochs and end with the last, as Tune does; return Optuna's record
    of the trial.
    """
    search.suggest(name)
    for metrics in rows:
        search.on_trial_result(name, metrics)
    search.on_trial_complete(name, **{"result": rows[-1] if rows else None, **how})
    return search._study.get_trials()[-1]


def recorded_trials(search: "LedgerSearcher") -> list[tuple[str, list[float] | None]]:
    return [(trial.state.name, trial.values) for trial in search._study.get_trials()]


def test_optuna_is_told_the_value_and_the_gap_of_the_best_epoch(begin_search: Begin) -> None:
    search = begin_search(max_masking_gap=0.125)
    rows = [row(1, 0.25, gap=0.5), row(2, 0.625, gap=0.0625), row(3, 0.375, gap=0.25)]
    trial = run(search, "a", *rows)
    assert (trial.state.name, trial.value) == ("COMPLETE", 0.625)
    assert trial.constraints == {"masking_gap": -0.0625}, "0.0625 of the best epoch, less 0.125"


def test_optuna_is_told_the_best_mean_over_the_epochs_of_a_score(begin_search: Begin) -> None:
    search = begin_search(score_epochs=2, max_masking_gap=0.125)
    trial = run(search, "a", row(1, 0.25), row(2, 0.75, gap=0.25), row(3, 0.5), row(4, 0.5))
    assert trial.value == 0.625 and trial.constraints == {"masking_gap": 0.125}, "of epoch 2"
    # The mean of one epoch that is not followed by another yet.
    assert run(search, "b", row(1, 0.25)).value == 0.25


def test_a_last_report_that_comes_with_the_end_may_be_the_best(begin_search: Begin) -> None:
    """Tune passes the last report of a trial to `on_trial_complete` only."""
    search = begin_search(max_masking_gap=0.125)
    trial = run(search, "a", row(1, 0.25), result=row(2, 0.5, gap=0.25))
    assert (trial.value, trial.constraints) == (0.5, {"masking_gap": 0.125})


def test_no_limit_is_no_constraint(begin_search: Begin) -> None:
    trial = run(begin_search(past_trial(0)), "a", row(1, 0.25, gap=0.5))
    assert trial.constraints == {} and trial.value == 0.25


@pytest.mark.parametrize(
    "end",
    [
        {"result": {"failed": "the loss became nan", "training_iteration": 3}},
        {"result": {"failed": "the loss became nan", "robust_worst": 0.75}},
        {"result": row(2, 0.625), "error": True},
        {"result": None, "error": True},
    ],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_trial_that_fails_after_a_good_epoch_is_told_as_failed(
    begin_search: Begin, end: dict, resumed: bool
) -> None:
    earlier = [past_trial(0, 0.75, state="running", epoch=1)] if resumed else []
    trial = run(
        begin_search(*earlier, max_masking_gap=0.125), "a", row(1, 0.25), row(2, 0.625), **end
    )
    assert (trial.state.name, trial.values) == ("FAIL", None)


def test_a_trial_without_a_report_is_told_as_failed(begin_search: Begin) -> None:
    search = begin_search()
    assert run(search, "a").state.name == "FAIL"
    assert run(search, "b", {"epoch": 1.0, "clean": 0.5}).state.name == "FAIL", (
        "the objective was never measured"
    )


@pytest.mark.parametrize(("after", "best"), [(0.25, 0.75), (0.75, 0.75), (0.875, 0.875)])
def test_a_resumed_trial_is_told_with_the_best_of_all_its_epochs(
    begin_search: Begin, after: float, best: float
) -> None:
    before = {"epoch": 1.0, "robust_worst": 0.75, "masking_gap": 0.0625}
    going = Trial(0, {ALPHA: 2.0}, epoch=2, best=before, latest=before, curve=[[1, 0.75], [2, 0.5]])
    search = begin_search(going, max_masking_gap=0.125)
    trial = run(search, "a", row(3, after, gap=0.25))
    assert (trial.state.name, trial.value, trial.params) == ("COMPLETE", best, {ALPHA: 2.0})
    assert trial.constraints == {"masking_gap": 0.125 if after > 0.75 else -0.0625}, (
        "the gap is that of the same epoch"
    )
    assert len(search._study.get_trials()) == 1


@pytest.mark.parametrize(
    ("metric", "epoch", "values"),
    [(["robust_worst", "clean"], 2, [0.5, 0.625]), (["clean", "robust_worst"], 4, [1.0, 0.375])],
)
def test_several_objectives_are_those_of_one_epoch_and_the_first_chooses_it(
    begin_search: Begin, metric: list[str], epoch: int, values: list[float]
) -> None:
    rows = [row(1, 0.25, 0.875), row(2, 0.5, 0.625), row(3, 0.5, 0.75), row(4, 0.375, 1.0)]
    search = begin_search(metric=metric)
    assert run(search, "a", *rows).values == values, "the first of epochs that tie"
    assert [direction.name for direction in search._study.directions] == ["MAXIMIZE", "MAXIMIZE"]
    trial = Trial(0, {})
    for metrics in rows:
        trial = trial.with_epoch(metrics, SelectionRule(metric[0]))
    assert trial.best["epoch"] == epoch, "the ledger keeps the same epoch"


def test_a_gap_exactly_at_the_limit_is_feasible_for_optuna_and_for_the_ranking(
    begin_search: Begin,
) -> None:
    gaps = {0: (0.875, 0.1250001), 1: (0.5, 0.125), 2: (0.375, 0.0)}
    trials = [
        past_trial(number, best={"epoch": 1.0, "robust_worst": value, "masking_gap": gap})
        for number, (value, gap) in gaps.items()
    ]
    search = begin_search(*trials, max_masking_gap=0.125)
    assert search._study.best_trial.value == 0.5, "for Optuna a constraint of 0 is met"
    assert [trial.number for trial in search._ledger.rank_trials()] == [1, 2, 0]
    constraints = [trial.constraints["masking_gap"] for trial in search._study.get_trials()]
    assert constraints[0] > 0 and constraints[1:] == [0.0, -0.125]


def test_the_past_is_told_by_its_states_and_its_best_epochs(begin_search: Begin) -> None:
    curve = [[1, 0.25], [2, 0.625], [3, 0.375]]
    trials = [
        past_trial(
            0, 0.625, state="stopped", curve=curve, latest={"epoch": 3.0, "robust_worst": 0.375}
        ),
        past_trial(1, 0.75, state="failed", reason="the loss became nan"),
        past_trial(2, None, state="finished"),
        past_trial(3, 0.5, state="running"),
    ]
    search = begin_search(*trials)
    assert recorded_trials(search) == [
        ("COMPLETE", [0.625]),
        ("FAIL", None),
        ("FAIL", None),
        ("RUNNING", None),
    ]
    first, second, _, running = search._study.get_trials()
    assert running.params == {ALPHA: 1.75}, "the sampler avoids what is being tried"
    assert first.intermediate_values == {1: 0.25, 2: 0.625, 3: 0.375}
    assert [first.user_attrs["raysweep.number"], second.user_attrs["raysweep.number"]] == [0, 1]
    assert second.user_attrs["reason"] == "the loss became nan" and "reason" not in first.user_attrs


def test_unfinished_trials_come_first_in_their_order_and_once(begin_search: Begin) -> None:
    trials = [
        past_trial(0),
        past_trial(2, state="running"),
        past_trial(3, state="running"),
        past_trial(5, state="failed"),
    ]
    search = begin_search(*trials, trials=8)
    asked = [search.suggest(name) for name in "abcdefg"]
    assert [found["number"] for found in asked[:-1]] == [2, 3, 1, 4, 6, 7], (
        "then numbers that no trial has"
    )
    assert [found["params"] for found in asked[:2]] == [{ALPHA: 1.5}, {ALPHA: 1.75}]
    assert asked[-1] == "FINISHED"


def test_a_sweep_that_has_all_its_trials_is_at_its_end(begin_search: Begin) -> None:
    assert begin_search(past_trial(0), past_trial(1), trials=2).suggest("a") == "FINISHED"


def test_each_starting_point_is_tried_unless_some_trial_has_it(begin_search: Begin) -> None:
    two = {ALPHA: {"float": [0.5, 4.0]}, BETA: {"float": [0.5, 4.0]}}
    start = [
        {ALPHA: 1.0, BETA: 2.0},
        {ALPHA: 2.0},
        {ALPHA: 3.0, BETA: 3.0},
        {ALPHA: 1.0, BETA: 3.0},
    ]
    trials = [
        past_trial(0, params={ALPHA: 1.0, BETA: 2.0}),
        past_trial(1, params={ALPHA: 2.0, BETA: 1.0}),
    ]
    search = begin_search(*trials, space=two, start=start, trials=6)
    third, fourth, fifth = (search.suggest(name)["params"] for name in "abc")
    assert [third, fourth] == [{ALPHA: 3.0, BETA: 3.0}, {ALPHA: 1.0, BETA: 3.0}], (
        "in the order of the file"
    )
    assert fifth[ALPHA] not in (1.0, 2.0, 3.0)


def test_the_sampler_draws_the_settings_that_a_starting_point_lacks(begin_search: Begin) -> None:
    two = {ALPHA: {"float": [0.5, 4.0]}, BETA: {"float": [0.5, 4.0]}}
    settings = begin_search(space=two, start=[{BETA: 2.0}]).suggest("a")["params"]
    assert (
        list(settings) == [ALPHA, BETA] and settings[BETA] == 2.0 and 0.5 <= settings[ALPHA] <= 4.0
    )


def test_choices_that_are_not_scalars_come_back_from_optuna_unchanged(begin_search: Begin) -> None:
    choices = [[0.1, 0.01], [0.05], None, 2, "2", {"kind": "x"}]
    values = {"optim.lr.values": {"categorical": choices}}
    start = [{"optim.lr.values": choice} for choice in ([0.05], {"kind": "x"})]
    done = past_trial(0, params={"optim.lr.values": [0.1, 0.01]})
    search = begin_search(done, method="at", space=values, start=start, trials=6)
    found = [search.suggest(name)["params"]["optim.lr.values"] for name in "abcde"]
    assert found[:2] == [[0.05], {"kind": "x"}]
    assert sorted(map(repr, found)) == sorted(map(repr, choices[1:])), (
        "the other choices, each as it was written"
    )
    assert search._study.get_trials()[0].params == {"optim.lr.values": "[0.1, 0.01]"}


def test_optuna_is_asked_with_the_distributions_of_the_file(begin_search: Begin) -> None:
    space = {
        "optim.lr": {"float": [0.001, 0.5], "log": True},
        "optim.weight_decay": {"float": [0.0, 1.0], "step": 0.25},
        "method.terms.*.weight.burn_in": {"int": [1, 9], "step": 2},
        "batch_size": {"int": [16, 256], "log": True},
        "seed": {"int": [0, 3]},
        "optim.nesterov": {"categorical": [True, False]},
    }
    asked: dict[str, Any] = {
        "optim.lr": FloatDistribution(0.001, 0.5, log=True),
        "optim.weight_decay": FloatDistribution(0.0, 1.0, step=0.25),
        "method.terms.*.weight.burn_in": IntDistribution(1, 9, step=2),
        "batch_size": IntDistribution(16, 256, log=True),
        "seed": IntDistribution(0, 3),
        "optim.nesterov": CategoricalDistribution([True, False]),
    }
    names = (
        "optim.lr",
        "optim.weight_decay",
        "method.terms.*.weight.burn_in",
        "batch_size",
        "seed",
        "optim.nesterov",
    )
    settings = dict(zip(names, (0.01, 0.75, 3, 64, 3, False), strict=True))
    search = begin_search(past_trial(0, params=settings), method="gairat", space=space)
    search.suggest("a")
    remembered, live = search._study.get_trials()
    assert remembered.distributions == asked and live.distributions == asked
    assert remembered.params == settings


@pytest.mark.parametrize(("trials", "points"), [(3, 3), (4, 4), (9, 4)])
def test_a_grid_ends_with_its_points_or_is_cut_short_by_trials(
    begin_search: Begin, trials: int, points: int
) -> None:
    grid = {ALPHA: {"categorical": [4.0, 0.5]}, ON: {"categorical": ["natural", "pgd"]}}
    search = begin_search(sampler={"kind": "grid"}, space=grid, trials=trials)
    assert search._ledger.space.n_trials == points
    *found, end = [search.suggest(str(number)) for number in range(points + 1)]
    ordered = [{ALPHA: alpha, ON: on} for alpha in (4.0, 0.5) for on in ("natural", "pgd")]
    assert (
        found == [{"number": n, "params": ordered[n]} for n in range(points)] and end == "FINISHED"
    )


def test_a_restarted_sampler_does_not_repeat_its_draws(begin_search: Begin) -> None:
    draws = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=7))
    earlier = [draws.ask().suggest_float(ALPHA, 0.5, 4.0) for _ in range(12)]
    trials = [past_trial(number, alpha=alpha) for number, alpha in enumerate(earlier)]
    search = begin_search(*trials, trials=14, sampler={"kind": "random", "seed": 7})
    found = [search.suggest(name)["params"][ALPHA] for name in "ab"]
    assert not set(found) & set(earlier)


def test_the_gaussian_process_models_conditional_settings_and_tries_active_ones(
    begin_search: Begin,
) -> None:
    shape, lam = "method.terms.pgd.weight.shape", "method.terms.pgd.weight.lam"
    space = {
        shape: {"categorical": ["linear", "tanh"]},
        lam: {"float": [-3.0, 3.0], "when": {shape: "tanh"}},
    }
    # The best lambda is 2, and tanh beats linear.
    past = [past_trial(number, 0.2, params={shape: "linear"}) for number in range(3)]
    for number, value in enumerate((-3.0, -2.0, -1.0, 0.0, 1.0, 1.5, 2.5, 3.0), 3):
        robust = 0.75 - abs(value - 2.0) / 16
        past.append(past_trial(number, robust, params={shape: "tanh", lam: value}))
    sampler = {"kind": "gp", "n_startup_trials": 4}
    search = begin_search(*past, method="gairat", space=space, sampler=sampler, trials=14)
    assert all(set(trial.params) == {shape, lam} for trial in search._study.get_trials())
    found = [search.suggest(name)["params"] for name in "ab"]
    assert all(
        set(params) == ({shape, lam} if params[shape] == "tanh" else {shape}) for params in found
    )
    assert found[0][shape] == "tanh" and abs(found[0][lam] - 2.0) < 0.6


def test_a_condition_on_null_needs_the_value_not_its_absence() -> None:
    shape, burn_in = "method.terms.pgd.weight.shape", "method.terms.pgd.weight.burn_in"
    space = SearchSpace.from_data(
        {
            "method": "gairat",
            "space": {
                shape: {"categorical": ["linear", "tanh"]},
                "optim.clip": {"categorical": [None, 1.0], "when": {shape: "tanh"}},
                burn_in: {"int": [1, 6], "when": {"optim.clip": None}},
            },
        }
    )
    for values, active in [
        ({shape: "linear", "optim.clip": None, burn_in: 3}, {shape}),
        ({shape: "tanh", "optim.clip": 1.0, burn_in: 3}, {shape, "optim.clip"}),
        ({shape: "tanh", "optim.clip": None, burn_in: 3}, {shape, "optim.clip", burn_in}),
    ]:
        assert space.suggest_params(FixedTrial(values)).keys() == active  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "of_optuna"),
    [
        ("tpe", "TPESampler"),
        ("gp", "GPSampler"),
        ("random", "RandomSampler"),
        ("nsga2", "NSGAIISampler"),
    ],
)
def test_each_sampler_is_that_of_optuna(kind: str, of_optuna: str) -> None:
    assert type(Sampler(kind=kind).build_sampler()).__name__ == of_optuna  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["random", "grid", "tpe", "nsga2"])
def test_the_seed_of_a_sampler_counts_the_trials_before(kind: str) -> None:
    def draw(sampler: Sampler, past_trial: int) -> float:
        study = optuna.create_study(direction="maximize", sampler=sampler.build_sampler(past_trial))
        return study.ask().suggest_float("x", 0.0, 1.0)

    expected = (
        optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=5))
        .ask()
        .suggest_float("x", 0.0, 1.0)
    )
    assert draw(Sampler(kind=kind, seed=5), 0) == draw(Sampler(kind=kind, seed=2), 3)  # type: ignore[arg-type]
    assert draw(Sampler(kind=kind, seed=2), 0) != draw(Sampler(kind=kind, seed=2), 3)  # type: ignore[arg-type]
    assert draw(Sampler(kind=kind, seed=5), 0) == expected  # type: ignore[arg-type]


def test_tpe_draws_at_random_until_startup_trials_have_results(begin_search: Begin) -> None:
    search = begin_search(trials=16, sampler={"kind": "tpe", "seed": 3, "n_startup_trials": 3})
    random = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    same = []
    for number in range(6):
        drawn = search.suggest(str(number))["params"][ALPHA]
        # Of two candidates the first, because trials of LRAT share no epochs.
        candidates = [random.ask().suggest_float(ALPHA, 0.5, 4.0) for _ in range(2)]
        same.append(drawn == candidates[0])
        search.on_trial_result(str(number), row(1, drawn / 4))
        # The third has no result.
        search.on_trial_complete(str(number), row(1, drawn / 4), error=number == 2)
    assert same == [True, True, True, True, False, False]


def test_failed_trials_do_not_count_for_a_generation(begin_search: Begin) -> None:
    trials = [
        past_trial(0, 0.5),
        past_trial(1, None),
        past_trial(2, 0.25),
        past_trial(3, 0.75),
        past_trial(4, None),
        past_trial(5, 0.125),
        past_trial(6, 0.25),
    ]
    study = begin_search(*trials, trials=8, sampler={"kind": "nsga2", "n_startup_trials": 2})._study
    sampler = study.sampler
    assert isinstance(sampler, optuna.samplers.NSGAIISampler) and sampler.population_size == 2
    complete = [trial for trial in study.get_trials() if trial.state.name == "COMPLETE"]
    assert [sampler.get_trial_generation(study, trial) for trial in complete] == [0, 0, 1, 1, 2]


def test_a_genetic_sampler_chooses_the_best_of_the_past_as_parents(begin_search: Begin) -> None:
    values = [0.125, 0.875, 0.75, 0.25]
    trials = [
        past_trial(number, value, alpha=1.0 + number / 4) for number, value in enumerate(values)
    ]
    study = begin_search(*trials, sampler={"kind": "nsga2", "n_startup_trials": 4}, trials=8)._study
    generation = study.sampler.select_parent(study, 1)  # type: ignore[attr-defined]
    assert sorted(parent.value for parent in generation) == sorted(values)
    fresh = Sampler(kind="nsga2", n_startup_trials=2)
    assert (
        fresh.build_sampler().population_size == 2
        and Sampler(kind="nsga2").build_sampler().population_size == 8
    )  # type: ignore[attr-defined]


def test_settings_are_not_tried_again_even_if_their_trial_failed(begin_search: Begin) -> None:
    choices = {ALPHA: {"categorical": [0.5, 1.0, 2.0]}, ON: {"categorical": ["natural"]}}
    trials = [
        past_trial(0, None, params={ON: "natural", ALPHA: 2.0}),
        past_trial(1, params={ALPHA: 0.5, ON: "natural"}),
    ]
    found = begin_search(*trials, space=choices).suggest("a")["params"]
    assert found == {ALPHA: 1.0, ON: "natural"}, "the order of the settings does not matter"


@pytest.mark.parametrize("kind", ["tpe", "gp"])
def test_of_two_random_candidates_the_one_that_shares_more_epochs_is_tried(
    kind: str, begin_search: Begin
) -> None:
    """Trials of GAIRAT are AT, and so share their epochs, until the shorter burn-in of the two."""
    burn_in, lam = "method.terms.pgd.weight.burn_in", "method.terms.pgd.weight.lam"
    search = begin_search(
        method="gairat",
        trials=12,
        sampler={"kind": kind, "n_startup_trials": 5},
        space={burn_in: {"int": [1, 6]}, lam: {"float": [-1.0, 1.0]}},
        points_to_evaluate=[{burn_in: 2, lam: 0.0}],
    )
    asked = []
    for number in range(5):
        params = search.suggest(str(number))["params"]
        drawn = [trial.params[burn_in] for trial in search._study.get_trials()][len(asked) :]
        asked += drawn
        if number == 0:
            assert drawn == [2], "the starting point, without another candidate"
            longest = 2
            continue
        first, second = (min(candidate, longest) for candidate in drawn)
        assert params[burn_in] == drawn[second > first]
        longest = max(longest, params[burn_in])
        states = [trial.state.name for trial in search._study.get_trials()[-2:]]
        assert sorted(states) == ["FAIL", "RUNNING"], "the other candidate is no trial"
    assert len(set(asked)) > 2 and longest > 2
    for number in range(5):
        search.on_trial_complete(str(number), row(7, 0.5 + number / 100))
    n_before = len(search._study.get_trials())
    search.suggest("modelled")
    assert len(search._study.get_trials()) == n_before + 1


def test_params_that_are_not_valid_together_end_no_search(begin_search: Begin) -> None:
    """Nesterov momentum needs momentum. Such a trial fails when it starts; here each draw is one,
    and so is a trial of an earlier driver.
    """
    space = {
        "optim.nesterov": {"categorical": [True]},
        "optim.momentum": {"categorical": [0.0]},
        ALPHA: {"float": [0.5, 4.0]},
    }
    params = {"optim.nesterov": True, "optim.momentum": 0.0, ALPHA: 1.0}
    past = Trial(0, params, "failed", reason="optim.nesterov needs optim.momentum > 0")
    search = begin_search(past, space=space, sampler={"kind": "tpe"})
    for number in (1, 2, 3):
        config = search.suggest(f"t{number}")
        assert isinstance(config, dict) and config["number"] == number
        search.on_trial_complete(f"t{number}", {FAILURE_KEY: "optim.nesterov needs momentum"})
    assert search.suggest("t4") == "FINISHED"
