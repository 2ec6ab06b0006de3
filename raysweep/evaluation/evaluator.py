"""`evaluate`: robust accuracy of a model under one or several attacks."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from raysweep.argument_types import accept_scalars, check_argument_type
from raysweep.attacks import (
    APGD,
    FAB,
    PGD,
    AttackCascade,
    AutoAttackVersion,
    MultiTargeted,
    Norm,
    SingleAttack,
    Square,
    build_named_attack,
)
from raysweep.evaluation.evaluation_runner import (
    EvaluationOptions,
    EvaluationRunner,
    run_shards_in_process,
)
from raysweep.evaluation.float32_precision import has_tf32
from raysweep.evaluation.progress import EvaluationProgress
from raysweep.evaluation.report import RobustnessReport
from raysweep.evaluation.shards import AnyArray, ShardMapper, ShardRunner
from raysweep.models.device import get_model_device
from raysweep.schedules import resolved_value
from raysweep.spec import SpecError, json_digest


@torch.inference_mode(False)
@torch.enable_grad()
@accept_scalars
def evaluate(
    model: nn.Module,
    x: Tensor | AnyArray,
    y: Tensor | AnyArray,
    attack: str | SingleAttack | AttackCascade = "autoattack",
    eps: float = 8 / 255,
    norm: Norm = "Linf",
    version: AutoAttackVersion = "standard",
    *,
    batch_size: int = 500,
    shards: int | None = None,
    seed: int = 0,
    index: Tensor | AnyArray | None = None,
    resume_dir: str | Path | None = None,
    map: ShardMapper | None = None,
    progress: Callable[[EvaluationProgress], None] | None = None,
    fold: bool = True,
    tile: int | None = None,
    keep_adversarial: bool = False,
) -> RobustnessReport:
    """Measure the robust accuracy of a model.

    The attacks run in order, each on the examples that no earlier attack broke. Every adversarial
    example is verified in float32 on the original model. Results do not depend on the batch size,
    the shards or the number of workers (on GPUs only if `tile` is set).

    Args:
        model: Maps images (N, C, H, W) float32 in [0, 1] to logits (N, classes). Its mode and
            parameters are not changed.
        x: Images, (N, C, H, W), floats in [0, 1] or uint8 in 0..255.
        y: Labels, (N,), whole numbers from 0.
        attack: A name of `raysweep list` (`autoattack`, `pgd20`, `pgd+`, `cw20`, ...), names of
            single attacks joined by commas, or an attack object.
        eps: Radius of a named attack, in pixels of [0, 1]. Not used with an attack object.
        norm: Norm of a named attack, "Linf" or "L2". Not used with an attack object.
        version: Version of `autoattack`: "standard", "plus", "rand" or "tf32".
        batch_size: Examples per attack call, 1 or more.
        shards: Number of parts into which each attack's rows are divided, 1 or more. By default it
            depends on `batch_size` and `map.width`.
        seed: Seed of the attacks.
        index: Ids of the examples, (N,) integers, 0..N-1 by default. The random numbers of an
            example depend on its id. Set it if `x` is a part of a data set, to get the results that
            these examples have in an evaluation of the whole data set.
        resume_dir: Folder in which results are stored, so that an interrupted evaluation resumes.
            Results are only reused for the same model, data, seed and settings.
        map: Runs the shards, for example `ProcessPoolMap(8)`; in this process by default.
        progress: Called after each shard.
        fold: Whether attacks run on a faster copy of the model with folded batch norms.
        tile: Compute on batches of exactly this many rows. With it, results do not depend on the
            batch even on devices whose kernels change with the batch size.
        keep_adversarial: Whether the report has the adversarial examples.

    Returns:
        Accuracies, results per example, costs and warnings.

    Raises:
        SpecError: If an argument is invalid, no attack can run on the model, or `resume_dir` has
            results of a model with other outputs.
    """
    options = EvaluationOptions(
        batch_size=batch_size,
        n_shards=shards,
        seed=seed,
        resume_dir=None if resume_dir is None else Path(resume_dir),
        shard_mapper=map or run_shards_in_process,
        on_progress=progress,
        fold=fold,
        tile=tile,
        keep_adversarial=keep_adversarial,
    )
    spec = build_named_attack(attack, eps, norm, version) if isinstance(attack, str) else attack
    _check_arguments(model, spec, options)
    attacks: dict[str, SingleAttack] = (
        spec.attacks if isinstance(spec, AttackCascade) else {spec.kind: spec}
    )
    eps, norm = _require_single_threat(attacks)
    shard_runner = _make_shard_runner(
        model,
        *_check_and_convert_inputs(x, y, index),
        tf32=_computes_in_tf32(spec),
        options=options,
    )
    runner = EvaluationRunner(shard_runner, options)
    runner.run(attacks, eps)
    executed = spec
    if runner.executed_attacks != attacks:
        # Built without validation, which rejects a cascade without attacks.
        executed = AttackCascade.model_construct(
            attacks=runner.executed_attacks, tf32=shard_runner.tf32
        )
    return _build_report(runner, executed, eps, norm)


def _check_arguments(
    model: object, attack: SingleAttack | AttackCascade, options: EvaluationOptions
) -> None:
    """Raise SpecError for a model, an attack or an option that cannot be used."""
    if not isinstance(model, nn.Module):
        raise SpecError(
            f"model must be a torch.nn.Module from images to logits, got {type(model).__name__}"
        )
    check_argument_type("seed", options.seed, (int,), "a whole number")
    counts = {"batch_size": options.batch_size, "shards": options.n_shards, "tile": options.tile}
    for name, value in counts.items():
        if value is not None:
            check_argument_type(name, value, (int,), "a whole number")
            if value < 1:
                raise SpecError(f"{name} must be 1 or more, got {value}")
    if not isinstance(attack, PGD | APGD | MultiTargeted | FAB | Square | AttackCascade):
        raise SpecError(
            "attack must be a name of `raysweep list` or a PGD, APGD, MultiTargeted, FAB, Square "
            f"or AttackCascade, got {type(attack).__name__}"
        )
    device = get_model_device(model)
    if _computes_in_tf32(attack) and not has_tf32(device):
        raise SpecError(f"tf32: there is no TF32 on {device.type}; use version 'standard'")


def _computes_in_tf32(attack: SingleAttack | AttackCascade) -> bool:
    """Return whether the attack computes in TF32."""
    return isinstance(attack, AttackCascade) and attack.tf32


def _make_shard_runner(
    model: nn.Module,
    images: AnyArray,
    labels: npt.NDArray[np.int64],
    ids: npt.NDArray[np.int64],
    *,
    tf32: bool,
    options: EvaluationOptions,
) -> ShardRunner:
    """Make the runner; its result folder is `resume_dir`/KEY (see `_compute_resume_key`)."""
    shard_runner = ShardRunner(
        model,
        images,
        labels,
        ids,
        seed=options.seed,
        batch_size=options.batch_size,
        fold=options.fold,
        tile=options.tile,
        tf32=tf32,
    )
    if options.resume_dir is not None:
        shard_runner.result_dir = options.resume_dir / _compute_resume_key(shard_runner)
    return shard_runner


def _build_report(
    runner: EvaluationRunner, executed: SingleAttack | AttackCascade, eps: float, norm: Norm
) -> RobustnessReport:
    """Assemble the report of a finished evaluation."""
    keep_adversarial = runner.options.keep_adversarial
    return RobustnessReport(
        attack=executed.to_json_dict(),
        eps=eps,
        norm=norm,
        seed=runner.options.seed,
        index=runner.shard_runner.index,
        labels=runner.shard_runner.y,
        predicted=runner.clean.predicted,
        robust_after=runner.robust_after,
        broken_by=runner.broken_by,
        margin_before=runner.clean.margin,
        margin_after=runner.margin,
        perturbation=runner.perturbation_norm,
        queries=runner.queries,
        cost=runner.costs,
        warnings=tuple(runner.warnings),
        masking_gap=_compute_masking_gap(runner.executed_attacks, runner.robust_after),
        x_adv=runner.assemble_adversarial_images() if keep_adversarial else None,
    )


def _to_array(values: Tensor | AnyArray) -> AnyArray:
    """Convert a tensor or sequence into a NumPy array."""
    if not isinstance(values, Tensor):
        return np.asarray(values)
    if values.is_meta:
        raise SpecError("x, y and index must have values, got a tensor on the device 'meta'")
    values = values.detach().cpu().to_dense()
    # NumPy has no bfloat16.
    return np.asarray(values.float() if values.dtype == torch.bfloat16 else values)


def _check_and_convert_inputs(
    x: Tensor | AnyArray, y: Tensor | AnyArray, index: Tensor | AnyArray | None
) -> tuple[AnyArray, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return images, labels and ids as arrays; SpecError if they are not images with labels."""
    for name, values in (("x", x), ("y", y)):
        if isinstance(values, DataLoader | Dataset):
            raise SpecError(
                f"{name} is a {type(values).__name__}: give one tensor, for example "
                "torch.cat([images for images, labels in loader])"
            )
    images, labels = _to_array(x), _to_array(y)
    if images.ndim == 0 or not _has_real_numbers(images):
        raise SpecError(f"x must be images (N, C, H, W) as numbers, got {_describe_values(x)}")
    if labels.ndim == 0 or not _has_real_numbers(labels):
        raise SpecError(f"y must be whole numbers (N,), got {_describe_values(y)}")
    ids = np.arange(len(labels)) if index is None else _to_array(index)
    problems = _find_shape_problems(images, labels, ids)
    if not np.array_equal(labels, labels.astype(np.int64)):
        problems.append("y must be whole numbers, one class for each example")
    if not len(images):
        problems.append("there are no examples to evaluate on")
    elif images.dtype != np.uint8 and not (images.min() >= 0 and images.max() <= 1):
        problem = f"x must lie in [0, 1] (or be uint8), got {images.min()} to {images.max()}"
        if images.min() >= 0 and 1.5 < images.max() <= 255:
            problem += ": give x / 255"
        problems.append(problem)
    if problems:
        raise SpecError(problems)
    images = images if images.dtype == np.uint8 else images.astype(np.float32)
    return np.ascontiguousarray(images), labels.astype(np.int64), ids.astype(np.int64)


