"""Image data sets: loading, splitting, batching and augmentation, as tensors on a device."""

from raysweep.data.batches import Batch, augment_images, count_batches, epoch_batches
from raysweep.data.dataset import DatasetSplits, DataSpec, load_data, load_test_data
from raysweep.data.dataset_loaders import (
    DATASET_LOADERS,
    ImageShape,
    read_image_shape,
    recognize_datasets,
)
from raysweep.data.split_tensors import Split
from raysweep.data.subsets import (
    DEFAULT_SUBSET,
    SUBSET_CHOICES,
    SubsetChoice,
    choose_covering_rows,
    choose_subset_rows,
    find_subset_warnings,
)

__all__ = [
    "DATASET_LOADERS",
    "DEFAULT_SUBSET",
    "SUBSET_CHOICES",
    "Batch",
    "DataSpec",
    "DatasetSplits",
    "ImageShape",
    "Split",
    "SubsetChoice",
    "augment_images",
    "choose_covering_rows",
    "choose_subset_rows",
    "count_batches",
    "epoch_batches",
    "find_subset_warnings",
    "load_data",
    "load_test_data",
    "read_image_shape",
    "recognize_datasets",
]
