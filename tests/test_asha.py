"""Which trials ASHA stops, worked out by hand and by a plain version that counts better trials. No
Ray is started.
"""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raysweep.spec import SpecError
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import Scheduler, SearchSpace
from raysweep.sweep.trial import Trial

pytestmark = pytest.mark.needs_ray

BURN_IN = "method.terms.pgd.weight.burn_in"


class Rungs:
    """An ASHA scheduler that is given the results of epochs; `stops` says whether it stops the
    trial.
    """

    def __init__(self, path: Path, *past: Trial, epochs: int = 8, **changes: Any) -> None:
        from raysweep.sweep.asha import AshaScheduler

        data = {
            "method": "gairat",
            "base": {BURN_IN: 0},
            "scheduler": {"grace_period": 2, "reduction_factor": 2},
            "space": {BURN_IN: {"int": [0, 6]}},
        }
        ledger = Ledger.create(path / "sweep", SearchSpace.from_data({**data, **changes}))
        for trial in past:
            ledger.save_trial(trial)
        self.ledger = ledger
        self.asha = AshaScheduler(ledger, epochs)

    def stops(
        self, number: int, epoch: int, value: float | None, burn_in: int = 0, **more: float
    ) -> bool:
        trial: Any = SimpleNamespace(config={"number": number, "params": {BURN_IN: burn_in}})
        result = {"epoch": float(epoch), "training_iteration": 99, **more}
        decision = self.asha.on_trial_result(
            None, trial, result if value is None else result | {"robust_worst": value}
        )
        assert decision in ("STOP", "CONTINUE")
        return decision == "STOP"


@pytest.mark.parametrize(
    ("scheduler", "epochs", "rungs"),
    [
        ({"grace_period": 2, "reduction_factor": 2}, 8, [2, 4]),
        ({"grace_period": 2, "reduction_factor": 2}, 9, [2, 4, 8]),
        ({"grace_period": 1, "reduction_factor": 3}, 28, [1, 3, 9, 27]),
        ({"grace_period": 3, "reduction_factor": 4}, 12, [3]),
        ({"grace_period": 5, "reduction_factor": 2}, 5, []),
        ({"grace_period": 5, "reduction_factor": 2}, 6, [5]),
        ({"kind": "none", "grace_period": 1}, 8, []),
        ({}, 20, [2, 4, 8, 16]),
    ],
)
def test_rungs_are_below_the_last_epoch(scheduler: dict, epochs: int, rungs: list[int]) -> None:
    assert Scheduler.from_data(scheduler).rungs(epochs) == rungs


@pytest.mark.parametrize(
    ("factor", "values", "stopped"),
    [
        # Of 1, 2, 3 trials the best goes on, of 4 and 5 the two best.
        (2, [0.5, 0.4, 0.6, 0.55, 0.54, 0.56], [False, True, False, False, True, False]),
        # Of up to 5 the best, of 6 to 8 the two best, of 9 the three best.
        (
            3,
            [0.1, 0.5, 0.4, 0.4, 0.4, 0.4, 0.3, 0.3, 0.4],
            [False, False, True, True, True, False, True, True, False],
        ),
        (
            4,
            [0.3, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2],
            [False, True, True, True, True, True, True, False],
        ),
    ],
)
def test_the_best_of_those_that_have_arrived_go_on(
    factor: int, values: list[float], stopped: list[bool], tmp_path: Path
) -> None:
    rungs = Rungs(tmp_path, scheduler={"grace_period": 2, "reduction_factor": factor})
    assert [rungs.stops(number, 2, value) for number, value in enumerate(values)] == stopped


def test_a_tie_at_a_rung_goes_on(tmp_path: Path) -> None:
    rungs = Rungs(tmp_path)
    assert [
        rungs.stops(number, 2, value) for number, value in enumerate([0.5, 0.5, 0.5, 0.4999])
    ] == [False] * 3 + [True]


def test_each_rung_compares_by_itself_and_other_epochs_do_not(tmp_path: Path) -> None:
    rungs = Rungs(tmp_path)
    assert not rungs.stops(0, 2, 0.9) and not rungs.stops(0, 4, 0.5) and not rungs.stops(0, 8, 0.9)
    assert not any(rungs.stops(1, epoch, 0.1) for epoch in (1, 3, 5, 6, 7, 8)), (
        "the last epoch is no rung"
    )
    assert rungs.stops(1, 2, 0.6)
    assert not rungs.stops(2, 4, 0.6) and rungs.stops(3, 4, 0.55), (
        "the value to beat there is 0.6, not 0.9"
    )


