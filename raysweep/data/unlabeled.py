"""Images without labels of their own, for robust self-training: reading them, and labelling them with a model."""

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

from raysweep.data.sources import Labels, Pixels, checked, read_parquet
from raysweep.files import whole
from raysweep.spec import SpecError

Arrays = tuple[NDArray[np.generic], NDArray[np.generic] | None]


def read(path: Path) -> tuple[Pixels, Labels | None]:
    """x (N, C, H, W) uint8 and, if the file has them, y (N,) int64, from .npz, .parquet or Carmon et al.'s .pickle.

    Nothing in the file is executed. Raises SpecError in one line for a file that is not what its name says.
    """
    reader = READERS.get(path.suffix)
    if reader is None:
        raise SpecError(f"{path}: unlabelled data must be one of {', '.join(READERS)}")
    try:
        x, y = reader(path)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SpecError(f"{path}: cannot be read as {path.suffix}: {reason}") from None
    if y is None:
        return checked(path, x, np.zeros(len(x), dtype=np.int64))[0], None
    return checked(path, x, y)


def write(path: Path, x: Pixels, y: Labels) -> None:
    """An .npz that `read` and `data.unlabeled` take; whole or not at all."""
    with whole(path) as stream:
        np.savez_compressed(stream, x=x, y=y)


def pseudo_label(model: nn.Module, x: Tensor, white: int = 255, batch_size: int = 1000) -> Tensor:
    """The class that the model gives each of x (N, C, H, W) uint8 in 0..white: (N,) int64 (Carmon et al. 2019).

    Batch norms are in eval mode while it works; the model comes out as it went in.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        labels = [model(part.to(device).float() / white).argmax(1).to(x.device) for part in torch.split(x, batch_size)]
    model.train(training)
    return torch.cat(labels)


def _read_npz(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        return (file["x"], file["y"]) if "y" in file.files else (file["x"], None)


def _read_pickle(path: Path) -> Arrays:
    """Carmon et al.'s 500K images: a dict of `data`, uint8 (N, H, W, C), and `extrapolated_targets`, (N,) integers."""
    with path.open("rb") as file:
        content = _ArraysOnly(file, encoding="latin1").load()
    if not isinstance(content, dict) or not isinstance(content.get("data"), _Array):
        raise ValueError("expected a dict with an array `data`")
    x, labels = content["data"].numpy(), content.get("extrapolated_targets")
    if x.ndim != 4:
        raise ValueError(f"data must be of shape (N, H, W, C), got {x.shape}")
    y = labels.numpy() if isinstance(labels, _Array) else None if labels is None else np.asarray(labels)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)), y


READERS: dict[str, Callable[[Path], Arrays]] = {
    ".npz": _read_npz,
    ".parquet": read_parquet,
    ".pickle": _read_pickle,
    ".pkl": _read_pickle,
}


class _Type:
    """Stands for numpy.dtype: numbers of fixed size alone."""

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[iuf][1248]|b1", code):
            raise pickle.UnpicklingError(f"an array of {code!r}, where only numbers are allowed")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "<"

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


@dataclass
class _Array:
    """Stands for numpy.ndarray: keeps what the pickle says and makes an array of it when asked."""

    raw: bytes = b""
    dtype: _Type | None = None
    shape: tuple[int, ...] = ()
    fortran: bool = False

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, self.fortran, raw = state
        self.raw = raw.encode("latin1") if isinstance(raw, str) else raw

    def numpy(self) -> NDArray[np.generic]:
        if not isinstance(self.dtype, _Type) or not isinstance(self.raw, bytes | bytearray):
            raise pickle.UnpicklingError("an array without plain numbers")
        return np.frombuffer(self.raw, self.dtype.numpy()).reshape(self.shape, order="F" if self.fortran else "C")


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _frombuffer(raw: bytes, dtype: _Type, shape: tuple[int, ...], order: str) -> _Array:
    return _Array(raw, dtype, shape, order == "F")


def _encode(text: str, encoding: str) -> bytes:
    """How protocols 0 to 2 write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Reads plain data and arrays of numbers. Names in the pickle are never imported: each stands for a part above."""

    _NAMES = {  # noqa: RUF012
        ("_codecs", "encode"): _encode,
        ("numpy", "dtype"): _Type,
        ("numpy", "ndarray"): _Array,
        **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
        **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, and only arrays of numbers are read") from None

    def persistent_load(self, pid: object) -> NoReturn:
        raise pickle.UnpicklingError("it refers to things outside of the file")
