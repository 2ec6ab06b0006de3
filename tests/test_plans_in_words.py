"""A plan says what will happen: images, classes, attacks, rates, ranges and what cannot act."""

import json
from pathlib import Path

import numpy as np
import pytest

from raysweep.cli import main
from raysweep.data import load_data
from raysweep.schedules import CosineSchedule, InterpolatedSchedule, PiecewiseSchedule
from raysweep.sweep.search_space import Distribution
from raysweep.training.config import build_training_config
from raysweep.training.training_summary import describe_schedule, summarize_training

# 3 classes with 30, 20 and 10 training images of 6 x 8 pixels.
LABELS = [0] * 30 + [1] * 20 + [2] * 10


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    rng = np.random.default_rng(0)
    for name, labels in (("train", LABELS), ("test", [0, 1, 2])):
        x = rng.integers(0, 256, (len(labels), 3, 6, 8), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", x=x, y=np.array(labels))
    return tmp_path


def test_the_summary_of_a_run(folder: Path) -> None:
    # A fifth of 60 is 12: four of each class would be 40% of the last, so at most a fifth of each.
    config = build_training_config("fat", {"data.data_dir": str(folder), "epochs": 15})
    data = load_data(config.data)
    train, val = (np.bincount(split.y.numpy()) for split in (data.train, data.val))
    assert (train + val).tolist() == [30, 20, 10] and val.sum() == 12
    assert summarize_training(config, data) == [
        "images      arrays, 6 x 8 pixels, 3 channels: 48 for training, 12 for",
        "            validation, 3 for test",
        f"classes     3; of each {train.min()} to {train.max()} for training, {val.min()} to "
        f"{val.max()} for validation",
        "model       digits_cnn, batches of 64",
        "attack      pgd: Linf, eps 0.03137 (8/255), 10 steps of 0.007843 (2/255)",
        "validation  each epoch; the best epoch is chosen by robust_worst",
        "            pgd: Linf, eps 0.03137 (8/255), 20 steps of 0.25 eps",
        "            cw: Linf, eps 0.03137 (8/255), 20 steps of 0.25 eps",
        "            multi_targeted: Linf, eps 0.03137 (8/255), up to 40 runs of 5 steps",
        "rate        0.05",
    ]


def test_what_is_searched_has_no_value(folder: Path) -> None:
    config = build_training_config("gairat", {"data.data_dir": str(folder)})
    paths = ["*.burn_in", "method.attacks.pgd.eps", "optim.lr.values", "batch_size"]
    lines = summarize_training(config, load_data(config.data), paths)
    assert "weights     of pgd act: (searched)" in lines
    assert "model       digits_cnn, batches of (searched)" in lines
    assert "attack      pgd: Linf, eps (searched), 10 steps of 0.007843 (2/255)" in lines
    assert "rate        a schedule, of which a part is searched" in lines


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (0.1, "0.1"),
        (8 / 255, "0.03137 (8/255)"),
        (PiecewiseSchedule(boundaries=(5, 7), values=(0.05, 0.01, 0.002)),
         "0.05, 0.01 after 5 epochs, 0.002 after 7"),
        (PiecewiseSchedule(boundaries=(1, 9), values=(0.05, 0.01, 0.002)),
         "0.05, 0.01 after 1 epoch"),
        (CosineSchedule(first=0.1, end=8), "from 0.1 to 0 along half a cosine in epochs 0 to 8"),
        (InterpolatedSchedule(epochs=(0, 4), values=(0, 1)),
         "on lines through 0 at 0, 1 at 4 epochs"),
    ],
)  # fmt: skip
def test_a_schedule_in_words(schedule: object, words: str) -> None:
    assert describe_schedule(schedule, 8) == words  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("distribution", "words"),
    [
        ({"float": [0.25, 4], "log": True},
         "from 0.25 to 4, each order of magnitude equally likely"),
        ({"int": [2, 8], "step": 2}, "whole numbers from 2 to 8, in steps of 2"),
        ({"categorical": ["tanh", 3, None]}, "one of tanh, 3, null"),
        ({"categorical": [0.1]}, "0.1"),
        ({"float": [-1, 1], "when": {"a.shape": ["tanh", "sigmoid"], "b": True}},
         "from -1 to 1; only if a.shape is tanh or sigmoid and b is true"),
    ],
)  # fmt: skip
def test_a_range_in_words(distribution: dict[str, object], words: str) -> None:
    assert Distribution.from_data(distribution).describe() == words


SHORT = ["--set", "epochs=4", "--set", "*.attacks.*.steps=4", "--set", "validation.finish={}"]


@pytest.mark.parametrize(
    ("command", "warning"),
    [
        (["train", "gairat"], "of pgd act: after 10 epochs"),
        (
            ["tune", "gairat"],
            "warning: method.terms.pgd.weight.burn_in in [3, 20]: at 4 to 20: the",
        ),
        (
            ["run", "p.yaml"],
            "tune: method.terms.pgd.weight.burn_in in [3, 20]: at 4 to 20: the weights",
        ),
    ],
)
def test_the_plans_of_the_commands(
    folder: Path, command: list[str], warning: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "p.yaml").write_text("stages: [{kind: tune, space: gairat}]\n")
    before = sorted(folder.iterdir())
    assert main([*command, "--plan", "--data-dir", str(folder), *SHORT]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    text = " ".join(output.out.split())
    assert "arrays, 6 x 8 pixels, 3 channels: 48 for training, 12 for validation" in text
    assert "classes 3; of each" in text
    assert "pgd: Linf, eps 0.03137 (8/255), 4 steps of 0.007843 (2/255)" in text
    assert "rate 0.05 weights" in text, "the later rates are not reached"
    assert warning in text + output.err
    if command[0] != "run":
        assert all(len(line) <= 80 or " " not in line.strip() for line in lines)
    assert sorted(folder.iterdir()) == before, "a plan writes nothing"


@pytest.mark.parametrize("command", [["train", "at"], ["tune", "at"], ["run", "p.yaml"]])
def test_plans_warn_of_few_validation_images(
    folder: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "p.yaml").write_text("stages: [{kind: tune, space: at}]\n")
    options = ["--data-dir", str(folder), *SHORT, "--set", "data.val_size=1"]
    assert main([*command, "--plan", *options]) == 0
    output = capsys.readouterr()
    text = " ".join((output.out + output.err).split())
    assert text.count("1 validation image: guessing may get all of them right") == 1


def test_plans_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["train", "gairat"], ["tune", "gairat"]):
        assert main([*command, "--plan", "--json", "--data-dir", str(folder), *SHORT]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["image_shape"] == [3, 6, 8]
        counts = zip(
            plan["train_examples_per_class"], plan["validation_examples_per_class"], strict=True
        )
        assert [sum(pair) for pair in counts] == [30, 20, 10]
        assert any("the weights never act" in line for line in plan["warnings"])
