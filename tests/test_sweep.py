"""Real sweeps on a real, local Ray cluster, with tiny trials."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, TrialUpdateListener, tiny
from rich.console import Console

from raysweep.cli import main
from raysweep.data import load_data
from raysweep.errors import DamagedFileError, InfrastructureError
from raysweep.logs import read_log
from raysweep.spec import SpecError
from raysweep.stores import FolderStore, StoreUnavailable
from raysweep.sweep.finalist_summary import describe_finalists, summarize_finalists
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.optuna_search import LedgerSearcher
from raysweep.sweep.resources import Resources
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial
from raysweep.sweep.trial_advice import advise_on_trial
from raysweep.sweep.tune_callbacks import Budget, LedgerCallback, SweepFailed
from raysweep.sweep.tuner import run_sweep
from raysweep.terminal import SweepDisplay
from raysweep.tracking import SweepTracker, Tracker
from raysweep.training import checkpoint
from raysweep.training.callbacks import FunctionCallback
from raysweep.training.checkpoint import RunDirectory
from raysweep.training.failure_reports import failure_report
from raysweep.training.selection import SelectionRule
from raysweep.training.trainer import train_model

pytestmark = pytest.mark.ray
ALPHA = "method.terms.pgd.weight.alpha"


def space(**more) -> SearchSpace:
    data = {
        "method": "lrat",
        "trials": 4,
        "base": TINY,
        "scheduler": {"kind": "none"},
        "sampler": {"kind": "random"},
        "space": {ALPHA: {"float": [0.5, 4.0]}},
        "points_to_evaluate": [{ALPHA: 2.0}],
    }
    return SearchSpace.from_data({**data, **more})


def weights(path: Path) -> str:
    """Hash of the weights in a checkpoint."""
    return str(checkpoint.read_checkpoint(path).meta["sha256"]["weights.safetensors"])


class Recorder:
    def __init__(self) -> None:
        self.events: list[tuple] = []
        self.n_uploaded = 0

    def on_sweep_start(self, ledger, concurrency) -> None:
        self.events.append(("started", concurrency))

    def on_trial_update(self, trial, epoch_metrics) -> None:
        self.events.append((trial.number, trial.state, trial.epoch))

    def on_sweep_end(self, ledger, error: BaseException | None = None) -> None:
        self.events.append(("ended",))


@pytest.fixture(scope="module")
def finished_sweep(
    ray_cluster, tmp_path_factory, training_plots
) -> tuple[Ledger, Recorder, Tracker]:
    path = tmp_path_factory.mktemp("sweep")
    ledger = Ledger.create(path / "runs" / "one", space())
    recorder, tracker = Recorder(), Tracker(f"sqlite:///{path}/mlflow.db", path / "mlruns")
    listener = SweepTracker(tracker, load_data(space().trial_config({}).data))
    with training_plots():
        run_sweep(ledger, [listener, recorder])
    # Before another test resumes a copy, whose runs have the same artifacts.
    recorder.n_uploaded = len(list((path / "mlruns").rglob("artifacts/checkpoint")))
    return ledger, recorder, tracker


def test_every_trial_trains_and_leaves_its_best_checkpoint(finished_sweep) -> None:
    ledger, recorder, _ = finished_sweep
    trials = ledger.load_trials()
    assert [trial.number for trial in trials] == [0, 1, 2, 3]
    assert all(trial.state == "finished" and trial.epoch == 2 for trial in trials)
    assert trials[0].params == {ALPHA: 2.0}, "the starting point comes first"
    for trial in ledger.rank_trials():
        saved = checkpoint.read_checkpoint(ledger.best_checkpoint_path(trial))
        assert saved.last_metrics["robust_worst"] == trial.best["robust_worst"]
        assert saved.config.method.terms["pgd"].weight.alpha == trial.params[ALPHA]
        assert trial.best_verdicts is not None, "what it gets right of each example"
        assert trial.best_verdicts.mask.mean() == pytest.approx(trial.best["robust_worst"])
    assert recorder.events[0] == ("started", 2) and recorder.events[-1] == ("ended",)
    assert [event for event in recorder.events if event[0] == 1][-1] == (1, "finished", 2)


def test_mlflow_has_one_parent_and_one_run_for_each_trial(finished_sweep) -> None:
    from mlflow import MlflowClient

    ledger, recorder, tracker = finished_sweep
    assert recorder.n_uploaded == 3, "the weights of the best three"
    client = MlflowClient(tracker.uri)
    experiment = client.get_experiment_by_name("raysweep")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags["raysweep.kind"] == "sweep"]
    children = [run for run in runs if run.data.tags["raysweep.kind"] == "trial"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(children) == 4
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    for run in children:
        trial = ledger.load_trials()[int(run.data.tags["raysweep.trial"])]
        assert run.data.params["method.attacks.cw.eps"] == "0.15"
        assert float(run.data.params[ALPHA]) == pytest.approx(trial.params[ALPHA], rel=1e-5)
        assert run.info.run_name == f"{trial.number:04d} {ledger.name}"
        (result,) = client.get_metric_history(run.info.run_id, "best/robust_worst")
        assert (result.value, result.step) == (pytest.approx(trial.best["robust_worst"]), 0), (
            "a bar in the UI"
        )
        history = client.get_metric_history(run.info.run_id, "robust_worst")
        assert [point.step for point in history] == [1, 2]
        artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
        assert artifacts - {"plots", "checkpoint"} == {"config.json", "environment.json"}
        is_shown = trial.number in {t.number for t in ledger.rank_trials()[:3]}
        plots = [item.path for item in client.list_artifacts(run.info.run_id, "plots")]
        # Another test may have drawn those of a copy, whose runs have the same artifacts.
        assert (plots and "checkpoint" in artifacts) or not is_shown
        assert run.data.tags["mlflow.note.content"].splitlines() == [
            f"- {line}" for line in advise_on_trial(ledger, trial.number)
        ]
    assert any(run.data.tags["mlflow.note.content"] for run in children)
    best = ledger.rank_trials()[0]
    assert parent.data.metrics["best/robust_worst"] == pytest.approx(best.best["robust_worst"])
    described = parent.data.tags["mlflow.note.content"]
    assert "- 4 of 4 trials ended\n- epochs: 8 completed, 8 trained, 0 reused" in described
    assert (
        f"- best: trial {best.number:04d}, robust worst {best.score('robust_worst'):.3f} in epoch"
        in described
    )
    assert (
        f"alpha={best.params[ALPHA]:.6g}\n"
        f"- next: raysweep eval {ledger.best_checkpoint_path(best)}" in described
    )


def test_mlflow_tells_of_a_trial_that_failed(tmp_path) -> None:
    from mlflow import MlflowClient

    ledger, tracker = (
        Ledger.create(tmp_path / "one", space()),
        Tracker(f"sqlite:///{tmp_path}/m.db", tmp_path / "a"),
    )
    ledger.save_trial(
        Trial(0, {ALPHA: 2.0}, state="failed", epoch=1, trained_epochs=1, reason="KeyError: 'no'")
    )
    (ledger.trial_path(0) / "error.txt").write_text("Traceback")
    listener = SweepTracker(tracker)
    listener.on_sweep_start(ledger, 1)
    listener.on_sweep_end(ledger)
    client, runs = MlflowClient(tracker.uri), {}
    for run in client.search_runs([client.get_experiment_by_name("raysweep").experiment_id]):
        runs[run.data.tags["raysweep.kind"]] = run
    failed, parent = runs["trial"], runs["sweep"]
    assert failed.data.tags["mlflow.note.content"] == "- failed: KeyError: 'no'"
    assert "error.txt" in {item.path for item in client.list_artifacts(failed.info.run_id)}
    assert "- 1 of 4 trials ended, 1 of them failed" in parent.data.tags["mlflow.note.content"]


def test_mlflow_lacks_nothing_when_a_driver_was_killed_between_two_writes(tmp_path) -> None:
    """The ledger had epoch 2 already, MLflow had not; the next driver's budget ends before it is
    trial 1's turn.
    """
    from mlflow import MlflowClient

    ledger, tracker = (
        Ledger.create(tmp_path / "one", space()),
        Tracker(f"sqlite:///{tmp_path}/m.db", tmp_path / "a"),
    )
    killed = SweepTracker(tracker)
    killed.on_sweep_start(ledger, 2)
    for number in (0, 1):
        trial = Trial(number, {ALPHA: 2.0})
        rows = train_model(
            ledger.space.trial_config(trial.params), ledger.trial_path(number)
        ).last_checkpoint.history
        killed.on_trial_update(trial, None)
        for row in rows:
            trial = trial.with_epoch(row, SelectionRule("robust_worst"))
            ledger.save_trial(trial)
            if row["epoch"] == 1:
                killed.on_trial_update(trial, row)
    client = MlflowClient(tracker.uri)
    assert killed.flush()
    experiment = client.get_experiment_by_name("raysweep").experiment_id
    assert {run.info.status for run in client.search_runs([experiment])} == {"RUNNING"}
    second = SweepTracker(tracker)
    second.on_sweep_start(ledger, 2)
    second.on_trial_update(ledger.load_trials()[0], None)
    second.on_sweep_end(ledger)
    runs = {run.data.tags.get("raysweep.trial"): run for run in client.search_runs([experiment])}
    assert {run.info.status for run in runs.values()} == {"KILLED"} and len(runs) == 3
    history = client.get_metric_history(runs["0000"].info.run_id, "robust_worst")
    assert [point.step for point in history] == [1, 2]


def test_what_pgd_would_have_chosen_and_its_cost_are_told(tmp_path, capsys, monkeypatch) -> None:
    """Trial 2 is best under both, and breaks the limit: it is no measure of what was lost."""
    ledger = Ledger.create(tmp_path / "runs" / "one", space(max_masking_gap=0.1))
    for number, (pgd, worst) in enumerate([(0.6, 0.41), (0.5, 0.45), (0.59, 0.47)]):
        best = {"epoch": 1.0, "pgd": pgd, "robust_worst": worst, "masking_gap": pgd - worst}
        ledger.save_trial(
            Trial(number, {ALPHA: 1.0 + number}, state="finished", epoch=1, best=best)
        )
    monkeypatch.chdir(tmp_path)
    assert main(["show", "one"]) == 0
    out = capsys.readouterr().out
    assert "PGD would have chosen trial 0000, at a cost of 0.040 in robust worst" in out
    assert "masking gap over 0.1: trials 0002, 0000 are ranked last" in out


@pytest.fixture
def sweep_copy(finished_sweep, tmp_path: Path) -> tuple[Ledger, Tracker]:
    """A copy of the finished sweep, with its MLflow store, that a test may change."""
    ledger, _, tracker = finished_sweep
    shutil.copytree(ledger.path.parent.parent.local_path, tmp_path, dirs_exist_ok=True)
    copy = Ledger.open(tmp_path / ledger.path.parent.name / ledger.path.name)
    return copy, Tracker(
        tracker.uri.replace(str(ledger.path.parent.parent), str(tmp_path)), tmp_path / "mlruns"
    )


def test_a_finished_sweep_grows_by_trials_epochs_and_a_wider_range(sweep_copy) -> None:
    ledger, tracker = sweep_copy
    before = ledger.load_trials()
    again = Ledger.open(ledger.path)
    wider = {ALPHA: {"float": [0.25, 8.0]}}
    again.extend_space(space(trials=5, base={**TINY, "epochs": 3}, space=wider))
    assert {trial.state for trial in again.load_trials()} == {"running"}
    recorder = Recorder()
    run_sweep(again, [recorder, SweepTracker(tracker, load_data(space().trial_config({}).data))])
    trials = again.load_trials()
    assert [trial.number for trial in trials] == [0, 1, 2, 3, 4]
    assert all(trial.state == "finished" and trial.epoch == 3 for trial in trials)
    assert len({trial.params[ALPHA] for trial in trials}) == 5, "no draw of the sampler comes twice"
    for old, new in zip(before, trials, strict=False):
        assert (new.params, new.curve[:2], new.trained_epochs) == (old.params, old.curve, 3), (
            "no epoch was trained again"
        )
    alone = train_model(
        again.space.trial_config(trials[1].params), ledger.path / "alone"
    ).last_checkpoint
    assert weights(alone.local_folder) == weights(again.trial_path(1) / "epoch-0003"), (
        "as if it had had the epochs from the start"
    )
    again.extend_space(again.space)
    run_sweep(again, [recorder])
    assert again.load_trials() == trials, "what is done stays done"
    check_that_mlflow_follows(ledger, tracker)


def check_that_mlflow_follows(ledger: Ledger, tracker: Tracker) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracker.uri)
    runs = client.search_runs([client.get_experiment_by_name("raysweep").experiment_id])
    assert len(runs) == len(ledger.load_trials()) + 1 == 6 and {
        run.info.status for run in runs
    } == {"FINISHED"}
    (first,) = [run for run in runs if run.data.tags.get("raysweep.trial") == "0000"]
    assert [p.step for p in client.get_metric_history(first.info.run_id, "robust_worst")][:3] == [
        1,
        2,
        3,
    ]
    assert (first.data.params["epochs"], first.data.tags["now.epochs"]) == ("2", "3")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"metric": "clean"}, "metric = 'clean': the sweep has 'robust_worst'"),
        ({"base": {**TINY, "epochs": 1}}, "epochs = 1: the sweep has 2 and can only have more"),
        ({"base": {**TINY, "batch_size": 16}}, "batch_size = 16: the sweep has 32"),
        (
            {"space": {ALPHA: {"float": [3.0, 9.0]}}, "points_to_evaluate": []},
            f"{ALPHA}: 2.0 of trial 0000 is outside",
        ),
        ({"space": {ALPHA: {"categorical": [2.0]}}}, "its kind and its `when` cannot change"),
        ({"space": {ALPHA: {"float": [1, 4]}, "seed": {"int": [0, 3]}}}, "seed is now searched"),
    ],
)
def test_what_would_make_it_another_sweep_is_refused(change, line, tmp_path) -> None:
    ledger = Ledger.create(tmp_path / "sweep", space())
    ledger.save_trial(Trial(0, {ALPHA: 2.0}, state="finished", epoch=2))
    written = (ledger.path / "sweep.json").read_text()
    with pytest.raises(SpecError) as error:
        ledger.extend_space(space(**change))
    assert len(error.value.problems) == 1 and line in error.value.problems[0]
    assert (ledger.path / "sweep.json").read_text() == written and ledger.load_trials()[
        0
    ].state == "finished"


def test_the_sampler_remembers_what_an_earlier_driver_learned(finished_sweep, tmp_path) -> None:
    ledger = Ledger.create(tmp_path / "sweep", space())
    for number, state in enumerate(("finished", "failed", "running")):
        best = {"robust_worst": 0.5, "epoch": 2.0} if state == "finished" else {}
        ledger.save_trial(Trial(number, {ALPHA: 1.0 + number}, state=state, best=best))  # type: ignore[arg-type]
    search = LedgerSearcher(Ledger.open(ledger.path))
    states = [trial.state.name for trial in search._study.get_trials()]
    assert states == ["COMPLETE", "FAIL", "RUNNING"]
    assert search.suggest("a") == {"number": 2, "params": {ALPHA: 3.0}}, (
        "the unfinished trial goes first"
    )
    assert search.suggest("b")["number"] == 3
    assert search.suggest("c") == "FINISHED"


def test_a_number_that_an_earlier_driver_left_out_is_given_now(tmp_path) -> None:
    """It was killed before trial 0 had a process, when trial 1 had one already."""
    ledger = Ledger.create(tmp_path / "sweep", space())
    ledger.save_trial(
        Trial(1, {ALPHA: 1.0}, state="finished", best={"epoch": 1.0, "robust_worst": 0.5})
    )
    search = LedgerSearcher(ledger)
    asked = [search.suggest(name) for name in "abc"]
    assert [found["number"] for found in asked] == [0, 2, 3] and asked[0]["params"] == {ALPHA: 2.0}
    assert search.suggest("d") == "FINISHED"


def test_a_genetic_sampler_has_its_parents_after_a_restart(tmp_path) -> None:
    sampler = {"kind": "nsga2", "n_startup_trials": 2}
    ledger = Ledger.create(
        tmp_path / "sweep", space(trials=5, sampler=sampler, points_to_evaluate=[])
    )
    for number in range(4):
        ledger.save_trial(
            Trial(
                number,
                {ALPHA: 1.0 + number},
                state="finished",
                best={"epoch": 1.0, "robust_worst": 0.1 * number},
            )
        )
    study = LedgerSearcher(ledger)._study
    sampler = study.sampler
    assert [sampler.get_trial_generation(study, trial) for trial in study.get_trials()] == [
        0,
        0,
        1,
        1,
    ]


def test_a_starting_point_of_some_settings_is_not_tried_again(tmp_path) -> None:
    two = {ALPHA: {"float": [0.5, 4.0]}, "method.terms.cw.weight.alpha": {"float": [0.5, 4.0]}}
    ledger = Ledger.create(tmp_path / "sweep", space(trials=2, space=two))
    ledger.save_trial(Trial(0, {ALPHA: 2.0, "method.terms.cw.weight.alpha": 1.0}, state="failed"))
    assert LedgerSearcher(ledger).suggest("a")["params"][ALPHA] != 2.0


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_settings_are_not_tried_twice_while_there_are_others(kind, tmp_path) -> None:
    values = [0.5, 1.0, 2.0, 4.0]
    points = {ALPHA: {"categorical": values}}
    ledger = Ledger.create(
        tmp_path / "sweep", space(sampler={"kind": kind}, space=points, trials=6)
    )
    ledger.save_trial(
        Trial(0, {ALPHA: 0.5}, state="finished", best={"epoch": 1.0, "robust_worst": 0.5})
    )
    search = LedgerSearcher(ledger)
    *found, end = [search.suggest(name) for name in "abcdef"]
    tried = [0.5, *(trial["params"][ALPHA] for trial in found)]
    assert tried[:2] == [0.5, 2.0], "the starting point first"
    assert sorted(tried[:4]) == values
    assert [trial["number"] for trial in found] == [1, 2, 3, 4, 5], (
        "when all was tried, a sweep still has its trials"
    )
    assert end == "FINISHED"


def test_asha_stops_weak_trials_and_a_failing_trial_fails_alone(ray_cluster, tmp_path) -> None:
    base = {**TINY, "epochs": 4, "data.train_size": 256}
    settings = space(
        base=base,
        trials=5,
        prefix_gib=1e-4,
        scheduler={"kind": "asha", "grace_period": 1, "reduction_factor": 2},
        space={"optim.lr": {"categorical": [0.05, 1.0e-7, 1.0e20]}},
        points_to_evaluate=[{"optim.lr": lr} for lr in (0.05, 1.0e20, 1.0e-7)],
    )
    ledger = Ledger.create(tmp_path / "sweep", settings)
    # One after the other: a trial that is the first at a rung is never stopped there.
    run_sweep(ledger, [], Resources(cpus=2))
    trials = ledger.load_trials()
    assert trials[1].state == "failed" and "the loss became" in trials[1].reason
    assert trials[0].state == "finished", "the best at each rung"
    stopped = [trial for trial in trials if trial.state == "stopped"]
    assert trials[2] in stopped and all(trial.params == {"optim.lr": 1.0e-7} for trial in stopped)
    assert all(trial.epoch in (1, 2) for trial in stopped), "at a rung"
    assert ledger.rank_trials()[0].params == {"optim.lr": 0.05}
    kept = sum(
        file.stat().st_size for file in (tmp_path / ".prefixes").rglob("*") if file.is_file()
    )
    assert kept <= 1e-4 * 2**30, "the store of prefixes keeps to the space's limit"
    entries = read_log(ledger.path)
    stops = [entry for entry in entries if entry.get("event") == "asha_stop"]
    assert {entry["trial"] for entry in stops} == {trial.number for trial in stopped}
    assert all(entry["value"] < entry["cut"] and entry["epoch"] in (1, 2) for entry in stops)
    failures = [entry for entry in entries if entry["level"] == "ERROR"]
    assert {entry["trial"] for entry in failures} == {
        trial.number for trial in trials if trial.state == "failed"
    }
    (told,) = (e for e in failures if e["trial"] == 1 and e["writer"] == "trial")
    assert told["exception"]["causes"] == [{"type": "TrainingFailed", "message": trials[1].reason}]
    assert "TrainingFailed" in (ledger.trial_path(1) / "log.txt").read_text()
    evicted = [entry["key"] for entry in entries if entry["message"].startswith("evicted state ")]
    assert evicted and not any((tmp_path / ".prefixes" / key).exists() for key in evicted[:1])


def test_a_store_that_fails_under_the_sweep_is_its_own_error_and_loses_nothing(
    ray_cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune wraps whatever its callbacks raise: the command would take the store's failure for a
    bug.
    """

    def refuse_write(store: FolderStore, key: str, data: bytes) -> None:
        raise StoreUnavailable(f"{key} cannot be written: no answer")

    ledger = Ledger.create(tmp_path / "sweep", space(trials=2))
    with monkeypatch.context() as during:

        def break_the_store(trial: Trial) -> None:
            during.setattr(FolderStore, "write_bytes", refuse_write)

        with pytest.raises(StoreUnavailable, match=r"trial\.json cannot be written"):
            run_sweep(ledger, [TrialUpdateListener(break_the_store)])
    assert any(trial.state == "running" for trial in ledger.load_trials())
    run_sweep(ledger, [])
    assert [(trial.state, trial.epoch) for trial in ledger.load_trials()] == [("finished", 2)] * 2
    (told,) = (e for e in read_log(ledger.path) if e.get("event") == "sweep_error")
    assert told["exception"]["causes"][0]["type"] == "StoreUnavailable"


