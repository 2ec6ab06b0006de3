"""Device of a model."""

import torch
from torch import nn


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
