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

from raysweep.data import Data, DataSpec, load
from raysweep.evaluation import RobustnessReport
from raysweep.evaluation.shards import allowed, in_unit_range, sizes
from raysweep.files import whole_folder
from raysweep.spec import Json, SpecError
from raysweep.training.checkpoint import META, WEIGHTS, Checkpoint
from raysweep.training.checkpoint import read as read_checkpoint
from raysweep.training.load import load_model

CARD, ADVERSARIAL, CHECKPOINT = "card.json", "adversarial.npz", "checkpoint"
_ROWS = 500
Array = NDArray[Any]


def write_bundle(folder: Path, report: RobustnessReport, saved: Checkpoint, data: DataSpec, name: str) -> None:
    """Make `folder`, whole or not at all."""
    if report.x_adv is None:
        raise ValueError("a bundle needs the adversarial examples: evaluate(..., keep_adversarial=True)")
    about = {
        "norm": report.norm,
        "eps_value": report.eps,
        "examples": len(report.labels),
        "attacks": list(report.robust_after),
        "seed": saved.config.seed,
        "clean_accuracy": report.clean_accuracy,
        "robust_accuracy": report.robust_accuracy,
        "data": data.json_dict() | {"data_dir": None},
        "config": saved.config.json_dict(),
        "environment": saved.meta["environment"],
    }
    card = report.card(name=name, dataset=data.name, architecture=saved.config.model.name)
    with whole_folder(folder) as partial:
        report.save_adversarial(partial / ADVERSARIAL)
        shutil.copytree(saved.path, partial / CHECKPOINT)
        (partial / CARD).write_text(json.dumps({**card, **about}, indent=2) + "\n")


def verify_bundle(folder: Path, data_dir: Path | None = None) -> tuple[Json, list[str]]:
    """The bundle's card, and what in it is not so: one line each, none for a sound bundle.

    Nothing is unpickled, and no attack is run: each saved example is looked at and shown to the model.
    Raises SpecError for what is no bundle.
    """
    try:
        card: Json = json.loads((folder / CARD).read_text())
        if card["norm"] not in ("Linf", "L2"):
            raise ValueError(f"{CARD} says norm = {card['norm']!r}")
        for key in ("eps_value", "examples", "clean_accuracy", "robust_accuracy"):
            float(card[key])
        arrays = _arrays(folder / ADVERSARIAL)
        spec = DataSpec.load({**card["data"], "data_dir": str(data_dir) if data_dir else None}, str(folder / CARD))
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise SpecError(f"{folder}: not a bundle: {error}") from None
    for name in (META, WEIGHTS):
        if not (folder / CHECKPOINT / name).is_file():
            raise SpecError(f"{folder}: not a bundle: {CHECKPOINT}/{name} is missing")
    saved = read_checkpoint(folder / CHECKPOINT)
    data = load(spec)
    return card, _problems(card, arrays, data, load_model(saved, data))


def _arrays(path: Path) -> dict[str, Array]:
    """x_adv (N, C, H, W), labels, index and robust (N,). Raises ValueError for anything else."""
    with np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in ("x_adv", "labels", "index", "robust")}
    for key, (kinds, dims) in {"x_adv": ("f", 4), "labels": ("iu", 1), "index": ("iu", 1), "robust": ("b", 1)}.items():
        array = arrays[key]
        if array.dtype.kind not in kinds or array.ndim != dims or len(array) != len(arrays["x_adv"]):
            raise ValueError(f"{key} in {ADVERSARIAL} is {array.dtype} {array.shape}")
    return arrays


def _problems(card: Mapping[str, Any], arrays: Mapping[str, Array], data: Data, model: nn.Module) -> list[str]:
    index = data.test.index.numpy()
    place = {int(number): row for row, number in enumerate(index)}
    if unknown := [number for number in arrays["index"].tolist() if number not in place]:
        return [f"{len(unknown)} examples are not in the test set, the first: {unknown[0]}"]
    if len(set(arrays["index"].tolist())) != len(arrays["index"]):
        return ["an example is there twice"]
    rows = torch.tensor([place[number] for number in arrays["index"].tolist()])
    x, y = data.test.images(rows), data.test.y[rows]
    x_adv, robust = torch.from_numpy(arrays["x_adv"]), torch.from_numpy(arrays["robust"])
    if x_adv.shape != x.shape:
        return [f"its examples are {tuple(x_adv.shape[1:])}, the test set's {tuple(x.shape[1:])}"]
    lines = []
    if not np.array_equal(arrays["labels"], y.numpy()):
        lines.append("the labels are not the test set's")
    size, limit = sizes(x_adv, x, card["norm"]), allowed(card["eps_value"], card["norm"])
    right, right_adv = _predicted(model, x) == y, _predicted(model, x_adv) == y
    checks = {
        f"farther than eps {card['eps_value']:.6g} from their images": ~(size <= limit),
        "outside [0, 1]": ~in_unit_range(x_adv),
        "called broken, and yet classified correctly": ~robust & right_adv,
        "called robust, and yet misclassified as they are": robust & ~right,
        "called robust, and yet broken by what is saved with them": robust & right & ~right_adv,
    }
    lines += [f"{int(wrong.sum())} examples are {what}" for what, wrong in checks.items() if wrong.any()]
    found = {"robust_accuracy": robust.float().mean(), "clean_accuracy": right.float().mean()}
    for name, share in found.items():
        if abs(float(share) - card[name]) > 1e-6:
            lines.append(f"{name} is {float(share):.4f}, the card says {card[name]:.4f}")
    if len(rows) != card["examples"]:
        lines.append(f"there are {len(rows)} examples, the card says {card['examples']}")
    return lines


def _predicted(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in torch.split(x, _ROWS)])