@pytest.mark.parametrize(("burn_in", "compared"), [(0, True), (1, True), (2, False), (3, False)])
def test_a_trial_is_not_compared_before_its_weights_have_acted(
    burn_in: int, compared: bool, tmp_path: Path
) -> None:
    """Weights act from epoch burn_in + 1 on: at the rung of epoch 2 a burn-in of 1 is over, one of
    2 is not.
    """
    rungs = Rungs(tmp_path)
    assert not rungs.stops(0, 2, 0.9)
    assert rungs.stops(1, 2, 0.1, burn_in) == compared
    assert not rungs.stops(0, 4, 0.9)
    assert rungs.stops(2, 4, 0.1, burn_in), "at the rung of epoch 4 all weights have acted"


@pytest.mark.parametrize(("burn_in", "stopped"), [(1, True), (2, False), (3, False)])
@pytest.mark.parametrize("remembered", [False, True])
def test_other_trials_are_not_compared_with_one_in_its_burn_in(
    burn_in: int, stopped: bool, remembered: bool, tmp_path: Path
) -> None:
    if remembered:
        rungs = Rungs(
            tmp_path, Trial(0, {BURN_IN: burn_in}, "stopped", 2, curve=[[1, 0.9], [2, 0.9]])
        )
    else:
        rungs = Rungs(tmp_path)
        assert not rungs.stops(0, 2, 0.9, burn_in)
    assert rungs.stops(1, 2, 0.1) == stopped, "trial 1 is the first there unless trial 0 counts"


def test_a_fixed_burn_in_counts_too_and_of_several_terms_the_longest(tmp_path: Path) -> None:
    """GAIR-TRADES with a burn-in of three epochs in one term and none in the other."""
    base = {"method.terms.natural.weight.burn_in": 3}
    rungs = Rungs(
        tmp_path, method="gair-trades", base=base, space={"optim.lr": {"float": [0.01, 0.1]}}
    )
    said = []
    for epoch in (2, 4):
        for number, value in enumerate((0.9, 0.1)):
            trial: Any = SimpleNamespace(config={"number": number, "params": {"optim.lr": 0.05}})
            said.append(
                rungs.asha.on_trial_result(
                    None, trial, {"epoch": float(epoch), "robust_worst": value}
                )
            )
    assert said == ["CONTINUE", "CONTINUE", "CONTINUE", "STOP"]


@pytest.mark.parametrize("remembered", [False, True])
def test_a_repeated_report_of_an_epoch_counts_once(remembered: bool, tmp_path: Path) -> None:
    """If 0.2 counted three times, 0.4 would be among the two best of five."""
    if remembered:
        rungs = Rungs(tmp_path, Trial(0, {BURN_IN: 0}, "running", 2, curve=[[1, 0.1], [2, 0.2]]))
    else:
        rungs = Rungs(tmp_path)
    assert not any(rungs.stops(0, 2, 0.2) for _ in range(3))
    assert not rungs.stops(1, 2, 0.5)
    assert rungs.stops(2, 2, 0.4), "only the best of three goes on"


def test_a_repeated_report_does_not_stop_a_trial_that_went_on(tmp_path: Path) -> None:
    """The trial was the first at the rung; later others were better; then it restarted and reported
    again.
    """
    rungs = Rungs(tmp_path)
    assert not rungs.stops(0, 2, 0.2)
    assert not rungs.stops(1, 2, 0.5) and not rungs.stops(2, 2, 0.6)
    assert not rungs.stops(0, 2, 0.2)
    assert not rungs.stops(3, 2, 0.5) and rungs.stops(4, 2, 0.4), (
        "0.6 and 0.5 are the two best of five"
    )


def test_trials_of_earlier_drivers_count_whatever_became_of_them(tmp_path: Path) -> None:
    states = ("finished", "stopped", "failed", "running")
    past = [
        Trial(n, {BURN_IN: 0}, s, 3, curve=[[1, 1.0], [2, 0.5 + n / 8], [3, 1.0]])
        for n, s in enumerate(states)
    ]
    rungs = Rungs(tmp_path, *past)
    assert [rungs.stops(4 + n, 2, value) for n, value in enumerate((0.74, 0.75, 0.76))] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("remembered", [False, True])
