"""Loading of a bundle together with the verifier's own test data."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from raysweep.checkpoint_evaluation import CARD_FILE
from raysweep.data import DatasetSplits, DataSpec, Split, load_data
from raysweep.errors import DamagedFileError
from raysweep.robustness_bundle.card import BundleCard, read_card
from raysweep.robustness_bundle.files import (
    ADVERSARIAL_FILE,
    CHECKPOINT_FOLDER,
    Array,
    list_bundle_files,
    quote_value,
    read_adversarial_arrays,
)
from raysweep.robustness_bundle.manifest import Manifest, read_manifest
from raysweep.spec import SpecError
from raysweep.stores import META_FILE
from raysweep.training.checkpoint import WEIGHTS_FILE, TrainingCheckpoint, read_checkpoint
from raysweep.training.model_loading import load_trained_model


@dataclass(frozen=True)
class LoadedBundle:
    """A bundle, of which nothing has been compared yet, with the verifier's data.

    Attributes:
        folder: The bundle.
        file_names: Its files.
        card: Its claims.
        manifest: Its manifest; None if raysweep 0.1 wrote it.
        checkpoint: Its checkpoint.
        model: The checkpoint's model, in eval mode on the CPU.
        arrays: Its arrays, N examples (see `read_adversarial_arrays`).
        test: All test examples of the verifier.
        rows: Rows of `test` that the N examples are, (N,) int64.
        data: The verifier's data set, in words.
    """

    folder: Path
    file_names: list[str]
    card: BundleCard
    manifest: Manifest | None
    checkpoint: TrainingCheckpoint
    model: nn.Module
    arrays: Mapping[str, Array]
    test: Split
    rows: Tensor
    data: str


def load_bundle(folder: Path, data_dir: Path | None) -> LoadedBundle:
    """Load a bundle.

    Args:
        folder: The bundle.
        data_dir: Folder of the data set's files on this machine; None for `digits`.

    Raises:
        SpecError: If `folder` is not a bundle, or the data set is not there.
        DamagedFileError: If a file of the bundle is damaged or missing.
    """
    file_names = list_bundle_files(folder)
    _require_files(folder, file_names)
    card = read_card(folder)
    manifest = read_manifest(folder, file_names)
    checkpoint = read_checkpoint(folder / CHECKPOINT_FOLDER)
    spec = _make_data_spec(card, data_dir, folder)
    dataset = load_data(spec)
    arrays = read_adversarial_arrays(
        folder / ADVERSARIAL_FILE, len(dataset.test), tuple(dataset.test.x.shape[1:])
    )
    return LoadedBundle(
        folder=folder,
        file_names=file_names,
        card=card,
        manifest=manifest,
        checkpoint=checkpoint,
        model=_load_model(folder, checkpoint, dataset),
        arrays=arrays,
        test=dataset.test,
        rows=_find_rows(folder, arrays, dataset.test),
        data=repr(spec.name) if data_dir is None else f"{spec.name!r} in {data_dir}",
    )


def _require_files(folder: Path, file_names: list[str]) -> None:
    """Raise an error if the files of a bundle are missing."""
    if CARD_FILE not in file_names or ADVERSARIAL_FILE not in file_names:
        raise SpecError(f"{folder}: not a bundle: it has no {CARD_FILE} or no {ADVERSARIAL_FILE}")
    for name in (META_FILE, WEIGHTS_FILE):
        if f"{CHECKPOINT_FOLDER}/{name}" not in file_names:
            raise DamagedFileError(f"{folder}: not a bundle: {CHECKPOINT_FOLDER}/{name} is missing")


def _make_data_spec(card: BundleCard, data_dir: Path | None, folder: Path) -> DataSpec:
    """Return the settings of the verifier's data: a bundle names neither files nor downloads."""
    own = {"data_dir": str(data_dir) if data_dir else None, "download": False, "unlabeled": None}
    return DataSpec.from_data({**card.data, **own}, str(folder / CARD_FILE), stored=True)


def _load_model(folder: Path, checkpoint: TrainingCheckpoint, dataset: DatasetSplits) -> nn.Module:
    """Load the model. Raises DamagedFileError if its weights are not numbers."""
    model = load_trained_model(checkpoint, dataset)
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise DamagedFileError(f"{folder}: the weights {quote_value(name)} are not finite")
    return model


def _find_rows(folder: Path, arrays: Mapping[str, Array], test: Split) -> Tensor:
    """Return the rows of the test set that the examples are, (N,); DamagedFileError if not."""
    ids = arrays["index"].tolist()
    row_of_id = {int(example_id): row for row, example_id in enumerate(test.index.tolist())}
    unknown_ids = [example_id for example_id in ids if example_id not in row_of_id]
    problem = None
    if unknown_ids:
        problem = (
            f"{len(unknown_ids)} examples are not in the test set, the first: {unknown_ids[0]}"
        )
    elif len(set(ids)) != len(ids):
        problem = "an example is listed twice"
    if problem:
        raise DamagedFileError(f"{folder}: {problem}")
    return torch.from_numpy(np.array([row_of_id[example_id] for example_id in ids]))
