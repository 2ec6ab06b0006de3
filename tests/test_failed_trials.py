"""Failed trials: which of them a resumed sweep runs again, that none is ever the best, and what
the sweep's exit code and its MLflow runs say. No Ray cluster is started.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raysweep.cli import main
from raysweep.result_loading import Sweep, sweep_to_json
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial
from raysweep.training.callbacks import FunctionCallback
from raysweep.training.trainer import TrainingFailed, train_model

LR = "optim.lr"


@pytest.fixture
def make_ledger(workdir: Path) -> Callable[..., Ledger]:
    """Function that makes a sweep with given trials."""

    def make(*trials: Trial, n_trials: int | None = None) -> Ledger:
        data = {
            "method": "at",
            "trials": n_trials or len(trials),
            "base": {"epochs": 2, "data.val_size": 50, "data.train_size": 64, "batch_size": 32,
                     "*.attacks.*.steps": 1, "validation.finish.*.steps": 1},
            "space": {LR: {"float": [1e-3, 1e9], "log": True}},
            "scheduler": {"kind": "none"},
        }  # fmt: skip
        ledger = Ledger.create(workdir / "runs" / "s", SearchSpace.from_data(data))
        for trial in trials:
            ledger.save_trial(trial)
        return ledger

    return make


def make_trial(number: int, state: Any = "failed", **values: Any) -> Trial:
    lr = 0.1 + number / 10
    return Trial(number, {LR: lr}, state=state, burn_in=0, **values)


def nan(number: int) -> Trial:
    return make_trial(number, reason="the loss became nan in epoch 2", epoch=1)


def lost(number: int) -> Trial:
    return make_trial(number, reason="its process died", is_infrastructure_failure=True, epoch=1)


def finished(number: int) -> Trial:
    metrics = {"epoch": 2.0, "robust_worst": 0.5, "clean": 0.5}
    return make_trial(number, "finished", epoch=2, best=metrics, latest=metrics)


def states(ledger: Ledger) -> list[str]:
    return [trial.state for trial in ledger.load_trials()]


def list_run_states(folder: Path) -> dict[str, str]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("raysweep")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    return {str(run.info.run_name): str(run.info.status) for run in runs}


class TestRestart:
    def test_a_failed_trial_is_work_only_if_all_shall_run_again(
        self, make_ledger: Callable[..., Ledger]
    ) -> None:
        ended = make_ledger(nan(0), finished(1), finished(2))
        assert not ended.has_work_left() and ended.has_work_left(retry_failed=True)

    def test_only_what_the_surroundings_ended_runs_again_unless_all_shall(
        self, make_ledger: Callable[..., Ledger]
    ) -> None:
        ledger = make_ledger(nan(0), lost(1), finished(2))
        (ledger.trial_path(1) / "error.txt").write_text("of the earlier end")
        assert ledger.count_trials_left() == 1 and ledger.count_trials_left(retry_failed=True) == 2
        assert ledger.has_ended(), "a sweep that nobody resumes is over"
        assert [trial.number for trial in ledger.restart_failed_trials()] == [1]
        assert states(ledger) == ["failed", "running", "finished"]
        assert ledger.load_trials()[1] == replace(
            lost(1), state="running", reason="", is_infrastructure_failure=False
        )
        assert not (ledger.trial_path(1) / "error.txt").is_file()
        assert [trial.number for trial in ledger.restart_failed_trials(retry_failed=True)] == [0]
        assert states(ledger) == ["running", "running", "finished"]

    def test_trial_files_say_so_only_where_it_is_so(
        self, make_ledger: Callable[..., Ledger]
    ) -> None:
        ledger = make_ledger(nan(0), lost(1))
        contents = [
            json.loads((ledger.path.local_path / "trials" / name / "trial.json").read_text())
            for name in ("0000", "0001")
        ]
        assert "is_infrastructure_failure" not in contents[0]
        assert contents[1]["is_infrastructure_failure"] is True

    @pytest.mark.needs_ray
    def test_restarted_trials_are_suggested_under_their_own_numbers(
        self, make_ledger: Callable[..., Ledger]
    ) -> None:
        from raysweep.sweep.optuna_search import LedgerSearcher

        ledger = make_ledger(lost(0), nan(1), finished(2), n_trials=4)
        ledger.restart_failed_trials()
        searcher = LedgerSearcher(ledger)
        first, second = searcher.suggest("a"), searcher.suggest("b")
        assert first == {"number": 0, "params": lost(0).params}
        assert isinstance(second, dict) and second["number"] == 3
        assert searcher.suggest("c") == searcher.FINISHED

    def test_an_interrupted_trial_is_left_also_with_fewer_trials(
        self, make_ledger: Callable[..., Ledger]
    ) -> None:
        ledger = make_ledger(nan(0), nan(1), make_trial(2, "running", epoch=1), n_trials=4)
        ledger.extend_space(ledger.space.replace(trials=2))
        assert ledger.count_trials_left() == 1 and not ledger.has_ended()
        assert ledger.is_interrupted()

    def test_the_flag_needs_a_sweep(
        self, workdir: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["tune", "at", "--retry-failed"]) == 2
        assert capsys.readouterr().err.splitlines() == [
            "raysweep: error: --retry-failed: names no sweep; add --resume NAME"
        ]
        assert not list(workdir.iterdir())

    @pytest.mark.parametrize(("flags", "left"), [([], 1), (["--retry-failed"], 2)])
    def test_the_plan_counts_them(
        self,
        flags: list[str],
        left: int,
        make_ledger: Callable[..., Ledger],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        ledger = make_ledger(nan(0), lost(1), finished(2))
        assert main(["tune", "--resume", "s", "--plan", "--json", *flags]) == 0
        assert json.loads(capsys.readouterr().out)["trials_left"] == left
        assert states(ledger) == ["failed", "failed", "finished"], "a plan changes nothing"


@pytest.mark.mlflow
@pytest.mark.needs_ray
class TestEnd:
    @pytest.fixture(autouse=True)
    def _store(self, workdir: Path, empty_store: Callable[[Path], None]) -> None:
        empty_store(workdir / "mlflow.db")

    def test_a_sweep_without_any_result_ends_as_failed_and_names_no_best(
        self,
        workdir: Path,
        make_ledger: Callable[..., Ledger],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        make_ledger(nan(0), nan(1))
        assert main(["tune", "--resume", "s"]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.splitlines()[-1] == (
            "raysweep: every trial failed; the first: the loss became nan in epoch 2"
        )
        assert list_run_states(workdir) == {
            "s": "FAILED", "0000 s": "FAILED", "0001 s": "FAILED",
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("error", "last", "status"),
        [
            (None, "finished", "FINISHED"),
            (None, "running", "KILLED"),
            (KeyboardInterrupt(), "running", "KILLED"),
            (RuntimeError("a node was lost"), "running", "FAILED"),
        ],
    )
    def test_the_status_of_a_sweep_says_how_it_ended(
        self,
        error: BaseException | None,
        last: str,
        status: str,
        workdir: Path,
        make_ledger: Callable[..., Ledger],
    ) -> None:
        from raysweep.sweep.tuner import _notify_listeners
        from raysweep.tracking import SweepTracker, Tracker

        trial = make_trial(1, last)
        ledger = make_ledger(nan(0), trial, finished(2))
        tracker = SweepTracker(Tracker(f"sqlite:///{workdir / 'mlflow.db'}", workdir / "mlruns"))

        def run() -> None:
            with _notify_listeners([tracker], ledger, 1):
                tracker.on_trial_update(trial, None)
                if error is not None:
                    raise error

        if error is None:
            run()
        else:
            with pytest.raises(type(error)):
                run()
        trial_status = "KILLED" if last == "running" else "FINISHED"
        assert list_run_states(workdir) == {
            "s": status, "0000 s": "FAILED", "0001 s": trial_status, "0002 s": "FINISHED",
        }  # fmt: skip

    def test_a_record_that_cannot_be_written_stays_noted(
        self,
        workdir: Path,
        make_ledger: Callable[..., Ledger],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """The records after it are written; `raysweep sync` writes this one later."""
        from raysweep.tracking import SweepTracker, Tracker

        ledger = make_ledger(nan(0), finished(1))
        tracker = SweepTracker(Tracker(f"sqlite:///{workdir / 'mlflow.db'}", workdir / "mlruns"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SweepTracker, "_complete_ended_runs", lambda self, ended: 1 / 0)
            tracker.on_sweep_start(ledger, 0)
            tracker.on_sweep_end(ledger)
        assert list_run_states(workdir) == {"s": "FINISHED"}
        assert (ledger.path / "unrecorded.json").is_file()
        assert main(["sync", "s"]) == 0
        assert list_run_states(workdir) == {
            "s": "FINISHED", "0000 s": "FAILED", "0001 s": "FINISHED",
        }  # fmt: skip
        assert not (ledger.path / "unrecorded.json").is_file()
        assert main(["sync", "s"]) == 0
        assert "MLflow lacks nothing" in capsys.readouterr().out

    def test_mlflow_gets_a_trial_whose_params_are_not_valid_together(self, workdir: Path) -> None:
        """Each value is valid, but Nesterov momentum needs momentum: the trial has no config."""
        from raysweep.sweep.tuner import _make_trainable
        from raysweep.tracking import SweepTracker, Tracker

        choices = {"optim.nesterov": [False, True], "optim.momentum": [0.9, 0.0]}
        space = {path: {"categorical": values} for path, values in choices.items()}
        data = {"method": "at", "trials": 1, "space": space, "scheduler": {"kind": "none"}}
        ledger = Ledger.create(workdir / "runs" / "s", SearchSpace.from_data(data))
        params = {"optim.nesterov": True, "optim.momentum": 0.0}
        reports: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ray.tune.report", reports.append)
            for name in ("adopt_umask", "adopt_unpacked_limit", "adopt_code_files"):
                # They change the process, here that of the tests.
                patch.setattr(f"raysweep.sweep.tuner.{name}", lambda value: None)
            unused: Any = None
            train: Any = _make_trainable(ledger, unused, unused)
            train({"number": 0, "params": params})
        # A line for users, and no traceback: three of these would end the sweep.
        assert reports == [{"failed": "optim.nesterov needs optim.momentum > 0"}]
        ledger.save_trial(Trial(0, params, "failed", reason=reports[0]["failed"]))
        tracker = SweepTracker(Tracker(f"sqlite:///{workdir / 'mlflow.db'}", workdir / "mlruns"))
        tracker.on_sweep_start(ledger, 0)
        tracker.on_sweep_end(ledger)
        assert list_run_states(workdir) == {"s": "FAILED", "0000 s": "FAILED"}

    def test_everybody_who_names_a_best_trial_leaves_a_failed_one_out(
        self, workdir: Path, make_ledger: Callable[..., Ledger]
    ) -> None:
        """Trial 0 predicts one class of ten, the same under every attack, before its loss becomes
        nan; trial 1 is worse by that number, and healthy.
        """
        from mlflow import MlflowClient

        from raysweep.pipeline.report import figures
        from raysweep.run_lookup import find_best_checkpoint, find_checkpoint_folder
        from raysweep.stores import open_path
        from raysweep.sweep.optuna_search import LedgerSearcher
        from raysweep.sweep.optuna_study import build_study
        from raysweep.tracking import SweepTracker, Tracker

        ledger = make_ledger(n_trials=2)
        for number, lr in ((0, 1e5), (1, 0.01)):
            trial = Trial(number, {LR: lr}, burn_in=0)
            config = ledger.space.trial_config(trial.params)
            rule = ledger.space.find_selection_rule(trial.params)
            epochs: list[dict[str, float]] = []

            callback = FunctionCallback(lambda metrics, checkpoint: epochs.append(metrics))  # noqa: B023
            state: Any = "finished"
            try:
                train_model(config, ledger.trial_path(number), callback)
            except TrainingFailed as error:
                state, trial = "failed", replace(trial, reason=str(error))
            for metrics in epochs:
                trial = trial.with_epoch(metrics, rule)
            ledger.save_trial(replace(trial, state=state))
        failed, healthy = ledger.load_trials()
        assert (failed.state, healthy.state) == ("failed", "finished") and failed.epoch == 1
        assert failed.best["robust_worst"] == pytest.approx(0.1)
        # The smaller number of the healthy one.
        healthy = replace(healthy, best={**healthy.best, "robust_worst": 0.06, "clean": 0.5})
        ledger.save_trial(healthy)

        best = ledger.best_checkpoint_path(healthy)
        assert [trial.number for trial in ledger.rank_trials()] == [1, 0]
        assert sweep_to_json(ledger)["front"] == [1]
        assert find_best_checkpoint(ledger) == best == Sweep(ledger).best
        assert find_checkpoint_folder("s", open_path(workdir / "runs")) == best
        assert Sweep(ledger).trials.index.tolist() == [1, 0]
        (axes,) = (axes for axes in figures.plot_param_slices(ledger).axes if axes.collections)
        assert len(axes.collections[0].get_offsets()) == 1
        study = build_study(ledger)
        assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]
        assert study.best_value == 0.06
        searched = LedgerSearcher(ledger)._study
        assert [trial.state.name for trial in searched.trials] == ["FAIL", "COMPLETE"]
        tracker = SweepTracker(Tracker(f"sqlite:///{workdir / 'mlflow.db'}", workdir / "mlruns"))
        tracker.on_sweep_start(ledger, 0)
        tracker.on_sweep_end(ledger)
        client = MlflowClient(tracking_uri=f"sqlite:///{workdir / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("raysweep")
        assert experiment is not None
        runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
        assert runs["s"].data.tags["best_trial"] == "0001"
        assert runs["s"].data.metrics["best/robust_worst"] == 0.06
        note = runs["s"].data.tags["mlflow.note.content"]
        assert "best: trial 0001" in note and str(best) in note
        assert list_run_states(workdir)["0000 s"] == "FAILED"
