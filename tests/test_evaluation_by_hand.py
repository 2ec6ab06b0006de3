"""Evaluations of a network whose robustness is known by hand: the report's numbers, and what
resuming reuses.
"""

import json
import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ladder_network import SIGNS, LadderNetwork, ladder_images
from scipy.stats import binomtest
from torch import Tensor, nn

from raysweep.attacks import (
    APGD,
    PGD,
    AttackCascade,
    SingleAttack,
    Square,
    autoattack,
    build_custom_cascade,
)
from raysweep.evaluation import (
    RobustnessReport,
    Shard,
    ShardResult,
    ShardRunner,
    evaluate,
    process_pool,
)
from raysweep.evaluation.report import compute_wilson_interval
from raysweep.evaluation.result_signatures import derive_evaluation_key
from raysweep.spec import SpecError

# Distances to the boundary; rows with a negative one are wrong from the start, and so is label 2 at
# any distance.
DISTANCES = [0.012, -0.02, 0.03, 0.05, 0.025, 0.035, 0.07, 0.2]
LABELS = [0, 1, 1, 0, 1, 0, 2, 1]
PREDICTED = [0, 0, 1, 0, 1, 0, 0, 1]


def steps(count: int, **settings: Any) -> PGD:
    """PGD that lowers the height by count / 100, along the only direction that there is."""
    return PGD(**{"eps": 0.05, "step_size": 0.01, "steps": count, "start": "natural"} | settings)


# The second attack is the strongest, so the third breaks no row and lowers no margin.
ATTACKS = {"a": steps(2), "b": steps(4), "c": steps(3, loss="cw")}


def evaluate_ladder(
    attacks: dict[str, SingleAttack] | None = None, **settings: Any
) -> RobustnessReport:
    x, y = ladder_images(DISTANCES, LABELS)
    model = settings.pop("model", None) or LadderNetwork()
    return evaluate(
        model, x, y, AttackCascade(attacks=attacks or ATTACKS), keep_adversarial=True, **settings
    )


@cache
def report() -> RobustnessReport:
    return evaluate_ladder()


def reversed_map(run: Callable[[Shard], ShardResult], shards: Sequence[Shard]) -> list[ShardResult]:
    return [run(shard) for shard in reversed(shards)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_size": 1},
        {"shards": 3, "batch_size": 2, "map": reversed_map},
        {"fold": False, "tile": 3},
    ],
)
def test_every_row_by_hand(settings: dict[str, Any]) -> None:
    found = evaluate_ladder(**settings)
    assert found.labels.tolist() == LABELS and found.index.tolist() == list(range(8))
    assert found.predicted.tolist() == PREDICTED
    assert found.broken_by.tolist() == ["a", "clean", "b", "", "b", "b", "clean", ""]
    assert {name: rows.astype(int).tolist() for name, rows in found.robust_after.items()} == {
        "a": [0, 0, 1, 1, 1, 1, 0, 1],
        "b": [0, 0, 0, 1, 0, 0, 0, 1],
        "c": [0, 0, 0, 1, 0, 0, 0, 1],
    }
    lost = -1_000_000.6875  # the float32 nearest to -1e6 - 0.7
    assert found.margin_before.tolist() == pytest.approx(
        [0.24, -0.4, 0.6, 1.0, 0.5, 0.7, lost, 4.0], abs=1e-5
    )
    assert found.margin_after.tolist() == pytest.approx(
        [-0.16, -0.4, -0.2, 0.2, -0.3, -0.1, lost, 3.2], abs=1e-5
    )
    assert found.perturbation.tolist() == pytest.approx(
        [0.02, 0, 0.04, 0.04, 0.04, 0.04, 0, 0.04], abs=1e-6
    )
    # One for the clean pass; then one a step and one for the verdict, for each attack that still
    # found the row right.
    assert found.queries.tolist() == [4, 1, 9, 13, 9, 9, 1, 13]
    cost = {name: (spent.rows, spent.queries) for name, spent in found.cost.items()}
    assert cost == {"a": (6, 6 * 3), "b": (5, 5 * 5), "c": (2, 2 * 4)}
    heights = (torch.from_numpy(found.x_adv[:, 0]) - 0.5).mul(SIGNS).mean((1, 2)).tolist()
    # The adversarial image of a row that holds out is the image itself.
    ends = [0.008, -0.02, -0.01, -0.05, -0.015, 0.005, -0.07, 0.2]
    assert heights == pytest.approx(ends, abs=1e-6)
    assert np.array_equal(
        found.x_adv[[1, 3, 6, 7]], ladder_images(DISTANCES, LABELS)[0].numpy()[[1, 3, 6, 7]]
    )
    assert found.warnings == () and found.masking_gap == pytest.approx(0.625 - 0.25)


