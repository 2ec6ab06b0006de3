"""One model under one attack on the test set: attacks, files, and the numbers into the run that
trained it.
"""

import json
from pathlib import Path

import torch

from raysweep import storage
from raysweep.atomic_files import atomic_write_text
from raysweep.attacks import AttackCascade, SingleAttack
from raysweep.data import Dataset, DataSpec
from raysweep.evaluation import (
    RobustnessReport,
    evaluate,
    show_evaluation_progress,
)
from raysweep.evaluation.evaluator import ShardMapper
from raysweep.schedules import resolved_value
from raysweep.spec import json_digest
from raysweep.tracking import Tracker
from raysweep.training.dataset_defaults import DATASET_DEFAULTS
from raysweep.training.model_loading import EvaluationTarget


def resolve_threat_model(target: EvaluationTarget, dataset_name: str) -> tuple[float, str]:
    """Epsilon and norm that the checkpoint was validated at, else those of the data set's profile."""
    if target.config is not None:
        first = next(
            iter(target.config.resolve_at(target.config.epochs).validation.attacks.values())
        )
        if hasattr(first, "eps") and hasattr(first, "norm"):
            return float(resolved_value(first.eps)), str(first.norm)
    return float(DATASET_DEFAULTS.get(dataset_name, {}).get("*.eps", 8 / 255)), "Linf"


def choose_evaluation_folder(
    out: Path,
    target: EvaluationTarget,
    attack: AttackCascade | SingleAttack,
    data_spec: DataSpec,
    n_examples: int,
    seed: int = 0,
) -> Path:
    """Beside the checkpoint that is judged, or under `runs/eval` where that is a bucket's or none
    of ours.
    """
    key = json_digest([attack.to_json_dict(), data_spec.to_json_dict(), n_examples, seed])
    if target.checkpoint is None:
        return out / "runs" / "eval" / f"{target.name.replace(':', '.')}-{key}"
    path = target.checkpoint.path
    if storage.is_bucket_copy(path):
        return (
            out
            / "runs"
            / "eval"
            / f"{target.name.replace('/', '-')}-{json_digest([key, storage.uri_of(path)])}"
        )
    return path.parent / f"eval-{path.name.removeprefix('epoch-')}-{key}"


def evaluate_checkpoint(
    target: EvaluationTarget,
    dataset: Dataset,
    attack: AttackCascade | SingleAttack,
    n_examples: int,
    folder: Path,
    executor: ShardMapper | None,
    *,
    batch_size: int = 500,
    seed: int = 0,
    keep_adversarial: bool = False,
) -> RobustnessReport:
    """The first `count` test examples under `attack`; shards that an earlier run finished in
    `folder` are kept.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    split, rows = dataset.test, slice(0, n_examples)
    with show_evaluation_progress() as progress:
        return evaluate(
            target.model.to(device),
            split.get_float_images(rows),
            split.y[rows],
            attack,
            batch_size=batch_size,
            seed=seed,
            index=split.index[rows],
            resume_dir=folder / "shards",
            map=executor,
            progress=progress,
            keep_adversarial=keep_adversarial,
        )


def save_evaluation_files(
    report: RobustnessReport, folder: Path, target: EvaluationTarget, data_spec: DataSpec
) -> None:
    report.save_parquet(folder / "examples.parquet")
    architecture = target.config.model.name if target.config else None
    report.save_card(
        folder / "card.json", name=target.name, dataset=data_spec.name, architecture=architecture
    )
    if report.x_adv is not None:
        report.save_adversarial(folder / "adversarial.npz")
    atomic_write_text(folder / "report.json", json.dumps(report.summary(), indent=1, default=str))


def log_evaluation(
    tracker: Tracker,
    run_id: str | None,
    target: EvaluationTarget,
    report: RobustnessReport,
    folder: Path,
    attack_name: str,
    is_full_test_set: bool,
) -> str:
    """Numbers and files into the run that trained the model, or into one of their own; its id.

    `aa/...` is for AutoAttack's standard version at the training's epsilon on the whole test set,
    and for nothing else. A seed but the usual one is named too.
    """
    own = run_id is None
    if run_id is None:
        # A path may hold what no filter of MLflow can quote.
        run_id = tracker.get_or_create_run(
            target.name, {"raysweep.kind": "eval", "raysweep.evaluation": json_digest(str(folder))}
        )
        tracker.set_tags(run_id, {"raysweep.folder": str(folder)})
    trained_for = target.config is None or resolve_threat_model(target, "") == (
        report.eps,
        report.norm,
    )
    full = is_full_test_set and trained_for and report.is_autoattack
    prefix = (
        "aa" if full else f"eval/{attack_name}-{report.norm}-{report.eps:.4g}-n{len(report.labels)}"
    )
    prefix += f"-seed{report.seed}" if report.seed else ""
    low, high = report.intervals["robust"]
    metrics = {
        "robust_accuracy": report.robust_accuracy,
        "robust_low": low,
        "robust_high": high,
        "clean_accuracy": report.clean_accuracy,
        **{f"after_{key}": float(rows.mean()) for key, rows in report.robust_after.items()},
    }
    tracker.log_final(run_id, {f"{prefix}/{key}": value for key, value in metrics.items()})
    for file in sorted(folder.glob("*.*")):
        tracker.log_file(run_id, file, f"eval/{folder.name.rpartition('-')[2]}")
    if own:
        tracker.end_run(run_id, "FINISHED")
    return run_id
