"""A claim that others can check: card, weights, and the adversarial examples behind every verdict."""

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
from raysweep.data import Dataset, DataSpec, load_data
from raysweep.evaluation import RobustnessReport
from raysweep.evaluation.shards import (
    compute_norm_limit,
    compute_perturbation_norms,
    is_in_unit_range,
)
from raysweep.spec import JsonDict, SpecError
from raysweep.training.checkpoint import (
    META_FILE,
    WEIGHTS_FILE,
    TrainingCheckpoint,
    read_checkpoint,
)
from raysweep.training.model_loading import load_trained_model

CARD_FILE, ADVERSARIAL_FILE, CHECKPOINT_FOLDER = "card.json", "adversarial.npz", "checkpoint"
_BATCH_SIZE = 500
Array = NDArray[Any]


def write_bundle(
    folder: Path,
    report: RobustnessReport,
    checkpoint: TrainingCheckpoint,
    data_spec: DataSpec,
    model_name: str,
) -> None:
    """Make `folder`, whole or not at all."""
    if report.x_adv is None:
        raise ValueError(
            "a bundle needs the adversarial examples: evaluate(..., keep_adversarial=True)"
        )
    about = {
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
        shutil.copytree(checkpoint.path, partial / CHECKPOINT_FOLDER)
        (partial / CARD_FILE).write_text(json.dumps({**card, **about}, indent=2) + "\n")


def verify_bundle(folder: Path, data_dir: Path | None = None) -> tuple[JsonDict, list[str]]:
    """The bundle's card, and what in it is not so: one line each, none for a sound bundle.

    Nothing is unpickled, and no attack is run: each saved example is looked at and shown to the
    model. Raises SpecError for what is no bundle.
    """
    try:
        card: JsonDict = json.loads((folder / CARD_FILE).read_text())
        if card["norm"] not in ("Linf", "L2"):
            raise ValueError(f"{CARD_FILE} says norm = {card['norm']!r}")
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
        raise SpecError(f"{folder}: not a bundle: {error}") from None
    for name in (META_FILE, WEIGHTS_FILE):
        if not (folder / CHECKPOINT_FOLDER / name).is_file():
            raise SpecError(f"{folder}: not a bundle: {CHECKPOINT_FOLDER}/{name} is missing")
    saved = read_checkpoint(folder / CHECKPOINT_FOLDER)
    data = load_data(spec)
    return card, _find_bundle_problems(card, arrays, data, load_trained_model(saved, data))


def _load_adversarial_arrays(path: Path) -> dict[str, Array]:
    """x_adv (N, C, H, W), labels, index and robust (N,). Raises ValueError for anything else."""
    with np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in ("x_adv", "labels", "index", "robust")}
    for key, (kinds, dims) in {
        "x_adv": ("f", 4),
        "labels": ("iu", 1),
        "index": ("iu", 1),
        "robust": ("b", 1),
    }.items():
        array = arrays[key]
        if (
            array.dtype.kind not in kinds
            or array.ndim != dims
            or len(array) != len(arrays["x_adv"])
        ):
            raise ValueError(f"{key} in {ADVERSARIAL_FILE} is {array.dtype} {array.shape}")
    return arrays


def _find_bundle_problems(
    card: Mapping[str, Any], arrays: Mapping[str, Array], dataset: Dataset, model: nn.Module
) -> list[str]:
    index = dataset.test.index.numpy()
    place = {int(number): row for row, number in enumerate(index)}
    if unknown := [number for number in arrays["index"].tolist() if number not in place]:
        return [f"{len(unknown)} examples are not in the test set, the first: {unknown[0]}"]
    if len(set(arrays["index"].tolist())) != len(arrays["index"]):
        return ["an example is there twice"]
    rows = torch.tensor([place[number] for number in arrays["index"].tolist()])
    x, y = dataset.test.get_float_images(rows), dataset.test.y[rows]
    x_adv, robust = torch.from_numpy(arrays["x_adv"]), torch.from_numpy(arrays["robust"])
    if x_adv.shape != x.shape:
        return [f"its examples are {tuple(x_adv.shape[1:])}, the test set's {tuple(x.shape[1:])}"]
    lines = []
    if not np.array_equal(arrays["labels"], y.numpy()):
        lines.append("the labels are not the test set's")
    size, limit = (
        compute_perturbation_norms(x_adv, x, card["norm"]),
        compute_norm_limit(card["eps_value"], card["norm"]),
    )
    right, right_adv = _predict_labels(model, x) == y, _predict_labels(model, x_adv) == y
    checks = {
        f"farther than eps {card['eps_value']:.6g} from their images": ~(size <= limit),
        "outside [0, 1]": ~is_in_unit_range(x_adv),
        "called broken, and yet classified correctly": ~robust & right_adv,
        "called robust, and yet misclassified as they are": robust & ~right,
        "called robust, and yet broken by what is saved with them": robust & right & ~right_adv,
    }
    lines += [
        f"{int(wrong.sum())} examples are {what}" for what, wrong in checks.items() if wrong.any()
    ]
    found = {"robust_accuracy": robust.float().mean(), "clean_accuracy": right.float().mean()}
    for name, share in found.items():
        if abs(float(share) - card[name]) > 1e-6:
            lines.append(f"{name} is {float(share):.4f}, the card says {card[name]:.4f}")
    if len(rows) != card["examples"]:
        lines.append(f"there are {len(rows)} examples, the card says {card['examples']}")
    return lines


def _predict_labels(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in torch.split(x, _BATCH_SIZE)])
