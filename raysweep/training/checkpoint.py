"""Checkpoints: folders of safetensors and JSON files, written atomically and free of pickle."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from safetensors import SafetensorError

from raysweep.bounded_files import read_regular_file
from raysweep.code_files import find_code_file
from raysweep.errors import DamagedFileError, InfrastructureError
from raysweep.lazy_modules import safetensors_torch, torch
from raysweep.spec import JsonDict, SpecError
from raysweep.stored_data import Count, Metrics, check_stored_types, parse_stored_json
from raysweep.stores import META_FILE, Location, StoredFileNotFound, StorePath, open_path
from raysweep.training.config import TrainingConfig
from raysweep.training.example_verdicts import ExampleVerdicts
from raysweep.training.metric_history import EpochMetrics
from raysweep.visible_text import show_characters

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "weights.safetensors"
OPTIMIZER_FILE = "state.safetensors"
VERDICTS_KEY = "verdicts"
"""Key of the validation examples that the last epoch gets right (see `ExampleVerdicts`)."""
CODE_FILE = "network.source"
"""Copy of the user's code file with the network. raysweep never imports it from a checkpoint."""
SELECTION_KEY = "best_after_burn_in"
"""Key that a checkpoint has if its run chooses its best epoch by `selection.find_best_epoch`."""
_FORMAT_VERSION = 1
_MAX_REASON_LENGTH = 200
_META_TYPES: dict[str, Any] = {
    **{"config": dict[str, Any], "epoch": Count, "history": list[Metrics]},
    **{"data_fingerprint": str, "sha256": dict[str, str], "environment": dict[str, Any]},
    **{"digest": str, VERDICTS_KEY: dict[str, Any]},
}


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A checkpoint whose hashes have been verified.

    Attributes:
        path: Folder of the checkpoint in its store.
        config: Config of the run.
        epoch: Number of finished epochs.
        history: One row of metrics for each finished epoch.
        meta: Content of its JSON file, with the keys `config`, `epoch`, `history`,
            `data_fingerprint`, `environment`, `sha256` and more.
    """

    path: StorePath
    config: TrainingConfig
    epoch: int
    history: list[EpochMetrics]
    meta: JsonDict

    @property
    def last_metrics(self) -> EpochMetrics:
        """Metrics of the last finished epoch."""
        return self.history[-1]

    @property
    def local_folder(self) -> Path:
        """Folder of this machine with the checkpoint's files; downloaded again if necessary.

        Raises:
            DamagedFileError: The checkpoint was deleted.
        """
        return _fetch_folder(self.path)

    def load_weights(self, model: nn.Module) -> nn.Module:
        """Load weights and buffers.

        Args:
            model: The config's network; changed in place.

        Returns:
            `model`.

        Raises:
            DamagedFileError: The file has not the weights of this network; one line.
        """
        with self._refuse_other_tensors(WEIGHTS_FILE, "weights"):
            model.load_state_dict(safetensors_torch.load_file(self.local_folder / WEIGHTS_FILE))
        return model

    @contextmanager
    def _refuse_other_tensors(self, file_name: str, content: str) -> Iterator[None]:
        """Raise DamagedFileError, in one line, if tensors are not those of the network."""
        try:
            yield
        except (SafetensorError, RuntimeError) as error:
            # It names the tensors of the file, of which there may be many.
            reason = show_characters(" ".join(str(error).split()))[:_MAX_REASON_LENGTH]
            raise DamagedFileError(
                f"{self.path}: {file_name} has not the {content} of this network: {reason}"
            ) from error

    def load_training_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load weights and momentum, so that training resumes with identical results.

        Args:
            model: The config's network; changed in place.
            optimizer: Its SGD optimizer; changed in place.
        """
        self.load_weights(model)
        self.load_momentum(model, optimizer)

    def load_momentum(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load the momentum buffers, which are stored by parameter name.

        Args:
            model: The network whose parameters the optimizer updates.
            optimizer: Its SGD optimizer; changed in place.

        Raises:
            DamagedFileError: The file has not the momentum of this network; one line.
        """
        with self._refuse_other_tensors(OPTIMIZER_FILE, "momentum"):
            momentum = safetensors_torch.load_file(self.local_folder / OPTIMIZER_FILE)
            for name, parameter in model.named_parameters():
                if name not in momentum:
                    continue
                if momentum[name].shape != parameter.shape:
                    raise RuntimeError(f"{name} has shape {tuple(momentum[name].shape)}")
                # The buffer gets the parameter's memory format, which it had when it was saved:
                # another format rounds differently.
                buffer = torch.empty_like(parameter).copy_(momentum[name])
                optimizer.state[parameter]["momentum_buffer"] = buffer


@dataclass(frozen=True)
class TrainingState:
    """Copy of the state of a model and its optimizer; later training steps do not change it.

    Attributes:
        weights: Weights and buffers by name, on the CPU.
        momentum: Momentum buffers by the names of their parameters, on the CPU.
    """

    weights: dict[str, Tensor]
    momentum: dict[str, Tensor]

    @classmethod
    def copy_from(cls, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
        """Copy the current state.

        Args:
            model: Model whose weights and buffers are copied.
            optimizer: Its SGD optimizer, whose momentum buffers are copied.

        Returns:
            The copy, on the CPU.
        """
        momentum = {
            name: optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in model.named_parameters()
            if optimizer.state[parameter].get("momentum_buffer") is not None
        }
        return cls(_copy_to_cpu(model.state_dict()), _copy_to_cpu(momentum))


def _copy_to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors by name into new, contiguous ones without gradients, as safetensors needs."""
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())
        for name, tensor in tensors.items()
    }


