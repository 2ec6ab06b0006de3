"""Batches, augmentation and splits, worked out by hand from their documentation."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_rng import crop_and_flip, hash_stream_name, shuffle_rows

from raysweep.data import DataSpec, Split, augment_images, epoch_batches, load_data
from raysweep.data.dataset_cache import CachedDataset, get_dataset_cache_dir
from raysweep.data.unlabeled import write_pseudo_labeled_npz
from raysweep.rng import ExampleRng
from raysweep.spec import SpecError

SEED = 5


def split(count: int, first: int = 0) -> Split:
    x = torch.from_numpy(
        np.random.default_rng(first).integers(0, 256, (count, 3, 6, 5), dtype=np.uint8)
    )
    return Split(x, torch.arange(count) % 7, first + torch.arange(count), 255)


def rows_by_hand(
    labelled: Split, batch_size: int, epoch: int, others: Split | None, share: int
) -> list[list[int]]:
    """Numbers of the examples of each batch; `share` of its rows are of `others`."""
    order = shuffle_rows(len(labelled), SEED, "order", epoch)
    count = -(-len(labelled) // batch_size)
    extra: list[int] = []
    if others is not None:
        generator = torch.Generator().manual_seed(hash_stream_name(SEED, "unlabeled", epoch) >> 1)
        while len(extra) < count * share:
            extra += torch.randperm(len(others), generator=generator).tolist()
    batches = []
    for number in range(count):
        own = order[number * (batch_size - share) : (number + 1) * (batch_size - share)]
        more = extra[number * share : (number + 1) * share]
        batches.append([*own, *(1000 + place for place in more)])
    return batches


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("fraction", "share"), [(None, 0), (0.5, 5), (0.26, 3), (0.01, 1), (0.99, 9)]
)
def test_batches_by_hand(fraction: float | None, share: int, workers: int, augment: bool) -> None:
    """Each of three workers has every third row of the global batch, starting at its rank."""
    labelled, others = split(23), split(8, first=1000) if fraction else None
    for epoch in (0, 2):
        expected = rows_by_hand(labelled, 10, epoch, others, share)
        for rank in range(workers):
            mixed = (others, 0.5 if fraction is None else fraction)
            found = list(epoch_batches(labelled, 10, SEED, epoch, augment, rank, workers, *mixed))
            assert [batch.index.tolist() for batch in found] == [
                rows[rank::workers] for rows in expected
            ]
            for batch in found:
                for x, y, index in zip(
                    batch.x, batch.y.tolist(), batch.index.tolist(), strict=True
                ):
                    source, row = (
                        (others, index - 1000)
                        if others is not None and index >= 1000
                        else (labelled, index)
                    )
                    image = source.x[row].float() / 255
                    if augment:
                        image = crop_and_flip(image, SEED, epoch, index)
                    assert torch.equal(x, image) and y == source.y[row]


def test_crops_move_up_to_four_pixels_each_way_and_half_of_the_images_are_mirrored() -> None:
    """The position of an image's only bright pixel shows how the image was moved."""
    x = torch.zeros(4000, 1, 9, 9)
    x[:, 0, 4, 4] = 1
    places = augment_images(x, ExampleRng.for_examples(torch.arange(4000), 0))[:, 0].nonzero()
    assert len(places) == 4000, "four pixels never lose the middle one"
    for axis in (1, 2):
        counts = torch.bincount(places[:, axis], minlength=9)
        assert len(counts) == 9 and counts.min() > 350 and counts.max() < 540
    assert torch.corrcoef(places[:, 1:].T.float())[0, 1].abs() < 0.05, "rows and columns move apart"
    x = torch.zeros(4000, 1, 20, 20)
    x[:, 0, 10, 5] = 1
    turned = (
        augment_images(x, ExampleRng.for_examples(torch.arange(4000), 0))[:, 0].nonzero()[:, 2]
        >= 10
    )
    assert 1850 < int(turned.sum()) < 2150


