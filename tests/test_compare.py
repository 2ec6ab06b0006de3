"""`raysweep compare`: pairs on the same examples, with intervals that are computed here by hand."""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ONE_RUN, TINY, tiny

import raysweep
from raysweep.cli import main
from raysweep.errors import SpecError
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial
from raysweep.training.checkpoint import RunDirectory
from raysweep.training.config import TrainingConfig
from raysweep.training.selection import SelectionRule
from raysweep.training.trainer import train_model

LR = "optim.lr"


def make_sweep(folder: Path, method: str, rates: list[float], base_seeds: int = 0) -> Ledger:
    """A sweep whose trials have been trained, as its driver would leave it."""
    space = {
        "method": method,
        "trials": len(rates),
        "base": {**TINY, "data.train_size": 200},
        "space": {LR: {"float": [0.01, 0.5]}},
        "base_runs": base_seeds,
    }
    checked = SearchSpace.from_data(space).with_dataset_defaults().with_overrides(ONE_RUN)
    ledger = Ledger.create(folder, checked)
    trials = [Trial(number, {LR: rate}) for number, rate in enumerate(rates)]
    trials += [Trial(seed, {"seed": seed}, kind="base run") for seed in range(base_seeds)]
    for trial in trials:
        config = ledger.find_config(trial)
        ended = replace(trial, state="finished")
        for row in train_model(config, ledger.run_path(trial)).last_checkpoint.history:
            ended = ended.with_epoch(row, SelectionRule.from_config(config))
        ledger.save_trial(ledger.with_verdicts(ended))
    return ledger


