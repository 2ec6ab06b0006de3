"""Checkpoints: a folder of safetensors and JSON, written whole or not at all, read without
unpickling.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raysweep import storage
from raysweep.atomic_files import atomic_folder, atomic_write_text
from raysweep.spec import JsonDict, SpecError
from raysweep.training.config import TrainingConfig

WEIGHTS_FILE, OPTIMIZER_FILE, META_FILE = (
    "weights.safetensors",
    "state.safetensors",
    storage.META_FILE,
)
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A checked checkpoint on disk. epoch counts finished epochs; history has one row of metrics
    for each.
    """

    path: Path
    config: TrainingConfig
    epoch: int
    history: list[dict[str, float]]
    meta: JsonDict

    @property
    def last_metrics(self) -> dict[str, float]:
        return self.history[-1]

    def load_weights(self, model: nn.Module) -> nn.Module:
        model.load_state_dict(load_file(self.path / WEIGHTS_FILE))
        return model

    def load_training_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Weights and momentum: training goes on as if it had never stopped."""
        self.load_weights(model)
        self.load_momentum(model, optimizer)

    def load_momentum(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Momentum buffers by parameter name."""
        state = load_file(self.path / OPTIMIZER_FILE)
        for name, parameter in model.named_parameters():
            if name in state:
                # Laid out as the parameter, as it was when it was saved: other layouts round
                # otherwise.
                optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(
                    state[name]
                )


def save_checkpoint(
    path: Path,
    config: TrainingConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, float]],
    data_fingerprint: str,
    extra_files: Mapping[str, bytes] = MappingProxyType({}),
) -> TrainingCheckpoint:
    """Write a checkpoint at `path`; a crash at any moment leaves either none or all of it.

    also: more files, by name.
    """
    momentum = {
        name: optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in model.named_parameters()
        if optimizer.state[parameter].get("momentum_buffer") is not None
    }
    with atomic_folder(path) as partial:
        save_file(_detach_contiguous(model.state_dict()), partial / WEIGHTS_FILE)
        save_file(_detach_contiguous(momentum), partial / OPTIMIZER_FILE)
        for name, content in extra_files.items():
            (partial / name).write_bytes(content)
        sha256 = {
            name: _compute_file_sha256(partial / name) for name in (WEIGHTS_FILE, OPTIMIZER_FILE)
        }
        meta = _write_meta(partial, config, history, data_fingerprint, sha256)
    storage.push_to_bucket(path)
    return TrainingCheckpoint(path, config, len(history), history, meta)


def reuse_checkpoint(
    path: Path, source: Path, config: TrainingConfig, history: list[dict[str, float]] | None = None
) -> TrainingCheckpoint:
    """Another run's state as this run's checkpoint at `path`: the same files, linked where that can
    be, its own meta.

    Rows of `history` (by default the other run's) that were not trained here are marked `shared`,
    and cost nothing.
    """
    other = read_checkpoint(source)
    rows = other.history if history is None else [*history, other.last_metrics]
    known = 0 if history is None else len(history)
    rows = [*rows[:known], *({**row, "train/seconds": 0.0, "shared": 1.0} for row in rows[known:])]
    with atomic_folder(path) as partial:
        for name in (WEIGHTS_FILE, OPTIMIZER_FILE):
            link_or_copy(source / name, partial / name)
        meta = _write_meta(
            partial, config, rows, other.meta["data_fingerprint"], other.meta["sha256"]
        )
    storage.push_to_bucket(path, copy_from=source)
    return TrainingCheckpoint(path, config, len(rows), rows, meta)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read_checkpoint(path: Path) -> TrainingCheckpoint:
    """Check a checkpoint and read what it says of itself. Raises SpecError in one line for a
    foreign or damaged one.
    """
    storage.pull_checkpoint(path)
    return read_local_checkpoint(path)