def test_autoattack_on_the_finalists_can_be_interrupted(
    ray_cluster, tmp_path: Path, capsys
) -> None:
    """Ctrl-C as the first attack begins; then the sweep resumes, with MLflow and a display."""
    base = {
        **TINY,
        "data.train_size": 600,
        "method.attacks.*.eps": 0.02,
        "validation.*.eps": 0.4,
        "validation.size": 10,
        "epochs": 4,
    }
    ledger = Ledger.create(tmp_path / "sweep", space(trials=2, base=base, finalists=2))

    class Interrupter(TrialUpdateListener):
        def on_finalist_update(self, trial: Trial, n_left: int) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    end = run_sweep(ledger, [Interrupter(lambda trial: None)])
    assert end == "interrupted", ledger.load_trials()
    assert ledger.is_interrupted() and len(ledger.find_waiting_finalists()) == 2
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "mlruns")
    display = SweepDisplay(Console(stderr=True, force_terminal=False))
    assert run_sweep(ledger, [SweepTracker(tracker), display]) == "done"
    summary = summarize_finalists(ledger)
    assert summary is not None and summary.n_examples == 10
    told = capsys.readouterr().err
    assert "2 left to attack" in told and "1 left to attack" in told
    assert told.count("under AutoAttack") == 2

    from mlflow import MlflowClient

    (experiment,) = MlflowClient(tracker.uri).search_experiments(filter_string="name = 'raysweep'")
    runs = MlflowClient(tracker.uri).search_runs([experiment.experiment_id])
    results = {
        run.data.tags.get("raysweep.trial", "sweep"): run.data.metrics["finalist/robust_accuracy"]
        for run in runs
    }
    best, other = summary.by_autoattack
    expected = {"sweep": best, f"{best.number:04d}": best, f"{other.number:04d}": other}
    assert results == {
        name: pytest.approx(trial.finalist.robust, abs=1e-5) for name, trial in expected.items()
    }
    (note,) = (
        run.data.tags["mlflow.note.content"]
        for run in runs
        if run.data.tags["raysweep.kind"] == "sweep"
    )
    assert describe_finalists(ledger)[0] in note


