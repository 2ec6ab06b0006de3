"""A sweep's ledger, written by hand, as tables, lines and plain data."""

import json
from pathlib import Path

import pandas as pd
import pytest

import raysweep
from raysweep.result_loading import (
    describe_masking_effect_on_ranking,
    sweep_to_json,
)
from raysweep.spec import SpecError
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial
from raysweep.sweep.trial_advice import advise_on_trial

LR, LAM = "optim.lr", "method.terms.pgd.weight.lam"


def ledger(folder: Path, trials: list[Trial], **more: object) -> Ledger:
    space = {
        "method": "gairat",
        "space": {LR: {"float": [0.001, 1.0]}, LAM: {"float": [-3.0, 3.0]}},
        **more,
    }
    made = Ledger.create(folder / "runs" / "s", SearchSpace.from_data(space))
    for trial in trials:
        made.save_trial(trial)
    return made


def trial(number: int, worst: float | None, pgd: float | None = None, **more: object) -> Trial:
    best = (
        {}
        if worst is None
        else {"epoch": 2.0, "robust_worst": worst, "train/loss": 1.5, "clean": 0.9}
    )
    if pgd is not None and worst is not None:
        best |= {"pgd": pgd, "masking_gap": pgd - worst}
    settings = {LR: 0.1 * (number + 1), LAM: -1.0}
    return Trial(
        number,
        settings,
        **{"state": "finished", "best": best, "epoch": 3, "trained_epochs": 3} | more,
    )


def test_trials_best_first_and_then_those_without_a_result(tmp_path: Path) -> None:
    trials = [
        trial(0, 0.4, seconds=1.5),
        trial(1, None, state="failed", reason="the loss became nan", epoch=0, trained_epochs=0),
        trial(2, 0.6, state="stopped", trained_epochs=1),
        trial(3, 0.5),
    ]
    made = ledger(tmp_path, trials)
    table = raysweep.load_sweep(made.path).trials
    assert list(table.index) == [2, 3, 0, 1] and table.index.name == "trial"
    names = [
        "state",
        "lr",
        "lam",
        "epoch",
        "robust_worst",
        "clean",
        "choice",
        "epochs",
        "trained",
        "seconds",
        "reason",
    ]
    assert list(table.columns) == names, "metrics with a / are of training"
    assert table.state.tolist() == ["stopped", "finished", "finished", "failed"]
    assert (
        table.lr.tolist() == pytest.approx([0.3, 0.4, 0.1, 0.2])
        and table.lam.tolist() == [-1.0] * 4
    )
    assert table.robust_worst.tolist()[:3] == [0.6, 0.5, 0.4] and pd.isna(table.robust_worst[1])
    assert table.epochs.tolist() == [3, 3, 3, 0] and table.trained.tolist() == [1, 3, 3, 0]
    assert table.epoch.tolist()[:3] == [2.0] * 3, "the best epoch, not the last"
    assert table.seconds[0] == 1.5 and table.reason[1] == "the loss became nan"


def test_the_best_checkpoint_is_that_of_the_best_epoch_of_the_best_trial(tmp_path: Path) -> None:
    made = ledger(
        tmp_path, [trial(0, 0.7, 0.9), trial(1, 0.5, 0.5), trial(2, 0.6, 0.6)], max_masking_gap=0.1
    )
    best = raysweep.load_sweep(made.path).best
    assert best == made.path / "trials" / "0002" / "epoch-0002", "trial 0000 is over the limit"


