"""Device of a model, and the precision of float32 arithmetic on it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from raysweep.attacks import fp32_precision


@contextmanager
def disable_tf32_and_autocast(device: torch.device) -> Iterator[None]:
    """Context manager in which float32 operations compute in full float32.

    Args:
        device: The device whose autocast is disabled.

    Yields:
        Nothing.
    """
    with fp32_precision("ieee"), torch.autocast(device.type, enabled=False):
        yield


def has_tf32(device: torch.device) -> bool:
    """Return whether a device may compute in TF32.

    Args:
        device: The device.

    Returns:
        True for a GPU if PyTorch is built for CUDA. Whether the GPU is new enough is not checked.
    """
    return device.type == "cuda" and torch.version.cuda is not None


def get_model_device(model: nn.Module) -> torch.device:
    """Return the device of a model.

    Args:
        model: The model.

    Returns:
        The device of its first parameter, else of its first buffer, else the CPU.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
