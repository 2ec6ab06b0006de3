"""Readers of image data sets.

To add a data set, write a function (data_dir, download) -> TrainTestArrays like `load_mnist`, and
list it in `DATASET_LOADERS`. It should raise `SpecError` if files are missing, and
`DamagedFileError` if they cannot be read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from raysweep.bounded_files import open_npz, open_regular_file, read_parquet_table
from raysweep.errors import DamagedFileError, InfrastructureError, get_first_line
from raysweep.lazy_modules import np
from raysweep.spec import SpecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

# Numbers of channels that tell (N, H, W, C) from (N, C, H, W).
_CHANNEL_COUNTS = (1, 3, 4)
# Names of the arrays of images and of labels in .npz files.
_ARRAY_NAMES = (("x", "image", "images"), ("y", "label", "labels"))

PixelArray: TypeAlias = "NDArray[np.uint8]"
LabelArray: TypeAlias = "NDArray[np.int64]"


@dataclass(frozen=True)
class TrainTestArrays:
    """Training and test examples, in the order and with the pixel values of the files.

    Attributes:
        x_train: Training images, (N, C, H, W) uint8 in 0..`pixel_max`.
        y_train: Training labels, (N,) int64 in 0..classes-1.
        x_test: Test images, as `x_train`.
        y_test: Test labels, as `y_train`; none if the data set has no test images.
        pixel_max: Pixel value that becomes 1.0.
    """

    x_train: PixelArray
    y_train: LabelArray
    x_test: PixelArray
    y_test: LabelArray
    pixel_max: int = 255


def load_digits(data_dir: Path | None, download: bool) -> TrainTestArrays:
    """Handwritten digits of scikit-learn, 8x8 grey, pixels 0..16; the last 450 are the test set.

    Args:
        data_dir: Not used; the file is part of scikit-learn.
        download: Not used.

    Returns:
        1,347 training and 450 test images, (N, 1, 8, 8).
    """
    return _read_digits()


@cache
def _read_digits() -> TrainTestArrays:
    """Read the digits once per process, into arrays that nobody can change."""
    # The file is read directly, because importing scikit-learn takes longer than the rest.
    package = find_spec("sklearn")
    assert package is not None and package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    rows = np.loadtxt(file, delimiter=",").astype(np.uint8)
    x, y = rows[:, :-1].reshape(-1, 1, 8, 8), rows[:, -1].astype(np.int64)
    x.flags.writeable = y.flags.writeable = False
    return TrainTestArrays(x[:-450], y[:-450], x[-450:], y[-450:], pixel_max=16)


def load_mnist(data_dir: Path | None, download: bool) -> TrainTestArrays:
    """Handwritten digits of MNIST, 28x28 grey, in torchvision's files.

    Args:
        data_dir: Folder of torchvision's files; required.
        download: Whether to download missing files into `data_dir`.

    Returns:
        60,000 training and 10,000 test images, (N, 1, 28, 28).

    Raises:
        SpecError: If `data_dir` is None, or the files are missing or damaged.
    """
    _refuse_pickled_mnist(data_dir)
    train, test = _load_torchvision_splits(
        "mnist",
        data_dir,
        lambda datasets, root, is_train: datasets.MNIST(root, is_train, download=download),
    )
    x_train, x_test = train.data.numpy()[:, None], test.data.numpy()[:, None]
    return TrainTestArrays(
        x_train, _to_label_array(train.targets), x_test, _to_label_array(test.targets)
    )


def load_cifar10(data_dir: Path | None, download: bool) -> TrainTestArrays:
    """CIFAR-10, 32x32 colour, in torchvision's files.

    Args:
        data_dir: Folder of torchvision's files; required.
        download: Whether to download missing files into `data_dir`.

    Returns:
        50,000 training and 10,000 test images, (N, 3, 32, 32).

    Raises:
        SpecError: If `data_dir` is None, or the files are missing or damaged.
    """
    train, test = _load_torchvision_splits(
        "cifar10",
        data_dir,
        lambda datasets, root, is_train: datasets.CIFAR10(root, is_train, download=download),
    )
    x_train, x_test = (
        np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)) for part in (train, test)
    )
    return TrainTestArrays(
        x_train, _to_label_array(train.targets), x_test, _to_label_array(test.targets)
    )


def load_svhn(data_dir: Path | None, download: bool) -> TrainTestArrays:
    """Street View House Numbers, 32x32 colour, in torchvision's files.

    Args:
        data_dir: Folder of torchvision's files; required.
        download: Whether to download missing files into `data_dir`.

    Returns:
        73,257 training and 26,032 test images, (N, 3, 32, 32).

    Raises:
        SpecError: If `data_dir` is None, or the files are missing or damaged.
    """
    train, test = _load_torchvision_splits(
        "svhn",
        data_dir,
        lambda datasets, root, is_train: datasets.SVHN(
            root, "train" if is_train else "test", download=download
        ),
    )
    return TrainTestArrays(
        train.data, _to_label_array(train.labels), test.data, _to_label_array(test.labels)
    )


def load_user_arrays(data_dir: Path | None, download: bool) -> TrainTestArrays:
    """Your own images: train and test files in data_dir, .npz or .parquet, with x (uint8) and y.

    Args:
        data_dir: Folder of `train` and `test`, each .npz or .parquet with the arrays or columns `x`
            (N, C, H, W) uint8 in 0..255 and `y` (N,) integers from 0; required. `test` may be
            missing: then nothing can be evaluated on test images.
        download: Not used.

    Returns:
        The arrays of both files.

    Raises:
        SpecError: If `data_dir` is None, or a file is missing or does not hold images with labels.
        DamagedFileError: If a file cannot be read.
    """
    if data_dir is None:
        raise SpecError(
            "data.data_dir is missing: data.name 'arrays' reads train.npz and test.npz "
            "(or .parquet) there"
        )
    x_train, y_train = _read_split_file(data_dir, "train")
    x_test, y_test = x_train[:0], y_train[:0]
    if _find_split_file(data_dir, "test") is not None:
        x_test, y_test = _read_split_file(data_dir, "test")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise SpecError(
            f"{data_dir}: train images are {x_train.shape[1:]}, test images {x_test.shape[1:]}"
        )
    return TrainTestArrays(x_train, y_train, x_test, y_test)


def load_test_arrays(
    dataset_name: str, data_dir: Path | None, download: bool
) -> tuple[PixelArray, LabelArray, int]:
    """Load the test examples of a data set. For `arrays`, no training file is needed.

    Args:
        dataset_name: A key of `DATASET_LOADERS`.
        data_dir: Folder of the data set.
        download: Whether to download missing files.

    Returns:
        Images, labels, and the pixel value that becomes 1.0.

    Raises:
        SpecError: As for the data set's reader.
        DamagedFileError: If a file cannot be read.
    """
    if dataset_name == "arrays" and data_dir is not None:
        return *_read_split_file(data_dir, "test"), 255
    arrays = DATASET_LOADERS[dataset_name](data_dir, download)
    return arrays.x_test, arrays.y_test, arrays.pixel_max


# Files by which a folder is recognized; data set name -> patterns, of which one must match.
_TYPICAL_FILES: dict[str, tuple[str, ...]] = {
    "mnist": ("MNIST/raw/train-*",),
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "svhn": ("train_32x32.mat",),
    "arrays": ("train.npz", "train.parquet", "test.npz", "test.parquet"),
}


def recognize_datasets(folder: Path) -> list[str]:
    """List the data sets whose files are in a folder.

    Args:
        folder: The folder; it need not exist.

    Returns:
        Names of data sets.
    """
    return [
        name
        for name, patterns in _TYPICAL_FILES.items()
        if any(next(folder.glob(pattern), None) for pattern in patterns)
    ]


class ImageShape(NamedTuple):
    """Number and size of the training images in a folder.

    Attributes:
        n_images: Number of images.
        channels: Number of channels.
        height: Pixels from top to bottom.
        width: Pixels from left to right.
    """

    n_images: int
    channels: int
    height: int
    width: int


def read_image_shape(folder: Path) -> ImageShape | None:
    """Read the shape of `data.name` arrays without their pixels.

    Args:
        folder: Folder of `train.npz` or `train.parquet`.

    Returns:
        The shape; None if there is no such file, or it holds no images: `load_user_arrays` says so.
    """
    for suffix, read_shape in ((".npz", _read_npz_shape), (".parquet", _read_parquet_shape)):
        path = folder / f"train{suffix}"
        if path.exists():
            try:
                shape = read_shape(path)
            except Exception as error:
                logger.debug("%s: its shape cannot be read: %s", path, error)
                return None
            return _to_image_shape(shape)
    return None


def _read_npz_shape(path: Path) -> tuple[int, ...]:
    """Return the shape of the images in an .npz file from the header of their array."""
    with open_npz(path) as archive:
        (name, *_) = [name for name in _ARRAY_NAMES[0] if name in archive.names]
        return archive.read_header(name).shape


def _read_parquet_shape(path: Path) -> tuple[int, ...]:
    """Return the shape of the images in a .parquet file from its metadata."""
    import pyarrow.parquet as pq

    with open_regular_file(path) as stream:
        file = pq.ParquetFile(stream)
        return (file.metadata.num_rows, *file.schema_arrow.field("x").type.shape)


def _to_image_shape(shape: tuple[int, ...]) -> ImageShape | None:
    """Return the shape of images (N, C, H, W), also from that of (N, H, W, C); else None."""
    if len(shape) != 4:
        return None
    n_images, *rest = shape
    if _is_channels_last(shape):
        height, width, channels = rest
    else:
        channels, height, width = rest
    return ImageShape(n_images, channels, height, width)


def _is_channels_last(shape: tuple[int, ...]) -> bool:
    """Return whether images are (N, H, W, C): where the numbers of channels leave no doubt."""
    return shape[3] in _CHANNEL_COUNTS and shape[1] not in _CHANNEL_COUNTS


def _has_few_columns(shape: tuple[int, ...]) -> bool:
    """Return whether images (N, C, H, W) would have 2 columns and as many channels as rows.

    They are (N, H, W, C) of square images with 2 channels.
    """
    return shape[1] == shape[2] > shape[3] == 2


def _suggest_conversion(x: NDArray[np.generic]) -> str:
    """Return how to convert an array to images, for an error; "" if that is not known."""
    if x.dtype == np.uint8 and x.ndim == 3:
        return "; grey images: x[:, None]"
    if x.dtype == np.uint8 and x.ndim == 4:
        return "; channels last: x.transpose(0, 3, 1, 2)"
    if np.issubdtype(x.dtype, np.floating) and x.ndim in (3, 4):
        return "; numbers from 0 to 1: (255 * x).round().astype('uint8')"
    return ""


# Data set name -> reader. `raysweep list` prints the first line of each reader's docstring.
DATASET_LOADERS: dict[str, Callable[[Path | None, bool], TrainTestArrays]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "cifar10": load_cifar10,
    "svhn": load_svhn,
    "arrays": load_user_arrays,
}


def _load_torchvision_splits(
    dataset_name: str, data_dir: Path | None, make_dataset: Callable[[Any, str, bool], Any]
) -> tuple[Any, Any]:
    """Load the training and the test part with `make_dataset(datasets, root, is_train)`, where
    `datasets` is `torchvision.datasets`.
    """
    if data_dir is None:
        raise SpecError(
            f"data.data_dir is missing: data.name {dataset_name!r} needs the folder of its files "
            "(with data.download=true: a folder for them)"
        )
    # Imported after the check of the folder, because the import takes seconds.
    from torchvision import datasets

    try:
        return (
            make_dataset(datasets, str(data_dir), True),
            make_dataset(datasets, str(data_dir), False),
        )
    except (RuntimeError, OSError) as error:
        reason = get_first_line(error)
        hint = "point data.data_dir at the folder of torchvision's files, or set data.download=true"
        # Without a download, torchvision raises RuntimeError for files that are not there.
        is_missing = isinstance(error, RuntimeError | FileNotFoundError | NotADirectoryError)
        raise (SpecError if is_missing else InfrastructureError)(
            f"data.name {dataset_name!r} is not in {data_dir} ({reason}); {hint}"
        ) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {get_first_line(error)}"
        raise DamagedFileError(
            f"data.name {dataset_name!r} in {data_dir} cannot be read ({reason}); download it again"
        ) from error


def _refuse_pickled_mnist(data_dir: Path | None) -> None:
    """Raise SpecError for the files of an old torchvision, which would be unpickled."""
    folder = (data_dir or Path()) / "MNIST" / "processed"
    if data_dir is not None and any(folder.glob("*.pt")):
        raise SpecError(
            f"{folder}: has files of an old torchvision, which are pickles and never read: move "
            "the folder away; MNIST/raw is read (data.download=true makes it)"
        )


def _to_label_array(labels: object) -> LabelArray:
    """Convert labels to int64."""
    return np.asarray(labels, dtype=np.int64)


def _read_split_file(folder: Path, split_name: str) -> tuple[PixelArray, LabelArray]:
    """Read and check `split_name`.npz or `split_name`.parquet."""
    path = _find_split_file(folder, split_name)
    if path is None:
        raise SpecError(
            f"data.data_dir {str(folder)!r} has no {split_name}.npz and no {split_name}.parquet"
        )
    try:
        x, y = _SPLIT_READERS[path.suffix](path)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedFileError(f"{path}: cannot be read as {path.suffix}: {reason}") from error
    return check_image_arrays(path, x, y)


def _find_split_file(folder: Path, split_name: str) -> Path | None:
    """Return the file of a split; None if there is none."""
    paths = (folder / f"{split_name}{suffix}" for suffix in _SPLIT_READERS)
    return next(filter(Path.exists, paths), None)


def read_npz(path: Path) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Read an .npz file.

    Args:
        path: A file with the arrays `x` and `y`, also called `image` and `label`.

    Returns:
        `x` and `y`, unchecked.

    Raises:
        ValueError: If an array holds Python objects: loading them can execute code. Or if an array
            is missing.
        OSError: If the file cannot be read.
    """
    x, y = read_npz_optional_labels(path)
    if y is None:
        raise ValueError("it has no array y (or label)")
    return x, y