def save_checkpoint(
    path: Location,
    config: TrainingConfig,
    state: TrainingState,
    history: list[EpochMetrics],
    data_fingerprint: str,
    extra_files: Mapping[str, bytes] = MappingProxyType({}),
    verdicts: ExampleVerdicts | None = None,
) -> TrainingCheckpoint:
    """Write a checkpoint atomically: a crash leaves either all of it or nothing.

    If the network is a function of a code file, a copy of this file is part of it.

    Args:
        path: Folder to write.
        config: Config of the run.
        state: Weights, buffers and momentum.
        history: Metrics of all finished epochs.
        data_fingerprint: Fingerprint of the training data.
        extra_files: Name -> content of more files.
        verdicts: Which validation examples the last epoch gets right; None if it was not validated.

    Returns:
        The checkpoint that was written.
    """
    path = open_path(path)
    with path.write_checkpoint() as partial:
        _save_tensors(state.weights, partial / WEIGHTS_FILE)
        _save_tensors(state.momentum, partial / OPTIMIZER_FILE)
        for name, content in extra_files.items():
            (partial / name).write_bytes(content)
        if config.model.code is not None:
            code_file = find_code_file(config.model.code, config.model.name)
            (partial / CODE_FILE).write_bytes(code_file.source)
        sha256 = {
            name: _compute_file_sha256(partial / name) for name in (WEIGHTS_FILE, OPTIMIZER_FILE)
        }
        stored_verdicts = verdicts.to_stored_dict() if verdicts else None
        meta = _write_meta(partial, config, history, data_fingerprint, sha256, stored_verdicts)
    return TrainingCheckpoint(path, config, len(history), history, meta)


def reuse_checkpoint(
    path: Location,
    source: Location,
    config: TrainingConfig,
    history: list[EpochMetrics] | None = None,
) -> TrainingCheckpoint:
    """Use another run's checkpoint as a checkpoint of this run.

    Weights and momentum are hard links, or copies made by the server. The metadata file is new.
    Metrics of epochs that this run did not train get `shared` = 1 and `train/seconds` = 0.

    Args:
        path: Folder to write.
        source: The other run's checkpoint, in the same store.
        config: Config of this run.
        history: Metrics of this run's earlier epochs, if only the last epoch of the other run is
            reused. By default all epochs of the other run are reused.

    Returns:
        The checkpoint that was written.

    Raises:
        DamagedFileError: `source` is damaged or was deleted.
    """
    other = read_checkpoint(source)
    if history is None:
        own_rows, reused_rows = [], other.history
    else:
        own_rows, reused_rows = history, [other.last_metrics]
    rows = [*own_rows, *({**row, "train/seconds": 0.0, "shared": 1.0} for row in reused_rows)]
    path = open_path(path)
    with path.write_checkpoint(copy_from=other.path) as partial:
        meta = _write_meta(
            partial,
            config,
            rows,
            other.meta["data_fingerprint"],
            other.meta["sha256"],
            other.meta.get(VERDICTS_KEY),
        )
    return TrainingCheckpoint(path, config, len(rows), rows, meta)


