"""One model under one attack on a test set: its examples, files, and names in MLflow."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny
from ladder_network import LadderNetwork, ladder_images

from raysweep.attacks import PGD, AttackCascade, autoattack, build_named_attack
from raysweep.checkpoint_evaluation import (
    choose_evaluation_folder,
    describe_evaluation,
    evaluate_checkpoint,
    log_evaluation,
    resolve_threat_model,
    save_evaluation_files,
)
from raysweep.data import DatasetSplits, DataSpec, Split
from raysweep.evaluation import RobustnessReport, evaluate
from raysweep.stores import open_path
from raysweep.training.checkpoint import TrainingCheckpoint
from raysweep.training.config import TrainingConfig
from raysweep.training.model_loading import EvaluationTarget

DISTANCES, LABELS = [0.01, -0.02, 0.03, 0.05, 0.07, 0.03], [0, 1, 1, 0, 1, 0]
ATTACK = PGD(eps=0.04, step_size=0.02, steps=2, start="natural")
SUBJECT = EvaluationTarget(LadderNetwork(), "mine:make")


@pytest.fixture
def data() -> DatasetSplits:
    """A test set of six by hand, numbered from 100, whose pixels have the maximum 2; the other
    splits are not used.
    """
    x, y = ladder_images(DISTANCES, LABELS)
    test = Split(2 * x, y, torch.arange(100, 106), 2)
    none = Split(x[:0], y[:0], torch.arange(0), 2)
    return DatasetSplits(none, none, test, 1, 4, False, "f" * 16)


@pytest.fixture
def report(data: DatasetSplits, tmp_path: Path) -> RobustnessReport:
    return evaluate_checkpoint(
        SUBJECT, data, ATTACK, 6, tmp_path / "eval", None, keep_adversarial=True
    )


@pytest.mark.parametrize("count", [1, 4, 6])
def test_the_first_examples_of_the_test_set_are_judged(
    count: int, data: DatasetSplits, tmp_path: Path
) -> None:
    found = evaluate_checkpoint(SUBJECT, data, ATTACK, count, tmp_path, None, batch_size=3)
    assert found.labels.tolist() == LABELS[:count]
    assert found.index.tolist() == [100, 101, 102, 103, 104, 105][:count]
    assert found.margin_before.tolist() == pytest.approx(
        [20 * d for d in DISTANCES][:count], abs=1e-5
    )
    assert found.broken_by.tolist() == ["pgd", "clean", "pgd", "", "", "pgd"][:count]
    assert found.x_adv is None and found.seed == 0


def test_seed_numbers_and_settings_reach_the_evaluation(
    data: DatasetSplits, tmp_path: Path
) -> None:
    attack = AttackCascade(attacks={"pgd": PGD(eps=0.04, step_size=0.001, steps=2)})
    alone = evaluate(
        LadderNetwork(),
        data.test.get_float_images(slice(0, 6)),
        data.test.y,
        attack,
        seed=4,
        index=np.arange(100, 106),
    )
    found = evaluate_checkpoint(
        SUBJECT, data, attack, 6, tmp_path, None, seed=4, keep_adversarial=True
    )
    assert (
        found.seed == 4
        and np.array_equal(found.margin_after, alone.margin_after)
        and found.x_adv.shape[0] == 6
    )
    again = evaluate_checkpoint(SUBJECT, data, attack, 6, tmp_path, None, seed=5)
    assert not np.array_equal(found.margin_after, again.margin_after)


def test_finished_shards_are_in_the_folder_and_are_reused(
    data: DatasetSplits, tmp_path: Path
) -> None:
    names: list[str] = []

    def recording_map(run, shards):
        names.extend(shard.attack_name for shard in shards)
        return [run(shard) for shard in shards]

    for _ in range(2):
        evaluate_checkpoint(SUBJECT, data, ATTACK, 6, tmp_path / "eval", recording_map)
    assert names == ["clean", "pgd", "clean"]
    (shard,) = (tmp_path / "eval" / "shards").glob("*/pgd-*.npz")
    assert shard.is_file() and [path.name for path in (tmp_path / "eval").iterdir()] == ["shards"]


def checkpoint(config: TrainingConfig, path: Path) -> TrainingCheckpoint:
    return TrainingCheckpoint(open_path(path), config, 1, [{"epoch": 1.0}], {"environment": {}})


def test_the_threat_model_is_that_of_validation_or_else_of_the_data_set() -> None:
    def threat(**changes: Any) -> tuple[float, str]:
        return resolve_threat_model(
            EvaluationTarget(
                LadderNetwork(), "m", checkpoint(tiny("at", **changes), Path("run/epoch-0001"))
            ),
            "cifar10",
        )

    assert threat() == (0.15, "Linf")
    assert threat(validation__attacks__pgd__eps=0.07) == (0.07, "Linf")
    assert threat(validation__attacks__cw__eps=0.07) == (0.15, "Linf"), "that of the first attack"
    assert threat(**{"*__eps": 0.5, "*__norm": "L2"}) == (0.5, "L2")
    growing = {"kind": "piecewise", "boundaries": [1], "values": [0.02, 0.08]}
    assert threat(epochs=3, validation__attacks__pgd__eps=growing) == (0.08, "Linf"), (
        "at the end of the training"
    )
    assert [
        resolve_threat_model(SUBJECT, name) for name in ("digits", "mnist", "cifar10", "unknown")
    ] == [
        (0.15, "Linf"),
        (0.3, "Linf"),
        (8 / 255, "Linf"),
        (8 / 255, "Linf"),
    ]


def test_every_evaluation_has_a_folder_of_its_own(tmp_path: Path) -> None:
    spec = DataSpec()

    def folder(subject: EvaluationTarget = SUBJECT, **changes: Any) -> Path:
        call = {"attack": ATTACK, "data": spec, "count": 6, "seed": 0} | changes
        return choose_evaluation_folder(
            tmp_path, subject, call["attack"], call["data"], call["count"], call["seed"]
        )

    assert folder() == folder() and folder().parent == tmp_path / "runs" / "eval"
    assert folder().name.startswith("mine.make-")
    variants = [
        {"attack": ATTACK.model_copy(update={"eps": 0.05})},
        {"attack": AttackCascade(attacks={"pgd": ATTACK})},
        {"data": DataSpec(val_size=7)},
        {"count": 5},
        {"seed": 1},
        {"subject": replace(SUBJECT, name="mine:other")},
    ]
    assert len({folder(), *(folder(**variant) for variant in variants)}) == 1 + len(variants)
    saved = [
        EvaluationTarget(
            LadderNetwork(), "mine/epoch", checkpoint(tiny("at"), tmp_path / "run" / name)
        )
        for name in ("epoch-0001", "epoch-0002")
    ]
    ours = [folder(subject) for subject in saved]
    assert [path.parent for path in ours] == [tmp_path / "run"] * 2
    assert [path.name[:10] for path in ours] == ["eval-0001-", "eval-0002-"]
    assert len({folder(saved[0], **variant) for variant in [{}, *variants[:5]]}) == 6


def test_the_files_of_an_evaluation(report: RobustnessReport, tmp_path: Path) -> None:
    saved = EvaluationTarget(
        LadderNetwork(), "run/epoch-0001", checkpoint(tiny("at"), tmp_path / "run" / "epoch-0001")
    )
    save_evaluation_files(report, tmp_path / "a", saved, DataSpec())
    names = ["adversarial.npz", "card.json", "examples.parquet", "report.json"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    card = json.loads((tmp_path / "a" / "card.json").read_text())
    assert (card["name"], card["dataset"], card["architecture"]) == (
        "run/epoch-0001",
        "digits",
        "digits_cnn",
    )
    assert (
        card["clean_acc"] == "83.33"
        and card["reported"] == "33.33"
        and card["autoattack_acc"] is None
    )
    summary = json.loads((tmp_path / "a" / "report.json").read_text())
    assert summary == json.loads(json.dumps(report.summary())) and summary[
        "robust_accuracy"
    ] == pytest.approx(1 / 3)
    assert pq.read_table(tmp_path / "a" / "examples.parquet").num_rows == 6
    save_evaluation_files(
        replace(report, x_adv=None), tmp_path / "b", SUBJECT, DataSpec(name="mnist")
    )
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == names[1:]
    card = json.loads((tmp_path / "b" / "card.json").read_text())
    assert (card["name"], card["dataset"], card["architecture"]) == ("mine:make", "mnist", None)


class RecordingTracker:
    """Records the calls that a tracker gets."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.files: list[tuple[str, str, str | None]] = []
        self.runs: list[tuple[str, Any]] = []

    def get_or_create_run(self, name: str, tags: Mapping[str, str]) -> str:
        self.runs.append((name, dict(tags)))
        return "new"

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        self.runs.append((run_id, dict(tags)))

    def log_final(self, run_id: str, metrics: Mapping[str, float]) -> None:
        self.metrics |= {f"{run_id}:{name}": value for name, value in metrics.items()}

    def log_file(self, run_id: str, path: Path, artifact_folder: str | None = None) -> None:
        self.files.append((run_id, path.name, artifact_folder))

    def end_run(self, run_id: str, status: str) -> None:
        self.runs.append((run_id, status))


