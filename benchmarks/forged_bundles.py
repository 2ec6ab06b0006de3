"""Forge bundles in many ways, and show what `raysweep eval --verify` says of each.

    python benchmarks/forged_bundles.py                 # the table, a minute
    python benchmarks/forged_bundles.py --attack 20     # also a fresh attack where it can tell

An honest bundle of 200 test images of digits is changed in one way each time. Whoever forges it
also writes the manifest anew, so that only the content can give it away. A forgery is caught if a
claim is called false (exit code 1) or a file is refused (4). It is bounded if what is printed is
true nevertheless: an upper bound that is weaker than the truth.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from measure import describe_machine, format_table
from safetensors.torch import load_file, save_file

from raysweep.cli import main as raysweep
from raysweep.data import Split, load_data
from raysweep.robustness_bundle.manifest import hash_file
from raysweep.training.checkpoint import read_checkpoint
from raysweep.training.model_loading import load_trained_model

Arrays, Json = dict[str, Any], dict[str, Any]


@contextmanager
def edit_json(path: Path) -> Iterator[Json]:
    """Change the content of a JSON file."""
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


@contextmanager
def edit_claims(folder: Path) -> Iterator[tuple[Arrays, Json]]:
    """Change the arrays and the card of a bundle."""
    with np.load(folder / "adversarial.npz") as archive:
        arrays = dict(archive)
    with edit_json(folder / "card.json") as card:
        yield arrays, card
    np.savez(folder / "adversarial.npz", **arrays)


@contextmanager
def edit_weights(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Change the weights of a bundle and their hash in the checkpoint."""
    path = folder / "checkpoint" / "weights.safetensors"
    weights = load_file(path)
    yield weights
    save_file(weights, path)
    with edit_json(folder / "checkpoint" / "meta.json") as meta:
        meta["sha256"][path.name] = hash_file(path)


def write_manifest_anew(folder: Path) -> None:
    """Make the manifest of a forged bundle agree with its files."""
    with edit_json(folder / "manifest.json") as manifest:
        manifest["files"] = {
            path.relative_to(folder).as_posix(): hash_file(path)
            for path in folder.rglob("*")
            if path.is_file() and not path.is_symlink() and not path.name.startswith("manifest")
        }


def set_accuracy(card: Json, robust: Any) -> None:
    """Make the card's numbers agree with the rows that are said to be robust, (N,)."""
    share = float(np.mean(robust))
    card.update(examples=len(robust), robust_accuracy=share, reported=f"{100 * share:.2f}")
    if card["autoattack_acc"] is not None:
        card["autoattack_acc"] = card["reported"]


def load_test(folder: Path) -> tuple[Split, Any]:
    """Load the test images, and the model of a bundle."""
    checkpoint = read_checkpoint(folder / "checkpoint")
    data = load_data(checkpoint.config.data)
    return data.test, load_trained_model(checkpoint, data)


def find_last_layer(weights: dict[str, torch.Tensor]) -> str:
    """Return the name of the layer that computes the ten logits."""
    (name,) = [name for name, tensor in weights.items() if tensor.dim() == 2 and len(tensor) == 10]
    return name.removesuffix(".weight")


# The kinds that are known from reports.


def _hide_adversarial(folder: Path) -> None:
    """The stored examples are clean images, and all that are right there are robust."""
    test, _ = load_test(folder)
    with edit_claims(folder) as (arrays, card):
        arrays["x_adv"] = test.get_float_images(torch.from_numpy(arrays["index"])).numpy()
        arrays["robust"] = arrays["predicted"] == arrays["labels"]
        set_accuracy(card, arrays["robust"])


def _keep_robust_rows(folder: Path) -> None:
    with edit_claims(folder) as (arrays, card):
        stood = arrays["robust"]
        arrays.update({name: array[stood] for name, array in arrays.items()})
        set_accuracy(card, arrays["robust"])
        card.update(clean_accuracy=1.0, clean_acc="100.00")
        card.pop("subset", None)


def _tune_on_test_set(folder: Path) -> None:
    """Train the weights on the test images of the bundle, and claim what is then true."""
    test, model = load_test(folder)
    with edit_claims(folder) as (arrays, card):
        rows = torch.from_numpy(arrays["index"])
        x, y = test.get_float_images(rows), test.y[rows]
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        for _ in range(30):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            clean = model(x).argmax(1)
            broken = model(torch.from_numpy(arrays["x_adv"])).argmax(1) != y
        arrays["predicted"] = clean.numpy()
        arrays["robust"] = ((clean == y) & ~broken).numpy()
        set_accuracy(card, arrays["robust"])
        share = float((clean == y).double().mean())
        card.update(clean_accuracy=share, clean_acc=f"{100 * share:.2f}")
    with edit_weights(folder) as weights:
        weights.update({name: tensor.detach() for name, tensor in model.state_dict().items()})


