"""Files are written completely or not at all; a folder or bucket has exactly one name."""

import os
import shutil
from pathlib import Path

import pytest

from raysweep.atomic_files import atomic_folder, atomic_open, atomic_write_text
from raysweep.stores import FolderStore


class PowerCut(Exception):
    pass


def read_all_files(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_file_is_replaced_at_the_end_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.json"
    atomic_write_text(path, "old ü\n")
    assert path.read_bytes() == b"old \xc3\xbc\n"
    with atomic_open(path) as stream:
        stream.write(b"new")
        stream.flush()
        assert path.read_text() == "old ü\n", (
            "readers see the old file while the new one is written"
        )
    assert read_all_files(tmp_path) == {"a/b/x.json": "new"}


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    atomic_write_text(path, "old")
    with pytest.raises(PowerCut), atomic_open(path) as stream:
        stream.write(b"half")
        raise PowerCut
    assert read_all_files(tmp_path) == {"x.json": "old"}
    with pytest.raises(PowerCut), atomic_open(tmp_path / "new.json") as stream:
        stream.write(b"half")
        raise PowerCut
    assert read_all_files(tmp_path) == {"x.json": "old"}, (
        "where there was no file, there is none afterwards"
    )


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flush and sync come before the rename: if that reached the disk before the data, the file
    would be empty.
    """
    steps: list[str] = []
    sync, rename = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        steps.append(f"synced {os.fstat(descriptor).st_size} bytes")
        sync(descriptor)

    def replace(path: Path, target: Path) -> Path:
        steps.append(f"named {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    atomic_write_text(tmp_path / "x.json", "12345")
    with atomic_folder(tmp_path / "folder") as partial:
        (partial / "y.json").write_text("123")
    assert steps == ["synced 5 bytes", "named x.json", "synced 3 bytes", "named folder"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "epoch"
    with atomic_folder(path) as partial:
        (partial / "one").write_text("1")
        (partial / "in").mkdir()
        (partial / "in" / "two").write_text("2")
        assert not path.exists() and partial.parent == path.parent and partial.name.startswith(".")
    assert read_all_files(tmp_path) == {"a/epoch/one": "1", "a/epoch/in/two": "2"}
    with atomic_folder(path) as partial:
        (partial / "three").write_text("3")
        assert (path / "one").exists()
    assert read_all_files(tmp_path) == {"a/epoch/three": "3"}, (
        "nothing of the old folder is left in the new one"
    )


def test_a_crash_while_the_old_folder_is_deleted_leaves_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rmtree = tmp_path / "epoch", shutil.rmtree
    with atomic_folder(path) as partial:
        (partial / "one").write_text("1")
        (partial / "meta.json").write_text("old")

    def delete_half(folder: Path, ignore_errors: bool = False) -> None:
        if (folder / "one").exists():
            (folder / "one").unlink()
            raise PowerCut
        rmtree(folder, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", delete_half)
    with pytest.raises(PowerCut), atomic_folder(path) as partial:
        (partial / "two").write_text("2")
    assert read_all_files(path) == {"two": "2"}
    monkeypatch.undo()
    FolderStore(tmp_path).delete_unfinished("")
    assert [child.name for child in tmp_path.iterdir()] == ["epoch"]


def test_a_folder_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "epoch"
    with atomic_folder(path) as partial:
        (partial / "one").write_text("1")
    with pytest.raises(PowerCut), atomic_folder(path) as partial:
        (partial / "half").write_text("2")
        raise PowerCut
    assert read_all_files(path) == {"one": "1"}
    with atomic_folder(path) as partial:
        (partial / "two").write_text("2")
    assert read_all_files(tmp_path) == {"epoch/two": "2"}, (
        "the half-written folder is no part of the next one"
    )
