"""What a notebook gets: models, sweeps and reports of the past."""

import ast
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import tiny

import raysweep
from raysweep.errors import DamagedFileError
from raysweep.spec import SpecError
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial
from raysweep.training.selection import SelectionRule
from raysweep.training.trainer import train_model


@pytest.fixture(scope="module")
def ledger(tmp_path_factory) -> Ledger:
    """Two trials that a sweep's own trainer trained, and one that failed."""
    config = tiny("gairat")
    path = next(p for p in raysweep.spec.flatten_spec(config) if p.endswith(".lam"))
    space = SearchSpace.from_data(
        {"method": "gairat", "trials": 3, "space": {path: {"float": [-2.0, 2.0]}}}
    )
    ledger = Ledger.create(tmp_path_factory.mktemp("results") / "runs" / "one", space)
    for number, seed in enumerate((0, 1)):
        trial = Trial(number, {path: float(number)})
        for row in train_model(
            tiny("gairat", seed=seed), ledger.trial_path(number)
        ).last_checkpoint.history:
            trial = trial.with_epoch(row, SelectionRule("robust_worst"))
        ledger.save_trial(Trial(**{**vars(trial), "state": "finished"}))
    ledger.save_trial(Trial(2, {path: 2.0}, state="failed", reason="the loss became nan"))
    return ledger


def test_a_sweep_as_tables(ledger) -> None:
    sweep = raysweep.load_sweep(ledger.path)
    trials, epochs = sweep.trials, sweep.epochs
    assert list(trials.index) == [t.number for t in ledger.rank_trials()] + [2]
    assert trials.loc[2, "state"] == "failed" and "nan" in trials.loc[2, "reason"]
    assert {"lam", "robust_worst", "masking_gap", "seconds"} <= set(trials.columns)
    assert list(epochs.index) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    best = trials.iloc[0]
    assert epochs.loc[(trials.index[0], best["epoch"]), "robust_worst"] == best["robust_worst"]
    assert sweep.best == ledger.best_checkpoint_path(ledger.rank_trials()[0])
    assert all(isinstance(line, str) for line in sweep.advice(0))


def test_a_model_answers_as_it_did_in_its_trial(ledger) -> None:
    sweep = raysweep.load_sweep(ledger.path)
    model = raysweep.load(sweep.best)
    assert not model.training
    data = raysweep.data.load_data(tiny("gairat").data)
    with torch.no_grad():
        right = (
            (model(data.val.get_float_images(slice(0, 50))).argmax(1) == data.val.y[:50])
            .float()
            .mean()
            .item()
        )
    assert right == pytest.approx(sweep.trials.iloc[0]["clean"])


def test_a_report_as_a_table(ledger, tmp_path) -> None:
    model, data = (
        raysweep.load(ledger.best_checkpoint_path(ledger.rank_trials()[0])),
        raysweep.data.load_data(tiny("gairat").data),
    )
    report = raysweep.evaluate(
        model, data.test.get_float_images(slice(0, 20)), data.test.y[:20], attack="pgd20", eps=0.1
    )
    report.save_parquet(tmp_path / "examples.parquet")
    frame = raysweep.load_report(tmp_path)
    assert (
        frame.attrs["robust_accuracy"] == report.robust_accuracy == frame["broken_by"].isna().mean()
    )
    pd.testing.assert_frame_equal(frame, pd.DataFrame(report.columns()), check_dtype=False)


def test_what_is_not_there_is_one_line(tmp_path) -> None:
    (tmp_path / "examples.parquet").write_text("no parquet")
    for load, kind in (
        (raysweep.load, SpecError),
        (raysweep.load_sweep, SpecError),
        (raysweep.load_report, DamagedFileError),
    ):
        with pytest.raises(kind) as error:
            load(tmp_path)
        assert len(error.value.problems) == 1
    with pytest.raises(AttributeError):
        raysweep.no_such_name  # noqa: B018


def test_no_trial_has_a_result_yet(tmp_path) -> None:
    space = SearchSpace.from_data(
        {"method": "at", "trials": 1, "space": {"optim.lr": {"float": [0.01, 0.1]}}}
    )
    sweep = raysweep.load_sweep(Ledger.create(tmp_path / "runs" / "new", space).path)
    assert sweep.trials.empty and sweep.epochs.empty
    with pytest.raises(SpecError, match="no trial has reported robust_worst yet, except"):
        _ = sweep.best


def test_a_type_checker_sees_what_a_notebook_gets() -> None:
    (block,) = [
        node
        for node in ast.parse(Path(raysweep.__file__).read_text()).body
        if isinstance(node, ast.If)
    ]
    seen = {alias.name: line.module for line in block.body for alias in line.names}
    assert seen == raysweep._LAZY_EXPORTS and set(seen) == set(raysweep.__all__)
