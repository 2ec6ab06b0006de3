import gzip
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raysweep.data import DATASET_LOADERS, DataSpec, Split, augment_images, epoch_batches, load_data
from raysweep.errors import DamagedFileError
from raysweep.rng import ExampleRng
from raysweep.spec import SpecError


def test_splits_are_disjoint_and_validation_is_balanced() -> None:
    data = load_data(DataSpec(name="digits", val_size=300))
    train, val = set(data.train.index.tolist()), set(data.val.index.tolist())
    assert not train & val
    assert len(train) == 1797 - 450 - 300 and len(val) == 300
    assert torch.bincount(data.val.y).tolist() == [30] * 10
    assert torch.bincount(data.val.y[:100]).tolist() == [10] * 10
    images = data.test.get_float_images(slice(None))
    assert images.dtype == torch.float32 and images.min() == 0 and images.max() == 1


def test_the_split_does_not_move_with_the_training_seed_but_with_its_own() -> None:
    one, two = (
        load_data(DataSpec(name="digits", val_size=50, split_seed=seed)).val.index
        for seed in (0, 1)
    )
    assert torch.equal(one, load_data(DataSpec(name="digits", val_size=50)).val.index)
    assert not torch.equal(one, two)


def test_too_large_a_validation_set_is_refused() -> None:
    with pytest.raises(
        SpecError, match=r"data.val_size 1347: data 'digits' has only 1347 training examples"
    ):
        load_data(DataSpec(name="digits", val_size=1347))


def colour(n: int = 40) -> Split:
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, 8, 8), dtype=np.uint8))
    return Split(x, torch.arange(n) % 10, torch.arange(n), 255)


def test_an_epoch_has_every_example_once_and_another_order_each_time() -> None:
    split = colour()
    first = [batch.index for batch in epoch_batches(split, 16, 0, 0, augment=False)]
    assert [len(rows) for rows in first] == [16, 16, 8]
    assert sorted(torch.cat(first).tolist()) == list(range(40))
    second = torch.cat([batch.index for batch in epoch_batches(split, 16, 0, 1, augment=False)])
    assert not torch.equal(torch.cat(first), second)


def test_workers_share_the_global_batch_and_see_the_same_pixels() -> None:
    split = colour()
    whole = list(epoch_batches(split, 16, 0, 3, augment=True))
    parts = [
        list(epoch_batches(split, 16, 0, 3, augment=True, rank=rank, n_workers=2))
        for rank in range(2)
    ]
    for position, batch in enumerate(whole):
        shares = [part[position] for part in parts]
        assert set(batch.index.tolist()) == set(torch.cat([s.index for s in shares]).tolist())
        for share in shares:
            rows = [batch.index.tolist().index(i) for i in share.index.tolist()]
            assert torch.equal(batch.x[rows], share.x)


def test_augmentation_is_a_crop_of_the_padded_image_or_of_its_mirror() -> None:
    x = colour().get_float_images(slice(None))
    out = augment_images(x, ExampleRng.for_examples(torch.arange(len(x)), 0))
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    flips = 0
    for image, result in zip(padded, out, strict=True):
        windows = image.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 8, 8)
        straight = (windows == result).flatten(1).all(1).any()
        mirrored = (windows == result.flip(-1)).flatten(1).all(1).any()
        assert straight or mirrored
        flips += bool(mirrored)
    assert 8 < flips < 32