def read_npz_optional_labels(
    path: Path,
) -> tuple[NDArray[np.generic], NDArray[np.generic] | None]:
    """Read an .npz file that may lack labels.

    Args:
        path: A file with the array `x`, also called `image`, and perhaps `y` or `label`.

    Returns:
        Images, and labels or None; unchecked.

    Raises:
        ValueError: If an array holds Python objects, or if there are no images.
        OSError: If the file cannot be read.
    """
    with open_npz(path) as file:
        arrays = []
        for names in _ARRAY_NAMES:
            found = [name for name in names if name in file.names]
            arrays.append(file.read_array(found[0]) if found else None)
        if arrays[0] is None:
            raise ValueError(f"it has no array x (or image); found {', '.join(file.names[:10])}")
        return arrays[0], arrays[1]


def read_parquet(path: Path) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Read a .parquet file.

    Args:
        path: A file with the columns `x` (arrow.fixed_shape_tensor, C x H x W) and `y`.

    Returns:
        `x` and `y`, unchecked.

    Raises:
        ValueError: If `x` is not a column of tensors of one shape.
        OSError: If the file cannot be read.
    """
    table = read_parquet_table(path, ["x", "y"])
    column = table["x"].combine_chunks()
    if hasattr(column, "to_numpy_ndarray"):
        return column.to_numpy_ndarray(), table["y"].to_numpy()
    raise ValueError(
        "column x must be a fixed-shape tensor (arrow.fixed_shape_tensor) of shape C x H x W"
    )


# Suffix of the file of a split -> its reader. The first that exists is read.
_SPLIT_READERS = {".npz": read_npz, ".parquet": read_parquet}


def check_image_arrays(
    path: Path, x: NDArray[np.generic], y: NDArray[np.generic]
) -> tuple[PixelArray, LabelArray]:
    """Check that two arrays are images with one label each.

    Args:
        path: The file they come from, for the message.
        x: Images; must be (N, C, H, W) uint8. (N, H, W, C) is taken too where the numbers of
            channels leave no doubt.
        y: Labels; must be (N,) integers, 0 or larger, with N at least 1.

    Returns:
        `x` as uint8 and `y` as int64.

    Raises:
        SpecError: If a condition above does not hold.
    """
    if x.ndim == 4 and _is_channels_last(x.shape):
        logger.warning("%s: x has shape %s, taken as (N, H, W, C)", path, x.shape)
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    if x.ndim != 4 or x.dtype != np.uint8 or _has_few_columns(x.shape):
        raise SpecError(
            f"{path}: x must be uint8 of shape (N, C, H, W), got {x.dtype} of shape {x.shape}"
            f"{_suggest_conversion(x)}"
        )
    if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
        raise SpecError(
            f"{path}: y must be {len(x)} integers, one for each image, "
            f"got {y.dtype} of shape {y.shape}"
        )
    if len(y) == 0 or y.min() < 0:
        raise SpecError(f"{path}: labels must be 0 or larger, and there must be at least one")
    return x.astype(np.uint8, copy=False), y.astype(np.int64)
