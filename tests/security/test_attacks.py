"""Each attack of the table fails, and honest files go on being read."""

import re
from pathlib import Path

import attack_modules
import attack_table
import numpy as np
import pytest
from attack_table import Attack

from raysweep.bounded_files import UNPACKED_LIMIT_VARIABLE, open_npz, read_unpacked_limit
from raysweep.data.dataset_loaders import load_user_arrays
from raysweep.errors import DamagedFileError, SpecError


@pytest.mark.parametrize("one", attack_table.ATTACKS, ids=lambda one: one.play.__name__)
def test_attacks_fail(one: Attack, tmp_path: Path) -> None:
    assert one.play(tmp_path)


def test_the_limit_of_bombs_can_be_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        x = np.zeros((40, 1, 512, 512), np.uint8)
        np.savez_compressed(tmp_path / f"{split}.npz", x=x, y=np.zeros(40, np.int64))
    assert load_user_arrays(tmp_path, False).x_train.shape == (40, 1, 512, 512)
    monkeypatch.setenv(UNPACKED_LIMIT_VARIABLE, "8")
    with pytest.raises(DamagedFileError, match=r"unpack to 10.0 MiB; .*MAX_UNPACKED_MIB=11"):
        load_user_arrays(tmp_path, False)
    monkeypatch.setenv(UNPACKED_LIMIT_VARIABLE, "11")
    assert len(load_user_arrays(tmp_path, False).x_test) == 40


def test_files_that_do_not_shrink_have_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.random.default_rng(0).integers(0, 256, 3 * 2**20).astype(np.uint8)
    np.savez_compressed(tmp_path / "photos.npz", x=x)
    monkeypatch.setenv(UNPACKED_LIMIT_VARIABLE, "1")
    with open_npz(tmp_path / "photos.npz") as archive:
        assert np.array_equal(archive.read_array("x"), x)


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "1e3", "many", "9" * 30, "²"])
def test_a_limit_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(UNPACKED_LIMIT_VARIABLE, value)
    with pytest.raises(SpecError, match="expected MiB as a whole number from 1"):
        read_unpacked_limit()


def test_the_page_names_tests_that_exist() -> None:
    tests = Path(__file__).parent.parent
    page = (tests.parent / "docs/security.md").read_text()
    known = {one.play.__name__ for one in attack_table.ATTACKS}
    named = set(re.findall(r"`(?:security/test_attacks.py::test_attacks_fail)?\[(\w+)\]`", page))
    assert named <= known and len(named) > 20, named - known
    for file, test in re.findall(r"`((?:security/)?test_\w+\.py)(?:::(test_\w+))?", page):
        assert f"def {test}" in (tests / file).read_text(), (file, test)


def test_every_module_has_attacks() -> None:
    modules = {one.play.__module__ for one in attack_table.ATTACKS}
    assert modules == {module.__name__ for module in attack_modules.MODULES}
