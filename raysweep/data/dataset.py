"""Data sets: their settings, and loading them as training, validation and test splits."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, TypeAlias

from pydantic import Field, ValidationInfo, field_validator

from raysweep.data.batches import Batch, count_batches, epoch_batches
from raysweep.data.dataset_loaders import (
    DATASET_LOADERS,
    LabelArray,
    PixelArray,
    TrainTestArrays,
    load_test_arrays,
)
from raysweep.data.known_folders import remember_data_folder
from raysweep.data.split_tensors import Split
from raysweep.data.unlabeled import read_unlabeled_file
from raysweep.lazy_modules import np, torch
from raysweep.rng import derive_seed
from raysweep.spec import Spec, SpecError, describe_unknown_name
from raysweep.user_folders import expand_home

logger = logging.getLogger(__name__)

# Largest share of a class that validation takes, unless its share of all examples is larger.
_MAX_VALIDATION_SHARE = 0.2

_MAX_CLASSES = 1_000_000

_PositionArray: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int64]]"


class DataSpec(Spec):
    """Settings of a data set: its files, splits and augmentation."""

    later_fields: ClassVar[frozenset[str]] = frozenset({"allow_missing_classes"})

    name: str = "digits"
    """Name of the data set, as in `raysweep list`."""
    data_dir: Path | None = None
    """Folder of the data set's files. It is made absolute, because trials run in other working
    directories. Not needed for `digits`."""
    download: bool = False
    """Whether torchvision may download missing files into `data_dir`."""
    val_size: Annotated[int, Field(ge=1)] = 1000
    """Number of training examples set aside for validation, equally many of each class. At most a
    fifth of a class is set aside (or, if larger, `val_size` divided by all training examples)."""
    train_size: Annotated[int, Field(ge=1)] | None = None
    """Number of the remaining examples to train on, equally many of each class; null for all."""
    augment: bool | None = None
    """Whether to train on random crops (4 pixels of padding) and horizontal flips; null means
    only for colour images."""
    split_seed: int = 0
    """Seed that chooses the training and validation examples."""
    unlabeled: Path | None = None
    """File of pseudo-labelled images (.npz, .parquet, .pickle or .pkl) of the same shape as the
    data set's, for `rst` and `gair-rst`. A relative path starts at `data_dir`."""
    unlabeled_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Fraction of each training batch that comes from `unlabeled`, between 0 and 1."""
    allow_missing_classes: bool = False
    """Whether classes below the largest label may have no training example."""

    @field_validator("data_dir", "unlabeled")
    @classmethod
    def _make_path_absolute(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        """Expand `~`, and make the path absolute unless it starts at `data_dir`."""
        if path is None:
            return None
        path = expand_home(path)
        return path if info.data.get("data_dir") else path.resolve()

    @field_validator("name")
    @classmethod
    def _check_dataset_name(cls, name: str) -> str:
        """Reject the name of an unknown data set."""
        if name not in DATASET_LOADERS:
            raise SpecError(describe_unknown_name("data set", name, list(DATASET_LOADERS)))
        return name


@dataclass(frozen=True)
class DatasetSplits:
    """The splits of a data set.

    Attributes:
        train: Training examples.
        val: Validation examples, from the same files as `train`. The first n of them have about
            equally many examples of each class, for any n.
        test: Test examples; none if the data set has no test images.
        channels: Number of image channels.
        classes: Number of classes.
        augment: Whether training batches are augmented.
        fingerprint: 16 hexadecimal digits that identify all pixels and labels.
        unlabeled: Pseudo-labelled images, or None.
        unlabeled_fraction: Fraction of each training batch that comes from `unlabeled`.
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

    def to(self, device: torch.device) -> DatasetSplits:
        """Move the data that training needs to a device.

        Args:
            device: The device.

        Returns:
            A copy with all splits except `test` on `device`.
        """
        unlabeled = None if self.unlabeled is None else self.unlabeled.to(device)
        return replace(
            self, train=self.train.to(device), val=self.val.to(device), unlabeled=unlabeled
        )

    def require_test(self) -> Split:
        """Return the test examples.

        Raises:
            SpecError: There are none.
        """
        if not len(self.test):
            raise SpecError(
                "the data set has no test images to evaluate on: put test.npz or test.parquet "
                'beside the training images (in Python: data={"train": (x, y), "test": (x, y)})'
            )
        return self.test

    def count_train_batches(self, batch_size: int) -> int:
        """Return the number of batches of `iter_train_batches`."""
        return count_batches(len(self.train), batch_size)

    def iter_train_batches(
        self, batch_size: int, seed: int, epoch: int, rank: int = 0, n_workers: int = 1
    ) -> Iterator[Batch]:
        """Iterate over the training batches of one epoch.

        Args:
            batch_size: Rows per batch, summed over all workers.
            seed: Seed of the order and of the augmentation.
            epoch: Epoch number; each epoch has another order.
            rank: Number of this worker, in 0..n_workers-1.
            n_workers: Number of workers that share each batch.

        Returns:
            An iterator over the rows of this worker, batch by batch.
        """
        return epoch_batches(
            self.train,
            batch_size,
            seed,
            epoch,
            self.augment,
            rank,
            n_workers,
            self.unlabeled,
            self.unlabeled_fraction,
        )