def export_weights(checkpoint: TrainingCheckpoint, folder: Path) -> None:
    """Write a copy of a checkpoint without momentum: it can be evaluated, and not trained further.

    Args:
        checkpoint: The checkpoint.
        folder: New folder of this machine.
    """
    folder.mkdir(parents=True)
    source = checkpoint.local_folder
    for name in (WEIGHTS_FILE, CODE_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    _save_tensors({}, folder / OPTIMIZER_FILE)
    hashes = {OPTIMIZER_FILE: _compute_file_sha256(folder / OPTIMIZER_FILE)}
    meta = {**checkpoint.meta, "sha256": {**checkpoint.meta["sha256"], **hashes}}
    (folder / META_FILE).write_text(json.dumps(meta, indent=1), encoding="utf-8")


def read_checkpoint(path: Location) -> TrainingCheckpoint:
    """Read a checkpoint's metadata and verify its files. Download it first if it is in a bucket.

    Args:
        path: Folder of the checkpoint.

    Returns:
        The checkpoint. Its weights are not loaded yet.

    Raises:
        SpecError: The folder is not a checkpoint; one line.
        DamagedFileError: A file is damaged; one line.
    """
    path = open_path(path)
    folder = _fetch_folder(path)
    meta = _read_meta(folder, path)
    for name, expected in meta["sha256"].items():
        if not (folder / name).is_file() or _compute_file_sha256(folder / name) != expected:
            problem = f"{name} is truncated or altered (its sha256 is not the one in {META_FILE})"
            raise DamagedFileError(f"{path}: {problem}; delete the folder")
    config = TrainingConfig.from_data(meta["config"], str(path / META_FILE), stored=True)
    return TrainingCheckpoint(path, config, meta["epoch"], meta["history"], meta)


def _fetch_folder(path: StorePath) -> Path:
    """Return a local folder with a checkpoint's files. Raises SpecError if there is none."""
    folder = path.fetch_checkpoint()
    if folder is None:
        raise SpecError(f"{path}: not a raysweep checkpoint: {META_FILE} is missing")
    return folder


def _read_meta(folder: Path, path: StorePath) -> JsonDict:
    """Read a checkpoint's metadata. Raises DamagedFileError if they are incomplete."""
    try:
        meta = parse_stored_json(read_regular_file(folder / META_FILE), str(path / META_FILE), {})
    except (OSError, ValueError) as error:
        if isinstance(error, DamagedFileError) and "no JSON" not in str(error):
            raise
        raise DamagedFileError(
            f"{path}: not a raysweep checkpoint: {META_FILE} is not JSON"
        ) from error
    if meta.get("format") != _FORMAT_VERSION:
        raise DamagedFileError(f"{path}: not a raysweep checkpoint of format {_FORMAT_VERSION}")
    missing = {"config", "epoch", "history", "data_fingerprint", "sha256"} - meta.keys()
    if (
        missing
        or not isinstance(meta["sha256"], dict)
        or meta["sha256"].keys() != {WEIGHTS_FILE, OPTIMIZER_FILE}
    ):
        names = ", ".join(sorted(missing)) or "hashes"
        raise DamagedFileError(f"{path}: not a raysweep checkpoint: {META_FILE} lacks {names}")
    check_stored_types(meta, _META_TYPES, str(path / META_FILE))
    return meta


class RunDirectory:
    """The folder of one training run, with its last and its best checkpoint.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Location) -> None:
        self.path = open_path(path)

    def epoch_path(self, epoch: int) -> StorePath:
        """Return the folder of the checkpoint after an epoch; `epoch` is 1-based."""
        return self.path / f"epoch-{epoch:04d}"

    @property
    def mid_epoch_path(self) -> StorePath:
        """Checkpoint folder of an interrupted epoch (see `MidEpochCheckpointer`)."""
        return self.path / "half"

    @property
    def run_key(self) -> str:
        """Unique id of this run, independent of the folder's name; created on first use."""
        file = self.path / "run.json"
        try:
            return str(file.read_json({"key": str})["key"])
        except StoredFileNotFound:
            key = uuid4().hex
            file.write_json({"key": key})
            return key

    def list_saved_epochs(self) -> list[int]:
        """Return the 1-based numbers of all epochs that have a checkpoint, ascending."""
        names = (
            name.removeprefix("epoch-")
            for name in self.path.list_folders_containing()
            if name.startswith("epoch-")
        )
        return sorted(int(name) for name in names if name.isdecimal())

    def read_last_checkpoint(self) -> TrainingCheckpoint | None:
        """Read the checkpoint of the last finished epoch; None before the first.

        Raises:
            DamagedFileError: The checkpoint is damaged.
        """
        epochs = self.list_saved_epochs()
        return read_checkpoint(self.epoch_path(epochs[-1])) if epochs else None

    def read_last_meta(self) -> JsonDict | None:
        """Read config and metrics of the last finished epoch without the weights and their check.

        Returns:
            The checkpoint's metadata; None before the first epoch.

        Raises:
            DamagedFileError: They are damaged.
        """
        epochs = self.list_saved_epochs()
        if not epochs:
            return None
        meta: JsonDict = (self.epoch_path(epochs[-1]) / META_FILE).read_json(
            {name: _META_TYPES[name] for name in ("config", "history")}
        )
        return meta

    def read_verdicts(self, epoch: int) -> ExampleVerdicts | None:
        """Read which validation examples an epoch gets right.

        Args:
            epoch: 1-based number of the epoch.

        Returns:
            The verdicts; None if the epoch has no checkpoint, was not validated, or an earlier
            version of raysweep validated it.

        Raises:
            DamagedFileError: The checkpoint's metadata are damaged.
        """
        file = self.epoch_path(epoch) / META_FILE
        try:
            meta = file.read_json({})
        except StoredFileNotFound:
            return None
        check_stored_types(meta, {VERDICTS_KEY: _META_TYPES[VERDICTS_KEY]}, str(file))
        return ExampleVerdicts.from_stored_dict(meta.get(VERDICTS_KEY), f"{file} ({VERDICTS_KEY})")

    def read_history(self) -> list[EpochMetrics]:
        """Read the metrics of all finished epochs, including epochs reused from other runs.

        Returns:
            One row for each epoch; empty before the first.

        Raises:
            DamagedFileError: The last checkpoint is damaged.
        """
        last = self.read_last_checkpoint()
        return last.history if last else []

    def prune_checkpoints(self, epochs_to_keep: set[int]) -> None:
        """Delete the checkpoints of all other epochs, and files of interrupted or crashed writes.

        Args:
            epochs_to_keep: 1-based numbers of the epochs whose checkpoints stay.
        """
        for epoch in self.list_saved_epochs():
            if epoch not in epochs_to_keep:
                self.epoch_path(epoch).delete_folder()
        self.mid_epoch_path.delete_folder()
        self.path.delete_unfinished()


def _write_meta(
    folder: Path,
    config: TrainingConfig,
    history: list[EpochMetrics],
    data_fingerprint: str,
    sha256: dict[str, str],
    verdicts: JsonDict | None,
) -> JsonDict:
    """Write the checkpoint's JSON file into `folder`, and return its content."""
    meta = {
        "format": _FORMAT_VERSION,
        "config": config.to_stored_dict(),
        "digest": config.digest(),
        "epoch": len(history),
        "history": history,
        "data_fingerprint": data_fingerprint,
        "environment": describe_environment(),
        "sha256": sha256,
        SELECTION_KEY: True,
    }
    if verdicts is not None:
        meta[VERDICTS_KEY] = verdicts
    (folder / META_FILE).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return meta


@cache
def describe_environment() -> JsonDict:
    """Return versions, device and source revision, because results depend on them.

    Returns:
        Name -> value; None for a package that is not installed. Computed once per process.
    """
    packages = ("raysweep", "torch", "torchvision", "ray", "optuna", "mlflow", "numpy", "pyarrow")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "git_revision": _get_git_revision(),
        **{name: _get_package_version(name) for name in packages},
    }


def _get_package_version(package: str) -> str | None:
    """Return the installed version of a package; None if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _get_git_revision() -> str | None:
    """Return the git revision of this package's checkout, with `-dirty` if it has changes."""
    git = ["git", "-C", str(Path(__file__).parent)]
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(
            [*git, *describe],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors to a file. Raises InfrastructureError, for example if the disk is full."""
    try:
        safetensors_torch.save_file(tensors, path)
    except SafetensorError as error:
        raise InfrastructureError(f"{path}: cannot be written: {error}") from error


def _compute_file_sha256(path: Path) -> str:
    """Compute the sha256 of a file, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