def test_the_report_in_numbers_by_hand() -> None:
    found = report()
    assert (found.clean_accuracy, found.robust_accuracy) == (0.75, 0.25)
    assert found.clean.astype(int).tolist() == [1, 0, 1, 1, 1, 1, 0, 1]
    assert found.per_class() == {
        0: {"count": 3, "clean_accuracy": 1.0, "robust_accuracy": pytest.approx(1 / 3)},
        1: {"count": 4, "clean_accuracy": 0.75, "robust_accuracy": 0.25},
        2: {"count": 1, "clean_accuracy": 0.0, "robust_accuracy": 0.0},
    }
    right = {"clean": 6, "a": 5, "b": 2, "c": 2, "robust": 2}
    assert list(found.intervals) == list(right)
    for name, hits in right.items():
        interval = binomtest(hits, 8).proportion_ci(0.95, "wilson")
        assert found.intervals[name] == pytest.approx((interval.low, interval.high), abs=1e-6)
    low, high = (f"{bound:.2%}" for bound in found.intervals["robust"])
    assert repr(found) == (
        f"RobustnessReport(8 examples, Linf eps 0.05: clean 75.00%, robust 25.00% (95%: {low} to "
        f"{high}), "
        "after a, b, c; 0 warnings)"
    )


@pytest.mark.parametrize("count", [1, 3, 50, 10_000])
def test_intervals_are_those_of_scipy(count: int) -> None:
    for hits in {0, 1, count // 3, count // 2, count - 1, count}:
        interval = binomtest(hits, count).proportion_ci(0.95, "wilson")
        assert compute_wilson_interval(hits, count) == pytest.approx(
            (interval.low, interval.high), abs=1e-6
        )


def test_the_summary_comes_back_from_json() -> None:
    found = json.loads(json.dumps(report().summary()))
    assert all(spent.pop("seconds") >= 0 for spent in found["cost"].values())
    assert found["attack"].pop("attacks") == {
        name: attack.to_json_dict() for name, attack in ATTACKS.items()
    }
    for name, hits in {"clean": 6, "a": 5, "b": 2, "c": 2, "robust": 2}.items():
        interval = binomtest(hits, 8).proportion_ci(0.95, "wilson")
        assert found["intervals"].pop(name) == pytest.approx(
            [interval.low, interval.high], abs=1e-6
        )
    assert found == {
        "examples": 8,
        "clean_accuracy": 0.75,
        "robust_accuracy": 0.25,
        "robust_after": {"a": 0.625, "b": 0.25, "c": 0.25},
        "intervals": {},
        "masking_gap": pytest.approx(0.375),
        "eps": 0.05,
        "norm": "Linf",
        "seed": 0,
        "attack": {"kind": "worst_case", "tf32": False},
        "queries": 59,
        "cost": {
            "a": {"rows": 6, "queries": 18},
            "b": {"rows": 5, "queries": 25},
            "c": {"rows": 2, "queries": 8},
        },
        "per_class": {
            "0": {"count": 3, "clean_accuracy": 1.0, "robust_accuracy": pytest.approx(1 / 3)},
            "1": {"count": 4, "clean_accuracy": 0.75, "robust_accuracy": 0.25},
            "2": {"count": 1, "clean_accuracy": 0.0, "robust_accuracy": 0.0},
        },
        "warnings": [],
    }


def test_the_parquet_file_by_hand(tmp_path: Path) -> None:
    numbered = evaluate_ladder(index=np.arange(8) + 100)
    numbered.save_parquet(tmp_path / "examples.parquet")
    table = pq.read_table(tmp_path / "examples.parquet")
    assert [(column.name, column.type) for column in table.schema] == [
        ("index", pa.int64()),
        ("label", pa.int64()),
        ("clean_prediction", pa.int64()),
        ("broken_by", pa.string()),
        ("margin_before", pa.float32()),
        ("margin_after", pa.float32()),
        ("perturbation", pa.float32()),
        ("queries", pa.int64()),
    ]
    rows = table.to_pydict()
    assert rows["index"] == list(range(100, 108)) and rows["label"] == LABELS
    assert rows["clean_prediction"] == PREDICTED
    assert rows["broken_by"] == ["a", "clean", "b", None, "b", "b", "clean", None]
    assert rows["margin_before"][:4] == pytest.approx([0.24, -0.4, 0.6, 1.0], abs=1e-5)
    assert rows["margin_after"][:4] == pytest.approx([-0.16, -0.4, -0.2, 0.2], abs=1e-5)
    assert rows["perturbation"] == pytest.approx(
        [0.02, 0, 0.04, 0.04, 0.04, 0.04, 0, 0.04], abs=1e-6
    )
    assert rows["queries"] == [4, 1, 9, 13, 9, 9, 1, 13]
    summary = json.loads(table.schema.metadata[b"raysweep.evaluation"])
    assert summary == json.loads(json.dumps(numbered.summary()))


def test_the_archive_of_adversarial_examples(tmp_path: Path) -> None:
    report().save_adversarial(tmp_path / "adversarial.npz")
    with np.load(tmp_path / "adversarial.npz") as kept:
        assert set(kept.files) == {"x_adv", "labels", "index", "robust"}
        assert kept["labels"].tolist() == LABELS and kept["index"].tolist() == list(range(8))
        assert (
            np.flatnonzero(kept["robust"]).tolist() == [3, 7] and kept["x_adv"].dtype == np.float32
        )


def test_lengths_and_margins_in_l2() -> None:
    """A step of 0.01 in L2 lowers the height by half of that, because all four pixels move."""
    norm = {"norm": "L2", "eps": 0.056}
    found = evaluate_ladder({"a": steps(2, **norm), "b": steps(9, **norm), "c": steps(4, **norm)})
    assert found.perturbation.tolist() == pytest.approx(
        [0.056, 0, *4 * [0.056], 0, 0.056], abs=1e-6
    )
    assert found.broken_by.tolist() == ["b", "clean", "", "", "b", "", "clean", ""]
    assert (
        found.margin_after[2] == pytest.approx(20 * (0.03 - 0.028), abs=1e-5) and found.norm == "L2"
    )


def test_a_point_that_is_no_worse_than_the_image_is_not_recorded() -> None:
    """Attacks of random starts only: some starts are higher than the image."""
    starts = {
        "a": PGD(eps=0.04, step_size=0.0, steps=1),
        "b": PGD(eps=0.04, step_size=0.0, steps=1),
    }
    x, y = ladder_images([0.05] * 64, [1] * 64)
    found = evaluate(LadderNetwork(), x, y, AttackCascade(attacks=starts), keep_adversarial=True)
    kept = found.perturbation == 0
    assert 8 < kept.sum() < 32, "for a quarter of the rows both starts are higher"
    assert (found.margin_after[kept] == found.margin_before[kept]).all()
    assert (found.margin_after[~kept] < found.margin_before[~kept]).all() and found.robust.all()


def test_the_masking_gap_needs_a_cross_entropy_first_and_another_attack() -> None:
    ce, cw, apgd, square = (
        steps(2),
        steps(4, loss="cw"),
        APGD(eps=0.05, steps=5),
        Square(eps=0.05, queries=3),
    )
    # PGD leaves 5 of 8 rows, PGD on the margin 2, and APGD, which reaches 0.05, one or two: one row
    # is just that far.
    assert (
        evaluate_ladder({"a": ce, "b": cw}).masking_gap
        == evaluate_ladder({"a": ce, "b": cw, "c": ce}).masking_gap
        == 0.375
    )
    assert evaluate_ladder({"a": ce, "b": steps(3), "c": cw}).masking_gap == 0.375
    assert evaluate_ladder({"a": apgd, "b": ce}).masking_gap == 0.0
    apgd_cw = APGD(eps=0.05, steps=2, loss="cw")
    for attacks in ({"a": ce}, {"a": cw, "b": ce}, {"a": square, "b": ce}, {"a": apgd_cw, "b": ce}):
        assert evaluate_ladder(attacks).masking_gap is None, attacks


WARNINGS = [
    "the model answers differently each time: use version 'rand' for a randomised defence",
    "b: left out: it needs a gradient",
    "b: the dlr loss needs 3 logits, the model has 2: run with the cw loss",
    "Square lowered robust accuracy by 0.36 points after the white-box attacks: ...",
]


def test_any_warning_makes_a_card_unreliable_and_nothing_else_does() -> None:
    assert report().card()["unreliable"] is False
    for warning in WARNINGS:
        assert replace(report(), warnings=(warning,)).card()["unreliable"] is True
    wide = replace(report(), masking_gap=0.9, broken_by=np.full(8, "clean"))
    assert wide.card()["unreliable"] is False and wide.card()["reported"] == "0.00"


def test_every_warning_of_an_evaluation_is_on_its_card() -> None:
    x, y = ladder_images(DISTANCES, [min(label, 1) for label in LABELS])

    class Two(LadderNetwork):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, :2]

    class Adaptive(LadderNetwork):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                point = x.detach().clone().requires_grad_()
                torch.autograd.grad(super().forward(point).sum(), point)
            return super().forward(x)

    class Constant(LadderNetwork):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * super().forward(x) + torch.arange(4.0)

    class Silent(LadderNetwork):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    class Moody(LadderNetwork):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, :3] + 100 * torch.rand(())

    class Chances(LadderNetwork):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(1)

    for kind, words in (
        (Two, "the dlr loss needs 3 logits, the model has 2: run with the cw loss"),
        (Adaptive, "computes gradients in its forward pass"),
        (Constant, "it is constant"),
        (Constant, "it has collapsed"),
        (Silent, "no gradient with respect to its input"),
        (Moody, "answers differently each time"),
        (Chances, "are probabilities"),
    ):
        found = evaluate(
            kind(), x, y, AttackCascade(attacks={"a": APGD(eps=0.05, steps=2, loss="dlr")})
        )
        assert any(words in warning for warning in found.warnings), (kind, found.warnings)
        assert found.card()["unreliable"] is True
    steep = ladder_images([0.02] * 8, [0, 1] * 4, [1] * 8)
    found = evaluate(
        LadderNetwork(),
        *steep,
        AttackCascade(attacks={"a": steps(2), "s": Square(eps=0.05, queries=50)}),
    )
    assert any(
        " of 8 examples looked at have zero CE gradient" in warning for warning in found.warnings
    )
    assert any("Square lowered robust accuracy by" in warning for warning in found.warnings)


