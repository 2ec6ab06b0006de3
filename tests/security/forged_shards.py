"""Results of attacks that somebody else left in the folder of an evaluation (point 7).

The distance of each image from the boundary is known, so the truth is known by hand.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from attack_table import attack
from ladder_network import SIGNS, LadderNetwork, ladder_images

from raysweep.attacks import PGD, AttackCascade
from raysweep.evaluation import RobustnessReport, Shard, ShardResult, evaluate
from raysweep.evaluation.result_signatures import _load_user_key

DISTANCES = [0.012, 0.02, 0.03, 0.05, 0.025, 0.035, 0.07, 0.2]
LABELS = [0, 1, 1, 0, 1, 0, 1, 1]
EPS = 0.04
N_BROKEN = sum(distance < EPS for distance in DISTANCES)
ATTACK = PGD(eps=EPS, step_size=0.01, steps=6, start="natural")
CASCADE = AttackCascade(attacks={"a": ATTACK})


def evaluate_in(folder: Path, seed: int = 0, **options: object) -> RobustnessReport:
    """Evaluate the model; results of an earlier evaluation in the folder may be reused."""
    x, y = ladder_images(DISTANCES, LABELS)
    return evaluate(LadderNetwork(), x, y, CASCADE, seed=seed, resume_dir=folder, **options)


def truth_in(folder: Path) -> str:
    """Return what an evaluation in this folder says; AssertionError if that is not the truth."""
    report = evaluate_in(folder, keep_adversarial=True)
    n_robust = round(report.robust_accuracy * len(LABELS))
    assert n_robust == len(LABELS) - N_BROKEN, f"{n_robust} robust"
    return f"{n_robust} of {len(LABELS)} robust, which is true"


@contextmanager
def as_another_user() -> Iterator[None]:
    """Sign with the key of somebody else in this block."""
    own = os.environ.get("XDG_STATE_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_STATE_HOME"] = folder
        _load_user_key.cache_clear()
        try:
            yield
        finally:
            os.environ.pop("XDG_STATE_HOME")
            if own is not None:
                os.environ["XDG_STATE_HOME"] = own
            _load_user_key.cache_clear()


def change_shards(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change the arrays of all stored shards, and leave their signatures as they are."""
    for path in folder.glob("*/a-*.npz"):
        with np.load(path) as file:
            arrays = dict(file)
        change(arrays)
        np.savez(path, **arrays)


def claim_robust(arrays: dict[str, np.ndarray]) -> None:
    arrays["broken"] = np.zeros_like(arrays["broken"])
    arrays["margin"] = np.ones_like(arrays["margin"])
    arrays["x_adv"] = arrays["x_adv"][:0]


@attack(7, "shards that claim all rows robust, without a signature", "59.5% became 99.5%")
def forged_robust_rows(folder: Path) -> str:
    evaluate_in(folder)

    def forge(arrays: dict[str, np.ndarray]) -> None:
        claim_robust(arrays)
        del arrays["signature"]

    change_shards(folder, forge)
    return truth_in(folder)


@attack(7, "the same in a shard of one's own, under its old signature", "59.5% became 99.5%")
def altered_own_shard(folder: Path) -> str:
    evaluate_in(folder)
    change_shards(folder, claim_robust)
    return truth_in(folder)


@attack(7, "shards that another user has signed", "believed")
def signed_by_another_user(folder: Path) -> str:
    with as_another_user():
        x, y = ladder_images([0.3] * len(LABELS), LABELS)
        evaluate(LadderNetwork(), x, y, CASCADE, resume_dir=folder)
        (forged,) = folder.glob("*/a-*.npz")
        content = forged.read_bytes()
        forged.unlink()
        evaluate_in(folder)
    (own,) = folder.glob("*/a-*.npz")
    own.write_bytes(content)
    return truth_in(folder)


@attack(7, "a shard of one's own from an evaluation of another model")
def replayed_shard(folder: Path) -> str:
    x, y = ladder_images([0.3] * len(LABELS), LABELS)
    evaluate(LadderNetwork(), x, y, CASCADE, resume_dir=folder / "other")
    evaluate_in(folder / "this")
    (other,), (this,) = (list((folder / name).glob("*/a-*.npz")) for name in ("other", "this"))
    this.write_bytes(other.read_bytes())
    return truth_in(folder / "this")


@attack(7, "a shard of one's own from a weaker attack, renamed")
def renamed_shard(folder: Path) -> str:
    weak = AttackCascade(attacks={"a": ATTACK.replace(steps=1)})
    x, y = ladder_images(DISTANCES, LABELS)
    evaluate(LadderNetwork(), x, y, weak, resume_dir=folder)
    (path,) = folder.glob("*/a-*.npz")
    robust_rows = ShardResult.load_npz(path, b"").result.positions
    shard = Shard("a", ATTACK, robust_rows)
    path.rename(path.with_name(shard.file_name))
    return truth_in(folder)


@attack(7, "claimed adversarial examples that are right, far away, outside of [0, 1], or NaN")
def false_adversarial_examples(folder: Path) -> str:
    evaluate_in(folder)
    x, _ = ladder_images(DISTANCES, LABELS)

    def forge(arrays: dict[str, np.ndarray]) -> None:
        arrays["broken"] = np.ones_like(arrays["broken"])
        examples = x.numpy()[arrays["positions"]].copy()
        wrong_side = 0.5 - (examples - 0.5)
        examples[4:6] = wrong_side[4:6]
        examples[6] += 3 * SIGNS.numpy()
        examples[7] = np.nan
        arrays["x_adv"] = examples.astype(np.float32)

    change_shards(folder, forge)
    return truth_in(folder)


@attack(7, "predictions of the clean images that differ, so that an evaluation refuses to run")
def forged_clean_predictions(folder: Path) -> str:
    evaluate_in(folder)
    (path,) = folder.glob("*/clean.npz")
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {"margin": -arrays["margin"]})
    return truth_in(folder)


@attack(7, "a shard that is a link to a file elsewhere")
def linked_shard(folder: Path) -> str:
    evaluate_in(folder)
    (path,) = folder.glob("*/a-*.npz")
    path.rename(folder / "elsewhere.npz")
    path.symlink_to(folder / "elsewhere.npz")
    return truth_in(folder)


@attack(7, "shards with other types, shapes and rows than a result has")
def shards_of_odd_shapes(folder: Path) -> str:
    evaluate_in(folder)
    (path,) = folder.glob("*/a-*.npz")
    with np.load(path) as file:
        arrays = dict(file)
    odd = {
        "positions": [np.zeros(8, np.int64), np.array(3), np.arange(8.0), np.arange(8) - 99],
        "broken": [np.ones(3, bool), np.ones(8), np.array(True)],
        "x_adv": [np.zeros((8, 9, 9, 9), np.float32), np.zeros(8), np.zeros((2, 1, 2, 2), "f8")],
        "classes": [np.arange(3), np.array("ten"), np.array(-1)],
        "signature": [np.zeros(0, np.uint8), np.zeros((2, 2)), np.array("x")],
    }
    for name, values in odd.items():
        for value in values:
            np.savez(path, **arrays | {name: value})
            truth_in(folder)
            for stored in folder.glob("*/a-*.npz"):
                stored.unlink()
    return f"{sum(map(len, odd.values()))} shards left out, the truth each time"
