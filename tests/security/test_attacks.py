"""Each attack of the table fails, and honest files go on being read."""

import re
from pathlib import Path

import attack_modules
import attack_table
import numpy as np
import pytest
from attack_table import Attack
from foreign_references import Downloads, without_network

from raysweep.bounded_files import UNPACKED_LIMIT_VARIABLE, open_npz, read_unpacked_limit
from raysweep.data.dataset_loaders import load_user_arrays
from raysweep.errors import DamagedFileError, SpecError
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace


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


@pytest.mark.needs_ray
def test_a_resumed_sweep_downloads_nothing(tmp_path: Path) -> None:
    """Neither the driver nor a node, unless this call says so itself."""
    from raysweep.cli import build_parser
    from raysweep.commands.tune import TuneRequest, _may_download
    from raysweep.sweep.node_probe import ProbeRequest, _probe_data
    from raysweep.sweep.tuner import run_sweep

    base = {"data.name": "cifar10", "data.data_dir": str(tmp_path / "new"), "data.download": True}
    content = {"method": "at", "base": base, "space": {"optim.lr": {"float": [0.01, 0.5]}}}
    ledger = Ledger.create(tmp_path / "runs/s", SearchSpace.from_data(content))
    loader = Downloads()
    with without_network(loader):
        with pytest.raises(SpecError, match="no such files"):
            run_sweep(ledger, [])
        spec = ledger.space.trial_config({}).data.replace(download=False)
        problems: dict[str, str] = {}
        _probe_data(ProbeRequest("", "", spec.model_dump_json(), "0" * 16), problems)
    assert [download for _, download in loader.calls] == [False, False] and problems

    def may_download(*arguments: str) -> bool:
        args = build_parser().parse_args(["tune", *arguments])
        return _may_download(TuneRequest.from_args(args), ledger.space)

    assert not may_download("--resume", "s") and may_download("at")
    assert may_download("--resume", "s", "--set", "data.download=true")


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