def test_a_card_by_hand() -> None:
    card = replace(report(), eps=8 / 255).card(name="mine", link="https://example.org", more=3)
    assert card == {
        "link": "https://example.org",
        "name": "mine",
        "authors": None,
        "additional_data": None,
        "number_forward_passes": 1,
        "dataset": None,
        "venue": None,
        "architecture": None,
        "eps": "8/255",
        "threat_model": "Linf",
        "clean_acc": "75.00",
        "reported": "25.00",
        "autoattack_acc": None,
        "unreliable": False,
        "more": 3,
    }
    shown = [
        (0.031, "Linf", "0.031"),
        (0.5 / 255, "Linf", f"{0.5 / 255:g}"),
        (1 / 255, "Linf", "1/255"),
    ]
    for eps, norm, text in [*shown, (8 / 255, "L2", f"{8 / 255:g}"), (0.5, "L2", "0.5")]:
        card = replace(report(), eps=eps, norm=norm).card()
        assert (card["eps"], card["threat_model"]) == (text, norm)


def test_which_attacks_count_as_autoattack() -> None:
    def is_autoattack(attack: AttackCascade, eps: float = 8 / 255, norm: str = "Linf") -> bool:
        found = replace(report(), attack=attack.to_json_dict(), eps=eps, norm=norm)
        assert (found.card()["autoattack_acc"] == "25.00") == found.is_autoattack
        return found.is_autoattack

    assert is_autoattack(autoattack()) and is_autoattack(autoattack(0.5, "L2"), 0.5, "L2")
    assert is_autoattack(build_custom_cascade(["apgd-ce", "apgd-t", "fab-t", "square"]))
    standard = dict(autoattack().attacks)
    for other in (
        *(autoattack(version=version) for version in ("plus", "rand", "tf32")),
        AttackCascade(attacks={name: standard[name] for name in list(standard)[:3]}),
        AttackCascade(attacks=standard | {"more": standard["square"]}),
        AttackCascade(attacks=standard | {"square": Square(queries=4999)}),
        autoattack(4 / 255),
        autoattack(norm="L2"),
    ):
        assert not is_autoattack(other), other


