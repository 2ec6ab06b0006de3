"""Real sweeps on a real, local Ray cluster, with tiny trials."""

import json
from pathlib import Path

import pytest
from conftest import TINY

from raysweep.spec import SpecError
from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.resources import Resources
from raysweep.sweep.search import StudySearch
from raysweep.sweep.space import SearchSpace
from raysweep.sweep.tuner import run_sweep
from raysweep.tracking import SweepTracker, Tracker
from raysweep.training import checkpoint

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
        "start": [{ALPHA: 2.0}],
    }
    return SearchSpace.load({**data, **more})


class Recorder:
    def __init__(self) -> None:
        self.events: list[tuple] = []

    def started(self, ledger, concurrent) -> None:
        self.events.append(("started", concurrent))

    def trial_changed(self, trial, metrics) -> None:
        self.events.append((trial.number, trial.state, trial.epoch))

    def ended(self, ledger) -> None:
        self.events.append(("ended",))


@pytest.fixture(scope="module")
def finished(ray_cluster, tmp_path_factory) -> tuple[Ledger, Recorder, Tracker]:
    path = tmp_path_factory.mktemp("sweep")
    ledger = Ledger.create(path / "runs" / "one", space())
    recorder, tracker = Recorder(), Tracker(f"sqlite:///{path}/mlflow.db", path / "mlruns")
    run_sweep(ledger, [SweepTracker(tracker, "f" * 16), recorder])
    return ledger, recorder, tracker


def test_every_trial_trains_and_leaves_its_best_checkpoint(finished) -> None:
    ledger, recorder, _ = finished
    trials = ledger.trials()
    assert [trial.number for trial in trials] == [0, 1, 2, 3]
    assert all(trial.state == "finished" and trial.epoch == 2 for trial in trials)
    assert trials[0].settings == {ALPHA: 2.0}, "the starting point comes first"
    for trial in ledger.ranked():
        saved = checkpoint.read(ledger.checkpoint(trial))
        assert saved.metrics["robust_worst"] == trial.best["robust_worst"]
        assert saved.config.method.terms["pgd"].weight.alpha == trial.settings[ALPHA]
    assert recorder.events[0] == ("started", 2) and recorder.events[-1] == ("ended",)
    assert [event for event in recorder.events if event[0] == 1][-1] == (1, "finished", 2)


def test_mlflow_has_one_parent_and_one_run_for_each_trial(finished) -> None:
    from mlflow import MlflowClient

    ledger, _, tracker = finished
    client = MlflowClient(tracker.uri)
    experiment = client.get_experiment_by_name("raysweep")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags["raysweep.kind"] == "sweep"]
    children = [run for run in runs if run.data.tags["raysweep.kind"] == "trial"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(children) == 4
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    for run in children:
        trial = ledger.trials()[int(run.data.tags["raysweep.trial"])]
        assert run.data.params["method.attacks.cw.eps"] == "0.15"
        assert float(run.data.params[ALPHA]) == pytest.approx(trial.settings[ALPHA], rel=1e-5)
        assert run.data.metrics["best/robust_worst"] == pytest.approx(trial.best["robust_worst"])
        history = client.get_metric_history(run.info.run_id, "robust_worst")
        assert [point.step for point in history] == [1, 2]
        artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
        assert artifacts - {"plots"} == {"checkpoint", "config.json", "environment.json"}
        plots = [item.path for item in client.list_artifacts(run.info.run_id, "plots")]
        assert bool(plots) == (trial.number in {t.number for t in ledger.ranked()[:3]})
    assert parent.data.metrics["best/robust_worst"] == pytest.approx(ledger.ranked()[0].best["robust_worst"])


def test_a_finished_sweep_can_be_extended_and_repeats_nothing(finished) -> None:
    ledger, _, tracker = finished
    before = {t.number: (ledger.run_path(t.number) / "trial.json").stat().st_mtime_ns for t in ledger.trials()}
    again = Ledger.open(ledger.path)
    again.extend(ledger.space.model_copy(update={"trials": 6}))
    recorder = Recorder()
    run_sweep(again, [recorder, SweepTracker(tracker, "f" * 16)])
    assert [trial.number for trial in again.trials()] == [0, 1, 2, 3, 4, 5]
    after = {n: (ledger.run_path(n) / "trial.json").stat().st_mtime_ns for n in before}
    assert before == after
    assert {event[0] for event in recorder.events} == {"started", 4, 5, "ended"}


def test_the_sampler_remembers_what_an_earlier_driver_learned(finished, tmp_path) -> None:
    ledger = Ledger.create(tmp_path / "sweep", space())
    for number, state in enumerate(("finished", "failed", "running")):
        best = {"robust_worst": 0.5, "epoch": 2.0} if state == "finished" else {}
        ledger.write(Trial(number, {ALPHA: 1.0 + number}, state=state, best=best))  # type: ignore[arg-type]
    search = StudySearch(Ledger.open(ledger.path))
    states = [trial.state.name for trial in search._study.get_trials()]
    assert states == ["COMPLETE", "FAIL"]
    assert search.suggest("a") == {"number": 2, "settings": {ALPHA: 3.0}}, "the unfinished trial goes first"
    assert search.suggest("b")["number"] == 3
    assert search.suggest("c") == "FINISHED"


def test_asha_stops_weak_trials_and_a_failing_trial_fails_alone(ray_cluster, tmp_path) -> None:
    base = {**TINY, "epochs": 4, "data.train_size": 256}
    settings = space(
        base=base,
        trials=6,
        scheduler={"kind": "asha", "grace": 1, "factor": 2},
        space={"optim.lr": {"categorical": [0.05, 1.0e-7, 1.0e20]}},
        start=[{"optim.lr": lr} for lr in (0.05, 1.0e20, 1.0e-7, 0.05, 1.0e-7, 1.0e-7)],
    )
    ledger = Ledger.create(tmp_path / "sweep", settings)
    run_sweep(ledger, [])
    trials = ledger.trials()
    assert trials[1].state == "failed" and "the loss became" in trials[1].reason
    assert "stopped" in {trial.state for trial in trials}
    assert ledger.ranked()[0].settings == {"optim.lr": 0.05}


def test_a_grid_runs_each_point_once(ray_cluster, tmp_path) -> None:
    grid = {
        ALPHA: {"categorical": [0.5, 2.0]},
        "method.terms.bound.on": {"categorical": ["natural", "pgd"]},
    }
    settings = space(sampler={"kind": "grid"}, space=grid, start=[], trials=10, base={**TINY, "epochs": 1})
    ledger = Ledger.create(tmp_path / "sweep", settings)
    run_sweep(ledger, [])
    points = [json.dumps(trial.settings) for trial in ledger.trials()]
    assert len(points) == len(set(points)) == 4


def test_trials_that_cannot_fit_are_refused_before_anything_runs(ray_cluster, tmp_path) -> None:
    ledger = Ledger.create(tmp_path / "sweep", space())
    with pytest.raises(SpecError, match="a trial wants 9 CPUs and 0 GPUs, the cluster has 2 CPUs and 0 GPUs"):
        run_sweep(ledger, [], Resources(cpus=9))
    assert not ledger.trials()


def test_a_ledger_is_not_overwritten_and_not_mixed_up(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "a", space())
    with pytest.raises(SpecError, match="there is a sweep in"):
        Ledger.create(tmp_path / "a", space())
    with pytest.raises(SpecError, match="another --name"):
        ledger.extend(space(method="lrat", metric="clean"))
    with pytest.raises(SpecError, match=r"no sweep in .*; there is a"):
        Ledger.open(tmp_path / "b")
