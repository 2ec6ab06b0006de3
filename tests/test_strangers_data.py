"""Data as other people have it: rare classes, channels last, other names, a last batch of one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny

from raysweep.data import DataSpec, count_batches, load_data
from raysweep.spec import SpecError
from raysweep.training.trainer import train_model


def write_arrays(folder: Path, counts: list[int], first_label: int = 0, **names: str) -> None:
    """Files of grey 8 x 8 images with so many examples of each class."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(len(counts)) + first_label, counts)
    x = rng.integers(0, 256, (len(y), 1, 8, 8), dtype=np.uint8)
    for part in ("train", "test"):
        np.savez(folder / f"{part}.npz", **{names.get("x", "x"): x, names.get("y", "y"): y})


def counts_of(split, n_classes: int) -> list[int]:
    return torch.bincount(split.y, minlength=n_classes).tolist()


def arrays(folder: Path, **changes: object) -> DataSpec:
    return DataSpec(name="arrays", data_dir=folder, **changes)


@pytest.mark.parametrize(
    ("counts", "val_size", "validation"),
    [
        # A fifth of 40 is 8; the other nine classes give the rest.
        ([9600, 40], 1000, [992, 8]),
        ([100, 100, 100, 10], 60, [19, 19, 20, 2]),
        # Of one example none, of two one, of five one.
        ([1000, 1, 2, 5], 100, [98, 0, 1, 1]),
        # Nothing is rare: equal shares, as before.
        ([100, 100], 40, [20, 20]),
        ([134] * 10, 300, [30] * 10),
    ],
)
def test_validation_leaves_rare_classes_to_training(
    counts: list[int], val_size: int, validation: list[int], tmp_path: Path
) -> None:
    write_arrays(tmp_path, counts)
    data = load_data(arrays(tmp_path, val_size=val_size))
    found = counts_of(data.val, len(counts))
    assert sorted(found) == sorted(validation) and found[-1] == validation[-1]
    training = counts_of(data.train, len(counts))
    assert [a + b for a, b in zip(found, training, strict=True)] == counts
    assert min(training) > 0 and sum(found) == val_size


def test_a_class_that_training_or_validation_lacks_is_said(tmp_path: Path, caplog) -> None:
    write_arrays(tmp_path, [1000, 1, 50])
    load_data(arrays(tmp_path, val_size=100))
    assert "validation has no example of class 1" in caplog.text


@pytest.mark.parametrize(
    ("counts", "first_label", "line"),
    [
        ([20, 20], 1, "no training example has label 0 of 0..2: subtract 1 from the labels"),
        ([20, 0, 20], 0, "no training example has label 1 of 0..2: number the classes anew"),
        ([5] + [0] * 7 + [5], 0, "label 1, 2, 3, 4, 5 and 2 more of 0..8"),
    ],
)
def test_a_class_without_examples_is_an_error_unless_asked_for(
    counts: list[int], first_label: int, line: str, tmp_path: Path
) -> None:
    write_arrays(tmp_path, counts, first_label)
    with pytest.raises(SpecError) as error:
        load_data(arrays(tmp_path, val_size=2))
    assert line in str(error.value) and "data.allow_missing_classes=true" in str(error.value)
    data = load_data(arrays(tmp_path, val_size=2, allow_missing_classes=True))
    assert data.classes == len(counts) + first_label


def test_images_with_channels_last_and_arrays_of_other_names(tmp_path: Path, caplog) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (30, 8, 9, 3), dtype=np.uint8), np.arange(30) % 3
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", image=x, label=y)
    data = load_data(arrays(tmp_path, val_size=3))
    assert (data.channels, tuple(data.test.x.shape[1:])) == (3, (3, 8, 9))
    assert torch.equal(data.test.x, torch.from_numpy(x).permute(0, 3, 1, 2))
    assert "taken as (N, H, W, C)" in caplog.text
    np.savez(tmp_path / "train.npz", pictures=x, classes=y)
    with pytest.raises(Exception, match=r"no array x \(or image\); found pictures, classes"):
        load_data(arrays(tmp_path, val_size=3))


def test_images_whose_channels_are_in_doubt_are_taken_as_they_are(tmp_path: Path) -> None:
    """(N, 3, 3, 3) may be either."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (30, 3, 3, 3), dtype=np.uint8), np.arange(30) % 3
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", x=x, y=y)
    assert torch.equal(load_data(arrays(tmp_path, val_size=3)).test.x, torch.from_numpy(x))


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [(65, 32, [32, 33]), (64, 32, [32, 32]), (66, 32, [32, 32, 2]), (1, 32, [1]), (33, 32, [33])],
)
def test_a_last_batch_of_one_joins_the_one_before(n: int, batch_size: int, sizes: list) -> None:
    data = load_data(DataSpec(name="digits", val_size=100, train_size=n))
    batches = list(data.iter_train_batches(batch_size, 0, 0))
    assert [len(batch.y) for batch in batches] == sizes
    assert count_batches(n, batch_size) == len(sizes)
    ids = torch.cat([batch.index for batch in batches])
    assert sorted(ids.tolist()) == sorted(data.train.index.tolist()), "each image once"


def test_training_with_a_last_batch_of_one_where_maps_are_one_pixel(tmp_path: Path) -> None:
    """ResNet-18 has maps of 1 x 1 for 8 x 8 images: batch norm refuses one value per channel."""
    changes = {"model.name": "resnet18", "data.train_size": 17, "batch_size": 8, "*.steps": 1}
    changes |= {"validation.size": 8}
    config = tiny("at", epochs=1, **changes)
    assert train_model(config, tmp_path).last_checkpoint.epoch == 1


def test_a_single_class_is_one_line(tmp_path: Path) -> None:
    write_arrays(tmp_path, [40])
    with pytest.raises(SpecError, match="all training labels are 0: training needs two classes"):
        load_data(arrays(tmp_path, val_size=2))
