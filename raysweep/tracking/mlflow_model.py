"""Checkpoints as models of MLflow, for `mlflow.pyfunc.load_model` and `mlflow models serve`.

MLflow imports this module to load a model: it reads safetensors and JSON, and unpickles nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.bounded_files import read_regular_file
from raysweep.errors import DamagedFileError, SpecError
from raysweep.lazy_modules import torch
from raysweep.training.checkpoint import TrainingCheckpoint, export_weights, read_checkpoint
from raysweep.yaml_files import parse_yaml

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from raysweep.data import DatasetSplits

MODEL_FOLDER = "checkpoint"
"""Folder of the weights in the artifacts of a run."""
_MLMODEL_FILE = "MLmodel"
_FLAVOR = "raysweep"
_MAX_SIZE = 2**20
# Images that the network receives at a time: a request may have thousands.
_BATCH_SIZE = 256


def write_mlflow_model(
    checkpoint: TrainingCheckpoint, dataset: DatasetSplits | None, folder: Path
) -> None:
    """Write a checkpoint without its momentum, as a model of MLflow.

    Args:
        checkpoint: The checkpoint.
        dataset: Data set of the training, which has the shape of the images; None to write a
            checkpoint that only raysweep can load.
        folder: New folder.
    """
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import add_to_model
    from mlflow.types.schema import Schema, TensorSpec

    export_weights(checkpoint, folder)
    if dataset is None:
        return
    float32 = np.dtype("float32")
    shape = (-1, *dataset.test.x.shape[1:])
    model = Model(
        signature=ModelSignature(
            Schema([TensorSpec(float32, shape)]),
            Schema([TensorSpec(float32, (-1, dataset.classes))]),
        )
    )
    add_to_model(model, loader_module=__name__)
    model.add_flavor(_FLAVOR, channels=dataset.channels, classes=dataset.classes)
    model.save(str(folder / _MLMODEL_FILE))


class ImageClassifier:
    """A network as MLflow calls it.

    Args:
        model: Maps images in [0, 1], (N, C, H, W), to logits; in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> np.ndarray:
        """Classify images.

        Args:
            model_input: Images with pixels in [0, 1], (N, C, H, W) float32.
            params: Not used.

        Returns:
            Logits, (N, classes) float32.

        Raises:
            SpecError: Pixels are outside of [0, 1], as those of 0..255 are.
        """
        x = torch.as_tensor(model_input, dtype=torch.float32)
        if len(x) and not (float(x.min()) >= 0 and float(x.max()) <= 1):
            raise SpecError(
                f"images have pixels from {float(x.min()):g} to {float(x.max()):g}; expected "
                "[0, 1]: divide by 255"
            )
        device = next(self._model.parameters()).device
        with torch.inference_mode():
            parts = [
                self._model(part.to(device)).float().cpu() for part in torch.split(x, _BATCH_SIZE)
            ]
        logits: np.ndarray = torch.cat(parts).numpy()
        return logits


def _load_pyfunc(path: str) -> ImageClassifier:
    """Load a model for MLflow, which calls this function by its name.

    Args:
        path: Folder of `write_mlflow_model`.

    Returns:
        The model, on the GPU if there is one.

    Raises:
        SpecError: Its network is in a file of somebody's code, which is not imported.
        DamagedFileError: A file is damaged; one line.
    """
    folder = Path(path)
    channels, classes = _read_sizes(folder / _MLMODEL_FILE)
    checkpoint = read_checkpoint(folder)
    try:
        model = checkpoint.config.model.build_model(channels, classes, 0)
    except SpecError as error:
        raise error.with_prefix(f"{path}: ") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ImageClassifier(checkpoint.load_weights(model).to(device).eval())


def _read_sizes(file: Path) -> tuple[int, int]:
    """Return the numbers of channels and classes in a file that anybody may have written."""
    content = parse_yaml(read_regular_file(file).decode(), str(file))
    try:
        flavor = content["flavors"][_FLAVOR]
        channels, classes = flavor["channels"], flavor["classes"]
    except (KeyError, TypeError) as error:
        raise DamagedFileError(f"{file}: is no model of raysweep") from error
    for name, value in {"channels": channels, "classes": classes}.items():
        if type(value) is not int or not 1 <= value <= _MAX_SIZE:
            raise DamagedFileError(f"{file}: {name} = {value!r} is no size of a network")
    return channels, classes
