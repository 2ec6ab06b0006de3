"""Data on the device: the three splits, batches, and augmentation of a whole batch at once."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from raysweep.data.sources import DATASETS, Arrays
from raysweep.data.unlabeled import read as read_unlabeled
from raysweep.rng import Rng, seed_of
from raysweep.spec import Spec, SpecError, unknown_name

__all__ = ["DATASETS", "Batch", "Data", "DataSpec", "Split", "augmented", "epoch_batches", "load"]


class DataSpec(Spec):
    """Which images.

    val_size: examples carved, class-balanced, from the *training* set for every choice that is made while sweeping.
    train_size: use only so many of the rest (class-balanced); null for all.
    augment: 4-pixel random crop and horizontal flip; null for colour images only.
    unlabeled: .npz, .parquet or .pickle of pseudo-labelled images of the same shape, looked for in `data_dir`, for
    `rst` and `gair-rst`; they are the share `unlabeled_fraction` of each batch.
    Paths become absolute, `unlabeled` as part of `data_dir`: a trial trains in another working directory.
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
    def _absolute(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        if path is None:
            return None
        with suppress(RuntimeError):  # no such user
            path = path.expanduser()
        return path if info.data.get("data_dir") else path.resolve()

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in DATASETS:
            raise SpecError(unknown_name("data set", name, list(DATASETS)))
        return name


@dataclass(frozen=True)
class Split:
    """x (N, C, H, W) uint8 in 0..white, y (N,) int64, index (N,) int64: the examples' numbers in their source."""

    x: Tensor
    y: Tensor
    index: Tensor
    white: int

    def __len__(self) -> int:
        return len(self.y)

    def images(self, rows: Tensor | slice) -> Tensor:
        """float32 in [0, 1]."""
        return self.x[rows].float() / self.white

    def to(self, device: torch.device) -> "Split":
        return Split(self.x.to(device), self.y.to(device), self.index.to(device), self.white)


@dataclass(frozen=True)
class Data:
    """train and val are parts of the source's training set, every prefix of val class-balanced; test is apart.

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

    def to(self, device: torch.device) -> "Data":
        more = None if self.unlabeled is None else self.unlabeled.to(device)
        return replace(self, train=self.train.to(device), val=self.val.to(device), unlabeled=more)

    def batches(self, batch_size: int, seed: int, epoch: int, rank: int = 0, workers: int = 1) -> Iterator["Batch"]:
        """One epoch of training batches; of each, the rows of one worker."""
        mixed = (self.unlabeled, self.unlabeled_fraction)
        return epoch_batches(self.train, batch_size, seed, epoch, self.augment, rank, workers, *mixed)


@dataclass(frozen=True)
class Batch:
    """x (B, C, H, W) float32 in [0, 1], y (B,), index (B,)."""

    x: Tensor
    y: Tensor
    index: Tensor


def load(spec: DataSpec) -> Data:
    """Read and split on the CPU. Raises SpecError with one line if the files are missing or not what they should be."""
    arrays = DATASETS[spec.name](spec.data_dir, spec.download)
    classes = int(arrays.y_train.max()) + 1
    if int(arrays.y_test.max()) >= classes:
        raise SpecError(f"data {spec.name!r}: test has label {int(arrays.y_test.max())}, train has 0..{classes - 1}")
    chosen = _balanced(arrays.y_train, spec)
    val, train = chosen[: spec.val_size], chosen[spec.val_size :]
    channels = arrays.x_train.shape[1]
    folder = spec.data_dir or Path()
    more = None if spec.unlabeled is None else _unlabeled(folder / spec.unlabeled, arrays, classes)
    return Data(
        train=_split(arrays.x_train, arrays.y_train, np.sort(train), arrays.white),
        val=_split(arrays.x_train, arrays.y_train, val, arrays.white),
        test=_split(arrays.x_test, arrays.y_test, np.arange(len(arrays.y_test)), arrays.white),
        channels=channels,
        classes=classes,
        augment=channels == 3 if spec.augment is None else spec.augment,
        fingerprint=_fingerprint(arrays, more),
        unlabeled=more,
        unlabeled_fraction=spec.unlabeled_fraction,
    )


def epoch_batches(
    split: Split,
    batch_size: int,
    seed: int,
    epoch: int,
    augment: bool,
    rank: int = 0,
    workers: int = 1,
    unlabeled: Split | None = None,
    unlabeled_fraction: float = 0.5,
) -> Iterator[Batch]:
    """The shuffled batches of one epoch, a last short one included; of each, every `workers`-th row from `rank` on.

    With `unlabeled`, an epoch has as many batches as without; each gives up its share of rows to fresh unlabelled ones.
    """
    order = _shuffled(len(split), len(split), seed_of(seed, "order", epoch))
    count = math.ceil(len(split) / batch_size)
    others = 0
    extra = order[:0]
    if unlabeled is not None:
        others = min(max(round(unlabeled_fraction * batch_size), 1), batch_size - 1)
        extra = len(split) + _shuffled(len(unlabeled), count * others, seed_of(seed, "unlabeled", epoch))
    own = batch_size - others
    order, extra = order.to(split.y.device), extra.to(split.y.device)
    for number in range(count):
        labeled = order[number * own : (number + 1) * own]
        rows = torch.cat([labeled, extra[number * others : (number + 1) * others]])
        x, y, index = _rows(split, unlabeled, rows[rank::workers], len(range(rank, len(labeled), workers)))
        if augment:
            x = augmented(x, Rng.for_examples(index, seed, "augment", epoch))
        yield Batch(x, y, index)


def augmented(x: Tensor, rng: Rng, pad: int = 4) -> Tensor:
    """A random crop after `pad` zero pixels on each side, and a horizontal flip of every second image or so."""
    n, _, height, width = x.shape
    padded = torch.nn.functional.pad(x, (pad,) * 4)
    corner = rng.stream("crop").integers(2 * pad + 1, (2,))
    flip = rng.stream("flip").uniform(()) < 0.5
    columns = torch.arange(width, device=x.device).expand(n, width)
    columns = torch.where(flip[:, None], columns.flip(1), columns) + corner[:, 1:]
    rows = torch.arange(height, device=x.device) + corner[:, :1]
    images = torch.arange(n, device=x.device)[:, None, None, None]
    channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return padded[images, channels, rows[:, None, :, None], columns[:, None, None, :]]


def _shuffled(population: int, count: int, seed: int) -> Tensor:
    """`count` of 0..population-1, each as often as any other, give or take one."""
    generator = torch.Generator().manual_seed(seed)
    turns = math.ceil(count / population)
    return torch.cat([torch.randperm(population, generator=generator) for _ in range(turns)])[:count]


def _rows(split: Split, unlabeled: Split | None, rows: Tensor, labeled: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and index; rows after the first `labeled`, past the end of `split`, are those of `unlabeled`."""
    if unlabeled is None:
        return split.images(rows), split.y[rows], split.index[rows]
    own, others = rows[:labeled], rows[labeled:] - len(split)
    return (
        torch.cat([split.images(own), unlabeled.images(others)]),
        torch.cat([split.y[own], unlabeled.y[others]]),
        torch.cat([split.index[own], unlabeled.index[others]]),
    )


def _unlabeled(path: Path, arrays: Arrays, classes: int) -> Split:
    """Pseudo-labelled images as a split; their index goes on where the training set's ends."""
    x, y = read_unlabeled(path)
    if y is None:
        raise SpecError(
            f"data.unlabeled {str(path)!r} has no labels `y`: `raysweep eval CHECKPOINT --pseudo-label FILE` makes them"
        )
    problem = None
    if x.shape[1:] != arrays.x_train.shape[1:]:
        problem = f"images are {x.shape[1:]}, those of the data set {arrays.x_train.shape[1:]}"
    elif int(y.max()) >= classes:
        problem = f"label {int(y.max())}, where the data set has 0..{classes - 1}"
    elif int(x.max()) > arrays.white:
        problem = f"pixels up to {int(x.max())}, where the data set has 0..{arrays.white}"
    if problem:
        raise SpecError(f"data.unlabeled {str(path)!r}: {problem}")
    index = len(arrays.y_train) + torch.arange(len(y))
    return Split(torch.from_numpy(x), torch.from_numpy(y), index, arrays.white)


def _balanced(
    y: np.ndarray[tuple[int], np.dtype[np.int64]], spec: DataSpec
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Positions, shuffled so that every prefix has the classes in equal shares as long as each lasts."""
    generator = np.random.default_rng(seed_of(spec.split_seed, "split"))
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


def _split(x: np.ndarray, y: np.ndarray, rows: np.ndarray, white: int) -> Split:
    return Split(torch.from_numpy(x[rows]), torch.from_numpy(y[rows]), torch.from_numpy(rows), white)


def _fingerprint(arrays: Arrays, more: Split | None) -> str:
    """16 hex digits that change when any pixel or label does."""
    sha = hashlib.sha256()
    extra = () if more is None else (more.x.numpy(), more.y.numpy())
    for part in (arrays.x_train, arrays.y_train, arrays.x_test, arrays.y_test, *extra):
        sha.update(str(part.shape).encode())
        sha.update(np.ascontiguousarray(part).data)
    return sha.hexdigest()[:16]
