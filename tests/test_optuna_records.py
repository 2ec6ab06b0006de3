"""A sweep's trials as Optuna keeps them in a database: states, values, epochs, distributions."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from raysweep.spec import SpecError
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.optuna_export import OptunaExporter
from raysweep.sweep.optuna_study import constraint_values, to_frozen_trial
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial

SHAPE = "method.terms.pgd.weight.shape"
LAM = "method.terms.pgd.weight.lam"
BURN_IN = "method.terms.pgd.weight.burn_in"
BEST = {"epoch": 2.0, "robust_worst": 0.5, "clean": 0.75, "masking_gap": 0.125}
LAST = {"epoch": 3.0, "robust_worst": 0.25, "clean": 0.875, "masking_gap": 0.5}
CURVE = [[1, 0.25], [2, 0.5], [3, 0.25]]


def space(**changes: Any) -> SearchSpace:
    searched = {
        SHAPE: {"categorical": ["tanh", "linear"]},
        LAM: {"float": [0.25, 4.0], "log": True, "when": {SHAPE: "tanh"}},
        BURN_IN: {"int": [0, 6], "step": 2},
    }
    return SearchSpace.from_data({"method": "gairat", "trials": 8, "space": searched, **changes})


def build_trial(number: int = 3, state: str = "finished", **more: Any) -> Trial:
    settings = {SHAPE: "tanh", LAM: 0.5, BURN_IN: 2}
    given = {
        "params": settings,
        "epoch": 3,
        "latest": LAST,
        "best": BEST,
        "curve": CURVE,
        "trained_epochs": 3,
    }
    return Trial(number, state=state, **{**given, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "best", "kept"),
    [
        ("finished", BEST, TrialState.COMPLETE),
        ("stopped", BEST, TrialState.PRUNED),
        ("failed", BEST, TrialState.FAIL),
        ("failed", {}, TrialState.FAIL),
        ("stopped", {}, TrialState.FAIL),
    ],
)
def test_states_and_the_values_of_the_best_epoch(
    state: str, best: dict[str, float], kept: TrialState
) -> None:
    trial = to_frozen_trial(
        space(max_masking_gap=0.25),
        build_trial(state=state, best=best, reason="r" if state == "failed" else ""),
    )
    complete = kept in (TrialState.COMPLETE, TrialState.PRUNED)
    assert (trial.state, trial.values) == (kept, [0.5] if complete else None)
    assert trial.intermediate_values == {1: 0.25, 2: 0.5, 3: 0.25}
    assert (trial.constraints or {}) == ({"masking_gap": -0.125} if complete else {})
    reason = {"reason": "r"} if state == "failed" else {}
    assert trial.user_attrs == {"raysweep.number": 3, "state": state, **reason}


def test_settings_and_the_distributions_that_they_come_from() -> None:
    both, linear = (
        to_frozen_trial(space(), build_trial()),
        to_frozen_trial(space(), build_trial(params={SHAPE: "linear", BURN_IN: 6})),
    )
    distributions = {
        SHAPE: CategoricalDistribution(["tanh", "linear"]),
        LAM: FloatDistribution(0.25, 4.0, log=True),
        BURN_IN: IntDistribution(0, 6, step=2),
    }
    assert (
        both.params == {SHAPE: "tanh", LAM: 0.5, BURN_IN: 2} and both.distributions == distributions
    )
    del distributions[LAM]
    assert linear.params == {SHAPE: "linear", BURN_IN: 6} and linear.distributions == distributions
    lists = space(
        method="at",
        space={"optim.lr.values": {"categorical": [[0.1, 0.01, 0.001], [0.2, 0.02, 0.002]]}},
    )
    trial = to_frozen_trial(lists, build_trial(params={"optim.lr.values": [0.2, 0.02, 0.002]}))
    assert trial.params == {"optim.lr.values": "[0.2, 0.02, 0.002]"}
    assert to_frozen_trial(space(), build_trial(params={BURN_IN: 2, "epochs": 9})).params == {
        BURN_IN: 2
    }, "only settings that are searched"


def test_several_objectives_have_values_and_no_epochs() -> None:
    """Optuna stores values of epochs for a single objective only."""
    trial = to_frozen_trial(space(metric=["clean", "robust_worst"]), build_trial())
    assert trial.values == [0.75, 0.5] and trial.intermediate_values == {} and not trial.constraints
    assert to_frozen_trial(space(metric="clean"), build_trial()).values == [0.75]


def test_a_constraint_is_the_gap_less_its_limit() -> None:
    assert constraint_values(space(), BEST) == {}
    assert [
        constraint_values(space(max_masking_gap=limit), BEST)["masking_gap"]
        for limit in (0.0, 0.125, 0.5)
    ] == [
        0.125,
        0.0,
        -0.375,
    ]


def test_a_database_has_the_ended_trials_of_one_sweep(tmp_path: Path) -> None:
    export = OptunaExporter(f"sqlite:///{tmp_path / 'optuna.db'}")
    storage, both = export._storage, ["robust_worst", "clean"]
    ledgers = [
        Ledger.create(
            tmp_path / name, space(metric=both, scheduler={"kind": "none"}, max_masking_gap=0.25)
        )
        for name in ("one", "two")
    ]
    one = ledgers[0]
    for number, state in enumerate(("stopped", "running", "failed", "finished")):
        best = BEST | {"robust_worst": 0.5 + number / 8, "masking_gap": 0.125 * number}
        one.save_trial(build_trial(number, state, best=best))
    for ledger in ledgers:
        export.on_sweep_start(ledger, 2)
        export.on_sweep_end(ledger)
    assert set(optuna.get_all_study_names(storage)) == {
        f"{ledger.name}-{ledger.key[:8]}" for ledger in ledgers
    }
    study = optuna.load_study(study_name=f"one-{one.key[:8]}", storage=storage)
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MAXIMIZE"]
    trials = study.get_trials()
    assert [(t.user_attrs["raysweep.number"], t.state.name, t.values) for t in trials] == [
        (0, "COMPLETE", [0.5, 0.75]),
        (2, "FAIL", None),
        (3, "COMPLETE", [0.875, 0.75]),
    ]
    assert trials[2].constraints == {"masking_gap": 0.125}
    assert [t.user_attrs["raysweep.number"] for t in study.best_trials] == [0], (
        "the other breaks the limit"
    )
    # If somebody changes the study, the next driver restores it.
    study.add_trial(to_frozen_trial(one.space, build_trial(7)))
    export.on_sweep_start(one, 2)
    assert export._records.flush()
    again = optuna.load_study(study_name=study.study_name, storage=storage).get_trials()
    assert [t.user_attrs["raysweep.number"] for t in again] == [0, 2, 3]
    export.on_trial_update(build_trial(1, "running"), {"epoch": 3.0})
    export.on_trial_update(build_trial(1, "stopped"), None)
    assert export._records.flush()
    again = optuna.load_study(study_name=study.study_name, storage=storage).get_trials()
    assert [t.user_attrs["raysweep.number"] for t in again] == [0, 2, 3, 1]


def load_exported(export: OptunaExporter, name: str) -> list[optuna.trial.FrozenTrial]:
    assert export._records.flush(), "all records are written"
    return optuna.load_study(study_name=name, storage=export._storage).get_trials()


@pytest.mark.parametrize("storage", ["sqlite:///{}/optuna.db", "{}/journal.log"])
@pytest.mark.parametrize("sweep", ["one", "g1-copy-2", "a-copy-b"])
def test_a_study_with_notes_stays_while_it_is_equal_to_the_sweep(
    tmp_path: Path, storage: str, sweep: str
) -> None:
    """Settings of a file may be 1 where Optuna has 1.0. A sweep may be called like a copy."""
    searched = {"optim.lr": {"float": [0.01, 1]}, "optim.momentum": {"categorical": [0.9, 0.0]}}
    ledger = Ledger.create(tmp_path / sweep, space(method="at", base={"epochs": 3}, space=searched))
    params = {"optim.lr": 1, "optim.momentum": 0}
    ledger.save_trial(build_trial(0, params=params, burn_in=0))
    url, name = storage.format(tmp_path), f"{sweep}-{ledger.key[:8]}"
    export = OptunaExporter(url)
    export.on_sweep_start(ledger, 1)
    load_exported(export, name)
    optuna.load_study(study_name=name, storage=export._storage).set_user_attr("note", "mine")
    for _ in range(2):
        export = OptunaExporter(url)
        export.on_sweep_start(ledger, 1)
        (trial,) = load_exported(export, name)
        assert repr(trial.params) == "{'optim.lr': 1.0, 'optim.momentum': 0.0}"
        assert optuna.get_all_study_names(export._storage) == [name]
    # It changes: the study with the note stays, and another one is equal to the sweep.
    params = {"optim.lr": 0.5, "optim.momentum": 0.9}
    ledger.save_trial(build_trial(1, params=params, burn_in=0))
    for _ in range(2):
        export = OptunaExporter(url)
        export.on_sweep_start(ledger, 1)
        assert len(load_exported(export, name)) == 1
        assert len(load_exported(export, f"{name}-copy-2")) == 2
        assert optuna.get_all_study_names(export._storage) == [name, f"{name}-copy-2"]


@pytest.mark.parametrize("storage", ["sqlite:///{}/optuna.db", "{}/journal.log"])
def test_a_study_follows_a_sweep_with_more_choices_and_more_epochs(
    tmp_path: Path, storage: str
) -> None:
    """A database refuses trials whose choices differ from those of the others."""
    url, searched = storage.format(tmp_path), {"batch_size": {"categorical": [64, 128]}}
    ledger = Ledger.create(tmp_path / "s", space(method="at", base={"epochs": 3}, space=searched))
    name = f"s-{ledger.key[:8]}"
    ledger.save_trial(build_trial(0, params={"batch_size": 64}, burn_in=0))
    export = OptunaExporter(url)
    export.on_sweep_start(ledger, 1)
    load_exported(export, name)
    choices = ledger.space.space["batch_size"].replace(categorical=(64, 128, 256))
    ledger.extend_space(ledger.space.replace(space={"batch_size": choices}))
    export = OptunaExporter(url)
    export.on_sweep_start(ledger, 1)
    new = build_trial(1, params={"batch_size": 256}, burn_in=0)
    ledger.save_trial(new)
    export.on_trial_update(new, None)
    exported = load_exported(export, name)
    assert [trial.params for trial in exported] == [{"batch_size": 64}, {"batch_size": 256}]
    both = CategoricalDistribution([64, 128, 256])
    assert [trial.distributions["batch_size"] for trial in exported] == [both, both]
    # Another call, without --optuna, trained a fourth epoch, which was not better.
    ledger.save_trial(build_trial(1, params={"batch_size": 256}, curve=[*CURVE, [4, 0.25]]))
    export.on_sweep_start(ledger, 1)
    exported = load_exported(export, name)
    assert [len(trial.intermediate_values) for trial in exported] == [3, 4]


def test_a_journal_stays_valid_after_a_record_that_was_cut_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By a full disk or a crash. Records that come later are readable, and so are those before."""
    file = tmp_path / "journal.log"
    searched = {"optim.lr": {"float": [0.01, 1]}}
    ledger = Ledger.create(tmp_path / "s", space(method="at", base={"epochs": 3}, space=searched))
    export, name = OptunaExporter(str(file)), f"s-{ledger.key[:8]}"
    export.on_sweep_start(ledger, 1)
    for number in range(3):
        if number == 2:
            # Another call finds the cut before it has written anything.
            export = OptunaExporter(str(file))
            export.on_sweep_start(ledger, 1)
        trial = build_trial(number, params={"optim.lr": 0.5 + number / 10}, burn_in=0)
        ledger.save_trial(trial)
        export.on_trial_update(trial, None)
        assert len(load_exported(export, name)) == number + 1
        assert caplog.text.count("its last record was cut off") == number
        with file.open("ab") as opened:
            opened.write(b'{"op_code": 4, "worker_id": "x", "stu')
    assert len(load_exported(OptunaExporter(str(file)), name)) == 3
    with file.open("ab") as opened:
        opened.write(b"nonsense\n{}\n")
    with pytest.raises(SpecError, match=r"journal\.log: it is damaged; name another file"):
        OptunaExporter(str(file))