def write_arrays(
    folder: Path, y: np.ndarray, channels: int = 3, y_test: np.ndarray | None = None
) -> DataSpec:
    generator = np.random.default_rng(0)
    for name, labels in (("train", y), ("test", y if y_test is None else y_test)):
        x = generator.integers(0, 256, (len(labels), channels, 4, 4), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", x=x, y=labels)
    return DataSpec(name="arrays", data_dir=folder, val_size=9)


def test_the_first_validation_examples_are_balanced_however_many_are_taken(tmp_path: Path) -> None:
    y = np.array([0] * 50 + [1] * 30 + [2] * 4)
    spec = write_arrays(tmp_path, y).model_copy(update={"val_size": 60})
    data = load_data(spec)
    # Validation takes 60 of 84, so at most this share of each class, rounded up, and never all.
    limits = [36, 22, 3]
    for count in range(1, 61):
        seen = torch.bincount(data.val.y[:count], minlength=3).tolist()
        free = [n for n, limit in zip(seen, limits, strict=True) if n < limit]
        assert all(n <= limit for n, limit in zip(seen, limits, strict=True)), count
        assert not free or (max(free) - min(free) <= 1 and max(seen) - max(free) <= 1), count
    assert torch.equal(
        data.val.x, torch.from_numpy(np.load(tmp_path / "train.npz")["x"][data.val.index])
    )
    assert torch.equal(data.val.y, torch.from_numpy(y[data.val.index]))
    assert data.train.index.tolist() == sorted(set(range(84)) - set(data.val.index.tolist()))


def test_a_smaller_training_set_is_balanced_and_does_not_change_validation(tmp_path: Path) -> None:
    spec = write_arrays(tmp_path, np.arange(90) % 3)
    whole, small = load_data(spec), load_data(spec.model_copy(update={"train_size": 30}))
    assert torch.equal(whole.val.index, small.val.index)
    assert torch.bincount(small.train.y).tolist() == [10, 10, 10]
    assert small.train.index.tolist() == sorted(small.train.index.tolist())
    assert set(small.train.index.tolist()) < set(whole.train.index.tolist())
    assert len(load_data(spec.model_copy(update={"train_size": 81})).train) == 81
    for sizes in ({"train_size": 82}, {"val_size": 90}, {"val_size": 91}):
        with pytest.raises(SpecError, match="data 'arrays' has only 90 training examples"):
            load_data(spec.model_copy(update=sizes))


def test_validation_examples_of_digits_are_those_of_every_run_so_far() -> None:
    """Old checkpoints, sweeps and reports were evaluated on them."""
    data = load_data(DataSpec(name="digits", val_size=300))
    assert data.val.index[:8].tolist() == [87, 752, 592, 656, 912, 972, 245, 578]
    assert data.fingerprint == "a41d5e20dd66877e"


def test_the_fingerprint_is_of_every_pixel_label_and_shape(tmp_path: Path) -> None:
    spec = write_arrays(tmp_path, np.arange(30) % 3)
    parts = [
        np.load(tmp_path / f"{name}.npz")[key] for name in ("train", "test") for key in ("x", "y")
    ]
    text = b"".join(str(part.shape).encode() + part.tobytes() for part in parts)
    assert load_data(spec).fingerprint == hashlib.sha256(text).hexdigest()[:16]
    found = {load_data(spec).fingerprint}
    for name in ("train", "test"):
        for key in ("x", "y"):
            arrays = dict(np.load(tmp_path / f"{name}.npz"))
            before = arrays[key].flat[-1]
            arrays[key].flat[-1] = 1 if before == 0 else 0
            np.savez(tmp_path / f"{name}.npz", **arrays)
            found.add(load_data(spec).fingerprint)
    assert len(found) == 5


@pytest.mark.parametrize(
    ("channels", "asked", "augment"),
    [(3, None, True), (1, None, False), (3, False, False), (1, True, True)],
)
def test_by_default_only_colour_images_are_augmented(
    channels: int, asked: bool | None, augment: bool, tmp_path: Path
) -> None:
    spec = write_arrays(tmp_path, np.arange(30) % 3, channels).model_copy(update={"augment": asked})
    data = load_data(spec)
    assert data.augment is augment and data.channels == channels and data.classes == 3
    plain = [replace(data, augment=False), data]
    first, second = (next(part.iter_train_batches(8, 0, 0)) for part in plain)
    assert torch.equal(first.index, second.index) and torch.equal(first.x, second.x) is not augment


def test_a_test_label_that_training_lacks_is_refused(tmp_path: Path) -> None:
    spec = write_arrays(tmp_path, np.arange(30) % 3, y_test=np.arange(8) % 4)
    with pytest.raises(SpecError, match=r"data 'arrays': test has label 3, train has 0\.\.2"):
        load_data(spec)


def test_a_copy_that_processes_share_has_all_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also pseudo-labelled images, numbered after the training set, and their share."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = write_arrays(tmp_path, np.arange(30) % 3)
    write_pseudo_labeled_npz(
        tmp_path / "more.npz", np.full((5, 3, 4, 4), 9, dtype=np.uint8), np.array([2, 1, 0, 2, 1])
    )
    spec = spec.model_copy(
        update={"unlabeled": Path("more.npz"), "unlabeled_fraction": 0.3, "augment": False}
    )
    plain = load_data(spec)
    assert plain.unlabeled is not None and plain.unlabeled.index.tolist() == [30, 31, 32, 33, 34]
    for asked in (
        spec,
        spec.model_copy(update={"download": True}),
    ):  # the first writes it, the second reads it
        shared = CachedDataset(spec, plain.fingerprint).load_shared(asked)
        for name in ("train", "val", "test", "unlabeled"):
            one, two = getattr(plain, name), getattr(shared, name)
            assert all(
                torch.equal(getattr(one, field), getattr(two, field))
                for field in ("x", "y", "index")
            )
            assert one.pixel_max == two.pixel_max == 255
        for fact in ("channels", "classes", "augment", "fingerprint", "unlabeled_fraction"):
            assert getattr(plain, fact) == getattr(shared, fact), fact
        assert len(list(get_dataset_cache_dir().iterdir())) == 1
    found = [
        [b.index.tolist() for b in data.iter_train_batches(10, 1, 2, 1, 2)]
        for data in (plain, shared)
    ]
    assert found[0] == found[1] and all(sum(i >= 30 for i in rows) in (1, 2) for rows in found[0])
