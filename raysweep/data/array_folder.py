"""Write images that a program holds in arrays to a folder, as the data set `arrays` reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from raysweep.atomic_files import atomic_folder
from raysweep.data.dataset_loaders import LabelArray, PixelArray, check_image_arrays
from raysweep.errors import InfrastructureError, describe_os_error
from raysweep.lazy_modules import np
from raysweep.spec import SpecError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

ImageArrays: TypeAlias = "Mapping[str, tuple[ArrayLike, ArrayLike]] | Sequence[Any]"
"""Images with labels: {"train": (x, y), "test": (x, y)}, or ((x, y), (x, y)) in this order. The
test images may be left out: {"train": (x, y)}, or (x, y)."""

ARRAYS_FOLDER = ".arrays"
"""Folder beside sweeps and runs in which the data sets of arrays are written."""
_SPLIT_NAMES = ("train", "test")
_EXPECTED = (
    'expected (x, y) or {"train": (x, y), "test": (x, y)}; trainings use a part of the training '
    "images for validation, and the test images for final results only"
)


def write_array_folder(arrays: ImageArrays, parent: Path) -> Path:
    """Write training and test images, unless the same ones have been written there before.

    Args:
        arrays: Images and labels (see `ImageArrays`), as NumPy arrays, CPU
            tensors or lists: `x` (N, C, H, W) uint8 in 0..255, or (N, H, W, C) if the shape shows
            which axis has the channels; `y` (N,) integers from 0.
        parent: Folder of the data sets of arrays; created if it is missing.

    Returns:
        The folder of these images, named by their content, with `train.npz` and, if there are test
        images, `test.npz`.

    Raises:
        SpecError: The training images are missing, or a part is not such images with one label
            each.
        InfrastructureError: The folder cannot be written.
    """
    checked: dict[str, tuple[PixelArray, LabelArray]] = {}
    for name, pair in _name_splits(arrays).items():
        x, y = _unpack_pair(name, pair)
        checked[name] = check_image_arrays(Path(f"data[{name!r}]"), x, y)
    folder = parent / _compute_digest(checked)
    try:
        if not folder.is_dir():
            with atomic_folder(folder, overwrite=False) as partial:
                for name, (x, y) in checked.items():
                    np.savez(partial / f"{name}.npz", x=x, y=y)
    except OSError as error:
        raise InfrastructureError(f"data: {describe_os_error(error)}") from error
    return folder


def _name_splits(arrays: ImageArrays) -> dict[str, Any]:
    """Return the pairs by their names. Raises SpecError if there are others."""
    if isinstance(arrays, Mapping):
        if set(arrays) not in ({"train"}, set(_SPLIT_NAMES)):
            found = ", ".join(map(repr, arrays)) or "nothing"
            raise SpecError(f"data: has {found}; {_EXPECTED}")
        return {name: arrays[name] for name in _SPLIT_NAMES if name in arrays}
    if not isinstance(arrays, Sequence) or len(arrays) != 2:
        raise SpecError(f"data: is not a pair; {_EXPECTED}")
    if all(isinstance(pair, Sequence) and len(pair) == 2 for pair in arrays):
        return dict(zip(_SPLIT_NAMES, arrays, strict=True))
    return {"train": arrays}


def _unpack_pair(name: str, pair: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels as arrays of NumPy. Raises SpecError if they cannot be such."""
    try:
        x, y = pair
        return np.asarray(x), np.asarray(y)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SpecError(f"data[{name!r}]: is not a pair (x, y) of arrays: {error}") from error


def _compute_digest(splits: Mapping[str, tuple[PixelArray, LabelArray]]) -> str:
    """Return 16 hexadecimal digits that identify all pixels and labels."""
    digest = hashlib.sha256()
    for x, y in splits.values():
        digest.update(repr((x.shape, y.shape)).encode())
        digest.update(np.ascontiguousarray(x).tobytes())
        digest.update(np.ascontiguousarray(y).tobytes())
    return digest.hexdigest()[:16]