class Recorder:
    """Runs shards in this process and records, attack by attack, which rows were computed."""

    def __init__(self, width: int = 1) -> None:
        self.width = width
        self.rows: dict[str, list[int]] = {}

    def __call__(
        self, run: Callable[[Shard], ShardResult], shards: Sequence[Shard]
    ) -> list[ShardResult]:
        for shard in shards:
            self.rows.setdefault(shard.attack_name, []).extend(shard.positions.tolist())
        outcomes = [run(shard) for shard in shards]
        random.Random(0).shuffle(outcomes)
        return outcomes


@pytest.mark.parametrize(
    ("count", "width", "settings"),
    [
        (1, 1, {}),
        (1, 3, {"shards": 40}),
        (7, 3, {}),
        (7, 1, {"batch_size": 4}),
        (7, 1, {"shards": 2, "batch_size": 3}),
        (7, 3, {"shards": 7}),
        (33, 1, {"batch_size": 4}),
        (33, 3, {"batch_size": 4}),
        (33, 5, {}),
        (33, 1, {"shards": 1, "batch_size": 32}),
        (33, 2, {"shards": 32}),
        (33, 1, {"shards": 40, "batch_size": 1}),
    ],
)
def test_each_example_is_in_exactly_one_shard(
    count: int, width: int, settings: dict[str, int]
) -> None:
    """However the rows are split, and in whatever order shards finish, the rows of the report are
    in order.
    """
    distances = [(0.0005 + 0.001 * row) * (-1 if row % 5 == 4 else 1) for row in range(count)]
    x, y = ladder_images(distances, [row % 2 for row in range(count)])
    map = Recorder(width)
    found = evaluate(
        LadderNetwork(),
        x,
        y,
        AttackCascade(attacks={"a": steps(1), "b": steps(2)}),
        **settings,
        map=map,
    )
    right = [row for row in range(count) if row % 5 != 4]
    faced = {"clean": list(range(count)), "a": right, "b": [row for row in right if row >= 10]}
    assert {name: sorted(rows) for name, rows in map.rows.items()} == {
        n: rows for n, rows in faced.items() if rows
    }
    assert found.predicted.tolist() == [
        row % 2 if d > 0 else 1 - row % 2 for row, d in enumerate(distances)
    ]
    assert found.margin_before.tolist() == pytest.approx([20 * d for d in distances], abs=1e-5)
    reach = [0.0 if row not in right else 0.01 if row < 10 else 0.02 for row in range(count)]
    after = [20 * (d - r) for d, r in zip(distances, reach, strict=True)]
    assert found.margin_after.tolist() == pytest.approx(after, abs=1e-5)
    names = {0.0: "clean", 0.01: "a"}
    broken_by = [names.get(r) or ("b" if row < 20 else "") for row, r in enumerate(reach)]
    assert found.broken_by.tolist() == broken_by


