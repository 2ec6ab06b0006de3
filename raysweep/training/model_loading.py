"""Loads models for evaluation: from a raysweep checkpoint, or from a user's own code."""

from __future__ import annotations

import importlib
import math
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.attacks import set_mode
from raysweep.data import DatasetSplits, DataSpec, load_data
from raysweep.data.known_folders import find_data_folder
from raysweep.lazy_modules import torch
from raysweep.spec import SpecError, apply_overrides
from raysweep.stores import META_FILE, Location, StorePath, open_path
from raysweep.training import checkpoint
from raysweep.training.checkpoint import RunDirectory, TrainingCheckpoint
from raysweep.training.config import TrainingConfig
from raysweep.training.selection import find_best_epoch

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class EvaluationTarget:
    """A model to evaluate.

    Attributes:
        model: Maps images in [0, 1], (N, C, H, W), to logits; in eval mode.
        name: Name for reports, such as `RUN/epoch-0004` or `module:factory`.
        checkpoint: Checkpoint of the model; None for a user's own code.
        data: Data of the checkpoint's config; None for a user's own code.
    """

    model: nn.Module
    name: str
    checkpoint: TrainingCheckpoint | None = None
    data: DatasetSplits | None = None

    @property
    def config(self) -> TrainingConfig | None:
        """Config of the checkpoint; None for a user's own code."""
        return self.checkpoint.config if self.checkpoint else None


def load_checkpoint_target(path: Location, overrides: Mapping[str, Any]) -> EvaluationTarget:
    """Load a checkpoint, or the best checkpoint of a run, with its data.

    Args:
        path: Folder of a checkpoint or of a run.
        overrides: Field of the data spec -> value, to evaluate on other data.

    Returns:
        The model with its checkpoint and data.

    Raises:
        SpecError: There is no checkpoint, or the data differ; one line.
        DamagedFileError: The checkpoint is damaged; one line.
    """
    path = open_path(path)
    local_path = path.local_path
    if local_path is not None and local_path.is_file():
        raise SpecError(
            f"{path}: is a file; give the folder of a checkpoint, or module:factory of your own "
            "code to load it"
        )
    if local_path is not None and not local_path.is_dir():
        raise SpecError(
            f"{path}: no such folder; give a sweep, a trial, a checkpoint, an MLflow run or "
            "module:factory"
        )
    if path.fetch_checkpoint() is None:
        last = RunDirectory(path).read_last_checkpoint()
        if last is None:
            raise SpecError(
                f"{path}: neither a checkpoint (no {META_FILE}) nor a run (no epoch-* folders)"
            )
        path = RunDirectory(path).epoch_path(_choose_best_epoch(last, path))
    saved = checkpoint.read_checkpoint(path)
    data = load_data(_choose_data_spec(saved, overrides))
    return EvaluationTarget(
        load_trained_model(saved, data), _format_checkpoint_name(path), saved, data
    )


def replace_data_folder(saved: TrainingCheckpoint) -> TrainingConfig:
    """Return a checkpoint's config with the folder of the data that this user has named.

    The checkpoint may come from anybody: neither its folder nor its `download` is used.

    Args:
        saved: The checkpoint.

    Returns:
        The config; `data.data_dir` is None if the user has read no such data yet.
    """
    folder = find_data_folder(saved.meta["data_fingerprint"])
    data = saved.config.data.replace(data_dir=folder, download=False)
    return saved.config.replace(data=data)


def _choose_data_spec(saved: TrainingCheckpoint, overrides: Mapping[str, Any]) -> DataSpec:
    """Return the data of an evaluation; SpecError if the user has to name their folder."""
    spec = apply_overrides(replace_data_folder(saved).data, {"unlabeled": None, **overrides})
    if spec.data_dir is None and saved.config.data.data_dir is not None and spec.name != "digits":
        raise SpecError(
            f"{saved.path}: was trained on {spec.name!r} data in {saved.config.data.data_dir}; a "
            "folder that a checkpoint names is not used: give it as --data-dir (in Python: "
            "data_dir) if you know it"
        )
    return spec


def _choose_best_epoch(last: TrainingCheckpoint, run_path: StorePath) -> int:
    """Return the best epoch that has a checkpoint, by the rule of the version that trained it."""
    if checkpoint.SELECTION_KEY in last.meta:
        saved_epochs = RunDirectory(run_path).list_saved_epochs()
        return find_best_epoch(last.config, last.history, saved_epochs)
    objective = last.config.validation.objective
    scores = [metrics.get(objective, -math.inf) for metrics in last.history]
    return scores.index(max(scores)) + 1


def _format_checkpoint_name(path: StorePath) -> str:
    """Return RUN/epoch-NNNN; SWEEP/TRIAL/epoch-NNNN for a trial or repeat, whose folder is a
    number.
    """
    run = path.parent
    sweep = [run.parent.parent.name] if run.parent.name in ("trials", "repeats") else []
    return "/".join([*sweep, run.name, path.name])


def load_trained_model(checkpoint: TrainingCheckpoint, data: DatasetSplits) -> nn.Module:
    """Build a checkpoint's network with its weights, in eval mode.

    Args:
        checkpoint: The checkpoint.
        data: Data set of the training; it has the number of channels and classes. Its fingerprint
            is compared with the checkpoint's, unless the run used unlabeled data.

    Returns:
        The model; it maps images in [0, 1], (N, C, H, W), to logits.

    Raises:
        SpecError: The data are not those of the training, or the network is a function of a
            code file that was not given.
    """
    config, fingerprint = checkpoint.config, checkpoint.meta["data_fingerprint"]
    if config.data.unlabeled is None and data.fingerprint != fingerprint:
        raise SpecError(
            f"{checkpoint.path}: was trained on other {config.data.name!r} data "
            f"(fingerprint {fingerprint})"
        )
    try:
        model = config.model.build_model(data.channels, data.classes, 0)
    except SpecError as error:
        raise error.with_prefix(f"{checkpoint.path}: ") from error
    return checkpoint.load_weights(model).eval()


def load_factory_target(import_path: str) -> EvaluationTarget:
    """Load a model from a user's own code.

    Args:
        import_path: `module:factory`. The factory takes no arguments and returns a torch.nn.Module
            that maps images in [0, 1], (N, C, H, W), to logits. The module may be in the current
            folder.

    Returns:
        The model in eval mode.

    Raises:
        SpecError: The factory cannot be imported or fails, or returns something else; one line.
    """
    module, _, factory = import_path.partition(":")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        model = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise SpecError(f"{import_path}: cannot be imported: {error}") from error
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = " ".join(str(error).split())
        raise SpecError(
            f"{import_path}: {type(error).__name__}: {message} ({frame.filename}:{frame.lineno})"
        ) from error
    finally:
        # Unpickling the model imports its class from there. At the end of the path, because other
        # files of the folder must not take the place of libraries that are imported later.
        sys.path.remove(folder)
        sys.path.append(folder)
    if not isinstance(model, torch.nn.Module):
        raise SpecError(f"{import_path}: gave {type(model).__name__}, not a torch.nn.Module")
    # Not `model.eval()`: some models' `train` returns nothing, and exported programs have no modes.
    set_mode(model, False)
    return EvaluationTarget(model, import_path)
