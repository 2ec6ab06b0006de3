"""Protocol and result of an attack, and the tensor helpers that attacks share.

Shapes: N rows (examples), C channels, H x W pixels. Images are float tensors (N, C, H, W) in
[0, 1], labels int64 tensors (N,). A row is broken once an attack has found an image in its ball
that the model misclassifies. "L eq." and "G eq." cite the papers of LRAT and GAIRAT.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from raysweep.lazy_modules import F, torch
from raysweep.rng import ExampleRng
from raysweep.schedules import bounding_values
from raysweep.spec import Spec, SpecError

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

Norm = Literal["Linf", "L2"]
VulnerabilityKind = Literal["probability", "margin"]


@dataclass(frozen=True)
class AttackResult:
    """Result of an attack; rows keep the order of the input.

    Attributes:
        x_adv: Adversarial images, (N, C, H, W) in [0, 1].
        queries: Number of forward passes spent on each row, (N,) int64.
        kappa: Number of iterates that were classified correctly, (N,) int64 in 0..steps (G alg. 1).
            None for attacks that do not count it.
    """

    x_adv: Tensor
    queries: Tensor
    kappa: Tensor | None = None


class Attack(Protocol):
    """Callable that searches adversarial images. It keeps no state between calls.

    Attacks of a method are specs, and need two more fields: `kind`, which selects the class, and
    `steps`, the largest possible kappa, which weights read. Attacks of an evaluation also need
    `eps` (radius in pixel values) and `norm`.
    """

    @property
    def vulnerability_kind(self) -> VulnerabilityKind:
        """Formula of the vulnerability V to this attack; see `true_class_confidence`."""
        ...

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng) -> AttackResult:
        """Attack a batch.

        Args:
            model: Maps images to logits (N, classes). Its mode and parameters are unchanged after
                the call.
            x: Natural images, (N, C, H, W) in [0, 1].
            y: True labels, (N,) int64.
            rng: Random numbers of the N rows.

        Returns:
            One image per row, also for rows that are not broken. Images must lie in the ball and
            in [0, 1]; an evaluation checks both.
        """
        ...


def set_mode(model: nn.Module, mode: bool) -> None:
    """Set a model to training or eval mode, if it has modes: exported programs have none.

    Args:
        model: The model.
        mode: Whether to set training mode.
    """
    try:
        model.train(mode)
    except NotImplementedError:
        logger.debug("%s has no training and eval mode", type(model).__name__)


def restore_mode(model: nn.Module, flags: list[tuple[nn.Module, bool]]) -> None:
    """Put back the mode of each module of a model.

    `train` is called first, because some models, such as LeViT, make caches in eval mode and drop
    them in training mode.

    Args:
        model: The model.
        flags: Pairs (module, whether it was in training mode), the model itself first.
    """
    if model.training != flags[0][1]:
        set_mode(model, flags[0][1])
    for module, training in flags:
        module.training = training


@contextmanager
def freeze_model(model: nn.Module, mode: Literal["eval", "train"] = "eval") -> Iterator[nn.Module]:
    """Context manager that sets the mode and turns off the gradients of all parameters.

    Both are restored on exit, for each module and parameter separately.

    Args:
        model: The model to freeze, in place.
        mode: Mode inside the context.

    Yields:
        The same model.
    """
    training_flags = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    set_mode(model, mode == "train")
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield model
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        restore_mode(model, training_flags)


@contextmanager
def fp32_precision(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Context manager that sets the float32 precision of cuBLAS and cuDNN, and restores it on exit.

    Args:
        precision: `ieee` for full float32; `tf32` for TF32, which is faster and less exact.

    Yields:
        Nothing.
    """
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
    previous = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = precision
    try:
        yield
    finally:
        for backend, value in zip(backends, previous, strict=True):
            backend.fp32_precision = value


def maybe_tf32(enabled: bool) -> AbstractContextManager[None]:
    """Return `fp32_precision("tf32")` if enabled, else a context manager that does nothing."""
    return fp32_precision("tf32") if enabled else nullcontext()


def is_on_cpu(tensor: Tensor) -> bool:
    """Return whether the tensor is on the CPU, where reading a value never waits for a device."""
    return tensor.device.type == "cpu"


def broadcast_rows(values: Tensor) -> Tensor:
    """Reshape values (N,) to (N, 1, 1, 1), which broadcasts over images (N, C, H, W)."""
    return values.view(-1, 1, 1, 1)


def masked_assign_(target: Tensor, mask: Tensor, values: Tensor) -> None:
    """Copy the masked rows of `values` into `target`, in place.

    Args:
        target: Tensor (N, ...).
        mask: Rows to copy, (N,) bool.
        values: Tensor of the shape of `target`.
    """
    if is_on_cpu(target):
        rows = mask.nonzero()[:, 0]
        if len(rows):
            target.index_copy_(0, rows, values.index_select(0, rows))
    else:
        # Indexing by a mask would make the host wait for the number of rows.
        torch.where(mask.view(-1, *(1,) * (target.dim() - 1)), values, target, out=target)


