"""Which trials of a sweep cannot be told apart: what each keeps of its validation examples, and
where it is said.
"""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny
from rich.console import Console

from raysweep.errors import DamagedFileError
from raysweep.pipeline.report.search_results import _build_trial_table
from raysweep.result_loading import Sweep, sweep_to_json
from raysweep.sweep.finalist_result import FinalistResult
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.spread_summary import (
    decide_early_end,
    describe_spread,
    find_early_end,
    summarize_spread,
)
from raysweep.sweep.trial import Trial
from raysweep.terminal import SweepDisplay, TrialTable
from raysweep.training.checkpoint import RunDirectory
from raysweep.training.example_verdicts import ExampleVerdicts
from raysweep.training.prefix_cache import PrefixCache
from raysweep.training.trainer import train_model

LR = "optim.lr"
N = 300


def make_mask(n_correct: int, seed: int = 0) -> np.ndarray:
    """The first examples are right, but for some that are other ones for each seed."""
    mask = np.arange(N) < n_correct
    rng = np.random.default_rng(seed)
    right, wrong = rng.choice(n_correct, 8, False), n_correct + rng.choice(N - n_correct, 8, False)
    mask[right], mask[wrong] = False, True
    return mask


def make_verdicts(
    mask: np.ndarray, metric: str = "robust_worst", epoch: int = 3
) -> ExampleVerdicts:
    return ExampleVerdicts.from_mask(metric, epoch, mask, np.arange(len(mask)))


def make_trial(number: int, n_correct: int, robust: int | None = None, **more: Any) -> Trial:
    mask = make_mask(n_correct, number)
    best = {"epoch": 3.0, "robust_worst": float(mask.mean()), "clean": 0.9}
    finalist = None
    if robust is not None:
        attacked = make_mask(robust, 100 + number)
        finalist = FinalistResult(
            3, attacked.mean(), N, 0.2, "Linf", verdicts=make_verdicts(attacked, "autoattack")
        )
    values: dict[str, Any] = {"params": {LR: 0.1 + number / 100}, "state": "finished", "epoch": 4}
    values |= {"best": best, "burn_in": 0, "finalist": finalist, "verdicts": make_verdicts(mask)}
    return Trial(number, **values | more)


def make_ledger(path: Path, *trials: Trial, **changes: Any) -> Ledger:
    data = {"method": "at", "trials": len(trials), "base": {"epochs": 4}}
    data |= {"space": {LR: {"float": [0.01, 0.5]}}, "scheduler": {"kind": "none"}}
    ledger = Ledger.create(path / "sweep", SearchSpace.from_data(data | changes))
    for trial in trials:
        ledger.save_trial(trial)
    return ledger


