"""Unlabelled images for robust self-training (Carmon et al. 2019): reading and pseudo-labelling."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, TypeAlias

from raysweep.atomic_files import atomic_open
from raysweep.attacks import freeze_model
from raysweep.bounded_files import open_regular_file
from raysweep.data.dataset_loaders import (
    LabelArray,
    PixelArray,
    check_image_arrays,
    read_npz_optional_labels,
    read_parquet,
)
from raysweep.errors import DamagedFileError
from raysweep.lazy_modules import np, torch
from raysweep.spec import SpecError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

ImagesAndLabels: TypeAlias = "tuple[NDArray[np.generic], NDArray[np.generic] | None]"


def read_unlabeled_file(path: Path) -> tuple[PixelArray, LabelArray | None]:
    """Read images, and labels if the file has them. Code inside the file is never executed.

    Args:
        path: A .npz or .parquet file with `x` and `y`, or a .pickle or .pkl file in the format of
            Carmon et al. (2019). Only .npz and pickle files may lack labels.

    Returns:
        Images, (N, C, H, W) uint8, and labels, (N,) int64 or None.

    Raises:
        SpecError: If the suffix is unknown, or the file does not hold images.
        DamagedFileError: If the file cannot be read.
    """
    reader = UNLABELED_FILE_READERS.get(path.suffix)
    if reader is None:
        raise SpecError(
            f"{path}: unlabelled data must be one of {', '.join(UNLABELED_FILE_READERS)}"
        )
    try:
        x, y = reader(path)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedFileError(f"{path}: cannot be read as {path.suffix}: {reason}") from error
    if y is None:
        return check_image_arrays(path, x, np.zeros(len(x), dtype=np.int64))[0], None
    return check_image_arrays(path, x, y)


def write_pseudo_labeled_npz(path: Path, x: PixelArray, y: LabelArray) -> None:
    """Write an .npz file, atomically, which the setting `data.unlabeled` accepts.

    Args:
        path: The file to write.
        x: Images, (N, C, H, W) uint8.
        y: Labels, (N,) int64.

    Raises:
        OSError: If the file cannot be written.
    """
    with atomic_open(path) as stream:
        np.savez_compressed(stream, x=x, y=y)


def predict_pseudo_labels(
    model: nn.Module, x: Tensor, pixel_max: int = 255, batch_size: int = 1000
) -> Tensor:
    """Predict the class of each image (Carmon et al. 2019).

    The model runs in eval mode; its former mode is restored at the end.

    Args:
        model: Maps (B, C, H, W) float32 in [0, 1] to logits (B, classes).
        x: Images, (N, C, H, W) uint8 in 0..`pixel_max`.
        pixel_max: Pixel value that becomes 1.0.
        batch_size: Images per forward pass.

    Returns:
        Labels, (N,) int64, on the device of `x`.
    """
    from raysweep.models.device import get_model_device

    device = get_model_device(model)
    with freeze_model(model), torch.no_grad():
        labels = [
            model(part.to(device).float() / pixel_max).argmax(1).to(x.device)
            for part in torch.split(x, batch_size)
        ]
    return torch.cat(labels)


def _read_carmon_pickle(path: Path) -> ImagesAndLabels:
    """Read the file of 500,000 images of Carmon et al. (2019).

    It is a dict of `data`, (N, H, W, C) uint8, and `extrapolated_targets`, (N,) integers.
    """
    with open_regular_file(path) as file:
        content = _ArrayUnpickler(file, encoding="latin1").load()
    if not isinstance(content, dict) or not isinstance(content.get("data"), _NdarrayStub):
        raise ValueError("expected a dict with an array `data`")
    x, labels = content["data"].to_ndarray(), content.get("extrapolated_targets")
    if x.ndim != 4:
        raise ValueError(f"data must be of shape (N, H, W, C), got {x.shape}")
    if isinstance(labels, _NdarrayStub):
        labels = labels.to_ndarray()
    y = None if labels is None else np.asarray(labels)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)), y


# File suffix -> reader.
UNLABELED_FILE_READERS: dict[str, Callable[[Path], ImagesAndLabels]] = {
    ".npz": read_npz_optional_labels,
    ".parquet": read_parquet,
    ".pickle": _read_carmon_pickle,
    ".pkl": _read_carmon_pickle,
}


class _DtypeStub:
    """Replaces numpy.dtype in a pickle. Accepts only numbers of fixed size."""

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[iuf][1248]|b1", code):
            raise pickle.UnpicklingError(f"an array of {code!r}: only numbers are allowed")
        self.type_code, self.byte_order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.byte_order = state[1] if state[1] in ("<", ">") else "<"

    def to_dtype(self) -> np.dtype[Any]:
        """Return the NumPy type."""
        return np.dtype(self.byte_order + self.type_code)


@dataclass
class _NdarrayStub:
    """Replaces numpy.ndarray in a pickle. Stores the raw bytes until `to_ndarray` is called."""

    data_bytes: bytes = b""
    dtype: _DtypeStub | None = None
    shape: tuple[int, ...] = ()
    is_fortran_order: bool = False

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, self.is_fortran_order, raw = state
        self.data_bytes = raw.encode("latin1") if isinstance(raw, str) else raw

    def to_ndarray(self) -> NDArray[np.generic]:
        """Return the array; UnpicklingError if the pickle has no type or no bytes for it."""
        dtype, data_bytes = self.dtype, self.data_bytes
        if not isinstance(dtype, _DtypeStub) or not isinstance(data_bytes, bytes | bytearray):
            raise pickle.UnpicklingError("an array without plain numbers")
        order: Literal["C", "F"] = "F" if self.is_fortran_order else "C"
        values = np.frombuffer(data_bytes, dtype.to_dtype())
        return values.reshape(self.shape, order=order)


def _make_ndarray_stub(*_: object) -> _NdarrayStub:
    """Replace numpy's `_reconstruct`, which makes an empty array."""
    return _NdarrayStub()