def test_margins_are_compared_too(remembered: bool, tmp_path: Path) -> None:
    """Plus twice the margin, trial 0 has 0.5 + 2 * 0.3 = 1.1, trial 1 has 1.0, trial 2 has 1.2.

    If remembered, trial 0 reached the rung in an earlier driver, and its trial.json has the value.
    """
    rungs = Rungs(tmp_path / "first", margin_factor=2)
    past = []
    if remembered:
        metrics = {"epoch": 2.0, "robust_worst": 0.5, "robust_margin": 0.3}
        rule = rungs.asha._space.find_selection_rule({BURN_IN: 0})
        trial = Trial(0, {BURN_IN: 0}).with_rule(rule).with_epoch(metrics, rule)
        ledger = Ledger.open(tmp_path / "first" / "sweep")
        past = [replace(ledger.with_rung_results(trial, 8), rung_verdicts=None)]
        rungs = Rungs(tmp_path / "again", *past, margin_factor=2)
    else:
        assert not rungs.stops(0, 2, 0.5, robust_margin=0.3)
    assert rungs.stops(1, 2, 0.8, robust_margin=0.1)
    assert not rungs.stops(2, 2, 0.4, robust_margin=0.4)


def test_an_epoch_without_the_objective_is_no_rung_yet(tmp_path: Path) -> None:
    rungs = Rungs(tmp_path)
    assert not rungs.stops(0, 2, None)
    assert not rungs.stops(1, 2, 0.5)
    assert rungs.stops(0, 2, 0.4), "measured now, and compared"


def test_the_metric_of_the_space_decides_and_of_several_the_first(tmp_path: Path) -> None:
    space = {"optim.lr": {"float": [0.01, 0.1]}}
    several = SearchSpace.from_data(
        {"method": "at", "metric": ["clean", "robust_worst"], "space": space}
    )
    (line,) = several.find_problems()
    assert "scheduler.kind = 'asha'" in line and "cannot rank trials by several metrics" in line
    none = several.model_copy(update={"scheduler": Scheduler(kind="none")})
    assert none.find_problems() == [] and none.trial_config({}).validation.objective == "clean"
    for number, metric in enumerate(("clean", ["clean", "robust_worst"])):
        rungs = Rungs(tmp_path / str(number), metric=metric)
        assert not rungs.stops(0, 2, 0.1, clean=0.9)
        assert rungs.stops(1, 2, 0.5, clean=0.8)
        assert not rungs.stops(2, 2, 0.0, clean=0.95)


def test_a_sweep_without_early_stopping_has_a_scheduler_that_stops_nothing(tmp_path: Path) -> None:
    from ray.tune.schedulers import FIFOScheduler

    from raysweep.sweep.asha import AshaScheduler
    from raysweep.sweep.tuner import _build_scheduler

    found = {}
    for kind in ("none", "asha"):
        data = {
            "method": "at",
            "scheduler": {"kind": kind},
            "space": {"optim.lr": {"float": [0.01, 0.1]}},
        }
        found[kind] = type(
            _build_scheduler(Ledger.create(tmp_path / kind, SearchSpace.from_data(data)), 8)
        )
    assert found == {"none": FIFOScheduler, "asha": AshaScheduler}


