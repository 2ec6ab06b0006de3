"""Runs of the base method beside the trials of a sweep: what they train, that nothing counts them
as trials, and what is said of the best trial beside them.
"""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_spread import make_mask, make_verdicts, render, search_runs
from test_spread import make_trial as make_spread_trial

from raysweep.catalog import BASE_METHODS, METHODS, build_base_method
from raysweep.pipeline.stage_sweep import drop_data_location
from raysweep.result_loading import Sweep, sweep_to_json
from raysweep.spec import SpecError
from raysweep.sweep.base_comparison import compare_with_base, describe_base_comparison
from raysweep.sweep.finalist_result import FinalistResult
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace, load_space
from raysweep.sweep.trial import Trial
from raysweep.terminal import TrialTable
from raysweep.training.prefix_cache import prefix_keys

LAM = "method.terms.pgd.weight.lam"
PREFIX = ("gairat", "gair-fat", "gair-trades", "mail-at", "mail-trades", "mail-mart")


def make_space(**changes: Any) -> SearchSpace:
    data = {"method": "gairat", "trials": 3, "base": {"epochs": 4, "*.burn_in": 1}, "base_runs": 2}
    data |= {"space": {LAM: {"float": [-2.0, 2.0]}}, "scheduler": {"kind": "none"}}
    return SearchSpace.from_data(data | changes)


def make_trial(number: int, n_correct: int, robust: int | None = None, **more: Any) -> Trial:
    return make_spread_trial(number, n_correct, robust, **{"params": {LAM: 0.5}} | more)


def make_base_run(seed: int, n_correct: int, robust: int | None = None, **more: Any) -> Trial:
    run = make_spread_trial(50 + seed, n_correct, robust, params={"seed": seed}, **more)
    return replace(run, number=seed, kind="base run")


def make_ledger(path: Path, *runs: Trial, **changes: Any) -> Ledger:
    ledger = Ledger.create(path / "sweep", make_space(**changes))
    for run in runs:
        ledger.save_trial(run)
    return ledger


