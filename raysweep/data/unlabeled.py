"""Images without labels of their own, for robust self-training: reading them, and labelling them
with a model.
"""

import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raysweep.atomic_files import atomic_open
from raysweep.data.datasets import LabelArray, PixelArray, check_image_arrays, read_parquet
from raysweep.spec import SpecError

ImagesAndLabels = tuple[NDArray[np.generic], NDArray[np.generic] | None]


def read_unlabeled_file(path: Path) -> tuple[PixelArray, LabelArray | None]:
    """x (N, C, H, W) uint8 and, if the file has them, y (N,) int64, from .npz, .parquet or Carmon
    et al.'s .pickle.

    Nothing in the file is executed. Raises SpecError in one line for a file that is not what its
    name says.
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
        raise SpecError(f"{path}: cannot be read as {path.suffix}: {reason}") from None
    if y is None:
        return check_image_arrays(path, x, np.zeros(len(x), dtype=np.int64))[0], None
    return check_image_arrays(path, x, y)


def write_pseudo_labeled_npz(path: Path, x: PixelArray, y: LabelArray) -> None:
    """An .npz that `read` and `data.unlabeled` take; whole or not at all."""
    with atomic_open(path) as stream:
        np.savez_compressed(stream, x=x, y=y)


def predict_pseudo_labels(
    model: nn.Module, x: Tensor, pixel_max: int = 255, batch_size: int = 1000
) -> Tensor:
    """The class that the model gives each of x (N, C, H, W) uint8 in 0..white: (N,) int64 (Carmon
    et al. 2019).

    Batch norms are in eval mode while it works; the model comes out as it went in.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        labels = [
            model(part.to(device).float() / pixel_max).argmax(1).to(x.device)
            for part in torch.split(x, batch_size)
        ]
    model.train(training)
    return torch.cat(labels)


def _read_npz_optional_labels(path: Path) -> ImagesAndLabels:
    with np.load(path, allow_pickle=False) as file:
        return (file["x"], file["y"]) if "y" in file.files else (file["x"], None)


def _read_carmon_pickle(path: Path) -> ImagesAndLabels:
    """Carmon et al.'s 500K images: a dict of `data`, uint8 (N, H, W, C), and
    `extrapolated_targets`, (N,) integers.
    """
    with path.open("rb") as file:
        content = _ArrayUnpickler(file, encoding="latin1").load()
    if not isinstance(content, dict) or not isinstance(content.get("data"), _NdarrayStub):
        raise ValueError("expected a dict with an array `data`")
    x, labels = content["data"].to_ndarray(), content.get("extrapolated_targets")
    if x.ndim != 4:
        raise ValueError(f"data must be of shape (N, H, W, C), got {x.shape}")
    y = (
        labels.to_ndarray()
        if isinstance(labels, _NdarrayStub)
        else None
        if labels is None
        else np.asarray(labels)
    )
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)), y


UNLABELED_FILE_READERS: dict[str, Callable[[Path], ImagesAndLabels]] = {
    ".npz": _read_npz_optional_labels,
    ".parquet": read_parquet,
    ".pickle": _read_carmon_pickle,
    ".pkl": _read_carmon_pickle,
}


class _DtypeStub:
    """Stands for numpy.dtype: numbers of fixed size alone."""

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[iuf][1248]|b1", code):
            raise pickle.UnpicklingError(f"an array of {code!r}, where only numbers are allowed")
        self.type_code, self.byte_order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.byte_order = state[1] if state[1] in ("<", ">") else "<"

    def to_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.byte_order + self.type_code)


@dataclass
class _NdarrayStub:
    """Stands for numpy.ndarray: keeps what the pickle says and makes an array of it when asked."""

    data_bytes: bytes = b""
    dtype: _DtypeStub | None = None
    shape: tuple[int, ...] = ()
    is_fortran_order: bool = False

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, self.is_fortran_order, raw = state
        self.data_bytes = raw.encode("latin1") if isinstance(raw, str) else raw

    def to_ndarray(self) -> NDArray[np.generic]:
        if not isinstance(self.dtype, _DtypeStub) or not isinstance(
            self.data_bytes, bytes | bytearray
        ):
            raise pickle.UnpicklingError("an array without plain numbers")
        return np.frombuffer(self.data_bytes, self.dtype.to_dtype()).reshape(
            self.shape, order="F" if self.is_fortran_order else "C"
        )


def _make_ndarray_stub(*_: object) -> _NdarrayStub:
    return _NdarrayStub()


def _make_stub_from_buffer(
    data_bytes: bytes, dtype: _DtypeStub, shape: tuple[int, ...], order: str
) -> _NdarrayStub:
    return _NdarrayStub(data_bytes, dtype, shape, order == "F")


def _encode_latin1(text: str, encoding: str) -> bytes:
    """How protocols 0 to 2 write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Reads plain data and arrays of numbers. Names in the pickle are never imported: each stands
    for a part above.
    """

    _ALLOWED_GLOBALS = {  # noqa: RUF012
        ("_codecs", "encode"): _encode_latin1,
        ("numpy", "dtype"): _DtypeStub,
        ("numpy", "ndarray"): _NdarrayStub,
        **{
            (f"numpy.{core}.multiarray", "_reconstruct"): _make_ndarray_stub
            for core in ("core", "_core")
        },
        **{
            (f"numpy.{core}.numeric", "_frombuffer"): _make_stub_from_buffer
            for core in ("core", "_core")
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED_GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, and only arrays of numbers are read"
            ) from None

    def persistent_load(self, pid: object) -> NoReturn:
        raise pickle.UnpicklingError("it refers to things outside of the file")
