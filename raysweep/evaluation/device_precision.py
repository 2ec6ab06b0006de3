"""Devices of models, and the precision of their float32 arithmetic."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from raysweep.attacks import fp32_precision


@contextmanager
def disable_tf32_and_autocast(device: torch.device) -> Iterator[None]:
    """float32 that is float32: no TF32, no autocast."""
    with fp32_precision("ieee"), torch.autocast(device.type, enabled=False):
        yield


def has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.cuda is not None


def get_model_device(model: nn.Module) -> torch.device:
    """Where the model's parameters (or buffers) are."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
