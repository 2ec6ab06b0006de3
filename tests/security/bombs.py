"""Small files that unpack to much, or that never end (point 8)."""

import gzip
import io
import os
import pickle
import stat
import struct
import zipfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from attack_table import attack, in_little_memory, low_limit, refusal_of
from foreign_references import write_checkpoint
from hostile_texts import make_sweep

from raysweep import load, load_report
from raysweep.bounded_files import open_npz, read_parquet_table, read_regular_file
from raysweep.data.dataset_loaders import load_user_arrays, read_image_shape
from raysweep.data.unlabeled import read_unlabeled_file
from raysweep.evaluation.shards import ShardResult
from raysweep.logs import read_log
from raysweep.pipeline.artifact import Artifact
from raysweep.stores import open_path
from raysweep.sweep.ledger import Ledger

MIB = 2**20


def write_npz(path: Path, shape: tuple[int, ...], data: bytes, name: str = "x.npy") -> None:
    """Write an .npz file whose header and data need not agree."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, header.getvalue() + data)


def read_images(folder: Path) -> object:
    return load_user_arrays(folder, False)


@attack(8, "zeros in train.npz, a thousandth of their size", "1.5 MB became 1.5 GB")
def zeros_in_npz(folder: Path) -> str:
    np.savez_compressed(folder / "train.npz", x=np.zeros((400, 3, 512, 512), np.uint8))
    assert (folder / "train.npz").stat().st_size < MIB
    return in_little_memory(lambda: refusal_of(lambda: read_images(folder)))


@attack(8, "an .npy header that declares 2 TB before 3 bytes")
def header_that_lies(folder: Path) -> str:
    write_npz(folder / "train.npz", (2**11, 2**10, 2**10, 2**10), b"abc")
    return in_little_memory(lambda: refusal_of(lambda: read_images(folder)))


@attack(8, "an .npy header that declares less than it has")
def header_that_is_modest(folder: Path) -> str:
    write_npz(folder / "train.npz", (1, 1, 2, 2), bytes(64 * MIB))
    with low_limit(1_000):
        return in_little_memory(lambda: refusal_of(lambda: read_images(folder)), mib=32)


@attack(8, "two arrays of one name")
def two_arrays_of_one_name(folder: Path) -> str:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.zeros((2, 1, 4, 4), np.uint8))
    with zipfile.ZipFile(folder / "train.npz", "w") as archive:
        archive.writestr("x.npy", buffer.getvalue())
        archive.writestr("x.npy", buffer.getvalue())
    return refusal_of(lambda: read_images(folder))


@attack(8, "objects in an .npz file", "held: nothing was unpickled")
def objects_in_npz(folder: Path) -> str:
    np.savez(folder / "train.npz", x=np.array([{}], dtype=object), y=np.zeros(1, np.int64))
    line = refusal_of(lambda: read_images(folder))
    assert "allow_pickle" not in line
    return line


@attack(8, "the shape of a bomb, which plans read")
def shape_of_a_bomb(folder: Path) -> str:
    np.savez_compressed(folder / "train.npz", x=np.zeros((64, 1, 512, 512), np.uint8))
    with low_limit():
        assert read_image_shape(folder) is None
    return "no shape; the reader says why"


@attack(8, "equal images in train.parquet, a thousandth of their size", "85 kB became 400 MB")
def equal_images_in_parquet(folder: Path) -> str:
    values = pa.array(np.zeros(12 * MIB, np.uint8))
    kind = pa.fixed_shape_tensor(pa.uint8(), (1, 1024, 1024))
    storage = pa.FixedSizeListArray.from_arrays(values, MIB)
    x = pa.ExtensionArray.from_storage(kind, storage)
    table = pa.table({"x": x, "y": np.zeros(12, np.int64)})
    pq.write_table(table, folder / "train.parquet", compression="zstd")
    assert (folder / "train.parquet").stat().st_size < MIB
    with low_limit():
        return in_little_memory(lambda: refusal_of(lambda: read_images(folder)), mib=32)


@attack(8, "a long word thousands of times in 1 kB of examples.parquet")
def long_words_in_parquet(folder: Path) -> str:
    table = pa.table({"broken_by": pa.array(["a" * 100_000] * 2_000)})
    table = table.replace_schema_metadata({"raysweep.evaluation": "{}"})
    pq.write_table(table, folder / "examples.parquet", compression="zstd")
    with low_limit():
        line = in_little_memory(lambda: refusal_of(lambda: load_report(folder)))
    assert "unpack to" in line
    return line


@attack(8, "millions of rows without any value in examples.parquet", "342 kB became 1.5 GB")
def rows_of_nothing(folder: Path) -> str:
    table = pa.table({"broken_by": pa.nulls(4_000_000)})
    pq.write_table(
        table.replace_schema_metadata({"raysweep.evaluation": "{}"}), folder / "e.parquet"
    )
    with low_limit():
        return in_little_memory(lambda: refusal_of(lambda: load_report(folder / "e.parquet")))


@attack(8, "thousands of columns in examples.parquet", "5.8 MB took minutes")
def columns_in_thousands(folder: Path) -> str:
    """The footer, which is as long as the columns are many, is read a few times only."""
    names = [f"column{number}" for number in range(3_000)]
    table = pa.table({name: [1] for name in names})
    pq.write_table(
        table.replace_schema_metadata({"raysweep.evaluation": "{}"}), folder / "e.parquet"
    )
    read_schema, n_reads = pq.ParquetFile.schema_arrow.fget, []

    def count_reads(file: pq.ParquetFile) -> pa.Schema:
        n_reads.append(file)
        return read_schema(file)

    with patch.object(pq.ParquetFile, "schema_arrow", property(count_reads)):
        assert load_report(folder / "e.parquet").shape == (1, 3_000)
    assert len(n_reads) < 10
    return f"read, the footer {len(n_reads)} times"


@attack(8, "12 bytes of pickle that name a far memo entry")
def far_memo_entry(folder: Path) -> str:
    file = folder / "unlabelled.pickle"
    file.write_bytes(b"\x80\x02}r" + struct.pack("<I", 2**30) + b".")
    return in_little_memory(lambda: refusal_of(lambda: read_unlabeled_file(file)))


@attack(8, "a pipe or a device in place of train.npz, train.parquet and unlabelled images")
def pipes_in_place_of_data(folder: Path) -> str:
    lines = []
    for name in ("train.npz", "train.parquet", "more.pickle"):
        for kind in ("pipe", "device"):
            file = folder / kind / name
            file.parent.mkdir(exist_ok=True)
            if kind == "pipe":
                os.mkfifo(file)
            else:
                file.symlink_to("/dev/zero")
            read = read_unlabeled_file if name.startswith("more") else None
            lines.append(refusal_of(lambda: read(file) if read else read_images(file.parent)))  # noqa: B023
            assert read_image_shape(file.parent) is None
            file.unlink()
    return lines[0]


@attack(8, "a pipe that takes the place of a file once it has been looked at")
def pipe_after_the_look(folder: Path) -> str:
    """What is open is what was checked: the path leads to a pipe after the first look at it."""
    files = {name: folder / name for name in ("a.npz", "a.parquet", "a.pickle", "a.json")}
    np.savez(files["a.npz"], x=np.zeros((2, 1, 4, 4), np.uint8))
    pq.write_table(pa.table({"x": [1, 2]}), files["a.parquet"])
    files["a.pickle"].write_bytes(pickle.dumps({"data": 1}))
    files["a.json"].write_text("{}")
    real_stat, seen = os.fstat, []

    def stat_then_swap(handle: int) -> os.stat_result:
        status, path = real_stat(handle), Path(f"/proc/self/fd/{handle}").readlink()
        if path in files.values():
            seen.append(path)
            path.unlink()
            os.mkfifo(path)
        return status

    with patch("raysweep.bounded_files.os.fstat", stat_then_swap):
        with open_npz(files["a.npz"]) as archive:
            assert archive.read_array("x").shape == (2, 1, 4, 4)
        assert read_parquet_table(files["a.parquet"]).num_rows == 2
        assert "expected a dict" in refusal_of(lambda: read_unlabeled_file(files["a.pickle"]))
        assert read_regular_file(files["a.json"]) == b"{}"
    assert set(seen) == set(files.values())
    assert all(stat.S_ISFIFO(path.stat().st_mode) for path in seen)
    return "the file that was looked at was read"


@attack(8, "arrays in zip members that ask for gigabytes to unpack bytes, or have a password")
def other_compressions(folder: Path) -> str:
    lines = []
    for method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.zeros((2, 1, 4, 4), np.uint8))
        with zipfile.ZipFile(folder / "train.npz", "w", method) as archive:
            archive.writestr("x.npy", buffer.getvalue())
        lines.append(refusal_of(lambda: read_images(folder)))
    assert "compressed in a way that NumPy does not write" in lines[0] == lines[1]
    return lines[0]


@attack(8, "JSON that is gzip'd, nested 100,000 deep, a number of 5,000 digits, or no UTF-8")
def json_of_all_kinds(folder: Path) -> str:
    make_sweep(folder)
    checkpoint = write_checkpoint(folder, {})
    artifact = folder / "artifact.json"
    artifact.write_text("{}")
    contents = {
        "gzip": lambda text: gzip.compress(text.encode()),
        "deep": lambda text: b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "long": lambda text: b'{"x": ' + b"9" * 5_000 + b"}",
        "bytes": lambda text: b"\xff\xfe\xfa" + text.encode(),
        "halves": lambda text: b'{"\\ud800": 1}',
    }
    readers = {
        folder / "runs/s/sweep.json": lambda: Ledger.open(folder / "runs/s"),
        folder / "runs/s/trials/0000/trial.json": lambda: Ledger.open(
            folder / "runs/s"
        ).load_trials(),
        checkpoint / "meta.json": lambda: load(checkpoint),
        artifact: lambda: Artifact.read_if_finished(folder),
    }
    n_read = 0
    for file, read in readers.items():
        honest = file.read_text()
        for content in contents.values():
            file.write_bytes(content(honest))
            refusal_of(read)
            n_read += 1
        file.write_text(honest)
    return f"{n_read} files: one line each"


@attack(8, "thousands of arrays, or a header of brackets")
def many_arrays_and_brackets(folder: Path) -> str:
    with zipfile.ZipFile(folder / "train.npz", "w") as archive:
        for number in range(2_000):
            archive.writestr(f"{number}.npy", b"")
    long_line = refusal_of(lambda: read_images(folder))
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': " + b"(" * 4000
    with zipfile.ZipFile(folder / "train.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text)
    line = refusal_of(lambda: read_images(folder))
    assert max(len(line), len(long_line)) < 500 + len(str(folder))
    return line


@attack(8, "a bomb among the shards of an attack")
def bomb_among_shards(folder: Path) -> str:
    write_npz(folder / "shard.npz", (64 * MIB,), bytes(64 * MIB), "positions.npy")

    def read() -> str:
        assert ShardResult.load_npz(folder / "shard.npz", b"key") is None
        return "left out, and computed again"

    with low_limit():
        return in_little_memory(read, mib=32)


@attack(8, "a sweep.json of 100 GB, which takes no room on the disk")
def endless_json(folder: Path) -> str:
    with (folder / "sweep.json").open("wb") as stream:
        stream.truncate(100 * 2**30)
    path = open_path(folder) / "sweep.json"
    return in_little_memory(lambda: refusal_of(path.read_json))


@attack(8, "a log.jsonl of 100 GB, shown by `show --log`")
def endless_log(folder: Path) -> str:
    ledger = make_sweep(folder)
    with (folder / "runs/s/log.jsonl").open("ab") as stream:
        stream.truncate(100 * 2**30)
    return in_little_memory(lambda: refusal_of(lambda: read_log(ledger.path)))


@attack(8, "a pipe in place of sweep.json or trial.json")
def pipe_in_place_of_a_file(folder: Path) -> str:
    (folder / "trials/0000").mkdir(parents=True)
    os.mkfifo(folder / "sweep.json")
    os.mkfifo(folder / "trials/0000/trial.json")
    refusal_of((open_path(folder) / "sweep.json").read_json)
    return refusal_of(lambda: (open_path(folder) / "trials").read_matching("*/trial.json"))
