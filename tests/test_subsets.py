"""Which N examples are taken: equally many of each class, by their shares, or the first ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny

from raysweep.checkpoint_evaluation import choose_evaluation_folder
from raysweep.cli import main
from raysweep.data import (
    DataSpec,
    Split,
    choose_covering_rows,
    choose_subset_rows,
    find_subset_warnings,
    load_data,
)
from raysweep.pipeline.autoattack import AutoAttackStage
from raysweep.pipeline.stage import TrainingOverrides
from raysweep.spec import json_digest
from raysweep.training.diagnostics import measure_natural_accuracy
from raysweep.training.model_loading import EvaluationTarget

SORTED = torch.arange(10).repeat_interleave(30)
NO_OVERRIDES = TrainingOverrides({}, {})

MODEL = """
import torch

class Bright(torch.nn.Module):
    # Right for classes whose image is bright enough: only the last five.
    def forward(self, x):
        level = (x.mean((1, 2, 3)) * 255 / 20).round()
        logits = -10 * (level[:, None] - torch.arange(10.0)).abs()
        return torch.where(level[:, None] >= 5, logits, logits.roll(1, 1))

def make():
    return Bright()
"""


def counts(y: torch.Tensor, rows: torch.Tensor, n_classes: int = 10) -> list[int]:
    return torch.bincount(y[rows], minlength=n_classes).tolist()


@pytest.mark.parametrize("n", [10, 40, 45, 7, 299])
def test_a_balanced_subset_has_equally_many_of_each_class(n: int) -> None:
    rows = choose_subset_rows(SORTED, n)
    assert len(set(rows.tolist())) == n and rows.tolist() == sorted(rows.tolist())
    found = counts(SORTED, rows)
    assert sum(found) == n and max(found) - min(found) <= 1
    assert torch.equal(rows, choose_subset_rows(SORTED, n)), "the same examples each time"
    larger = choose_subset_rows(SORTED, n + 1)
    assert set(rows.tolist()) <= set(larger.tolist())
    within = rows % 30
    assert n < 40 or (within.min() < 15 < within.max()), "not the first of each class"


def test_rare_classes_give_what_they_have() -> None:
    y = torch.cat([torch.zeros(500), torch.ones(90), torch.full((3,), 2.0)]).long()
    assert counts(y, choose_subset_rows(y, 63), 3) == [30, 30, 3]
    # By their shares: 60 of 593 are 50.6, 9.1 and 0.3.
    found = counts(y, choose_subset_rows(y, 60, "proportional"), 3)
    assert [round(60 * n / 593) for n in (500, 90, 3)] == pytest.approx(found, abs=1)


def test_the_first_and_all() -> None:
    assert choose_subset_rows(SORTED, 4, "first").tolist() == [0, 1, 2, 3]
    for n in (300, 301):
        assert choose_subset_rows(SORTED, n).tolist() == list(range(300))


@pytest.mark.parametrize(
    ("y", "n", "choice", "words"),
    [
        (SORTED, 40, "first", ["class 2, 3, 4, 5, 6 and 3 more of the 10 classes"]),
        (SORTED, 9, "balanced", ["no example of class"]),
        (SORTED, 40, "balanced", []),
        (torch.arange(300) % 10, 40, "first", []),
        (torch.tensor([0] * 100 + [1] * 20), 20, "balanced", ["20 to 100", "'proportional'"]),
        (torch.tensor([0] * 100 + [1] * 20), 20, "proportional", []),
    ],
)
def test_what_is_said_of_a_subset(y, n: int, choice, words: list[str]) -> None:
    lines = find_subset_warnings(y, choose_subset_rows(y, n, choice), choice)
    assert bool(lines) == bool(words) and all(word in lines[0] for word in words)


def test_measurements_take_the_first_examples_unless_these_lack_a_class() -> None:
    shuffled = SORTED[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    for y, is_first in ((shuffled, True), (SORTED, False)):
        x = (y * 25).to(torch.uint8).view(-1, 1, 1, 1)
        split = Split(x, y, torch.arange(300), 255)
        rows = choose_covering_rows(split, 100)
        assert isinstance(rows, slice) == is_first
        assert len(y[rows].unique()) == 10 and len(y[rows]) == 100

    class KnowsTheFirstTwo(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            level = (x.flatten(1).mean(1) * 255 / 25).round().long().clamp(max=1)
            return torch.nn.functional.one_hot(level, 10).float()

    # Of the first 60 it knows all; of all classes, two in ten.
    assert measure_natural_accuracy(KnowsTheFirstTwo(), split, 60) == pytest.approx(0.2)


def test_validation_on_some_test_images_takes_all_classes(tmp_path: Path) -> None:
    write_sorted_data(tmp_path, with_training=True)
    config = tiny("at", **{"validation.split": "test", "validation.size": 20})
    data = load_data(DataSpec(name="arrays", data_dir=tmp_path, val_size=10))
    chosen = config.validation.select_split(data)
    assert torch.bincount(chosen.y).tolist() == [2] * 10
    whole = config.replace(validation=config.validation.replace(size=None)).validation
    assert whole.select_split(data) is data.test


def write_sorted_data(folder: Path, with_training: bool = False) -> None:
    """A test set sorted by class, as that of an ImageFolder; pixel 20 k for class k."""
    y = SORTED.numpy()
    x = np.broadcast_to((20 * y).astype(np.uint8)[:, None, None, None], (300, 1, 8, 8))
    for part in ("test", "train")[: 1 + with_training]:
        np.savez(folder / f"{part}.npz", x=x, y=y)


@pytest.fixture
def own_model(workdir: Path, monkeypatch) -> list[str]:
    """Arguments to attack a model with a sorted test set and no training set."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    (workdir / "strangers_own.py").write_text(MODEL)
    write_sorted_data(workdir)
    data = ["--set", "data.name=arrays", "--data-dir", str(workdir)]
    return ["eval", "strangers_own:make", *data, "--attack", "apgd-ce", "--eps", "0", "--json"]


