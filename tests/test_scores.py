"""Scores, by which trials are ranked: the best mean of the objective over consecutive epochs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pipeline_builders import build_candidate

from raysweep.pipeline.artifact import rank_candidates
from raysweep.pipeline.stage_sweep import drop_data_location
from raysweep.spec import SpecError
from raysweep.sweep.extension_checks import check_extension
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace, load_space
from raysweep.sweep.trial import Trial
from raysweep.sweep.warm_start import collect_warm_start
from raysweep.training.selection import SelectionRule, average_epochs

LR = "optim.lr"
VALUES = [0.1, 0.5, 0.3, 0.7, 0.2]


def build_space(**changes: Any) -> SearchSpace:
    data = {"method": "at", "scheduler": {"kind": "none"}, "space": {LR: {"float": [0.01, 0.5]}}}
    return SearchSpace.from_data({**data, **changes})


def train(number: int, values: list[float], rule: SelectionRule) -> Trial:
    trial = Trial(number, {LR: 0.1 + number / 100}).with_rule(rule)
    for epoch, value in enumerate(values, 1):
        trial = trial.with_epoch({"epoch": float(epoch), "robust_worst": value}, rule)
    return replace(trial, state="finished")


@pytest.mark.parametrize(
    ("rule", "means"),
    [
        ({}, VALUES),
        ({"score_epochs": 2}, [0.3, 0.4, 0.5, 0.45]),
        ({"score_epochs": 3}, [0.3, 0.5, 0.4]),
        ({"score_epochs": 5}, [0.36]),
        ({"score_epochs": 9}, [0.36]),
        ({"score_epochs": 2, "burn_in": 2}, [0.5, 0.45]),
        ({"score_epochs": 3, "burn_in": 3}, [0.45]),
        ({"score_epochs": 3, "burn_in": 5}, []),
        ({"score_epochs": 2, "burn_in": 1, "first_epoch": 3, "last_epoch": 4}, [0.5]),
    ],
)
def test_means_over_consecutive_epochs_that_count(rule: dict, means: list[float]) -> None:
    found = average_epochs(enumerate(VALUES, 1), SelectionRule("robust_worst", **rule))
    assert found == pytest.approx(means)


def test_a_trial_is_ranked_by_its_best_mean_and_keeps_its_best_epoch(tmp_path: Path) -> None:
    """By the best epoch trial 0 is first: 0.9, but its neighbours have 0.3."""
    curves = [[0.3, 0.9, 0.3, 0.3], [0.1, 0.6, 0.6, 0.5]]
    for score_epochs, order in ((None, [0, 1]), (1, [0, 1]), (2, [0, 1]), (3, [1, 0])):
        space = build_space(score_epochs=score_epochs)
        ledger = Ledger.create(tmp_path / str(score_epochs), space)
        rule = space.find_selection_rule({})
        for number, values in enumerate(curves):
            ledger.save_trial(train(number, values, rule))
        ranked = ledger.rank_trials()
        assert [trial.number for trial in ranked] == order
        assert [trial.best["epoch"] for trial in sorted(ranked, key=lambda t: t.number)] == [2, 2]
    assert [trial.score("robust_worst") for trial in ranked] == pytest.approx([1.7 / 3, 0.5])
    assert ranked[0].best_epoch_value("robust_worst") == 0.6
    repeated = replace(ranked[0], repeats=(train(1, [0.0, 0.3, 0.3, 0.3], rule),))
    assert repeated.score("robust_worst") == pytest.approx((1.7 / 3 + 0.3) / 2)
    assert repeated.best_epoch_value("robust_worst") == pytest.approx((0.6 + 0.3) / 2)


def test_earlier_sweeps_and_digests_stay_as_they_are() -> None:
    """A sweep keeps its rule; a new one of a shipped space has the default."""
    old, new = build_space(), load_space("gairat", {})
    assert "score_epochs" not in old.to_stored_dict() and old.score_name == "robust_worst"
    assert new.score_name == "score" and new.score_epochs is not None
    assert "score_epochs" not in drop_data_location(new)
    assert drop_data_location(new.replace(score_epochs=5))["score_epochs"] == 5
    assert "averages" not in train(0, VALUES, old.find_selection_rule({})).to_stored_dict()
    with pytest.raises(SpecError, match=r"^score_epochs = 3: the sweep has None; "):
        check_extension(old, old.replace(score_epochs=3), {})
    (line,) = build_space(metric=["robust_worst", "clean"], score_epochs=3).find_problems()
    assert line.startswith("score_epochs = 3: with several metrics")


@pytest.mark.parametrize(("score_epochs", "told"), [(None, 0.7), (2, 0.5)])
@pytest.mark.parametrize("earlier", [1, 3])
def test_a_warm_start_tells_the_scores_of_the_new_sweep(
    tmp_path: Path, earlier: int, score_epochs: int | None, told: float, monkeypatch: Any
) -> None:
    old = build_space(score_epochs=earlier)
    ledger = Ledger.create(tmp_path / "old", old)
    ledger.save_trial(train(0, VALUES, old.find_selection_rule({})))
    monkeypatch.setattr(Ledger, "find_data_fingerprint", lambda self: "data")
    found = collect_warm_start(build_space(score_epochs=score_epochs), "data", [ledger])
    assert [result.best["robust_worst"] for result in found.results] == pytest.approx([told])


def test_means_are_not_compared_with_best_epochs_of_other_runs() -> None:
    """Within sweep s, b is ahead of a by its mean. Beside c, a run without a mean, checkpoints
    decide which places the sweep gets: b and a take the places that a and b would have.
    """
    a, b, c = (
        build_candidate(name, value) for name, value in (("a", 0.6), ("b", 0.5), ("c", 0.55))
    )
    a = a.replace(average=0.4, checkpoint="s/0000/epoch-0001")
    b = b.replace(average=0.45, checkpoint="s/0001/epoch-0001")
    assert [x.label for x in rank_candidates([a, b])] == ["b", "a"]
    c = c.replace(checkpoint="run/epoch-0001")
    assert [x.label for x in rank_candidates([a, b, c])] == ["b", "c", "a"]