def _has_real_numbers(values: AnyArray) -> bool:
    """Return whether an array has integers or floats."""
    return np.issubdtype(values.dtype, np.integer) or np.issubdtype(values.dtype, np.floating)


def _describe_values(values: object) -> str:
    """Describe wrong values by their type, such as `Tensor of torch.bool`."""
    dtype = getattr(values, "dtype", None)
    return type(values).__name__ + ("" if dtype is None else f" of {dtype}")


def _find_shape_problems(images: AnyArray, labels: AnyArray, ids: AnyArray) -> list[str]:
    """Return one line for each wrong shape."""
    problems = []
    if images.ndim != 4:
        problems.append(f"x must be (N, C, H, W), got shape {images.shape}")
    n_images = len(images)
    if labels.ndim == 2 and len(labels) == n_images:
        remedy = "y[:, 0]"
        if labels.shape[1] > 1:
            remedy = "y.argmax(1), if it is one-hot"
        problems.append(f"y must be class numbers (N,), got shape {labels.shape}: give {remedy}")
    elif labels.shape != images.shape[:1] or ids.shape != labels.shape:
        problems.append(
            f"x, y and index must have the same length, got {n_images}, {labels.shape}, {ids.shape}"
        )
    return problems


def _require_single_threat(attacks: dict[str, SingleAttack]) -> tuple[float, Norm]:
    """Return eps and norm of the attacks; SpecError if they differ."""
    threats = {(resolved_value(attack.eps), attack.norm) for attack in attacks.values()}
    if len(threats) > 1:
        raise SpecError(
            f"the attacks of one evaluation must share eps and norm, got {sorted(threats)}"
        )
    return threats.pop()