class TestSettings:
    def test_reweighting_methods_have_a_base_method_of_the_catalog(self) -> None:
        assert {*BASE_METHODS, *BASE_METHODS.values()} <= METHODS.keys()
        plain = {"standard", "at", "trades", "fat", "mart", "rst", "mma"}
        assert METHODS.keys() - BASE_METHODS.keys() == plain
        for name, base_name in BASE_METHODS.items():
            base = build_base_method(METHODS[name]())
            assert base is not None and base.name == base_name
            assert {term.weight.kind for term in base.terms.values()} == {"uniform"}
        assert build_base_method(METHODS["at"]()) is None

    @pytest.mark.parametrize("name", PREFIX)
    def test_burn_ins_train_what_the_base_method_trains(self, name: str) -> None:
        space = load_space(name, {"*.burn_in": 2, "epochs": 4, "*.attacks.*.steps": 3})
        trial, run = space.trial_config({}), space.base_run_config({"seed": 0})
        pairs = zip(prefix_keys(trial, "data"), prefix_keys(run, "data"), strict=True)
        assert [one == other for one, other in pairs] == [True, True, True, False, False]
        other = space.base_run_config({"seed": 1})
        assert prefix_keys(other, "data")[1] != prefix_keys(run, "data")[1]

    def test_attacks_of_another_name_get_budget_and_radius(self) -> None:
        space = load_space("lrat-trades", {"*.eps": 0.11, "*.attacks.*.steps": 3})
        run = space.base_run_config({"seed": 5})
        attack = run.method.attacks["kl"]
        assert (attack.eps, attack.steps, attack.loss) == (0.11, 3, "kl")
        assert run.seed == 5 and run.validation == space.trial_config({}).validation
        assert run.epochs == space.trial_config({}).epochs

    def test_a_factor_that_the_sweep_fixes_is_that_of_the_base_method(self) -> None:
        space = load_space("gair-trades", {"method.terms.kl.coef": 3.0})
        assert space.base_run_config({"seed": 0}).method.terms["kl"].coef == 3.0

    def test_who_has_them(self) -> None:
        assert load_space("gairat", {}).list_base_params() == [{"seed": 0}, {"seed": 1}]
        assert load_space("gairat", {"seed": 7}).list_base_params() == [{"seed": 7}, {"seed": 8}]
        assert load_space("gairat", {"base_runs": 0}).list_base_params() == []
        assert load_space("at", {}).base_runs is None and load_space("at", {"base_runs": 0})
        stored = load_space("gairat", {}).to_stored_dict()
        assert stored.pop("base_runs") == 2
        former = SearchSpace.from_data(stored, stored=True)
        assert former.list_base_params() == [] and "base_runs" not in former.to_stored_dict()
        assert drop_data_location(former) == drop_data_location(load_space("gairat", {}))

    @pytest.mark.parametrize(
        ("method", "number", "problem"),
        [("at", 2, "base_runs = 2: at has no base method; set it to 0"), ("lrat", -1, "base_runs")],
    )
    def test_wrong_settings_are_refused(self, method: str, number: int, problem: str) -> None:
        with pytest.raises(SpecError) as refused:
            load_space(method, {"base_runs": number})
        (line,) = refused.value.problems
        assert problem in line

    def test_a_resumed_sweep_may_have_more_and_not_fewer(self, tmp_path: Path) -> None:
        ledger = make_ledger(tmp_path, *[make_trial(n, 150) for n in range(3)], base_runs=None)
        assert ledger.has_ended() and not ledger.has_work_left()
        ledger.extend_space(make_space(base_runs=1))
        assert not ledger.has_ended() and ledger.count_base_runs_left() == 1
        ledger.save_trial(make_base_run(0, 150))
        assert ledger.has_ended() and not ledger.has_work_left()
        with pytest.raises(SpecError, match="base_runs = 0: the sweep has 1"):
            ledger.extend_space(make_space(base_runs=0))
        # More epochs continue them as they continue the trials.
        ledger.extend_space(make_space(base_runs=1, base={"epochs": 6, "*.burn_in": 1}))
        assert [run.state for run in ledger.load_all_runs()] == ["running"] * 4


class TestLedger:
    def test_they_are_no_trials(self, tmp_path: Path) -> None:
        trials, runs = [make_trial(0, 150)], [make_base_run(0, 250), make_base_run(1, 240)]
        ledger = make_ledger(tmp_path, *trials, *runs)
        assert ledger.load_trials() == trials and ledger.rank_trials() == trials
        assert ledger.load_base_runs() == runs and ledger.load_all_runs() == [*trials, *runs]
        assert ledger.find_best_trial() == trials[0] and ledger.count_ended_trials() == 1
        assert ledger.unmasked_pareto_front() == trials
        assert ledger.count_trials_left() == 2 and ledger.count_base_runs_left() == 0
        assert [run.key for run in ledger.load_all_runs()] == ["0000", "base-0000", "base-0001"]
        assert ledger.describe_row(runs[1]) == "at (base) seed 1"
        assert ledger.find_config(runs[1]).method.name == "at"
        assert ledger.best_checkpoint_path(runs[1]) == ledger.path / "base" / "0001" / "epoch-0003"
        assert list(Sweep(ledger).trials.index) == [0]

    def test_a_sweep_ends_with_them(self, tmp_path: Path) -> None:
        trials = [make_trial(number, 150) for number in range(3)]
        ledger = make_ledger(tmp_path, *trials, make_base_run(0, 140))
        assert not ledger.has_ended() and ledger.has_work_left() and ledger.is_interrupted()
        failed = make_base_run(1, 140, state="failed", is_infrastructure_failure=True, best={})
        ledger.save_trial(failed)
        assert ledger.has_ended() and ledger.count_base_runs_left() == 1, "resume runs it again"
        assert [run.key for run in ledger.restart_failed_trials()] == ["base-0001"]
        assert ledger.load_base_runs()[1].state == "running" and not ledger.has_ended()

    def test_autoattack_attacks_them_after_the_finalists(self, tmp_path: Path) -> None:
        trials = [make_trial(number, 150 - 10 * number) for number in range(3)]
        runs = [make_base_run(0, 200), make_base_run(1, 100, state="failed")]
        ledger = make_ledger(tmp_path, *trials, *runs, finalists=2)
        waiting = ledger.find_waiting_finalists()
        assert [run.key for run in waiting] == ["0000", "0001", "base-0000"]
        ledger.save_trial(make_base_run(0, 200, 120))
        assert len(ledger.find_waiting_finalists()) == 2
        ledger.save_trial(make_trial(0, 150, state="running"))
        assert ledger.find_waiting_finalists() == [], "nobody is attacked while trials run"


