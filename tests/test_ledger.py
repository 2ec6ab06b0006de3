"""The ledger of a sweep: how reports change a trial, the ranking, the Pareto front, and which
trials resume.
"""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from raysweep.errors import DamagedFileError
from raysweep.spec import SpecError
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.optuna_study import build_study
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial
from raysweep.training.selection import SelectionRule

LR = "optim.lr"


def space(**changes: Any) -> SearchSpace:
    data = {"method": "at", "trials": 4, "base": {"epochs": 4}, "scheduler": {"kind": "none"}}
    return SearchSpace.from_data({**data, "space": {LR: {"float": [0.01, 0.5]}}, **changes})


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.create(tmp_path / "sweep", space(max_masking_gap=0.25))


def build_trial(
    number: int, worst: float, clean: float = 0.5, gap: float = 0.0, **more: Any
) -> Trial:
    best = {"epoch": 3.0, "robust_worst": worst, "clean": clean, "masking_gap": gap}
    return Trial(
        number, **{"params": {LR: 0.1}, "state": "finished", "epoch": 4, "best": best, **more}
    )


def write(ledger: Ledger, *trials: Trial) -> None:
    for trial in trials:
        ledger.save_trial(trial)


def test_reports_change_a_trial() -> None:
    rows = [
        {"epoch": 1.0, "clean": 0.5},
        {"epoch": 2.0, "clean": 0.6, "robust_worst": 0.25, "shared": 1.0},
        {"epoch": 3.0, "clean": 0.7, "robust_worst": 0.375},
        {"epoch": 4.0, "clean": 0.8, "robust_worst": 0.375},
        {"epoch": 5.0, "clean": 0.9, "robust_worst": 0.125},
        {"epoch": 6.0, "clean": 1.0},
    ]
    trial, best, curves = Trial(0, {}, reason="its node was preempted"), [], []
    for row in rows:
        trial = trial.with_epoch(row, SelectionRule("robust_worst"))
        assert trial.latest == row and trial.epoch == row["epoch"] and trial.reason == ""
        best.append(trial.best.get("epoch"))
        curves.append(len(trial.curve))
    assert best == [None, 2, 3, 3, 3, 3], (
        "the first of epochs that tie; epochs without the objective do not count"
    )
    assert trial.curve == [[2, 0.25], [3, 0.375], [4, 0.375], [5, 0.125]] and curves == [
        0,
        1,
        2,
        3,
        4,
        4,
    ]
    assert trial.trained_epochs == 5, "all but the shared one"
    assert (
        trial.state == "running"
        and trial.score("robust_worst") == 0.375
        and trial.score("clean") == 0.7
    )
    assert Trial(0, {}).score("robust_worst") == float("-inf")


@pytest.mark.parametrize("epoch", [1.0, 2.0, 3.0])
def test_an_epoch_that_was_reported_before_changes_nothing(epoch: float) -> None:
    row = {"epoch": 3.0, "robust_worst": 0.25}
    trial = Trial(
        0,
        {},
        epoch=3,
        latest=row,
        best=row,
        curve=[[3, 0.25]],
        trained_epochs=2,
        reason="its node was preempted",
    )
    assert (
        trial.with_epoch({"epoch": epoch, "robust_worst": 0.75}, SelectionRule("robust_worst"))
        is trial
    )


def test_a_score_of_zero_is_a_result() -> None:
    trial = Trial(0, {}).with_epoch(
        {"epoch": 1.0, "robust_worst": 0.0}, SelectionRule("robust_worst")
    )
    assert trial.best == {"epoch": 1.0, "robust_worst": 0.0} and trial.curve == [[1, 0.0]]


def test_the_ranking(ledger: Ledger) -> None:
    """Best first, ties by number; then those over the limit, best first; then failed ones. Trials
    without a result are left out.
    """
    write(
        ledger,
        build_trial(6, 0.25),
        build_trial(5, 0.875, gap=0.5),
        build_trial(4, 0.75, gap=0.2500001),
        build_trial(3, 0.5, gap=0.25),
        build_trial(8, 1.0, state="failed"),
        build_trial(2, 0.5, clean=1.0, state="stopped"),
        build_trial(1, 0.5, state="running"),
        Trial(0, {LR: 0.1}, best={"epoch": 1.0, "clean": 1.0}),
        Trial(7, {LR: 0.1}),
    )
    assert [trial.number for trial in ledger.rank_trials()] == [
        1, 2, 3, 6, 5, 4, 8,
    ]  # fmt: skip
    best = ledger.find_best_trial()
    assert best is not None and best.number == 1
    assert [
        trial.number for trial in ledger.rank_trials() if ledger.exceeds_masking_gap(trial)
    ] == [5, 4]
    assert [trial.number for trial in ledger.load_trials()] == list(range(9))


