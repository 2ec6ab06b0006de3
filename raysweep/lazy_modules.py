"""PyTorch and other large libraries, imported when one of their names is first used.

Importing them takes seconds. Modules that define settings take them from here and use them only
inside functions, so that commands that print names or reject a setting answer at once. Such modules
have `from __future__ import annotations`, because annotations are not evaluated then.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["F", "LazyModule", "np", "safetensors_torch", "torch"]


class LazyModule(ModuleType):
    """Stands for a module, and imports it when one of its attributes is first read."""

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the module, as it is now."""
        return getattr(import_module(self.__name__), name)


if TYPE_CHECKING:
    import numpy as np
    import safetensors.torch as safetensors_torch
    import torch
    import torch.nn.functional as F
else:
    np = LazyModule("numpy")
    torch = LazyModule("torch")
    F = LazyModule("torch.nn.functional")
    safetensors_torch = LazyModule("safetensors.torch")