@pytest.mark.needs_ray
class TestSearch:
    def test_they_come_first_and_the_sampler_does_not_hear_of_them(self, tmp_path: Path) -> None:
        from raysweep.sweep.base_run_search import BaseRunSearcher
        from raysweep.sweep.optuna_search import LedgerSearcher

        ended = make_base_run(0, 150)
        ledger = make_ledger(tmp_path, ended, make_trial(0, 150))
        inner = LedgerSearcher(ledger)
        searcher = BaseRunSearcher(ledger, inner)
        first, second, third = (searcher.suggest(f"t{number}") for number in range(3))
        assert first == {"number": 1, "params": {"seed": 1}, "kind": "base run"}
        assert isinstance(second, dict) and second["number"] == 1 and LAM in second["params"]
        assert isinstance(third, dict) and third["number"] == 2
        result = {"epoch": 4, "robust_worst": 0.9, "clean": 0.95}
        n_before = len(inner._study.trials)
        searcher.on_trial_result("t0", result)
        searcher.on_trial_complete("t0", result)
        searcher.on_trial_complete("t1", result | {"robust_worst": 0.5})
        told = [trial.values for trial in inner._study.get_trials() if trial.values]
        assert [0.5] in told and [0.9] not in told and len(inner._study.trials) == n_before
        assert searcher.suggest("t3") == "FINISHED"

    def test_asha_neither_stops_nor_counts_them(self, tmp_path: Path) -> None:
        from raysweep.sweep.asha import AshaScheduler

        ledger = make_ledger(tmp_path, scheduler={"kind": "asha", "grace_period": 2})
        asha = AshaScheduler(ledger, 4)

        def report(number: int, value: float, **more: Any) -> str:
            config = {"number": number, "params": {LAM: 0.5}} | more
            trial: Any = SimpleNamespace(config=config)
            return asha.on_trial_result(None, trial, {"epoch": 2, "robust_worst": value})

        assert report(0, 0.5) == "CONTINUE"
        for seed, value in ((0, 0.1), (1, 0.9)):
            base_run = {"params": {"seed": seed}, "kind": "base run"}
            assert report(seed, value, **base_run) == "CONTINUE"
        assert report(1, 0.6) == "CONTINUE" and report(2, 0.4) == "STOP"

    def test_the_ledger_gets_what_tune_reports_of_them(self, tmp_path: Path) -> None:
        from raysweep.sweep.tune_callbacks import Budget, LedgerCallback

        ledger = make_ledger(tmp_path, make_trial(0, 150))
        told: list[tuple[str, str, int]] = []
        listener: Any = SimpleNamespace(
            on_trial_update=lambda trial, metrics: told.append(("trial", trial.state, trial.epoch)),
            on_base_run_update=lambda run, metrics: told.append(("base", run.state, run.epoch)),
        )
        callback = LedgerCallback(ledger, 2, [listener], 0, Budget())
        config = {"number": 0, "params": {"seed": 0}, "kind": "base run"}
        tune: Any = SimpleNamespace(trial_id="a", config=config, error_file=None, num_failures=0)
        callback.on_trial_start(0, [], tune)
        for epoch, worst in ((1, 0.25), (2, 0.5)):
            callback.on_trial_result(0, [], tune, {"epoch": epoch, "robust_worst": worst})
        callback.on_trial_complete(0, [], tune)
        assert ledger.load_trials() == [make_trial(0, 150)]
        (run,) = ledger.load_base_runs()
        assert (run.state, run.epoch, run.best["robust_worst"]) == ("finished", 2, 0.5)
        # A trial of GAIRAT has a burn-in; the base method has none.
        assert run.burn_in == 0
        epochs = [("running", 0), ("running", 1), ("running", 2), ("finished", 2)]
        assert told == [("base", *event) for event in epochs]


