"""Files are written completely or not at all; a folder or bucket has exactly one name."""

import os
from pathlib import Path

import pytest

from raysweep import storage
from raysweep.atomic_files import atomic_folder, atomic_open, atomic_write_text
from raysweep.errors import DamagedFileError


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


@pytest.mark.parametrize(
    "where",
    [
        "s3://b/a b/ü/100%",
        "s3://b/~x/a+b",
        "s3://b.c-d/x?region=eu-central-1",
        "s3://b/x?endpoint_override=h:1&scheme=http&region=~%41",
        "gs://b",
        "gs://anonymous@b/x?endpoint_override=h:1&scheme=http",
    ],
)
def test_a_place_in_a_bucket_keeps_its_name(where: str) -> None:
    path = storage.local_path(where)
    assert (
        storage.is_bucket_copy(path)
        and storage.uri_of(path) == where
        and storage.local_path(storage.uri_of(path)) == path
    )
    below, query = storage.uri_of(path / "trials" / "0003").partition("?")[::2]
    assert below == where.partition("?")[0] + "/trials/0003" and query == where.partition("?")[2]
    assert storage.local_path(storage.uri_of(path / "trials")) == path / "trials"


def test_different_places_have_different_folders() -> None:
    places = [
        "s3://b/x",
        "gs://b/x",
        "s3://b/x/y",
        "s3://c/x",
        "s3://b/x?region=a",
        "s3://b/x?region=b",
    ]
    paths = [storage.local_path(place) for place in places]
    assert len(set(paths)) == len(places)
    assert storage.local_path("s3://b//x/") == storage.local_path("s3://b/x")


def test_a_folder_may_be_written_in_several_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert (
        storage.local_path("a/../b") == tmp_path / "b"
        and storage.local_path("~/b") == tmp_path / "home" / "b"
    )
    assert storage.is_uri("s3://b") and not storage.is_uri("a:b") and not storage.is_uri("/a//b")


def test_the_environment_decides_where_copies_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "own"))
    assert storage.local_path("s3://b/x").is_relative_to(tmp_path / "own")
    monkeypatch.delenv("RAYSWEEP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert storage.local_path("s3://b/x").is_relative_to(tmp_path / "xdg" / "raysweep")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.local_path("s3://b/x").is_relative_to(tmp_path / ".cache" / "raysweep")


def test_the_content_of_a_local_folder(tmp_path: Path) -> None:
    for file in (
        "b/meta.json",
        "a/meta.json",
        ".hidden/meta.json",
        "c/other.json",
        "a/deep/meta.json",
        "meta.json",
    ):
        atomic_write_text(tmp_path / file, "{}")
    assert storage.list_folders_containing(tmp_path) == ["a", "b"], (
        "only folders that hold the file themselves, and no hidden ones"
    )
    assert storage.list_folders_containing(tmp_path, "other.json") == ["c"]
    assert (
        storage.list_subfolders(tmp_path) == [".hidden", "a", "b", "c"]
        and storage.list_subfolders(tmp_path / "none") == []
    )
    assert {str(path.relative_to(tmp_path)) for path in storage.iter_files(tmp_path / "a")} == {
        "a/meta.json",
        "a/deep/meta.json",
    }
    assert storage.pull_checkpoint(tmp_path / "a") and not storage.pull_checkpoint(tmp_path / "c")
    assert storage.pull_file(tmp_path / "c" / "other.json") and not storage.pull_file(
        tmp_path / "c"
    )
    storage.delete_everywhere(tmp_path / "a")
    storage.delete_everywhere(tmp_path / "none")
    assert storage.list_subfolders(tmp_path) == [".hidden", "b", "c"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"a": 1, "b": 2', "it is no JSON object"),
        ("[1]", "it is no JSON object"),
        ("", "it is no JSON object"),
        ('{"b": 2}', "it lacks a, c"),
    ],
)
def test_a_damaged_file_is_one_line_that_says_what_to_do(
    text: str, fault: str, tmp_path: Path
) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DamagedFileError) as error:
        storage.read_json(tmp_path / "x.json", ("c", "b", "a"))
    place = tmp_path / "x.json"
    assert (
        str(error.value)
        == f"{place} is damaged: {fault}; restore it, or start anew under another --name"
    )


def test_a_sound_file_may_have_more_keys_and_a_missing_one_is_missing(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1, "more": null}')
    assert storage.read_json(tmp_path / "x.json", ("a",)) == {"a": 1, "more": None}
    with pytest.raises(FileNotFoundError):
        storage.read_json(tmp_path / "none.json", ("a",))