def test_a_sweep_says_why_it_ended(ray_cluster, tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "sweep", space(trials=2, base={**TINY, "epochs": 4}))
    told: list[int] = []

    def ctrl_c(trial: Trial) -> None:
        if trial.epoch and not told:
            told.append(trial.epoch)
            os.kill(os.getpid(), signal.SIGINT)

    assert run_sweep(ledger, [TrialUpdateListener(ctrl_c)], budget=Budget(3600)) == "interrupted"
    assert any(trial.state == "running" for trial in ledger.load_trials())
    assert run_sweep(ledger, [], budget=Budget(0)) == "budget"
    before = signal.getsignal(signal.SIGINT)
    assert run_sweep(ledger, [], budget=Budget(3600)) == "done"
    assert signal.getsignal(signal.SIGINT) is before, (
        "what comes after a sweep can be ended by Ctrl-C, too"
    )
    entries = read_log(ledger.path)
    ends = [entry["reason"] for entry in entries if entry.get("event") == "sweep_end"]
    assert ends == ["interrupted", "budget", "done"]
    starts = [entry["states"] for entry in entries if entry.get("event") == "sweep_start"]
    assert starts[0] == {} and starts[1].get("running") and starts[1] == starts[2]
    (limit,) = (entry for entry in entries if entry.get("event") == "limit")
    assert "s of 0 s have passed" in limit["message"]


