"""`raysweep eval --bundle` and `--verify`: a claim that can be checked, and a false one that is
caught.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from raysweep.cli import main

SMALL = ["--set", "epochs=2", "--set", "data.val_size=50", "--set", "*.attacks.*.steps=2"]


@pytest.fixture(scope="module")
def bundle(one_core, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bundle")
    assert main(["train", "at", *SMALL, "--name", "mine", "--out", str(out)]) == 0
    command = [
        "eval",
        str(out / "runs" / "mine"),
        "--attack",
        "apgd-ce",
        "--n",
        "40",
        "--out",
        str(out),
    ]
    assert main([*command, "--bundle", str(out / "claim")]) == 0
    assert main([*command, "--bundle", str(out / "claim")]) == 2, "it is not overwritten"
    return out / "claim"


def test_a_sound_bundle(bundle: Path, capsys) -> None:
    assert {path.name for path in bundle.iterdir()} == {
        "card.json",
        "adversarial.npz",
        "checkpoint",
    }
    assert main(["eval", "--verify", str(bundle), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (
        said["sound"] and said["card"]["examples"] == 40 and said["card"]["threat_model"] == "Linf"
    )


def _far(arrays, card) -> None:
    arrays["x_adv"][int(np.flatnonzero(~arrays["robust"])[0])] = 0.5


def _outside(arrays, card) -> None:
    arrays["x_adv"] -= 0.01


def _not_adversarial(arrays, card) -> None:
    """A robust example that is said to be broken keeps its own image."""
    arrays["robust"][int(np.flatnonzero(arrays["robust"])[0])] = False


def _deny(arrays, card) -> None:
    """What the attack broke is said to be robust."""
    arrays["robust"][:] = True


def _boast(arrays, card) -> None:
    card["robust_accuracy"] += 0.05


def _mislabel(arrays, card) -> None:
    arrays["labels"][0] = (arrays["labels"][0] + 1) % 10


def _crop(arrays, card) -> None:
    arrays["x_adv"] = arrays["x_adv"][:, :, 1:]


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (_far, "farther than eps 0.15"),
        (_outside, "outside [0, 1]"),
        (_not_adversarial, "claimed broken, but classified correctly"),
        (_deny, "claimed robust, but broken by their stored adversarial example"),
        (_boast, "the card says"),
        (_mislabel, "the labels are not the test set's"),
        (_crop, "its examples are (1, 7, 8), the test set's (1, 8, 8)"),
    ],
)
def test_a_lie_is_caught(lie, words, bundle: Path, tmp_path: Path, capsys) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    card = json.loads((copy / "card.json").read_text())
    arrays = dict(np.load(copy / "adversarial.npz"))
    lie(arrays, card)
    np.savez(copy / "adversarial.npz", **arrays)
    (copy / "card.json").write_text(json.dumps(card))
    assert main(["eval", "--verify", str(copy)]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("card", "arrays", "words"),
    [
        ({"norm": "L3"}, {}, "card.json has norm = 'L3'"),
        ({"eps_value": None}, {}, "not a bundle"),
        ({}, {"robust": np.ones(40)}, "robust in adversarial.npz is float64 (40,)"),
        ({}, {"index": np.arange(39)}, "index in adversarial.npz is int64 (39,)"),
    ],
)
def test_a_foreign_bundle_is_one_line(
    card, arrays, words, bundle: Path, tmp_path: Path, capsys
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    (copy / "card.json").write_text(json.dumps(json.loads((copy / "card.json").read_text()) | card))
    np.savez(copy / "adversarial.npz", **dict(np.load(copy / "adversarial.npz")) | arrays)
    assert main(["eval", "--verify", str(copy)]) == 4
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


def test_what_is_no_bundle_is_one_line(bundle: Path, tmp_path: Path, capsys) -> None:
    assert main(["eval", "--verify", str(tmp_path)]) == 2
    copy = shutil.copytree(bundle, tmp_path / "copy")
    (copy / "adversarial.npz").write_bytes(b"half")
    assert main(["eval", "--verify", str(copy)]) == 4
    (copy / "adversarial.npz").write_bytes((bundle / "adversarial.npz").read_bytes()[:-99])
    assert main(["eval", "--verify", str(copy)]) == 4
    shutil.copy2(bundle / "adversarial.npz", copy)
    (copy / "checkpoint" / "weights.safetensors").write_bytes(b"half")
    assert main(["eval", "--verify", str(copy)]) == 4
    *no_bundles, last = capsys.readouterr().err.strip().splitlines()
    assert (
        len(no_bundles) == 3
        and all("not a bundle" in line for line in no_bundles)
        and "truncated" in last
    )
