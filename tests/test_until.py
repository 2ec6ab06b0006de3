"""`until: told-apart`: when a sweep needs no more trials, what it says, and how it goes on."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_base_runs import LAM, make_base_run, make_ledger
from test_base_runs import make_trial as make_gairat_trial

from raysweep.result_loading import sweep_to_json
from raysweep.spec import SpecError
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace, load_space
from raysweep.sweep.spread_summary import describe_spread, find_early_end, summarize_spread
from raysweep.sweep.trial import Trial


def make_trial(number: int, n_correct: int, **more: Any) -> Trial:
    return make_gairat_trial(number, n_correct, **{"params": {LAM: number / 100}} | more)


def make_until_ledger(path: Path, *trials: Trial, **changes: Any) -> Ledger:
    return make_ledger(path, *trials, **{"until": "told-apart", "trials": 32} | changes)


class TestRule:
    def decide(self, tmp_path: Path, trials: list[Trial]) -> str | None:
        ledger = make_until_ledger(tmp_path, *trials)
        # Tune's order of events is not that of the ranking.
        return find_early_end(ledger, list(reversed(ledger.load_trials())))

    @pytest.mark.parametrize(("n_trials", "reason"), [(7, None), (8, "told-apart")])
    def test_the_best_is_told_apart_from_at_least_seven(
        self, tmp_path: Path, n_trials: int, reason: str | None
    ) -> None:
        trials = [make_trial(0, 200), *[make_trial(n, 100 + n) for n in range(1, n_trials)]]
        assert self.decide(tmp_path, trials) == reason

    def test_one_that_may_be_as_good_keeps_it_running(self, tmp_path: Path) -> None:
        trials = [make_trial(0, 200), make_trial(1, 199), *[make_trial(n, 90 + n) for n in (2, 3)]]
        trials += [make_trial(n, 40 + 20 * n) for n in range(4, 8)]
        assert self.decide(tmp_path, trials) is None

    @pytest.mark.parametrize("n_better", [1, 7])
    def test_a_better_checkpoint_contradicts_the_best_score(
        self, tmp_path: Path, n_better: int
    ) -> None:
        """By its score trial 0 is the best, for example by its margin; all others are told apart
        from it, but some as the better ones.
        """
        trials = [make_trial(0, 150, averages={"robust_worst": 1.5})]
        for number in range(1, 8):
            n_correct = 220 if number <= n_better else 60
            trials.append(make_trial(number, n_correct, averages={"robust_worst": 0.9}))
        ledger = make_until_ledger(tmp_path, *trials, score_epochs=3, margin_factor=1.0)
        assert find_early_end(ledger, ledger.load_trials()) is None
        summary = summarize_spread(ledger)
        assert summary is not None and summary.best.number == 0
        assert summary.like_best == summary.surpassing == list(range(1, 1 + n_better))
        marks = [summary.describe_mark(trial) for trial in ledger.load_trials()]
        assert marks == ["best", *["yes"] * n_better, *[""] * (7 - n_better)]
        names = {1: "checkpoint of trial 0001 does", 7: "checkpoints of trials 0001, 0002, "}
        assert describe_spread(ledger)[0].startswith(f"the {names[n_better]}")
        assert describe_spread(ledger)[0].endswith(
            "better on the same 300 validation images than that of trial 0000, which is ranked "
            "first"
        )
        # One that is not told apart has a line before.
        ledger.save_trial(make_trial(7, 151, averages={"robust_worst": 0.9}))
        assert describe_spread(ledger)[0] == (
            "trial 0007 cannot be told apart from the best, trial 0000, on the same 300 validation "
            "images"
        )
        assert describe_spread(ledger)[1].startswith("the checkpoint")

    def test_a_flat_landscape(self, tmp_path: Path) -> None:
        """All have the same number right, so that the spread is less than the images explain."""
        trials = [make_trial(n, 150) for n in range(8)]
        assert self.decide(tmp_path, trials) == "flat"
        # Only trials of all epochs say how much of the spread is settings.
        cut = [make_trial(n, 150, state="stopped" if n else "finished") for n in range(8)]
        assert self.decide(tmp_path / "cut", cut) is None


class TestSweep:
    def test_it_has_ended_without_its_last_trials(self, tmp_path: Path) -> None:
        trials = [make_trial(n, 150) for n in range(8)]
        runs = [make_base_run(seed, 150) for seed in range(2)]
        ledger = make_until_ledger(tmp_path, *trials, *runs)
        assert not ledger.has_ended() and ledger.count_trials_left() == 24
        ledger.save_early_end("flat")
        assert ledger.has_ended() and not ledger.has_work_left()
        assert describe_spread(ledger)[0] == (
            "ended early, with 8 of 32 trials: the landscape is flat: with 95% confidence settings "
            "explain less than 50% of the spread (until = told-apart)"
        )
        assert sweep_to_json(ledger)["ended_early"] == "flat"
        # What had started runs to its end.
        ledger.save_trial(make_trial(8, 150, state="running"))
        assert not ledger.has_ended() and ledger.count_trials_left() == 1
        # The same command changes nothing; one that asks for more goes on.
        ledger.extend_space(ledger.space)
        assert ledger.load_early_end() == "flat"
        ledger.extend_space(ledger.space.replace(finalists=1, disk_reserve_gib=0.5))
        assert ledger.load_early_end() == "flat" and ledger.count_trials_left() == 1
        ledger.extend_space(ledger.space.replace(trials=40))
        assert ledger.load_early_end() is None and ledger.count_trials_left() == 32
        ledger.save_early_end("told-apart")
        ledger.extend_space(ledger.space.with_sweep_settings({"until": None}))
        assert ledger.load_early_end() is None

    def test_settings(self) -> None:
        assert load_space("at", {}).until is None
        space = load_space("at", {"until": "told-apart"})
        assert space.until == "told-apart"
        assert SearchSpace.from_data(space.to_stored_dict(), stored=True) == space
        assert "until" not in load_space("at", {}).to_stored_dict()
        for settings, problem in [
            ({"until": "flat"}, "until = 'flat'"),
            (
                {"until": "told-apart", "metric": ["robust_worst", "clean"]}
                | {"scheduler.kind": "none"},
                "with several metrics there is no best trial",
            ),
        ]:
            with pytest.raises(SpecError) as refused:
                load_space("at", settings)
            (line,) = refused.value.problems
            assert problem in line


@pytest.mark.needs_ray
def test_tune_gets_no_more_trials_and_those_that_run_go_on(tmp_path: Path) -> None:
    """The eighth trial that ends shows a flat landscape; one more is running."""
    from raysweep.sweep.base_run_search import BaseRunSearcher
    from raysweep.sweep.optuna_search import LedgerSearcher
    from raysweep.sweep.tune_callbacks import Budget, LedgerCallback
    from raysweep.training.checkpoint import META_FILE

    trials = [make_trial(n, 150) for n in range(7)]
    ledger = make_until_ledger(tmp_path, *trials, base_runs=0)
    listener: Any = SimpleNamespace(on_trial_update=lambda trial, metrics: None)
    callback = LedgerCallback(ledger, 4, [listener], 0, Budget())
    searcher = BaseRunSearcher(ledger, LedgerSearcher(ledger))
    started = []
    for number in (7, 8):
        config = searcher.suggest(f"t{number}")
        assert isinstance(config, dict) and config["number"] == number
        tune: Any = SimpleNamespace(
            trial_id=f"t{number}", config=config, error_file=None, num_failures=0
        )
        callback.on_trial_start(0, [], tune)
        started.append(tune)
    # What the trial's process wrote.
    verdicts = make_trial(7, 150).verdicts
    assert verdicts is not None
    file = ledger.trial_path(7) / "epoch-0004" / META_FILE
    stored = verdicts.to_stored_dict() | {"epoch": 4}
    file.write_json({"verdicts": stored})
    result = {"epoch": 4, "robust_worst": float(verdicts.mask.mean()), "clean": 0.9}
    callback.on_trial_result(0, [], started[0], result)
    assert ledger.load_early_end() is None
    callback.on_trial_complete(0, [], started[0])
    assert ledger.load_early_end() == "flat"
    assert json.loads((ledger.path / "early_end.json").read_text()) == {"reason": "flat"}
    assert searcher.suggest("t9") == "FINISHED"
    assert ledger.count_trials_left() == 1, "trial 8 runs on"
    # A driver that resumes it gives Tune this one and no other.
    resumed = BaseRunSearcher(ledger, LedgerSearcher(ledger))
    config = resumed.suggest("u0")
    assert isinstance(config, dict) and config["number"] == 8
    assert config["params"][LAM] == started[1].config["params"][LAM]
    assert resumed.suggest("u1") == "FINISHED"
