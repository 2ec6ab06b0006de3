"""Models to evaluate: from a checkpoint of ours, or from a user's own code."""

import importlib
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from raysweep import storage
from raysweep.data import Dataset, load_data
from raysweep.spec import SpecError, apply_overrides
from raysweep.training import checkpoint
from raysweep.training.checkpoint import META_FILE, RunDirectory, TrainingCheckpoint
from raysweep.training.config import TrainingConfig
from raysweep.training.epoch_metrics import find_best_epoch


@dataclass(frozen=True)
class EvaluationTarget:
    """What is evaluated: a model in eval mode, what it is called, and its checkpoint and data if it
    is one of ours.
    """

    model: nn.Module
    name: str
    checkpoint: TrainingCheckpoint | None = None
    data: Dataset | None = None

    @property
    def config(self) -> TrainingConfig | None:
        return self.checkpoint.config if self.checkpoint else None


def load_checkpoint_target(path: Path, overrides: Mapping[str, Any]) -> EvaluationTarget:
    """From a checkpoint's folder, or from a run's (its best epoch), its data changed by {setting of
    `data`: value}.

    Raises SpecError in one line.
    """
    where = storage.uri_of(path)
    if path.is_file():
        raise SpecError(
            f"{where}: is a file; give the folder of a checkpoint, or module:factory of your own code to load it"
        )
    if not path.is_dir() and not storage.is_bucket_copy(path):
        raise SpecError(
            f"{where}: no such folder; give a sweep, a trial, a checkpoint, an MLflow run or module:factory"
        )
    if not storage.pull_checkpoint(path):
        last = RunDirectory(path).read_last_checkpoint()
        if last is None:
            raise SpecError(
                f"{where}: neither a checkpoint (no {META_FILE}) nor a run (no epoch-* folders)"
            )
        path = RunDirectory(path).epoch_path(find_best_epoch(last.config, last.history))
    saved = checkpoint.read_checkpoint(path)
    spec = apply_overrides(saved.config.data, overrides)
    data = load_data(spec.replace(unlabeled=None) if spec.unlabeled else spec)
    return EvaluationTarget(
        load_trained_model(saved, data), _format_checkpoint_name(path), saved, data
    )


def _format_checkpoint_name(path: Path) -> str:
    """RUN/epoch-0004, with its sweep's name before it if the run is a trial, which is a mere
    number.
    """
    run = path.parent
    sweep = [run.parent.parent.name] if run.parent.name == "trials" else []
    return "/".join([*sweep, run.name, path.name])


def load_trained_model(checkpoint: TrainingCheckpoint, data: Dataset) -> nn.Module:
    """The checkpoint's network with its weights, in eval mode. Raises SpecError if the data are not
    what they were.
    """
    if (
        checkpoint.config.data.unlabeled is None
        and data.fingerprint != checkpoint.meta["data_fingerprint"]
    ):
        name = checkpoint.config.data.name
        raise SpecError(
            f"{checkpoint.path}: was trained on other {name!r} data (fingerprint {checkpoint.meta['data_fingerprint']})"
        )
    return checkpoint.load_weights(
        checkpoint.config.model.build_model(data.channels, data.classes, 0)
    ).eval()


def load_factory_target(import_path: str) -> EvaluationTarget:
    """`module:factory`: call a user's own function for an nn.Module from [0, 1] images to logits."""
    module, _, factory = import_path.partition(":")
    # For good: processes that are to unpickle the model look for its class there too.
    sys.path.insert(0, str(Path.cwd()))
    try:
        model = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise SpecError(f"{import_path}: cannot be imported: {error}") from None
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        line = " ".join(str(error).split())
        raise SpecError(
            f"{import_path}: {type(error).__name__}: {line} ({where.filename}:{where.lineno})"
        ) from None
    if not isinstance(model, nn.Module):
        raise SpecError(f"{import_path}: gave {type(model).__name__}, not a torch.nn.Module")
    return EvaluationTarget(model.eval(), import_path)
