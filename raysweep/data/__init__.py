"""Data on the device: the splits of a data set, batches, and augmentation of a whole batch."""

from raysweep.data.batches import Batch, augment_images, epoch_batches
from raysweep.data.dataset import Dataset, DataSpec, Split, load_data
from raysweep.data.datasets import DATASET_LOADERS

__all__ = [
    "DATASET_LOADERS",
    "Batch",
    "DataSpec",
    "Dataset",
    "Split",
    "augment_images",
    "epoch_batches",
    "load_data",
]