def _compute_resume_key(shard_runner: ShardRunner) -> str:
    """Return a digest of everything on which results depend, except the attack.

    Weights are hashed tensor by tensor, with their names, types and shapes.
    """
    weights, data = hashlib.sha256(repr(shard_runner.model).encode()), hashlib.sha256()
    for name, value in shard_runner.model.state_dict().items():
        if isinstance(value, Tensor):
            weights.update(
                name.encode() + str(value.dtype).encode() + str(tuple(value.shape)).encode()
            )
            weights.update(
                value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
        else:
            # The extra state of a module may be any object.
            weights.update(name.encode() + repr(value).encode())
    for array in (shard_runner.x, shard_runner.y, shard_runner.index):
        data.update(str((array.dtype, array.shape)).encode() + array.tobytes())
    settings = [
        shard_runner.seed,
        shard_runner.fold,
        shard_runner.tile,
        shard_runner.tf32,
        get_model_device(shard_runner.model).type,
    ]
    return json_digest([weights.hexdigest(), data.hexdigest(), settings])


def _compute_masking_gap(
    attacks: dict[str, SingleAttack], robust_after: dict[str, npt.NDArray[np.bool_]]
) -> float | None:
    """Return the accuracy after the first attack minus the accuracy after all attacks.

    None if there is only one attack or the first is not PGD or APGD on the cross-entropy.
    """
    first = next(iter(robust_after))
    attack = attacks.get(first)
    if len(robust_after) == 1 or not (isinstance(attack, PGD | APGD) and attack.loss == "ce"):
        return None
    return float(robust_after[first].mean() - list(robust_after.values())[-1].mean())