def test_what_pgd_would_have_chosen_in_words(tmp_path: Path) -> None:
    """By hand: PGD prefers 0, at 0.40; of those within the limit the best is 2 with 0.55."""
    trials = [trial(0, 0.40, 0.62), trial(1, 0.50, 0.61), trial(2, 0.55, 0.60), trial(3, None)]
    lines = describe_masking_effect_on_ranking(ledger(tmp_path / "a", trials, max_masking_gap=0.2))
    assert lines == [
        "PGD would have chosen trial 0000, at a cost of 0.150 in robust worst",
        "masking gap over 0.2: trials 0000 are ranked last",
    ]
    assert describe_masking_effect_on_ranking(ledger(tmp_path / "b", trials)) == lines[:1], (
        "without a limit no trial is over it"
    )
    same = [trial(0, 0.55, 0.60), trial(1, 0.50, 0.58)]
    assert describe_masking_effect_on_ranking(ledger(tmp_path / "c", same)) == [], (
        "PGD chooses the same trial"
    )
    unmeasured = [trial(0, 0.40, 0.62), trial(1, 0.55)]
    assert describe_masking_effect_on_ranking(ledger(tmp_path / "d", unmeasured)) == [], (
        "a trial without a PGD accuracy is not compared"
    )
    better_but_masked = [trial(0, 0.45, 0.65), trial(1, 0.50, 0.64), trial(2, 0.48, 0.50)]
    line, _ = describe_masking_effect_on_ranking(
        ledger(tmp_path / "f", better_but_masked, max_masking_gap=0.1)
    )
    assert line.endswith("trial 0000, at a cost of 0.030 in robust worst"), (
        "the cost is not measured by trial 0001, which is over the limit"
    )
    all_masked = [trial(0, 0.1, 0.6), trial(1, 0.2, 0.6)]
    (line,) = describe_masking_effect_on_ranking(
        ledger(tmp_path / "e", all_masked, max_masking_gap=0.1)
    )
    assert line == "masking gap over 0.1: trials 0001, 0000 are ranked last"


def test_a_sweep_as_plain_data(tmp_path: Path) -> None:
    trials = [
        trial(0, 0.4, 0.4, trained_epochs=2),
        trial(1, 0.5, 0.9),
        trial(2, None, state="running", epoch=1, trained_epochs=1),
        trial(3, 0.6, 0.65, trained_epochs=1),
    ]
    made = ledger(tmp_path, trials, max_masking_gap=0.1)
    facts = json.loads(json.dumps(sweep_to_json(made)))
    assert facts["sweep"] == "s" and facts["path"] == str(made.path) and facts["advice"] == []
    assert facts["epochs"] == {"asked": 10, "trained": 7, "saved": 3}
    assert facts["front"] == [3] and facts["space"] == made.space.to_stored_dict()
    assert [t["number"] for t in facts["trials"]] == [3, 0, 1, 2], (
        "a trial over the limit comes last of those with a result"
    )
    assert [t["masks"] for t in facts["trials"]] == [False, False, True, False]
    assert facts["trials"][0]["checkpoint"] == str(made.path / "trials" / "0003" / "epoch-0002")
    assert facts["trials"][3]["checkpoint"] is None and facts["trials"][3]["state"] == "interrupted"
    assert facts["trials"][1]["settings"] == {LR: pytest.approx(0.1), LAM: -1.0}


def test_no_advice_before_the_first_epoch(tmp_path: Path) -> None:
    made = ledger(tmp_path, [trial(0, None)])
    assert advise_on_trial(made, 0) == raysweep.load_sweep(made.path).advice(0) == []


def test_a_table_of_an_evaluation_is_found_by_its_folder_or_its_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"label": [1, 2]})
    pq.write_table(table, tmp_path / "plain.parquet")
    with pytest.raises(SpecError, match=r"plain\.parquet: not an evaluation of raysweep"):
        raysweep.load_report(tmp_path / "plain.parquet")
    pq.write_table(
        table.replace_schema_metadata({"raysweep.evaluation": '{"seed": 3}'}),
        tmp_path / "examples.parquet",
    )
    for path in (tmp_path, tmp_path / "examples.parquet", str(tmp_path)):
        frame = raysweep.load_report(path)
        assert frame.attrs == {"seed": 3} and frame.label.tolist() == [1, 2]
