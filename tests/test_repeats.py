"""Further seeds of a sweep's leaders: who gets one, when it counts, and where the mean is used."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import TINY, TrialUpdateListener
from test_spread import N, make_mask, make_verdicts, render, search_runs
from test_spread import make_trial as make_spread_trial

from raysweep.evaluation.paired_statistics import (
    compare_groups,
    compare_paired,
    estimate_training_variance,
)
from raysweep.pipeline.artifact import Candidate, rank_candidates
from raysweep.pipeline.report.search_results import _build_trial_table
from raysweep.pipeline.stage_sweep import drop_data_location
from raysweep.result_loading import Sweep, load_sweep, sweep_to_json
from raysweep.spec import SpecError
from raysweep.stores import open_path
from raysweep.sweep.base_comparison import compare_with_base, describe_base_comparison
from raysweep.sweep.conclusions import describe_conclusions
from raysweep.sweep.finalist_result import FinalistResult
from raysweep.sweep.finalist_summary import describe_finalists
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.optuna_study import build_study, to_sampler_trial
from raysweep.sweep.plan import expected_sweep_epochs
from raysweep.sweep.repeat_summary import describe_repeats, summarize_repeats
from raysweep.sweep.search_space import SearchSpace, load_space
from raysweep.sweep.spread_summary import summarize_spread
from raysweep.sweep.trial import Trial
from raysweep.sweep.warm_start import collect_warm_start
from raysweep.terminal import SweepDisplay, TrialTable
from raysweep.training.checkpoint import read_checkpoint
from raysweep.training.prefix_cache import prefix_keys
from raysweep.training.trainer import train_model

LR = "optim.lr"


def make_space(**changes: Any) -> SearchSpace:
    data = {"method": "at", "trials": 5, "base": {"epochs": 3}, "repeat": 3}
    data |= {"space": {LR: {"float": [0.01, 0.5]}}, "scheduler": {"kind": "none"}}
    return SearchSpace.from_data(data | changes)


def make_trial(number: int, n_correct: int, robust: int | None = None, **more: Any) -> Trial:
    params = {"params": {LR: 0.1 + number / 100}}
    return make_spread_trial(number, n_correct, robust, **params | more)


def make_repeat(
    number: int, seed: int, n_correct: int, robust: int | None = None, **more: Any
) -> Trial:
    run = make_trial(number, n_correct, robust, **more)
    mask = make_mask(n_correct, 100 * seed + number)
    params = {**run.params, "seed": seed}
    return replace(run, params=params, kind="repeat", verdicts=make_verdicts(mask))


def make_ledger(path: Path, *runs: Trial, **changes: Any) -> Ledger:
    ledger = Ledger.create(path / "sweep", make_space(**changes))
    for run in runs:
        ledger.save_trial(run)
    return ledger


def list_keys(runs: Any) -> list[str]:
    return [run.key for run in runs]


FIVE = [make_trial(number, 160 - 5 * number) for number in range(5)]
"""Five trials, of which the first looks best."""


class TestSettings:
    def test_how_many_get_a_seed(self) -> None:
        assert make_space(repeat=0).leaders_by_round == make_space(repeat=1).leaders_by_round == []
        assert make_space(repeat=2).leaders_by_round == [2]
        assert make_space(repeat=3).leaders_by_round == [4, 2]
        assert make_space(repeat=4, trials=16).leaders_by_round == [8, 4, 2]
        assert make_space(repeat=4).leaders_by_round == [5, 4, 2], "there are five trials"
        assert make_space(repeat=3, trials=1).leaders_by_round == []

    def test_old_files_and_digests_have_none(self) -> None:
        stored = load_space("at", {}).to_stored_dict()
        assert "repeat" not in stored
        assert SearchSpace.from_data(stored, stored=True).repeat == 0
        space = load_space("at", {"repeat": 3})
        assert space.to_stored_dict() == stored | {"repeat": 3}
        assert drop_data_location(space) != drop_data_location(load_space("at", {}))

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"metric": ["clean", "pgd"]}, "repeat = 3: with several metrics there is no best"),
            (
                {"space": {"seed": {"int": [0, 3]}}},
                "repeat = 3: the space searches seed, which repeats choose; set it to 0, or fix",
            ),
        ],
    )
    def test_wrong_settings_are_refused(self, changes: dict[str, Any], problem: str) -> None:
        (line,) = make_space(**changes).find_problems()
        assert line.startswith(problem)
        assert make_space(repeat=0, **changes).find_problems() == []
        with pytest.raises(SpecError, match="repeat = 9"):
            load_space("at", {"repeat": 9})

    def test_the_plan_counts_them(self) -> None:
        # 5 trials, 4 second and 2 third seeds, of 3 epochs.
        assert make_space().count_all_runs() == 11
        assert expected_sweep_epochs(make_space(), 3) == 33
        assert expected_sweep_epochs(make_space(repeat=0), 3) == 15

    @pytest.mark.needs_ray
    def test_plans_say_it_for_new_and_for_ended_sweeps(
        self, workdir: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from raysweep.cli import main

        settings = [f"--set={name}={value}" for name, value in {**TINY, "repeat": 3}.items()]
        plans = []
        for more in ([], ["--set=repeat=0"]):
            assert main(["tune", "at", "--plan", "--json", *settings, *more]) == 0
            plans.append(json.loads(capsys.readouterr().out))
        assert [plan["repeats"] for plan in plans] == [6, 0]
        assert plans[0]["epochs_expected"] - plans[1]["epochs_expected"] == 6 * 2
        n_runs = [plan["trials"] + plan["repeats"] for plan in plans]
        ratio = plans[0]["checkpoint_bytes"] / plans[1]["checkpoint_bytes"]
        assert ratio == pytest.approx(n_runs[0] / n_runs[1])
        assert main(["tune", "at", "--plan", *settings]) == 0
        words = " ".join(capsys.readouterr().out.split())
        assert (
            "of these, at most 12 epochs repeat the best trials with other seeds (6 repeats)"
            in words
        )
        # One is told apart after the second seeds: the third ones are not needed.
        runs = [make_repeat(0, 1, 160), *(make_repeat(n, 1, 60 - n) for n in range(1, 4))]
        trials = [make_trial(0, 160), *(make_trial(n, 60 - n) for n in range(1, 5))]
        make_ledger(workdir / "runs", *trials, *runs, base={**TINY, "epochs": 3})
        assert main(["tune", "--resume", "sweep", "--plan", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["epochs_expected"] == 0

    def test_leaders_share_the_burn_in_of_a_seed_also_with_a_base_run(self) -> None:
        space = load_space("gairat", {"*.burn_in": 2, "epochs": 4, "repeat": 3})
        lam = "method.terms.pgd.weight.lam"
        first, second = (
            prefix_keys(space.trial_config({lam: value, "seed": 1}), "data") for value in (0.5, 1.0)
        )
        assert [one == other for one, other in zip(first, second, strict=True)] == [
            *(True, True, True),
            *(False, False),
        ]
        assert prefix_keys(space.base_run_config({"seed": 1}), "data")[2] == first[2]


class TestRounds:
    def test_a_failed_seed_is_left_alone_unless_all_failed_runs_shall_run_again(
        self, tmp_path: Path
    ) -> None:
        failed = make_repeat(0, 1, 100, state="failed", reason="the loss became nan")
        ledger = make_ledger(tmp_path, *FIVE, failed)
        left = ledger.count_repeats_left()
        assert ledger.count_repeats_left(retry_failed=True) == left + 1

    def test_by_hand(self, tmp_path: Path) -> None:
        """Second seeds turn the order around; the better two get a third seed, and it decides."""
        ledger = make_ledger(tmp_path, *FIVE[:4])
        assert ledger.find_waiting_repeats() == [], "not while trials run"
        ledger.save_trial(FIVE[4])
        waiting = ledger.find_waiting_repeats()
        assert list_keys(waiting) == ["0000-seed-1", "0001-seed-1", "0002-seed-1", "0003-seed-1"]
        assert waiting[0].params == {**FIVE[0].params, "seed": 1}
        assert ledger.find_config(waiting[0]).seed == 1
        assert ledger.run_path(waiting[0]) == ledger.path / "repeats" / "0000-seed-1"
        assert not ledger.has_ended() and ledger.has_work_left() and ledger.is_interrupted()
        assert ledger.count_trials_left() == 0 and ledger.count_repeats_left() == 4
        for number, n_correct in enumerate((130, 140, 150, 160)):
            assert ledger.rank_trials() == FIVE, "an incomplete round changes nothing"
            ledger.save_trial(make_repeat(number, 1, n_correct))
        # Means: (160 + 130) / 2 = 145, 147.5, 150, 152.5; the fifth has one seed, and 140 is less.
        ranked = ledger.rank_trials()
        assert [trial.number for trial in ranked] == [3, 2, 1, 0, 4]
        means = [trial.score("robust_worst") for trial in ranked]
        assert means == pytest.approx([x / N for x in (152.5, 150, 147.5, 145, 140)])
        assert list_keys(ledger.find_waiting_repeats()) == ["0003-seed-2", "0002-seed-2"]
        ledger.save_trial(make_repeat(3, 2, 130))
        ledger.save_trial(make_repeat(2, 2, 129))
        # Trial 1 has a better mean now, but less seeds.
        ranked = ledger.rank_trials()
        assert [trial.number for trial in ranked] == [3, 2, 1, 0, 4]
        assert ranked[0].score("robust_worst") == pytest.approx((145 + 160 + 130) / 3 / N)
        assert [len(trial.trainings) for trial in ranked] == [3, 3, 2, 2, 1]
        assert ledger.has_ended() and not ledger.has_work_left()
        assert len(ledger.load_all_runs()) == 11
        assert ledger.find_best_trial() == ranked[0]

    def test_one_seed_does_not_beat_the_mean_of_several(self, tmp_path: Path) -> None:
        """What all leaders lose with a second seed, the others would have lost, too."""
        runs = [make_repeat(number, 1, 100 - number) for number in range(4)]
        ledger = make_ledger(tmp_path, *FIVE, *runs, repeat=3)
        assert [trial.number for trial in ledger.rank_trials()] == [0, 1, 2, 3, 4]

    def test_it_ends_when_one_is_told_apart(self, tmp_path: Path) -> None:
        runs = [make_repeat(0, 1, 160), *(make_repeat(n, 1, 60 - n) for n in range(1, 4))]
        trials = [make_trial(0, 160), *(make_trial(n, 60 - n) for n in range(1, 5))]
        ledger = make_ledger(tmp_path, *trials, *runs)
        assert ledger.find_waiting_repeats() == [] and ledger.has_ended()
        assert ledger.load_repeat_plan().is_told_apart
        lines = describe_repeats(ledger)
        assert lines[1] == ("with 2 seeds trial 0000 is told apart from trials 0001, 0002, 0003")
        # If the seeds of one setting differ as much as the settings, nothing is told apart.
        ledger.save_trial(make_repeat(1, 1, 160))
        assert not ledger.load_repeat_plan().is_told_apart
        assert list_keys(ledger.find_waiting_repeats()) == ["0000-seed-2", "0001-seed-2"]

    def test_failed_repeats_end_the_race_of_their_trial(self, tmp_path: Path) -> None:
        failed = make_repeat(0, 1, 290, state="failed", reason="the loss became nan")
        runs = [failed, *(make_repeat(number, 1, 120 + number) for number in range(1, 4))]
        ledger = make_ledger(tmp_path, *FIVE, *runs)
        ranked = ledger.rank_trials()
        assert [trial.number for trial in ranked] == [1, 2, 3, 0, 4]
        assert ranked[3].score("robust_worst") == FIVE[0].score("robust_worst"), "one seed"
        assert list_keys(ledger.find_waiting_repeats()) == ["0001-seed-2", "0002-seed-2"]
        assert describe_repeats(ledger)[0] == "trial 0000 seed 1 failed: the loss became nan"
        # What the surroundings ended runs again, and until then the round is not complete.
        ledger.save_trial(replace(failed, is_infrastructure_failure=True))
        assert ledger.count_repeats_left() == 3
        assert list_keys(ledger.restart_failed_trials()) == ["0000-seed-1"]
        assert list_keys(ledger.find_waiting_repeats()) == ["0000-seed-1"]
        assert ledger.rank_trials() == FIVE

    def test_one_leader_alone_is_not_repeated(self, tmp_path: Path) -> None:
        failed = [make_trial(number, 100, state="failed") for number in range(1, 5)]
        ledger = make_ledger(tmp_path, FIVE[0], *failed)
        assert ledger.find_waiting_repeats() == [] and ledger.has_ended()

    def test_a_resumed_sweep_may_have_more_seeds_trials_and_epochs(self, tmp_path: Path) -> None:
        ledger = make_ledger(tmp_path, *FIVE, repeat=0)
        assert ledger.has_ended()
        ledger.extend_space(make_space(repeat=2))
        assert list_keys(ledger.find_waiting_repeats()) == ["0000-seed-1", "0001-seed-1"]
        for number in (0, 1):
            ledger.save_trial(make_repeat(number, 1, 150))
        assert ledger.has_ended()
        # Of six trials the new one is a leader; the repeat of the other one counts again.
        ledger.extend_space(make_space(repeat=2, trials=6))
        ledger.save_trial(make_trial(5, 170))
        assert list_keys(ledger.find_waiting_repeats()) == ["0005-seed-1"]
        ledger.save_trial(make_repeat(5, 1, 100))
        assert [trial.number for trial in ledger.rank_trials()][:2] == [0, 5]
        ledger.extend_space(make_space(repeat=2, trials=6, base={"epochs": 6}))
        assert {run.state for run in ledger.load_all_runs()} == {"running"}

    def test_stored_ones_are_read_again(self, tmp_path: Path) -> None:
        run = make_repeat(3, 1, 150, 140)
        ledger = make_ledger(tmp_path, *FIVE, run, make_repeat(3, 10, 99), make_repeat(3, 2, 99))
        keys = ["0003-seed-1", "0003-seed-2", "0003-seed-10"]
        assert list_keys(Ledger.open(ledger.path).load_repeats()) == keys
        assert Ledger.open(ledger.path).load_repeats()[0] == run
        assert {"kind", "repeats"}.isdisjoint(json.loads(_trial_file(ledger, run).read_text()))
        # A trial with repeats is stored without them.
        runs = [make_repeat(number, 1, 150) for number in range(4)]
        for other in runs:
            ledger.save_trial(other)
        trial = ledger.load_trials()[0]
        assert trial.repeats == (runs[0],)
        ledger.save_trial(trial)
        assert (
            _trial_file(ledger, trial).read_text()
            == _trial_file(make_ledger(tmp_path / "other", FIVE[0]), FIVE[0]).read_text()
        )


def _trial_file(ledger: Ledger, run: Trial) -> Path:
    folder = ledger.run_path(run).local_path
    assert folder is not None
    return folder / "trial.json"


class TestFinalists:
    def test_autoattack_attacks_each_seed_and_decides_by_the_mean(self, tmp_path: Path) -> None:
        runs = [make_repeat(number, 1, 150 - number) for number in range(2)]
        ledger = make_ledger(tmp_path, *FIVE, repeat=2, finalists=3)
        assert ledger.find_waiting_finalists() == [], "not before the repeats"
        for run in runs:
            ledger.save_trial(run)
        # The third has one seed, with which it is not compared.
        keys = ["0000", "0000-seed-1", "0001", "0001-seed-1"]
        assert list_keys(ledger.find_waiting_finalists()) == keys
        ledger.save_trial(make_trial(0, 160, 150))
        ledger.save_trial(make_repeat(0, 1, 150, 50))
        ledger.save_trial(make_trial(1, 155, 120))
        assert list_keys(ledger.find_waiting_finalists()) == keys[3:]
        assert ledger.find_best_trial() == ledger.load_trials()[0], "the objective decides"
        ledger.save_trial(make_repeat(1, 1, 149, 110))
        # One seed alone would have chosen the first: 150, but (150 + 50) / 2 < (120 + 110) / 2.
        best = ledger.find_best_trial()
        assert best is not None and best.number == 1
        assert best.robust_under_autoattack == pytest.approx(115 / N)
        assert ledger.has_ended() and ledger.find_waiting_finalists() == []
        failed = FinalistResult(3, None, N, 0.2, "Linf", error="no gradient")
        ledger.save_trial(make_repeat(1, 1, 149, finalist=failed))
        assert describe_finalists(ledger) == [
            "AutoAttack could not attack trial 0001 seed 1: no gradient; the ranking leaves "
            "AutoAttack out"
        ]


class TestComparison:
    def test_groups_are_compared_by_their_means(self) -> None:
        """The interval by hand: that of the means, and the seeds' variance over their numbers."""
        rng = np.random.default_rng(0)
        first, second = (rng.integers(0, 2, (m, 200)).astype(float) for m in (3, 1))
        plain = compare_paired(first.mean(0), second.mean(0))
        assert compare_groups(first, second) == plain
        wide = compare_groups(first, second, 1, 0.01)
        variance = ((plain.high - plain.low) / 2 / 1.959964) ** 2
        half = 1.959964 * math.sqrt(variance + 0.01 * (1 / 3 + 1))
        assert (wide.high - wide.low) / 2 == pytest.approx(half)

    def test_the_variance_of_training_is_found_again(self) -> None:
        """Simulated: each training shifts the chance of all examples by its own amount."""
        rng = np.random.default_rng(1)
        groups = []
        for _ in range(300):
            level = rng.uniform(0.4, 0.6) + 0.05 * rng.standard_normal(3)
            groups.append((rng.random((3, 400)) < level[:, None]).astype(float))
        assert estimate_training_variance(groups) == pytest.approx(0.05**2, rel=0.1)
        assert estimate_training_variance([groups[0][:1], groups[1][:1]]) == 0
        single = estimate_training_variance([groups[0]])
        assert estimate_training_variance([groups[0], groups[1][:1]]) == single

    def test_spread_and_base_method_use_all_seeds(self, tmp_path: Path) -> None:
        lam = "method.terms.pgd.weight.lam"
        changes = {"method": "gairat", "base": {"epochs": 4, "*.burn_in": 1}, "base_runs": 2}
        changes |= {"space": {lam: {"float": [-2.0, 2.0]}}, "trials": 3, "repeat": 2}
        params: dict[str, Any] = {"params": {lam: 0.5}}
        trials = [make_trial(number, 200 - number, **params) for number in range(3)]
        runs = [make_repeat(number, 1, 196 - number, **params) for number in range(2)]
        base = [
            replace(make_trial(50, 150 - 2 * seed), number=seed, params={"seed": seed},
                    kind="base run")
            for seed in (0, 1)
        ]  # fmt: skip
        ledger = make_ledger(tmp_path, *trials, *runs, *base, **changes)
        comparison = compare_with_base(ledger)
        assert comparison is not None and comparison.best.number == 0
        assert comparison.difference.difference == pytest.approx((198 - 149) / N)
        assert (
            "trial 0000 (2 seeds) is 0.163 better than at (2 seeds)"
            in (describe_base_comparison(ledger)[0])
        )
        spread = summarize_spread(ledger)
        assert spread is not None
        assert spread.differences[1].difference == pytest.approx(1 / N)
        assert spread.differences[2].difference == pytest.approx(0)


