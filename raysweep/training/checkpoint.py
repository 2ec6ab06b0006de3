"""Checkpoints: a folder of safetensors and JSON, written whole or not at all, read without unpickling."""

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
from raysweep.files import whole_folder, write_whole
from raysweep.spec import Json, SpecError
from raysweep.training.config import RunConfig

WEIGHTS, STATE, META = "weights.safetensors", "state.safetensors", storage.META
_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint on disk. epoch counts finished epochs; history has one row of metrics for each."""

    path: Path
    config: RunConfig
    epoch: int
    history: list[dict[str, float]]
    meta: Json

    @property
    def metrics(self) -> dict[str, float]:
        return self.history[-1]

    def load_model(self, model: nn.Module) -> nn.Module:
        model.load_state_dict(load_file(self.path / WEIGHTS))
        return model

    def load_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Weights and momentum: training goes on as if it had never stopped."""
        self.load_model(model)
        self.load_optimizer(model, optimizer)

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Momentum buffers by parameter name."""
        state = load_file(self.path / STATE)
        for name, parameter in model.named_parameters():
            if name in state:
                # Laid out as the parameter, as it was when it was saved: other layouts round otherwise.
                optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(state[name])


def save(
    path: Path,
    config: RunConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, float]],
    data_fingerprint: str,
    also: Mapping[str, bytes] = MappingProxyType({}),
) -> Checkpoint:
    """Write a checkpoint at `path`; a crash at any moment leaves either none or all of it.

    also: more files, by name.
    """
    momentum = {
        name: optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in model.named_parameters()
        if optimizer.state[parameter].get("momentum_buffer") is not None
    }
    with whole_folder(path) as partial:
        save_file(_plain(model.state_dict()), partial / WEIGHTS)
        save_file(_plain(momentum), partial / STATE)
        for name, content in also.items():
            (partial / name).write_bytes(content)
        sha256 = {name: _sha256(partial / name) for name in (WEIGHTS, STATE)}
        meta = _write_meta(partial, config, history, data_fingerprint, sha256)
    storage.push(path)
    return Checkpoint(path, config, len(history), history, meta)


def adopt(path: Path, source: Path, config: RunConfig, history: list[dict[str, float]] | None = None) -> Checkpoint:
    """Another run's state as this run's checkpoint at `path`: the same files, linked where that can be, its own meta.

    Rows of `history` (by default the other run's) that were not trained here are marked `shared`, and cost nothing.
    """
    other = read(source)
    rows = other.history if history is None else [*history, other.metrics]
    known = 0 if history is None else len(history)
    rows = [*rows[:known], *({**row, "train/seconds": 0.0, "shared": 1.0} for row in rows[known:])]
    with whole_folder(path) as partial:
        for name in (WEIGHTS, STATE):
            link(source / name, partial / name)
        meta = _write_meta(partial, config, rows, other.meta["data_fingerprint"], other.meta["sha256"])
    storage.push(path, like=source)
    return Checkpoint(path, config, len(rows), rows, meta)


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read(path: Path) -> Checkpoint:
    """Check a checkpoint and read what it says of itself. Raises SpecError in one line for a foreign or damaged one."""
    storage.pull(path)
    return check(path)


def check(path: Path) -> Checkpoint:
    """`read`, of what is on this machine."""
    try:
        meta = json.loads((path / META).read_text())
    except (OSError, ValueError):
        raise SpecError(f"{storage.name(path)}: not a raysweep checkpoint: {META} is missing or not JSON") from None
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        raise SpecError(f"{path}: not a raysweep checkpoint of format {_FORMAT}")
    missing = {"config", "epoch", "history", "data_fingerprint", "sha256"} - meta.keys()
    if missing or not isinstance(meta["sha256"], dict) or meta["sha256"].keys() != {WEIGHTS, STATE}:
        raise SpecError(f"{path}: not a raysweep checkpoint: {META} lacks {', '.join(sorted(missing)) or 'hashes'}")
    for name, expected in meta["sha256"].items():
        if not (path / name).is_file() or _sha256(path / name) != expected:
            what = f"{name} is truncated or altered (its sha256 is not the one in {META})"
            raise SpecError(f"{storage.name(path)}: {what}; delete the folder")
    config = RunConfig.load(meta["config"], f"{path / META}")
    return Checkpoint(path, config, meta["epoch"], meta["history"], meta)


class Run:
    """The folder of one training run: its checkpoints, of which the last and the best are kept."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def at(self, epoch: int) -> Path:
        return self.path / f"epoch-{epoch:04d}"

    @property
    def half(self) -> Path:
        """An epoch that was left in its middle, if one was (see `training.pause`)."""
        return self.path / "half"

    @property
    def key(self) -> str:
        """Names this run among all, whatever its folder is called; made when first asked for."""
        file = self.path / "run.json"
        if not storage.pull_file(file):
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps({"key": uuid4().hex}))
            storage.push(file)
        return str(storage.read_json(file, ["key"])["key"])

    def epochs(self) -> list[int]:
        """Finished epochs that have a checkpoint, ascending."""
        names = (name.removeprefix("epoch-") for name in storage.folders(self.path) if name.startswith("epoch-"))
        return sorted(int(name) for name in names if name.isdecimal())

    def last(self) -> Checkpoint | None:
        epochs = self.epochs()
        return read(self.at(epochs[-1])) if epochs else None

    def history(self) -> list[dict[str, float]]:
        """Rows of metrics of the finished epochs, those taken over included."""
        last = self.last()
        return last.history if last else []

    def prune(self, keep: set[int]) -> None:
        """Delete all checkpoints but those of the epochs in `keep`, and what interruptions and crashes left."""
        for epoch in self.epochs():
            if epoch not in keep:
                storage.drop(self.at(epoch))
                shutil.rmtree(self.at(epoch), ignore_errors=True)
        if self.half.exists():
            storage.drop(self.half)
        for partial in (self.half, *self.path.glob(".epoch-*"), *self.path.glob(".half*")):
            shutil.rmtree(partial, ignore_errors=True)


def _write_meta(
    folder: Path, config: RunConfig, history: list[dict[str, float]], fingerprint: str, sha256: dict[str, str]
) -> Json:
    meta = {
        "format": _FORMAT,
        "config": config.json_dict(),
        "digest": config.digest(),
        "epoch": len(history),
        "history": history,
        "data_fingerprint": fingerprint,
        "environment": environment(),
        "sha256": sha256,
    }
    (folder / META).write_text(json.dumps(meta, indent=1))
    return meta


@cache
def environment() -> Json:
    """Versions and source revision: what else decides a number."""
    packages = ("raysweep", "torch", "torchvision", "ray", "optuna", "mlflow", "numpy", "pyarrow")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "git_revision": _git_revision(),
        **{name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Revision of the checkout that this package runs from, with `-dirty` if it was changed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _plain(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
