"""PyTorch and other large libraries, imported when one of their names is first used.

Importing them takes seconds. Modules that define settings take them from here and use them only
inside functions, so that commands that print names or reject a setting answer at once. Such modules
have `from __future__ import annotations`, because annotations are not evaluated then.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["F", "LazyModule", "np", "safetensors_torch", "torch"]


class LazyModule(ModuleType):
    """Stands for a module, and imports it when one of its attributes is first read."""

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the module, as it is now."""
        module = import_module(self.__name__)
        if not self.__dict__.get("_is_replaced"):
            self._is_replaced = True
            self._replace_by(module)
        return getattr(module, name)

    def _replace_by(self, module: ModuleType) -> None:
        """Put the module itself into all of raysweep's modules that have this object.

        A lookup through this object takes ten times as long as one in the module, and the loops of
        attacks make thousands.
        """
        package = __name__.partition(".")[0]
        for name, user in list(sys.modules.items()):
            if name.startswith(f"{package}."):
                names = vars(user)
                names.update({key: module for key, value in names.items() if value is self})


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