def test_a_budget_counts_what_is_held_now_and_no_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two GPUs for two hours, of which it waited one for a new process: no report has come yet."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    ledger = Ledger.create(tmp_path / "sweep", space())
    relay = LedgerCallback(ledger, 2, [], gpus_per_trial=2.0, budget=Budget(gpu_seconds=7200.0))
    trial = SimpleNamespace(
        trial_id="a",
        config={"number": 0, "params": {ALPHA: 2.0}},
        error_file=None,
        num_failures=1,
    )
    for hours, event in (
        (0.0, relay.on_trial_start),
        (0.5, relay.on_trial_recover),
        (1.5, relay.on_trial_start),
    ):
        clock[0] = 3600 * hours
        event(0, [], trial)  # type: ignore[arg-type, operator]
    clock[0] = 3600 * 1.9
    assert not relay.has_reached_limit
    clock[0] = 3600 * 2.0
    assert relay.has_reached_limit
    relay.on_trial_complete(0, [], trial)  # type: ignore[arg-type]
    assert relay.has_reached_limit and ledger.load_trials()[0].state == "running", (
        "it goes on with --resume"
    )


def test_a_bug_ends_the_sweep_after_a_few_trials_with_its_traceback(
    ray_cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raysweep.sweep import tuner

    def train_with_bug(*arguments: object) -> None:
        """Train in the trial's process, where the training has a bug."""
        from raysweep.sweep import tuner as tuner_of_trial

        def fail(*arguments: object, **options: object) -> None:
            raise KeyError("histograms")

        original, tuner_of_trial.train_model = tuner_of_trial.train_model, fail
        try:
            tuner_of_trial._train_trial(*arguments)
        finally:
            tuner_of_trial.train_model = original

    monkeypatch.setattr(tuner, "_train_trial", train_with_bug)
    ledger = Ledger.create(tmp_path / "sweep", space(trials=8, base={**TINY, "epochs": 1}))
    with pytest.raises(
        SweepFailed, match="trials failed with errors in the code, the first:\nTraceback"
    ) as error:
        run_sweep(ledger, [])
    failed = [trial for trial in ledger.load_trials() if trial.state == "failed"]
    assert 3 <= len(failed) < 8 and all("histograms" in trial.reason for trial in failed)
    assert any(
        (ledger.trial_path(t.number) / "error.txt").read_text() in str(error.value) for t in failed
    )
    told = [e for e in read_log(ledger.path, with_trials=False) if e.get("trial_traceback")]
    assert [e["trial_traceback"] for e in told[:1]] == [
        (ledger.trial_path(told[0]["trial"]) / "error.txt").read_text()
    ]


def test_failures_are_told_apart(tmp_path) -> None:
    def report_of_failure(work: Callable[[], object]) -> dict[str, str]:
        with pytest.raises(Exception) as error:
            work()
        return failure_report(error.value, tiny("at"), tmp_path)

    hint = (
        "out of memory: lower batch_size (now 32) or raise --cpus-per-trial, "
        "so that fewer run at once"
    )
    assert report_of_failure(lambda: torch.empty(2**60)) == {
        "failed": hint,
        "infrastructure": "yes",
    }
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    alone = failure_report(error.value, tiny("at"), tmp_path, is_sweep_trial=False)
    assert alone["failed"] == "out of memory: lower batch_size (now 32)", (
        "no flag of another command"
    )
    assert report_of_failure(lambda: train_model(tiny("at", optim__lr=1e20), tmp_path / "nan"))[
        "failed"
    ].startswith("the loss became")
    bug = report_of_failure(
        lambda: train_model(
            tiny("at"), tmp_path / "bug", FunctionCallback(lambda metrics, saved: {}["no"])
        )
    )
    assert bug == {"failed": "KeyError: 'no'", "bug": (tmp_path / "error.txt").read_text()}
    assert "in train_model" in bug["bug"]


def test_a_node_that_dies_costs_its_trials_the_epoch_they_were_in(ray_cluster, tmp_path) -> None:
    """Three trials on three CPUs, one of them on the node that is killed."""
    ledger = Ledger.create(
        tmp_path / "sweep", space(trials=3, base={**TINY, "epochs": 15, "validation.size": 10})
    )
    nodes = [ray_cluster.add_node(num_cpus=1)]
    epochs: dict[int, int] = {}

    def kill_once(trial: Trial) -> None:
        epochs[trial.number] = trial.epoch
        # Wait until all three are in the middle of their epochs: they start one after the other.
        if nodes and len(epochs) == 3 and min(epochs.values()) >= 1 and max(epochs.values()) < 15:
            ray_cluster.remove_node(nodes.pop(), allow_graceful=False)

    run_sweep(ledger, [TrialUpdateListener(kill_once)])
    assert not nodes
    ray_cluster.wait_for_nodes()
    assert sorted(trial.retries for trial in ledger.load_trials()) == [0, 0, 1], (
        "the one that was there started again"
    )
    for trial in ledger.load_trials():
        assert trial.state == "finished" and [epoch for epoch, _ in trial.curve] == list(
            range(1, 16)
        )
        alone = train_model(
            ledger.space.trial_config(trial.params), tmp_path / f"alone-{trial.number}"
        ).last_checkpoint
        assert weights(alone.local_folder) == weights(
            ledger.trial_path(trial.number) / "epoch-0015"
        )
    entries = read_log(ledger.path)
    (lost,) = (entry for entry in entries if entry.get("event") == "trial_lost")
    (moved,) = (trial.number for trial in ledger.load_trials() if trial.retries)
    assert (lost["trial"], lost["next_attempt"]) == (moved, 2) and lost["ray_error"]
    processes = {
        entry["process"]
        for entry in entries
        if entry["writer"] == "trial" and entry["trial"] == moved
    }
    assert len(processes) == 2, "both wrote to the trial's log"


def test_a_grid_asks_for_each_point_once(tmp_path) -> None:
    grid = {
        ALPHA: {"categorical": [0.5, 2.0]},
        "method.terms.bound.on": {"categorical": ["natural", "pgd"]},
    }
    ledger = Ledger.create(
        tmp_path / "sweep",
        space(sampler={"kind": "grid"}, space=grid, points_to_evaluate=[], trials=10),
    )
    ledger.save_trial(
        Trial(
            0,
            {ALPHA: 2.0, "method.terms.bound.on": "pgd"},
            state="finished",
            best={"epoch": 1.0, "robust_worst": 0.5},
        )
    )
    search, points = LedgerSearcher(ledger), [ledger.load_trials()[0].params]
    while (found := search.suggest(str(len(points)))) != "FINISHED":
        points.append(found["params"])
    assert len(points) == len({json.dumps(point) for point in points}) == 4


def test_a_grid_has_no_points_that_differ_in_what_a_trial_lacks(tmp_path) -> None:
    on = "method.terms.bound.on"
    grid = {
        on: {"categorical": ["natural", "pgd"]},
        ALPHA: {"categorical": [0.5, 2.0], "when": {on: "pgd"}},
        "method.terms.pgd.weight.beta": {"categorical": [0.5, 1.0], "when": {ALPHA: 2.0}},
    }
    ledger = Ledger.create(
        tmp_path / "sweep",
        space(sampler={"kind": "grid"}, space=grid, points_to_evaluate=[], trials=10),
    )
    assert ledger.space.n_trials == 4
    found = [LedgerSearcher(ledger).suggest("a")["params"]]
    assert found == [{on: "natural"}]
    ledger.save_trial(
        Trial(0, found[0], state="finished", best={"epoch": 1.0, "robust_worst": 0.5})
    )
    search = LedgerSearcher(ledger)
    while (more := search.suggest(str(len(found)))) != "FINISHED":
        found.append(more["params"])
    assert [len(point) for point in found] == [1, 2, 3, 3]
    assert len({json.dumps(point) for point in found}) == 4, "none is run twice"


def test_trials_that_cannot_fit_are_refused_before_anything_runs(ray_cluster, tmp_path) -> None:
    ledger = Ledger.create(tmp_path / "sweep", space())
    with pytest.raises(
        InfrastructureError,
        match="a trial needs 9 CPUs and 0 GPUs, the cluster has 2 CPUs and 0 GPUs",
    ):
        run_sweep(ledger, [], Resources(cpus=9))
    assert not ledger.load_trials()


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "no JSON object"), ("[]", "no JSON object"), ('{"number": 0}', "lacks best, curve")],
)
def test_damaged_records_are_one_line(text: str, why: str, tmp_path: Path) -> None:
    ledger, run = Ledger.create(tmp_path / "sweep", space()), RunDirectory(tmp_path / "run")
    (ledger.trial_path(0) / "trial.json").write_text(text)
    with pytest.raises(
        DamagedFileError, match=rf"trials/0000/trial\.json is damaged: it (is )?{why}"
    ):
        ledger.load_trials()
    assert run.run_key == run.run_key
    (run.path / "run.json").write_text(text)
    with pytest.raises(DamagedFileError, match=r"run\.json is damaged"):
        _ = run.run_key


def test_a_ledger_is_not_overwritten_and_not_mixed_up(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "a", space())
    with pytest.raises(SpecError, match="there is a sweep in"):
        Ledger.create(tmp_path / "a", space())
    with pytest.raises(SpecError, match="another --name"):
        ledger.extend_space(space(method="lrat", metric="clean"))
    with pytest.raises(SpecError, match=r"no sweep in .*; sweeps beside it: a"):
        Ledger.open(tmp_path / "b")