class TestVerdicts:
    @pytest.mark.parametrize("n", [1, 7, 8, 9, 300])
    def test_bits_come_back(self, n: int) -> None:
        mask = np.random.default_rng(n).random(n) < 0.5
        verdicts = make_verdicts(mask)
        stored = json.loads(json.dumps(verdicts.to_stored_dict()))
        assert ExampleVerdicts.from_stored_dict(stored, "file") == verdicts
        assert (verdicts.mask == mask).all() and len(verdicts.mask) == n
        others = ExampleVerdicts.from_mask("robust_worst", 3, mask, np.arange(n) + 1)
        assert not verdicts.is_comparable(others), "other examples"
        assert not verdicts.is_comparable(make_verdicts(mask, "clean"))

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"correct": "AA=="}, "correct has 1 bytes for 300 examples"),
            ({"correct": "AA"}, "correct is not base64"),
            ({"n_examples": -1}, "n_examples = -1"),
            ({"examples": None}, "examples = None"),
        ],
    )
    def test_damaged_ones_are_one_line(
        self, tmp_path: Path, change: dict[str, Any], problem: str
    ) -> None:
        ledger = make_ledger(tmp_path, make_trial(0, 150))
        file = ledger.trial_path(0).local_path / "trial.json"
        data = json.loads(file.read_text())
        data["verdicts"] |= change
        file.write_text(json.dumps(data))
        with pytest.raises(DamagedFileError, match="verdicts") as refused:
            ledger.load_trials()
        assert problem in str(refused.value) and "\n" not in str(refused.value)

    def test_trials_of_earlier_and_later_versions_are_read(self, tmp_path: Path) -> None:
        ledger = make_ledger(tmp_path, make_trial(0, 150, 140), make_trial(1, 140))
        assert ledger.load_trials() == [make_trial(0, 150, 140), make_trial(1, 140)]
        file = ledger.trial_path(1).local_path / "trial.json"
        data = json.loads(file.read_text())
        file.write_text(json.dumps(data | {"verdicts": {"format": 2, "runs": []}}))
        assert ledger.load_trials()[1].verdicts is None
        del data["verdicts"]
        file.write_text(json.dumps(data))
        assert ledger.load_trials()[1].verdicts is None
        assert summarize_spread(ledger) is None and describe_spread(ledger) == []
        assert sweep_to_json(ledger)["comparison"] is None
        assert "like_best" not in Sweep(ledger).trials

    def test_a_checkpoint_has_those_of_its_epoch_also_if_it_was_reused(
        self, tmp_path: Path
    ) -> None:
        config = tiny("at", validation__every=2, epochs=3)
        cache = PrefixCache(tmp_path / "prefixes")
        for name in ("first", "second"):
            train_model(config, tmp_path / name, prefix_cache=cache)
        first, second = (RunDirectory(tmp_path / name) for name in ("first", "second"))
        history = second.read_history()
        assert history[-1]["shared"] == 1 and "robust_worst" not in history[0]
        verdicts = second.read_verdicts(3)
        assert verdicts is not None and verdicts == first.read_verdicts(3)
        assert (verdicts.metric, verdicts.epoch, verdicts.n_examples) == ("robust_worst", 3, 50)
        assert verdicts.mask.mean() == pytest.approx(history[-1]["robust_worst"])
        assert second.read_verdicts(1) is None, "it has no checkpoint"