def read_local_checkpoint(path: Path) -> TrainingCheckpoint:
    """`read`, of what is on this machine."""
    try:
        meta = json.loads((path / META_FILE).read_text())
    except (OSError, ValueError):
        raise SpecError(
            f"{storage.uri_of(path)}: not a raysweep checkpoint: {META_FILE} is missing or not JSON"
        ) from None
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT_VERSION:
        raise SpecError(f"{path}: not a raysweep checkpoint of format {_FORMAT_VERSION}")
    missing = {"config", "epoch", "history", "data_fingerprint", "sha256"} - meta.keys()
    if (
        missing
        or not isinstance(meta["sha256"], dict)
        or meta["sha256"].keys() != {WEIGHTS_FILE, OPTIMIZER_FILE}
    ):
        raise SpecError(
            f"{path}: not a raysweep checkpoint: {META_FILE} lacks {', '.join(sorted(missing)) or 'hashes'}"
        )
    for name, expected in meta["sha256"].items():
        if not (path / name).is_file() or _compute_file_sha256(path / name) != expected:
            what = f"{name} is truncated or altered (its sha256 is not the one in {META_FILE})"
            raise SpecError(f"{storage.uri_of(path)}: {what}; delete the folder")
    config = TrainingConfig.from_data(meta["config"], f"{path / META_FILE}", stored=True)
    return TrainingCheckpoint(path, config, meta["epoch"], meta["history"], meta)


class RunDirectory:
    """The folder of one training run: its checkpoints, of which the last and the best are kept."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def epoch_path(self, epoch: int) -> Path:
        return self.path / f"epoch-{epoch:04d}"

    @property
    def mid_epoch_path(self) -> Path:
        """An epoch that was left in its middle, if one was (see `training.pause`)."""
        return self.path / "half"

    @property
    def run_key(self) -> str:
        """Names this run among all, whatever its folder is called; made when first asked for."""
        file = self.path / "run.json"
        if not storage.pull_file(file):
            self.path.mkdir(parents=True, exist_ok=True)
            atomic_write_text(file, json.dumps({"key": uuid4().hex}))
            storage.push_to_bucket(file)
        return str(storage.read_json(file, ["key"])["key"])

    def list_saved_epochs(self) -> list[int]:
        """Finished epochs that have a checkpoint, ascending."""
        names = (
            name.removeprefix("epoch-")
            for name in storage.list_folders_containing(self.path)
            if name.startswith("epoch-")
        )
        return sorted(int(name) for name in names if name.isdecimal())

    def read_last_checkpoint(self) -> TrainingCheckpoint | None:
        epochs = self.list_saved_epochs()
        return read_checkpoint(self.epoch_path(epochs[-1])) if epochs else None

    def read_history(self) -> list[dict[str, float]]:
        """Rows of metrics of the finished epochs, those taken over included."""
        last = self.read_last_checkpoint()
        return last.history if last else []

    def prune_checkpoints(self, epochs_to_keep: set[int]) -> None:
        """Delete all checkpoints but those of the epochs in `keep`, and what interruptions and
        crashes left.
        """
        for epoch in self.list_saved_epochs():
            if epoch not in epochs_to_keep:
                storage.delete_remote(self.epoch_path(epoch))
                shutil.rmtree(self.epoch_path(epoch), ignore_errors=True)
        if self.mid_epoch_path.exists():
            storage.delete_remote(self.mid_epoch_path)
        for partial in (
            self.mid_epoch_path,
            *self.path.glob(".epoch-*"),
            *self.path.glob(".half*"),
        ):
            shutil.rmtree(partial, ignore_errors=True)


def _write_meta(
    folder: Path,
    config: TrainingConfig,
    history: list[dict[str, float]],
    data_fingerprint: str,
    sha256: dict[str, str],
) -> JsonDict:
    meta = {
        "format": _FORMAT_VERSION,
        "config": config.to_stored_dict(),
        "digest": config.digest(),
        "epoch": len(history),
        "history": history,
        "data_fingerprint": data_fingerprint,
        "environment": describe_environment(),
        "sha256": sha256,
    }
    (folder / META_FILE).write_text(json.dumps(meta, indent=1))
    return meta


@cache
def describe_environment() -> JsonDict:
    """Versions and source revision: what else decides a number."""
    packages = ("raysweep", "torch", "torchvision", "ray", "optuna", "mlflow", "numpy", "pyarrow")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "git_revision": _get_git_revision(),
        **{name: _get_package_version(name) for name in packages},
    }


def _get_package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _get_git_revision() -> str | None:
    """Revision of the checkout that this package runs from, with `-dirty` if it was changed."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _detach_contiguous(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _compute_file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
