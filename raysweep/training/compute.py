"""How the numbers of a training run are computed: settings of speed, each held to the plain
computation by a test.
"""

from typing import Literal

import torch

from raysweep.evaluation.device_precision import has_tf32
from raysweep.spec import Spec, SpecError

Precision = Literal["float32", "bf16"]
AutoOrBool = Literal["auto"] | bool


class ComputeSpec(Spec):
    """Fast paths of training; with all of them off it is the plain computation. Evaluation never
    uses them.

    channels_last: the layout of images and weights in memory. fold: attacks in eval mode face a
    network whose batch norms are folded into its convolutions. Both change float32 results by
    rounding only, and `auto` is on. tf32: float32 convolutions and matrix products in TF32; `auto`
    is on where there are units for it (NVIDIA's GPUs). attack, train: the precision of forwards and
    backwards of attacks, and of those that update the weights. bf16 is autocast; the last layer,
    losses, instance weights and the update stay in float32. Processors without AVX-512 BF16 or AMX
    emulate it, more slowly than float32. compile: by torch.compile, which takes minutes at the
    start; on NVIDIA's GPUs as CUDA graphs, one for each size of batch.
    """

    channels_last: AutoOrBool = "auto"
    fold: AutoOrBool = "auto"
    tf32: AutoOrBool = "auto"
    attack: Precision = "float32"
    train: Precision = "float32"
    compile: bool = False

    def resolve(self, device: torch.device) -> "ComputeSpec":
        """With `auto` decided for a device. Raises SpecError for what the device has not."""
        nvidia = has_tf32(device)
        if self.tf32 is True and not nvidia:
            raise SpecError(
                f"compute.tf32 = true: there is no TF32 on {device.type}; leave it to auto"
            )
        decided = {"channels_last": True, "fold": True, "tf32": nvidia}
        return self.replace(
            **{name: on for name, on in decided.items() if getattr(self, name) == "auto"}
        )
