"""The training loop, written once. It knows neither Ray nor MLflow."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from raysweep import storage
from raysweep.data import Batch, Dataset, Split, load_data
from raysweep.evaluation.attack_model import MIN_BATCH_ROWS, make_attack_model
from raysweep.evaluation.device_precision import disable_tf32_and_autocast, has_tf32
from raysweep.method import Method, MethodOutput
from raysweep.rng import ExampleRng, derive_seed
from raysweep.schedules import resolved_value
from raysweep.spec import SpecError, flatten_spec
from raysweep.training import checkpoint
from raysweep.training.checkpoint import RunDirectory, TrainingCheckpoint
from raysweep.training.config import TrainingConfig
from raysweep.training.diagnostics import (
    EpochDiagnostics,
    Histogram,
    measure_natural_accuracy,
    write_histograms,
)
from raysweep.training.distributed import (
    average_gradients,
    average_metrics,
    broadcast_int,
    check_method_distributable,
)
from raysweep.training.mid_epoch_checkpoint import MidEpochCheckpointer
from raysweep.training.model_variants import ModelVariants
from raysweep.training.prefix_cache import PrefixCache, prefix_keys
from raysweep.training.sync_batchnorm import convert_sync_batchnorm
from raysweep.worker_group import SINGLE_WORKER, WorkerGroup

EpochCallback = Callable[[dict[str, float], TrainingCheckpoint], None]


class TrainingFailed(RuntimeError):
    """Training went wrong in a way that its settings explain: a loss of nan, for one."""


@dataclass(frozen=True)
class TrainingResult:
    """last: after all epochs; best: of the highest `validation.objective`, the earliest of equals."""

    last_checkpoint: TrainingCheckpoint
    best_checkpoint: TrainingCheckpoint


def train_model(
    config: TrainingConfig,
    run_path: Path,
    on_epoch_end: EpochCallback = lambda metrics, checkpoint: None,
    *,
    data: Dataset | None = None,
    device: torch.device | None = None,
    workers: WorkerGroup = SINGLE_WORKER,
    prefix_cache: PrefixCache | None = None,
    n_reported_epochs: int = 0,
    should_interrupt: Callable[[], bool] = lambda: False,
    on_step_end: Callable[[int, int], None] = lambda epoch, steps: None,
) -> TrainingResult:
    """Train `config` in the folder `run_path`, going on from the last checkpoint there, if any.

    `report(metrics, checkpoint)` is called after each epoch, also for those in the folder but the
    first `reported`, for whoever was told of them last may have died before the next. prefixes:
    states that other runs trained and this one need not (see `training.prefix`). interrupted: asked
    after each step of a single worker; if it says yes, Interrupted is raised, and the next call
    goes on after that step. stepped: told of each step: its epoch, and how many of this epoch are
    done.

    A run with fewer epochs is gone on with: schedules count epochs from the first, so its weights
    are those of the longer run there. Raises SpecError if the folder holds a run with another
    config or other data, TrainingFailed if the loss becomes nan or inf or the model collapses
    (`collapse_after`).

    Each of several `workers` calls this with the same arguments and takes its share of each batch;
    the first writes the checkpoints, in a folder that all can read. Their weights are those of one
    worker, up to rounding.
    """
    check_method_distributable(config.method, workers)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = data or load_data(config.data)
    faces = build_model_variants(config, data, device, workers)
    model, optimizer = faces.model, _make_sgd_optimizer(config, faces.model)
    run = RunDirectory(run_path)
    keys = prefix_keys(config, data.fingerprint, workers.size, device) if prefix_cache else []
    if prefix_cache is not None and workers.rank == 0 and not run.list_saved_epochs():
        _reuse_longest_prefix(config, run, prefix_cache, keys)
    last = broadcast_int(max(run.list_saved_epochs(), default=0), workers, device)
    saved = checkpoint.read_checkpoint(run.epoch_path(last)) if last else None
    history: list[dict[str, float]] = []
    if saved is not None:
        check_resumable(saved, config, data.fingerprint)
        saved.load_training_state(model, optimizer)
        history = saved.history
        for row in history[n_reported_epochs:]:
            on_epoch_end(row, saved)
        _check_not_collapsed(config, history, data)
    splits = data.to(device)
    pause = (
        MidEpochCheckpointer(should_interrupt, run, config, model, optimizer, data.fingerprint)
        if workers.size == 1
        else None
    )
    for epoch in range(last, config.epochs):
        # Several workers share prefixes at their start only: waiting for others would hold all of
        # them.
        store = prefix_cache if workers.size == 1 else None
        with store.acquire_training_lease(keys[epoch + 1]) if store else nullcontext(True) as ours:
            theirs = (
                store.reuse_state(keys[epoch + 1], run.epoch_path(epoch + 1), config, history)
                if store and not ours
                else None
            )
            if theirs is not None:
                saved = theirs
                saved.load_training_state(model, optimizer)
            else:
                row, histograms = _train_epoch(
                    config, epoch, faces, optimizer, splits, workers, history, pause, on_step_end
                )
                if workers.rank == 0:
                    history = [*history, row]
                    saved = checkpoint.save_checkpoint(
                        run.epoch_path(epoch + 1),
                        config,
                        model,
                        optimizer,
                        history,
                        data.fingerprint,
                    )
                    write_histograms(run_path, epoch + 1, histograms)
                    if prefix_cache is not None:
                        prefix_cache.store_state(keys[epoch + 1], saved.path)
                broadcast_int(epoch, workers, device)
                saved = (
                    checkpoint.read_checkpoint(run.epoch_path(epoch + 1))
                    if workers.rank or saved is None
                    else saved
                )
        history = saved.history
        if workers.rank == 0:
            run.prune_checkpoints({epoch + 1, find_best_epoch(config, history)})
        on_epoch_end(history[-1], saved)
        _check_not_collapsed(config, history, data)
    assert saved is not None
    broadcast_int(0, workers, device)
    return TrainingResult(
        saved, checkpoint.read_checkpoint(run.epoch_path(find_best_epoch(config, history)))
    )


def check_resumable(
    checkpoint: TrainingCheckpoint, config: TrainingConfig, data_fingerprint: str
) -> None:
    """Raises SpecError unless a run of `config` on data of this fingerprint can go on from a
    checkpoint.
    """
    folder, do = (
        storage.uri_of(checkpoint.path.parent),
        "choose another --name, or delete the folder",
    )
    if (
        checkpoint.config.replace(epochs=config.epochs) != config
        or checkpoint.epoch > config.epochs
    ):
        raise SpecError(f"{folder} holds a run with other settings: {do}")
    if checkpoint.meta["data_fingerprint"] != data_fingerprint:
        raise SpecError(f"{folder} holds a run on other {config.data.name!r} data: {do}")


def build_model_variants(
    config: TrainingConfig,
    data: Dataset,
    device: torch.device,
    workers: WorkerGroup = SINGLE_WORKER,
) -> ModelVariants:
    """The config's network on a device, with the weights that its seed gives, ready to be trained
    and attacked.
    """
    compute = config.compute.resolve(device)
    if not has_tf32(device):
        for key, value in flatten_spec(config).items():
            if key.endswith(".tf32") and value is True:
                raise SpecError(f"{key} = true: there is no TF32 on {device.type}; leave it false")
    model = config.model.build_model(
        data.channels, data.classes, derive_seed(config.seed, "weights")
    ).to(device)
    if workers.size > 1:
        model = convert_sync_batchnorm(model, workers)
    return ModelVariants(model, data.train.get_float_images(slice(0, 1)).to(device), compute)


def compute_step_gradients(
    method: Method,
    variants: ModelVariants,
    batch: Batch,
    rng: ExampleRng,
    workers: WorkerGroup = SINGLE_WORKER,
) -> MethodOutput:
    """Attacks, losses and their gradient, in `.grad` of the model's parameters: all of a step but
    the update.
    """
    variants.sync_folded_weights()
    x = batch.x.contiguous(memory_format=variants.memory_format)
    step = method(variants.train_module, x, batch.y, rng, workers, variants.attack_module)
    variants.model.zero_grad(set_to_none=True)
    step.loss.backward()  # type: ignore[no-untyped-call]
    average_gradients(variants.model, workers)
    return step


def _reuse_longest_prefix(
    config: TrainingConfig, run_directory: RunDirectory, prefix_cache: PrefixCache, keys: list[str]
) -> None:
    """Take over the longest stored prefix, if there is one, and the best epoch in it if that is an
    earlier one.
    """
    for epoch in prefix_cache.find_stored_positions(keys):
        if epoch == 0 or (state := prefix_cache.find_state(keys[epoch])) is None:
            continue
        with suppress(SpecError):  # it has just outgrown another run's limit
            best = find_best_epoch(config, checkpoint.read_checkpoint(state).history)
            if prefix_cache.reuse_state(
                keys[best], run_directory.epoch_path(best), config
            ) and prefix_cache.reuse_state(keys[epoch], run_directory.epoch_path(epoch), config):
                return


def _check_not_collapsed(
    config: TrainingConfig, history: list[dict[str, float]], data: Dataset
) -> None:
    """Raises TrainingFailed if the last two measured epochs show a model that has collapsed."""
    seen = [row for row in history if "clean" in row][-2:]
    if config.collapse_after is None or len(seen) < 2 or seen[0]["epoch"] <= config.collapse_after:
        return
    chance, count = 1 / data.classes, min(config.validation.size or len(data.val), len(data.val))
    # What guessing reaches in 49 of 50 cases.
    limit = chance + 2 * math.sqrt(chance * (1 - chance) / count)
    if all(row["clean"] <= limit for row in seen):
        raise TrainingFailed(
            f"the model collapsed: {seen[-1]['clean']:.3f} of natural validation images are right in epoch "
            f"{seen[-1]['epoch']:.0f}, no more than by chance"
        )


def find_best_epoch(config: TrainingConfig, history: list[dict[str, float]]) -> int:
    """1-based epoch of the highest `validation.objective`; the earliest of equals."""
    scores = [row.get(config.validation.objective, -math.inf) for row in history]
    return scores.index(max(scores)) + 1


def _make_sgd_optimizer(config: TrainingConfig, model: nn.Module) -> torch.optim.SGD:
    # lr and weight decay are set each epoch from their schedules.
    return torch.optim.SGD(
        model.parameters(), lr=0.0, momentum=config.optim.momentum, nesterov=config.optim.nesterov
    )


def _train_epoch(
    config: TrainingConfig,
    epoch: int,
    variants: ModelVariants,
    optimizer: torch.optim.Optimizer,
    data: Dataset,
    workers: WorkerGroup,
    history: list[dict[str, float]],
    checkpointer: MidEpochCheckpointer | None,
    on_step_end: Callable[[int, int], None],
) -> tuple[dict[str, float], dict[str, Histogram]]:
    """Train one epoch, then look at the model on validation: a row of metrics, and what was seen on
    the way.
    """
    settings = config.resolve_at(epoch)
    for group in optimizer.param_groups:
        group.update(
            lr=resolved_value(settings.optim.lr),
            weight_decay=resolved_value(settings.optim.weight_decay),
        )
    started = time.perf_counter()
    seen = EpochDiagnostics(settings.method, workers)
    done = checkpointer.resume_epoch(history, seen) if checkpointer else 0
    variants.model.train()
    with variants.training_precision():
        batches = data.iter_train_batches(
            config.batch_size, config.seed, epoch, workers.rank, workers.size
        )
        for steps, batch in enumerate(islice(batches, done, None), done + 1):
            rng = ExampleRng.for_examples(batch.index, config.seed, "train", epoch)
            step = compute_step_gradients(settings.method, variants, batch, rng, workers)
            optimizer.step()
            seen.add_batch(step, batch.y)
            on_step_end(epoch + 1, steps)
            if checkpointer:
                checkpointer.save_if_interrupted(steps, seen)
    row = {
        "epoch": epoch + 1,
        "train/lr": resolved_value(settings.optim.lr),
        **seen.compute_metrics(),
    }
    if not math.isfinite(row["train/loss"]):
        raise TrainingFailed(
            f"the loss became {row['train/loss']} in epoch {epoch + 1}; a smaller optim.lr may help"
        )
    row["train/seconds"] = (
        checkpointer.elapsed_seconds if checkpointer else time.perf_counter() - started
    )
    if (epoch + 1) % config.validation.every == 0 or epoch + 1 == config.epochs:
        started = time.perf_counter()
        with disable_tf32_and_autocast(data.val.y.device):
            # The form in which AutoAttack will meet it, whatever `compute` says.
            judged = make_attack_model(
                variants.model, data.val.get_float_images(slice(0, MIN_BATCH_ROWS))
            )
            row |= _compute_validation_metrics(config, judged, data.val, workers)
            row["train/natural"] = measure_natural_accuracy(judged, data.train)
        row["validation_seconds"] = time.perf_counter() - started
    return row, seen.compute_histograms()


def _compute_validation_metrics(
    config: TrainingConfig, model: nn.Module, val: Split, workers: WorkerGroup
) -> dict[str, float]:
    """The validation metrics; several workers share out the examples."""
    count = min(config.validation.size or len(val), len(val))
    if count < workers.size or workers.size == 1:
        return config.validation(model, val)
    mine = slice(workers.rank, count, workers.size)
    share = Split(val.x[mine], val.y[mine], val.index[mine], val.pixel_max)
    return average_metrics(config.validation(model, share), len(share), workers, val.y.device)
