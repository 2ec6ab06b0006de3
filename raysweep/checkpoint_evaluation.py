"""Evaluate one model under one attack on the test set, and store the results.

Results are written to files, and to the MLflow run that trained the model.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.atomic_files import atomic_write_text
from raysweep.attacks import AttackCascade, SingleAttack
from raysweep.data import (
    DatasetSplits,
    DataSpec,
    SubsetChoice,
    choose_subset_rows,
    find_subset_warnings,
)
from raysweep.folder_lock import require_no_links
from raysweep.lazy_modules import torch
from raysweep.spec import json_digest
from raysweep.tracking import Tracker, checkpoint_run_tags
from raysweep.training.dataset_defaults import DATASET_DEFAULTS
from raysweep.training.model_loading import EvaluationTarget
from raysweep.unrecorded_folders import UNRECORDED_FILE, clear_unrecorded

if TYPE_CHECKING:
    from raysweep.evaluation import RobustnessReport, ShardMapper

# Files of an evaluation: the results per example, and a model entry with RobustBench's field names.
EXAMPLES_FILE = "examples.parquet"
CARD_FILE = "card.json"


def resolve_threat_model(target: EvaluationTarget, dataset_name: str) -> tuple[float, str]:
    """Return the epsilon and norm to evaluate a model at by default.

    Args:
        target: The model.
        dataset_name: Name of the data set, for models without a training configuration.

    Returns:
        Epsilon (in pixels of [0, 1]) and norm. If the model has a training configuration, those of
        its first validation attack; else the data set's default epsilon, or 8/255, and "Linf".
    """
    if target.config is not None:
        validation = target.config.resolve_at(target.config.epochs).validation
        if threat_model := validation.find_threat_model():
            return threat_model
    return float(DATASET_DEFAULTS.get(dataset_name, {}).get("*.eps", 8 / 255)), "Linf"


def choose_evaluation_folder(
    out: Path,
    target: EvaluationTarget,
    attack: AttackCascade | SingleAttack,
    data_spec: DataSpec,
    n_examples: int,
    seed: int = 0,
    subset: SubsetChoice = "first",
) -> Path:
    """Choose the folder for the files of an evaluation. The same settings give the same folder.

    It may be there already, in a folder that somebody has sent.

    Args:
        out: Output folder of the command, for models without a local checkpoint.
        target: The model.
        attack: The attack.
        data_spec: Settings of the data set.
        n_examples: Number of test examples.
        seed: Seed of the attack.
        subset: How the examples are chosen (see `choose_subset_rows`); "first" for all examples.

    Returns:
        A folder beside the checkpoint if the checkpoint is in a local folder; else a folder in
        `out`/runs/eval.

    Raises:
        DamagedFileError: The folder is there, and is or has a link, a pipe or the like. One line.
    """
    folder = _name_evaluation_folder(out, target, attack, data_spec, n_examples, seed, subset)
    is_below_out = folder.is_relative_to(out / "runs" / "eval")
    require_no_links(folder, out / "runs" if is_below_out else folder.parent)
    return folder


def _name_evaluation_folder(
    out: Path,
    target: EvaluationTarget,
    attack: AttackCascade | SingleAttack,
    data_spec: DataSpec,
    n_examples: int,
    seed: int,
    subset: SubsetChoice,
) -> Path:
    """Return the folder; the arguments are those of `choose_evaluation_folder`."""
    content = [attack.to_json_dict(), data_spec.to_stored_dict(), n_examples, seed]
    # Version 0.1 always took the first examples; their folders keep their names.
    key = json_digest(content if subset == "first" else [*content, subset])
    if target.checkpoint is None:
        return out / "runs" / "eval" / f"{target.name.replace(':', '.')}-{key}"
    path = target.checkpoint.path
    local_path = path.local_path
    if local_path is None:
        bucket_key = json_digest([key, str(path)])
        return out / "runs" / "eval" / f"{target.name.replace('/', '-')}-{bucket_key}"
    return local_path.parent / f"eval-{path.name.removeprefix('epoch-')}-{key}"


def evaluate_checkpoint(
    target: EvaluationTarget,
    dataset: DatasetSplits,
    attack: AttackCascade | SingleAttack,
    n_examples: int,
    folder: Path,
    executor: ShardMapper | None,
    *,
    batch_size: int = 500,
    seed: int = 0,
    keep_adversarial: bool = False,
    subset: SubsetChoice = "first",
) -> RobustnessReport:
    """Evaluate a model on test examples, with a progress bar.

    Args:
        target: The model. It is moved to the GPU if there is one.
        dataset: The data set.
        attack: The attack.
        n_examples: Number of test examples.
        folder: Folder of the evaluation; shards that an earlier run stored there are reused.
        executor: Runs the shards; None for this process.
        batch_size: Examples per attack call.
        seed: Seed of the attack.
        keep_adversarial: Whether the report has the adversarial examples.
        subset: How the examples are chosen (see `choose_subset_rows`).

    Returns:
        The report. If it is of a part of the test set, it names `subset`, and its warnings say why
        the accuracies may not be those on the whole set.

    Raises:
        SpecError: If no attack can run on the model (see `evaluate`), or there are no test images.
    """
    from raysweep.evaluation import evaluate, show_evaluation_progress

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    split = dataset.require_test()
    rows = choose_subset_rows(split.y, n_examples, subset)
    with show_evaluation_progress() as progress:
        report = evaluate(
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
    if len(rows) == len(split):
        return report
    warnings = (*report.warnings, *find_subset_warnings(split.y, rows, subset))
    return dataclasses.replace(report, subset=subset, warnings=warnings)


def save_evaluation_files(
    report: RobustnessReport, folder: Path, target: EvaluationTarget, data_spec: DataSpec
) -> None:
    """Write the files of an evaluation.

    These are the results per example, the card, the summary (`report.json`), and the adversarial
    examples if the report has them.

    Args:
        report: The report.
        folder: Folder of the evaluation.
        target: The model.
        data_spec: Settings of the data set.

    Raises:
        OSError: If a file cannot be written.
    """
    report.save_parquet(folder / EXAMPLES_FILE)
    architecture = target.config.model.name if target.config else None
    report.save_card(
        folder / CARD_FILE, name=target.name, dataset=data_spec.name, architecture=architecture
    )
    if report.x_adv is not None:
        report.save_adversarial(folder / "adversarial.npz")
    atomic_write_text(folder / "report.json", json.dumps(report.summary(), indent=1, default=str))


@dataclasses.dataclass(frozen=True)
class EvaluationRecord:
    """What MLflow receives of an evaluation, besides the files of its folder.

    Attributes:
        name: Name of the model, and of the run of an evaluation without a training run.
        metrics: Values by name.
        run_id: Run that trained the model; None if it is not known.
        run_tags: Tags by which that run is found; empty for a model that was trained elsewhere.
    """

    name: str
    metrics: dict[str, float]
    run_id: str | None = None
    run_tags: dict[str, str] = dataclasses.field(default_factory=dict)


def describe_evaluation(
    target: EvaluationTarget,
    report: RobustnessReport,
    attack_name: str,
    is_full_test_set: bool,
    run_id: str | None = None,
) -> EvaluationRecord:
    """Return what MLflow receives of an evaluation.

    If AutoAttack's standard version ran on the whole test set, at the norm and epsilon of the
    training, the metrics are named `aa/...`. All others are named after attack, norm, epsilon,
    number of examples, and the choice of the examples if these are not the first ones. A seed other
    than 0 is part of the name.

    Args:
        target: The model.
        report: The report.
        attack_name: Name of the attack as the user gave it.
        is_full_test_set: Whether the report covers the whole test set.
        run_id: Run that trained the model; None to find it by the checkpoint.
    """
    prefix = _format_metric_prefix(target, report, attack_name, is_full_test_set)
    low, high = report.intervals["robust"]
    metrics = {
        "robust_accuracy": report.robust_accuracy,
        "robust_low": low,
        "robust_high": high,
        "clean_accuracy": report.clean_accuracy,
        **{f"after_{name}": float(mask.mean()) for name, mask in report.robust_after.items()},
    }
    tags = {}
    if run_id is None and target.checkpoint is not None:
        tags = checkpoint_run_tags(target.checkpoint)
    return EvaluationRecord(
        target.name, {f"{prefix}/{name}": value for name, value in metrics.items()}, run_id, tags
    )


def log_evaluation(tracker: Tracker, record: EvaluationRecord, folder: Path) -> str:
    """Log the metrics and files of an evaluation to the run of the training, or to one of its own.

    Args:
        tracker: Tracker that logs them.
        record: What is logged.
        folder: Folder of the evaluation; its files are logged, and its note that MLflow lacks them
            is deleted.

    Returns:
        Id of the run in which they were logged.

    Raises:
        RecordStoreUnavailable: The store does not answer, or refuses a record.
    """
    run_id = record.run_id or (tracker.find_run(record.run_tags) if record.run_tags else None)
    has_own_run = run_id is None
    if run_id is None:
        # MLflow cannot quote every path in a search filter, so runs are searched by a digest.
        tags = {"raysweep.kind": "eval", "raysweep.evaluation": json_digest(str(folder))}
        run_id = tracker.get_or_create_run(record.name, tags)
        tracker.set_tags(run_id, {"raysweep.folder": str(folder)})
    tracker.log_final(run_id, record.metrics)
    for file in sorted(folder.glob("*.*")):
        if file.name != UNRECORDED_FILE:
            tracker.log_file(run_id, file, f"eval/{folder.name.rpartition('-')[2]}")
    if has_own_run:
        tracker.end_run(run_id, "FINISHED")
    clear_unrecorded(folder)
    return run_id


def _format_metric_prefix(
    target: EvaluationTarget, report: RobustnessReport, attack_name: str, is_full_test_set: bool
) -> str:
    """Return the group of an evaluation's metrics (see `log_evaluation`)."""
    has_trained_threat = target.config is None or (
        resolve_threat_model(target, "") == (report.eps, report.norm)
    )
    if is_full_test_set and has_trained_threat and report.is_autoattack:
        prefix = "aa"
    else:
        prefix = f"eval/{attack_name}-{report.norm}-{report.eps:.4g}-n{len(report.labels)}"
        if report.subset not in (None, "first"):
            prefix = f"{prefix}-{report.subset}"
    return f"{prefix}-seed{report.seed}" if report.seed else prefix
