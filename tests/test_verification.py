"""What counts as an adversarial example: in the ball, in [0, 1], a wrong class; in evaluations and
in bundles.
"""

import json
import math
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from ladder_network import SIGNS, LadderNetwork, ladder_images
from torch import Tensor, nn

from raysweep.attacks import PGD, AttackResult
from raysweep.data import load_data
from raysweep.errors import DamagedFileError
from raysweep.evaluation import RobustnessReport, Shard, ShardResult, ShardRunner, evaluate
from raysweep.evaluation.shards import (
    compute_norm_limit,
    compute_perturbation_norms,
    is_in_unit_range,
)
from raysweep.robustness_bundle import verify_bundle, write_bundle
from raysweep.training.checkpoint import TrainingCheckpoint, TrainingState, save_checkpoint
from raysweep.training.model_loading import load_checkpoint_target


@dataclass(frozen=True)
class Points:
    """An attack that claims given points."""

    x: Tensor
    eps: float
    norm: str = "Linf"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: Any) -> AttackResult:
        return AttackResult(self.x.clone(), torch.ones_like(y))

    def digest(self) -> str:
        return "points"


def check_points(
    x: Tensor, y: Tensor, points: Tensor, eps: float, norm: str = "Linf"
) -> ShardResult:
    work = ShardRunner(LadderNetwork(), x.numpy(), y.numpy(), np.arange(len(y)))
    return work(Shard("points", Points(points, eps, norm), np.arange(len(y))))  # type: ignore[arg-type]


@pytest.mark.parametrize(("norm", "share"), [("Linf", 1.0), ("L2", 0.5)])
def test_points_within_eps_count_and_those_beyond_do_not(norm: str, share: float) -> None:
    """Six misclassified points at several multiples of eps."""
    times = [0.9, 1.0, 1.0001, 1.01, 1.5, 1.0]
    eps = 0.04
    x, y = ladder_images([0.001] * 6, [1] * 6)
    points = x - torch.tensor([share * eps * t for t in times])[:, None, None, None] * SIGNS
    found = check_points(x, y, points, eps, norm)
    assert found.predicted.tolist() == [0] * 6, "all points are misclassified"
    assert found.broken.tolist() == [True, True, False, False, False, True]
    assert found.norm.tolist() == pytest.approx([eps * t for t in times], rel=1e-4)
    assert np.array_equal(found.x_adv, points[[0, 1, 5]].numpy())


def test_a_point_with_a_single_pixel_too_far_does_not_count() -> None:
    x, y = ladder_images([0.001] * 2, [1] * 2)
    points = x - 0.01 * SIGNS
    points[1, 0, 1, 0] = x[1, 0, 1, 0] + 0.0505
    assert check_points(x, y, points, 0.05).broken.tolist() == [True, False]
    # 0.01 three times and 0.0505 make 0.0534.
    assert check_points(x, y, points, 0.0530, "L2").broken.tolist() == [True, False]
    assert check_points(x, y, points, 0.0535, "L2").broken.tolist() == [True, True]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_points_outside_the_box_do_not_count_however_near_they_are(norm: str) -> None:
    x, y = torch.zeros(5, 1, 2, 2), torch.ones(5, dtype=torch.int64)
    x[:, 0, 0, 0] = x[:, 0, 1, 1] = 1.0
    x[:, 0, 0, 1] = 0.999
    # A height of 0.5 - 0.999 / 4, and a model that calls it class 1; its middle is moved so that
    # all points are wrong.
    model = LadderNetwork()
    model.scale.data.neg_()
    points = x.clone()
    for row, (place, value) in enumerate(
        [((0, 1), 0.99), ((1, 0), -1e-3), ((0, 0), 1.001), ((1, 0), -1e-7)]
    ):
        points[row, 0, *place] = value
    work = ShardRunner(model, x.numpy(), y.numpy(), np.arange(5))
    found = work(Shard("points", Points(points, 0.05, norm), np.arange(5)))  # type: ignore[arg-type]
    assert found.predicted.tolist() == [0] * 5 and found.norm.max() < 0.05
    assert found.broken.tolist() == [True, False, False, False, True], (
        "the values 0 and 1 are inside"
    )
    assert is_in_unit_range(points).tolist() == [True, False, False, False, True]