TWO = {"a": steps(2), "b": steps(4)}
RIGHT, LEFT = [0, 2, 3, 4, 5, 7], [2, 3, 4, 5, 7]


def evaluate_resumed(
    folder: Path, attacks: dict[str, SingleAttack] | None = None, rows: int = 8, **settings: Any
) -> Recorder:
    """Run an evaluation that may reuse rows of `folder`, check it against a fresh one, and return
    what it computed.
    """
    x, y = ladder_images(DISTANCES, LABELS)
    call = {
        "model": LadderNetwork(),
        "x": x[:rows],
        "y": y[:rows],
        "attack": AttackCascade(attacks=attacks or TWO),
    } | settings
    map = Recorder()
    found = evaluate(**call, resume_dir=folder, map=map, keep_adversarial=True)
    fresh = evaluate(**call, keep_adversarial=True)
    assert found.broken_by.tolist() == fresh.broken_by.tolist() and np.array_equal(
        found.x_adv, fresh.x_adv
    )
    assert found.queries.tolist() == fresh.queries.tolist()
    assert np.array_equal(found.margin_after, fresh.margin_after)
    assert np.array_equal(found.perturbation, fresh.perturbation)
    return map


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the shards of a finished evaluation."""
    rows = evaluate_resumed(tmp_path, shards=3).rows
    assert (sorted(rows["a"]), sorted(rows["b"])) == (RIGHT, LEFT)
    return tmp_path


@pytest.mark.parametrize(
    "settings", [{}, {"batch_size": 2}, {"shards": 5}, {"progress": lambda progress: None}]
)
def test_a_resumed_evaluation_reuses_finished_rows(settings: dict[str, Any], folder: Path) -> None:
    assert list(evaluate_resumed(folder, **settings).rows) == ["clean"]


def steeper_network() -> LadderNetwork:
    model = LadderNetwork()
    with torch.no_grad():
        model.scale.copy_(torch.nextafter(model.scale, torch.tensor(99.0)))
    return model


def shifted_network() -> LadderNetwork:
    model = LadderNetwork()
    model.middle.copy_(torch.nextafter(model.middle, torch.tensor(0.0)))
    return model


class Renamed(LadderNetwork):
    """The same weights in another architecture."""


def changed_labels() -> Tensor:
    return torch.tensor([*LABELS[:6], 1, 1])


def brighter_images() -> Tensor:
    x, _ = ladder_images(DISTANCES, LABELS)
    x[7, 0, 0, 0] = torch.nextafter(x[7, 0, 0, 0], torch.tensor(1.0))
    return x


@pytest.mark.parametrize(
    "settings",
    [
        {"y": changed_labels()},
        {"model": steeper_network()},
        {"model": shifted_network()},
        {"model": Renamed()},
        {"x": brighter_images()},
        {"index": np.arange(8) + 1},
        {"index": np.array([1, 0, *range(2, 8)])},
        {"seed": 1},
        {"fold": False},
        {"tile": 16},
        {"rows": 7},
    ],
    ids=[
        "labels",
        "weights",
        "buffers",
        "architecture",
        "x",
        "index",
        "order",
        "seed",
        "fold",
        "tile",
        "n",
    ],
)
def test_another_evaluation_reuses_nothing(settings: dict[str, Any], folder: Path) -> None:
    """Whatever differs, even one label or the last bit of one number; the shards of the first
    evaluation stay.
    """
    right = (
        [*RIGHT, 6] if "y" in settings else [row for row in RIGHT if row < settings.get("rows", 8)]
    )
    if "y" in settings:  # label 1 where the model says 0
        right.remove(6)
    rows = evaluate_resumed(folder, **settings).rows
    assert sorted(rows["a"]) == right and sorted(rows["b"]) == right[1:]
    assert list(evaluate_resumed(folder).rows) == ["clean"]


def test_an_evaluation_in_tf32_reuses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raysweep.evaluation.evaluator.has_tf32", lambda device: True)
    rows = evaluate_resumed(folder, attack=AttackCascade(attacks=TWO, tf32=True)).rows
    assert sorted(rows["a"]) == RIGHT and sorted(rows["b"]) == LEFT


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"a": steps(1)}, {"a": RIGHT, "b": [0]}),
        ({"a": steps(2, loss="cw")}, {"a": RIGHT}),
        ({"b": steps(5)}, {"b": LEFT}),
        ({"b": steps(4, start="uniform")}, {"b": LEFT}),
        ({"a": steps(2, eps=0.06), "b": steps(4, eps=0.06)}, {"a": RIGHT, "b": LEFT}),
        ({"a": steps(2, norm="L2"), "b": steps(4, norm="L2")}, {"a": RIGHT, "b": RIGHT}),
        ({"c": steps(5)}, {"c": [3, 7]}),
    ],
)
def test_only_the_attack_that_changed_is_run_again(
    change: dict[str, SingleAttack], again: dict[str, list[int]], folder: Path
) -> None:
    rows = evaluate_resumed(folder, TWO | change).rows
    del rows["clean"]
    assert {name: sorted(positions) for name, positions in rows.items()} == again


def test_the_same_attack_under_another_name_counts_as_another(folder: Path) -> None:
    rows = evaluate_resumed(folder, {"a": steps(2), "b-2": steps(4)}).rows
    assert sorted(rows) == ["b-2", "clean"] and sorted(rows["b-2"]) == LEFT


def load_stored(path: Path) -> ShardResult | None:
    """The result in a file of this user, if it is one."""
    stored = ShardResult.load_npz(path, derive_evaluation_key(path.parent.name))
    return stored.result if stored is not None else None


def shards_folder(folder: Path) -> Path:
    (inside,) = [path for path in folder.iterdir() if path.is_dir()]
    return inside


def test_rows_in_several_files_count_once_and_wrong_rows_do_not_count(folder: Path) -> None:
    """A file with all rows, also the wrong ones, beside the others; then that file alone."""
    x, y = ladder_images(DISTANCES, LABELS)
    work = ShardRunner(
        LadderNetwork(), x.numpy(), y.numpy(), np.arange(8), result_dir=shards_folder(folder)
    )
    for positions in (np.arange(8), np.array([7, 2, 0])):
        for name, attack in TWO.items():
            work(Shard(name, attack, positions))
    assert len(list(work.result_dir.glob("b-*.npz"))) == 5
    assert list(evaluate_resumed(folder).rows) == ["clean"]
    for path in work.result_dir.glob("[ab]-*.npz"):
        if set(load_stored(path).positions.tolist()) != set(range(8)):
            path.unlink()
    assert list(evaluate_resumed(folder).rows) == ["clean"]


def test_only_rows_that_are_missing_are_computed(folder: Path) -> None:
    gone = min(shards_folder(folder).glob("b-*.npz"))
    missing = load_stored(gone).positions.tolist()
    gone.unlink()
    rows = evaluate_resumed(folder).rows
    assert rows.pop("clean") == list(range(8)) and rows == {"b": missing}


def test_a_file_with_one_byte_changed_is_refused_or_has_the_same_content(folder: Path) -> None:
    path = min(shards_folder(folder).glob("a-*.npz"))
    whole, sound = path.read_bytes(), load_stored(path)
    refused = 0
    for place in range(0, len(whole), 11):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        found = load_stored(path)
        refused += found is None
        if found is not None:
            assert all(
                np.array_equal(value, vars(sound)[name]) for name, value in vars(found).items()
            ), place
    assert refused > len(whole) / 11 / 2
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        assert load_stored(path) is None


def test_a_file_that_lacks_an_array_or_holds_objects_is_refused(folder: Path) -> None:
    path = min(shards_folder(folder).glob("a-*.npz"))
    arrays = dict(np.load(path))
    np.savez(path, **{name: array for name, array in arrays.items() if name != "queries"})
    assert load_stored(path) is None
    np.savez(path, **arrays | {"queries": np.array([{"a": 1}] * len(arrays["queries"]))})
    assert load_stored(path) is None
    assert sorted(evaluate_resumed(folder).rows["a"]) == sorted(arrays["positions"].tolist())


def test_a_random_model_may_answer_differently_when_it_is_resumed(tmp_path: Path) -> None:
    class Noisy(LadderNetwork):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, :2] + 0.02 * torch.randn(len(x), 2)

    x, y = ladder_images([0.05, 0.1, 0.2], [0, 1, 1])
    maps = [Recorder(), Recorder()]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for map in maps:
            found = evaluate(
                Noisy(), x, y, AttackCascade(attacks={"a": steps(1)}), resume_dir=tmp_path, map=map
            )
            assert "differently each time" in found.warnings[0] and found.robust_accuracy == 1.0
    assert list(maps[1].rows) == ["clean"]


def test_an_evaluation_of_a_changed_model_is_not_resumed(folder: Path) -> None:
    """Its weights are the same, but its logits differ by a hundredth."""

    class Off(LadderNetwork):
        factor = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * x.new_tensor([self.factor, self.factor, 1.0, 1.0])

    x, y = ladder_images([0.01, 0.02, 0.03], [0, 1, 1])
    call = {"attack": AttackCascade(attacks={"a": steps(1)}), "resume_dir": folder}
    evaluate(Off(), x, y, **call)
    for factor, sound in ((1.00001, True), (1.01, False), (0.99, False)):
        model = Off()
        model.factor = factor
        if sound:
            evaluate(model, x, y, **call)
        else:
            with pytest.raises(SpecError, match="same weights but other outputs"):
                evaluate(model, x, y, **call)


class Fragile(nn.Module):
    """A ladder that is upside down in train mode, with a part in eval mode and a weight that is
    fixed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ladder, self.fixed, self.norm = (
            LadderNetwork(),
            nn.Parameter(torch.ones(())),
            nn.BatchNorm2d(1),
        )
        self.train()
        self.ladder.eval()
        self.fixed.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)
        return self.ladder(x) * (-1 if self.training else 1) * self.fixed