def load_data(spec: DataSpec) -> DatasetSplits:
    """Read a data set and split it, on the CPU.

    Args:
        spec: Settings of the data set.

    Returns:
        All splits, as CPU tensors.

    Raises:
        SpecError: If files are missing, hold no images with labels, or have too few examples or
            classes.
        DamagedFileError: If a file cannot be read.
    """
    arrays = DATASET_LOADERS[spec.name](spec.data_dir, spec.download)
    classes = int(arrays.y_train.max()) + 1
    _check_all_classes(arrays.y_train, spec)
    test_label = int(arrays.y_test.max(initial=0))
    if test_label >= classes:
        raise SpecError(
            f"data {spec.name!r}: test has label {test_label}, train has 0..{classes - 1}"
        )
    positions = _shuffle_class_balanced(arrays.y_train, spec)
    val_rows, train_rows = positions[: spec.val_size], np.sort(positions[spec.val_size :])
    _warn_about_missing_classes(arrays.y_train, val_rows, train_rows, arrays.y_test, spec)
    test_rows = np.arange(len(arrays.y_test))
    channels = arrays.x_train.shape[1]
    unlabeled = None
    if spec.unlabeled is not None:
        path = (spec.data_dir or Path()) / spec.unlabeled
        unlabeled = _load_unlabeled_split(path, arrays, classes)
    fingerprint = _hash_dataset(arrays, unlabeled)
    if spec.data_dir is not None:
        remember_data_folder(fingerprint, spec.data_dir)
    return DatasetSplits(
        train=_make_split(arrays.x_train, arrays.y_train, train_rows, arrays.pixel_max),
        val=_make_split(arrays.x_train, arrays.y_train, val_rows, arrays.pixel_max),
        test=_make_split(arrays.x_test, arrays.y_test, test_rows, arrays.pixel_max),
        channels=channels,
        classes=classes,
        augment=channels == 3 if spec.augment is None else spec.augment,
        fingerprint=fingerprint,
        unlabeled=unlabeled,
        unlabeled_fraction=spec.unlabeled_fraction,
    )


def load_test_data(spec: DataSpec) -> DatasetSplits:
    """Read the test examples of a data set, for a model that was trained elsewhere.

    Args:
        spec: Settings of the data set. Those of training and validation have no effect.

    Returns:
        The test split; the other splits are empty.

    Raises:
        SpecError: If files are missing or hold no images with labels.
        DamagedFileError: If a file cannot be read.
    """
    x, y, pixel_max = load_test_arrays(spec.name, spec.data_dir, spec.download)
    empty = _make_split(x, y, np.arange(0), pixel_max)
    return DatasetSplits(
        train=empty,
        val=empty,
        test=_make_split(x, y, np.arange(len(y)), pixel_max),
        channels=x.shape[1],
        classes=int(y.max()) + 1,
        augment=False,
        fingerprint=_hash_arrays([x, y]),
    )


def _check_all_classes(y: LabelArray, spec: DataSpec) -> None:
    """Raise SpecError if a class below the largest label has no example."""
    if int(y.max()) < 1:
        raise SpecError(
            f"data {spec.name!r}: all training labels are 0: training needs two classes or more"
        )
    if int(y.max()) >= _MAX_CLASSES:
        raise SpecError(
            f"data {spec.name!r}: label {int(y.max())}: labels number the classes from 0; below "
            f"{_MAX_CLASSES}"
        )
    missing = np.flatnonzero(np.bincount(y) == 0)
    if not len(missing) or spec.allow_missing_classes:
        return
    remedy = "subtract 1 from the labels" if list(missing) == [0] else "number the classes anew"
    raise SpecError(
        f"data {spec.name!r}: no training example has label {_list_classes(missing)} of "
        f"0..{int(y.max())}: {remedy}, or set data.allow_missing_classes=true"
    )


def _warn_about_missing_classes(
    y: LabelArray,
    val_rows: _PositionArray,
    train_rows: _PositionArray,
    y_test: LabelArray,
    spec: DataSpec,
) -> None:
    """Log which classes have no example in training, validation or test."""
    present = np.unique(y)
    if len(val_rows) < len(present):
        logger.warning(
            "data %r: data.val_size %d is less than the number of classes, %d: validation "
            "accuracies, which decide on epochs and trials, mean little",
            spec.name,
            len(val_rows),
            len(present),
        )
    labels_by_part = {"training": y[train_rows], "validation": y[val_rows], "test": y_test}
    for name, labels in labels_by_part.items():
        missing = np.setdiff1d(present, labels)
        is_expected = (name == "validation" and len(labels) < len(present)) or not len(labels)
        if len(missing) and not is_expected:
            logger.warning(
                "data %r: %s has no example of class %s%s",
                spec.name,
                name,
                _list_classes(missing),
                "" if name == "test" else "; see data.val_size and data.train_size",
            )


