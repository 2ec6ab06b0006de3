"""The three splits of a data set, as tensors on a device."""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from raysweep.data.batches import Batch, epoch_batches
from raysweep.data.datasets import DATASET_LOADERS, TrainTestArrays
from raysweep.data.unlabeled import read_unlabeled_file
from raysweep.rng import derive_seed
from raysweep.spec import Spec, SpecError, describe_unknown_name


class DataSpec(Spec):
    """Which images.

    val_size: examples carved, class-balanced, from the *training* set for every choice that is made
    while sweeping. train_size: use only so many of the rest (class-balanced); null for all.
    augment: 4-pixel random crop and horizontal flip; null for colour images only. unlabeled: .npz,
    .parquet or .pickle of pseudo-labelled images of the same shape, looked for in `data_dir`, for
    `rst` and `gair-rst`; they are the share `unlabeled_fraction` of each batch. Paths become
    absolute, `unlabeled` as part of `data_dir`: a trial trains in another working directory.
    """

    name: str = "digits"
    data_dir: Path | None = None
    download: bool = False
    val_size: Annotated[int, Field(ge=1)] = 1000
    train_size: Annotated[int, Field(ge=1)] | None = None
    augment: bool | None = None
    split_seed: int = 0
    unlabeled: Path | None = None
    unlabeled_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5

    @field_validator("data_dir", "unlabeled")
    @classmethod
    def _make_path_absolute(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        if path is None:
            return None
        with suppress(RuntimeError):  # no such user
            path = path.expanduser()
        return path if info.data.get("data_dir") else path.resolve()

    @field_validator("name")
    @classmethod
    def _check_dataset_name(cls, name: str) -> str:
        if name not in DATASET_LOADERS:
            raise SpecError(describe_unknown_name("data set", name, list(DATASET_LOADERS)))
        return name


@dataclass(frozen=True)
class Split:
    """x (N, C, H, W) uint8 in 0..white, y (N,) int64, index (N,) int64: the examples' numbers in
    their source.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    pixel_max: int

    def __len__(self) -> int:
        return len(self.y)

    def get_float_images(self, rows: Tensor | slice) -> Tensor:
        """float32 in [0, 1]."""
        return self.x[rows].float() / self.pixel_max

    def to(self, device: torch.device) -> "Split":
        return Split(self.x.to(device), self.y.to(device), self.index.to(device), self.pixel_max)


@dataclass(frozen=True)
class Dataset:
    """train and val are parts of the source's training set, every prefix of val class-balanced;
    test is apart.

    unlabeled: pseudo-labelled images, the share `unlabeled_fraction` of each training batch.
    """

    train: Split
    val: Split
    test: Split
    channels: int
    classes: int
    augment: bool
    fingerprint: str
    unlabeled: Split | None = None
    unlabeled_fraction: float = 0.5

    def to(self, device: torch.device) -> "Dataset":
        more = None if self.unlabeled is None else self.unlabeled.to(device)
        return replace(self, train=self.train.to(device), val=self.val.to(device), unlabeled=more)

    def iter_train_batches(
        self, batch_size: int, seed: int, epoch: int, rank: int = 0, n_workers: int = 1
    ) -> Iterator["Batch"]:
        """One epoch of training batches; of each, the rows of one worker."""
        mixed = (self.unlabeled, self.unlabeled_fraction)
        return epoch_batches(
            self.train, batch_size, seed, epoch, self.augment, rank, n_workers, *mixed
        )


def load_data(spec: DataSpec) -> Dataset:
    """Read and split on the CPU. Raises SpecError with one line if the files are missing or not
    what they should be.
    """
    arrays = DATASET_LOADERS[spec.name](spec.data_dir, spec.download)
    classes = int(arrays.y_train.max()) + 1
    if int(arrays.y_test.max()) >= classes:
        raise SpecError(
            f"data {spec.name!r}: test has label {int(arrays.y_test.max())}, train has 0..{classes - 1}"
        )
    chosen = _shuffle_class_balanced(arrays.y_train, spec)
    val, train = chosen[: spec.val_size], chosen[spec.val_size :]
    channels = arrays.x_train.shape[1]
    folder = spec.data_dir or Path()
    more = (
        None
        if spec.unlabeled is None
        else _load_unlabeled_split(folder / spec.unlabeled, arrays, classes)
    )
    return Dataset(
        train=_make_split(arrays.x_train, arrays.y_train, np.sort(train), arrays.pixel_max),
        val=_make_split(arrays.x_train, arrays.y_train, val, arrays.pixel_max),
        test=_make_split(
            arrays.x_test, arrays.y_test, np.arange(len(arrays.y_test)), arrays.pixel_max
        ),
        channels=channels,
        classes=classes,
        augment=channels == 3 if spec.augment is None else spec.augment,
        fingerprint=_hash_dataset(arrays, more),
        unlabeled=more,
        unlabeled_fraction=spec.unlabeled_fraction,
    )


def _load_unlabeled_split(path: Path, arrays: TrainTestArrays, classes: int) -> Split:
    """Pseudo-labelled images as a split; their index goes on where the training set's ends."""
    x, y = read_unlabeled_file(path)
    if y is None:
        raise SpecError(
            f"data.unlabeled {str(path)!r} has no labels `y`: `raysweep eval CHECKPOINT --pseudo-label FILE` makes them"
        )
    problem = None
    if x.shape[1:] != arrays.x_train.shape[1:]:
        problem = f"images are {x.shape[1:]}, those of the data set {arrays.x_train.shape[1:]}"
    elif int(y.max()) >= classes:
        problem = f"label {int(y.max())}, where the data set has 0..{classes - 1}"
    elif int(x.max()) > arrays.pixel_max:
        problem = f"pixels up to {int(x.max())}, where the data set has 0..{arrays.pixel_max}"
    if problem:
        raise SpecError(f"data.unlabeled {str(path)!r}: {problem}")
    index = len(arrays.y_train) + torch.arange(len(y))
    return Split(torch.from_numpy(x), torch.from_numpy(y), index, arrays.pixel_max)


def _shuffle_class_balanced(
    y: np.ndarray[tuple[int], np.dtype[np.int64]], spec: DataSpec
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Positions, shuffled so that every prefix has the classes in equal shares as long as each
    lasts.
    """
    generator = np.random.default_rng(derive_seed(spec.split_seed, "split"))
    turn = np.empty(len(y), dtype=np.int64)
    for label in np.unique(y):
        (members,) = np.nonzero(y == label)
        turn[generator.permutation(members)] = np.arange(len(members))
    order = np.lexsort((generator.random(len(y)), turn))
    wanted = len(y) if spec.train_size is None else spec.val_size + spec.train_size
    if spec.val_size >= len(y) or wanted > len(y):
        parts = f"data.val_size {spec.val_size}" + (
            f" and data.train_size {spec.train_size}" if spec.train_size else ""
        )
        raise SpecError(f"{parts}: data {spec.name!r} has {len(y)} training examples to share")
    return order[:wanted]


def _make_split(x: np.ndarray, y: np.ndarray, rows: np.ndarray, pixel_max: int) -> Split:
    return Split(
        torch.from_numpy(x[rows]), torch.from_numpy(y[rows]), torch.from_numpy(rows), pixel_max
    )


def _hash_dataset(arrays: TrainTestArrays, unlabeled: Split | None) -> str:
    """16 hex digits that change when any pixel or label does."""
    sha = hashlib.sha256()
    extra = () if unlabeled is None else (unlabeled.x.numpy(), unlabeled.y.numpy())
    for part in (arrays.x_train, arrays.y_train, arrays.x_test, arrays.y_test, *extra):
        sha.update(str(part.shape).encode())
        sha.update(np.ascontiguousarray(part).data)
    return sha.hexdigest()[:16]