def train_run(config: TrainingConfig, path: Path) -> None:
    """A run as `raysweep train` leaves it: by its key the command knows it again."""
    train_model(config, path)
    assert RunDirectory(path).run_key


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sweeps, one with base runs, and a training run on other data."""
    folder = tmp_path_factory.mktemp("compared")
    make_sweep(folder / "runs" / "g1", "gairat", [0.02, 0.2], base_seeds=2)
    make_sweep(folder / "runs" / "l1", "lrat", [0.1])
    for name, changes in OTHERS.items():
        config = tiny("at", **{"epochs": 1, **changes})
        train_run(config, folder / "runs" / name)
    return folder


OTHERS: dict[str, dict[str, Any]] = {
    "mine": {},
    "other-eps": {"validation__*__eps": 0.1},
    "other-steps": {"validation__attacks__pgd__steps": 3},
    "one-attack": {"validation__attacks": {"pgd": {"steps": 2}}},
    "other-images": {"data__split_seed": 1},
    "other-objective": {"validation__objective": "pgd"},
}


def agresti_min(first: np.ndarray, second: np.ndarray, n: int, variance: float) -> list[float]:
    """The interval by its definition: half an example more in each cell of the 2x2 table."""
    cells = {(a, b): np.sum((first == a) & (second == b)) + 0.5 for a in (0, 1) for b in (0, 1)}
    total = sum(cells.values())
    only_first, only_second = cells[1, 0] / total, cells[0, 1] / total
    middle = only_first - only_second
    spread = (only_first + only_second - middle**2) / total + variance
    quantile = statistics.NormalDist().inv_cdf(1 - 0.05 / n / 2)
    return [middle - quantile * math.sqrt(spread), middle + quantile * math.sqrt(spread)]


def test_the_best_trials_are_compared_on_the_same_examples(folder: Path) -> None:
    comparison = raysweep.compare("g1", "l1", out=folder)
    g1, l1 = (Ledger.open(folder / "runs" / name) for name in ("g1", "l1"))
    best = [ledger.rank_trials()[0] for ledger in (g1, l1)]
    masks = [trial.best_verdicts.mask.astype(int) for trial in best]  # type: ignore[union-attr]
    pair, beside_base = comparison.pairs
    assert pair.attack == "robust_worst" and pair.n_examples == len(masks[0])
    assert pair.difference.difference == pytest.approx(masks[0].mean() - masks[1].mean())
    base = [run.best_verdicts.mask.astype(int) for run in g1.load_base_runs()]  # type: ignore[union-attr]
    accuracies = [mask.mean() for mask in base]
    # The variance of one accuracy by the choice of the examples, from the two base runs.
    half = np.var(base[0] - base[1], ddof=1) / 2 / len(base[0])
    training = max(0.0, statistics.variance(accuracies) - half)
    expected = agresti_min(masks[0], masks[1], 2 * 1, 2 * training)
    assert [pair.difference.low, pair.difference.high] == pytest.approx(expected)
    assert comparison.has_training_variance
    assert pair.verdict == "cannot tell" or not expected[0] < 0 < expected[1]
    (row,) = comparison.base_rows
    assert row.metrics["robust_worst"] == pytest.approx(statistics.fmean(accuracies))
    assert beside_base.second == "g1 (base at, 2 seeds)"
    assert beside_base.difference.difference == pytest.approx(
        masks[0].mean() - statistics.fmean(accuracies)
    )
    table = comparison.table
    assert list(table["trials"])[:2] == [2, 1]
    assert table.loc["l1 (lrat, trial 0000)", "robust_worst"] == pytest.approx(masks[1].mean())


def test_a_trial_and_a_training_run_stand_for_themselves(folder: Path) -> None:
    comparison = raysweep.compare("g1/0001", "mine", "g1/base-0000", out=folder)
    assert [run.n_choices for run in comparison.runs] == [1, 1, 1] and not comparison.base_rows
    assert [pair.n_comparisons for pair in comparison.pairs] == [3, 3, 3]
    assert "leave out the randomness of training" in comparison.describe()[-1]


def test_autoattack_decides_where_it_attacked_both(folder: Path, tmp_path: Path) -> None:
    import shutil

    from raysweep.sweep.finalist_result import FinalistResult
    from raysweep.training.example_verdicts import ExampleVerdicts

    shutil.copytree(folder / "runs", tmp_path / "runs")
    rng = np.random.default_rng(0)
    index = np.arange(50)
    masks = {"g1": np.ones(50, bool), "l1": rng.random(50) < 0.2}
    for name, mask in masks.items():
        ledger = Ledger.open(tmp_path / "runs" / name)
        trial = ledger.rank_trials()[0]
        epoch = int(trial.best["epoch"])
        verdicts = ExampleVerdicts.from_mask("autoattack", epoch, mask, index)
        result = FinalistResult(epoch, float(mask.mean()), 50, 0.15, "Linf", verdicts=verdicts)
        ledger.save_trial(replace(trial, finalist=result))
    pair = raysweep.compare("g1", "l1", out=tmp_path).pairs[0]
    assert pair.attack == "AutoAttack" and pair.verdict == "better"
    assert pair.difference.difference == pytest.approx(1 - masks["l1"].mean())
    assert pair.describe().startswith("g1 (gairat, trial 000") and " beats l1 (lrat" in (
        pair.describe()
    )


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (("g1",), "name two or more different"),
        (("g1", "g1"), "name two or more different"),
        ((), "compare without names: name two or more different"),
        ((3, "g1"), "compare = 3: is not a name or a folder"),
        (("mine", Path("runs/mine")), "compare mine runs/mine: both are "),
        (("g1", "g2"), "no sweep, trial or training run 'g2'; nearest: g1"),
        (("l1", "other-eps"), "different threat models: Linf eps 0.15 and Linf eps 0.1"),
        (("l1", "other-steps"), "different attacks: validation.attacks.pgd.steps = 2 and 3"),
        (("l1", "one-attack"), "validation.attacks.pgd.step_size.kind = eps and nothing"),
        (("l1", "other-images"), "were validated on different images: set data.val_size"),
        (("l1", "other-objective"), "different objectives: robust_worst and pgd"),
        (("mine", "g1", "g1/0007"), "g1 has no trial 0007"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    names: tuple[str, ...], line: str, folder: Path
) -> None:
    with pytest.raises(SpecError) as caught:
        raysweep.compare(*names, out=folder)
    (problem,) = caught.value.problems
    assert line in problem


def test_other_data_are_refused(folder: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (120, 1, 8, 8), dtype=np.uint8)
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", x=x, y=np.arange(120) % 10)
    config = tiny("at", epochs=1, data__name="arrays", data__data_dir=str(tmp_path))
    train_run(config, tmp_path / "run")
    with pytest.raises(SpecError, match=r"different data: digits \(.*\) and arrays \("):
        raysweep.compare(str(folder / "runs" / "l1"), str(tmp_path / "run"))


def test_a_sweep_without_a_result_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        ledger = Ledger.create(
            tmp_path / "runs" / name,
            SearchSpace.from_data({"method": "at", "space": {LR: {"float": [0.1, 0.2]}}}),
        )
        ledger.save_trial(Trial(0, {LR: 0.1}))
    with pytest.raises(SpecError, match="compare a: no trial has ended with a result yet"):
        raysweep.compare("a", "b", out=tmp_path)
    with pytest.raises(SpecError, match="compare a/0: it has not ended with a result yet"):
        raysweep.compare("a/0", "b", out=tmp_path)


def test_the_command_prints_a_table_and_writes_a_figure(folder: Path, capsys) -> None:
    assert main(["compare", "g1", "l1", "--out", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].split() == ["run", "clean", "robust", "worst"]
    assert lines[1].startswith("g1 (gairat, trial 000") and lines[3].startswith("g1 (base at, 2")
    figure = Path(lines[-1].strip())
    assert figure == folder / "runs" / "comparisons" / "g1-vs-l1.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    comparison = raysweep.compare("g1", "l1", out=folder)
    assert all(line in lines for line in comparison.describe())
    assert main(["compare", "g1", "l1", "--out", str(folder), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {**comparison.to_json_dict(), "figure": str(figure)}
    # A figure of its own for each comparison, whatever the lengths and letters of the names.
    for number in range(2):
        link = folder / f"{'é' * 55}{number}"
        link.symlink_to(folder / "runs" / "l1")
        assert main(["compare", "g1", str(link), "--out", str(folder)]) == 0
        assert capsys.readouterr().err == ""
    assert len(list(figure.parent.iterdir())) == 3
    # The panels: natural accuracy and objective over epochs, and each difference.
    panels = comparison.plot().axes
    assert [axes.get_ylabel() for axes in panels[:2]] == [
        "natural accuracy", "accuracy in the worst case"
    ]  # fmt: skip
    assert len(panels[2].get_yticks()) == len(comparison.pairs)
