"""Paths in stores: one name on every machine, and what is read from damaged files."""

import os
import pickle
from pathlib import Path

import pytest

from raysweep.errors import DamagedFileError, SpecError
from raysweep.stores import StoredFileNotFound, is_uri, open_path
from raysweep.yaml_files import read_yaml


@pytest.mark.parametrize(
    "where",
    [
        "s3://b/a b/ü/100%",
        "s3://b/~x/a+b",
        "s3://b/run#3/[1]",
        "s3://b.c-d/x?region=eu-central-1",
        "s3://b/x?endpoint_override=h:1&scheme=http&region=~%41",
        "gs://b",
        "gs://anonymous@b/x?endpoint_override=h:1&scheme=http",
    ],
)
def test_a_place_in_a_bucket_keeps_its_name(where: str) -> None:
    path = open_path(where)
    assert path.local_path is None and str(path) == where
    assert open_path(str(path)) == path and pickle.loads(pickle.dumps(path)) == path
    below, query = str(path / "trials" / "0003").partition("?")[::2]
    assert below == where.partition("?")[0] + "/trials/0003" and query == where.partition("?")[2]
    assert open_path(str(path / "trials")) == path / "trials"
    assert (path / "trials").parent == path and (path / "trials").name == "trials"


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ("s3://AKIA:se/cret@b/x", "s3://...@b: credentials belong in the environment"),
        ("s3://b/x?endpoint_override=me:secret@h:1", "endpoint_override='h:1': expected HOST"),
        ("s3://b/x?endpoint_override=http://h:1", "expected HOST or HOST:PORT"),
        ("s3://b/x?endpoint_override=h:port", "expected HOST or HOST:PORT"),
        ("s3://b/x?scheme=ftp", "scheme='ftp': expected http or https"),
        ("s3://b/x?region=", "expected a name such as eu-west-1"),
        ("gs://b/x?retry_limit_seconds=abc", "'abc': expected a number of seconds"),
        ("gs://b/x?retry_limit_seconds=nan", "expected a number of seconds"),
        ("az://b/x?sig=secret", "az://b/x: expected a folder, s3://BUCKET/PATH or gs://"),
        ("s3://[b/x", "expected a folder"),
        ("s3://b:9000/x", "expected a folder"),
        ("s3:/b/x", "expected a folder"),
    ],
)
def test_a_malformed_uri_is_one_line_without_its_secrets(where: str, problem: str) -> None:
    with pytest.raises(SpecError) as error:
        open_path(where)
    (line,) = error.value.problems
    assert problem in line and "secret" not in line and "cret@" not in line


def test_different_places_have_different_folders() -> None:
    places = [
        "s3://b/x",
        "gs://b/x",
        "s3://b/x/y",
        "s3://c/x",
        "s3://b/x?region=a",
        "s3://b/x?region=b",
    ]
    paths = [open_path(place) for place in places]
    assert len(set(paths)) == len({path.working_path for path in paths}) == len(places)
    assert open_path("s3://b//x/") == open_path("s3://b/x")


def test_a_folder_may_be_written_in_several_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_path("a/../b") == open_path(tmp_path / "b") == open_path(tmp_path) / "b"
    assert open_path("~/b").local_path == tmp_path / "home" / "b"
    assert str(open_path("b")) == str(tmp_path / "b") == str(open_path("b").working_path)
    assert pickle.loads(pickle.dumps(open_path("b"))) == open_path("b")
    assert is_uri("s3://b") and not is_uri("a:b") and not is_uri("/a//b")


def test_a_path_in_a_store_cannot_be_opened_beside_it(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        os.fspath(open_path(tmp_path / "x"))  # type: ignore[call-overload]


def test_the_environment_decides_where_copies_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = open_path("s3://b/x")
    monkeypatch.setenv("RAYSWEEP_CACHE", str(tmp_path / "own"))
    assert path.working_path.is_relative_to(tmp_path / "own")
    monkeypatch.delenv("RAYSWEEP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert path.working_path.is_relative_to(tmp_path / "xdg" / "raysweep")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path.working_path.is_relative_to(tmp_path / ".cache" / "raysweep")


def test_what_is_nested_too_deeply_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    file.write_text("[" * 100_000)
    with pytest.raises(DamagedFileError, match=r"is damaged: it is no JSON object"):
        open_path(file).read_json()
    settings = tmp_path / "settings.yaml"
    settings.write_text("a: " + "[" * 5000)
    with pytest.raises(SpecError, match=r"settings\.yaml:1: .*nested too deeply"):
        read_yaml(settings)


def test_the_content_of_a_local_folder(tmp_path: Path) -> None:
    root = open_path(tmp_path)
    for file in (
        "b/meta.json",
        "a/meta.json",
        ".hidden/meta.json",
        "c/other.json",
        "a/deep/meta.json",
        "meta.json",
    ):
        (root / file).write_text("{}")
    assert root.list_folders_containing() == ["a", "b"], (
        "only folders that hold the file themselves, and no hidden ones"
    )
    assert root.list_folders_containing("other.json") == ["c"]
    assert root.list_subfolders() == [".hidden", "a", "b", "c"]
    assert (root / "none").list_subfolders() == []
    assert (root / "a").fetch_checkpoint() == tmp_path / "a"
    assert (root / "c").fetch_checkpoint() is None
    assert (root / "c" / "other.json").is_file() and not (root / "c").is_file()
    (root / "a").delete_folder()
    (root / "none").delete_folder()
    assert root.list_subfolders() == [".hidden", "b", "c"]


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
        open_path(tmp_path / "x.json").read_json({"c": int, "b": int, "a": int})
    place = tmp_path / "x.json"
    assert (
        str(error.value)
        == f"{place} is damaged: {fault}; restore it, or start anew under another --name"
    )


def test_a_sound_file_may_have_more_keys_and_a_missing_one_is_missing(tmp_path: Path) -> None:
    file = open_path(tmp_path / "x.json")
    file.write_json({"a": 1, "more": None})
    assert file.read_json({"a": int}) == {"a": 1, "more": None}
    with pytest.raises(StoredFileNotFound):
        open_path(tmp_path / "none.json").read_json({"a": int})