def test_a_model_is_attacked_in_eval_mode_and_left_as_it_was() -> None:
    model = Fragile()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    precision = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    found = evaluate_ladder(model=model, seed=3)
    assert found.broken_by.tolist() == report().broken_by.tolist() and found.seed == 3
    assert [m.training for m in model.modules()] == [True, False, True]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {
        "ladder.scale": True,
        "fixed": False,
        "norm.weight": True,
        "norm.bias": True,
    }
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert precision == (
        torch.backends.cudnn.conv.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
    )


def test_inputs_are_not_changed_and_bytes_are_divided_by_255() -> None:
    x, y = ladder_images([0.1, 0.2, -0.1], [0, 1, 1])
    bytes_ = (255 * x).round().to(torch.uint8)
    before = bytes_.clone()
    found = evaluate(
        LadderNetwork(),
        bytes_,
        y,
        AttackCascade(attacks={"a": steps(11, eps=0.11)}),
        keep_adversarial=True,
    )
    assert torch.equal(bytes_, before) and found.broken_by.tolist() == ["a", "", "clean"]
    assert np.array_equal(found.x_adv[1], bytes_[1].numpy().astype(np.float32) / np.float32(255))
    whole = bytes_.int()[:, 0]
    heights = (whole[:, 0, 0] + whole[:, 1, 1] - whole[:, 0, 1] - whole[:, 1, 0]) / 4 / 255
    assert found.margin_before.tolist() == pytest.approx(
        (20 * heights * torch.tensor([-1, 1, 1])).tolist(), abs=1e-4
    )
    kept = x.clone()
    evaluate(
        LadderNetwork(),
        x,
        y,
        AttackCascade(attacks={"a": steps(11, eps=0.11)}),
        keep_adversarial=True,
    )
    assert torch.equal(x, kept)


