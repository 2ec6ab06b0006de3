"""Cache of decoded data sets on each machine.

A data set is read and split once per machine and written to a file. All processes of that machine
map the file, so that they share one copy in memory.
"""

import logging
import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from raysweep.atomic_files import atomic_open
from raysweep.data.dataset import DatasetSplits, DataSpec, load_data
from raysweep.data.split_tensors import Split
from raysweep.errors import InfrastructureError, RaysweepError
from raysweep.spec import json_digest
from raysweep.user_folders import find_cache_folder

logger = logging.getLogger(__name__)

# Number of files in the cache; the least recently used ones are deleted.
_MAX_CACHE_FILES = 8
_SPLIT_NAMES = ("train", "val", "test", "unlabeled")


@dataclass(frozen=True)
class CachedDataset:
    """Picklable handle of a data set. Workers load it from the cache of their machine.

    Attributes:
        spec: Settings with which the driver read the data set.
        fingerprint: `DatasetSplits.fingerprint` of what the driver read.
    """

    spec: DataSpec
    fingerprint: str

    def load_shared(self, spec: DataSpec) -> DatasetSplits:
        """Load a data set, if possible in memory that all processes of this machine share.

        Args:
            spec: Settings of the data set to load. They may differ from `self.spec`. If `name`,
                `data_dir` or `unlabeled` differ, the files are read without the cache. Only
                `self.spec` decides about downloads: `spec` may come from a stranger's sweep.

        Returns:
            The data set, on the CPU.

        Raises:
            SpecError: If files are missing on this machine. Each message names the machine.
            DamagedFileError: If a file cannot be read.
            InfrastructureError: If the files of `self.spec` do not have the driver's fingerprint.
        """
        source_fields = ("name", "data_dir", "unlabeled")
        has_same_files = all(
            getattr(spec, field) == getattr(self.spec, field) for field in source_fields
        )
        spec = spec.replace(download=self.spec.download)
        return _load_memoized(spec.model_dump_json(), self.fingerprint if has_same_files else None)


@cache
def _load_memoized(spec_json: str, fingerprint: str | None) -> DatasetSplits:
    """Load a data set once per process, so that later trials of the process reuse it."""
    spec = DataSpec.model_validate_json(spec_json)
    try:
        if fingerprint is None:
            return load_data(spec)
        return _load_or_create_cache(spec, fingerprint)
    except RaysweepError as error:
        raise error.with_prefix(f"{socket.gethostname()}: ") from error


def get_dataset_cache_dir() -> Path:
    """Return the folder of cached data sets, see `find_cache_folder`."""
    return find_cache_folder("raysweep-data")


def _load_or_create_cache(spec: DataSpec, fingerprint: str) -> DatasetSplits:
    """Map the cache file of a data set; create it first if it is missing or damaged."""
    key_fields = spec.to_json_dict()
    for field in ("data_dir", "download"):
        del key_fields[field]
    path = get_dataset_cache_dir() / f"{fingerprint}-{json_digest(key_fields)}.safetensors"
    try:
        return _map_cache_file(path, spec, fingerprint)
    except FileNotFoundError:
        logger.debug("%s has no cached copy on this machine yet", spec.name)
    except (OSError, SafetensorError) as error:
        logger.info("the cached copy of %s cannot be used: %s", spec.name, error)
    data = load_data(spec)
    if data.fingerprint != fingerprint:
        raise InfrastructureError(
            f"{spec.data_dir} holds other {spec.name!r} data (fingerprint {data.fingerprint}) "
            f"than the driver's ({fingerprint})"
        )
    try:
        _write_cache_file(path, data)
        return _map_cache_file(path, spec, fingerprint)
    except (OSError, SafetensorError) as error:
        logger.warning(
            "fallback: the data set takes memory in each process, its cache failed: %s", error
        )
        return data


def _write_cache_file(path: Path, data: DatasetSplits) -> None:
    """Write all splits into a safetensors file, and delete the least recently used files."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    tensors: dict[str, Tensor] = {}
    for name in _SPLIT_NAMES:
        split: Split | None = getattr(data, name)
        if split is not None:
            tensors |= {f"{name}.x": split.x, f"{name}.y": split.y, f"{name}.index": split.index}
    # The key "white" is raysweep 0.1's name of pixel_max. It is kept, so that old cache files stay
    # valid.
    metadata = {
        "white": data.train.pixel_max,
        "channels": data.channels,
        "classes": data.classes,
        "augment": data.augment,
    }
    with atomic_open(path) as stream:
        stream.write(save(tensors, {name: str(int(value)) for name, value in metadata.items()}))
    newest_first = sorted(path.parent.glob("*.safetensors"), key=lambda file: -file.stat().st_mtime)
    for file in newest_first[_MAX_CACHE_FILES:]:
        file.unlink(missing_ok=True)


def _map_cache_file(path: Path, spec: DataSpec, fingerprint: str) -> DatasetSplits:
    """Map a cache file into memory.

    The system reads its pages when they are used, and shares them between processes.
    """
    with safe_open(path, "pt") as file:
        metadata = {name: int(value) for name, value in file.metadata().items()}
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # Mark the file as used: the least recently used files are deleted.
    os.utime(path)
    splits: dict[str, Split] = {}
    for name in _SPLIT_NAMES:
        if f"{name}.x" in tensors:
            x, y, index = (tensors[f"{name}.{field}"] for field in ("x", "y", "index"))
            splits[name] = Split(x, y, index, metadata["white"])
    return DatasetSplits(
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        channels=metadata["channels"],
        classes=metadata["classes"],
        augment=bool(metadata["augment"]),
        fingerprint=fingerprint,
        unlabeled=splits.get("unlabeled"),
        unlabeled_fraction=spec.unlabeled_fraction,
    )