class TestWhatIsSaid:
    def test_a_flat_landscape(self, tmp_path: Path) -> None:
        ledger = make_ledger(tmp_path, *[make_trial(number, 150) for number in range(6)])
        first, second = describe_spread(ledger)
        assert first == "these 6 trials cannot be told apart on the same 300 validation images"
        assert second == (
            "settings explain at most 0% of the spread of the 6 fully trained trials "
            "(90% interval 0% to 0%); nothing shows that they differ"
        )

    def test_some_are_like_the_best(self, tmp_path: Path) -> None:
        counts = (200, 198, 150, 120, 60)
        ledger = make_ledger(tmp_path, *[make_trial(*pair) for pair in enumerate(counts)])
        first, second = describe_spread(ledger)
        assert first == (
            "trial 0001 cannot be told apart from the best, trial 0000, on the same 300 validation "
            "images"
        )
        assert second.startswith("settings explain at most 99% of the spread of the 5 fully")
        table = Sweep(ledger).trials
        assert list(table.like_best) == ["best", "yes", "", "", ""]
        data = sweep_to_json(ledger)
        assert json.loads(json.dumps(data)) == data
        assert data["comparison"]["like_best"] == [1] and data["comparison"]["examples"] == 300
        row = data["comparison"]["differences"][0]
        assert (row["trial"], row["difference"]) == (1, pytest.approx(2 / 300))
        # The report and the tables of a terminal mark the same trials.
        report = _build_trial_table(ledger, ledger.rank_trials())
        assert [r[list(report.headers).index("like best")] for r in report.rows] == list(
            table.like_best
        )
        spread = summarize_spread(ledger)
        rendered = render(TrialTable(ledger, ledger.rank_trials(), spread=spread))
        marks = [line.split()[-2] for line in rendered if line.startswith("000")]
        assert marks[:2] == ["best", "yes"] and "yes" not in marks[2:]

    def test_one_is_better_than_all(self, tmp_path: Path) -> None:
        ledger = make_ledger(tmp_path, *[make_trial(*p) for p in enumerate((200, 150, 140))])
        (line,) = describe_spread(ledger)
        spread = summarize_spread(ledger)
        assert spread is not None and spread.split is None, "three are too few to split"
        least = min(pair.low for pair in spread.differences.values())
        assert line.endswith(f"it is better than each by at least {least:.3f}") and least > 0.1

    def test_only_what_may_be_chosen_and_has_ended_is_compared(self, tmp_path: Path) -> None:
        trials = [make_trial(number, 150) for number in range(6)]
        ledger = make_ledger(
            tmp_path,
            *trials[:2],
            make_trial(2, 299 - 8, state="failed"),
            make_trial(3, 150, state="running"),
            make_trial(4, 150, state="stopped"),
            make_trial(5, 150, verdicts=make_verdicts(make_mask(150), epoch=2)),
        )
        spread = summarize_spread(ledger)
        assert spread is not None and {spread.best.number, *spread.differences} == {0, 1, 4}
        two = make_ledger(tmp_path / "two", *trials, metric=["robust_worst", "clean"])
        assert summarize_spread(two) is None, "there is no best trial"

    def test_autoattack_decides_between_finalists(self, tmp_path: Path) -> None:
        """By the objective they are equal; AutoAttack leaves one far ahead."""
        trials = [make_trial(0, 150, 60), make_trial(1, 150, 140), make_trial(2, 40)]
        ledger = make_ledger(tmp_path, *trials, finalists=2)
        spread = summarize_spread(ledger)
        assert spread is not None and spread.best.number == 1 and spread.like_best == []
        assert spread.differences[0].difference == pytest.approx(80 / 300)

    def test_repeated_seeds_separate_training_from_settings(self, tmp_path: Path) -> None:
        """Three settings with two seeds each, of which one is always 40 images better."""
        trials = []
        for number, n_correct in enumerate((200, 160, 190, 150, 180, 140)):
            params = {LR: 0.1 + number // 2 / 100, "seed": number % 2}
            trials.append(make_trial(number, n_correct, params=params))
        space = {LR: {"float": [0.01, 0.5]}, "seed": {"categorical": [0, 1]}}
        ledger = make_ledger(tmp_path, *trials, space=space)
        spread = summarize_spread(ledger)
        assert spread is not None and spread.split is not None
        assert spread.split.n_repeats == 3
        # Half the squared difference of each pair: (40 / 300)^2 / 2, measurement included.
        noise = spread.split.training_variance + spread.split.measurement_variance
        assert noise == pytest.approx((40 / 300) ** 2 / 2)
        line = describe_spread(ledger)[1]
        assert line.startswith("settings explain 0% of") and "nothing shows" in line

    def test_where_most_were_stopped_the_share_is_that_of_the_rung(self, tmp_path: Path) -> None:
        """The split there equals that of fully trained trials with the same verdicts."""
        n_correct = (100, 150, 200, 120, 180)
        trials = [
            replace(
                make_trial(
                    number, correct, epoch=2, state="finished" if correct > 170 else "stopped"
                ),
                rung_verdicts=make_verdicts(make_mask(correct, number), epoch=2),
            )
            for number, correct in enumerate(n_correct)
        ]
        # Its weights had not acted at the rung.
        late = make_trial(5, 140, state="stopped")
        ledger = make_ledger(tmp_path / "stopped", *trials, late)
        assert ledger.load_trials() == [*trials, late]
        full = make_ledger(tmp_path / "full", *[make_trial(*pair) for pair in enumerate(n_correct)])
        expected = summarize_spread(full)
        found = summarize_spread(ledger)
        assert found is not None and expected is not None and expected.split is not None
        assert (found.split, found.rung, expected.rung) == (expected.split, 2, None)
        line = describe_spread(ledger)[-1]
        share = f"settings explain at most {expected.split.share:.0%} of the spread of 5 trials"
        assert line.startswith(f"at epoch 2, ASHA's first rung, {share} (90% ")
        assert line.endswith(
            "; the share at the end is not known: only 2 trials were trained to the end, and 4 are "
            "needed"
        )
        assert sweep_to_json(ledger)["comparison"]["spread"]["rung"] == 2
        assert decide_early_end(found.differences, None) == find_early_end(ledger, trials)
        unknown = make_ledger(
            tmp_path / "unknown", *[replace(t, rung_verdicts=None) for t in trials]
        )
        assert describe_spread(unknown)[-1] == (
            "how much the settings explain is not known: only 2 trials were trained to the end, "
            "and 4 are needed"
        )

    @pytest.mark.parametrize(
        ("epoch", "burn_in", "kind"),
        [(2, 0, "trial"), (3, 0, "trial"), (2, 2, "trial"), (2, 0, "repeat")],
    )
    def test_a_trial_keeps_its_verdicts_at_the_first_rung(
        self, tmp_path: Path, epoch: int, burn_in: int, kind: Any
    ) -> None:
        scheduler = {"kind": "asha", "grace_period": 2}
        ledger = make_ledger(tmp_path, scheduler=scheduler, trials=2)
        trial = make_trial(
            0, 150, params={LR: 0.1, "seed": 1}, epoch=epoch, burn_in=burn_in, kind=kind
        )
        train_model(tiny("at", epochs=2), ledger.run_path(trial))
        found = ledger.with_rung_results(trial, 4).rung_verdicts
        is_kept = (epoch, burn_in, kind) == (2, 0, "trial")
        assert found == (RunDirectory(ledger.run_path(trial)).read_verdicts(2) if is_kept else None)
        assert (found is not None) == is_kept

    def test_the_live_table_says_it_while_trials_run(self, tmp_path: Path) -> None:
        trials = [make_trial(number, 150) for number in range(4)]
        ledger = make_ledger(tmp_path, *trials[:3], trials=4)
        display = SweepDisplay(Console(file=io.StringIO(), force_terminal=True, width=200))
        display.on_sweep_start(ledger, 1)
        assert "settings explain" not in "\n".join(render(display._render_table()))
        display.on_trial_update(trials[3], None)
        display.on_sweep_end(ledger)
        rendered = "\n".join(render(display._render_table()))
        assert "settings explain at most 0% of the spread of the 4" in rendered

    @pytest.mark.mlflow
    def test_mlflow_and_show_have_it(
        self, workdir: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from raysweep.cli import main
        from raysweep.tracking import SweepTracker, Tracker

        trials = [make_trial(number, 150) for number in range(4)]
        ledger = make_ledger(workdir / "runs", *trials)
        tracker = Tracker(f"sqlite:///{workdir}/mlflow.db", workdir / "mlruns")
        listener = SweepTracker(tracker)
        listener.on_sweep_start(ledger, 0)
        listener.on_sweep_end(ledger)
        (run,) = search_runs(tracker, "sweep")
        assert run.data.metrics["spread/trials_like_best"] == 3
        assert run.data.metrics["spread/settings_share"] == 0
        assert run.data.tags["like_best"] == "0001, 0002, 0003"
        assert main(["show", "sweep"]) == 0
        shown = capsys.readouterr().out
        for line in describe_spread(ledger):
            assert f"- {line}\n" in run.data.tags["mlflow.note.content"] and line in shown
        assert "like best" in shown


def search_runs(tracker: Any, kind: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracker.uri)
    experiment = client.get_experiment_by_name("raysweep").experiment_id
    return list(client.search_runs([experiment], f"tags.`raysweep.kind` = '{kind}'"))


def render(table: Any) -> list[str]:
    target = Console(width=200, force_terminal=False)
    with target.capture() as capture:
        target.print(table)
    return capture.get().splitlines()
