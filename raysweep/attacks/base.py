"""What every attack takes, returns and promises."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysweep.rng import ExampleRng
from raysweep.schedules import bounds
from raysweep.spec import Spec, SpecError

Norm = Literal["Linf", "L2"]
VulnerabilityKind = Literal["probability", "margin"]


@dataclass(frozen=True)
class AttackResult:
    """An attack's result; rows stand in the order of the input.

    x: (N, C, H, W) in [0, 1]; queries: forward passes spent on each row, (N,) int64; kappa: (N,)
    int64, iterates still classified correctly (G alg. 1), in 0..K, from attacks that count it.
    """

    x_adv: Tensor
    queries: Tensor
    kappa: Tensor | None = None


class Attack(Protocol):
    """(model, x, y, rng) -> Adversarial. Stateless; the model comes out as it went in."""

    @property
    def vulnerability_kind(self) -> VulnerabilityKind:
        """How vulnerability to this attack is measured (see `vulnerability`)."""
        ...

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng) -> AttackResult: ...


@contextmanager
def freeze_model(model: nn.Module, mode: Literal["eval", "train"] = "eval") -> Iterator[nn.Module]:
    """The model in `mode` with parameters that need no gradient; both restored at the end."""
    modes = [(module, module.training) for module in model.modules()]
    needed = [p for p in model.parameters() if p.requires_grad]
    model.train(mode == "train")
    for parameter in needed:
        parameter.requires_grad_(False)
    try:
        yield model
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training


@contextmanager
def fp32_precision(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """What convolutions and matrix products on NVIDIA's GPUs make of float32."""
    settings: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = precision
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def maybe_tf32(enabled: bool) -> AbstractContextManager[None]:
    """`float32_as("tf32")` if it is wanted, else whatever holds around it."""
    return fp32_precision("tf32") if enabled else nullcontext()


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether reading a value of x does not make the host wait for a device."""
    return tensor.device.type == "cpu"


def masked_assign_(target: Tensor, mask: Tensor, values: Tensor) -> None:
    """Write those rows (a bool mask (N,)) of `values` into `into`, in place."""
    if is_on_cpu(target):
        which = mask.nonzero()[:, 0]
        if len(which):
            target.index_copy_(0, which, values.index_select(0, which))
    else:
        torch.where(mask.view(-1, *(1,) * (target.dim() - 1)), values, target, out=target)


def true_class_margin(scores: Tensor, y: Tensor) -> Tensor:
    """z_y - max_{i != y} z_i, (N,): positive where the row is classified correctly."""
    true = scores.gather(1, y[:, None])[:, 0]
    return true - scores.scatter(1, y[:, None], -torch.inf).amax(1)


def true_class_confidence(logits: Tensor, y: Tensor, kind: VulnerabilityKind) -> Tensor:
    """V of LRAT, (N,), small where the row is vulnerable.

    probability: p_y, in [0, 1] (L eq. 8); margin: p_y - max_{i != y} p_i, in [-1, 1] (L eq. 9).
    """
    p = F.softmax(logits, 1)
    return true_class_margin(p, y) if kind == "margin" else p.gather(1, y[:, None])[:, 0]


AttackT = TypeVar("AttackT", bound=Spec)


def check_eps_range(attack: AttackT) -> AttackT:
    """A validator for specs with `eps` and `norm`: 8 for 8/255 is this field's mistake."""
    largest = max(bounds(attack.eps))  # type: ignore[attr-defined]
    if attack.norm == "Linf" and largest > 1:  # type: ignore[attr-defined]
        raise SpecError(
            f"eps = {largest:g}: epsilon means pixels in [0, 1]; did you mean {largest:g}/255?"
        )
    return attack


def l2_norms(delta: Tensor) -> Tensor:
    """Euclidean norm of each row as (N, 1, 1, 1)."""
    lengths: Tensor = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
    return lengths


def project_to_ball(x_adv: Tensor, x: Tensor, eps: float, norm: Norm) -> Tensor:
    """x_adv moved into the eps-ball round x and then into [0, 1]."""
    if norm == "Linf":
        return x_adv.clamp(x - eps, x + eps).clamp(0, 1)
    delta = x_adv - x
    return (x + delta * (eps / l2_norms(delta).clamp_min(1e-12)).clamp_max(1.0)).clamp(0, 1)


def steepest_ascent_direction(grad: Tensor, norm: Norm) -> Tensor:
    """Steepest ascent of unit length in `norm`."""
    return grad.sign() if norm == "Linf" else grad / l2_norms(grad).clamp_min(1e-12)
