"""Manifest of a bundle: the digest of each file, the data, the code revision and the versions."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from raysweep.atomic_files import atomic_write_text
from raysweep.data import Split
from raysweep.robustness_bundle.files import (
    MANIFEST_FILE,
    SIGNATURE_FILE,
    list_bundle_files,
    quote_value,
    read_strict_json,
)
from raysweep.spec import JsonDict, Spec
from raysweep.training.checkpoint import describe_environment

_FORMAT_VERSION = 1


class ManifestData(Spec):
    """The data set of a bundle."""

    model_config = ConfigDict(strict=True)

    name: str
    """Name of the data set, as in `raysweep list`."""
    fingerprint: str
    """Fingerprint of the training and test data, as in the checkpoint."""
    test_examples: int
    """Number of test examples."""
    test_sha256: str
    """SHA-256 of the test examples (see `hash_test_examples`)."""


class Manifest(Spec):
    """What a bundle holds, and what it was made with."""

    model_config = ConfigDict(strict=True)

    format: int
    """Version of this format."""
    files: dict[str, str]
    """Path in the bundle -> SHA-256 of the file, for all files but the manifest's own."""
    data: ManifestData
    """The data set."""
    code_revision: str | None
    """Git revision of raysweep that evaluated the model; null for an installed package."""
    versions: dict[str, Any]
    """Versions of raysweep, Python and the libraries, and the device, at the evaluation."""


def write_manifest(folder: Path, dataset_name: str, fingerprint: str, test: Split) -> None:
    """Write the manifest of a bundle whose other files are all there.

    Args:
        folder: The bundle.
        dataset_name: Name of the data set.
        fingerprint: Fingerprint of the training data, from the checkpoint.
        test: All test examples.

    Raises:
        OSError: A file cannot be read or written.
    """
    versions: JsonDict = dict(describe_environment())
    manifest = Manifest(
        format=_FORMAT_VERSION,
        files={name: hash_file(folder / name) for name in list_bundle_files(folder)},
        data=ManifestData(
            name=dataset_name,
            fingerprint=fingerprint,
            test_examples=len(test),
            test_sha256=hash_test_examples(test),
        ),
        code_revision=versions.pop("git_revision"),
        versions=versions,
    )
    text = json.dumps(manifest.to_json_dict(), indent=1, sort_keys=True) + "\n"
    atomic_write_text(folder / MANIFEST_FILE, text)


def read_manifest(folder: Path, file_names: list[str]) -> Manifest | None:
    """Read the manifest of a bundle; None if it has none, as those of raysweep 0.1.

    Args:
        folder: The bundle.
        file_names: Its files, from `list_bundle_files`.

    Raises:
        DamagedFileError: It is not a manifest.
    """
    if MANIFEST_FILE not in file_names:
        return None
    path = folder / MANIFEST_FILE
    return Manifest.from_data(read_strict_json(path), str(path), stored=True)


def find_manifest_problems(
    manifest: Manifest,
    folder: Path,
    file_names: list[str],
    dataset_name: str,
    fingerprint: str,
    test: Split,
) -> list[str]:
    """Compare a manifest with the files of its bundle and the verifier's test data.

    Args:
        manifest: The manifest.
        folder: The bundle.
        file_names: Its files, from `list_bundle_files`.
        dataset_name: Name of the data set that the card says.
        fingerprint: Fingerprint of the training data, from the checkpoint.
        test: The verifier's test examples.

    Returns:
        One line for each difference.
    """
    problems = []
    if manifest.format != _FORMAT_VERSION:
        problems.append(f"{MANIFEST_FILE} has format {manifest.format}, not {_FORMAT_VERSION}")
    own_files = set(file_names) - {MANIFEST_FILE, SIGNATURE_FILE}
    for name in sorted(own_files | manifest.files.keys()):
        if name not in own_files:
            problems.append(f"{MANIFEST_FILE} names {quote_value(name)}, which is missing")
        elif name not in manifest.files:
            problems.append(f"{MANIFEST_FILE} does not name the file {quote_value(name)}")
        elif manifest.files[name] != hash_file(folder / name):
            problems.append(f"{quote_value(name)} was changed since {MANIFEST_FILE} was written")
    derived = {
        "name": dataset_name,
        "fingerprint": fingerprint,
        "test_examples": len(test),
        "test_sha256": hash_test_examples(test),
    }
    for key, value in derived.items():
        claimed = getattr(manifest.data, key)
        if claimed != value:
            problems.append(f"data.{key} is {value!r}, {MANIFEST_FILE} says {quote_value(claimed)}")
    return problems


def hash_file(path: Path) -> str:
    """Compute the SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_test_examples(test: Split) -> str:
    """Compute the SHA-256 of test examples.

    Args:
        test: The examples, in their order.

    Returns:
        Hexadecimal digits. Pixels, labels, shapes and the largest pixel value decide on them.
    """
    sha = hashlib.sha256(f"{tuple(test.x.shape)} {test.pixel_max}".encode())
    for tensor in (test.x, test.y):
        sha.update(tensor.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
