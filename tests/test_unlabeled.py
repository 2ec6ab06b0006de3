"""Semi-supervised data: reading without executing, mixing into batches, pseudo-labels, and training
on them.
"""

import codecs
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raysweep.data import DataSpec, Split, epoch_batches, load_data
from raysweep.data.unlabeled import (
    predict_pseudo_labels,
    read_unlabeled_file,
    write_pseudo_labeled_npz,
)
from raysweep.errors import DamagedFileError
from raysweep.models import ModelSpec
from raysweep.spec import SpecError
from raysweep.training.config import build_training_config
from raysweep.training.trainer import train_model


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    return generator.integers(0, 17, (60, 1, 8, 8), dtype=np.uint8), generator.integers(0, 10, 60)


def split(first, count, white=16):
    x = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 1, 8, 8).contiguous()
    return Split(x, torch.zeros(count, dtype=torch.int64), first + torch.arange(count), white)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("contiguous", [True, False])
def test_carmons_pickle(tmp_path, images, protocol, contiguous):
    x, y = images
    path = tmp_path / "ti_500K_pseudo_labeled.pickle"
    nhwc = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    content = {"data": nhwc if contiguous else x.transpose(0, 2, 3, 1), "extrapolated_targets": y}
    path.write_bytes(pickle.dumps(content | {"prediction_model_epoch": 200}, protocol=protocol))
    read_x, read_y = read_unlabeled_file(path)
    assert np.array_equal(read_x, x)
    assert np.array_equal(read_y, y)
    assert read_y.dtype == np.int64


class Attack:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def hostile_pickles(marker):
    """Pickles that run something when an ordinary reader loads them."""
    command = f"touch {marker}"
    return {
        "os.system": Attack(os.system, command),
        "eval": Attack(eval, f"open({str(marker)!r}, 'w')"),
        "getattr": Attack(getattr, "", "upper"),
        "numpy.load": Attack(np.load, str(marker)),
        "object array": np.array([Attack(os.system, command)], dtype=object),
        "in the dict": {
            "data": np.zeros((1, 8, 8, 1), np.uint8),
            "more": Attack(os.system, command),
        },
    }


@pytest.mark.parametrize("name", hostile_pickles("x"))
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_hostile_pickles_are_refused_without_running(tmp_path, name, protocol):
    marker, path = tmp_path / "executed", tmp_path / "data.pickle"
    path.write_bytes(pickle.dumps(hostile_pickles(marker)[name], protocol=protocol))
    with pytest.raises(DamagedFileError, match=r"data\.pickle"):
        read_unlabeled_file(path)
    assert not marker.exists()


def test_hostile_opcodes_are_refused(tmp_path):
    """GLOBAL and STACK_GLOBAL by hand, an extension code, a persistent id, and a file cut short."""
    path = tmp_path / "data.pickle"
    good = pickle.dumps({"data": np.zeros((4, 8, 8, 1), np.uint8)})
    for raw in (
        b"cposix\nsystem\n(S'true'\ntR.",
        b"\x8c\x02os\x8c\x06system\x93.",
        b"\x82\x01.",
        b"Pid\n.",
        good[:-40],
        b"",
    ):
        path.write_bytes(raw)
        with pytest.raises(DamagedFileError, match=r"data\.pickle: cannot be read"):
            read_unlabeled_file(path)


@pytest.mark.parametrize(
    "content", [[1, 2], {"x": 1}, {"data": [1]}, {"data": np.zeros(3, np.uint8)}]
)
def test_other_pickles_are_refused(tmp_path, content):
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises((SpecError, DamagedFileError), match=r"data\.pkl"):
        read_unlabeled_file(path)