@pytest.mark.mlflow
def test_eval_takes_all_classes_of_a_sorted_test_set(own_model: list[str], capsys) -> None:
    reports = {}
    for choice in ("balanced", "first", "proportional", ""):
        given = ["--set", f"subset={choice}"] if choice else []
        assert main([*own_model, "--n", "40", *given]) == 0
        reports[choice] = json.loads(capsys.readouterr().out)
    assert reports[""]["folder"] == reports["balanced"]["folder"]
    assert len({report["folder"] for report in reports.values()}) == 3
    for choice in ("balanced", "proportional"):
        assert reports[choice]["clean_accuracy"] == 0.5
        assert [row["count"] for row in reports[choice]["per_class"].values()] == [4] * 10
    first = reports["first"]
    assert first["clean_accuracy"] == 0.0 and list(first["per_class"]) == ["0", "1"]
    assert "no example of class 2, 3, 4, 5, 6 and 3 more" in " ".join(first["warnings"])
    for choice, report in reports.items():
        card = json.loads((Path(report["folder"]) / "card.json").read_text())
        assert card["subset"] == report["subset"] == (choice or "balanced")
        assert card["examples"] == 40
    assert main(own_model) == 0
    whole = json.loads(capsys.readouterr().out)
    card = json.loads((Path(whole["folder"]) / "card.json").read_text())
    assert whole["clean_accuracy"] == 0.5 and "subset" not in card | whole


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--n", "4", "--set", "subset=last"], "subset=last: allowed are balanced, proportional"),
        (["--set", "subset=first"], "subset=first: has no effect without --n"),
        (["--set", "sub=first"], "only data.* settings matter to an evaluation, and subset"),
    ],
)
def test_wrong_choices_are_one_line(own_model: list[str], capsys, arguments, line: str) -> None:
    assert main([*own_model, *arguments]) == 2
    assert line in capsys.readouterr().err


def test_earlier_folders_keep_their_names(tmp_path: Path) -> None:
    """Version 0.1 took the first examples, and its key had no choice."""
    from raysweep.attacks import PGD

    target, spec, attack = EvaluationTarget(torch.nn.Identity(), "a:b"), DataSpec(), PGD()
    old_key = json_digest([attack.to_json_dict(), spec.to_stored_dict(), 40, 0])
    folders = {
        choice: choose_evaluation_folder(tmp_path, target, attack, spec, 40, subset=choice)
        for choice in ("first", "balanced", "proportional")
    }
    assert folders["first"].name == f"a.b-{old_key}" and len(set(folders.values())) == 3


def test_a_stage_with_n_runs_again_and_one_without_does_not() -> None:
    def content(**settings: object) -> str:
        return AutoAttackStage(**settings).digest()

    whole = {"kind": "autoattack", "attacks": {"AA": "autoattack"}, "n": None, "eps": None}
    whole |= {"norm": "Linf", "seed": 0, "batch_size": 500, "gpus": 1.0}
    assert content() == json_digest(whole)
    assert content(n=200, subset="first") == json_digest(whole | {"n": 200}), "as in version 0.1"
    contents = [content(n=200, subset=choice) for choice in ("first", "balanced", "proportional")]
    assert len({*contents, content(n=200)}) == 3
    for stage in (
        AutoAttackStage(n=200),
        AutoAttackStage(n=200, subset="first"),
        AutoAttackStage(),
    ):
        assert AutoAttackStage.from_data(stage.to_stored_dict(), stored=True) == stage
    assert AutoAttackStage(n=200).describe_stage(NO_OVERRIDES).startswith("AA (autoattack) on 200")
    problems = AutoAttackStage(subset="first").find_problems()
    assert problems == ["subset = 'first': has no effect without n"]


def test_own_code_needs_no_training_set_but_a_test_set(own_model: list[str], capsys) -> None:
    Path("test.npz").unlink()
    assert main([*own_model, "--n", "4"]) == 2
    assert "has no test.npz and no test.parquet" in capsys.readouterr().err


def test_a_validation_set_smaller_than_the_classes_is_said(caplog) -> None:
    load_data(DataSpec(name="digits", val_size=1))
    assert "data.val_size 1 is less than the number of classes, 10" in caplog.text
    assert "validation has no example" not in caplog.text


def test_a_test_set_without_a_class_is_said(tmp_path: Path, caplog) -> None:
    write_sorted_data(tmp_path, with_training=True)
    with np.load(tmp_path / "test.npz") as file:
        np.savez(tmp_path / "test.npz", x=file["x"][:270], y=file["y"][:270])
    load_data(DataSpec(name="arrays", data_dir=tmp_path, val_size=10))
    assert "test has no example of class 9" in caplog.text
