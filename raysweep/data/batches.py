"""Batches of one training epoch, and augmentation of a whole batch at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raysweep.data.split_tensors import Split
from raysweep.lazy_modules import torch
from raysweep.rng import ExampleRng, derive_seed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One batch of B training examples.

    Attributes:
        x: Images, (B, C, H, W) float32 in [0, 1].
        y: Labels, (B,) int64.
        index: Ids of the examples, (B,) int64.
    """

    x: Tensor
    y: Tensor
    index: Tensor


def count_batches(n_examples: int, batch_size: int) -> int:
    """Return the number of batches of an epoch.

    A last batch of one image joins the batch before it, because a batch norm cannot normalise a
    single value per channel, as one image has where feature maps are 1 x 1.

    Args:
        n_examples: Number of training examples, 1 or more.
        batch_size: Rows per batch, 2 or more.
    """
    if n_examples > batch_size and n_examples % batch_size == 1:
        return n_examples // batch_size
    return math.ceil(n_examples / batch_size)


def epoch_batches(
    split: Split,
    batch_size: int,
    seed: int,
    epoch: int,
    augment: bool,
    rank: int = 0,
    n_workers: int = 1,
    unlabeled: Split | None = None,
    unlabeled_fraction: float = 0.5,
) -> Iterator[Batch]:
    """Iterate over the shuffled batches of one epoch.

    The last batch may be smaller, or larger by one image (see `count_batches`).

    The number of batches does not depend on `unlabeled`. With it, a part of each batch is
    pseudo-labelled images, and the epoch uses fewer rows of `split`.

    Args:
        split: Labelled training images.
        batch_size: Rows per batch, summed over all workers.
        seed: Seed of the order and of the augmentation.
        epoch: Epoch number; each epoch has another order.
        augment: Whether to crop and flip the images at random (see `augment_images`).
        rank: Number of this worker, in 0..n_workers-1. It gets rows `rank`, `rank + n_workers`,
            ... of each batch.
        n_workers: Number of workers that share each batch.
        unlabeled: Pseudo-labelled images, or None.
        unlabeled_fraction: Fraction of each batch that comes from `unlabeled`, in (0, 1).

    Yields:
        The rows of this worker, on the device of `split`.
    """
    order = _sample_indices(len(split), len(split), derive_seed(seed, "order", epoch))
    n_batches = count_batches(len(split), batch_size)
    n_unlabeled = 0
    unlabeled_order = order[:0]
    if unlabeled is not None:
        n_unlabeled = min(max(round(unlabeled_fraction * batch_size), 1), batch_size - 1)
        unlabeled_order = len(split) + _sample_indices(
            len(unlabeled), n_batches * n_unlabeled, derive_seed(seed, "unlabeled", epoch)
        )
    n_labeled = batch_size - n_unlabeled
    device = split.y.device
    order, unlabeled_order = order.to(device), unlabeled_order.to(device)
    for i in range(n_batches):
        is_last = unlabeled is None and i == n_batches - 1
        labeled_rows = order[i * n_labeled : None if is_last else (i + 1) * n_labeled]
        unlabeled_rows = unlabeled_order[i * n_unlabeled : (i + 1) * n_unlabeled]
        worker_rows = torch.cat([labeled_rows, unlabeled_rows])[rank::n_workers]
        n_worker_labeled = len(range(rank, len(labeled_rows), n_workers))
        x, y, index = _gather_rows(split, unlabeled, worker_rows, n_worker_labeled)
        if augment:
            x = augment_images(x, ExampleRng.for_examples(index, seed, "augment", epoch))
        yield Batch(x, y, index)


def augment_images(x: Tensor, rng: ExampleRng, pad: int = 4) -> Tensor:
    """Crop each image at a random place and flip it horizontally with probability 0.5.

    Args:
        x: Images, (N, C, H, W).
        rng: Random numbers of these N examples.
        pad: Zero pixels added on each side before the crop.

    Returns:
        New images, (N, C, H, W).
    """
    n, _, height, width = x.shape
    padded = torch.nn.functional.pad(x, (pad,) * 4)
    corner = rng.derive_stream("crop").integers(2 * pad + 1, (2,))
    flip = rng.derive_stream("flip").uniform(()) < 0.5
    columns = torch.arange(width, device=x.device).expand(n, width)
    columns = torch.where(flip[:, None], columns.flip(1), columns) + corner[:, 1:]
    rows = torch.arange(height, device=x.device) + corner[:, :1]
    images = torch.arange(n, device=x.device)[:, None, None, None]
    channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return padded[images, channels, rows[:, None, :, None], columns[:, None, None, :]]


def _sample_indices(population_size: int, n_samples: int, seed: int) -> Tensor:
    """Draw `n_samples` of 0..population_size-1; their frequencies differ by at most 1."""
    generator = torch.Generator().manual_seed(seed)
    n_permutations = math.ceil(n_samples / population_size)
    permutations = [
        torch.randperm(population_size, generator=generator) for _ in range(n_permutations)
    ]
    return torch.cat(permutations)[:n_samples]


def _gather_rows(
    split: Split, unlabeled: Split | None, rows: Tensor, n_labeled: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, labels and ids of `rows`.

    The first `n_labeled` rows are row numbers of `split`, the others row numbers of `unlabeled`
    plus `len(split)`.
    """
    if unlabeled is None:
        return split.get_float_images(rows), split.y[rows], split.index[rows]
    labeled_rows, unlabeled_rows = rows[:n_labeled], rows[n_labeled:] - len(split)
    return (
        torch.cat(
            [split.get_float_images(labeled_rows), unlabeled.get_float_images(unlabeled_rows)]
        ),
        torch.cat([split.y[labeled_rows], unlabeled.y[unlabeled_rows]]),
        torch.cat([split.index[labeled_rows], unlabeled.index[unlabeled_rows]]),
    )
