"""Where images come from. A new data set is a function here and a line in `DATASETS`."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raysweep.spec import SpecError

PixelArray = NDArray[np.uint8]
LabelArray = NDArray[np.int64]


@dataclass(frozen=True)
class TrainTestArrays:
    """x (N, C, H, W) uint8 in 0..white, y (N,) int64 in 0..classes-1, for training and for test."""

    x_train: PixelArray
    y_train: LabelArray
    x_test: PixelArray
    y_test: LabelArray
    pixel_max: int = 255


def load_digits(data_dir: Path | None, download: bool) -> TrainTestArrays:
    """scikit-learn's bundled handwritten digits, 8x8 grey, 0..16: the last 450 are the test set."""
    # The file alone: importing scikit-learn would take each process longer than reading and
    # splitting the data.
    package = find_spec("sklearn")
    assert package is not None and package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    rows = np.loadtxt(file, delimiter=",").astype(np.uint8)
    x, y = rows[:, :-1].reshape(-1, 1, 8, 8), rows[:, -1].astype(np.int64)
    return TrainTestArrays(x[:-450], y[:-450], x[-450:], y[-450:], pixel_max=16)


def load_mnist(data_dir: Path | None, download: bool) -> TrainTestArrays:
    """MNIST's handwritten digits, 28x28 grey, in torchvision's files."""
    from torchvision.datasets import MNIST

    train, test = _load_torchvision_splits(
        "mnist", data_dir, lambda root, train: MNIST(root, train, download=download)
    )
    x_train, x_test = train.data.numpy()[:, None], test.data.numpy()[:, None]
    return TrainTestArrays(
        x_train, _to_label_array(train.targets), x_test, _to_label_array(test.targets)
    )


def load_cifar10(data_dir: Path | None, download: bool) -> TrainTestArrays:
    """CIFAR-10, 32x32 colour, in torchvision's files."""
    from torchvision.datasets import CIFAR10

    train, test = _load_torchvision_splits(
        "cifar10", data_dir, lambda root, train: CIFAR10(root, train, download=download)
    )
    x_train, x_test = (
        np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)) for part in (train, test)
    )
    return TrainTestArrays(
        x_train, _to_label_array(train.targets), x_test, _to_label_array(test.targets)
    )


def load_svhn(data_dir: Path | None, download: bool) -> TrainTestArrays:
    """Street View House Numbers, 32x32 colour, in torchvision's files."""
    from torchvision.datasets import SVHN

    def split(root: str, train: bool) -> Any:
        return SVHN(root, "train" if train else "test", download=download)

    train, test = _load_torchvision_splits("svhn", data_dir, split)
    return TrainTestArrays(
        train.data, _to_label_array(train.labels), test.data, _to_label_array(test.labels)
    )


def load_user_arrays(data_dir: Path | None, download: bool) -> TrainTestArrays:
    """A user's own images: `train` and `test`, each .npz or .parquet with `x` uint8 NCHW and `y`,
    in `data_dir`.
    """
    if data_dir is None:
        raise SpecError(
            "data.data_dir is missing: data.name 'arrays' reads train.npz and test.npz (or .parquet) there"
        )
    (x_train, y_train), (x_test, y_test) = (
        _read_split_file(data_dir, split) for split in ("train", "test")
    )
    if x_train.shape[1:] != x_test.shape[1:]:
        raise SpecError(
            f"{data_dir}: train images are {x_train.shape[1:]}, test images {x_test.shape[1:]}"
        )
    return TrainTestArrays(x_train, y_train, x_test, y_test)


DATASET_LOADERS: dict[str, Callable[[Path | None, bool], TrainTestArrays]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "cifar10": load_cifar10,
    "svhn": load_svhn,
    "arrays": load_user_arrays,
}


def _load_torchvision_splits(
    dataset_name: str, data_dir: Path | None, make_dataset: Callable[[str, bool], Any]
) -> tuple[Any, Any]:
    """Training and test part by torchvision's own loader."""
    if data_dir is None:
        raise SpecError(
            f"data.data_dir is missing: data.name {dataset_name!r} needs the folder that has it or is to get it"
        )
    try:
        return make_dataset(str(data_dir), True), make_dataset(str(data_dir), False)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        hint = "point data.data_dir at the folder of torchvision's files, or set data.download=true"
        raise SpecError(
            f"data.name {dataset_name!r} is not in {data_dir} ({reason}); {hint}"
        ) from None


def _to_label_array(labels: object) -> LabelArray:
    return np.asarray(labels, dtype=np.int64)


def _read_split_file(folder: Path, split_name: str) -> tuple[PixelArray, LabelArray]:
    for suffix, reader in ((".npz", read_npz), (".parquet", read_parquet)):
        path = folder / f"{split_name}{suffix}"
        if path.exists():
            try:
                x, y = reader(path)
            except Exception as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise SpecError(f"{path}: cannot be read as {suffix}: {reason}") from None
            return check_image_arrays(path, x, y)
    raise SpecError(
        f"data.data_dir {str(folder)!r} has no {split_name}.npz and no {split_name}.parquet"
    )


def read_npz(path: Path) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """`x` and `y`; arrays of objects are refused, for reading them would execute what they say."""
    with np.load(path, allow_pickle=False) as file:
        return file["x"], file["y"]


def read_parquet(path: Path) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Columns `x`, a fixed-shape tensor, and `y`."""
    table = pq.read_table(path, columns=["x", "y"])
    column = table["x"].combine_chunks()
    if hasattr(column, "to_numpy_ndarray"):
        return column.to_numpy_ndarray(), table["y"].to_numpy()
    raise ValueError(
        "column x must be a fixed-shape tensor (arrow.fixed_shape_tensor) of shape C x H x W"
    )


def check_image_arrays(
    path: Path, x: NDArray[np.generic], y: NDArray[np.generic]
) -> tuple[PixelArray, LabelArray]:
    """x and y in their types, if they are images with one label each; SpecError if not."""
    if x.ndim != 4 or x.dtype != np.uint8:
        raise SpecError(
            f"{path}: x must be uint8 of shape (N, C, H, W), got {x.dtype} of shape {x.shape}"
        )
    if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
        raise SpecError(
            f"{path}: y must be {len(x)} integers, one for each image, got {y.dtype} of shape {y.shape}"
        )
    if len(y) == 0 or y.min() < 0:
        raise SpecError(f"{path}: labels must be 0 or larger, and there must be some")
    return x.astype(np.uint8, copy=False), y.astype(np.int64)
