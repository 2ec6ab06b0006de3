"""One copy of a data set for all processes of a machine."""

import gc
import os
import re
import time
from pathlib import Path

import forked_processes
import numpy as np
import psutil
import pytest
import torch

from raysweep.data import DatasetSplits, DataSpec, load_data
from raysweep.data.dataset_cache import CachedDataset, get_dataset_cache_dir
from raysweep.errors import InfrastructureError


def touch_all(folder: Path, how: str) -> None:
    """Map the same data in a process of its own, touch all of it, and print how much memory only
    this process uses.

    how: the fingerprint of the data, or "copy" to read the files instead.
    """
    spec = DataSpec(name="arrays", data_dir=folder)
    gc.collect()
    before = psutil.Process().memory_full_info().uss
    data = CachedDataset(spec, how).load_shared(spec) if how != "copy" else load_data(spec)
    sum(int(part.x.sum()) for part in (data.train, data.val, data.test))
    print(psutil.Process().memory_full_info().uss - before)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_arrays(folder: Path, seed: int, count: int = 60) -> DataSpec:
    generator = np.random.default_rng(seed)
    for split in ("train", "test"):
        x = generator.integers(0, 256, (count, 3, 16, 16), dtype=np.uint8)
        np.savez(folder / f"{split}.npz", x=x, y=np.arange(count) % 3)
    return DataSpec(name="arrays", data_dir=folder, val_size=15)


def same_split(one: DatasetSplits, other: DatasetSplits) -> bool:
    parts = [(getattr(one, name), getattr(other, name)) for name in ("train", "val", "test")]
    equal = all(
        torch.equal(getattr(a, f), getattr(b, f)) for a, b in parts for f in ("x", "y", "index")
    )
    facts = ("channels", "classes", "augment", "fingerprint", "unlabeled_fraction")
    return equal and all(getattr(one, fact) == getattr(other, fact) for fact in facts)


def test_it_is_the_data_set_and_files_are_read_once(tmp_path: Path) -> None:
    spec = write_arrays(tmp_path, 0)
    plain = load_data(spec)
    source = CachedDataset(spec, plain.fingerprint)
    assert same_split(source.load_shared(spec), plain)
    (copy,) = get_dataset_cache_dir().iterdir()
    assert copy.parent.stat().st_mode & 0o077 == 0, "this user's alone"
    (tmp_path / "train.npz").unlink()
    other_process = forked_processes.start_function(touch_all, tmp_path, plain.fingerprint)
    # Its val_size is another, so the copy is not its data.
    assert other_process.wait() == 1
    refused = other_process.err.splitlines()[-1]
    assert re.match(
        r"raysweep.errors.SpecError: [\w.-]+: data.data_dir .* has no train.npz", refused
    )


def test_the_files_that_were_used_last_are_kept(tmp_path: Path) -> None:
    spec = write_arrays(tmp_path, 0)
    folder = get_dataset_cache_dir()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for age in range(1, 9):
        (folder / f"{age}.safetensors").touch()
        used = time.time() - 3600 * age
        os.utime(folder / f"{age}.safetensors", (used, used))
    CachedDataset(spec, load_data(spec).fingerprint).load_shared(spec)
    names = {path.name for path in folder.iterdir()}
    assert len(names) == 8 and {f"{age}.safetensors" for age in range(1, 8)} < names


def test_other_images_in_the_same_place_are_refused(tmp_path: Path) -> None:
    spec = write_arrays(tmp_path, 0)
    fingerprint = load_data(spec).fingerprint
    write_arrays(tmp_path, 1)
    with pytest.raises(
        InfrastructureError,
        match=rf"holds other 'arrays' data .* than the driver's \({fingerprint}\)",
    ):
        CachedDataset(spec, fingerprint).load_shared(spec)


def test_a_damaged_copy_is_made_again(tmp_path: Path) -> None:
    spec = write_arrays(tmp_path, 2)
    plain = load_data(spec)
    folder = get_dataset_cache_dir()
    CachedDataset(spec, plain.fingerprint).load_shared(spec)
    (copy,) = folder.iterdir()
    size = copy.stat().st_size
    copy.write_bytes(copy.read_bytes()[: size // 2])
    twin = spec.model_copy(update={"download": True})
    assert same_split(CachedDataset(twin, plain.fingerprint).load_shared(twin), plain)
    assert copy.stat().st_size == size


def test_a_searched_data_set_is_loaded_as_it_is(tmp_path: Path) -> None:
    spec = write_arrays(tmp_path, 3)
    digits = DataSpec(name="digits", val_size=50)
    assert same_split(CachedDataset(spec, "0" * 16).load_shared(digits), load_data(digits))


def test_processes_share_its_memory(tmp_path: Path) -> None:
    spec = write_arrays(tmp_path, 4, count=12_000)
    spec = DataSpec(name="arrays", data_dir=tmp_path)
    fingerprint = load_data(spec).fingerprint
    mine = CachedDataset(spec, fingerprint).load_shared(spec)
    assert sum(int(part.x.sum()) for part in (mine.train, mine.val, mine.test)) > 0

    def private(how: str) -> float:
        process = forked_processes.start_function(touch_all, tmp_path, how)
        assert process.wait() == 0, process.err
        return int(process.out) / 2**20

    size = 2 * 12_000 * 3 * 16 * 16 / 2**20
    assert private("copy") > 0.9 * size
    assert private(fingerprint) < 0.2 * size


def test_other_users_cannot_read_the_copies(tmp_path: Path) -> None:
    """Even if the folders of the cache do not exist yet."""
    (tmp_path / "data").mkdir()
    spec = write_arrays(tmp_path / "data", 0)
    assert not get_dataset_cache_dir().exists()
    for number, other in enumerate((spec, spec.model_copy(update={"val_size": 18})), start=1):
        CachedDataset(other, load_data(other).fingerprint).load_shared(other)
        assert len(list(get_dataset_cache_dir().iterdir())) == number, (
            "whether the folder existed before or not"
        )
    assert get_dataset_cache_dir().stat().st_mode & 0o777 == 0o700
