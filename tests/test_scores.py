"""Scores, by which trials are ranked: the best mean of the objective over consecutive epochs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pipeline_builders import build_candidate

from raysweep.cli import main
from raysweep.pipeline.artifact import Candidate, rank_candidates
from raysweep.pipeline.promote import PromoteStage
from raysweep.pipeline.report.search_results import _build_trial_table
from raysweep.pipeline.stage_sweep import drop_data_location
from raysweep.result_loading import Sweep, describe_masking_effect_on_ranking, sweep_to_json
from raysweep.spec import SpecError
from raysweep.sweep.extension_checks import check_extension
from raysweep.sweep.finalist_result import FinalistResult
from raysweep.sweep.finalist_summary import describe_ranking, summarize_finalists
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace, load_space
from raysweep.sweep.trial import Trial
from raysweep.sweep.warm_start import collect_warm_start
from raysweep.tracking.sweep_tracker import _score_metrics
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


def test_a_score_includes_the_margin_of_the_best_epoch() -> None:
    """Epoch 2 is the best, with 0.9: its margin, 0.4, is added to the best mean over two epochs.
    With another metric, or with several, the score has no margin.
    """
    space = build_space(score_epochs=2, margin_factor=0.5)
    rule = space.find_selection_rule({})
    trial = Trial(0, {LR: 0.1}).with_rule(rule)
    for epoch, (value, margin) in enumerate([(0.3, 0.8), (0.9, 0.4), (0.5, 0.6)], 1):
        row = {"epoch": float(epoch), "robust_worst": value, "robust_margin": margin}
        trial = trial.with_epoch(row, rule)
    assert trial.score("robust_worst") == pytest.approx((0.9 + 0.5) / 2 + 0.5 * 0.4)
    assert space.describe_score() == (
        "score with margin (the best mean robust worst over 2 consecutive epochs, plus 0.5 times "
        "the robust margin of the best epoch)"
    )
    alone = build_space(margin_factor=1)
    assert alone.score_name == "score with margin"
    best_alone = trial.with_score(alone.find_selection_rule({}))
    assert best_alone.score("robust_worst") == pytest.approx(0.9 + 0.4)
    repeated = replace(trial, repeats=(replace(trial, kind="repeat"),)).with_score(
        alone.find_selection_rule({})
    )
    assert [run.score("robust_worst") for run in repeated.repeats] == pytest.approx([0.9 + 0.4])
    for metric in ("clean", ["robust_worst", "clean"]):
        without = build_space(margin_factor=1, metric=metric)
        assert without.find_selection_rule({}).margin_factor == 0
        assert without.score_name == without.objectives[0] and without.find_problems() == []


def test_autoattack_lowers_the_scores_of_finalists(tmp_path: Path) -> None:
    """Under AutoAttack, the best epoch of trial 0 has 0.72 and that of trial 1 has 0.66; but the
    mean of trial 0 is lower. AutoAttack lowers the scores by 0.08 and 0.04.
    """
    for score_epochs, order in ((1, [0, 1]), (2, [1, 0])):
        space = build_space(score_epochs=score_epochs, finalists=2, trials=2)
        ledger = Ledger.create(tmp_path / str(score_epochs), space)
        rule = space.find_selection_rule({})
        for number, (values, robust) in enumerate((([0.4, 0.8], 0.72), ([0.7, 0.7], 0.66))):
            best_epoch = 2 if number == 0 else 1
            result = FinalistResult(best_epoch, robust, 200, 0.2, "Linf")
            ledger.save_trial(replace(train(number, values, rule), finalist=result))
        ranked = ledger.rank_trials()
        assert [trial.number for trial in ranked] == order
    corrected = [trial.corrected_score("robust_worst") for trial in ranked]
    assert corrected == pytest.approx([0.7 - 0.04, 0.6 - 0.08])
    summary = summarize_finalists(ledger)
    assert summary is not None and summary.gain == 0
    assert describe_ranking(ledger) == (
        "score (the best mean robust worst over 2 consecutive epochs) on the validation split, "
        "lowered by AutoAttack for the first 2"
    )
    assert [trial.final_value("robust_worst") for trial in ranked] == [0.66, 0.72]
    candidates = [
        build_candidate(f"s/{trial.number}", trial.best["robust_worst"]).replace(
            checkpoint=f"s/{trial.number:04d}/epoch-0001",
            average=trial.score("robust_worst"),
            autoattack=trial.final_value("robust_worst"),
        )
        for trial in ranked
    ]
    assert [x.label for x in rank_candidates(candidates)] == ["s/1", "s/0"]


@pytest.mark.parametrize("margin_factor", [0, 1])
def test_tables_and_data_have_corrected_scores(tmp_path: Path, margin_factor: int) -> None:
    """AutoAttack lowers 0.7 by 0.04. With the margin 0.5 the score is above 1 and no accuracy."""
    space = build_space(score_epochs=2, finalists=1, trials=2, margin_factor=margin_factor)
    ledger = Ledger.create(tmp_path / "sweep", space)
    rule = space.find_selection_rule({})
    result = FinalistResult(1, 0.66, 200, 0.2, "Linf")
    for number, finalist in enumerate((result, None)):
        trial = train(number, [0.7 - number / 10] * 2, rule)
        best = {**trial.best, "robust_margin": 0.5}
        ledger.save_trial(replace(trial, best=best, finalist=finalist).with_score(rule))
    score, corrected = 0.7 + margin_factor / 2, 0.66 + margin_factor / 2
    data = sweep_to_json(ledger)
    first, other = data["trials"]
    assert first["score"] == pytest.approx(score)
    assert first["corrected_score"] == pytest.approx(corrected)
    assert other["corrected_score"] is None
    assert data["finalists"]["trials"][0]["corrected_score"] == pytest.approx(corrected)
    table = Sweep(ledger).trials
    assert table.corrected_score[0] == pytest.approx(corrected)
    assert list(table.corrected_score.isna()) == [False, True]
    report = _build_trial_table(ledger, ledger.rank_trials())
    name, shown = "score", ["70.00", "66.00"]
    if margin_factor:
        name, shown = "score with margin", ["1.200", "1.160"]
    columns = [list(report.headers).index(title) for title in (name, "corrected")]
    assert [report.rows[0][column] for column in columns] == shown
    assert report.rows[1][columns[1]] == ""
    assert report.rows[0][list(report.headers).index("robust worst")] == "70.00"
    assert repr(Sweep(ledger)).endswith(f"best trial 0000 with {name} {score:.3f}>")
    assert describe_ranking(ledger).startswith(f"{name} (the best mean robust worst over 2")
    # MLflow shows runs of several sweeps in one table.
    assert list(_score_metrics(ledger, ledger.rank_trials()[0])) == [name.replace(" ", "_")]
    without = ledger.rank_trials()[1:]
    assert "corrected" not in _build_trial_table(ledger, without).headers


def test_earlier_sweeps_and_digests_stay_as_they_are() -> None:
    """A sweep keeps its rule; a new one of a shipped space has the default."""
    old, new = build_space(), load_space("gairat", {})
    assert not {"score_epochs", "margin_factor"} & old.to_stored_dict().keys()
    assert old.score_name == "robust_worst"
    assert new.score_name == "score" and new.score_epochs is not None
    assert "score_epochs" not in drop_data_location(new)
    assert drop_data_location(new.replace(score_epochs=5))["score_epochs"] == 5
    assert "averages" not in train(0, VALUES, old.find_selection_rule({})).to_stored_dict()
    with pytest.raises(SpecError, match=r"^margin_factor = 1.0: the sweep has 0.0; "):
        check_extension(old, old.replace(margin_factor=1.0), {})
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
    # Without `robust_margin`, which early versions did not measure, there is no such score.
    with_margin = build_space(score_epochs=score_epochs, margin_factor=1.0)
    found = collect_warm_start(with_margin, "data", [ledger])
    assert found.results == () and found.points == ({LR: 0.1},)
    margins = {"epoch": 4.0, "robust_worst": 0.7, "robust_margin": 0.25}
    ledger.save_trial(replace(ledger.load_trials()[0], best=margins))
    found = collect_warm_start(with_margin, "data", [ledger])
    assert [result.best["robust_worst"] for result in found.results] == pytest.approx([told + 0.25])


def test_epochs_at_chance_do_not_count(tmp_path: Path) -> None:
    """Of two classes one has 60% of the images: until epoch 3, the model always answers it."""
    space = build_space(score_epochs=2, margin_factor=0.5)
    rule = space.find_selection_rule({})
    trial = Trial(0, {LR: 0.1}).with_rule(rule)
    for epoch, (clean, worst) in enumerate([(0.6, 0.6)] * 3 + [(0.9, 0.4), (0.9, 0.5)], 1):
        row = {"epoch": float(epoch), "clean": clean, "robust_worst": worst}
        trial = trial.with_epoch({**row, "robust_margin": 0.2, "val/chance_limit": 0.65}, rule)
        if epoch == 3:
            assert trial.averages == {} and not trial.rank_best_epoch(rule).is_eligible
    assert trial.score("robust_worst") == pytest.approx(0.45 + 0.1)
    assert trial.with_score(rule) == trial and len(trial.curve) == 5
    ledger = Ledger.create(tmp_path / "s", space)
    ledger.save_trial(trial)
    assert ledger.load_trials() == [trial] and trial.guessing_epochs == [1, 2, 3]
    assert "guessing_epochs" not in train(1, [0.5], rule).to_stored_dict()


@pytest.mark.parametrize(
    ("rule", "first"), [({}, 0), ({"score_epochs": 3}, 1), ({"margin_factor": 1.0}, 2)]
)
def test_a_warm_start_tries_the_best_by_the_scores_of_the_new_sweep(
    tmp_path: Path, rule: dict[str, Any], first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trial 0 has the best epoch, trial 1 the best mean, trial 2 the best margin."""
    old = build_space()
    ledger = Ledger.create(tmp_path / "old", old)
    for number, values in enumerate(([0.1, 0.9, 0.1], [0.6, 0.7, 0.6], [0.1, 0.65, 0.1])):
        trial = train(number, values, old.find_selection_rule({}))
        margin = {"robust_margin": 0.5 if number == 2 else 0.1}
        ledger.save_trial(replace(trial, best={**trial.best, **margin}))
    monkeypatch.setattr(Ledger, "find_data_fingerprint", lambda self: "data")
    found = collect_warm_start(build_space(**rule), "data", [ledger])
    assert found.points == (ledger.load_trials()[first].params,)
    other_data = collect_warm_start(build_space(**rule), "other data", [ledger])
    assert other_data.points == tuple(trial.params for trial in ledger.rank_trials())


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
    with_margin = a.replace(average=0.9, margin_factor=1.0, checkpoint="t/0000/epoch-0001")
    assert [x.label for x in rank_candidates([with_margin, b])] == ["a", "b"]
    assert [
        x.label for x in rank_candidates([b.replace(metrics={"robust_worst": 0.61}), with_margin])
    ] == ["b", "a"]
    c = c.replace(checkpoint="run/epoch-0001")
    assert [x.label for x in rank_candidates([a, b, c])] == ["b", "c", "a"]


