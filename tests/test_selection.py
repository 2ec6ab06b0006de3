"""Which epoch of a run is its best, and which trial of a sweep: by hand, and in real training."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny

from raysweep.cli import main
from raysweep.result_loading import Sweep, describe_guessing
from raysweep.spec import SpecError
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.optuna_study import build_study
from raysweep.sweep.search_space import SearchSpace, load_space
from raysweep.sweep.trial import Trial
from raysweep.training.checkpoint import RunDirectory
from raysweep.training.config import TrainingConfig, build_training_config
from raysweep.training.metric_advice import advise_on_training
from raysweep.training.model_loading import load_checkpoint_target
from raysweep.training.presets import resolve_training_config
from raysweep.training.selection import (
    SelectionRule,
    can_guess_all_labels,
    compute_chance_limit,
    find_best_burn_in_metrics,
    find_best_epoch,
)
from raysweep.training.trainer import train_model

BURN_IN = "*.burn_in"


def gairat(burn_in: int, epochs: int = 6) -> TrainingConfig:
    return build_training_config("gairat", {BURN_IN: burn_in, "epochs": epochs})


def rows(*values: float | None, clean: float = 0.9) -> list[dict[str, float]]:
    """Metrics of epochs 1, 2, ...; None for an epoch without validation."""
    made = []
    for epoch, value in enumerate(values, 1):
        row = {"epoch": float(epoch)}
        if value is not None:
            row |= {"robust_worst": value, "clean": clean, "val/chance_limit": 0.2}
        made.append(row)
    return made


@pytest.mark.parametrize(
    ("burn_in", "values", "best"),
    [
        (0, (0.7, 0.6, 0.5), 1),
        (1, (0.7, 0.6, 0.5), 2),
        (2, (0.7, 0.6, 0.5), 3),
        (2, (0.7, 0.6, None), 1),
        (3, (0.6, 0.7, 0.5), 2),
        (0, (0.5, 0.7, 0.7), 2),
        (0, (None, None, 0.0), 3),
        (1, (0.7, 0.0, 0.0), 2),
    ],
)
def test_epochs_after_the_burn_in_come_first(burn_in: int, values: Any, best: int) -> None:
    assert find_best_epoch(gairat(burn_in), rows(*values)) == best


def test_the_margin_breaks_ties_of_the_objective_and_nothing_else() -> None:
    history = rows(0.5, 0.7, 0.7, 0.7)
    for row, margin in zip(history, (0.9, 0.3, 0.4, 0.2), strict=True):
        row["robust_margin"] = margin
    assert find_best_epoch(gairat(0), history) == 3
    assert find_best_epoch(gairat(3), history) == 4, "a burn-in counts more"
    trial = Trial(0, {}, burn_in=0)
    for row in history:
        trial = trial.with_epoch(row, SelectionRule("robust_worst"))
    assert trial.best["epoch"] == 3
    config = gairat(0).replace(validation=gairat(0).validation.replace(objective="pgd"))
    of_pgd = [{**row, "pgd": row["robust_worst"]} for row in history]
    assert find_best_epoch(config, of_pgd) == 2, "the margin belongs to the worst case"
    del history[2]["robust_margin"]
    assert find_best_epoch(gairat(0), history) == 2, "an epoch of an earlier version"


@pytest.mark.parametrize("missing", [None, math.nan])
def test_the_margin_ranks_trials_with_the_same_objective(
    tmp_path: Path, missing: float | None
) -> None:
    ledger = Ledger.create(tmp_path, load_space("at", {}))
    values = [(0.5, missing), (0.5, 0.2), (0.5, missing), (0.5, 0.3), (0.6, 0.1)]
    for number, (worst, margin) in enumerate(values):
        metrics = {"epoch": 2.0, "clean": 0.9, "robust_worst": worst}
        metrics |= {} if margin is None else {"robust_margin": margin}
        ledger.save_trial(Trial(number, {}, "finished", 2, metrics, metrics, burn_in=0))
    assert [trial.number for trial in ledger.rank_trials()] == [4, 3, 1, 0, 2]


def test_a_model_at_chance_is_never_the_best_while_there_is_another() -> None:
    history = rows(0.06, 0.05)
    history += [{"epoch": 3.0, "robust_worst": 0.1, "clean": 0.2, "val/chance_limit": 0.2}]
    assert find_best_epoch(gairat(0), history) == 1
    assert find_best_epoch(gairat(2), history) == 1, "the burn-in is better than guessing"
    assert find_best_epoch(gairat(0), history, {2, 3}) == 2, "among those that were kept"


def test_the_limit_of_chance_is_two_standard_deviations_above_it() -> None:
    # Ten classes and 900 examples: the standard deviation of guessing is sqrt(0.09 / 900) = 0.01.
    assert compute_chance_limit(10, 900) == pytest.approx(0.12)


def test_a_constant_prediction_of_the_most_frequent_class_is_guessing() -> None:
    # 60 of 100 examples are of one class: 0.6 + 2 sqrt(0.6 x 0.4 / 100) = 0.698.
    assert compute_chance_limit(3, 100, 60) == pytest.approx(0.698, abs=5e-4)
    # 34 of 100 in one of three classes is as equal as it can be.
    assert compute_chance_limit(3, 100, 34) == compute_chance_limit(3, 100)


def guessing_sweep(folder: Path, clean: tuple[float, ...]) -> Ledger:
    """A sweep of five constant predictors of three classes, as found: each column is 0.333."""
    ledger = Ledger.create(folder, load_space("at", {}))
    for number, value in enumerate(clean):
        row = dict.fromkeys(("clean", "pgd", "cw", "robust_worst"), value)
        metrics = {"epoch": 2.0, "masking_gap": 0.0, "val/chance_limit": 0.419, **row}
        ledger.save_trial(Trial(number, {}, "finished", 2, metrics, metrics, burn_in=0))
    return ledger


def test_a_sweep_of_constant_predictors_says_so(tmp_path: Path) -> None:
    ledger = guessing_sweep(tmp_path / "all", (1 / 3,) * 5)
    (line,) = describe_guessing(ledger)
    assert line.startswith("no trial is better than guessing: at most 0.333 of natural images")
    assert "guessing reaches 0.419" in line
    assert not any(ledger.rank_trial(trial).is_eligible for trial in ledger.load_trials())
    assert ledger.describe_choice(ledger.load_trials()[0]) == "no better than chance"
    ledger = guessing_sweep(tmp_path / "one", (1 / 3, 0.45, 1 / 3))
    best = ledger.find_best_trial()
    assert describe_guessing(ledger) == [] and best is not None and best.number == 1
    assert describe_guessing(Ledger.create(tmp_path / "none", load_space("at", {}))) == []


def test_a_sweep_of_constant_predictors_is_shown_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guessing_sweep(tmp_path / "runs" / "g", (1 / 3,) * 5)
    assert main(["show", "g", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("no trial is better than guessing: ") for line in lines) == 1
    assert sum("no better than chance" in line for line in lines) == 5


def test_the_advice_for_a_run_that_guesses_is_not_about_overfitting() -> None:
    row = {"clean": 1 / 3, "pgd": 1 / 3, "val/chance_limit": 0.419}
    history = [
        {"epoch": 1.0, "robust_worst": 1 / 3, **row},
        {"epoch": 2.0, "robust_worst": 0.0, **row},
    ]
    (line,) = advise_on_training(build_training_config("at"), history)
    assert line.startswith("no epoch is better than guessing: 0.333 of natural images are right")
    better = [{**metrics, "val/chance_limit": 0.3} for metrics in history]
    (line,) = advise_on_training(build_training_config("at"), better)
    assert "robust overfitting" in line


def test_a_trial_and_its_run_choose_the_same_epoch(tmp_path: Path) -> None:
    """Whatever the values are: the trial sees one epoch after the other, the run all of them."""
    values = (0.5, 0.75, 0.25, 0.5, 0.5, 0.625, 0.0)
    for burn_in in range(8):
        history, trial = rows(*values), Trial(0, {}, burn_in=burn_in)
        for row in history:
            trial = trial.with_epoch(row, SelectionRule("robust_worst", burn_in))
        assert trial.best["epoch"] == find_best_epoch(gairat(burn_in, 7), history)
        before = find_best_burn_in_metrics(gairat(burn_in, 7), history)
        assert trial.best_in_burn_in == before
        assert before.get("robust_worst", -1) == max(values[:burn_in], default=-1)


def small_gairat(burn_in: int) -> TrainingConfig:
    """Five epochs, of which the third is the best one whenever the weights begin to act."""
    changes = {BURN_IN: burn_in, "*.lam": -2.0, "optim.lr": 0.05, "data.train_size": 128}
    return tiny("gairat", epochs=5, **changes)


def test_training_keeps_the_best_epoch_after_the_burn_in(tmp_path: Path) -> None:
    result = train_model(small_gairat(3), tmp_path)
    scores = [row["robust_worst"] for row in result.last_checkpoint.history]
    assert scores.index(max(scores)) == 2, "the burn-in was better"
    best = 4 + scores[3:].index(max(scores[3:]))
    assert result.best_checkpoint.epoch == best
    assert set(RunDirectory(tmp_path).list_saved_epochs()) == {best, 5}
    assert load_checkpoint_target(tmp_path, {}).name.endswith(f"epoch-{best:04d}")


@pytest.mark.parametrize("is_recorded_by_an_earlier_version", [True, False])
def test_a_run_of_an_earlier_version_keeps_the_epoch_that_it_chose(
    is_recorded_by_an_earlier_version: bool, tmp_path: Path
) -> None:
    """That version counted the epochs of the burn-in, and kept the best of all and the last."""
    best = train_model(small_gairat(0), tmp_path).best_checkpoint.epoch
    assert best < 5
    file = tmp_path / "epoch-0005" / "meta.json"
    meta = json.loads(file.read_text())
    meta["config"]["method"]["terms"]["pgd"]["weight"]["burn_in"] = best
    if is_recorded_by_an_earlier_version:
        del meta["best_after_burn_in"]
    file.write_text(json.dumps(meta))
    chosen = best if is_recorded_by_an_earlier_version else 5
    assert load_checkpoint_target(tmp_path, {}).name.endswith(f"epoch-{chosen:04d}")


def make_sweep(path: Path, *trials: Trial) -> Ledger:
    data = {
        "method": "gairat",
        "trials": len(trials),
        "base": {"epochs": 6, BURN_IN: 2},
        "space": {"*.lam": {"float": [-2.0, 0.0]}},
        "scheduler": {"kind": "none"},
    }
    ledger = Ledger.create(path, SearchSpace.from_data(data))
    for trial in trials:
        ledger.save_trial(trial)
    return ledger


def made_trial(number: int, state: Any, *values: float, burn_in: int | None = 2) -> Trial:
    trial = Trial(number, {"*.lam": -1.0}, burn_in=burn_in)
    for row in rows(*values):
        trial = trial.with_epoch(row, SelectionRule("robust_worst", burn_in or 0))
    return Trial(**{**trial.__dict__, "state": state})


def test_a_failed_trial_and_one_whose_weights_never_acted_are_never_the_best(
    tmp_path: Path,
) -> None:
    ledger = make_sweep(
        tmp_path / "s",
        made_trial(0, "failed", 0.1, 0.2, 0.9),
        made_trial(1, "finished", 0.7, 0.8),
        made_trial(2, "finished", 0.7, 0.1, 0.06),
        made_trial(3, "stopped", 0.7, 0.1, 0.05),
    )
    assert [trial.number for trial in ledger.rank_trials()] == [2, 3, 1, 0]
    assert [trial.number for trial in ledger.unmasked_pareto_front()] == [2]
    assert Sweep(ledger).best.parent.name == "0002"
    table = Sweep(ledger).trials
    assert table.choice.tolist() == ["", "", "best before its weights acted", ""]
    assert table.before.tolist() == [0.7, 0.7, 0.8, 0.2]
    study = build_study(ledger)
    assert study.best_trial.user_attrs["raysweep.number"] == 2
    assert [trial.state.name for trial in study.trials] == ["FAIL", "FAIL", "COMPLETE", "PRUNED"]


def test_a_sweep_of_failed_trials_has_no_best_one(tmp_path: Path) -> None:
    ledger = make_sweep(tmp_path / "s", made_trial(0, "failed", 0.1, 0.2, 0.9))
    assert ledger.find_best_trial() is None
    with pytest.raises(Exception, match="except failed ones"):
        _ = Sweep(ledger).best


def test_in_a_sweep_of_an_earlier_version_the_recorded_best_stands_and_is_marked(
    tmp_path: Path,
) -> None:
    ledger = make_sweep(
        tmp_path / "s",
        made_trial(0, "finished", 0.8, 0.7, 0.3, burn_in=None),
        made_trial(1, "finished", 0.1, 0.2, 0.5, burn_in=None),
    )
    first, second = ledger.rank_trials()
    assert (first.number, second.number) == (0, 1)
    assert ledger.describe_choice(first) == "best before its weights acted"
    assert ledger.describe_choice(second) == ""


def test_a_trial_of_an_earlier_version_that_goes_on_is_judged_anew(tmp_path: Path) -> None:
    """Its folder has checkpoints of the recorded best, within the burn-in, and of the last."""
    old = made_trial(0, "running", 0.8, 0.7, 0.3, burn_in=None)
    assert old.best["epoch"] == 1
    resumed = old.with_rule(SelectionRule("robust_worst", 2))
    assert resumed.best["epoch"] == 3 and resumed.best_in_burn_in["epoch"] == 1
    assert resumed.with_rule(SelectionRule("robust_worst")) is resumed


def test_advice_says_that_reweighting_made_it_worse() -> None:
    (line,) = advise_on_training(gairat(4), rows(0.3, 0.5, 0.6, 0.730, 0.690, 0.690))
    assert line == "reweighting made this worse: robust worst 0.730 before it acted, 0.690 after"
    assert advise_on_training(gairat(4), rows(0.3, 0.5, 0.6, 0.7, 0.7, 0.69)) == []


@pytest.mark.parametrize(
    ("every", "boundaries", "validated"),
    [
        (1, [], [1, 2, 3, 4, 5, 6]),
        (4, [], [4, 6]),
        (4, [2], [2, 3, 4, 6]),
        (5, [1, 4], [1, 2, 4, 5, 6]),
        (9, [6], [6]),
    ],
)
def test_epochs_around_a_drop_of_the_learning_rate_are_validated(
    every: int, boundaries: list[int], validated: list[int]
) -> None:
    values = [0.1 / 10**index for index in range(len(boundaries) + 1)]
    lr = {"kind": "piecewise", "boundaries": boundaries, "values": values}
    config = build_training_config("at", {"epochs": 6, "validation.every": every, "optim.lr": lr})
    assert [epoch + 1 for epoch in range(6) if config.is_validated(epoch)] == validated


@pytest.mark.parametrize(
    ("window", "best"), [(None, 3), ((1, 2), 1), ((4, 6), 5), ((6, 6), 6), ((5, 99), 5)]
)
def test_the_best_epoch_is_one_of_the_window(window: Any, best: int) -> None:
    """A window that ends within the burn-in has no epoch that counts: the best in it is taken."""
    config = build_training_config("gairat", {BURN_IN: 2, "epochs": 6, "validation.window": window})
    assert find_best_epoch(config, rows(0.9, 0.8, 0.7, 0.5, 0.6, 0.4)) == best


def test_the_protocol_of_the_papers_chooses_on_the_test_images(tmp_path: Path) -> None:
    config = resolve_training_config("gairat-table1", {"protocol": "paper"})
    ours = resolve_training_config("gairat-table1", {})
    assert (config.validation.objective, config.validation.split) == ("pgd", "test")
    assert config.validation.window == (59, 100)
    assert (ours.validation.objective, ours.validation.split) == ("robust_worst", "val")
    assert ours.validation.window is None and config.method == ours.method
    assert any("chosen on the test images" in line for line in config.list_warnings())
    with pytest.raises(SpecError, match="no protocol 'papers'; nearest: paper"):
        resolve_training_config("gairat-table1", {"protocol": "papers"})
    with pytest.raises(SpecError, match="no protocol 'paper'"):
        resolve_training_config("gairat", {"protocol": "paper"})
    file = tmp_path / "mine.yaml"
    file.write_text("extends: gairat-table1\nprotocol: paper\nepochs: 90\n")
    mine = resolve_training_config(str(file), {})
    assert (mine.epochs, mine.validation.split) == (90, "test")


def test_validation_on_the_test_images_is_of_them(tmp_path: Path) -> None:
    """Clean accuracy of the recorded epochs, computed again on both splits."""
    config = tiny("at", epochs=1, **{"data.train_size": 320, "validation.split": "test"})
    result = train_model(config, tmp_path)
    target = load_checkpoint_target(tmp_path, {})
    assert target.data is not None
    accuracies = []
    for split in (target.data.test, target.data.val):
        logits = target.model(split.get_float_images(slice(None)))
        accuracies.append((logits.argmax(1) == split.y).float().mean().item())
    assert result.last_checkpoint.last_metrics["clean"] == pytest.approx(accuracies[0])
    assert abs(accuracies[0] - accuracies[1]) > 1e-3


def test_later_settings_leave_earlier_digests_as_they_are() -> None:
    config = tiny("at")
    assert {"split", "window"} & config.to_stored_dict()["validation"].keys() == set()
    changed = tiny("at", **{"validation.window": [1, 2], "validation.split": "test"})
    assert changed.to_stored_dict()["validation"]["window"] == [1, 2]
    assert changed.digest() != config.digest()
    assert TrainingConfig.from_data(changed.to_stored_dict(), stored=True) == changed
    with pytest.raises(SpecError, match="the first epoch, 3, comes after the last, 2"):
        tiny("at", **{"validation.window": [3, 2]})


def test_all_right_is_never_called_a_guess() -> None:
    """With two of four images right by chance, two standard deviations more are all four."""
    assert compute_chance_limit(2, 4) == 0.75 and can_guess_all_labels(2, 4)
    assert compute_chance_limit(2, 1) == 0.0 and can_guess_all_labels(2, 1)
    assert compute_chance_limit(2, 5) == 0.8 and not can_guess_all_labels(2, 5)
    assert compute_chance_limit(3, 9, 7) == pytest.approx(8 / 9), "7 of 9 are of one class"