def test_npz_and_parquet(tmp_path, images):
    x, y = images
    write_pseudo_labeled_npz(tmp_path / "a.npz", x, y)
    flat = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(x))
    pq.write_table(pa.table({"x": flat, "y": y}), tmp_path / "a.parquet")
    for name in ("a.npz", "a.parquet"):
        read_x, read_y = read_unlabeled_file(tmp_path / name)
        assert np.array_equal(read_x, x)
        assert np.array_equal(read_y, y)
    np.savez(tmp_path / "bare.npz", x=x)
    assert read_unlabeled_file(tmp_path / "bare.npz")[1] is None
    np.savez(tmp_path / "objects.npz", x=np.array([Attack(os.system, "true")], dtype=object), y=y)
    with pytest.raises(DamagedFileError, match="holds Python objects"):
        read_unlabeled_file(tmp_path / "objects.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((5, 3, 8, 8), np.uint8)}, "images are"),
        ({"x": np.full((60, 1, 8, 8), 17, np.uint8)}, "pixels up to 17"),
        ({"y": np.full(60, 10)}, "label 10"),
        ({"y": None}, "no labels"),
    ],
)
def test_what_does_not_fit_the_data_set_is_refused(tmp_path, images, change, message):
    arrays = dict(zip(("x", "y"), images, strict=True)) | change
    if len(arrays["x"]) != 60:
        arrays["y"] = arrays["y"][: len(arrays["x"])]
    np.savez(tmp_path / "u.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(SpecError, match=message):
        load_data(DataSpec(val_size=100, unlabeled=tmp_path / "u.npz"))


def test_a_relative_path_is_looked_for_beside_the_data_set(tmp_path, images):
    """Workers do not run in the user's folder; data_dir is absolute by then."""
    write_pseudo_labeled_npz(tmp_path / "more.npz", *images)
    spec = DataSpec(val_size=100, data_dir=tmp_path, unlabeled="more.npz")
    assert len(load_data(spec).unlabeled) == 60


@pytest.mark.parametrize(("fraction", "batch_size"), [(0.5, 20), (0.25, 16), (0.9, 10), (0.01, 10)])
def test_batches_are_mixed(fraction, batch_size):
    """As many batches as without unlabelled data, each with its share; no example twice before all
    had their turn.
    """
    labelled, others = split(0, 100), split(1000, 30)
    batches = list(
        epoch_batches(
            labelled, batch_size, 0, 0, False, unlabeled=others, unlabeled_fraction=fraction
        )
    )
    assert len(batches) == -(-100 // batch_size)
    wanted = min(max(round(fraction * batch_size), 1), batch_size - 1)
    counts = [int((b.index >= 1000).sum()) for b in batches]
    assert counts == [wanted] * len(batches)
    seen = torch.cat([b.index for b in batches])
    own, drawn = seen[seen < 1000], seen[seen >= 1000]
    assert len(own.unique()) == len(own)
    times = torch.bincount(drawn - 1000, minlength=30)
    assert int(times.max() - times.min()) <= 1
    for batch in batches:
        assert torch.equal((batch.x[:, 0, 0, 0] * 16).round().long(), batch.index % 1000)


def test_mixing_depends_on_seed_and_epoch_alone():
    labelled, others = split(0, 64), split(1000, 40)

    def order(seed, epoch, rank=0, workers=1):
        batches = epoch_batches(labelled, 16, seed, epoch, False, rank, workers, others, 0.5)
        return [b.index.tolist() for b in batches]

    whole = order(0, 0)
    assert whole == order(0, 0)
    assert whole != order(0, 1)
    assert whole != order(1, 0)
    parts = [order(0, 0, rank, 4) for rank in range(4)]
    for number, rows in enumerate(whole):
        assert sorted(rows) == sorted(i for part in parts for i in part[number])


def test_without_unlabelled_data_nothing_changes():
    batches = list(epoch_batches(split(0, 50), 16, 0, 0, False))
    assert [len(b.y) for b in batches] == [16, 16, 16, 2]
    assert sorted(torch.cat([b.index for b in batches]).tolist()) == list(range(50))


def test_pseudo_labels():
    model = ModelSpec().build_model(1, 10, seed=0).train()
    x = torch.randint(0, 17, (33, 1, 8, 8), dtype=torch.uint8)
    labels = predict_pseudo_labels(model, x, pixel_max=16, batch_size=8)
    assert model.training
    with torch.no_grad():
        assert torch.equal(labels, model.eval()(x.float() / 16).argmax(1))


@pytest.fixture(scope="module")
def pseudo_labeled(tmp_path_factory):
    """A few labelled digits, and a file of the others labelled by a model trained on the few."""
    folder = tmp_path_factory.mktemp("pseudo_labeled")
    few = load_data(DataSpec(val_size=100, train_size=400))
    with np.load(_rest(folder, few)) as rest:
        x = rest["x"]
    teacher = train_model(
        build_training_config("standard", DIGITS | {"epochs": 3}), folder / "teacher", data=few
    )
    model = teacher.last_checkpoint.load_weights(ModelSpec().build_model(1, 10, 0))
    labels = predict_pseudo_labels(model, torch.from_numpy(x), pixel_max=16)
    write_pseudo_labeled_npz(folder / "rest.npz", x, labels.numpy())
    return few, folder / "rest.npz"


@pytest.mark.parametrize("method", ["rst", "gair-rst"])
def test_robust_self_training_on_digits(pseudo_labeled, tmp_path, method):
    """Part of the training set loses its labels, gets a model's, and helps: RST trains, and the
    fingerprint knows.
    """
    few, file = pseudo_labeled
    settings = DIGITS | {"epochs": 2, "data.unlabeled": str(file), "method.attacks.*.steps": 2}
    settings |= {"method.terms.kl.weight.burn_in": 1} if method == "gair-rst" else {}
    config = build_training_config(method, settings)
    data = load_data(config.data)
    assert data.unlabeled is not None
    assert data.fingerprint != few.fingerprint
    fitted = train_model(config, tmp_path / method)
    assert fitted.last_checkpoint.last_metrics["clean"] > 0.6
    again = train_model(config, tmp_path / "again")
    assert (
        again.last_checkpoint.last_metrics["train/loss"]
        == fitted.last_checkpoint.last_metrics["train/loss"]
    )


DIGITS = {
    "data.val_size": 100,
    "data.train_size": 400,
    "validation.attacks.*.steps": 2,
    "validation.finish.*.steps": 2,
    "validation.finish.*.runs": 1,
}


def _rest(folder, few):
    """Training images that neither `few`'s training nor its validation part holds."""
    whole = load_data(DataSpec(val_size=1))
    used = set(few.train.index.tolist()) | set(few.val.index.tolist())
    rows = torch.tensor([i not in used for i in whole.train.index.tolist()])
    write_pseudo_labeled_npz(
        folder / "bare.npz", whole.train.x[rows].numpy(), whole.train.y[rows].numpy()
    )
    return folder / "bare.npz"


class Python2(pickle._Pickler):
    """Pickles bytes as Python 2 pickled its strings, including the numbers of an array."""

    dispatch = {**pickle._Pickler.dispatch}  # noqa: RUF012

    def save_bytes(self, content: bytes) -> None:
        self.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)
        self.memoize(content)

    dispatch[bytes] = save_bytes


def test_a_pickle_of_python_2(tmp_path, images):
    x, y = images
    x = x + np.uint8(200)
    path = tmp_path / "old.pickle"
    content = {"data": np.ascontiguousarray(x.transpose(0, 2, 3, 1)), "extrapolated_targets": y}
    with path.open("wb") as file:
        Python2(file, protocol=2).dump(content)
    read_x, read_y = read_unlabeled_file(path)
    assert np.array_equal(read_x, x) and np.array_equal(read_y, y)


class EncodedText:
    """Is pickled as a call of the codec `utf-8`; pickles of bytes call `latin1`."""

    def __reduce__(self) -> tuple[object, ...]:
        return codecs.encode, ("x", "utf-8")


def test_a_pickle_with_another_codec_is_refused(tmp_path) -> None:
    path = tmp_path / "text.pickle"
    content = {"data": EncodedText(), "extrapolated_targets": [0]}
    path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DamagedFileError, match="bytes encoded as 'utf-8'"):
        read_unlabeled_file(path)