def _list_classes(classes: np.ndarray) -> str:
    """Format some class numbers, the first few of many."""
    shown = ", ".join(str(label) for label in classes[:5])
    return shown if len(classes) <= 5 else f"{shown} and {len(classes) - 5} more"


def _load_unlabeled_split(path: Path, arrays: TrainTestArrays, classes: int) -> Split:
    """Load pseudo-labelled images; their ids start after those of the training file."""
    x, y = read_unlabeled_file(path)
    if y is None:
        raise SpecError(
            f"data.unlabeled {str(path)!r} has no labels `y`: "
            "`raysweep eval CHECKPOINT --pseudo-label FILE` makes them"
        )
    problem = None
    if x.shape[1:] != arrays.x_train.shape[1:]:
        problem = f"images are {x.shape[1:]}, those of the data set {arrays.x_train.shape[1:]}"
    elif int(y.max()) >= classes:
        problem = f"label {int(y.max())}, but the data set has 0..{classes - 1}"
    elif int(x.max()) > arrays.pixel_max:
        problem = f"pixels up to {int(x.max())}, but the data set has 0..{arrays.pixel_max}"
    if problem:
        raise SpecError(f"data.unlabeled {str(path)!r}: {problem}")
    index = len(arrays.y_train) + torch.arange(len(y))
    return Split(torch.from_numpy(x), torch.from_numpy(y), index, arrays.pixel_max)


def _shuffle_class_balanced(y: LabelArray, spec: DataSpec) -> _PositionArray:
    """Return shuffled positions in the training file: validation first, then training.

    The first n positions have equally many examples of each class (plus or minus one), for any n
    up to which every class has enough examples.
    """
    generator = np.random.default_rng(derive_seed(spec.split_seed, "split"))
    rank_in_class = np.empty(len(y), dtype=np.int64)
    for label in np.unique(y):
        (members,) = np.nonzero(y == label)
        rank_in_class[generator.permutation(members)] = np.arange(len(members))
    order = np.lexsort((generator.random(len(y)), rank_in_class))
    n_selected = len(y) if spec.train_size is None else spec.val_size + spec.train_size
    if spec.val_size >= len(y) or n_selected > len(y):
        sizes = f"data.val_size {spec.val_size}"
        if spec.train_size:
            sizes += f" and data.train_size {spec.train_size}"
        raise SpecError(f"{sizes}: data {spec.name!r} has only {len(y)} training examples")
    return _keep_rare_classes(order, rank_in_class, y, spec.val_size)[:n_selected]


def _keep_rare_classes(
    order: _PositionArray, rank_in_class: np.ndarray, y: LabelArray, val_size: int
) -> _PositionArray:
    """Move examples of rare classes from validation to training.

    Validation takes at most a fifth of a class, or its share of all examples if that is larger, and
    never all examples of a class. If that leaves too few, nothing is moved.
    """
    sizes = np.bincount(y)
    share = max(_MAX_VALIDATION_SHARE, val_size / len(y))
    limits = np.minimum(np.ceil(share * sizes), sizes - 1)
    exceeds = rank_in_class[order] >= limits[y[order]]
    if not exceeds[:val_size].any():
        return order
    within = np.flatnonzero(~exceeds)
    if len(within) < val_size:
        return order
    chosen = within[:val_size]
    others = np.setdiff1d(np.arange(len(order)), chosen)
    return np.concatenate([order[chosen], order[others]])


def _make_split(x: PixelArray, y: LabelArray, rows: _PositionArray, pixel_max: int) -> Split:
    """Copy `rows` of the arrays into a split; the row numbers become the ids."""
    return Split(
        torch.from_numpy(x[rows]), torch.from_numpy(y[rows]), torch.from_numpy(rows), pixel_max
    )


def _hash_dataset(arrays: TrainTestArrays, unlabeled: Split | None) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of all pixels and labels."""
    parts: list[np.ndarray] = [arrays.x_train, arrays.y_train, arrays.x_test, arrays.y_test]
    if unlabeled is not None:
        parts += [unlabeled.x.numpy(), unlabeled.y.numpy()]
    return _hash_arrays(parts)


def _hash_arrays(parts: list[np.ndarray]) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of shapes and contents."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(str(part.shape).encode())
        sha.update(np.ascontiguousarray(part).data)
    return sha.hexdigest()[:16]
