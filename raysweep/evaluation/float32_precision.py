"""Precision of float32 arithmetic on a device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
