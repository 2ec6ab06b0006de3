"""How long an epoch takes, from a few real steps that take a few seconds at most."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic

from raysweep.data import DatasetSplits, count_batches
from raysweep.evaluation.attack_model import MIN_BATCH_ROWS, make_attack_model
from raysweep.lazy_modules import torch
from raysweep.rng import ExampleRng
from raysweep.sweep.resources import Resources
from raysweep.training.config import TrainingConfig
from raysweep.training.model_variants import ModelVariants
from raysweep.training.trainer import build_model_variants, compute_step_gradients

LIMIT_SECONDS = 3.0
"""Wall seconds after which the estimate for one training config is given up. Networks for small
images need a tenth of a second on a CPU; a ResNet-18 needs one to two seconds."""
# Share of a batch that is timed first; it gives the estimate if the whole batch takes too long.
_SMALL_SHARE = 1 / 16
# Batch norms need several rows.
_MIN_ROWS = 4


class _TimeLimitReached(BaseException):
    """The limit is reached. Not an Exception: checks of a model would blame the model for it."""


def estimate_epoch_seconds(
    config: TrainingConfig,
    data: DatasetSplits,
    resources: Resources,
    n_steps: int = 2,
    share_of_limit: float = 1.0,
) -> float | None:
    """Estimate the seconds of an epoch, with its share of validation, from a few real steps.

    Each of several workers processes its share of a batch and of the validation split. The time
    that workers spend on communication is not included, and torch.compile is not used.

    Args:
        config: Training config; its last epoch is timed, after every burn-in.
        data: Data to take the steps on.
        resources: What a trial holds, such as its number of threads.
        n_steps: Number of steps to time after one that warms up.
        share_of_limit: Share of `LIMIT_SECONDS` that this estimate may take, in (0, 1]. A step on a
            whole batch that takes longer is estimated from a step on a few rows of the batch.

    Returns:
        Seconds of one epoch of one worker. None if even a step on a few rows takes longer than the
        limit, or if the trials use a GPU and this machine has none, or the reverse.
    """
    has_gpu = torch.cuda.is_available()
    if bool(resources.n_gpus) != has_gpu:
        return None
    device = torch.device("cuda" if has_gpu else "cpu")
    config = config.replace(compute=config.compute.replace(compile=False))
    data = data.to(device)
    with _torch_threads(resources.threads_per_worker):
        if has_gpu:
            # Loads libraries, which may take longer than all steps together.
            torch.nn.functional.conv2d(*torch.ones(2, 1, 1, 1, 1, device=device))
        limit_seconds = share_of_limit * LIMIT_SECONDS
        end = monotonic() + limit_seconds
        try:
            with _limit_forward_passes(end):
                variants = build_model_variants(config, data, device)
        except _TimeLimitReached:
            return None
        variants.model.train()
        step_seconds = _time_training_step(config, data, variants, resources.workers, n_steps, end)
        if step_seconds is None:
            return None
        n_examples = count_validated_examples(config, data) / resources.workers
        end = max(end, monotonic() + limit_seconds / 2)
        validation_seconds = _time_validation(config, data, variants, n_examples, end)
    if validation_seconds is None:
        return None
    n_validations = sum(config.is_validated(epoch) for epoch in range(config.epochs))
    return (
        step_seconds * count_batches(len(data.train), config.batch_size)
        + validation_seconds * n_validations / config.epochs
    )


def count_validated_examples(config: TrainingConfig, data: DatasetSplits) -> int:
    """Return the number of validation examples that the objective is computed on.

    Args:
        config: Training config.
        data: Its data.
    """
    n_available = len(config.validation.select_split(data))
    return min(n_available, config.validation.size or n_available)


@contextmanager
def _torch_threads(n_threads: int) -> Iterator[None]:
    """Compute with a number of threads in the block: sums depend on it in their last bits."""
    previous = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


@contextmanager
def _limit_forward_passes(end: float) -> Iterator[None]:
    """Raise _TimeLimitReached in each forward pass that starts after a time of `monotonic`."""

    def check_time(module: object, inputs: object) -> None:
        if monotonic() > end:
            raise _TimeLimitReached

    hook = torch.nn.modules.module.register_module_forward_pre_hook(check_time)
    try:
        yield
    finally:
        hook.remove()


def _time_training_step(
    config: TrainingConfig,
    data: DatasetSplits,
    variants: ModelVariants,
    n_workers: int,
    n_steps: int,
    end: float,
) -> float | None:
    """Time a step of one worker, in seconds; None if the time is up before a few rows are done."""
    method = config.resolve_at(config.epochs - 1).method

    def run_step(n_rows: int) -> None:
        batch = next(data.iter_train_batches(n_rows, config.seed, 0, 0, n_workers))
        rng = ExampleRng.for_examples(batch.index, 0, "plan")
        compute_step_gradients(method, variants, batch, rng)

    return _time_few_rows_then_all(
        run_step, config.batch_size, n_workers * _MIN_ROWS, n_steps + 1, end
    )


def _time_validation(
    config: TrainingConfig,
    data: DatasetSplits,
    variants: ModelVariants,
    n_examples: float,
    end: float,
) -> float | None:
    """Time the validation of a batch, in seconds for `n_examples`; None as for a step."""
    sample_size = math.ceil(min(n_examples, config.batch_size))
    sample_images = data.val.get_float_images(slice(0, MIN_BATCH_ROWS))
    try:
        with _limit_forward_passes(end):
            attack_model = make_attack_model(variants.model, sample_images)
    except _TimeLimitReached:
        return None

    def validate(n_rows: int) -> None:
        config.validation.replace(size=n_rows)(attack_model, data.val)

    seconds = _time_few_rows_then_all(validate, sample_size, _MIN_ROWS, 1, end)
    return None if seconds is None else seconds / sample_size * n_examples


def _time_few_rows_then_all(
    compute: Callable[[int], None], n_rows: int, min_rows: int, n_repeats: int, end: float
) -> float | None:
    """Time a computation on a few rows, then on all.

    Args:
        compute: Computes on the number of rows that it is given.
        n_rows: All rows.
        min_rows: Smallest number of rows.
        n_repeats: How often all rows are timed; the fastest counts, as the first one warms up.
        end: Time of the monotonic clock at which the computation is cut off.

    Returns:
        Seconds for all rows; if these did not end in time, the seconds for a few rows, scaled up.
        None if not even a few rows ended in time.
    """
    n_few = min(n_rows, max(min_rows, math.ceil(n_rows * _SMALL_SHARE)))
    seconds = None
    with _limit_forward_passes(end), suppress(_TimeLimitReached):
        for n_timed, repeats in ((n_few, 1), (n_rows, n_repeats)):
            for repeat in range(repeats):
                started = time.perf_counter()
                compute(n_timed)
                elapsed = (time.perf_counter() - started) / n_timed * n_rows
                seconds = elapsed if seconds is None or repeat == 0 else min(seconds, elapsed)
    return seconds
