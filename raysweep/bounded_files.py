"""Read files of strangers: what a small file unpacks to is known before memory is taken for it.

This is the only module that reads .npz and .parquet files. Text files are read whole up to a
length.
"""

from __future__ import annotations

import math
import os
import stat
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Self

from raysweep.errors import RaysweepError, SpecError, get_first_line
from raysweep.lazy_modules import np

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

UNPACKED_LIMIT_VARIABLE = "RAYSWEEP_MAX_UNPACKED_MIB"
"""Environment variable: MiB to which any file may unpack, however small it is."""

_DEFAULT_LIMIT_MIB = 256
# Photographs and digits shrink to a half or an eighth; bombs to a thousandth.
_MAX_EXPANSION = 16
# JSON takes up to 20 times its length in memory.
_TEXT_SHARE = 8
_NPZ_COMPRESSIONS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_NUMBERS_AND_TEXT = "biufSU"
_POINTER_BYTES = 8
_MAX_BATCH_ROWS = 65_536
_MAX_REASON_LENGTH = 200
# A batch is counted when it is in memory already.
_BATCHES_IN_LIMIT = 8


class FileTooLarge(ValueError):
    """A file, or what it unpacks to, is larger than the limit. One line."""


class ArrayHeader(NamedTuple):
    """What an .npy header declares.

    Attributes:
        shape: Lengths of the dimensions.
        dtype: Type of the elements.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def n_bytes(self) -> int:
        """Memory of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_unpacked_limit() -> int:
    """Return the number of bytes to which any file may unpack.

    Returns:
        `RAYSWEEP_MAX_UNPACKED_MIB` in bytes; 256 MiB without it.

    Raises:
        SpecError: If the variable is not a whole number above 0.
    """
    text = os.environ.get(UNPACKED_LIMIT_VARIABLE, "")
    if not text:
        return _DEFAULT_LIMIT_MIB * 2**20
    if not (text.isascii() and text.isdecimal() and len(text) <= 9 and int(text) > 0):
        raise SpecError(
            f"{UNPACKED_LIMIT_VARIABLE}={text!r}: expected MiB as a whole number from 1, "
            f"such as {_DEFAULT_LIMIT_MIB}"
        )
    return int(text) * 2**20


def check_unpacked_size(n_bytes: int, file_size: int) -> None:
    """Check that a file does not unpack to more than it may.

    Args:
        n_bytes: Bytes that its content takes in memory, as the file declares.
        file_size: Bytes of the file.

    Raises:
        FileTooLarge: `n_bytes` exceeds both the limit (see `read_unpacked_limit`) and 16 times the
            file.
    """
    if n_bytes <= max(read_unpacked_limit(), _MAX_EXPANSION * file_size):
        return
    raise FileTooLarge(
        f"{_format_size(file_size)} unpack to {_format_size(n_bytes)}; if you trust the file, set "
        f"{UNPACKED_LIMIT_VARIABLE}={math.ceil(n_bytes / 2**20)}"
    )


def read_regular_file(path: Path) -> bytes:
    """Read a whole file of text, such as JSON.

    Args:
        path: The file. A pipe or device is refused: reading one may never end.

    Raises:
        FileTooLarge: If it is longer than an eighth of `read_unpacked_limit`.
        IsADirectoryError: If it is a folder.
        OSError: If it cannot be read.
        ValueError: If it is a pipe, a device or the like.
    """
    with open_regular_file(path) as stream:
        n_bytes = os.fstat(stream.fileno()).st_size
        check_text_length(n_bytes)
        # A file that grows meanwhile is cut off.
        return stream.read(max(n_bytes, 1))


@contextmanager
def open_regular_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that ends: opening a pipe waits for a writer, and a device has no end.

    What is open is what was checked, whatever the path leads to by then. Links are followed.

    Args:
        path: The file.

    Yields:
        The file, open for reading.

    Raises:
        ValueError: If it is a pipe, a device or the like.
        OSError: If it is a folder, or cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as stream:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is no regular file")
        yield stream


def check_text_length(n_bytes: int) -> None:
    """Check the length of a text that is read whole, such as JSON.

    Args:
        n_bytes: Its length in bytes.

    Raises:
        FileTooLarge: If it is longer than an eighth of `read_unpacked_limit`.
    """
    if n_bytes > read_unpacked_limit() // _TEXT_SHARE:
        raise FileTooLarge(
            f"{_format_size(n_bytes)} are too long for text; if you trust the file, set "
            f"{UNPACKED_LIMIT_VARIABLE}={math.ceil(_TEXT_SHARE * n_bytes / 2**20)}"
        )