def test_points_that_are_not_finite_do_not_count() -> None:
    x, y = ladder_images([0.001] * 4, [1] * 4)
    points = x - 0.01 * SIGNS
    for row, value in enumerate((math.nan, math.inf, -math.inf)):
        points[row, 0, 0, 0] = value
    for norm in ("Linf", "L2"):
        assert check_points(x, y, points, 0.05, norm).broken.tolist() == [False, False, False, True]


def test_a_point_that_the_model_gets_right_does_not_count() -> None:
    x, y = ladder_images([0.05, 0.05], [0, 1])
    found = check_points(x, y, torch.stack([x[0], x[1] - 0.06 * SIGNS]), 0.06)
    assert found.broken.tolist() == [False, True] and found.queries.tolist() == [2, 2]
    assert found.margin.tolist() == pytest.approx([1.0, -0.2], abs=1e-5) and found.classes == 4


def test_the_rounding_that_is_allowed() -> None:
    """The rounding of x + eps to float32 in [0.5, 1], and little more."""
    for eps in (1 / 255, 8 / 255, 0.3):
        assert eps + 2**-26 < compute_norm_limit(eps, "Linf") < eps * (1 + 1e-5) + 2**-24
        assert eps < compute_norm_limit(eps, "L2") < eps * (1 + 1e-5)
    x = torch.rand(1000, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 0.9
    assert (
        compute_perturbation_norms(x + 8 / 255, x, "Linf") <= compute_norm_limit(8 / 255, "Linf")
    ).all()


def test_lengths_by_hand() -> None:
    x, moved = torch.zeros(2, 3, 1, 2), torch.zeros(2, 3, 1, 2)
    moved[0, 0, 0, 0], moved[0, 2, 0, 1], moved[1, 1, 0, 0] = 0.3, -0.4, -0.1
    assert compute_perturbation_norms(moved, x, "Linf").tolist() == pytest.approx([0.4, 0.1])
    assert compute_perturbation_norms(moved, x, "L2").tolist() == pytest.approx([0.5, 0.1])
    assert compute_perturbation_norms(moved, x, "L2").dtype == torch.float64


COUNT = 40


def saved_model(folder: Path, steps: int) -> TrainingCheckpoint:
    """A checkpoint of a network that saw a few batches."""
    config = tiny("at", seed=3)
    data = load_data(config.data)
    model = config.model.build_model(1, 10, 0).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = data.train.get_float_images(slice(None)), data.train.y
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return save_checkpoint(
        folder,
        config,
        TrainingState.copy_from(model, optimizer),
        [{"epoch": 1.0}],
        data.fingerprint,
    )


@pytest.fixture(scope="module")
def saved_bundle(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, RobustnessReport, TrainingCheckpoint]:
    """A bundle of a small model under PGD, and what it was made of."""
    out = tmp_path_factory.mktemp("bundle")
    saved = saved_model(out / "checkpoint", 15)
    subject = load_checkpoint_target(saved.local_folder, {})
    test, attack = subject.data.test, PGD(eps=0.05, step_size=0.02, steps=5)
    images = test.get_float_images(slice(0, COUNT)), test.y[:COUNT], attack
    report = evaluate(subject.model, *images, index=test.index[:COUNT], keep_adversarial=True)
    assert 5 < report.robust.sum() < report.clean.sum() - 2 < COUNT - 4
    write_bundle(out / "claim", report, saved, saved.config.data, "mine", test=test)
    return out / "claim", report, saved


Arrays, Card = dict[str, np.ndarray], dict[str, Any]


def problems_of(
    saved_bundle: tuple[Path, RobustnessReport, TrainingCheckpoint],
    folder: Path,
    falsify: Callable[[Arrays, Card], None],
):
    """What `verify_bundle` says of a copy with other arrays and another card."""
    copy = shutil.copytree(saved_bundle[0], folder / "copy")
    arrays, card = (
        dict(np.load(copy / "adversarial.npz")),
        json.loads((copy / "card.json").read_text()),
    )
    falsify(arrays, card)
    np.savez(copy / "adversarial.npz", **arrays)
    (copy / "card.json").write_text(json.dumps(card))
    # A bundle without a manifest: only its content can give a false claim away.
    (copy / "manifest.json").unlink()
    return verify_bundle(copy).problems


def test_a_bundle_says_what_it_holds(saved_bundle) -> None:
    folder, report, saved = saved_bundle
    assert verify_bundle(folder).problems == []
    card = json.loads((folder / "card.json").read_text())
    assert card["norm"] == "Linf" and card["eps_value"] == 0.05 and card["examples"] == COUNT
    assert card["attacks"] == ["pgd"] and card["seed"] == 3 and card["unreliable"] is False
    assert card["clean_accuracy"] == report.clean.sum() / COUNT
    assert card["robust_accuracy"] == report.robust.sum() / COUNT
    assert card["name"] == "mine" and card["dataset"] == "digits" == card["data"]["name"]
    assert (
        card["architecture"] == saved.config.model.name
        and card["config"] == saved.config.to_stored_dict()
    )
    assert (
        card["data"]["data_dir"] is None
        and card["environment"]["python"] == platform.python_version()
    )
    with np.load(folder / "adversarial.npz") as arrays:
        assert np.array_equal(arrays["x_adv"], report.x_adv) and np.array_equal(
            arrays["robust"], report.robust
        )
    assert (folder / "checkpoint" / "weights.safetensors").read_bytes() == (
        saved.local_folder / "weights.safetensors"
    ).read_bytes()


def test_a_bundle_needs_the_examples(saved_bundle, tmp_path: Path) -> None:
    _, report, saved = saved_bundle
    with pytest.raises(ValueError, match="keep_adversarial"):
        write_bundle(
            tmp_path / "claim",
            replace(report, x_adv=None),
            saved,
            saved.config.data,
            "mine",
            test=load_data(saved.config.data).test,
        )
    assert not (tmp_path / "claim").exists()


def moves(saved_bundle) -> np.ndarray:
    """How far each saved example lies from its image, (N, 64)."""
    _, report, saved = saved_bundle
    test = load_data(saved.config.data).test
    return (
        report.x_adv.astype(np.float64) - test.get_float_images(slice(0, COUNT)).numpy()
    ).reshape(COUNT, -1)


def test_a_bundle_of_a_smaller_radius_than_its_examples_is_refused(
    saved_bundle, tmp_path: Path
) -> None:
    """Even if eps is smaller by a hundredth or a thousandth; the same examples in L2, too."""
    lengths = {
        "Linf": np.abs(moves(saved_bundle)).max(1),
        "L2": np.sqrt((moves(saved_bundle) ** 2).sum(1)),
    }
    for number, (norm, length) in enumerate(lengths.items()):
        longest = float(length.max())
        for times, beyond in (
            (1.0, 0),
            (1.01, int((length > longest / 1.01).sum())),
            (1.001, None),
        ):
            eps = longest / times

            def claim(arrays: Arrays, card: Card, eps: float = eps, norm: str = norm) -> None:
                text = f"{eps:g}"
                card.update(eps_value=eps, norm=norm, eps=text, threat_model=norm)

            found = problems_of(saved_bundle, tmp_path / f"{number}-{times}", claim)
            if times == 1:
                assert found == [], norm
            elif beyond is None:
                assert len(found) == 1, norm
            else:
                assert found == [
                    f"{beyond} examples are farther than eps {eps:.6g} from their images"
                ], norm


@pytest.mark.parametrize(
    ("value", "inside"),
    [(-1e-3, False), (-1e-7, False), (0.0, True), (1.0, True), (1.0 + 2e-7, False), (1.01, False)],
)
def test_a_bundle_with_a_pixel_outside_the_box_is_refused_however_near(
    saved_bundle, tmp_path: Path, value, inside
) -> None:
    """In a row that is wrong from the start, whose verdict one pixel within eps does not change."""
    _, report, saved = saved_bundle
    x = load_data(saved.config.data).test.get_float_images(slice(0, COUNT)).numpy()
    near = (np.abs(x - value) <= 0.05) & ~report.clean[:, None, None, None]
    row, *place = (int(i) for i in np.argwhere(near)[0])

    def falsify(arrays: Arrays, card: Card) -> None:
        arrays["x_adv"][row, *place] = value

    found = [
        line for line in problems_of(saved_bundle, tmp_path, falsify) if "classified" not in line
    ]
    assert found == ([] if inside else ["1 examples are outside [0, 1]"])


def test_points_of_a_bundle_that_are_not_numbers_are_refused(saved_bundle, tmp_path: Path) -> None:
    def falsify(arrays: Arrays, card: Card) -> None:
        arrays["x_adv"][0] = np.nan

    found = problems_of(saved_bundle, tmp_path, falsify)
    assert "1 examples are farther than eps 0.05 from their images" in found
    assert "1 examples are outside [0, 1]" in found


def _twice(arrays: Arrays, card: Card) -> None:
    for array in arrays.values():
        array[1] = array[0]


def _unknown(arrays: Arrays, card: Card) -> None:
    arrays["index"][:2] = 100_000, 100_001


def _negative(arrays: Arrays, card: Card) -> None:
    arrays["index"][3] = -1


def _swapped(arrays: Arrays, card: Card) -> None:
    arrays["labels"][[0, 1]] = arrays["labels"][[1, 0]]


def _clean(arrays: Arrays, card: Card) -> None:
    card["clean_accuracy"] += 0.0001


def _robust(arrays: Arrays, card: Card) -> None:
    card["robust_accuracy"] += 0.0001


def _count(arrays: Arrays, card: Card) -> None:
    card["examples"] += 1


def _modest(arrays: Arrays, card: Card) -> None:
    card["robust_accuracy"] -= 0.1


@pytest.mark.parametrize(
    ("falsify", "words"),
    [
        (_swapped, "the labels are not the test set's"),
        (_clean, "clean_accuracy is"),
        (_robust, "robust_accuracy is"),
        (_modest, "robust_accuracy is"),
        (_count, f"there are {COUNT} examples, the card says {COUNT + 1}"),
    ],
)
def test_other_false_claims(saved_bundle, tmp_path: Path, falsify, words: str) -> None:
    """A false accuracy is also false beside its text in percent."""
    line, *texts = problems_of(saved_bundle, tmp_path, falsify)
    assert line.startswith(words)
    assert all(text.startswith(("clean_acc is", "reported is")) for text in texts)


@pytest.mark.parametrize(
    ("falsify", "words"),
    [
        (_twice, "an example is listed twice"),
        (_unknown, "2 examples are not in the test set, the first: 100000"),
        (_negative, "1 examples are not in the test set, the first: -1"),
    ],
)
def test_rows_that_there_are_not(saved_bundle, tmp_path: Path, falsify, words: str) -> None:
    with pytest.raises(DamagedFileError, match=words):
        problems_of(saved_bundle, tmp_path, falsify)


def test_false_verdicts_are_counted(saved_bundle, tmp_path: Path) -> None:
    _, report, _ = saved_bundle
    robust, wrong = np.flatnonzero(report.robust), np.flatnonzero(~report.clean)
    broken = np.flatnonzero(report.clean & ~report.robust)

    def falsify(arrays: Arrays, card: Card) -> None:
        arrays["robust"][robust[:3]] = False
        arrays["robust"][wrong[:2]] = True
        arrays["robust"][broken[0]] = True

    assert problems_of(saved_bundle, tmp_path, falsify) == [
        "3 examples are claimed broken, but classified correctly",
        "2 examples are claimed robust, but misclassified without an attack",
        "1 examples are claimed robust, but broken by their stored adversarial example",
    ]


def test_the_order_of_a_bundles_examples_does_not_matter(saved_bundle, tmp_path: Path) -> None:
    def turn(arrays: Arrays, card: Card) -> None:
        for name, array in arrays.items():
            arrays[name] = array[::-1]

    assert problems_of(saved_bundle, tmp_path, turn) == []


def test_a_claim_fails_with_the_weights_of_another_model(saved_bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(saved_bundle[0], tmp_path / "copy")
    shutil.rmtree(copy / "checkpoint")
    saved_model(copy / "checkpoint", 1)
    found = verify_bundle(copy).problems
    assert any("claimed robust, but misclassified without an attack" in line for line in found)
    assert any(line.startswith("clean_accuracy is") for line in found)


def test_an_archive_with_a_changed_byte_is_refused(saved_bundle, tmp_path: Path) -> None:
    """In its table of contents, where changes cause many kinds of errors in readers."""
    folder, _, _ = saved_bundle
    copy = shutil.copytree(folder, tmp_path / "copy")
    archive = copy / "adversarial.npz"
    whole = archive.read_bytes()
    table = whole.index(b"PK\x01\x02")
    # Signature, required version, flags, method and checksum of the first file, and the end of the
    # archive.
    for place in (table, table + 6, table + 8, table + 10, table + 16, len(whole) - 10):
        archive.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(DamagedFileError, match=r"adversarial\.npz"):
            verify_bundle(copy)