def make_scored(sweep: str, number: int, value: float, **more: Any) -> Candidate:
    checkpoint = f"{sweep}/{number:04d}/epoch-0001"
    return build_candidate(f"{sweep}/{number}", value).replace(checkpoint=checkpoint, **more)


def rank(*candidates: Candidate) -> list[str]:
    return [candidate.label for candidate in rank_candidates(candidates)]


def test_below_the_finalists_scores_are_not_compared_with_objectives() -> None:
    """The score of s/1, with its margin, is 0.85; its objective is lower than that of old/1."""
    scored = {"margin_factor": 1.0, "score_epochs": 3}
    finalist = make_scored("s", 0, 0.6, autoattack=0.55, average=0.9, **scored)
    other = make_scored("s", 1, 0.57, is_below_finalists=True, average=0.85, **scored)
    old = make_scored("old", 0, 0.62, autoattack=0.5)
    old_other = make_scored("old", 1, 0.59, is_below_finalists=True)
    candidates = (finalist, other, old, old_other)
    assert rank(*candidates) == ["s/0", "old/0", "old/1", "s/1"]
    stage = PromoteStage(top=3)
    assert [x.label for x in stage.select_candidates(candidates)] == ["s/0", "old/0", "old/1"]


def test_scores_of_other_rules_are_not_compared() -> None:
    """A mean over three epochs is lower than one epoch: beside it, the checkpoints decide."""
    three = make_scored("s", 0, 0.6, average=0.5, score_epochs=3)
    two = make_scored("t", 0, 0.58, average=0.55, score_epochs=2)
    assert rank(two, three) == ["s/0", "t/0"]
    assert rank(two.replace(score_epochs=3), three) == ["t/0", "s/0"]
    # Corrected scores: 0.45 and 0.52; under AutoAttack: 0.55 and 0.56.
    three, two = three.replace(autoattack=0.55), two.replace(autoattack=0.54)
    assert rank(two, three) == ["s/0", "t/0"]
    assert rank(two.replace(score_epochs=3), three) == ["t/0", "s/0"]
    stored = three.to_stored_dict()
    assert stored["score_epochs"] == 3 and Candidate.from_data(stored, stored=True) == three