class TestShown:
    @pytest.fixture
    def ledger(self, tmp_path: Path) -> Ledger:
        runs = [make_repeat(number, 1, 100 + number) for number in range(2)]
        return make_ledger(tmp_path / "runs", *FIVE, *runs, repeat=2)

    def test_lines_json_and_tables(self, ledger: Ledger) -> None:
        lines = [
            "mean robust worst over seeds: trial 0000 0.433 (0.533, 0.333), "
            "trial 0001 0.427 (0.517, 0.337)",
            "with 2 seeds trial 0000 cannot be told apart from trial 0001",
            "one seed alone would have chosen the same trial",
        ]
        assert describe_repeats(ledger) == lines
        assert [line for line in describe_conclusions(ledger) if line in lines] == lines
        data = sweep_to_json(ledger)
        assert json.loads(json.dumps(data)) == data
        assert data["seeds"]["chosen"] == data["seeds"]["chosen_by_one_seed"] == 0
        assert data["seeds"]["trials"][1] == {
            "trial": 1,
            "mean": pytest.approx(128 / N),
            "scores": [pytest.approx(155 / N), pytest.approx(101 / N)],
        }
        assert [row["seeds"] for row in data["trials"]] == [2, 2, 1, 1, 1]
        assert [run["settings"]["seed"] for run in data["repeats"]] == [1, 1]
        table = load_sweep(ledger.path).trials
        assert list(table["seeds"]) == [2, 2, 1, 1, 1] and table["mean"][0] == pytest.approx(
            13 / 30
        )
        assert Sweep(ledger).repeats == summarize_repeats(ledger)
        rows = render(TrialTable(ledger, ledger.load_all_runs()))
        assert "0.433 (2)" in rows[1] and "(" not in rows[3]
        assert [row.split("  ")[0] for row in rows[6:8]] == ["0000 seed 1", "0001 seed 1"]
        report = _build_trial_table(ledger, ledger.load_all_runs())
        column = report.headers.index("mean (seeds)")
        assert [row[column] for row in report.rows[:3]] == ["43.33 (2)", "42.67 (2)", ""]
        assert [row[0] for row in report.rows[5:]] == ["0000 seed 1", "0001 seed 1"]
        ledger.save_trial(make_repeat(1, 1, 150))
        assert describe_repeats(ledger)[-1] == "one seed alone would have chosen trial 0000"

    def test_the_sampler_and_the_study_have_the_mean(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trials = ledger.load_trials()
        told = [to_sampler_trial(ledger.space, trial).value for trial in trials]
        assert told == pytest.approx([x / N for x in (130, 128, 150, 145, 140)])
        study = build_study(ledger)
        assert [trial.value for trial in study.trials] == told
        assert [trial.user_attrs.get("seeds") for trial in study.trials] == [2, 2, None, None, None]
        monkeypatch.setattr(Ledger, "find_data_fingerprint", lambda ledger: "data")
        warm = collect_warm_start(ledger.space, "data", [ledger]).results
        assert {result.number: result.best["robust_worst"] for result in warm} == dict(
            enumerate(told)
        )

    @pytest.mark.mlflow
    def test_mlflow_and_show(
        self, ledger: Ledger, workdir: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from raysweep.cli import main
        from raysweep.tracking import SweepTracker, Tracker

        tracker = Tracker(f"sqlite:///{workdir}/mlflow.db", workdir / "mlruns")
        listener = SweepTracker(tracker)
        listener.on_sweep_start(ledger, 0)
        for run in ledger.load_repeats():
            listener.on_repeat_update(run, None)
        listener.on_sweep_end(ledger)
        (run,) = search_runs(tracker, "sweep")
        assert run.data.metrics["repeat/mean"] == pytest.approx(130 / N)
        assert run.data.metrics["repeat/seeds"] == 2
        note = run.data.tags["mlflow.note.content"]
        assert "best: trial 0000, robust worst 0.433 as the mean over 2 seeds" in note
        assert f"- {describe_repeats(ledger)[0]}\n" in note
        recorded = {run.info.run_name: run for run in search_runs(tracker, "repeat")}
        assert set(recorded) == {"0000 seed 1 sweep", "0001 seed 1 sweep"}
        assert recorded["0000 seed 1 sweep"].data.params["seed"] == "1"
        trials = {run.info.run_name: run for run in search_runs(tracker, "trial")}
        assert trials["0001 sweep"].data.metrics["repeat/mean"] == pytest.approx(128 / N)
        assert "repeat/mean" not in trials["0002 sweep"].data.metrics
        assert main(["show", "sweep"]) == 0
        shown = capsys.readouterr().out
        assert "0000 seed 1" in shown and describe_repeats(ledger)[1] in shown
        assert main(["show", "sweep/0000-seed-1"]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("sweep/0000-seed-1 finished") and "seed = 1" in shown
        assert main(["show", "sweep/0000"]) == 0
        assert "mean over 2 seeds\n  robust_worst = 0.4333 (0.5333, 0.3333)" in (
            capsys.readouterr().out
        )

    def test_names_and_folders(self, ledger: Ledger, workdir: Path) -> None:
        from raysweep.run_lookup import find_run
        from raysweep.stores import open_path

        folder = ledger.path / "repeats" / "0001-seed-1"
        for name in ("sweep/0001-seed-1", "sweep/repeats/0001-seed-1", "sweep/1-seed-1", folder):
            found = find_run(str(name), open_path(workdir / "runs"))
            assert found is not None and (found.path, found.kind) == (folder, "repeat"), name
        with pytest.raises(SpecError, match="no repeat 0004-seed-1; its repeats: 0000-seed"):
            find_run("sweep/0004-seed-1", open_path(workdir / "runs"))

    def test_the_display_follows_them(self, ledger: Ledger) -> None:
        import io

        from rich.console import Console

        display = SweepDisplay(Console(file=io.StringIO(), force_terminal=True, width=300))
        running = replace(make_repeat(1, 1, 150), state="running", best={}, epoch=1, verdicts=None)
        ended = ledger.load_repeats()[1]
        ledger.save_trial(running)
        display.on_sweep_start(ledger, 1)
        try:
            display.on_repeat_update(running, None)
            before = display._render_table()
            assert before.caption and "trials done in 0:00, 1 of 2 repeats" in before.caption
            assert "mean" not in render(before)[0]
            ledger.save_trial(ended)
            display.on_repeat_update(ended, None)
            after = render(display._render_table())
            assert "0.433 (2)" in after[1] and after[7].startswith("0001 seed 1")
        finally:
            display.on_sweep_end(ledger)


def test_candidates_of_a_pipeline_have_the_order_of_their_sweep() -> None:
    """Sweep a repeated two trials, sweep b none; the scores of others decide beside the means."""

    def make_candidate(label: str, score: float, **more: Any) -> Candidate:
        sweep, number = label.split("/")
        return Candidate(
            label=label,
            method="at",
            checkpoint=f"runs/{sweep}/trials/{number}/epoch-0003",
            epoch=3,
            epochs=3,
            metrics={"robust_worst": score},
            **more,
        )

    candidates = [
        make_candidate("a/0", 0.60, n_seeds=2, mean_score=0.50),
        make_candidate("a/1", 0.59, n_seeds=2, mean_score=0.52),
        make_candidate("a/2", 0.58),
        make_candidate("b/0", 0.55),
        make_candidate("b/1", 0.51),
    ]
    labels = [candidate.label for candidate in rank_candidates(candidates)]
    # By scores: a/2 0.58, b/0 0.55, a/1 0.52, b/1 0.51, a/0 0.50; then a's take their places.
    assert labels == ["a/1", "b/0", "a/0", "b/1", "a/2"]
    assert "n_seeds" not in candidates[2].to_stored_dict()
    stored = candidates[0].to_stored_dict()
    assert Candidate.from_data(stored, stored=True) == candidates[0]


@pytest.mark.needs_ray
class TestSearch:
    def test_each_is_proposed_once(self, tmp_path: Path) -> None:
        from raysweep.sweep.repeat_search import RepeatSearcher

        waiting = make_ledger(tmp_path, *FIVE, repeat=2).find_waiting_repeats()
        searcher = RepeatSearcher("robust_worst", waiting)
        assert searcher.suggest("a") == {
            "number": 0,
            "params": {LR: 0.1, "seed": 1},
            "kind": "repeat",
        }
        assert [searcher.suggest(x) for x in "bc"] == [waiting[1].to_tune_config(), "FINISHED"]

    def test_the_ledger_gets_what_tune_reports_of_them(self, tmp_path: Path) -> None:
        from raysweep.sweep.asha import AshaScheduler
        from raysweep.sweep.tune_callbacks import Budget, LedgerCallback

        asha = {"kind": "asha", "grace_period": 1}
        ledger = make_ledger(tmp_path, *FIVE, scheduler=asha, until="told-apart")
        told: list[tuple[str, str, int]] = []
        listener: Any = SimpleNamespace(
            on_repeat_update=lambda run, metrics: told.append((run.key, run.state, run.epoch))
        )
        callback = LedgerCallback(ledger, 2, [listener], 0, Budget())
        config = ledger.find_waiting_repeats()[0].to_tune_config()
        tune: Any = SimpleNamespace(trial_id="a", config=config, error_file=None, num_failures=0)
        callback.on_trial_start(0, [], tune)
        for epoch, worst in ((1, 0.01), (2, 0.5)):
            result = {"epoch": epoch, "robust_worst": worst}
            assert AshaScheduler(ledger, 2).on_trial_result(None, tune, result) == "CONTINUE"
            callback.on_trial_result(0, [], tune, result)
        callback.on_trial_complete(0, [], tune)
        (run,) = ledger.load_repeats()
        assert (run.key, run.state, run.best["robust_worst"]) == ("0000-seed-1", "finished", 0.5)
        assert ledger.load_trials() == FIVE
        epochs = [("running", 0), ("running", 1), ("running", 2), ("finished", 2)]
        assert told == [("0000-seed-1", *event) for event in epochs]


@pytest.mark.ray
def test_a_sweep_repeats_its_leaders_also_after_ctrl_c(
    ray_cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C at the first epoch of a repeat; the resumed sweep trains what is left, and no epoch of
    a burn-in twice.
    """
    import optuna
    from rich.console import Console

    from raysweep.logs import read_log
    from raysweep.sweep.optuna_export import OptunaExporter
    from raysweep.sweep.tuner import run_sweep

    lam = "method.terms.pgd.weight.lam"
    data = {"method": "gairat", "trials": 3, "base": {**TINY, "*.burn_in": 1}, "base_runs": 2}
    data |= {"space": {lam: {"float": [-2.0, 2.0]}}, "scheduler": {"kind": "none"}, "repeat": 3}
    space = SearchSpace.from_data(data | {"sampler": {"kind": "random"}})
    ledger = Ledger.create(tmp_path / "runs" / "sweep", space)

    class Interrupter(TrialUpdateListener):
        def on_repeat_update(self, run: Trial, epoch_metrics: dict[str, float] | None) -> None:
            if epoch_metrics is not None:
                os.kill(os.getpid(), signal.SIGINT)

    assert run_sweep(ledger, [Interrupter(lambda trial: None)]) == "interrupted"
    assert {trial.state for trial in ledger.load_trials()} == {"finished"}
    started = ledger.load_repeats()
    assert any(run.state == "running" and run.epoch for run in started)
    assert 1 <= len(ledger.find_waiting_repeats()) <= 3 and ledger.is_interrupted()
    journal = tmp_path / "journal.log"
    display = SweepDisplay(Console(stderr=True, force_terminal=False))
    assert run_sweep(ledger, [display, OptunaExporter(str(journal))]) == "done"
    told = capsys.readouterr().err
    ranked = ledger.rank_trials()
    assert sorted(len(trial.trainings) for trial in ranked[:2]) == [3, 3]
    assert len(ranked[2].trainings) == 2
    repeats = ledger.load_repeats()
    assert len(repeats) == 5 and all(run.state == "finished" for run in repeats)
    assert f"trial {ranked[0].number:04d} seed 2 finished" in told
    for run in repeats:
        saved = read_checkpoint(ledger.best_checkpoint_path(run))
        assert saved.config.seed == run.params["seed"]
        assert run.best_verdicts is not None
        # The burn-in comes from the base run of seed 1, or from the first repeat of seed 2.
        assert run.trained_epochs == 1 or run.params["seed"] == 2
    assert sum(run.trained_epochs for run in repeats) == 6, "five epochs, and a burn-in of seed 2"
    alone = tmp_path / "alone"
    train_model(ledger.find_config(repeats[0]), alone)
    assert _hash_weights(ledger.run_path(repeats[0]) / "epoch-0002") == _hash_weights(
        open_path(alone) / "epoch-0002"
    ), "as a training of its own"
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(journal))
    )
    (study,) = optuna.get_all_study_summaries(storage)
    exported = optuna.load_study(study_name=study.study_name, storage=storage).trials
    means = {trial.number: trial.score("robust_worst") for trial in ranked}
    assert {trial.user_attrs["raysweep.number"]: trial.value for trial in exported} == means
    events = [entry["message"] for entry in read_log(ledger.path) if entry.get("event") == "repeat"]
    assert len(events) == 3 and "0000-seed-1" in events[0]


def _hash_weights(folder: Any) -> str:
    return str(read_checkpoint(folder).meta["sha256"]["weights.safetensors"])
