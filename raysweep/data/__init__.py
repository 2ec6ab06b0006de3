"""Image data sets: loading, splitting, batching and augmentation, as tensors on a device."""

from raysweep.data.batches import Batch, augment_images, count_batches, epoch_batches
from raysweep.data.dataset import DatasetSplits, DataSpec, load_data
from raysweep.data.dataset_loaders import DATASET_LOADERS
from raysweep.data.split_tensors import Split

__all__ = [
    "DATASET_LOADERS",
    "Batch",
    "DataSpec",
    "DatasetSplits",
    "Split",
    "augment_images",
    "count_batches",
    "epoch_batches",
    "load_data",
]