def adopt_unpacked_limit(n_bytes: int) -> None:
    """Use the limit of the driver in this worker process, and in processes that it starts.

    Args:
        n_bytes: What `read_unpacked_limit` returned in the driver.
    """
    os.environ[UNPACKED_LIMIT_VARIABLE] = str(n_bytes // 2**20)


class BoundedNpz:
    """An open .npz file. Sizes are checked before an array is read, objects are never read.

    Use it as a context manager, which `open_npz` makes.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._archive = zipfile.ZipFile(stream)
        members = self._archive.infolist()
        if not {member.compress_type for member in members} <= _NPZ_COMPRESSIONS:
            # The file itself would say how much memory reading it takes.
            raise ValueError("it is compressed in a way that NumPy does not write")
        n_bytes = sum(member.file_size for member in members)
        check_unpacked_size(n_bytes, os.fstat(stream.fileno()).st_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    @property
    def names(self) -> list[str]:
        """Names of the arrays."""
        return [name.removesuffix(".npy") for name in self._archive.namelist()]

    def read_header(self, name: str) -> ArrayHeader:
        """Read what an array's header declares, and check that it is as long as its data.

        Args:
            name: Name of the array.

        Raises:
            ValueError: If there is no such array, or it holds objects or anything else than
                numbers or text.
        """
        member = self._find_member(name)
        with self._archive.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_2_0
            if version == (1, 0):
                read = np.lib.format.read_array_header_1_0
            shape, _, dtype = read(stream)
            n_header_bytes = stream.tell()
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which raysweep never reads")
        header = ArrayHeader(shape, dtype)
        if dtype.kind not in _NUMBERS_AND_TEXT or any(length < 0 for length in shape):
            raise ValueError(f"{name} is {dtype} of shape {shape}, expected numbers")
        if header.n_bytes != member.file_size - n_header_bytes:
            raise ValueError(f"{name} declares another size than its data have")
        return header

    def read_array(self, name: str) -> NDArray[Any]:
        """Read an array; the arguments and errors are those of `read_header`."""
        self.read_header(name)
        with self._archive.open(self._find_member(name)) as stream:
            array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        return array

    def _find_member(self, name: str) -> zipfile.ZipInfo:
        """Return the archive's entry of an array; ValueError if there is none, or several."""
        found = [member for member in self._archive.infolist() if member.filename == f"{name}.npy"]
        if len(found) != 1:
            known = ", ".join(self.names[:10])
            raise ValueError(f"it has {len(found)} arrays {name}; found {known}")
        return found[0]


@contextmanager
def open_npz(path: Path) -> Iterator[BoundedNpz]:
    """Open an .npz file for reading.

    Args:
        path: The file.

    Yields:
        The open file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is damaged, holds anything else than numbers or text, or unpacks to more
            than it may (`FileTooLarge`). One line. Errors of the block become one, too.
    """
    with _one_line_errors(), open_regular_file(path) as stream, BoundedNpz(stream) as archive:
        yield archive


def read_parquet_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a .parquet file.

    Args:
        path: The file.
        columns: Names of the columns to read; None for all.

    Returns:
        The table, with the metadata of its schema.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is damaged, lacks a column, or unpacks to more than it may
            (`FileTooLarge`). One line.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _one_line_errors(), ExitStack() as stack:
        stream = stack.enter_context(open_regular_file(path))
        file_size = os.fstat(stream.fileno()).st_size
        file = stack.enter_context(pq.ParquetFile(stream))
        schema = file.schema_arrow
        missing = [name for name in columns or () if name not in schema.names]
        if missing:
            raise ValueError(f"it has no column {missing[0]}; found {', '.join(schema.names[:10])}")
        declared = _measure_parquet(file, schema.names if columns is None else columns)
        check_unpacked_size(declared.n_bytes, file_size)
        batches, n_bytes = [], 0
        # Repeated text takes no room in the file: it is counted while it is read.
        for batch in file.iter_batches(declared.batch_rows, columns=columns and list(columns)):
            n_bytes += batch.nbytes
            check_unpacked_size(n_bytes, file_size)
            batches.append(batch)
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns], schema.metadata)
        return pa.Table.from_batches(batches, schema)


class _DeclaredSize(NamedTuple):
    """What the footer of a .parquet file says.

    Attributes:
        n_bytes: Least memory of the columns.
        batch_rows: Rows to read at a time, so that a batch takes a small part of the limit.
    """

    n_bytes: int
    batch_rows: int


def _measure_parquet(file: Any, columns: Sequence[str]) -> _DeclaredSize:
    """Return what the footer of an open .parquet file says about some columns."""
    n_bytes, largest_chunk, limit = 0, 1, read_unpacked_limit()
    # Each access reads the footer anew, which may have thousands of columns.
    metadata, schema, chosen = file.metadata, file.schema_arrow, set(columns)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for position in range(group.num_columns):
            chunk = group.column(position)
            name = chunk.path_in_schema.split(".")[0]
            if name not in chosen:
                continue
            width = _find_value_width(schema.field(name).type)
            n_bytes += max(chunk.total_uncompressed_size, chunk.num_values * width)
            values_per_row = chunk.num_values / max(group.num_rows, 1)
            row_bytes = values_per_row * (width or chunk.total_uncompressed_size)
            largest_chunk = max(largest_chunk, math.ceil(row_bytes))
    batch_rows = limit // (_BATCHES_IN_LIMIT * largest_chunk)
    return _DeclaredSize(n_bytes, max(1, min(_MAX_BATCH_ROWS, batch_rows)))


def _find_value_width(arrow_type: Any) -> int:
    """Return the bytes of one value of a column; 0 if values differ in length."""
    import pyarrow as pa

    while True:
        if hasattr(arrow_type, "storage_type"):
            arrow_type = arrow_type.storage_type
        elif hasattr(arrow_type, "value_type") and not hasattr(arrow_type, "index_type"):
            arrow_type = arrow_type.value_type
        else:
            break
    if pa.types.is_null(arrow_type):
        # They take no room until pandas makes objects of them.
        return _POINTER_BYTES
    try:
        return max(1, int(arrow_type.bit_width) // 8)
    except ValueError:
        return 0


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn whatever the libraries raise for a damaged file into a ValueError of one line.

    OSError, also for a missing file, and errors of raysweep stay as they are.
    """
    try:
        yield
    except (OSError, FileTooLarge, RaysweepError):
        raise
    except Exception as error:
        line = get_first_line(error)
        shown = line if len(line) <= _MAX_REASON_LENGTH else f"{line[:_MAX_REASON_LENGTH]}..."
        raise ValueError(shown) from error


def _format_size(n_bytes: int) -> str:
    """Format a size, such as `1.5 MiB`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= size:
            return f"{n_bytes / size:,.1f} {unit}"
    return f"{n_bytes} bytes"