@pytest.mark.parametrize(
    ("limit", "gap", "masks"),
    [
        (0.25, 0.25, False),
        (0.25, 0.2500001, True),
        (0.0, 0.0, False),
        (0.0, 1e-9, True),
        (None, 1.0, False),
    ],
)
def test_a_gap_at_the_limit_is_within_it(
    limit: float | None, gap: float, masks: bool, tmp_path: Path
) -> None:
    ledger = Ledger.create(tmp_path / "sweep", space(max_masking_gap=limit))
    assert ledger.exceeds_masking_gap(build_trial(0, 0.5, gap=gap)) == masks
    assert (
        ledger.exceeds_masking_gap(build_trial(0, 0.5, gap=0.0, latest={"masking_gap": 1.0}))
        is False
    ), "the gap of the best epoch counts, not that of the last"
    assert not ledger.exceeds_masking_gap(Trial(0, {})), "a trial without an epoch has no gap"


def test_several_metrics_are_ranked_by_the_first(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "sweep", space(metric=["clean", "robust_worst"]))
    write(ledger, build_trial(0, 0.75, 0.5), build_trial(1, 0.25, 0.625), build_trial(2, 0.5, 0.5))
    assert [trial.number for trial in ledger.rank_trials()] == [1, 0, 2]


def test_the_front_of_two_metrics(tmp_path: Path) -> None:
    ledger = Ledger.create(
        tmp_path / "sweep", space(metric=["robust_worst", "clean"], max_masking_gap=0.25)
    )
    write(
        ledger,
        build_trial(0, 0.5, 0.75),
        build_trial(1, 0.5, 0.625),  # as robust as 0, and less clean
        build_trial(2, 0.375, 0.75),  # as clean as 0, and less robust
        build_trial(3, 0.5, 0.75),  # the same as 0
        build_trial(4, 0.25, 0.875, gap=0.25),
        build_trial(5, 0.25, 0.8125),  # beaten by 4
        build_trial(6, 1.0, 1.0, gap=0.5),  # breaks the limit
    )
    assert [trial.number for trial in ledger.unmasked_pareto_front()] == [0, 3, 4], (
        "in the order of the ranking"
    )
    assert {trial.number for trial in build_study(ledger).best_trials} == {0, 3, 4}, (
        "Optuna's front"
    )
    assert [trial.number for trial in ledger.unmasked_pareto_front(["robust_worst"])] == [0, 1, 3]
    assert [trial.number for trial in ledger.unmasked_pareto_front(["clean"])] == [4]
    assert [trial.number for trial in ledger.unmasked_pareto_front(["clean", "pgd"])] == [4], (
        "no trial has the other metric"
    )


def test_the_front_of_three_metrics_is_what_nothing_dominates(tmp_path: Path) -> None:
    """Compared with numpy, on points with many ties and some duplicates."""
    ledger = Ledger.create(tmp_path / "sweep", space(trials=40))
    draw, points = random.Random(1), []
    for number in range(40):
        one, two = draw.randrange(5), draw.randrange(5)
        points.append([one / 8, two / 8, (8 - one - two - draw.randrange(2)) / 8])
        best = {"epoch": 1.0, **dict(zip(("robust_worst", "clean", "cw"), points[-1], strict=True))}
        ledger.save_trial(Trial(number, {LR: 0.1}, "finished", 1, best, best))
    cloud = np.array(points)
    at_least, above = (cloud[:, None] >= cloud[None]).all(2), (cloud[:, None] > cloud[None]).any(2)
    expected = np.flatnonzero(~(at_least & above).any(0)).tolist()
    found = sorted(
        trial.number for trial in ledger.unmasked_pareto_front(("robust_worst", "clean", "cw"))
    )
    assert found == expected and 1 < len(expected) < 40


def test_a_trials_checkpoint_is_that_of_its_best_epoch(ledger: Ledger) -> None:
    path = ledger.best_checkpoint_path(build_trial(12, 0.5))
    assert path == ledger.path / "trials" / "0012" / "epoch-0003", "its fourth epoch was worse"


def test_a_trial_is_read_as_it_was_written(ledger: Ledger) -> None:
    row = {"epoch": 2.0, "robust_worst": 1 / 3}
    settings = {
        LR: 0.1,
        "optim.lr.values": [0.1, 0.01],
        "optim.nesterov": True,
        "data.unlabeled": None,
    }
    trial = Trial(
        3,
        settings,
        "stopped",
        2,
        row,
        row,
        [[1, 0.25], [2, 1 / 3]],
        1,
        12.5,
        4,
        "its node was preempted",
    )
    ledger.save_trial(trial)
    assert Ledger.open(ledger.path).load_trials() == [trial]
    later = replace(trial, state="failed", epoch=3)
    ledger.save_trial(later)
    assert ledger.load_trials() == [later]
    assert json.loads((ledger.path / "trials/0003/trial.json").read_text())["retries"] == 4


def test_a_sweep_is_read_as_it_was_written(ledger: Ledger) -> None:
    again = Ledger.open(ledger.path)
    assert (again.space, again.key, again.name, again.path) == (
        ledger.space,
        ledger.key,
        "sweep",
        ledger.path,
    )
    assert Ledger.create(ledger.path.parent / "other", ledger.space).key != ledger.key


