"""Writing a bundle."""

import json
import shutil
from pathlib import Path

import numpy as np

from raysweep.atomic_files import atomic_folder
from raysweep.checkpoint_evaluation import CARD_FILE
from raysweep.data import DataSpec, Split
from raysweep.evaluation import RobustnessReport
from raysweep.robustness_bundle.files import ADVERSARIAL_FILE, CHECKPOINT_FOLDER
from raysweep.robustness_bundle.manifest import write_manifest
from raysweep.robustness_bundle.signature import sign_manifest
from raysweep.training.checkpoint import TrainingCheckpoint


def write_bundle(
    folder: Path,
    report: RobustnessReport,
    checkpoint: TrainingCheckpoint,
    data_spec: DataSpec,
    model_name: str,
    *,
    test: Split,
    signing_key: Path | None = None,
) -> None:
    """Write a bundle, atomically.

    Args:
        folder: The folder to create.
        report: Result of `evaluate(..., keep_adversarial=True)`.
        checkpoint: Checkpoint of the evaluated model; it is copied.
        data_spec: Settings of the data set. The card does not contain `data_dir`.
        model_name: Name of the model, for the card.
        test: All test examples of the data set.
        signing_key: SSH key that signs the manifest; None for no signature.

    Raises:
        ValueError: If the report has no adversarial examples.
        OSError: If a file cannot be written.
        InfrastructureError: If the key cannot sign.
    """
    if report.x_adv is None:
        raise ValueError(
            "a bundle needs the adversarial examples: evaluate(..., keep_adversarial=True)"
        )
    claims = {
        "norm": report.norm,
        "eps_value": report.eps,
        "examples": len(report.labels),
        "attacks": list(report.robust_after),
        "seed": checkpoint.config.seed,
        "clean_accuracy": report.clean_accuracy,
        "robust_accuracy": report.robust_accuracy,
        "data": data_spec.to_stored_dict() | {"data_dir": None},
        "config": checkpoint.config.to_stored_dict(),
        "environment": checkpoint.meta.get("environment", {}),
    }
    card = report.card(
        name=model_name, dataset=data_spec.name, architecture=checkpoint.config.model.name
    )
    with atomic_folder(folder) as partial:
        np.savez(
            partial / ADVERSARIAL_FILE,
            x_adv=report.x_adv,
            labels=report.labels,
            index=report.index,
            robust=report.robust,
            predicted=report.predicted,
        )
        shutil.copytree(checkpoint.local_folder, partial / CHECKPOINT_FOLDER)
        (partial / CARD_FILE).write_text(
            json.dumps({**card, **claims}, indent=2) + "\n", encoding="utf-8"
        )
        write_manifest(partial, data_spec.name, checkpoint.meta["data_fingerprint"], test)
        if signing_key is not None:
            sign_manifest(partial, signing_key)
