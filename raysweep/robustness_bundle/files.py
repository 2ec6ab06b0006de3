"""Reading the files of a bundle that a stranger has made, and quoting its texts.

Nothing is unpickled, no link is followed, and types and shapes are known before arrays are read.
"""

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysweep.bounded_files import ArrayHeader, open_npz, read_regular_file
from raysweep.errors import DamagedFileError
from raysweep.spec import JsonDict, SpecError
from raysweep.visible_text import show_characters

ADVERSARIAL_FILE, CHECKPOINT_FOLDER = "adversarial.npz", "checkpoint"
MANIFEST_FILE, SIGNATURE_FILE = "manifest.json", "manifest.json.sig"
_MAX_ENTRIES = 1000
_MAX_SHOWN_LENGTH = 80
_MAX_SHOWN_ITEMS = 20
Array = NDArray[Any]


@dataclass(frozen=True)
class _ArrayKind:
    """What an array of the archive must be."""

    dtype_kinds: str
    n_dims: int
    is_required: bool = True


_ARRAY_KINDS = {
    "x_adv": _ArrayKind("f", 4),
    "labels": _ArrayKind("iu", 1),
    "index": _ArrayKind("iu", 1),
    "robust": _ArrayKind("b", 1),
    # Bundles of raysweep 0.1 lack it.
    "predicted": _ArrayKind("iu", 1, is_required=False),
}


def list_bundle_files(folder: Path) -> list[str]:
    """List the files of a bundle.

    Args:
        folder: The bundle.

    Returns:
        Paths relative to `folder`, with `/`, sorted.

    Raises:
        SpecError: There is no such folder.
        DamagedFileError: Something in it is neither a file nor a folder, or there is too much.
    """
    if not folder.is_dir():
        raise SpecError(f"{folder}: not a bundle: no such folder")
    names = []
    for count, path in enumerate(folder.rglob("*")):
        mode = path.lstat().st_mode
        name = path.relative_to(folder).as_posix()
        if count >= _MAX_ENTRIES:
            raise DamagedFileError(f"{folder}: not a bundle: it has more than {_MAX_ENTRIES} files")
        if stat.S_ISREG(mode):
            names.append(name)
        elif not stat.S_ISDIR(mode):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "no regular file"
            raise DamagedFileError(f"{folder}: not a bundle: {quote_value(name)} is {kind}")
    return sorted(names)


def read_strict_json(path: Path) -> JsonDict:
    """Read a JSON object that means the same to every reader.

    Args:
        path: The file.

    Returns:
        Its content. All numbers are finite, and no key is there twice.

    Raises:
        DamagedFileError: It is not such a JSON object, or too large.
    """
    try:
        content = json.loads(
            read_regular_file(path),
            parse_constant=_parse_finite,
            parse_float=_parse_finite,
            object_pairs_hook=_make_dict_of_unique_keys,
        )
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: {error}") from error
    return content


def shorten_list(items: list[str]) -> list[str]:
    """Return the first items and the number of the others: a stranger's list may be long."""
    n_more = len(items) - _MAX_SHOWN_ITEMS
    return [*items[:_MAX_SHOWN_ITEMS], f"{n_more} more"] if n_more > 1 else items


def _parse_finite(text: str) -> float:
    """Convert the text of a number; ValueError for NaN and infinity, also for 1e999."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _make_dict_of_unique_keys(pairs: list[tuple[str, Any]]) -> JsonDict:
    """Build a dict; ValueError if a key is there twice, because readers choose differently."""
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {quote_value(twice)} is there twice")
    return content


def read_adversarial_arrays(
    path: Path, n_test: int, image_shape: tuple[int, ...]
) -> Mapping[str, Array]:
    """Read the arrays of a bundle. Types and shapes are checked before anything large is read.

    Args:
        path: The .npz file.
        n_test: Number of test examples that there are.
        image_shape: Shape of a test image, (C, H, W).

    Returns:
        `x_adv`, (N, ...) float32; `labels`, `index` and, unless 0.1 wrote the bundle, `predicted`,
        (N,) int64; `robust`, (N,) bool; 1 <= N <= `n_test`.

    Raises:
        DamagedFileError: An array is missing, damaged, too large, or of another type or shape.
    """
    try:
        with open_npz(path) as file:
            headers = {
                name: file.read_header(name)
                for name, kind in _ARRAY_KINDS.items()
                if kind.is_required or name in file.names
            }
            _check_headers(headers, n_test, image_shape)
            return {name: _normalize_array(file.read_array(name)) for name in headers}
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{path}: {error}") from error


def _check_headers(
    headers: Mapping[str, ArrayHeader], n_test: int, image_shape: tuple[int, ...]
) -> None:
    """Raise ValueError if arrays have other types than they must, or other sizes than they can."""
    for name, (shape, dtype) in headers.items():
        kind = _ARRAY_KINDS[name]
        is_right_type = dtype.kind in kind.dtype_kinds and (name != "x_adv" or dtype == np.float32)
        if not is_right_type or len(shape) != kind.n_dims:
            raise ValueError(f"{name} is {dtype} {shape}")
        if len(shape) == 1 and shape[0] != headers["x_adv"].shape[0]:
            raise ValueError(f"{name} has {shape[0]} rows, x_adv {headers['x_adv'].shape[0]}")
    n_examples, *pixels = headers["x_adv"].shape
    if not 1 <= n_examples <= n_test:
        raise ValueError(f"it has {n_examples} examples, the test set {n_test}")
    if tuple(pixels) != image_shape:
        raise ValueError(f"its examples are {tuple(pixels)}, the test set's {image_shape}")


def _normalize_array(array: Array) -> Array:
    """Return an array in the type and byte order that PyTorch takes."""
    if array.dtype.kind == "b":
        # A byte other than 0 and 1 would be true for some operations and false for others.
        truth: Array = np.ascontiguousarray(array).view(np.uint8) != 0
        return truth
    return np.ascontiguousarray(array, np.float32 if array.dtype.kind == "f" else np.int64)


def quote_value(value: object) -> str:
    """Write a value of a bundle so that it fills one line of a terminal and nothing else."""
    text = show_characters(repr(value))
    return text if len(text) <= _MAX_SHOWN_LENGTH else f"{text[:_MAX_SHOWN_LENGTH]}..."


def quote_text(text: str) -> str:
    """Write a text of a bundle as it is, or quoted if it could be taken for something else."""
    is_plain = text.isprintable() and 0 < len(text) <= _MAX_SHOWN_LENGTH
    return text if is_plain else quote_value(text)