def _make_stub_from_buffer(
    data_bytes: bytes, dtype: _DtypeStub, shape: tuple[int, ...], order: str
) -> _NdarrayStub:
    """Replace numpy's `_frombuffer`, which makes an array from bytes."""
    return _NdarrayStub(data_bytes, dtype, shape, order == "F")


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Replace `_codecs.encode`, with which pickle protocols 0 to 2 store bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle._Unpickler):
    """Reads plain data and arrays of numbers. Never imports a name that is in the pickle.

    Each allowed name is replaced by a stub of this module; every other name is an error. It is the
    unpickler in Python: that in C takes gigabytes of memory for a few bytes that name a memo entry.
    """

    _ALLOWED_GLOBALS: ClassVar[Mapping[tuple[str, str], Any]] = {
        ("_codecs", "encode"): _encode_latin1,
        ("numpy", "dtype"): _DtypeStub,
        ("numpy", "ndarray"): _NdarrayStub,
        ("numpy.core.multiarray", "_reconstruct"): _make_ndarray_stub,
        ("numpy._core.multiarray", "_reconstruct"): _make_ndarray_stub,
        ("numpy.core.numeric", "_frombuffer"): _make_stub_from_buffer,
        ("numpy._core.numeric", "_frombuffer"): _make_stub_from_buffer,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return the stub of an allowed name. The unpickler calls this for every global name."""
        try:
            return self._ALLOWED_GLOBALS[module, name]
        except KeyError as error:
            raise pickle.UnpicklingError(
                f"it refers to {module}.{name}; only arrays of numbers are allowed"
            ) from error

    def persistent_load(self, pid: object) -> NoReturn:
        """Raise UnpicklingError for a reference to an object outside of the file."""
        raise pickle.UnpicklingError("it refers to objects outside of the file")
