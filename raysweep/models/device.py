"""Device of a model, and the random numbers that a model draws there."""

from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def seeded_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Give torch's own generators of the CPU and of a device a seed in the block, and their former
    state after it.

    Args:
        seed: The seed.
        device: The device of a model.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        # torch.manual_seed would also seed the other GPUs, and where CUDA is not in use, each call
        # keeps the stack of its caller for good.
        torch.default_generator.manual_seed(seed)
        for used in devices:
            with torch.cuda.device(used):
                torch.cuda.manual_seed(seed)
        yield