def log_and_get_prefix(
    report: RobustnessReport, subject: EvaluationTarget, folder: Path, whole: bool = True
) -> str:
    """The prefix of an evaluation's numbers in the run of its training."""
    book = RecordingTracker()
    assert (
        log_evaluation(book, describe_evaluation(subject, report, "name", whole, "id"), folder)
        == "id"
    )  # type: ignore[arg-type]
    assert book.runs == []
    prefixes = {name.removeprefix("id:").rpartition("/")[0] for name in book.metrics}
    (prefix,) = prefixes
    return prefix


def test_the_prefix_aa_is_for_autoattack_on_the_whole_test_set_at_the_radius_of_training(
    report, tmp_path: Path
) -> None:
    trained = EvaluationTarget(
        LadderNetwork(), "m", checkpoint(tiny("at"), tmp_path / "run" / "epoch-0001")
    )

    def standard(eps: float = 0.15, norm: str = "Linf", **changes: Any) -> RobustnessReport:
        attack = changes.pop("attack", None) or autoattack(eps, norm)
        return replace(report, attack=attack.to_json_dict(), eps=eps, norm=norm, **changes)

    assert log_and_get_prefix(standard(), trained, tmp_path) == "aa"
    assert log_and_get_prefix(standard(0.3), SUBJECT, tmp_path) == "aa", (
        "a model that was not trained here has no radius of training"
    )
    assert log_and_get_prefix(standard(seed=1), trained, tmp_path) == "aa-seed1"
    assert (
        log_and_get_prefix(standard(), trained, tmp_path, whole=False) == "eval/name-Linf-0.15-n6"
    )
    assert log_and_get_prefix(standard(0.1), trained, tmp_path) == "eval/name-Linf-0.1-n6"
    assert log_and_get_prefix(standard(0.15, "L2"), trained, tmp_path) == "eval/name-L2-0.15-n6"
    others = [autoattack(0.15, version="plus"), build_named_attack("apgd-ce", 0.15)]
    for attack in others:
        assert (
            log_and_get_prefix(standard(attack=attack), trained, tmp_path)
            == "eval/name-Linf-0.15-n6"
        )
    third = standard(8 / 255, seed=3)
    assert log_and_get_prefix(third, trained, tmp_path) == "eval/name-Linf-0.03137-n6-seed3"