def test_a_busy_sweep_is_stopped_as_by_a_count_of_better_trials(tmp_path: Path) -> None:
    """Asynchronous, with restarts, ties, burn-ins and repeated reports: 24 trials over rungs 1, 3
    and 9.
    """
    draw = random.Random(0)
    rungs = Rungs(tmp_path, epochs=12, scheduler={"grace_period": 1, "reduction_factor": 3})
    seen: dict[int, dict[int, float]] = {1: {}, 3: {}, 9: {}}
    reached, burn_in = (
        dict.fromkeys(range(24), 0),
        {number: draw.choice([0, 0, 1, 2, 3, 4]) for number in range(24)},
    )
    stopped = 0
    for _ in range(500):
        if not reached:
            break
        number = draw.choice(list(reached))
        epoch = max(1, reached[number] + draw.choice([0, 1, 1, 1]))
        value = draw.randrange(12) / 12
        expected = False
        if epoch in seen and epoch > burn_in[number] and number not in seen[epoch]:
            seen[epoch][number] = value
            better = sum(other > value for other in seen[epoch].values())
            expected = better >= max(1, len(seen[epoch]) // 3)
        assert rungs.stops(number, epoch, value, burn_in[number]) == expected
        stopped += expected
        reached[number] = epoch
        if expected or epoch == 12:
            del reached[number]
    assert 12 < stopped < 24


@pytest.mark.parametrize("margin_factor", [0.0, 1.0])
def test_an_extended_sweep_compares_the_margins_at_its_new_rungs(
    margin_factor: float, tmp_path: Path
) -> None:
    """Trial 0 ended at epoch 4, which was no rung: with 8 epochs it is one. Its margin, 0.4, counts
    there as those of new trials do.
    """
    from raysweep.sweep.asha import AshaScheduler

    base = {BURN_IN: 0, "epochs": 4}
    rungs = Rungs(tmp_path, epochs=4, base=base, margin_factor=margin_factor)
    ledger = rungs.ledger
    rule = ledger.space.find_selection_rule({})
    trial = Trial(0, {BURN_IN: 0}).with_rule(rule)
    for epoch in range(1, 5):
        row = {"epoch": float(epoch), "robust_worst": 0.5, "robust_margin": 0.4, "clean": 0.9}
        trial = ledger.with_rung_results(trial.with_epoch(row, rule), 4)
    ledger.save_trial(replace(trial, state="finished"))
    ledger.extend_space(ledger.space.with_overrides({"epochs": 8}))
    # A fifth epoch, after which the driver is killed.
    (trial,) = ledger.load_trials()
    ledger.save_trial(trial.with_epoch({**row, "epoch": 5.0, "robust_margin": 0.0}, rule))
    rungs.asha = AshaScheduler(Ledger.open(ledger.path), 8)
    assert rungs.stops(1, 4, 0.49, robust_margin=0.39)
    assert not rungs.stops(2, 4, 0.51, robust_margin=0.41)


def test_a_trial_whose_params_are_not_valid_together_is_in_no_rung(tmp_path: Path) -> None:
    """It has failed; the sweep goes on, and can be extended."""
    space = {
        "optim.nesterov": {"categorical": [False, True]},
        "optim.momentum": {"categorical": [0.9, 0.0]},
        BURN_IN: {"int": [0, 6]},
    }
    params = {"optim.nesterov": True, "optim.momentum": 0.0, BURN_IN: 0}
    invalid = Trial(0, params, "failed", reason="optim.nesterov needs optim.momentum > 0")
    rungs = Rungs(tmp_path, invalid, space=space)
    assert rungs.ledger.space.find_problems() == [], "each value is valid"
    assert not rungs.stops(1, 2, 0.5) and rungs.stops(2, 2, 0.4)
    rungs.ledger.extend_space(rungs.ledger.space.with_overrides({"epochs": 30}))
    rungs.ledger.extend_space(rungs.ledger.space.replace(trials=20))
    assert rungs.ledger.count_trials_left() == 19
    with pytest.raises(SpecError, match=r"^batch_size = 7: the sweep has "):
        rungs.ledger.extend_space(rungs.ledger.space.with_overrides({"batch_size": 7}))


@pytest.mark.parametrize("margin_factor", [0.0, 1.0])
@pytest.mark.parametrize("is_restored", [False, True])
def test_a_model_at_chance_stops_no_other(
    margin_factor: float, is_restored: bool, tmp_path: Path
) -> None:
    """It always answers the class of 60% of the images, which no attack changes."""
    row = {"clean": 0.6, "val/chance_limit": 0.65, "robust_margin": 1.0}
    space = {"base": {BURN_IN: 0}, "margin_factor": margin_factor}
    rungs = Rungs(tmp_path, **space)
    if is_restored:
        ledger = rungs.ledger
        rule = ledger.space.find_selection_rule({})
        trial = Trial(0, {BURN_IN: 0}).with_rule(rule)
        trial = trial.with_epoch({**row, "epoch": 2.0, "robust_worst": 0.6}, rule)
        ledger.save_trial(ledger.with_rung_results(trial, 8))
        from raysweep.sweep.asha import AshaScheduler

        rungs.asha = AshaScheduler(ledger, 8)
    else:
        assert not rungs.stops(0, 2, 0.6, **row), "it is the first"
    sound = {"clean": 0.9, "val/chance_limit": 0.65, "robust_margin": 0.2}
    assert not rungs.stops(1, 2, 0.4, **sound)
    assert rungs.stops(2, 2, 0.7, **row)