def test_progress_counts_what_was_done_before(folder: Path) -> None:
    gone = min(shards_folder(folder).glob("b-*.npz"))
    missing = len(load_stored(gone).positions)
    gone.unlink()
    told = []
    x, y = ladder_images(DISTANCES, LABELS)
    evaluate(
        LadderNetwork(),
        x,
        y,
        AttackCascade(attacks=TWO),
        resume_dir=folder,
        shards=2,
        progress=told.append,
    )
    told = [(p.attack, p.done, p.total, p.robust, p.examples) for p in told]
    # Of `b`'s five rows those in the two remaining files are done; two shards compute the others.
    # Two rows hold out.
    (first, second) = [row for row in told if row[0] == "b"]
    assert told[:2] == [("clean", 4, 8, 8, 8), ("clean", 8, 8, 8, 8)]
    assert (first[1], second[1:3]) == (5 - missing + 1, (5, 5)) and second[4] == 8


def test_a_pickled_runner_has_no_attack_model() -> None:
    """Each process makes the attack model again, on its own device."""
    x, y = ladder_images(DISTANCES, LABELS)
    runner = ShardRunner(LadderNetwork(), x.numpy(), y.numpy(), np.arange(8))
    shard = Shard("a", TWO["a"], np.arange(8))
    result = runner(shard)
    copied = pickle.loads(pickle.dumps(runner))
    assert runner._attack_model is not None and copied._attack_model is None
    assert np.array_equal(copied(shard).margin, result.margin)


def _say_one(shard: Shard) -> str:
    return f"one {shard.attack_name}"


def _say_two(shard: Shard) -> str:
    return f"two {shard.attack_name}"


def test_a_process_runs_what_the_file_it_is_given_holds(tmp_path: Path) -> None:
    """A pool outlives an evaluation: the next one brings another model in another file."""
    shard, files = Shard("clean", None, np.arange(3)), []
    for run in (_say_one, _say_two):
        files.append(tmp_path / f"{run.__name__}.pickle")
        files[-1].write_bytes(pickle.dumps(run))
    one, two = files
    assert [process_pool._run_pickled_shard(file, shard) for file in (one, one, two, one)] == [
        "one clean"
    ] * 2 + [
        "two clean",
        "one clean",
    ]
    one.unlink()
    assert process_pool._run_pickled_shard(one, shard) == "one clean", "it is read once"
