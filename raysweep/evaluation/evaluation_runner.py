"""Runs the attacks of one evaluation, each on the examples that are still robust."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from raysweep.attacks import SingleAttack, Square
from raysweep.evaluation.float32_precision import disable_tf32_and_autocast
from raysweep.evaluation.model_inspection import (
    ModelProperties,
    adapt_attack,
    check_labels,
    find_all_wrong_warning,
    find_collapse_warning,
    find_square_masking_warning,
    inspect_model,
)
from raysweep.evaluation.progress import EvaluationProgress
from raysweep.evaluation.report import AttackCost
from raysweep.evaluation.shards import Shard, ShardMapper, ShardResult, ShardRunner
from raysweep.rng import ExampleRng
from raysweep.schedules import resolved_value
from raysweep.spec import SpecError

# Examples on which the model is inspected before the attacks.
N_INSPECTED_EXAMPLES = 256
# By default each worker gets several shards, so that one slow shard does not delay the end. A shard
# has at least MIN_SHARD_ROWS rows if there are enough, because each attack step also has a cost
# that does not depend on the number of rows.
SHARDS_PER_WORKER, MIN_SHARD_ROWS = 4, 256
_MAX_ATTACK_NAME_LENGTH = 64


@dataclass(frozen=True)
class EvaluationOptions:
    """Keyword arguments of `evaluate`, which documents them.

    Attributes:
        batch_size: Examples per attack call.
        n_shards: Number of shards of each attack; None to choose it.
        seed: Seed of the attacks.
        resume_dir: Folder of stored results, or None.
        shard_mapper: Runs the shards.
        on_progress: Called after each shard, or None.
        fold: Whether attacks run on a faster copy of the model.
        tile: Compute on batches of exactly this many rows, or None.
        keep_adversarial: Whether the report has the adversarial examples.
    """

    batch_size: int
    n_shards: int | None
    seed: int
    resume_dir: Path | None
    shard_mapper: ShardMapper
    on_progress: Callable[[EvaluationProgress], None] | None
    fold: bool
    tile: int | None
    keep_adversarial: bool


class EvaluationRunner:
    """State of one evaluation of N examples.

    Attributes:
        shard_runner: Computes one shard.
        options: Options of the evaluation.
        clean: Predictions on the clean images; set by `run`.
        broken_by: Name of the attack that broke the example, "clean" if the clean image is
            misclassified, "" if it is robust so far, (N,).
        margin: z_y - max_{i != y} z_i at the adversarial example; for a robust example at the
            image of smallest margin that an attack returned, (N,).
        perturbation_norm: Distance of that image from the original, (N,).
        queries: Number of forward passes on the example, (N,).
        x_adv_by_position: Row number -> adversarial example (C, H, W), for broken rows.
        robust_after: Attack name -> (N,) bool, whether the example is robust after this attack.
        executed_attacks: Attack name -> attack that ran; it may differ from the planned one (see
            `adapt_attack`).
        costs: Attack name -> cost, for attacks that ran.
        warnings: Reasons why the result may be unreliable, one line each.
    """

    def __init__(self, shard_runner: ShardRunner, options: EvaluationOptions) -> None:
        self.shard_runner, self.options = shard_runner, options
        n = len(shard_runner.y)
        self.clean: ShardResult
        self.broken_by = np.full(n, "", dtype=f"<U{_MAX_ATTACK_NAME_LENGTH}")
        self.margin = np.zeros(n, np.float32)
        self.perturbation_norm = np.zeros(n, np.float32)
        self.queries = np.zeros(n, np.int64)
        self.x_adv_by_position: dict[int, npt.NDArray[np.float32]] = {}
        self.robust_after: dict[str, npt.NDArray[np.bool_]] = {}
        self.executed_attacks: dict[str, SingleAttack] = {}
        self.costs: dict[str, AttackCost] = {}
        self.warnings: list[str] = []

    @property
    def is_robust(self) -> npt.NDArray[np.bool_]:
        """Whether no attack has broken the example so far, (N,)."""
        robust: npt.NDArray[np.bool_] = self.broken_by == ""
        return robust

    def run(self, attacks: Mapping[str, SingleAttack], eps: float) -> None:
        """Inspect the model, predict the clean images, and run the attacks in order.

        Args:
            attacks: Attack name -> attack, in the order in which they run.
            eps: Radius of the attacks, in pixels of [0, 1].

        Raises:
            SpecError: If no attack can run on the model, a label has no logit, or the stored
                results are of a model with other outputs.
        """
        properties = self._inspect_first_examples(eps, attacks.values())
        labels = self.shard_runner.y
        check_labels(labels, properties.n_classes)
        self.warnings += properties.warnings
        self.clean = self._run_clean_pass(properties.is_random)
        self._add_warning(find_collapse_warning(self.clean.predicted, labels))
        self._add_warning(
            find_all_wrong_warning(self.clean.predicted, labels, properties.n_classes)
        )
        for name, attack in attacks.items():
            accuracy_before = float(self.is_robust.mean())
            self._run_adapted_attack(name, attack, properties)
            self.robust_after[name] = self.is_robust.copy()
            ran_white_box = any(not isinstance(a, Square) for a in self.executed_attacks.values())
            if isinstance(attack, Square) and ran_white_box:
                accuracy_after = float(self.is_robust.mean())
                self._add_warning(find_square_masking_warning(accuracy_before, accuracy_after))

    def assemble_adversarial_images(self) -> npt.NDArray[np.float32]:
        """Build one array of the adversarial examples of broken rows and the images of the others.

        Returns:
            (N, C, H, W) float32 in [0, 1].
        """
        x: npt.NDArray[np.float32] = self.shard_runner.x.astype(np.float32)
        x = x / np.float32(255) if self.shard_runner.x.dtype == np.uint8 else x
        for position, x_adv in self.x_adv_by_position.items():
            x[position] = x_adv
        return x

    def _add_warning(self, warning: str | None) -> None:
        """Add a warning unless it is None."""
        if warning is not None:
            self.warnings.append(warning)

    def _inspect_first_examples(
        self, eps: float, attacks: Collection[SingleAttack]
    ) -> ModelProperties:
        """Inspect the model on the first examples."""
        rows = np.arange(min(len(self.shard_runner.y), N_INSPECTED_EXAMPLES))
        x, y = self.shard_runner.get_device_tensors(rows)
        index = torch.from_numpy(self.shard_runner.index[rows]).to(x.device)
        rng = ExampleRng.for_examples(index, self.shard_runner.seed, "checks")
        with disable_tf32_and_autocast(x.device):
            return inspect_model(
                self.shard_runner.model,
                x,
                y,
                rng,
                eps,
                attacks,
                self.options.batch_size,
                self.options.tile,
            )

    def _run_clean_pass(self, is_random_model: bool) -> ShardResult:
        """Predict all clean images, and compare with the stored predictions of an earlier run."""
        positions = np.arange(len(self.shard_runner.y))
        clean = _concatenate_results(list(self._iter_shard_results("clean", None, positions)))
        self._record_result("clean", clean)
        result_dir = self.shard_runner.result_dir
        if result_dir is not None:
            file, key = result_dir / "clean.npz", self.shard_runner.key
            stored = ShardResult.load_npz(file, key)
            if stored is None or not stored.is_own:
                clean.save_npz(file, key)
            elif not is_random_model and not _has_same_margins(stored.result.margin, clean.margin):
                raise SpecError(
                    f"{result_dir} holds the results of a model with the same weights but other "
                    "outputs; choose another folder"
                )
        return clean

    def _run_adapted_attack(
        self, name: str, planned_attack: SingleAttack, properties: ModelProperties
    ) -> None:
        """Run an attack on the robust examples; replace or skip it if the model requires that."""
        attack, warning = adapt_attack(planned_attack, properties)
        if warning is not None:
            self.warnings.append(f"{name}: {warning}")
        if attack is None:
            return
        started_at, positions = time.monotonic(), np.flatnonzero(self.is_robust)
        if resolved_value(attack.eps) == 0:
            # The image itself is the only point of the ball.
            positions = positions[:0]
        queries = 0
        for result in self._iter_shard_results(name, attack, positions):
            self._record_result(name, result)
            queries += int(result.queries.sum())
        self.executed_attacks[name] = attack
        self.costs[name] = AttackCost(len(positions), queries, time.monotonic() - started_at)

    def _iter_shard_results(
        self, attack_name: str, attack: SingleAttack | None, positions: npt.NDArray[np.int64]
    ) -> Iterable[ShardResult]:
        """Yield the stored results of an attack, then compute and yield those of missing rows."""
        n_total = len(positions)
        if attack is not None:
            shard = Shard(attack_name, attack, positions)
            for result in self.shard_runner.load_finished_results(shard):
                yield result
                positions = np.setdiff1d(positions, result.positions)
        n_done = n_total - len(positions)
        if not len(positions):
            return
        parts = np.array_split(positions, self._choose_shard_count(len(positions)))
        shards = [Shard(attack_name, attack, part) for part in parts]
        for result in self.options.shard_mapper(self.shard_runner, shards):
            yield result
            n_done += len(result.positions)
            if self.options.on_progress is not None:
                is_robust = self.is_robust
                self.options.on_progress(
                    EvaluationProgress(
                        attack_name, n_done, n_total, int(is_robust.sum()), len(is_robust)
                    )
                )

    def _choose_shard_count(self, n_rows: int) -> int:
        """Return the number of shards for `n_rows` rows.

        By default it is a multiple of the mapper's width, large enough that no shard exceeds the
        batch size.
        """
        if self.options.n_shards is not None:
            return min(self.options.n_shards, n_rows)
        width = getattr(self.options.shard_mapper, "width", 1)
        shards_per_worker = 1
        if width > 1:
            shards_per_worker = min(SHARDS_PER_WORKER, n_rows // (MIN_SHARD_ROWS * width))
        n_batches_per_worker = math.ceil(n_rows / (self.options.batch_size * width))
        return min(n_rows, width * max(1, shards_per_worker, n_batches_per_worker))

    def _record_result(self, attack_name: str, result: ShardResult) -> None:
        """Update the state of each example with the result of one shard."""
        rows = result.positions
        self.queries[rows] += result.queries
        is_worse = result.broken | (result.margin < self.margin[rows]) | (attack_name == "clean")
        self.margin[rows[is_worse]] = result.margin[is_worse]
        self.perturbation_norm[rows[is_worse]] = result.norm[is_worse]
        broken_rows = rows[result.broken]
        self.broken_by[broken_rows] = attack_name
        if len(result.x_adv):
            self.x_adv_by_position |= dict(zip(broken_rows.tolist(), result.x_adv, strict=True))


def run_shards_in_process(
    run_shard: Callable[[Shard], ShardResult], shards: Sequence[Shard]
) -> Iterable[ShardResult]:
    """Run shards in order in this process: the default `ShardMapper`.

    Args:
        run_shard: Computes one shard.
        shards: The shards to run.

    Returns:
        An iterator over the results, in the order of the shards.
    """
    return (run_shard(shard) for shard in shards)


def _has_same_margins(
    stored_margins: npt.NDArray[np.float32], margins: npt.NDArray[np.float32]
) -> bool:
    """Return whether margins of the same rows are equal up to rounding. Both may have NaN."""
    tolerance = 1e-3 * float(np.ptp(margins[np.isfinite(margins)]))
    return np.allclose(stored_margins, margins, rtol=1e-3, atol=tolerance, equal_nan=True)


def _concatenate_results(results: list[ShardResult]) -> ShardResult:
    """Join the results of all shards of the clean pass, sorted by row number."""
    order = np.argsort(np.concatenate([result.positions for result in results]))
    rows = {
        name: np.concatenate([getattr(result, name) for result in results])[order]
        for name in ("positions", "broken", "predicted", "margin", "norm", "queries")
    }
    return ShardResult(**rows, x_adv=results[0].x_adv, classes=results[0].classes)
