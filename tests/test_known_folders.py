"""Where data are looked for that a checkpoint was trained on: where this user has read them."""

from pathlib import Path

import numpy as np
import pytest

from raysweep.data import DataSpec, known_folders, load_data
from raysweep.data.known_folders import find_data_folder, remember_data_folder


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(known_folders, "_folders", {})
    return tmp_path / "state/raysweep/data_folders"


def test_a_folder_that_was_read_is_found_by_another_process(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "test"):
        x = np.arange(40, dtype=np.uint8).repeat(16).reshape(40, 1, 4, 4)
        np.savez(tmp_path / f"{split}.npz", x=x, y=np.arange(40) % 2)
    data = load_data(DataSpec(name="arrays", data_dir=tmp_path, val_size=4))
    monkeypatch.setattr(known_folders, "_folders", {})
    assert find_data_folder(data.fingerprint) == tmp_path
    assert (state / data.fingerprint).stat().st_mode & 0o077 == 0
    remember_data_folder(data.fingerprint, tmp_path / "moved")
    monkeypatch.setattr(known_folders, "_folders", {})
    assert find_data_folder(data.fingerprint) == tmp_path / "moved"


@pytest.mark.parametrize("fingerprint", ["../../x", "", "0" * 15, "0" * 17, None, 3, ["a"], "0\n"])
def test_what_is_no_fingerprint_names_no_folder(fingerprint: object, state: Path) -> None:
    state.mkdir(parents=True)
    assert find_data_folder(fingerprint) is None


@pytest.mark.parametrize(
    ("content", "mode"), [("relative", 0o600), ("", 0o600), ("/a\0b", 0o600), ("/data", 0o666)]
)
def test_files_that_others_could_write_or_that_are_damaged_are_not_used(
    content: str, mode: int, state: Path
) -> None:
    state.mkdir(parents=True)
    (state / ("0" * 16)).write_text(content)
    (state / ("0" * 16)).chmod(mode)
    assert find_data_folder("0" * 16) is None


def test_without_a_place_for_files_a_process_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    remember_data_folder("1" * 16, tmp_path)
    assert find_data_folder("1" * 16) == tmp_path