class TestComparison:
    def test_the_numbers_by_hand(self, tmp_path: Path) -> None:
        """Best trial 200, base 150 and 148 of 300; the seeds differ in less than their noise."""
        trials = [make_trial(0, 200), make_trial(1, 120), make_trial(2, 100)]
        runs = [make_base_run(0, 150), make_base_run(1, 148)]
        ledger = make_ledger(tmp_path, *trials, *runs)
        comparison = compare_with_base(ledger)
        assert comparison is not None and comparison.verdict == "better"
        best = make_mask(200, 0).astype(float)
        base = (make_mask(150, 50).astype(float) + make_mask(148, 51)) / 2
        differences = best - base
        mean = differences.sum() / 302
        variance = (np.square(differences).sum() + 1 - 302 * mean**2) / 302**2
        # The two-sided 95% point of the best of three: 1 - 0.05 / 6.
        half = statistics.NormalDist().inv_cdf(1 - 0.05 / 6) * math.sqrt(variance)
        pair = comparison.difference
        assert pair.difference == pytest.approx(51 / 300)
        assert (pair.low, pair.high) == pytest.approx((mean - half, mean + half))
        (line,) = describe_base_comparison(ledger)
        assert line == (
            "gairat beats at: trial 0000 is 0.170 better than at (2 seeds) by the objective on the "
            "same 300 validation images (95% interval for the best of 3 trials: "
            f"{pair.low:+.3f} to {pair.high:+.3f})"
        )
        data = sweep_to_json(ledger)
        assert json.loads(json.dumps(data)) == data
        assert data["base"]["verdict"] == "better" and data["base"]["seeds"] == [0, 1]
        assert data["base"]["difference"] == pytest.approx(51 / 300)
        assert [run["settings"] for run in data["base_runs"]] == [{"seed": 0}, {"seed": 1}]
        assert Sweep(ledger).base_comparison == comparison

    def test_seeds_that_differ_much_widen_the_interval(self, tmp_path: Path) -> None:
        """The base method has 150 right with one seed and 90 with the other: what a seed does is
        more than the difference.
        """
        trials = [make_trial(number, 170 - 10 * number) for number in range(3)]
        ledger = make_ledger(tmp_path, *trials, make_base_run(0, 150), make_base_run(1, 90))
        comparison = compare_with_base(ledger)
        assert comparison is not None and comparison.verdict == "cannot tell"
        (line,) = describe_base_comparison(ledger)
        assert line.startswith(
            "gairat cannot be told apart from at, which has no instance weights: "
            "trial 0000 is 0.167"
        )

    def test_the_base_method_may_win(self, tmp_path: Path) -> None:
        runs = [make_base_run(0, 200), make_base_run(1, 199)]
        ledger = make_ledger(tmp_path, make_trial(0, 120), make_trial(1, 110), *runs)
        (line,) = describe_base_comparison(ledger)
        assert line.startswith("at beats gairat: trial 0000 is 0.265 worse than at (2 seeds)")

    def test_autoattack_decides_where_it_attacked_all(self, tmp_path: Path) -> None:
        """By the objective GAIRAT is far ahead; AutoAttack leaves nothing of it."""
        trials = [make_trial(0, 200, 80), make_trial(1, 120), make_trial(2, 100)]
        runs = [make_base_run(0, 150, 140), make_base_run(1, 150, 140)]
        ledger = make_ledger(tmp_path, *trials, *runs, finalists=1)
        comparison = compare_with_base(ledger)
        assert comparison is not None and comparison.is_autoattack
        assert comparison.verdict == "worse"
        assert (
            "at beats gairat: trial 0000 is 0.200 worse than at (2 seeds) by AutoAttack"
            in (describe_base_comparison(ledger)[0])
        )
        ledger.save_trial(make_base_run(1, 150))
        comparison = compare_with_base(ledger)
        assert comparison is not None and not comparison.is_autoattack, "one is not attacked"

    def test_a_failed_run_is_told_and_left_out(self, tmp_path: Path) -> None:
        failed = make_base_run(1, 10, state="failed", reason="the loss became nan")
        ledger = make_ledger(tmp_path, make_trial(0, 200), make_base_run(0, 150), failed)
        first, second = describe_base_comparison(ledger)
        assert first == "at (base) seed 1 failed: the loss became nan"
        assert "better than at (1 seed)" in second
        other = make_base_run(0, 150, verdicts=make_verdicts(make_mask(150)[:200]))
        ledger.save_trial(other)
        assert compare_with_base(ledger) is None, "measured on other images"

    @pytest.mark.mlflow
    def test_tables_mlflow_and_the_display(
        self, workdir: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from raysweep.cli import main
        from raysweep.tracking import SweepTracker, Tracker

        runs = [make_base_run(0, 150), make_base_run(1, 148)]
        ledger = make_ledger(workdir / "runs", *[make_trial(n, 200) for n in range(3)], *runs)
        rows = render(TrialTable(ledger, ledger.load_all_runs()))
        assert [row.split("  ")[0] for row in rows[1:]][-2:] == [
            "at (base) seed 0",
            "at (base) seed 1",
        ]
        tracker = Tracker(f"sqlite:///{workdir}/mlflow.db", workdir / "mlruns")
        listener = SweepTracker(tracker)
        listener.on_sweep_start(ledger, 0)
        listener.on_base_run_update(runs[0], None)
        listener.on_sweep_end(ledger)
        (line,) = describe_base_comparison(ledger)
        (run,) = search_runs(tracker, "sweep")
        assert run.data.tags["beats_base"] == "better" and run.data.tags["base_method"] == "at"
        assert run.data.metrics["base/difference"] == pytest.approx(51 / 300)
        assert f"- {line}\n" in run.data.tags["mlflow.note.content"]
        recorded = {run.info.run_name: run for run in search_runs(tracker, "base run")}
        assert set(recorded) == {"at (base) seed 0 sweep", "at (base) seed 1 sweep"}
        assert all(run.data.params["method.name"] == "at" for run in recorded.values())
        assert len(search_runs(tracker, "trial")) == 3
        assert main(["show", "sweep"]) == 0
        shown = capsys.readouterr().out
        assert line in shown and "at (base) seed 1" in shown
        assert "3 of 3 trials ended" in shown


def test_they_are_found_by_name_and_by_folder(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from raysweep.cli import main
    from raysweep.run_lookup import find_run
    from raysweep.stores import open_path

    ledger = make_ledger(workdir / "runs", make_trial(0, 150), make_base_run(0, 140))
    runs_folder = open_path(workdir / "runs")
    folder = ledger.path / "base" / "0000"
    for name in (
        "sweep/base-0000",
        "sweep/base-0",
        "sweep/base/0000",
        "runs/sweep/base/0000",
        str(folder),
    ):
        found = find_run(name, runs_folder)
        assert found is not None and (found.path, found.kind) == (folder, "base run"), name
    trial = find_run("sweep/0000", runs_folder)
    assert trial is not None and trial.kind == "trial" and trial.path == ledger.trial_path(0)
    with pytest.raises(SpecError, match="sweep has no base run 0001: it has 1, counted from 0000"):
        find_run("sweep/base-1", runs_folder)
    assert main(["show", "sweep/base-0"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("sweep/base-0000 finished") and "seed = 0" in shown
    assert "robust_worst = 0.4667" in shown and f"folder\n  {folder}" in shown


def test_a_stored_run_is_read_again_with_its_result(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path, make_base_run(0, 150, 140))
    (run,) = Ledger.open(ledger.path).load_base_runs()
    assert run == make_base_run(0, 150, 140) and isinstance(run.finalist, FinalistResult)
    file = ledger.run_path(run).local_path / "trial.json"  # type: ignore[operator]
    assert "kind" not in json.loads(file.read_text())