def test_a_score_by_one_metric_is_not_compared_with_another_metric() -> None:
    """Sweep p has means of `pgd`; both are ranked by robust_worst, of which it has no mean."""
    mean = make_scored("s", 0, 0.6, average=0.5, score_epochs=3)
    pgd = make_scored("p", 0, 0.55, average=0.7, score_epochs=3, objectives=("pgd",))
    assert rank(pgd, mean) == ["s/0", "p/0"]


def test_the_pareto_set_of_one_metric_is_the_best_on_one_scale() -> None:
    stage = PromoteStage(pareto=True)
    with_margin = make_scored("s", 0, 0.57, average=0.85, margin_factor=1.0)
    run = make_scored("run", 0, 0.6)
    assert stage.select_candidates((with_margin, run)) == [run]
    # As in their sweeps, finalists are compared by corrected scores: 0.5 and 0.51.
    first = make_scored("s", 0, 0.6, autoattack=0.56, average=0.54, score_epochs=3)
    second = make_scored("t", 0, 0.6, autoattack=0.55, average=0.56, score_epochs=3)
    assert stage.select_candidates((first, second)) == [second]


def test_whoever_names_the_best_trial_names_that_with_the_best_score(tmp_path: Path) -> None:
    """Trial 0 has the best epoch, 0.9, trial 1 the best mean, as PGD alone has it."""
    space = build_space(score_epochs=3)
    ledger = Ledger.create(tmp_path / "s", space)
    rule = space.find_selection_rule({})
    for number, values in enumerate(([0.3, 0.9, 0.3, 0.3], [0.6, 0.65, 0.6, 0.5])):
        trial = train(number, values, rule)
        pgd = {"pgd": 0.95 + number / 100, "masking_gap": 0.05}
        ledger.save_trial(replace(trial, best={**trial.best, **pgd}))
    content = sweep_to_json(ledger)
    assert content["front"] == [1] == [content["trials"][0]["number"]]
    best = ledger.find_best_trial()
    assert best is not None and best.number == 1
    assert Sweep(ledger).best == ledger.best_checkpoint_path(best)
    assert describe_masking_effect_on_ranking(ledger) == [], "PGD chooses the same trial"
    assert [trial.number for trial in ledger.unmasked_pareto_front(["robust_worst", "pgd"])] == [
        1,
        0,
    ], "a front of epochs"


def test_show_names_the_mean_over_the_seeds_of_a_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    space = build_space(score_epochs=2, repeat=2, trials=2)
    ledger = Ledger.create(tmp_path / "runs" / "s", space)
    rule = space.find_selection_rule({})
    for number in range(2):
        trial = train(number, [0.2, 0.6, 0.4 + number / 10], rule)
        ledger.save_trial(trial)
        repeat = replace(trial, params={**trial.params, "seed": 1}, kind="repeat")
        ledger.save_trial(repeat)
    monkeypatch.chdir(tmp_path)
    assert main(["show", "s/0001"]) == 0
    assert "mean over 2 seeds\n  score = 0.5500 (0.5500, 0.5500)\n" in capsys.readouterr().out
