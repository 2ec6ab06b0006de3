"""AutoAttack on the best trials at the end of a sweep: who is attacked, what follows from it, and
where it is said.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY

from raysweep.attacks import APGD, AttackCascade, Square
from raysweep.data import load_data
from raysweep.data.dataset_cache import CachedDataset
from raysweep.evaluation import evaluate
from raysweep.pipeline.artifact import Candidate, rank_candidates
from raysweep.pipeline.stage_sweep import drop_data_location
from raysweep.result_loading import Sweep, sweep_to_json
from raysweep.spec import SpecError
from raysweep.sweep.finalist_result import FinalistResult
from raysweep.sweep.finalist_summary import describe_finalists, summarize_finalists
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace, load_space, split_sweep_settings
from raysweep.sweep.trial import Trial
from raysweep.training.callbacks import FunctionCallback
from raysweep.training.checkpoint import read_checkpoint
from raysweep.training.model_loading import load_trained_model
from raysweep.training.trainer import train_model

LR = "optim.lr"


def make_space(**changes: Any) -> SearchSpace:
    data = {"method": "at", "trials": 4, "base": {"epochs": 4}, "scheduler": {"kind": "none"}}
    data |= {"space": {LR: {"float": [0.01, 0.5]}}, "finalists": 2}
    return SearchSpace.from_data(data | changes)


def make_trial(number: int, worst: float, robust: float | None = None, **more: Any) -> Trial:
    best = {"epoch": 3.0, "robust_worst": worst, "clean": more.pop("clean", 0.9)}
    finalist = None if robust is None else FinalistResult(3, robust, 200, 0.2, "Linf")
    values = {"params": {LR: 0.1}, "state": "finished", "epoch": 4, "best": best, "burn_in": 0}
    return Trial(number, **values | {"finalist": finalist} | more)


def make_ledger(path: Path, *trials: Trial, **changes: Any) -> Ledger:
    ledger = Ledger.create(path / "sweep", make_space(**changes))
    for trial in trials:
        ledger.save_trial(trial)
    return ledger


def numbers(trials: list[Trial]) -> list[int]:
    return [trial.number for trial in trials]


class TestRanking:
    def test_the_order_of_autoattack_decides_between_finalists(self, tmp_path: Path) -> None:
        ledger = make_ledger(
            tmp_path,
            make_trial(0, 0.50, 0.41),
            make_trial(1, 0.49, 0.43),
            make_trial(2, 0.48),
            make_trial(3, 0.60, state="failed"),
        )
        assert numbers(ledger.rank_trials()) == [1, 0, 2, 3]
        assert ledger.find_best_trial() == ledger.load_trials()[1]
        assert ledger.has_ended() and not ledger.has_work_left()

    def test_a_trial_that_was_not_attacked_stays_below(self, tmp_path: Path) -> None:
        """Its objective, 0.48, is above all results of AutoAttack, and would be lower under it."""
        trials = [make_trial(0, 0.50, 0.30), make_trial(1, 0.49, 0.20)]
        ledger = make_ledger(tmp_path, *trials, make_trial(2, 0.48), make_trial(3, 0.47))
        assert numbers(ledger.rank_trials()) == [0, 1, 2, 3]

    def test_equal_results_stay_in_the_order_of_the_objective(self, tmp_path: Path) -> None:
        trials = [make_trial(0, 0.49, 0.25), make_trial(1, 0.50, 0.25)]
        ledger = make_ledger(tmp_path, *trials, make_trial(2, 0.1), make_trial(3, 0.1))
        assert numbers(ledger.rank_trials()) == [1, 0, 2, 3]

    @pytest.mark.parametrize(
        "last",
        [
            make_trial(1, 0.49),
            make_trial(1, 0.49, finalist=FinalistResult(2, 0.45, 200, 0.2, "Linf")),
            make_trial(1, 0.49, finalist=FinalistResult(3, None, 200, 0.2, "Linf", error="no")),
        ],
        ids=["not attacked", "another epoch", "could not be attacked"],
    )
    def test_the_objective_decides_while_a_result_is_missing(
        self, tmp_path: Path, last: Trial
    ) -> None:
        first = make_trial(0, 0.50, 0.10)
        ledger = make_ledger(tmp_path, first, last, make_trial(2, 0.2), make_trial(3, 0.1))
        assert numbers(ledger.rank_trials()) == [0, 1, 2, 3]
        assert summarize_finalists(ledger) is None
        failed = last.finalist is not None and bool(last.finalist.error)
        assert ledger.has_ended() == failed
        assert numbers(ledger.find_waiting_finalists()) == ([] if failed else [1])

    def test_there_are_no_finalists_while_trials_run(self, tmp_path: Path) -> None:
        trials = [make_trial(number, 0.5 - number / 10) for number in range(3)]
        ledger = make_ledger(tmp_path, *trials)
        assert ledger.find_waiting_finalists() == [], "a trial has not been started"
        ledger.save_trial(make_trial(3, 0.7, state="running"))
        assert ledger.find_waiting_finalists() == []
        ledger.save_trial(make_trial(3, 0.7, state="stopped"))
        assert numbers(ledger.find_waiting_finalists()) == [3, 0]
        assert not ledger.has_ended() and ledger.has_work_left()
        assert ledger.is_interrupted(), "a driver that died before the attacks is not done"

    def test_only_trials_that_may_be_chosen_are_attacked(self, tmp_path: Path) -> None:
        ledger = make_ledger(
            tmp_path,
            make_trial(0, 0.9, state="failed"),
            replace(make_trial(1, 0.8), best=make_trial(1, 0.8).best | {"masking_gap": 0.5}),
            make_trial(2, 0.3),
            make_trial(3, 0.7),
            max_masking_gap=0.2,
        )
        assert numbers(ledger.find_waiting_finalists()) == [3, 2]

    @pytest.mark.parametrize("finalists", [0, None])
    def test_without_finalists_nothing_changes(self, tmp_path: Path, finalists: int | None) -> None:
        trials = [make_trial(0, 0.50, 0.1), make_trial(1, 0.49, 0.2)]
        rest = [make_trial(2, 0.3), make_trial(3, 0.2)]
        ledger = make_ledger(tmp_path, *trials, *rest, finalists=finalists)
        assert numbers(ledger.rank_trials()) == [0, 1, 2, 3]
        assert ledger.has_ended() and describe_finalists(ledger) == []

    def test_more_epochs_ask_for_another_attack(self, tmp_path: Path) -> None:
        """An epoch after the attacked one is the best: the old result says nothing of it."""
        attacked = make_trial(0, 0.50, 0.4)
        better = replace(attacked, best=attacked.best | {"epoch": 4.0, "robust_worst": 0.6})
        others = [make_trial(1, 0.49, 0.45), make_trial(2, 0.3), make_trial(3, 0.2)]
        ledger = make_ledger(tmp_path, better, *others)
        assert numbers(ledger.find_waiting_finalists()) == [0]


def test_the_front_of_several_objectives_is_drawn_anew(tmp_path: Path) -> None:
    """By the objective 0, 1 and 2 are on the front; under AutoAttack 1 falls below 2."""
    ledger = make_ledger(
        tmp_path,
        make_trial(0, 0.50, 0.45, clean=0.80),
        make_trial(1, 0.45, 0.30, clean=0.85),
        make_trial(2, 0.40, 0.38, clean=0.90),
        make_trial(3, 0.39, clean=0.82),
        metric=["robust_worst", "clean"],
        finalists=1,
    )
    assert numbers(ledger.unmasked_pareto_front()) == [0, 2]
    assert numbers(ledger.rank_trials()) == [0, 2, 1, 3]
    lines = describe_finalists(ledger)
    assert lines[1] == "trials that leave the Pareto front under AutoAttack: 0001"


class TestWhatIsSaid:
    @pytest.fixture
    def overturned(self, tmp_path: Path) -> Ledger:
        trials = [make_trial(0, 0.510, 0.470), make_trial(1, 0.500, 0.490)]
        return make_ledger(tmp_path, *trials, make_trial(2, 0.3), make_trial(3, 0.2))

    def test_the_lines(self, overturned: Ledger) -> None:
        assert describe_finalists(overturned) == [
            "AutoAttack on 200 validation images: trial 0001 0.490 (robust worst 0.500), "
            "trial 0000 0.470 (robust worst 0.510)",
            "robust worst alone would have chosen trial 0000, "
            "which is 0.020 worse under AutoAttack",
            "robust worst was 0.010 to 0.040 too high",
        ]

    def test_the_lines_where_nothing_changes(self, tmp_path: Path) -> None:
        trials = [make_trial(0, 0.510, 0.510), make_trial(1, 0.500, 0.500)]
        ledger = make_ledger(tmp_path, *trials, make_trial(2, 0.3), make_trial(3, 0.2))
        assert describe_finalists(ledger)[1:] == [
            "robust worst alone would have chosen the same trial",
            "robust worst was not too high for any of them",
        ]

    def test_what_ranks_is_named(self, tmp_path: Path) -> None:
        trials = [make_trial(0, 0.510, 0.470), make_trial(1, 0.500, 0.490)]
        others = [make_trial(2, 0.3), make_trial(3, 0.2)]
        ledger = make_ledger(tmp_path, *trials, *others, score_epochs=3)
        assert describe_finalists(ledger)[1] == (
            "the score alone would have chosen trial 0000, whose score, lowered by AutoAttack, is "
            "0.020 below that of trial 0001"
        )

    def test_a_failed_attack(self, tmp_path: Path) -> None:
        result = FinalistResult(3, None, 200, 0.2, "Linf", error="no gradient")
        trials = [make_trial(0, 0.5, finalist=result), make_trial(1, 0.4, 0.3)]
        ledger = make_ledger(tmp_path, *trials, make_trial(2, 0.3), make_trial(3, 0.2))
        assert describe_finalists(ledger) == [
            "AutoAttack could not attack trial 0000: no gradient; the ranking leaves AutoAttack out"
        ]

    def test_tables_and_json(self, overturned: Ledger) -> None:
        table = Sweep(overturned).trials
        assert list(table.index) == [1, 0, 2, 3]
        assert table.autoattack[1] == 0.49 and math.isnan(table.autoattack[2])
        data = sweep_to_json(overturned)
        assert data["finalists"]["chosen_by_objective"] == 0 and data["finalists"]["chosen"] == 1
        assert data["finalists"]["gain"] == pytest.approx(0.02)
        assert [row["trial"] for row in data["finalists"]["trials"]] == [1, 0]
        assert json.loads(json.dumps(data)) == data

    def test_a_table_without_finalists_has_no_column_for_them(self, tmp_path: Path) -> None:
        ledger = make_ledger(tmp_path, make_trial(0, 0.5), finalists=0)
        assert "autoattack" not in Sweep(ledger).trials
        assert sweep_to_json(ledger)["finalists"] is None


class TestSpace:
    def test_a_new_sweep_has_three(self) -> None:
        assert load_space("gairat", {}).finalists == 3
        assert load_space("gairat", {"finalists": 0}).finalists == 0
        assert load_space("gairat", {"metric": "clean"}).finalists == 0

    def test_a_sweep_of_an_earlier_version_has_none(self) -> None:
        stored = load_space("gairat", {}).to_stored_dict()
        del stored["finalists"]
        space = SearchSpace.from_data(stored, stored=True)
        assert space.finalists is None and "finalists" not in space.to_stored_dict()

    def test_a_stage_of_a_pipeline_keeps_its_digest(self) -> None:
        space = load_space("gairat", {})
        assert drop_data_location(space) == drop_data_location(space.replace(finalists=None))
        assert drop_data_location(space) != drop_data_location(space.replace(finalists=0))

    @pytest.mark.parametrize(
        ("settings", "problem"),
        [
            ({"finalists": -1}, "finalists = -1"),
            ({"finalists": 2, "metric": "clean"}, "compared by metric = 'clean'; set it to 0"),
            ({"scheduler.kind": "ash"}, "scheduler.kind = 'ash'"),
            ({"sampler.seeds": 3}, "seed"),
        ],
    )
    def test_wrong_settings_are_refused(self, settings: dict[str, Any], problem: str) -> None:
        with pytest.raises(SpecError) as refused:
            load_space("gairat", settings)
        (line,) = refused.value.problems
        assert problem in line

    def test_settings_of_the_sweep_and_of_the_training(self) -> None:
        settings = {"finalists": 1, "scheduler.kind": "none", "optim.lr": 0.1, "*.eps": 0.1}
        of_sweep, of_training = split_sweep_settings(settings)
        assert of_sweep == {"finalists": 1, "scheduler.kind": "none"}
        assert of_training == {"optim.lr": 0.1, "*.eps": 0.1}
        space = load_space("gairat", settings)
        assert space.scheduler.kind == "none" and space.scheduler.grace_period == 6
        assert space.trial_config({}).optim.lr == 0.1

    def test_a_resumed_sweep_may_change_it(self, tmp_path: Path) -> None:
        ledger = make_ledger(tmp_path, finalists=None)
        ledger.extend_space(ledger.space.with_sweep_settings({"finalists": 1}))
        assert Ledger.open(ledger.path).space.finalists == 1


class TestCandidates:
    """Candidates of two sweeps, a and b, and of trained rows."""

    def make(self, sweep: str, number: int, worst: float, **more: Any) -> Candidate:
        return Candidate(
            label=f"{sweep}/{number}",
            method=sweep,
            checkpoint=f"runs/{sweep}/trials/{number:04d}/epoch-0003",
            epoch=3,
            epochs=4,
            metrics={"robust_worst": worst},
            **more,
        )

    def labels(self, *candidates: Candidate) -> list[str]:
        return [candidate.label for candidate in rank_candidates(candidates)]

    def test_autoattack_decides_between_sweeps_that_both_have_finalists(self) -> None:
        assert self.labels(
            self.make("a", 0, 0.60, autoattack=0.40),
            self.make("a", 1, 0.59, autoattack=0.45),
            self.make("a", 2, 0.58, is_below_finalists=True),
            self.make("b", 0, 0.50, autoattack=0.42),
        ) == ["a/1", "b/0", "a/0", "a/2"]

    def test_a_row_without_finalists_is_compared_by_the_objective(self) -> None:
        """The trials of sweep a exchange their places; the row stays where it was."""
        assert self.labels(
            self.make("a", 0, 0.60, autoattack=0.40),
            self.make("at", 0, 0.55),
            self.make("a", 1, 0.52, autoattack=0.45),
            self.make("a", 2, 0.58, is_below_finalists=True),
        ) == ["a/1", "a/0", "at/0", "a/2"]

    def test_without_finalists_the_objective_decides(self) -> None:
        assert self.labels(
            self.make("a", 0, 0.5), self.make("b", 0, 0.6), self.make("a", 1, 0.55)
        ) == ["b/0", "a/1", "a/0"]


class Budget:
    """What the attacks ask of `LedgerCallback`: a limit after so many questions."""

    def __init__(self, n_questions: float = math.inf) -> None:
        self.left = n_questions

    def update_limit_reached(self) -> bool:
        self.left -= 1
        return self.left < 0

    def hold_resources(self, n_trials: int) -> Any:
        from contextlib import nullcontext

        return nullcontext()


class Listener:
    def __init__(self) -> None:
        self.told: list[tuple[int, bool, int]] = []

    def on_finalist_update(self, trial: Trial, n_left: int) -> None:
        self.told.append((trial.number, trial.finalist is not None, n_left))


@pytest.mark.needs_ray
class TestAttacks:
    """Real trials of a tiny network, attacked in this process."""

    @pytest.fixture(scope="class")
    def trained_once(self, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
        folder = tmp_path_factory.mktemp("finalists")
        base = {**TINY, "epochs": 1, "model.name": "linear", "*.eps": 0.05, "data.val_size": 20}
        base = {path: value for path, value in base.items() if path != "model.name"}
        ledger = make_ledger(folder, trials=2, base=base)
        data = load_data(ledger.space.trial_config({}).data)
        for number in range(2):
            params = {LR: 0.1 + number / 10}
            rows: list[dict[str, float]] = []
            train_model(
                ledger.space.trial_config(params),
                ledger.trial_path(number),
                FunctionCallback(lambda metrics, saved: rows.append(metrics)),  # noqa: B023
                data=data,
            )
            best = {**rows[0], "robust_worst": 0.5 - number / 10, "clean": 0.9}
            best["val/chance_limit"] = 0.1
            ledger.save_trial(
                Trial(number, params, "finished", 1, rows[0], best, burn_in=0, trained_epochs=1)
            )
        spec = ledger.space.trial_config({}).data
        return SimpleNamespace(
            ledger=ledger, data=data, dataset=CachedDataset(spec, data.fingerprint)
        )

    @pytest.fixture
    def trained(self, trained_once: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
        """The sweep in a copy that is the test's own."""
        shutil.copytree(str(trained_once.ledger.path), tmp_path / "copy")
        ledger = Ledger.open(tmp_path / "copy")
        return SimpleNamespace(ledger=ledger, data=trained_once.data, dataset=trained_once.dataset)

    @pytest.fixture(autouse=True)
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, str]]:
        """What attacks are asked for; they are shortened. `test_sweep` has a full AutoAttack."""
        from raysweep.sweep import finalist_attacks

        asked: list[tuple[str, float, str]] = []

        def build_short_attack(name: str, eps: float, norm: Any) -> AttackCascade:
            asked.append((name, eps, norm))
            return self.build_short_attack(eps)

        monkeypatch.setattr(finalist_attacks, "build_named_attack", build_short_attack)
        return asked

    @staticmethod
    def build_short_attack(eps: float) -> AttackCascade:
        apgd, square = APGD(eps=eps, steps=5), Square(eps=eps, queries=20)
        return AttackCascade(attacks={"apgd-ce": apgd, "square": square})

    def attack(self, trained: SimpleNamespace, budget: Budget, listener: Listener) -> None:
        from raysweep.evaluation.evaluation_runner import run_shards_in_process
        from raysweep.sweep.finalist_attacks import attack_finalists

        attack_finalists(
            trained.ledger,
            trained.dataset,
            budget,  # type: ignore[arg-type]
            [listener],  # type: ignore[list-item]
            run_shards_in_process,
        )

    def test_the_results_are_those_of_evaluate(
        self, trained: SimpleNamespace, asked: list[tuple[str, float, str]]
    ) -> None:
        ledger, listener = trained.ledger, Listener()
        # The limit is reached in the middle of the first attack: nothing is lost or written.
        self.attack(trained, Budget(3), listener)
        assert listener.told == [(0, False, 2)]
        assert numbers(ledger.find_waiting_finalists()) == [0, 1]
        shards = ledger.trial_path(0).working_path / "finalist-shards"
        assert list(shards.rglob("*.npz"))
        self.attack(trained, Budget(), listener)
        assert listener.told[1:] == [(0, False, 2), (0, True, 1), (1, False, 1), (1, True, 0)]
        assert not shards.exists(), "results are in the ledger"
        for trial in ledger.load_trials():
            checkpoint = read_checkpoint(ledger.best_checkpoint_path(trial))
            report = evaluate(
                load_trained_model(checkpoint, trained.data),
                trained.data.val.get_float_images(slice(None)),
                trained.data.val.y,
                self.build_short_attack(0.05),
                index=trained.data.val.index,
            )
            assert trial.finalist is not None
            assert trial.finalist.robust == report.robust_accuracy
            assert (trial.finalist.epoch, trial.finalist.n_examples) == (1, 20)
            assert (trial.finalist.eps, trial.finalist.norm) == (0.05, "Linf")
        assert set(asked) == {("autoattack", 0.05, "Linf")}
        results = [trial.finalist.robust for trial in ledger.load_trials()]
        order = np.argsort([-(result or 0) for result in results], kind="stable")
        assert numbers(ledger.rank_trials()) == order.tolist()
        self.attack(trained, Budget(0), listener)
        assert len(listener.told) == 5, "nothing is left to attack"

    def test_a_model_that_cannot_be_attacked_is_said_and_the_sweep_ends(
        self, trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from raysweep.sweep import finalist_attacks

        ledger = trained.ledger

        class Broken(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                raise ValueError("cannot run\non this machine")

        monkeypatch.setattr(finalist_attacks, "load_trained_model", lambda *a: Broken())
        self.attack(trained, Budget(), Listener())
        assert ledger.has_ended()
        lines = describe_finalists(ledger)
        assert [line.partition(": ")[0] for line in lines] == [
            "AutoAttack could not attack trial 0000",
            "AutoAttack could not attack trial 0001",
        ]
        assert all("\n" not in line for line in lines)

    def test_a_full_disk_is_an_error_of_the_surroundings(
        self, trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from raysweep.sweep import finalist_attacks

        def fail(*args: Any, **options: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(finalist_attacks, "evaluate", fail)
        with pytest.raises(OSError, match="No space"):
            self.attack(trained, Budget(), Listener())
        assert numbers(trained.ledger.find_waiting_finalists()) == [0, 1]
