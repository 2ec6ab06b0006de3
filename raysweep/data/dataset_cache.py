"""One copy of a data set on each machine: decoded and split once, then mapped by every process that
trains on it.
"""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from raysweep.atomic_files import atomic_open
from raysweep.data.dataset import Dataset, DataSpec, Split, load_data
from raysweep.spec import SpecError, json_digest

# The copies that were used last stay on disk.
_MAX_CACHE_FILES = 8
_SPLIT_NAMES = ("train", "val", "test", "unlabeled")


@dataclass(frozen=True)
class CachedDataset:
    """A data set that somebody has read, as the processes that train on it are told of it."""

    spec: DataSpec
    fingerprint: str

    def load_shared(self, spec: DataSpec) -> Dataset:
        """Data of `spec`, in memory that all processes of this machine share if its images are
        those of this source.

        Raises SpecError in one line that names the machine if the files are missing or hold other
        images.
        """
        places = ("name", "data_dir", "unlabeled")
        same = all(getattr(spec, place) == getattr(self.spec, place) for place in places)
        return _load_memoized(spec.model_dump_json(), self.fingerprint if same else None)


@cache
def _load_memoized(spec_json: str, fingerprint: str | None) -> Dataset:
    """Trials that follow each other in one process need not even map it again."""
    checked = DataSpec.model_validate_json(spec_json)
    try:
        return (
            load_data(checked)
            if fingerprint is None
            else _load_or_create_cache(checked, fingerprint)
        )
    except SpecError as error:
        raise SpecError([f"{socket.gethostname()}: {line}" for line in error.problems]) from None


def get_dataset_cache_dir() -> Path:
    """Where copies are kept: this user's alone."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raysweep-data"


def _load_or_create_cache(spec: DataSpec, fingerprint: str) -> Dataset:
    deciding = {
        name: value
        for name, value in spec.to_json_dict().items()
        if name not in ("data_dir", "download")
    }
    path = get_dataset_cache_dir() / f"{fingerprint}-{json_digest(deciding)}.safetensors"
    with suppress(OSError, SafetensorError):
        return _map_cache_file(path, spec, fingerprint)
    data = load_data(spec)
    if data.fingerprint != fingerprint:
        raise SpecError(
            f"{spec.data_dir} holds other {spec.name!r} data (fingerprint {data.fingerprint}) than the driver's "
            f"({fingerprint})"
        )
    # A full disk costs memory, not the trial.
    with suppress(OSError, SafetensorError):
        _write_cache_file(path, data)
        return _map_cache_file(path, spec, fingerprint)
    return data


def _write_cache_file(path: Path, data: Dataset) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    parts = {name: split for name in _SPLIT_NAMES if (split := getattr(data, name)) is not None}
    tensors = {
        f"{name}.{field}": tensor
        for name, split in parts.items()
        for field, tensor in (("x", split.x), ("y", split.y), ("index", split.index))
    }
    facts = {
        "white": data.train.pixel_max,
        "channels": data.channels,
        "classes": data.classes,
        "augment": data.augment,
    }
    with atomic_open(path) as stream:
        stream.write(save(tensors, {name: str(int(value)) for name, value in facts.items()}))
    for old in sorted(path.parent.glob("*.safetensors"), key=lambda file: -file.stat().st_mtime)[
        _MAX_CACHE_FILES:
    ]:
        old.unlink(missing_ok=True)


def _map_cache_file(path: Path, spec: DataSpec, fingerprint: str) -> Dataset:
    """Tensors on the file's own pages, which the system reads when they are touched and shares
    between processes.
    """
    with safe_open(path, "pt") as file:
        facts = {name: int(value) for name, value in file.metadata().items()}
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    os.utime(path)
    splits = {
        name: Split(
            tensors[f"{name}.x"], tensors[f"{name}.y"], tensors[f"{name}.index"], facts["white"]
        )
        for name in _SPLIT_NAMES
        if f"{name}.x" in tensors
    }
    return Dataset(
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        channels=facts["channels"],
        classes=facts["classes"],
        augment=bool(facts["augment"]),
        fingerprint=fingerprint,
        unlabeled=splits.get("unlabeled"),
        unlabeled_fraction=spec.unlabeled_fraction,
    )
