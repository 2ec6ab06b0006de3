"""Data on the device: the three splits, batches, and augmentation of a whole batch at once."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from raysweep.data.sources import DATASETS, Arrays
from raysweep.rng import Rng, seed_of
from raysweep.spec import Spec, SpecError, unknown_name

__all__ = ["DATASETS", "Batch", "Data", "DataSpec", "Split", "augmented", "load"]


class DataSpec(Spec):
    """Which images.

    val_size: examples carved, class-balanced, from the *training* set for every choice that is made while sweeping.
    train_size: use only so many of the rest (class-balanced); null for all.
    augment: 4-pixel random crop and horizontal flip; null for colour images only.
    """

    name: str = "digits"
    data_dir: Path | None = None
    download: bool = False
    val_size: Annotated[int, Field(ge=1)] = 1000
    train_size: Annotated[int, Field(ge=1)] | None = None
    augment: bool | None = None
    split_seed: int = 0

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
    """train and val are parts of the source's training set, every prefix of val class-balanced; test is apart."""

    train: Split
    val: Split
    test: Split
    channels: int
    classes: int
    augment: bool
    fingerprint: str


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
    return Data(
        train=_split(arrays.x_train, arrays.y_train, np.sort(train), arrays.white),
        val=_split(arrays.x_train, arrays.y_train, val, arrays.white),
        test=_split(arrays.x_test, arrays.y_test, np.arange(len(arrays.y_test)), arrays.white),
        channels=channels,
        classes=classes,
        augment=channels == 3 if spec.augment is None else spec.augment,
        fingerprint=_fingerprint(arrays),
    )


def epoch_batches(
    split: Split, batch_size: int, seed: int, epoch: int, augment: bool, rank: int = 0, workers: int = 1
) -> Iterator[Batch]:
    """The shuffled batches of one epoch, a last short one included; of each, every `workers`-th row from `rank` on."""
    generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
    order = torch.randperm(len(split), generator=generator).to(split.y.device)
    for start in range(0, len(split), batch_size):
        rows = order[start : start + batch_size][rank::workers]
        x, index = split.images(rows), split.index[rows]
        if augment:
            x = augmented(x, Rng.for_examples(index, seed, "augment", epoch))
        yield Batch(x, split.y[rows], index)


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


def _fingerprint(arrays: Arrays) -> str:
    """16 hex digits that change when any pixel or label does."""
    sha = hashlib.sha256()
    for part in (arrays.x_train, arrays.y_train, arrays.x_test, arrays.y_test):
        sha.update(str(part.shape).encode())
        sha.update(np.ascontiguousarray(part).data)
    return sha.hexdigest()[:16]