def _change_card(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with edit_json(folder / "card.json") as card:
            card.update(values)

    return change


def _write_in_card(before: str, after: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / "card.json").read_text()
        assert before in text
        (folder / "card.json").write_text(text.replace(before, after, 1))

    return change


def _write_nan(folder: Path) -> None:
    with edit_json(folder / "card.json") as card:
        card.update(robust_accuracy=float("nan"), clean_accuracy=float("nan"))


def _put_nan_in_examples(folder: Path) -> None:
    with edit_claims(folder) as (arrays, _):
        arrays["x_adv"][:] = np.nan


def _put_nan_in_weights(folder: Path) -> None:
    with edit_weights(folder) as weights:
        name = max(weights, key=lambda name: weights[name].numel())
        weights[name].view(-1)[0] = float("nan")


# Other kinds.


def _change_array(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        with edit_claims(folder) as (arrays, _):
            arrays[name] = change(arrays[name])

    return edit


def _flip_first(array: Any) -> Any:
    return np.concatenate([(array[:1] + 1) % 10, array[1:]])


def _repeat_robust_row(folder: Path) -> None:
    with edit_claims(folder) as (arrays, card):
        order = np.argsort(~arrays["robust"], kind="stable")
        order[len(order) // 2 :] = order[0]
        arrays.update({name: array[order] for name, array in arrays.items()})
        set_accuracy(card, arrays["robust"])


def _shuffle_images(folder: Path) -> None:
    """Adversarial examples of other rows."""
    with edit_claims(folder) as (arrays, _):
        arrays["x_adv"] = np.roll(arrays["x_adv"], 1, axis=0)


def _write_odd_truth(folder: Path) -> None:
    """Truth values of which some are neither 0 nor 1."""
    with edit_claims(folder) as (arrays, card):
        arrays["robust"] = np.full(len(arrays["robust"]), 2, np.uint8).view(bool)
        set_accuracy(card, [True])
        card["examples"] = len(arrays["robust"])


def _scale_logits(factor: float) -> Callable[[Path], None]:
    """Change the last layer: the same predictions, other gradients; and hide what broke."""

    def scale(folder: Path) -> None:
        with edit_weights(folder) as weights:
            layer = find_last_layer(weights)
            for name in (f"{layer}.weight", f"{layer}.bias"):
                weights[name] = weights[name] * factor
        _hide_adversarial(folder)

    return scale


def _hide_in_ties(folder: Path) -> None:
    """All logits are nearly equal, and everything is said to be robust."""
    with edit_weights(folder) as weights:
        weights[f"{find_last_layer(weights)}.bias"] += 1e5
    with edit_claims(folder) as (arrays, card):
        arrays["robust"][:] = True
        set_accuracy(card, arrays["robust"])


def _take_other_weights(folder: Path) -> None:
    with edit_weights(folder) as weights:
        generator = torch.Generator().manual_seed(0)
        for name, tensor in weights.items():
            if tensor.dim() > 1:
                weights[name] = torch.randn(tensor.shape, generator=generator) * 0.1


def _change_shape_of_weights(folder: Path) -> None:
    with edit_weights(folder) as weights:
        name = max(weights, key=lambda name: weights[name].numel())
        weights[name] = weights[name][:1].clone()


def _change_meta(path: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with edit_json(folder / "checkpoint" / "meta.json") as meta:
            *parents, last = path.split(".")
            part = meta
            for name in parents:
                part = part[name]
            part[last] = value

    return change


def _change_manifest(path: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        write_manifest_anew(folder)
        with edit_json(folder / "manifest.json") as manifest:
            *parents, last = path.split(".")
            part = manifest
            for name in parents:
                part = part[name]
            part[last] = value

    return change


def _drop_environment(folder: Path) -> None:
    with edit_json(folder / "checkpoint" / "meta.json") as meta:
        del meta["environment"]


def _name_tensor(name: str) -> Callable[[Path], None]:
    def add(folder: Path) -> None:
        with edit_weights(folder) as weights:
            weights[name] = torch.zeros(1)

    return add


def _change_model(in_card_too: bool = False, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with edit_json(folder / "checkpoint" / "meta.json") as meta:
            meta["config"]["model"].update(values)
        if in_card_too:
            with edit_json(folder / "card.json") as card:
                card["config"]["model"].update(values)
                card["architecture"] = card["config"]["model"]["name"]

    return change


def _change_data(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with edit_json(folder / "card.json") as card:
            card["data"].update(values)

    return change


def _add_file(folder: Path) -> None:
    (folder / "checkpoint" / "notes.py").write_text("print('hello')\n")


def _link_outside(folder: Path) -> None:
    (folder / "checkpoint" / "meta.json").unlink()
    (folder / "checkpoint" / "meta.json").symlink_to("/etc/hostname")


def _make_pipe(folder: Path) -> None:
    """A reader of it waits for ever."""
    (folder / "card.json").unlink()
    os.mkfifo(folder / "card.json")


def _claim_huge_array(folder: Path) -> None:
    """A header of a few bytes asks for terabytes of memory."""
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**9, 1, 100, 100)}
    np.lib.format.write_array_header_1_0(stream, header)
    source = folder / "adversarial.npz"
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(source, "w") as archive:
        for name, content in (members | {"x_adv.npy": stream.getvalue()}).items():
            archive.writestr(name, content)


def _claim_autoattack(attacks: list[str]) -> Callable[[Path], None]:
    def claim(folder: Path) -> None:
        with edit_json(folder / "card.json") as card:
            card.update(autoattack_acc=card["reported"], attacks=attacks)

    return claim


def _change_config(folder: Path) -> None:
    with edit_json(folder / "card.json") as card:
        card["config"]["epochs"] += 100


def _name_missing_files(folder: Path) -> None:
    write_manifest_anew(folder)
    with edit_json(folder / "manifest.json") as manifest:
        manifest["files"].update({f"x{number}": "0" for number in range(20_000)})


def _take_rows(rows: slice) -> Callable[[Path], None]:
    def take(folder: Path) -> None:
        with edit_claims(folder) as (arrays, _):
            arrays.update({name: array[rows] for name, array in arrays.items()})

    return take


def _put_nan(x: Any) -> Any:
    x[0, 0, 0, 0] = np.nan
    return x


def _negate_variances(folder: Path) -> None:
    with edit_weights(folder) as weights:
        for name in weights:
            if name.endswith("running_var"):
                weights[name] = -weights[name] - 1


def _fill_weights(folder: Path) -> None:
    """Finite weights; every sum of products is infinite or no number."""
    with edit_weights(folder) as weights:
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                weights[name] = torch.full_like(tensor, 3e38)


def _compress_otherwise(folder: Path) -> None:
    source = folder / "adversarial.npz"
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(source, "w", zipfile.ZIP_LZMA) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _compress_card(folder: Path) -> None:
    card = folder / "card.json"
    card.write_bytes(gzip.compress(card.read_bytes()))


def _weaken_signature(folder: Path) -> None:
    (folder / "manifest.json.sig").write_text("-----BEGIN SSH SIGNATURE-----\nAAAA\n")


@dataclass(frozen=True)
class Forgery:
    """A way to forge a bundle.

    Attributes:
        forge: Changes a bundle in its folder.
        exit_code: Exit code of the verification: 0 if it is bounded.
        words: Part of what is printed about it.
        writes_manifest: Whether the manifest is written anew afterwards.
    """

    forge: Callable[[Path], None]
    exit_code: int
    words: str
    writes_manifest: bool = True


_DIFFERS = "of the card is not that of the checkpoint"
FORGERIES: dict[str, Forgery] = {
    "adversarial examples replaced by clean images": Forgery(
        _hide_adversarial, 0, "robust at most"
    ),
    "only the rows that stood": Forgery(_keep_robust_rows, 1, "examples are a selection"),
    "weights tuned on the test set": Forgery(_tune_on_test_set, 0, "how the model was trained"),
    "threat_model says another norm": Forgery(
        _change_card(threat_model="L2"), 1, "threat_model is 'Linf', the card says 'L2'"
    ),
    "norm and threat_model say L2": Forgery(
        _change_card(norm="L2", threat_model="L2"), 1, "farther than eps"
    ),
    "eps says 16/255": Forgery(_change_card(eps="16/255"), 1, "the card says '16/255'"),
    "dataset says cifar10": Forgery(
        _change_card(dataset="cifar10"), 1, "dataset is 'digits', the card says 'cifar10'"
    ),
    "eps_value 1e-9": Forgery(_change_card(eps_value=1e-9, eps="1e-09"), 1, "means nothing"),
    "eps_value 5, with its text": Forgery(
        _change_card(eps_value=5.0, eps="1275/255"), 1, "nothing"
    ),
    "eps_value twice as large, with its text": Forgery(
        _change_card(eps_value=0.3, eps="0.3"), 0, "the model was trained for Linf 0.15"
    ),
    "NaN in the card": Forgery(_write_nan, 4, "not a finite number"),
    "1e999 in the card": Forgery(
        _write_in_card('"eps_value": 0.15', '"eps_value": 1e999'), 4, "not a finite number"
    ),
    "true in place of a number": Forgery(_change_card(robust_accuracy=True), 4, "robust_accuracy"),
    "a text in place of a number": Forgery(_change_card(eps_value="0.15"), 4, "eps_value"),
    "NaN in the examples": Forgery(_put_nan_in_examples, 1, "outside [0, 1]"),
    "NaN in the weights": Forgery(_put_nan_in_weights, 4, "are not finite"),
    "a key twice": Forgery(_write_in_card("{", '{"robust_accuracy": 1.0, '), 4, "is there twice"),
    "reported says 99.00": Forgery(_change_card(reported="99.00"), 1, "the card says '99.00'"),
    "robust_accuracy 0.99, with its text": Forgery(
        _change_card(robust_accuracy=0.99, reported="99.00"), 1, "the card says 0.9900"
    ),
    "AutoAttack claimed, APGD run": Forgery(
        _claim_autoattack(["apgd-ce"]), 1, "but the card's attacks are"
    ),
    "AutoAttack claimed, with its attacks": Forgery(
        _claim_autoattack(["apgd-ce", "apgd-t", "fab-t", "square"]), 0, "name, attacks, unreliable"
    ),
    "clean accuracy raised": Forgery(
        _change_card(clean_accuracy=1.0, clean_acc="100.00"), 1, "clean_accuracy is"
    ),
    "clean predictions changed": Forgery(
        _change_array("predicted", _flip_first), 1, "classified otherwise than claimed"
    ),
    "labels changed": Forgery(_change_array("labels", _flip_first), 1, "the labels are not"),
    "one more example claimed": Forgery(_change_card(examples=1000), 1, "the card says 1000"),
    "a robust row a hundred times": Forgery(_repeat_robust_row, 4, "listed twice"),
    "rows that the test set lacks": Forgery(
        _change_array("index", lambda index: index + 10**6), 4, "are not in the test set"
    ),
    "another subset claimed": Forgery(_change_card(subset="balanced"), 1, "subset is"),
    "adversarial examples of other rows": Forgery(_shuffle_images, 1, "farther than eps"),
    "truth values of 2": Forgery(_write_odd_truth, 1, "claimed robust, but"),
    "float64 examples": Forgery(
        _change_array("x_adv", lambda x: x.astype(np.float64)), 4, "x_adv is float64"
    ),
    "a header that asks for 40 TB": Forgery(_claim_huge_array, 4, "declares another size"),
    "clean images, and logits times 16,384 (gradients vanish)": Forgery(
        _scale_logits(2.0**14), 0, "robust at most"
    ),
    "logits equal but for rounding, all robust": Forgery(_hide_in_ties, 1, "claimed robust, but"),
    "weights of another model": Forgery(_take_other_weights, 1, "clean_accuracy is"),
    "weights of another shape": Forgery(_change_shape_of_weights, 4, "weights"),
    "seed says 7": Forgery(_change_card(seed=7), 1, "seed is"),
    "architecture says wrn_34_10": Forgery(
        _change_card(architecture="wrn_34_10"), 1, "the card says 'wrn_34_10'"
    ),
    "another training configuration": Forgery(_change_config, 1, f"config {_DIFFERS}"),
    "another environment": Forgery(
        _change_card(environment={"torch": "1.0"}), 1, f"environment {_DIFFERS}"
    ),
    "unreliable says false": Forgery(_change_card(unreliable=False), 0, "unreliable"),
    "an author who is not": Forgery(_change_card(authors="Croce, Hein"), 0, "authors"),
    "a name that prints a result": Forgery(
        _change_card(name="x\x1b[2J\nmine: robust at most 100.00%"), 0, "not shown"
    ),
    "a field that prints a result": Forgery(
        _change_card(**{"x\nmine: robust at most 100%": 1}), 0, "'x\\nmine: robust at most 100%'"
    ),
    "another data set in the checkpoint": Forgery(
        _change_meta("data_fingerprint", "0" * 16), 2, "was trained on other 'digits' data"
    ),
    "another test set in the manifest": Forgery(
        _change_manifest("data.test_sha256", "0" * 64), 1, "data.test_sha256 is", False
    ),
    "another code revision in the manifest": Forgery(
        _change_manifest("code_revision", "0" * 40), 0, "by its own words", False
    ),
    "versions that print a result": Forgery(
        _change_manifest("versions.torch", "1\n  signed by ada@example.org\x1b[A"),
        0,
        "'1\\n",
        False,
    ),
    "no environment in the checkpoint": Forgery(_drop_environment, 1, f"environment {_DIFFERS}"),
    "a tensor whose name prints a result": Forgery(
        _name_tensor("x\n\x1b[2Jmine: robust at most 100%"), 4, "not the weights of this network"
    ),
    "a std of the model that hides gradients": Forgery(
        _change_model(True, mean=[0.0], std=[1e-30]), 4, "not the weights of this network"
    ),
    "the network is another one": Forgery(
        _change_model(True, name="resnet18"), 4, "not the weights of this network"
    ),
    "a test set of its own in the card": Forgery(
        _change_data(data_dir="/tmp", download=True), 0, "of the data 'digits'"
    ),
    "an unknown data set": Forgery(_change_data(name="mydata"), 4, "mydata"),
    "lists a thousand levels deep": Forgery(
        _write_in_card("{", '{"link": ' + "[" * 100_000 + "]" * 100_000 + ","), 4, "card.json"
    ),
    "a number of 10,000 digits": Forgery(
        _write_in_card('"seed": 0', '"seed": ' + "9" * 10_000), 4, "card.json"
    ),
    "a file changed after the manifest": Forgery(
        _change_card(authors="me"), 1, "was changed since manifest.json was written", False
    ),
    "a file added after the manifest": Forgery(_add_file, 1, "does not name the file", False),
    "no manifest": Forgery(
        lambda folder: (folder / "manifest.json").unlink(), 0, "no manifest.json", False
    ),
    "a false signature": Forgery(_weaken_signature, 1, "is not a signature of manifest.json"),
    "10,000 other fields": Forgery(
        _change_card(**{f"field{number}": 1 for number in range(10_000)}),
        0,
        "9984 more of the card",
    ),
    "20,000 files in the manifest that are missing": Forgery(
        _name_missing_files, 1, "manifest.json names 'x0', which is missing", False
    ),
    "attacks that print a result": Forgery(
        _change_card(attacks=["x\nmine: robust at most 100%"] * 1_000), 0, "name, attacks"
    ),
    "no rows": Forgery(_take_rows(slice(0, 0)), 4, "it has 0 examples"),
    "the rows in another order": Forgery(_take_rows(slice(None, None, -1)), 0, "the first of"),
    "indices of the rows before them": Forgery(
        _change_array("index", lambda index: np.roll(index, 1)), 1, "the labels are not"
    ),
    "negative indices": Forgery(
        _change_array("index", lambda index: -index - 1), 4, "are not in the test set"
    ),
    "labels of one row less": Forgery(
        _change_array("labels", lambda labels: labels[:-1]), 4, "labels has"
    ),
    "truth values as a column": Forgery(
        _change_array("robust", lambda robust: robust[:, None]), 4, "robust is bool"
    ),
    "examples of another byte order": Forgery(
        _change_array("x_adv", lambda x: x.astype(">f4")), 4, "x_adv is >f4"
    ),
    "half precision examples": Forgery(
        _change_array("x_adv", lambda x: x.astype(np.float16)), 4, "x_adv is float16"
    ),
    "NaN in one pixel": Forgery(_change_array("x_adv", _put_nan), 1, "farther than eps"),
    "infinite pixels": Forgery(
        _change_array("x_adv", lambda x: np.where(x == x.max(), -np.inf, x).astype(np.float32)),
        1,
        "farther than eps",
    ),
    "batch norms with negative variances": Forgery(_negate_variances, 1, "claimed robust, but"),
    "weights whose products overflow": Forgery(_fill_weights, 1, "claimed robust, but"),
    "examples compressed with LZMA": Forgery(
        _compress_otherwise, 4, "compressed in a way that NumPy does not write"
    ),
    "a card that is gzip'd": Forgery(_compress_card, 4, "card.json"),
    "half of a character in the card": Forgery(
        _write_in_card('"dataset": "', '"dataset": "\\ud800'), 1, "dataset is 'digits'"
    ),
    "a network of a file of its own": Forgery(
        _change_model(True, name="make", code="0" * 64), 2, "runs only if you name it: --code FILE"
    ),
    "a link to another file": Forgery(_link_outside, 4, "is a symbolic link"),
    "a pipe in place of a file": Forgery(_make_pipe, 4, "is no regular file"),
}


HONEST = "none: an honest bundle"
# Where a fresh attack can tell more than the files do.
ATTACKED = {
    HONEST,
    "adversarial examples replaced by clean images",
    "clean images, and logits times 16,384 (gradients vanish)",
    "weights tuned on the test set",
    "eps_value twice as large, with its text",
}


def forge_bundle(source: Path, folder: Path, forgery: Forgery) -> None:
    """Copy a bundle into a new folder and forge it there."""
    shutil.copytree(source, folder)
    forgery.forge(folder)
    if forgery.writes_manifest:
        write_manifest_anew(folder)


def run_command(*arguments: str) -> tuple[int, str, float]:
    """Run a command of raysweep in this process, which has one thread; return its exit code, what
    it printed, and processor seconds.
    """
    printed, start = io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = raysweep(list(arguments))
    return code, printed.getvalue(), time.process_time() - start


def make_bundle(folder: Path, n_examples: int) -> Path:
    """Train a model on digits for a few epochs, and attack the first of the test images."""
    train = ["--set", "epochs=5", "--set", "data.val_size=50", "--set", "*.attacks.*.steps=5"]
    out = ["--out", str(folder)]
    assert run_command("train", "at", *train, "--name", "mine", *out)[0] == 0
    attack = ["--attack", "apgd-ce", "--n", str(n_examples), "--set", "subset=first"]
    bundle = folder / "honest"
    code, text, _ = run_command(
        "eval", str(folder / "runs" / "mine"), *attack, "--bundle", str(bundle), *out
    )
    assert code == 0, text
    return bundle


def shorten(text: str, folder: Path) -> str:
    """Return the line that matters: the first false claim or error, else the bound."""
    lines = text.replace(f"{folder}/", "").replace(str(folder), folder.name).splitlines()
    errors = [line for line in lines if "false claim" in line or "error:" in line]
    line = (errors or lines)[0]
    return line.partition("false claim: ")[2] or line.partition(": ")[2]


def describe_rows(source: Path, work: Path, n_attacked: int) -> Iterator[list[str]]:
    """Yield the rows of the table."""
    honest = {HONEST: Forgery(lambda folder: None, 0, "robust at most")}
    for number, (name, forgery) in enumerate((honest | FORGERIES).items()):
        folder = work / f"forged-{number}"
        forge_bundle(source, folder, forgery)
        code, text, seconds = run_command("eval", str(folder), "--verify")
        assert (code, forgery.words in text) == (forgery.exit_code, True), (name, code, text)
        verdict = "caught" if code else "bounded" if number else "verified"
        row = [name, verdict, shorten(text, folder)]
        if n_attacked:
            row += ["", ""]
            if name in ATTACKED:
                arguments = ["--attack", str(n_attacked), "--set", "seed=1"]
                code, text, attacked = run_command("eval", str(folder), "--verify", *arguments)
                line = next(line for line in text.splitlines() if "AutoAttack breaks" in line)
                row[-2:] = [
                    f"{'fell' if code else 'held'}: {line.strip()}",
                    f"{attacked - seconds:.1f}",
                ]
        print(f"{row[1]}: {name}", file=sys.stderr, flush=True)
        yield row


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attack", type=int, default=0, metavar="N")
    parser.add_argument("--n", type=int, default=200)
    args = parser.parse_args()
    # In this process alone: starting others takes longer than these attacks.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    torch.set_num_threads(1)
    print(describe_machine(), file=sys.stderr)
    headings = ["forged", "without an attack", "printed first"]
    if args.attack:
        headings += [f"--attack {args.attack}", "processor seconds of the attack"]
    with TemporaryDirectory() as work:
        source = make_bundle(Path(work), args.n)
        print(format_table(headings, list(describe_rows(source, Path(work), args.attack))))


if __name__ == "__main__":
    main()
