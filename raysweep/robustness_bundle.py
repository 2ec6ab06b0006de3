"""Bundle of a robustness result that others can verify.

A bundle is a folder with the card (claimed numbers and settings), the checkpoint, and the
adversarial example of each broken test example.
"""

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raysweep.atomic_files import atomic_folder
from raysweep.checkpoint_evaluation import CARD_FILE
from raysweep.data import DatasetSplits, DataSpec, load_data
from raysweep.errors import DamagedFileError
from raysweep.evaluation import RobustnessReport
from raysweep.evaluation.shards import (
    compute_norm_limit,
    compute_perturbation_norms,
    is_in_unit_range,
)
from raysweep.spec import JsonDict, SpecError
from raysweep.stores import META_FILE
from raysweep.training.checkpoint import (
    WEIGHTS_FILE,
    TrainingCheckpoint,
    read_checkpoint,
)
from raysweep.training.model_loading import load_trained_model

ADVERSARIAL_FILE, CHECKPOINT_FOLDER = "adversarial.npz", "checkpoint"
_BATCH_SIZE = 500
# Tolerance for the rounding of a mean of float32 numbers.
_ACCURACY_TOLERANCE = 1e-6
# Array name -> allowed values of `dtype.kind`, and number of dimensions.
_ARRAY_KINDS = {"x_adv": ("f", 4), "labels": ("iu", 1), "index": ("iu", 1), "robust": ("b", 1)}
Array = NDArray[Any]