def true_class_margin(scores: Tensor, y: Tensor) -> Tensor:
    """Return the score of the true class minus the largest score of another class.

    Args:
        scores: Logits or probabilities, (N, classes).
        y: True labels, (N,) int64.

    Returns:
        s_y - max_{i != y} s_i, (N,): positive where the row is classified correctly.
    """
    true_scores = scores.gather(1, y[:, None])[:, 0]
    return true_scores - scores.scatter(1, y[:, None], -torch.inf).amax(1)


def soft_logit_margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return MMA's soft logit margin loss log sum_{i != y} exp(z_i) - z_y (Ding et al. 2020).

    Args:
        logits: Logits z, (N, classes).
        y: True labels, (N,) int64.

    Returns:
        The loss, (N,): negative where the probability of the true class is more than 1/2.
    """
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]


def true_class_confidence(logits: Tensor, y: Tensor, kind: VulnerabilityKind) -> Tensor:
    """Compute LRAT's V, which is small where the model is vulnerable to the attack.

    Args:
        logits: Logits of adversarial images, (N, classes).
        y: True labels, (N,) int64.
        kind: `probability` for p_y in [0, 1] (L eq. 8); `margin` for p_y - max_{i != y} p_i in
            [-1, 1] (L eq. 9).

    Returns:
        V of each row, (N,).
    """
    probabilities = F.softmax(logits, 1)
    if kind == "margin":
        return true_class_margin(probabilities, y)
    return probabilities.gather(1, y[:, None])[:, 0]


AttackT = TypeVar("AttackT", bound=Spec)


def check_eps_range(attack: AttackT) -> AttackT:
    """Reject a Linf eps above 1: users often type 8 for 8/255.

    Args:
        attack: Spec with the fields `eps` and `norm`, which uses this function as a validator.

    Returns:
        The same spec.

    Raises:
        SpecError: If any value of eps is above 1 and the norm is Linf.
    """
    max_eps = max(bounding_values(attack.eps))  # type: ignore[attr-defined]
    if attack.norm == "Linf" and max_eps > 1:  # type: ignore[attr-defined]
        raise SpecError(
            f"eps = {max_eps:g}: epsilon means pixels in [0, 1]; did you mean {max_eps:g}/255?"
        )
    return attack


def l2_norms(delta: Tensor) -> Tensor:
    """Return the Euclidean norm of each image (N, C, H, W) as (N, 1, 1, 1)."""
    norms: Tensor = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
    return norms


def project_to_ball(x_adv: Tensor, x: Tensor, eps: float, norm: Norm) -> Tensor:
    """Project images into the eps-ball around x, then clip them to [0, 1].

    Args:
        x_adv: Images to project, (N, C, H, W).
        x: Centers of the balls, (N, C, H, W) in [0, 1].
        eps: Radius of the balls in pixel values, at least 0.
        norm: Norm of the balls.

    Returns:
        New images, (N, C, H, W) in [0, 1].
    """
    if norm == "Linf":
        return x_adv.clamp(x - eps, x + eps).clamp(0, 1)
    delta = x_adv - x
    return (x + delta * (eps / l2_norms(delta).clamp_min(1e-12)).clamp_max(1.0)).clamp(0, 1)


def steepest_ascent_direction(grad: Tensor, norm: Norm) -> Tensor:
    """Return the step of length 1 in `norm` that raises the linearised loss most.

    Args:
        grad: Gradient of the loss at the images, (N, C, H, W).
        norm: Norm that measures the step.

    Returns:
        sign(grad) for Linf, grad / ||grad|| for L2, (N, C, H, W); 0 where the gradient is 0.
    """
    return grad.sign() if norm == "Linf" else grad / l2_norms(grad).clamp_min(1e-12)


def sample_on_sphere(x: Tensor, radius: float, norm: Norm, rng: ExampleRng) -> Tensor:
    """Sample points at distance `radius` from x, then clip them to [0, 1].

    Args:
        x: Centers of the spheres, (N, C, H, W) in [0, 1].
        radius: Distance in pixel values.
        norm: Norm of the distance. Directions are uniform in the cube for Linf, Gaussian for L2.
        rng: Random numbers of the N rows.

    Returns:
        The points, (N, C, H, W) in [0, 1]. Clipping may bring them closer than `radius`.
    """
    shape = tuple(x.shape[1:])
    if norm == "Linf":
        direction = rng.symmetric_uniform(shape, x.dtype)
        lengths = broadcast_rows(direction.flatten(1).abs().amax(1))
    else:
        direction = rng.normal(shape, x.dtype)
        lengths = l2_norms(direction)
    return (x + radius * direction / lengths.clamp_min(1e-12)).clamp(0, 1)
