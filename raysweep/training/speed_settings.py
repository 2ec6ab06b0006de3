"""Settings of training speed. Tests compare the results with those of the plain computation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from raysweep.lazy_modules import torch
from raysweep.spec import Spec, SpecError

Precision = Literal["float32", "bf16"]
AutoOrBool = Literal["auto"] | bool


class ComputeSpec(Spec):
    """Faster ways to compute training steps. Evaluation never uses them.

    bf16 means autocast to bfloat16; the last layer, losses, instance weights and the update stay in
    float32. CPUs without AVX-512 BF16 or AMX emulate bf16 and are slower with it than with float32.
    """

    channels_last: AutoOrBool = "auto"
    """Store images and weights in the channels-last memory format. `auto` means true. Results
    change by rounding only."""

    fold: AutoOrBool = "auto"
    """Fold batch norms into convolutions for attacks in eval mode. `auto` means true. Results
    change by rounding only."""

    tf32: AutoOrBool = "auto"
    """Compute float32 convolutions and matrix products in TF32. `auto` means true on NVIDIA GPUs
    and false on other devices."""

    attack: Precision = "float32"
    """Precision of the forward and backward passes of attacks."""

    train: Precision = "float32"
    """Precision of the forward and backward passes that update the weights."""

    compile: bool = False
    """Use torch.compile, which takes minutes at the start. On NVIDIA GPUs it records a CUDA graph
    for each batch size."""

    def resolve(self, device: torch.device) -> ComputeSpec:
        """Replace each `auto` by its value for a device.

        Args:
            device: Device on which the model is trained.

        Returns:
            The settings without `auto`.

        Raises:
            SpecError: `tf32` is true, but the device has no TF32.
        """
        from raysweep.evaluation.float32_precision import has_tf32

        supports_tf32 = has_tf32(device)
        if self.tf32 is True and not supports_tf32:
            raise SpecError(
                f"compute.tf32 = true: there is no TF32 on {device.type}; leave it to auto"
            )
        auto_values = {"channels_last": True, "fold": True, "tf32": supports_tf32}
        changes = {name: on for name, on in auto_values.items() if getattr(self, name) == "auto"}
        return self.replace(**changes)


def emulates_bf16(device: torch.device) -> bool:
    """Return whether a device computes bf16 by other types: False where that is not known."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    cpu_facts = Path("/proc/cpuinfo")
    if device.type != "cpu" or not cpu_facts.is_file():
        return False
    text = cpu_facts.read_text(encoding="utf-8", errors="replace")
    # ARM and other processors name their features otherwise.
    return "flags" in text and not {"avx512_bf16", "amx_bf16"} & set(text.split())
