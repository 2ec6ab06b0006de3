"""evaluate: attack after attack over shards of the examples that are still robust."""

import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raysweep.attacks import (
    APGD,
    FAB,
    PGD,
    AttackCascade,
    AutoAttackVersion,
    Norm,
    SingleAttack,
    Square,
    attack_by_name,
)
from raysweep.evaluation import model_inspection
from raysweep.evaluation.device_precision import (
    disable_tf32_and_autocast,
    get_model_device,
    has_tf32,
)
from raysweep.evaluation.progress import EvaluationProgress
from raysweep.evaluation.report import AttackCost, RobustnessReport
from raysweep.evaluation.shards import AnyArray, Shard, ShardResult, ShardRunner
from raysweep.rng import ExampleRng
from raysweep.schedules import resolved_value
from raysweep.spec import SpecError, json_digest

ShardMapper = Callable[[Callable[[Shard], ShardResult], Sequence[Shard]], Iterable[ShardResult]]
# Examples that the checks before the attacks look at.
N_INSPECTED_EXAMPLES = 256
# Where the number of shards is left to us: several for each worker, so that a slow one does not
# hold up the rest, but none of fewer rows than make up for what a step costs however many there
# are.
SHARDS_PER_WORKER, MIN_SHARD_ROWS = 4, 256


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
    """Robust accuracy of `model` (images in [0, 1], (N, C, H, W) -> logits) on x, float in [0, 1]
    or uint8, and y.

    attack: a preset (`autoattack` in its `version`, `pgd20`, `pgd+`, `cw20`, ...) at eps and norm,
    names of official attacks joined by commas, or an attack with settings of its own. index:
    lasting ids of the examples, which name their random numbers. map: runs shards (a function of
    Ray's, say), in this process by default; shards: into how many each attack's rows are cut, by
    default as batch size and `map.width` suggest. tile: compute on exactly so many rows, for
    verdicts independent of the batch on devices whose kernels change with the batch size.
    """
    if not isinstance(model, nn.Module):
        raise SpecError(
            f"model must be a torch.nn.Module from images to logits, got {type(model).__name__}"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise SpecError(
            "model is TorchScript, which cannot be copied: give the nn.Module that it was made of"
        )
    for name, number in (("batch_size", batch_size), ("shards", shards)):
        if number is not None and number < 1:
            raise SpecError(f"{name} must be 1 or more, got {number}")
    spec = attack_by_name(attack, eps, norm, version) if isinstance(attack, str) else attack
    if not isinstance(spec, PGD | APGD | FAB | Square | AttackCascade):
        raise SpecError(
            "attack must be a name of `raysweep list` or a PGD, APGD, FAB, Square or WorstCase, "
            f"got {type(spec).__name__}"
        )
    attacks: dict[str, SingleAttack] = (
        spec.attacks if isinstance(spec, AttackCascade) else {spec.kind: spec}
    )
    eps, norm = _require_single_threat(attacks)
    tf32, device = isinstance(spec, AttackCascade) and spec.tf32, get_model_device(model)
    if tf32 and not has_tf32(device):
        raise SpecError(f"tf32: there is no TF32 on {device.type}; use version 'standard'")
    arrays = _check_and_convert_inputs(x, y, index)
    work = ShardRunner(
        model, *arrays, seed=seed, batch_size=batch_size, fold=fold, tile=tile, tf32=tf32
    )
    if resume_dir is not None:
        work.result_dir = Path(resume_dir) / _compute_resume_key(work)
    run = _EvaluationRunner(work, map or _map_in_process, shards, progress)
    nature = run.inspect_first_examples(eps, attacks.values())
    model_inspection.check_labels(work.y, nature.n_classes)
    warnings = list(nature.warnings)

    clean = run.run_clean_pass(is_random_model=nature.is_random)
    warnings += filter(None, [model_inspection.find_collapse_warning(clean.predicted, work.y)])
    robust_after: dict[str, npt.NDArray[np.bool_]] = {}
    ran: dict[str, SingleAttack] = {}
    costs: dict[str, AttackCost] = {}
    for name, planned in attacks.items():
        before = float(run.is_robust.mean())
        suited, told = model_inspection.adapt_attack(planned, nature)
        if told is not None:
            warnings.append(f"{name}: {told}")
        if suited is not None:
            ran[name], costs[name] = suited, run.run_attack(name, suited)
        robust_after[name] = run.is_robust.copy()
        if isinstance(planned, Square) and not all(isinstance(a, Square) for a in ran.values()):
            warnings += filter(
                None,
                [model_inspection.find_square_masking_warning(before, float(run.is_robust.mean()))],
            )

    return RobustnessReport(
        attack=(
            spec if ran == attacks else AttackCascade.model_construct(attacks=ran, tf32=tf32)
        ).to_json_dict(),
        eps=eps,
        norm=norm,
        seed=seed,
        index=work.index,
        labels=work.y,
        predicted=clean.predicted,
        robust_after=robust_after,
        broken_by=run.broken_by,
        margin_before=clean.margin,
        margin_after=run.margin,
        perturbation=run.perturbation_norm,
        queries=run.queries,
        cost=costs,
        warnings=tuple(warnings),
        masking_gap=_compute_masking_gap(ran, robust_after),
        x_adv=run.assemble_adversarial_images() if keep_adversarial else None,
    )


class _EvaluationRunner:
    """The state of one evaluation: what is known of every example so far."""

    def __init__(
        self,
        shard_runner: ShardRunner,
        shard_mapper: ShardMapper,
        n_shards: int | None,
        on_progress: Callable[[EvaluationProgress], None] | None,
    ) -> None:
        count = len(shard_runner.y)
        self.shard_runner, self.shard_mapper, self.n_shards, self.on_progress = (
            shard_runner,
            shard_mapper,
            n_shards,
            on_progress,
        )
        self.broken_by = np.full(count, "", dtype=f"<U{64}")
        self.perturbation_norm = np.zeros(count, np.float32)
        self.margin = np.zeros(count, np.float32)
        self.queries = np.zeros(count, np.int64)
        self.x_adv_by_position: dict[int, npt.NDArray[np.float32]] = {}

    @property
    def is_robust(self) -> npt.NDArray[np.bool_]:
        robust: npt.NDArray[np.bool_] = self.broken_by == ""
        return robust

    def inspect_first_examples(
        self, eps: float, attacks: Collection[SingleAttack]
    ) -> model_inspection.ModelProperties:
        rows = np.arange(min(len(self.shard_runner.y), N_INSPECTED_EXAMPLES))
        x, y = self.shard_runner.get_device_tensors(rows)
        rng = ExampleRng.for_examples(
            torch.from_numpy(self.shard_runner.index[rows]).to(x.device),
            self.shard_runner.seed,
            "checks",
        )
        with disable_tf32_and_autocast(x.device):
            return model_inspection.inspect_model(self.shard_runner.model, x, y, rng, eps, attacks)

    def run_clean_pass(self, is_random_model: bool) -> ShardResult:
        """The clean pass; rows that are wrong already are done. Refuses to resume what another
        model left.
        """
        clean = _concatenate_results(
            list(self._iter_shard_results("clean", None, np.arange(len(self.shard_runner.y))))
        )
        self._record_result("clean", clean)
        if self.shard_runner.result_dir is not None:
            kept = ShardResult.load_npz(self.shard_runner.result_dir / "clean.npz")
            if kept is None:
                clean.save_npz(self.shard_runner.result_dir / "clean.npz")
            elif not is_random_model and not _has_same_margins(kept.margin, clean.margin):
                raise SpecError(
                    f"{self.shard_runner.result_dir} holds the results of a model with the same weights that answers differently; "
                    "choose another folder"
                )
        return clean

    def run_attack(self, attack_name: str, attack: SingleAttack) -> AttackCost:
        """Run one attack on what is still robust, taking over what an earlier run has finished."""
        began, live = time.monotonic(), np.flatnonzero(self.is_robust)
        queries = 0
        for outcome in self._iter_shard_results(attack_name, attack, live):
            self._record_result(attack_name, outcome)
            queries += int(outcome.queries.sum())
        return AttackCost(len(live), queries, time.monotonic() - began)

    def assemble_adversarial_images(self) -> npt.NDArray[np.float32]:
        """x, and in its place the adversarial example where there is one."""
        x: npt.NDArray[np.float32] = self.shard_runner.x.astype(np.float32)
        x = x / np.float32(255) if self.shard_runner.x.dtype == np.uint8 else x
        for position, x_adv in self.x_adv_by_position.items():
            x[position] = x_adv
        return x

    def _iter_shard_results(
        self, attack_name: str, attack: SingleAttack | None, positions: npt.NDArray[np.int64]
    ) -> Iterable[ShardResult]:
        done = 0
        if attack is not None:
            for outcome in self.shard_runner.load_finished_results(
                Shard(attack_name, attack, positions)
            ):
                done += len(outcome.positions)
                yield outcome
                positions = np.setdiff1d(positions, outcome.positions)
        total = done + len(positions)
        if not len(positions):
            return
        items = [
            Shard(attack_name, attack, part)
            for part in np.array_split(positions, self._choose_shard_count(len(positions)))
        ]
        for outcome in self.shard_mapper(self.shard_runner, items):
            yield outcome
            done += len(outcome.positions)
            if self.on_progress is not None:
                self.on_progress(
                    EvaluationProgress(
                        attack_name, done, total, int(self.is_robust.sum()), len(self.is_robust)
                    )
                )

    def _choose_shard_count(self, n_rows: int) -> int:
        """As many shards as were asked for; else none above a batch, and each worker of `map` (its
        `width`) as many.
        """
        if self.n_shards is not None:
            return min(self.n_shards, n_rows)
        width = getattr(self.shard_mapper, "width", 1)
        turns = min(SHARDS_PER_WORKER, n_rows // (MIN_SHARD_ROWS * width)) if width > 1 else 1
        return min(
            n_rows,
            width * max(1, turns, math.ceil(n_rows / (self.shard_runner.batch_size * width))),
        )

    def _record_result(self, attack_name: str, result: ShardResult) -> None:
        at = result.positions
        self.queries[at] += result.queries
        worse = result.broken | (result.margin < self.margin[at]) | (attack_name == "clean")
        self.margin[at[worse]], self.perturbation_norm[at[worse]] = (
            result.margin[worse],
            result.norm[worse],
        )
        self.broken_by[at[result.broken]] = attack_name
        if len(result.x_adv):
            self.x_adv_by_position |= dict(
                zip(at[result.broken].tolist(), result.x_adv, strict=True)
            )


def _map_in_process(
    run_shard: Callable[[Shard], ShardResult], shards: Sequence[Shard]
) -> Iterable[ShardResult]:
    return (run_shard(shard) for shard in shards)


def _check_and_convert_inputs(
    x: Tensor | AnyArray, y: Tensor | AnyArray, index: Tensor | AnyArray | None
) -> tuple[AnyArray, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Images, labels and ids as plain arrays. Raises SpecError for what cannot be images in [0, 1]."""
    images, labels = (np.asarray(a.detach().cpu() if isinstance(a, Tensor) else a) for a in (x, y))
    ids = (
        np.arange(len(labels))
        if index is None
        else np.asarray(index.cpu() if isinstance(index, Tensor) else index)
    )
    problems = []
    if images.ndim != 4:
        problems.append(f"x must be (N, C, H, W), got shape {images.shape}")
    if labels.shape != images.shape[:1] or ids.shape != labels.shape:
        problems.append(
            f"x, y and index must have the same length, got {len(images)}, {labels.shape}, {ids.shape}"
        )
    if not (
        np.issubdtype(labels.dtype, np.number) and np.array_equal(labels, labels.astype(np.int64))
    ):
        problems.append("y must be whole numbers, one class for each example")
    if not len(images):
        problems.append("there are no examples to evaluate on")
    elif images.dtype != np.uint8 and not (images.min() >= 0 and images.max() <= 1):
        problems.append(
            f"x must lie in [0, 1] (or be uint8), got {images.min():g} to {images.max():g}"
        )
    if problems:
        raise SpecError(problems)
    images = images if images.dtype == np.uint8 else images.astype(np.float32)
    return np.ascontiguousarray(images), labels.astype(np.int64), ids.astype(np.int64)


def _has_same_margins(
    saved_margins: npt.NDArray[np.float32], current_margins: npt.NDArray[np.float32]
) -> bool:
    """Whether these are margins of one model on the same rows, but for rounding; some may be no
    numbers.
    """
    close = 1e-3 * float(np.ptp(current_margins[np.isfinite(current_margins)]))
    return np.allclose(saved_margins, current_margins, rtol=1e-3, atol=close, equal_nan=True)


def _require_single_threat(attacks: dict[str, SingleAttack]) -> tuple[float, Norm]:
    """The one threat model of all attacks."""
    threats = {(resolved_value(attack.eps), attack.norm) for attack in attacks.values()}
    if len(threats) > 1:
        raise SpecError(
            f"the attacks of one evaluation must share eps and norm, got {sorted(threats)}"
        )
    return threats.pop()


def _compute_resume_key(shard_runner: ShardRunner) -> str:
    """Names everything that outcomes depend on, but the attack."""
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
            # A module's extra state may be anything.
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


def _concatenate_results(results: list[ShardResult]) -> ShardResult:
    """Outcomes of a whole pass as one, in the order of the rows."""
    order = np.argsort(np.concatenate([o.positions for o in results]))
    rows = {
        name: np.concatenate([getattr(o, name) for o in results])[order]
        for name in ("positions", "broken", "predicted", "margin", "norm", "queries")
    }
    return ShardResult(**rows, x_adv=results[0].x_adv, classes=results[0].classes)


def _compute_masking_gap(
    attacks: dict[str, SingleAttack], robust_after: dict[str, npt.NDArray[np.bool_]]
) -> float | None:
    """Accuracy under (A)PGD on the cross-entropy, if that comes first of several, minus the worst
    case.
    """
    first = next(iter(robust_after))
    attack = attacks.get(first)
    if len(robust_after) == 1 or not (isinstance(attack, PGD | APGD) and attack.loss == "ce"):
        return None
    return float(robust_after[first].mean() - list(robust_after.values())[-1].mean())
