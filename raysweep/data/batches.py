"""Batches of one epoch, and augmentation of a whole batch at once."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raysweep.rng import ExampleRng, derive_seed

if TYPE_CHECKING:
    from raysweep.data.dataset import Split


@dataclass(frozen=True)
class Batch:
    """x (B, C, H, W) float32 in [0, 1], y (B,), index (B,)."""

    x: Tensor
    y: Tensor
    index: Tensor


def epoch_batches(
    split: "Split",
    batch_size: int,
    seed: int,
    epoch: int,
    augment: bool,
    rank: int = 0,
    n_workers: int = 1,
    unlabeled: "Split | None" = None,
    unlabeled_fraction: float = 0.5,
) -> Iterator[Batch]:
    """The shuffled batches of one epoch, a last short one included; of each, every `workers`-th row
    from `rank` on.

    With `unlabeled`, an epoch has as many batches as without; each gives up its share of rows to
    fresh unlabelled ones.
    """
    order = _sample_indices(len(split), len(split), derive_seed(seed, "order", epoch))
    count = math.ceil(len(split) / batch_size)
    others = 0
    extra = order[:0]
    if unlabeled is not None:
        others = min(max(round(unlabeled_fraction * batch_size), 1), batch_size - 1)
        extra = len(split) + _sample_indices(
            len(unlabeled), count * others, derive_seed(seed, "unlabeled", epoch)
        )
    own = batch_size - others
    order, extra = order.to(split.y.device), extra.to(split.y.device)
    for number in range(count):
        labeled = order[number * own : (number + 1) * own]
        rows = torch.cat([labeled, extra[number * others : (number + 1) * others]])
        x, y, index = _gather_rows(
            split, unlabeled, rows[rank::n_workers], len(range(rank, len(labeled), n_workers))
        )
        if augment:
            x = augment_images(x, ExampleRng.for_examples(index, seed, "augment", epoch))
        yield Batch(x, y, index)


def augment_images(x: Tensor, rng: ExampleRng, pad: int = 4) -> Tensor:
    """A random crop after `pad` zero pixels on each side, and a horizontal flip of every second
    image or so.
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
    """`count` of 0..population-1, each as often as any other, give or take one."""
    generator = torch.Generator().manual_seed(seed)
    turns = math.ceil(n_samples / population_size)
    return torch.cat([torch.randperm(population_size, generator=generator) for _ in range(turns)])[
        :n_samples
    ]


def _gather_rows(
    split: "Split", unlabeled: "Split | None", rows: Tensor, n_labeled: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and index; rows after the first `labeled`, past the end of `split`, are those
    of `unlabeled`.
    """
    if unlabeled is None:
        return split.get_float_images(rows), split.y[rows], split.index[rows]
    own, others = rows[:n_labeled], rows[n_labeled:] - len(split)
    return (
        torch.cat([split.get_float_images(own), unlabeled.get_float_images(others)]),
        torch.cat([split.y[own], unlabeled.y[others]]),
        torch.cat([split.index[own], unlabeled.index[others]]),
    )
