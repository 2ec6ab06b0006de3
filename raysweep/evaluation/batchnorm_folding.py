"""Fold batch norms into the convolutions before them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode

# Relative to the largest logit: what folding may change before it is left out.
FOLDING_TOLERANCE = 1e-4


def fold_batch_norms(model: nn.Module, x: Tensor) -> int:
    """Fold, in place, each batch norm that takes a convolution's output in a forward of x; how many
    were folded.
    """
    pairs = find_foldable_batch_norms(model, x)
    for norm, conv in pairs.items():
        fused = fuse_conv_bn_eval(model.get_submodule(conv), model.get_submodule(norm))  # type: ignore[arg-type,type-var]
        model.set_submodule(conv, fused)
        model.set_submodule(norm, nn.Identity())
    return len(pairs)


def find_foldable_batch_norms(model: nn.Module, x: Tensor) -> dict[str, str]:
    """Names {batch norm: convolution} where, in a forward of x, the one alone takes the other's
    output, each once.
    """
    names = {module: name for name, module in model.named_modules()}
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: dict[_BatchNorm, nn.Conv2d] = {}
    calls: dict[nn.Module, int] = {}
    uses = _TensorUseCounter()

    def seen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            outputs[id(output)] = (module, output)
            uses.use_counts[id(output)] = 0
        elif isinstance(module, _BatchNorm) and id(inputs[0]) in outputs:
            pairs[module] = outputs[id(inputs[0])][0]

    hooks = [
        module.register_forward_hook(seen)
        for module in names
        if isinstance(module, (nn.Conv2d, _BatchNorm))
    ]
    try:
        with torch.no_grad(), uses:
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    shared = {conv for number, (conv, _) in outputs.items() if uses.use_counts[number] > 1}
    return {
        names[norm]: names[conv]
        for norm, conv in pairs.items()
        if calls[norm] == calls[conv] == 1 and conv not in shared
        if norm.track_running_stats and names[norm] and names[conv]
    }


class _TensorUseCounter(TorchFunctionMode):
    """How often each tensor, by its id, goes into a function that gives a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.use_counts: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            for value in (*args, *(kwargs or {}).values()):
                for item in value if isinstance(value, (list, tuple)) else (value,):
                    self.use_counts[id(item)] = self.use_counts.get(id(item), 0) + 1
        return out


def _has_same_logits(model: nn.Module, folded_model: nn.Module, x: Tensor) -> bool:
    """Whether the folded model `other` gives the same outputs as `one`, up to FOLDING_TOLERANCE."""
    with torch.no_grad():
        a = model(x)
        try:
            b = folded_model(x)
        except AttributeError:  # The model itself reads a part that was folded away.
            return False
    return bool((a - b).abs().max() <= FOLDING_TOLERANCE * a.abs().max())
