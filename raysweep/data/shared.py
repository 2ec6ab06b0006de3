"""One copy of a data set on each machine: decoded and split once, then mapped by every process that trains on it."""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from raysweep.data import Data, DataSpec, Split, load
from raysweep.files import whole
from raysweep.spec import SpecError, digest

# The copies that were used last stay on disk.
_KEPT = 8
_SPLITS = ("train", "val", "test", "unlabeled")


@dataclass(frozen=True)
class Source:
    """A data set that somebody has read, as the processes that train on it are told of it."""

    spec: DataSpec
    fingerprint: str

    def load(self, spec: DataSpec) -> Data:
        """Data of `spec`, in memory that all processes of this machine share if its images are those of this source.

        Raises SpecError in one line that names the machine if the files are missing or hold other images.
        """
        places = ("name", "data_dir", "unlabeled")
        same = all(getattr(spec, place) == getattr(self.spec, place) for place in places)
        return _once(spec.model_dump_json(), self.fingerprint if same else None)


@cache
def _once(spec: str, fingerprint: str | None) -> Data:
    """Trials that follow each other in one process need not even map it again."""
    checked = DataSpec.model_validate_json(spec)
    try:
        return load(checked) if fingerprint is None else _shared(checked, fingerprint)
    except SpecError as error:
        raise SpecError([f"{socket.gethostname()}: {line}" for line in error.problems]) from None


def cache_folder() -> Path:
    """Where copies are kept: this user's alone."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raysweep-data"


def _shared(spec: DataSpec, fingerprint: str) -> Data:
    deciding = {name: value for name, value in spec.json_dict().items() if name not in ("data_dir", "download")}
    path = cache_folder() / f"{fingerprint}-{digest(deciding)}.safetensors"
    with suppress(OSError, SafetensorError):
        return _read(path, spec, fingerprint)
    data = load(spec)
    if data.fingerprint != fingerprint:
        raise SpecError(
            f"{spec.data_dir} holds other {spec.name!r} data (fingerprint {data.fingerprint}) than the driver's "
            f"({fingerprint})"
        )
    # A full disk costs memory, not the trial.
    with suppress(OSError, SafetensorError):
        _write(path, data)
        return _read(path, spec, fingerprint)
    return data


def _write(path: Path, data: Data) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    parts = {name: split for name in _SPLITS if (split := getattr(data, name)) is not None}
    tensors = {
        f"{name}.{field}": tensor
        for name, split in parts.items()
        for field, tensor in (("x", split.x), ("y", split.y), ("index", split.index))
    }
    facts = {"white": data.train.white, "channels": data.channels, "classes": data.classes, "augment": data.augment}
    with whole(path) as stream:
        stream.write(save(tensors, {name: str(int(value)) for name, value in facts.items()}))
    for old in sorted(path.parent.glob("*.safetensors"), key=lambda file: -file.stat().st_mtime)[_KEPT:]:
        old.unlink(missing_ok=True)


def _read(path: Path, spec: DataSpec, fingerprint: str) -> Data:
    """Tensors on the file's own pages, which the system reads when they are touched and shares between processes."""
    with safe_open(path, "pt") as file:
        facts = {name: int(value) for name, value in file.metadata().items()}
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    os.utime(path)
    splits = {
        name: Split(tensors[f"{name}.x"], tensors[f"{name}.y"], tensors[f"{name}.index"], facts["white"])
        for name in _SPLITS
        if f"{name}.x" in tensors
    }
    return Data(
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
