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
from raysweep.data import Data, load
from raysweep.spec import SpecError, override
from raysweep.training import checkpoint
from raysweep.training.checkpoint import META, Checkpoint, Run
from raysweep.training.config import RunConfig
from raysweep.training.trainer import best_epoch


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a model in eval mode, what it is called, and its checkpoint and data if it is one of ours."""

    model: nn.Module
    name: str
    checkpoint: Checkpoint | None = None
    data: Data | None = None

    @property
    def config(self) -> RunConfig | None:
        return self.checkpoint.config if self.checkpoint else None


def load_checkpoint(path: Path, changes: Mapping[str, Any]) -> Subject:
    """From a checkpoint's folder, or from a run's (its best epoch), its data changed by {setting of `data`: value}.

    Raises SpecError in one line.
    """
    where = storage.name(path)
    if path.is_file():
        raise SpecError(
            f"{where}: is a file; give the folder of a checkpoint, or module:factory of your own code to load it"
        )
    if not path.is_dir() and not storage.is_copy(path):
        raise SpecError(
            f"{where}: no such folder; give a sweep, a trial, a checkpoint, an MLflow run or module:factory"
        )
    if not storage.pull(path):
        last = Run(path).last()
        if last is None:
            raise SpecError(f"{where}: neither a checkpoint (no {META}) nor a run (no epoch-* folders)")
        path = Run(path).at(best_epoch(last.config, last.history))
    saved = checkpoint.read(path)
    spec = override(saved.config.data, changes)
    data = load(spec.model_copy(update={"unlabeled": None}) if spec.unlabeled else spec)
    return Subject(load_model(saved, data), _name(path), saved, data)


def _name(path: Path) -> str:
    """RUN/epoch-0004, with its sweep's name before it if the run is a trial, which is a mere number."""
    run = path.parent
    sweep = [run.parent.parent.name] if run.parent.name == "trials" else []
    return "/".join([*sweep, run.name, path.name])


def load_model(saved: Checkpoint, data: Data) -> nn.Module:
    """The checkpoint's network with its weights, in eval mode. Raises SpecError if the data are not what they were."""
    if saved.config.data.unlabeled is None and data.fingerprint != saved.meta["data_fingerprint"]:
        name = saved.config.data.name
        raise SpecError(
            f"{saved.path}: was trained on other {name!r} data (fingerprint {saved.meta['data_fingerprint']})"
        )
    return saved.load_model(saved.config.model.build(data.channels, data.classes, 0)).eval()


def load_factory(target: str) -> Subject:
    """`module:factory`: call a user's own function for an nn.Module from [0, 1] images to logits."""
    module, _, factory = target.partition(":")
    # For good: processes that are to unpickle the model look for its class there too.
    sys.path.insert(0, str(Path.cwd()))
    try:
        model = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise SpecError(f"{target}: cannot be imported: {error}") from None
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        line = " ".join(str(error).split())
        raise SpecError(f"{target}: {type(error).__name__}: {line} ({where.filename}:{where.lineno})") from None
    if not isinstance(model, nn.Module):
        raise SpecError(f"{target}: gave {type(model).__name__}, not a torch.nn.Module")
    return Subject(model.eval(), target)