def test_arrays_from_npz_and_parquet_are_the_same(tmp_path) -> None:
    x = np.random.default_rng(1).integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)
    y = np.arange(60) % 3
    for folder in ("npz", "parquet"):
        (tmp_path / folder).mkdir()
    for split in ("train", "test"):
        np.savez(tmp_path / "npz" / f"{split}.npz", x=x, y=y)
        table = pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(x), "y": y})
        pq.write_table(table, tmp_path / "parquet" / f"{split}.parquet")
    one, two = (
        load_data(DataSpec(name="arrays", data_dir=tmp_path / d, val_size=15))
        for d in ("npz", "parquet")
    )
    assert one.fingerprint == two.fingerprint
    assert torch.equal(one.train.x, two.train.x) and one.classes == 3 and one.augment


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.zeros((4, 3, 8, 8)), "y": np.zeros(4, int)}, "x must be uint8"),
        ({"x": np.zeros((4, 8, 8), np.uint8), "y": np.zeros(4, int)}, "shape"),
        ({"x": np.zeros((4, 3, 8, 8), np.uint8), "y": np.zeros(3, int)}, "4 integers"),
        (
            {"x": np.zeros((4, 3, 8, 8), np.uint8), "y": np.full(4, -1)},
            "labels must be 0 or larger",
        ),
        (
            {"x": np.zeros((4, 3, 8, 8), np.uint8), "y": np.array([0, -1, 2, 1])},
            "labels must be 0 or larger",
        ),
        ({"x": np.array([object()] * 4), "y": np.zeros(4, int)}, "Python objects"),
    ],
)
def test_arrays_that_are_not_images_are_refused_in_one_line(tmp_path, arrays, words) -> None:
    np.savez(tmp_path / "train.npz", **arrays)
    kind = DamagedFileError if words == "Python objects" else SpecError
    with pytest.raises(kind, match=words) as error:
        load_data(DataSpec(name="arrays", data_dir=tmp_path, val_size=1))
    assert len(error.value.problems) == 1


def test_truncated_and_missing_files_are_refused_in_one_line(tmp_path) -> None:
    with pytest.raises(SpecError, match=r"no train.npz and no train.parquet"):
        load_data(DataSpec(name="arrays", data_dir=tmp_path))
    (tmp_path / "train.npz").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(DamagedFileError, match="cannot be read"):
        load_data(DataSpec(name="arrays", data_dir=tmp_path))
    for name in ("mnist", "cifar10", "svhn"):
        with pytest.raises(SpecError, match=r"data.data_dir is missing"):
            load_data(DataSpec(name=name))
        with pytest.raises(SpecError, match=f"data.name '{name}' is not in"):
            load_data(DataSpec(name=name, data_dir=tmp_path))


def test_mnist_through_torchvisions_own_loader(tmp_path) -> None:
    """Files in MNIST's own format: the loader is real, the images are made here."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    labels = (np.arange(30) % 10).astype(np.uint8)
    for prefix in ("train", "t10k"):
        for kind, magic, array in (("images-idx3", 2051, images), ("labels-idx1", 2049, labels)):
            header = struct.pack(f">{1 + array.ndim}i", magic, *array.shape)
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())
            with gzip.open(raw / f"{prefix}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + array.tobytes())
    data = load_data(DataSpec(name="mnist", data_dir=tmp_path, val_size=10))
    assert data.train.x.shape == (20, 1, 28, 28) and not data.augment
    assert torch.equal(data.test.x[:, 0], torch.from_numpy(images))


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    ours, theirs = DATASET_LOADERS["digits"](None, False), load_digits()
    assert np.array_equal(np.concatenate([ours.x_train, ours.x_test])[:, 0], theirs.images)
    assert np.array_equal(np.concatenate([ours.y_train, ours.y_test]), theirs.target)


def test_paths_are_absolute_for_those_who_work_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    spec = DataSpec(data_dir="here", unlabeled="u.npz")
    assert (spec.data_dir, spec.unlabeled) == (tmp_path / "here", Path("u.npz")), (
        "a part of data_dir"
    )
    assert DataSpec(data_dir="~/here").data_dir == tmp_path / "home" / "here"
    assert DataSpec(unlabeled="u.npz").unlabeled == tmp_path / "u.npz"
    assert DataSpec(data_dir="here", unlabeled="~/u.npz").unlabeled == tmp_path / "home" / "u.npz"
    assert DataSpec.from_data(spec.to_json_dict()) == spec