def test_a_folder_with_anything_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "lock").touch()
    (tmp_path / "a" / ".hidden").touch()
    Ledger.create(tmp_path / "a", space())
    (tmp_path / "b" / "trials" / "0000").mkdir(parents=True)
    (tmp_path / "b" / "trials" / "0000" / "trial.json").touch()
    with pytest.raises(SpecError, match="holds other files than a sweep"):
        Ledger.create(tmp_path / "b", space())
    assert not (tmp_path / "b" / "sweep.json").exists()


def test_discard_removes_a_sweep_unless_it_has_trials_or_other_files(ledger: Ledger) -> None:
    ledger.save_trial(build_trial(0, 0.5))
    ledger.delete_if_empty()
    assert Ledger.open(ledger.path).load_trials() == [build_trial(0, 0.5)]
    other = Ledger.create(ledger.path.parent / "other", space())
    other.delete_if_empty()
    folder = other.path.local_path
    assert folder is not None and not folder.exists()
    other = Ledger.create(ledger.path.parent / "other", space())
    (folder / "notes").touch()
    other.delete_if_empty()
    assert [file.name for file in folder.iterdir()] == ["notes"]


def test_only_finished_trials_that_get_more_epochs_resume(ledger: Ledger) -> None:
    states = {
        0: ("finished", 4),
        1: ("stopped", 2),
        2: ("failed", 3),
        3: ("running", 1),
        4: ("finished", 6),
    }
    trials = [
        build_trial(n, 0.5, state=state, epoch=epoch, reason="r")
        for n, (state, epoch) in states.items()
    ]
    write(ledger, *trials)
    ledger.extend_space(space(max_masking_gap=0.25, base={"epochs": 4}))
    assert ledger.load_trials() == trials, "as many epochs as before"
    ledger.extend_space(space(max_masking_gap=0.25, trials=9, base={"epochs": 6}))
    assert [trial.state for trial in ledger.load_trials()] == [
        "running",
        "stopped",
        "failed",
        "running",
        "finished",
    ]
    assert ledger.load_trials()[0] == replace(trials[0], state="running"), (
        "all its other fields stay"
    )
    again = Ledger.open(ledger.path).space
    assert (again.trials, again.trial_config({}).epochs) == (9, 6)


def test_a_trials_own_number_of_epochs_decides_whether_it_resumes(tmp_path: Path) -> None:
    searched = {"epochs": {"int": [2, 8]}}
    ledger = Ledger.create(tmp_path / "sweep", space(space=searched))
    write(
        ledger,
        build_trial(0, 0.5, params={"epochs": 2}, epoch=2),
        build_trial(1, 0.5, params={"epochs": 4}, epoch=4),
    )
    ledger.extend_space(space(space=searched, base={"epochs": 6}))
    assert [trial.state for trial in ledger.load_trials()] == ["finished", "finished"]


def test_importance_is_of_the_first_objective_and_needs_ten_results(tmp_path: Path) -> None:
    from raysweep.sweep.optuna_study import param_importances

    searched = {LR: {"float": [0.0, 1.0]}, "optim.momentum": {"float": [0.0, 0.9]}}
    metric = ["clean", "robust_worst"]
    ledger = Ledger.create(tmp_path / "sweep", space(metric=metric, space=searched, trials=12))
    for number in range(9):
        settings = {LR: number / 9, "optim.momentum": (number * 5 % 9) / 10}
        write(
            ledger,
            build_trial(number, settings["optim.momentum"], clean=settings[LR], params=settings),
        )
    write(
        ledger,
        build_trial(9, 0.5, clean=0.5, params={LR: 0.5, "optim.momentum": 0.5}, state="failed"),
    )
    assert param_importances(ledger) is None, "one of ten failed"
    write(ledger, build_trial(10, 0.0, clean=1.0, params={LR: 1.0, "optim.momentum": 0.0}))
    found = param_importances(ledger)
    assert found is not None and list(found) == [LR, "optim.momentum"] and found[LR] > 0.9
    assert sum(found.values()) == pytest.approx(1.0)
    assert [direction.name for direction in build_study(ledger).directions] == [
        "MAXIMIZE",
        "MAXIMIZE",
    ]


def test_a_study_of_a_sweep_has_its_ended_trials_in_their_order(ledger: Ledger) -> None:
    states = ("finished", "running", "failed", "stopped")
    write(
        ledger,
        *(build_trial(number, number / 4, state=state) for number, state in enumerate(states)),
    )
    trials = build_study(ledger).get_trials()
    assert [trial.user_attrs["raysweep.number"] for trial in trials] == [0, 2, 3]
    assert [trial.state for trial in trials] == [
        optuna.trial.TrialState.COMPLETE,
        optuna.trial.TrialState.FAIL,
        optuna.trial.TrialState.PRUNED,
    ]
    assert [trial.value for trial in trials] == [0.0, None, 0.75]


def test_a_long_value_is_shown_by_its_first_60_characters(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "s", space())
    ledger.save_trial(Trial(0, {LR: 0.1}))
    file = ledger.trial_path(0) / "trial.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "epoch": "x" * 100}))
    with pytest.raises(DamagedFileError) as error:
        ledger.load_trials()
    assert f"epoch = '{59 * 'x'}...: expected" in str(error.value)
