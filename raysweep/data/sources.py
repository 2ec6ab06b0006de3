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

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Arrays:
    """x (N, C, H, W) uint8 in 0..white, y (N,) int64 in 0..classes-1, for training and for test."""

    x_train: Pixels
    y_train: Labels
    x_test: Pixels
    y_test: Labels
    white: int = 255


def digits(data_dir: Path | None, download: bool) -> Arrays:
    """scikit-learn's bundled handwritten digits, 8x8 grey, 0..16: the last 450 are the test set."""
    # The file alone: importing scikit-learn would take each process longer than reading and splitting the data.
    package = find_spec("sklearn")
    assert package is not None and package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    rows = np.loadtxt(file, delimiter=",").astype(np.uint8)
    x, y = rows[:, :-1].reshape(-1, 1, 8, 8), rows[:, -1].astype(np.int64)
    return Arrays(x[:-450], y[:-450], x[-450:], y[-450:], white=16)


def mnist(data_dir: Path | None, download: bool) -> Arrays:
    """MNIST's handwritten digits, 28x28 grey, in torchvision's files."""
    from torchvision.datasets import MNIST

    train, test = _torchvision("mnist", data_dir, lambda root, train: MNIST(root, train, download=download))
    x_train, x_test = train.data.numpy()[:, None], test.data.numpy()[:, None]
    return Arrays(x_train, _labels(train.targets), x_test, _labels(test.targets))


def cifar10(data_dir: Path | None, download: bool) -> Arrays:
    """CIFAR-10, 32x32 colour, in torchvision's files."""
    from torchvision.datasets import CIFAR10

    train, test = _torchvision("cifar10", data_dir, lambda root, train: CIFAR10(root, train, download=download))
    x_train, x_test = (np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)) for part in (train, test))
    return Arrays(x_train, _labels(train.targets), x_test, _labels(test.targets))


def svhn(data_dir: Path | None, download: bool) -> Arrays:
    """Street View House Numbers, 32x32 colour, in torchvision's files."""
    from torchvision.datasets import SVHN

    def split(root: str, train: bool) -> Any:
        return SVHN(root, "train" if train else "test", download=download)

    train, test = _torchvision("svhn", data_dir, split)
    return Arrays(train.data, _labels(train.labels), test.data, _labels(test.labels))


def arrays(data_dir: Path | None, download: bool) -> Arrays:
    """A user's own images: `train` and `test`, each .npz or .parquet with `x` uint8 NCHW and `y`, in `data_dir`."""
    if data_dir is None:
        raise SpecError("data.data_dir is missing: data.name 'arrays' reads train.npz and test.npz (or .parquet) there")
    (x_train, y_train), (x_test, y_test) = (_read_arrays(data_dir, split) for split in ("train", "test"))
    if x_train.shape[1:] != x_test.shape[1:]:
        raise SpecError(f"{data_dir}: train images are {x_train.shape[1:]}, test images {x_test.shape[1:]}")
    return Arrays(x_train, y_train, x_test, y_test)


DATASETS: dict[str, Callable[[Path | None, bool], Arrays]] = {
    "digits": digits,
    "mnist": mnist,
    "cifar10": cifar10,
    "svhn": svhn,
    "arrays": arrays,
}


def _torchvision(name: str, data_dir: Path | None, split: Callable[[str, bool], Any]) -> tuple[Any, Any]:
    """Training and test part by torchvision's own loader."""
    if data_dir is None:
        raise SpecError(f"data.data_dir is missing: data.name {name!r} needs the folder that has it or is to get it")
    try:
        return split(str(data_dir), True), split(str(data_dir), False)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        hint = "point data.data_dir at the folder of torchvision's files, or set data.download=true"
        raise SpecError(f"data.name {name!r} is not in {data_dir} ({reason}); {hint}") from None


def _labels(labels: object) -> Labels:
    return np.asarray(labels, dtype=np.int64)


def _read_arrays(folder: Path, split: str) -> tuple[Pixels, Labels]:
    for suffix, reader in ((".npz", read_npz), (".parquet", read_parquet)):
        path = folder / f"{split}{suffix}"
        if path.exists():
            try:
                x, y = reader(path)
            except Exception as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise SpecError(f"{path}: cannot be read as {suffix}: {reason}") from None
            return checked(path, x, y)
    raise SpecError(f"data.data_dir {str(folder)!r} has no {split}.npz and no {split}.parquet")


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
    raise ValueError("column x must be a fixed-shape tensor (arrow.fixed_shape_tensor) of shape C x H x W")


def checked(path: Path, x: NDArray[np.generic], y: NDArray[np.generic]) -> tuple[Pixels, Labels]:
    """x and y in their types, if they are images with one label each; SpecError if not."""
    if x.ndim != 4 or x.dtype != np.uint8:
        raise SpecError(f"{path}: x must be uint8 of shape (N, C, H, W), got {x.dtype} of shape {x.shape}")
    if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
        raise SpecError(f"{path}: y must be {len(x)} integers, one for each image, got {y.dtype} of shape {y.shape}")
    if len(y) == 0 or y.min() < 0:
        raise SpecError(f"{path}: labels must be 0 or larger, and there must be some")
    return x.astype(np.uint8, copy=False), y.astype(np.int64)