def write_bundle(
    folder: Path,
    report: RobustnessReport,
    checkpoint: TrainingCheckpoint,
    data_spec: DataSpec,
    model_name: str,
) -> None:
    """Write a bundle, atomically.

    Args:
        folder: The folder to create.
        report: Result of `evaluate(..., keep_adversarial=True)`.
        checkpoint: Checkpoint of the evaluated model; it is copied.
        data_spec: Settings of the data set. The card does not contain `data_dir`.
        model_name: Name of the model, for the card.

    Raises:
        ValueError: If the report has no adversarial examples.
        OSError: If a file cannot be written.
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
        "environment": checkpoint.meta["environment"],
    }
    card = report.card(
        name=model_name, dataset=data_spec.name, architecture=checkpoint.config.model.name
    )
    with atomic_folder(folder) as partial:
        report.save_adversarial(partial / ADVERSARIAL_FILE)
        shutil.copytree(checkpoint.local_folder, partial / CHECKPOINT_FOLDER)
        (partial / CARD_FILE).write_text(json.dumps({**card, **claims}, indent=2) + "\n")


def verify_bundle(folder: Path, data_dir: Path | None = None) -> tuple[JsonDict, list[str]]:
    """Check the claims of a bundle against its own files and the test set.

    No attack runs: each stored example is compared with its test image and classified by the
    model. Nothing is unpickled.

    Args:
        folder: The bundle.
        data_dir: Folder of the data set's files on this machine; None for `digits`.

    Returns:
        The card, and one line for each false claim; no lines if all claims are true.

    Raises:
        SpecError: If `folder` is not a bundle, or the data set is not there.
        DamagedFileError: If a file of the bundle is damaged or missing.
    """
    card, arrays, spec = _load_bundle(folder, data_dir)
    for name in (META_FILE, WEIGHTS_FILE):
        if not (folder / CHECKPOINT_FOLDER / name).is_file():
            raise DamagedFileError(f"{folder}: not a bundle: {CHECKPOINT_FOLDER}/{name} is missing")
    checkpoint = read_checkpoint(folder / CHECKPOINT_FOLDER)
    dataset = load_data(spec)
    model = load_trained_model(checkpoint, dataset)
    return card, _find_bundle_problems(card, arrays, dataset, model)


def _load_bundle(
    folder: Path, data_dir: Path | None
) -> tuple[JsonDict, dict[str, Array], DataSpec]:
    """Load card, arrays and data settings of a bundle; SpecError if one of them is invalid."""
    try:
        card: JsonDict = json.loads((folder / CARD_FILE).read_text())
        if card["norm"] not in ("Linf", "L2"):
            raise ValueError(f"{CARD_FILE} has norm = {card['norm']!r}")
        for key in ("eps_value", "examples", "clean_accuracy", "robust_accuracy"):
            float(card[key])
        arrays = _load_adversarial_arrays(folder / ADVERSARIAL_FILE)
        spec = DataSpec.from_data(
            {**card["data"], "data_dir": str(data_dir) if data_dir else None},
            str(folder / CARD_FILE),
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        RuntimeError,
        zipfile.BadZipFile,
    ) as error:
        is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        raise (SpecError if is_missing else DamagedFileError)(
            f"{folder}: not a bundle: {error}"
        ) from error
    return card, arrays, spec


def _load_adversarial_arrays(path: Path) -> dict[str, Array]:
    """Load x_adv (N, C, H, W) and labels, index, robust (N,); ValueError if they are not that."""
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in _ARRAY_KINDS}
    for name, (kinds, n_dims) in _ARRAY_KINDS.items():
        array = arrays[name]
        has_length = array.ndim == n_dims and len(array) == len(arrays["x_adv"])
        if array.dtype.kind not in kinds or not has_length:
            raise ValueError(f"{name} in {ADVERSARIAL_FILE} is {array.dtype} {array.shape}")
    return arrays


def _find_bundle_problems(
    card: Mapping[str, Any], arrays: Mapping[str, Array], dataset: DatasetSplits, model: nn.Module
) -> list[str]:
    """Return one line for each claim that is false."""
    test, ids = dataset.test, arrays["index"].tolist()
    row_of_id = {int(example_id): row for row, example_id in enumerate(test.index.numpy())}
    unknown_ids = [example_id for example_id in ids if example_id not in row_of_id]
    if unknown_ids:
        return [f"{len(unknown_ids)} examples are not in the test set, the first: {unknown_ids[0]}"]
    if len(set(ids)) != len(ids):
        return ["an example is listed twice"]
    rows = torch.tensor([row_of_id[example_id] for example_id in ids])
    x, y = test.get_float_images(rows), test.y[rows]
    x_adv, is_robust = torch.from_numpy(arrays["x_adv"]), torch.from_numpy(arrays["robust"])
    if x_adv.shape != x.shape:
        return [f"its examples are {tuple(x_adv.shape[1:])}, the test set's {tuple(x.shape[1:])}"]
    problems = []
    if not np.array_equal(arrays["labels"], y.numpy()):
        problems.append("the labels are not the test set's")
    is_correct = _predict_labels(model, x) == y
    is_correct_adv = _predict_labels(model, x_adv) == y
    distances = compute_perturbation_norms(x_adv, x, card["norm"])
    is_within_eps = distances <= compute_norm_limit(card["eps_value"], card["norm"])
    masks_of_false_claims = {
        f"farther than eps {card['eps_value']:.6g} from their images": ~is_within_eps,
        "outside [0, 1]": ~is_in_unit_range(x_adv),
        "claimed broken, but classified correctly": ~is_robust & is_correct_adv,
        "claimed robust, but misclassified without an attack": is_robust & ~is_correct,
        "claimed robust, but broken by their stored adversarial example": (
            is_robust & is_correct & ~is_correct_adv
        ),
    }
    for description, mask in masks_of_false_claims.items():
        if mask.any():
            problems.append(f"{int(mask.sum())} examples are {description}")
    accuracies = {
        "robust_accuracy": is_robust.float().mean(),
        "clean_accuracy": is_correct.float().mean(),
    }
    for name, accuracy in accuracies.items():
        if abs(float(accuracy) - card[name]) > _ACCURACY_TOLERANCE:
            problems.append(f"{name} is {float(accuracy):.4f}, the card says {card[name]:.4f}")
    if len(rows) != card["examples"]:
        problems.append(f"there are {len(rows)} examples, the card says {card['examples']}")
    return problems


def _predict_labels(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the predicted classes, (N,)."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in torch.split(x, _BATCH_SIZE)])
