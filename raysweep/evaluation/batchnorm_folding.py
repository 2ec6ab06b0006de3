"""Folding of batch norms into the convolutions before them.

In eval mode a batch norm is an affine map per channel. It can be merged into the weights of the
convolution before it, which saves one pass over the activations.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode


def fold_batch_norms_(model: nn.Module, x: Tensor) -> int:
    """Fold, in place, the batch norms that `find_foldable_batch_norms` finds.

    Args:
        model: A model in eval mode.
        x: Example images, (N, C, H, W), on the device of the model.

    Returns:
        The number of batch norms folded.
    """
    conv_of_norm = find_foldable_batch_norms(model, x)
    for norm, conv in conv_of_norm.items():
        fused = fuse_conv_bn_eval(model.get_submodule(conv), model.get_submodule(norm))  # type: ignore[arg-type,type-var]
        model.set_submodule(conv, fused)
        model.set_submodule(norm, nn.Identity())
    return len(conv_of_norm)


def find_foldable_batch_norms(model: nn.Module, x: Tensor) -> dict[str, str]:
    """Find the batch norms that can be folded, by observing one forward pass.

    A batch norm can be folded if it is the only consumer of a convolution's output, both run
    exactly once, it uses running statistics, and the convolution's weight is a plain parameter.

    Args:
        model: The model. It is not changed.
        x: Example images, (N, C, H, W), on the device of the model.

    Returns:
        Module name of each such batch norm -> module name of its convolution.
    """
    names = {module: name for name, module in model.named_modules()}
    # Keeping the tensors alive keeps their ids unique.
    conv_outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    conv_of_norm: dict[_BatchNorm, nn.Conv2d] = {}
    n_calls: dict[nn.Module, int] = {}
    counter = _TensorUseCounter()

    def record_call(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Record, as a forward hook, outputs of convolutions and inputs of batch norms."""
        n_calls[module] = n_calls.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            conv_outputs[id(output)] = (module, output)
            counter.use_counts[id(output)] = 0
        elif isinstance(module, _BatchNorm) and id(inputs[0]) in conv_outputs:
            conv_of_norm[module] = conv_outputs[id(inputs[0])][0]

    hooks = [
        module.register_forward_hook(record_call)
        for module in names
        if isinstance(module, (nn.Conv2d, _BatchNorm))
    ]
    try:
        with torch.no_grad(), counter:
            model(x.clone())
    finally:
        for hook in hooks:
            hook.remove()
    shared_convs = {
        conv for tensor_id, (conv, _) in conv_outputs.items() if counter.use_counts[tensor_id] > 1
    }
    foldable = {}
    for norm, conv in conv_of_norm.items():
        runs_once = n_calls[norm] == n_calls[conv] == 1
        is_affine = norm.track_running_stats and not norm.training and _has_plain_weight(conv)
        # The name is empty if the layer is the model itself, which `set_submodule` cannot replace.
        can_replace = bool(names[norm] and names[conv])
        if runs_once and conv not in shared_convs and is_affine and can_replace:
            foldable[names[norm]] = names[conv]
    return foldable


def _has_plain_weight(conv: nn.Conv2d) -> bool:
    """Return whether nothing computes the weight, as weight and spectral norms and pruning do."""
    return type(conv) is nn.Conv2d and "weight" in conv._parameters and not conv._forward_pre_hooks


class _TensorUseCounter(TorchFunctionMode):
    """Counts, by tensor id, the functions that take a tensor and return a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.use_counts: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if isinstance(output, Tensor):
            for value in (*args, *kwargs.values()):
                # torch.cat and similar functions take a list of tensors.
                items = value if isinstance(value, (list, tuple)) else (value,)
                for item in items:
                    self.use_counts[id(item)] = self.use_counts.get(id(item), 0) + 1
        return output