def test_the_numbers_and_files_that_go_into_a_run(report: RobustnessReport, tmp_path: Path) -> None:
    folder = tmp_path / "mine.make-0123"
    save_evaluation_files(report, folder, SUBJECT, DataSpec())
    (folder / "shards").mkdir()
    book = RecordingTracker()
    assert (
        log_evaluation(book, describe_evaluation(SUBJECT, report, "pgd20", True), folder) == "new"
    )  # type: ignore[arg-type]
    prefix = "new:eval/pgd20-Linf-0.04-n6"
    low, high = book.metrics.pop(f"{prefix}/robust_low"), book.metrics.pop(f"{prefix}/robust_high")
    assert 0.05 < low < 1 / 3 < high < 0.75
    assert book.metrics == {
        f"{prefix}/robust_accuracy": pytest.approx(1 / 3),
        f"{prefix}/clean_accuracy": pytest.approx(5 / 6),
        f"{prefix}/after_pgd": pytest.approx(1 / 3),
    }
    names = ["adversarial.npz", "card.json", "examples.parquet", "report.json"]
    assert book.files == [("new", name, "eval/0123") for name in names]
    (name, tags), (_, place), closed = book.runs
    assert (
        name == "mine:make"
        and tags["raysweep.kind"] == "eval"
        and place == {"raysweep.folder": str(folder)}
    )
    assert closed == ("new", "FINISHED")
