"""The training loop of all methods. It depends neither on Ray nor on MLflow."""

import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from raysweep.data import Batch, DatasetSplits, Split, load_data
from raysweep.data.subsets import choose_covering_rows
from raysweep.errors import DamagedFileError, WorkFailed
from raysweep.evaluation.attack_model import MIN_BATCH_ROWS, make_attack_model
from raysweep.evaluation.float32_precision import disable_tf32_and_autocast, has_tf32
from raysweep.formatting import format_count
from raysweep.method import Method, MethodOutput
from raysweep.rng import ExampleRng, derive_seed
from raysweep.schedules import resolved_value, schedule_value_at
from raysweep.spec import SpecError, flatten_spec
from raysweep.stores import Location, open_path
from raysweep.training import checkpoint
from raysweep.training.callbacks import TrainingCallback
from raysweep.training.checkpoint import RunDirectory, TrainingCheckpoint, TrainingState
from raysweep.training.config import OptimizerSpec, TrainingConfig, has_same_settings
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
    gather_rows,
)
from raysweep.training.eager_sgd import EagerSGD
from raysweep.training.example_verdicts import ExampleVerdicts
from raysweep.training.metric_history import EpochMetrics
from raysweep.training.mid_epoch_checkpoint import MidEpochCheckpointer
from raysweep.training.model_variants import ModelVariants
from raysweep.training.prefix_cache import PrefixCache, prefix_keys
from raysweep.training.selection import (
    CHANCE_LIMIT_METRIC,
    compute_chance_limit,
    find_best_epoch,
)
from raysweep.training.speed_checks import can_use_channels_last, check_model_output
from raysweep.training.speed_settings import emulates_bf16
from raysweep.training.sync_batchnorm import convert_sync_batchnorm
from raysweep.training.validation import ValidationResult
from raysweep.worker_group import SINGLE_WORKER, WorkerGroup

logger = logging.getLogger(__name__)

# Images on which ways to compute faster are compared with the plain model.
_N_CHECKED_IMAGES = 8


class TrainingFailed(WorkFailed):
    """Training failed because of its settings, for example with a loss of nan."""


@dataclass(frozen=True)
class TrainingResult:
    """Checkpoints of a finished run.

    Attributes:
        last_checkpoint: Checkpoint after all epochs.
        best_checkpoint: Checkpoint of the best epoch (see `selection.find_best_epoch`).
    """

    last_checkpoint: TrainingCheckpoint
    best_checkpoint: TrainingCheckpoint


def train_model(
    config: TrainingConfig,
    run_path: Location,
    callback: TrainingCallback | None = None,
    *,
    data: DatasetSplits | None = None,
    device: torch.device | None = None,
    workers: WorkerGroup = SINGLE_WORKER,
    prefix_cache: PrefixCache | None = None,
    n_reported_epochs: int = 0,
) -> TrainingResult:
    """Train a model in a folder, or resume from the last checkpoint in that folder.

    Resuming with more epochs is allowed: schedules use absolute epochs, so the weights equal those
    of a run that had all epochs from the start.

    With several workers, each worker calls this function with the same arguments and processes its
    share of each batch. The first worker writes the checkpoints. The weights equal those of a
    single worker up to rounding.

    Args:
        config: All settings of the run.
        run_path: Folder of the run. All workers must be able to read it.
        callback: Observes the run and may interrupt it.
        data: Training and validation data; by default `config.data` is loaded.
        device: Device to train on; by default the GPU if there is one, else the CPU.
        workers: The processes that train this model together.
        prefix_cache: States of other runs; epochs with a state are reused instead of trained.
        n_reported_epochs: On resume, `callback.on_epoch_end` is called again for all saved epochs
            but the first `n_reported_epochs`, because the earlier process may have died before it
            reported them.

    Returns:
        The last and the best checkpoint.

    Raises:
        SpecError: The folder holds a run with another config or other data, or the config does not
            work on this device or with several workers.
        TrainingFailed: The loss became nan or inf, or the model collapsed (see `collapse_after`).
        TrainingInterrupted: `callback.should_interrupt` returned True. The next call resumes after
            the last finished step.
    """
    check_method_distributable(config.method, workers)
    logger.info(
        "training %s for %d epochs, config digest %s, in %s",
        config.method.name,
        config.epochs,
        config.digest(),
        open_path(run_path),
        extra={"config_digest": config.digest(), "epochs": config.epochs},
    )
    run = _TrainingRun(
        config=config,
        directory=RunDirectory(run_path),
        callback=callback or TrainingCallback(),
        data=data or load_data(config.data),
        device=device or torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        workers=workers,
        prefix_cache=prefix_cache,
    )
    with run.finish_writes():
        run.resume(n_reported_epochs)
        for epoch in range(len(run.history), config.epochs):
            run.advance(epoch)
        return run.finish()


def check_resumable(
    checkpoint: TrainingCheckpoint, config: TrainingConfig, data_fingerprint: str
) -> None:
    """Check that a run can resume from a checkpoint.

    Args:
        checkpoint: The last checkpoint in the run's folder.
        config: Config of the run that resumes. It may have more epochs than the checkpoint's.
        data_fingerprint: Fingerprint of the data of the run that resumes.

    Raises:
        SpecError: The checkpoint has other settings, more epochs or other data.
    """
    folder = checkpoint.path.parent
    remedy = "choose another --name, or delete the folder"
    if not has_same_settings(checkpoint.config, config) or checkpoint.epoch > config.epochs:
        raise SpecError(f"{folder} holds a run with other settings: {remedy}")
    if checkpoint.meta["data_fingerprint"] != data_fingerprint:
        raise SpecError(f"{folder} holds a run on other {config.data.name!r} data: {remedy}")


def build_model_variants(
    config: TrainingConfig,
    data: DatasetSplits,
    device: torch.device,
    workers: WorkerGroup = SINGLE_WORKER,
) -> ModelVariants:
    """Build the config's network with initial weights from its seed.

    Args:
        config: Config with the network, the seed and the settings of `compute`.
        data: Data set with the number of channels and classes.
        device: Device of the network.
        workers: With several workers, batch norms are synchronised over them.

    Returns:
        The network, with its modules for training and for attacks.

    Raises:
        SpecError: The config asks for TF32 on a device that has none, or the network does not
            return logits or has no training mode.
    """
    compute = config.compute.resolve(device)
    logger.info(
        "computing on %s: %s",
        device,
        ", ".join(f"{name} {value}" for name, value in compute.to_json_dict().items()),
    )
    if "bf16" in (compute.train, compute.attack) and emulates_bf16(device):
        logger.warning("fallback: %s emulates bf16, which is slower than float32", device)
    if not has_tf32(device):
        _reject_tf32_settings(config, device)
    model = config.model.build_model(
        data.channels, data.classes, derive_seed(config.seed, "weights")
    ).to(device)
    images = data.train.get_float_images(slice(0, _N_CHECKED_IMAGES)).to(device)
    check_model_output(model, images, data.classes, config.model.name)
    if compute.channels_last is True and not can_use_channels_last(model, images):
        compute = compute.replace(channels_last=False)
    if workers.size > 1:
        model = convert_sync_batchnorm(model, workers)
    return ModelVariants(model, images, compute)


def compute_step_gradients(
    method: Method,
    variants: ModelVariants,
    batch: Batch,
    rng: ExampleRng,
    workers: WorkerGroup = SINGLE_WORKER,
) -> MethodOutput:
    """Run the attacks, losses and backward pass of one step: everything but the optimizer's update.

    Args:
        method: The method with its schedules resolved for the current epoch.
        variants: The network. Its parameters receive the gradients, averaged over all workers.
        batch: This worker's rows of the global batch.
        rng: Random numbers of the batch's examples.
        workers: The processes that share the global batch.

    Returns:
        The loss, and the logits, attack results and weights from which it was computed.
    """
    variants.sync_folded_weights()
    x = batch.x.contiguous(memory_format=variants.memory_format)
    output = method(variants.train_module, x, batch.y, rng, workers, variants.attack_module)
    variants.model.zero_grad(set_to_none=True)
    with average_gradients(variants.model, workers):
        output.loss.backward()  # type: ignore[no-untyped-call]
    return output


@dataclass
class _UnreportedEpoch:
    """A trained epoch whose checkpoint is being written.

    Attributes:
        epoch: Its 1-based number.
        saved: Future of the checkpoint; None on workers that do not write it.
        lease: Stack that releases the lease for training this epoch.
    """

    epoch: int
    saved: Future[TrainingCheckpoint] | None
    lease: ExitStack


@dataclass
class _TrainingRun:
    """State of one call of `train_model`. Epoch arguments of its methods are 0-based.

    With one worker, a thread writes the checkpoint of an epoch while the next epoch is trained.
    Several workers wait for it before the next epoch. An epoch is reported after its checkpoint was
    written, so that callbacks can read the checkpoint.
    """

    config: TrainingConfig
    directory: RunDirectory
    callback: TrainingCallback
    data: DatasetSplits
    device: torch.device
    workers: WorkerGroup
    prefix_cache: PrefixCache | None

    def __post_init__(self) -> None:
        self.variants = build_model_variants(self.config, self.data, self.device, self.workers)
        self.model = self.variants.model
        self.optimizer = _make_sgd_optimizer(self.config, self.model)
        self.prefix_keys: list[str] = []
        if self.prefix_cache is not None:
            self.prefix_keys = prefix_keys(
                self.config, self.data.fingerprint, self.workers.size, self.device
            )
        self.device_data = self.data.to(self.device)
        self.validation_data = self.config.validation.select_split(self.data).to(self.device)
        self.checkpointer = MidEpochCheckpointer(
            self.directory,
            self.config,
            self.model,
            self.optimizer,
            self.data.fingerprint,
            self.workers,
        )
        self.history: list[EpochMetrics] = []
        self.last_checkpoint: TrainingCheckpoint | None = None
        self.unreported: _UnreportedEpoch | None = None
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        # The best epoch is one of those whose checkpoints exist. An earlier version of raysweep may
        # have kept other ones than this would have.
        self.saved_epochs: set[int] = set()

    @contextmanager
    def finish_writes(self) -> Iterator[None]:
        """Context manager of the whole run that waits for its writes at the end.

        If training fails in an epoch, the epoch before is reported first.

        Yields:
            Nothing.
        """
        try:
            yield
        except Exception:
            self._complete_epoch()
            raise
        finally:
            self.writer.shutdown()
            if self.unreported is not None:
                self.unreported.lease.close()
                error = self.unreported.saved and self.unreported.saved.exception()
                if error is not None:
                    logger.error("the last checkpoint was not written: %s", error)

    def resume(self, n_reported_epochs: int) -> None:
        """Load the last checkpoint or the longest cached prefix, and report its epochs again."""
        is_writer = self.workers.rank == 0
        is_new = not self.directory.list_saved_epochs()
        if self.prefix_cache is not None and is_writer and is_new:
            _reuse_longest_prefix(self.config, self.directory, self.prefix_cache, self.prefix_keys)
        n_saved = max(self.directory.list_saved_epochs(), default=0)
        n_saved = broadcast_int(n_saved, self.workers, self.device)
        if not n_saved:
            logger.info("no earlier checkpoint: the first epoch is next")
            return
        self.saved_epochs = set(self.directory.list_saved_epochs())
        how = "starting with reused epochs, after" if is_new else "resuming after"
        logger.info("%s epoch %d", how, n_saved, extra={"epoch": n_saved})
        saved = checkpoint.read_checkpoint(self.directory.epoch_path(n_saved))
        check_resumable(saved, self.config, self.data.fingerprint)
        saved.load_training_state(self.model, self.optimizer)
        self.last_checkpoint, self.history = saved, saved.history
        for metrics in saved.history[n_reported_epochs:]:
            self.callback.on_epoch_end(metrics, saved)
        _check_not_collapsed(self.config, self.history, self.data)

    def advance(self, epoch: int) -> None:
        """Train or reuse one epoch, and start to write its checkpoint.

        After that, checkpoints that are no longer needed are deleted and the epoch is reported.
        """
        with ExitStack() as lease:
            reused = self._reuse_epoch(epoch, lease)
            if reused is not None:
                self._end_epoch(reused)
                return
            metrics, verdicts, histograms = self._train_epoch(epoch)
            self._complete_epoch()
            self.history = [*self.history, metrics]
            saved = None
            if self.workers.rank == 0:
                state = TrainingState.copy_from(self.model, self.optimizer)
                saved = self.writer.submit(
                    copy_context().run, self._save_epoch, state, self.history, verdicts, histograms
                )
            self.unreported = _UnreportedEpoch(epoch + 1, saved, lease.pop_all())
        if self.workers.size > 1:
            # All workers must wait for each other at the same step.
            self._complete_epoch()

    def finish(self) -> TrainingResult:
        """Wait for the first worker, then return the last and the best checkpoint."""
        self._complete_epoch()
        assert self.last_checkpoint is not None
        broadcast_int(0, self.workers, self.device)
        best_epoch = self._update_best_epoch(self.last_checkpoint.epoch)
        best = checkpoint.read_checkpoint(self.directory.epoch_path(best_epoch))
        return TrainingResult(self.last_checkpoint, best)

    def _complete_epoch(self) -> None:
        """Wait until the checkpoint of the unreported epoch is written; report it."""
        if self.unreported is None:
            return
        unreported, self.unreported = self.unreported, None
        with unreported.lease:
            saved = unreported.saved.result() if unreported.saved is not None else None
        broadcast_int(unreported.epoch, self.workers, self.device)
        if saved is None:
            saved = checkpoint.read_checkpoint(self.directory.epoch_path(unreported.epoch))
        self._end_epoch(saved)

    def _complete_epoch_if_saved(self) -> None:
        """Report the unreported epoch if its checkpoint has been written."""
        saved = self.unreported.saved if self.unreported is not None else None
        if saved is not None and saved.done():
            with self.checkpointer.pause_clock():
                self._complete_epoch()

    def _end_epoch(self, saved: TrainingCheckpoint) -> None:
        """Delete checkpoints that the new one makes superfluous, and report its epoch."""
        self.last_checkpoint, self.history = saved, saved.history
        best_epoch = self._update_best_epoch(saved.epoch)
        if self.workers.rank == 0:
            self.directory.prune_checkpoints({saved.epoch, best_epoch})
            key = self.prefix_keys[saved.epoch] if self.prefix_keys else None
            _log_epoch(saved.last_metrics, key)
        self.callback.on_epoch_end(saved.last_metrics, saved)
        _check_not_collapsed(self.config, saved.history, self.data)

    def _update_best_epoch(self, last_epoch: int) -> int:
        """Return the best epoch that has a checkpoint, after `last_epoch` (1-based) was saved."""
        best_epoch = find_best_epoch(self.config, self.history, {*self.saved_epochs, last_epoch})
        self.saved_epochs = {best_epoch, last_epoch}
        return best_epoch

    def _reuse_epoch(self, epoch: int, lease: ExitStack) -> TrainingCheckpoint | None:
        """Return the checkpoint after this epoch if another run has trained it or is training it.

        If not, `lease` holds the right to train it. A run with several workers uses the cache only
        in `resume`: here all workers would be idle while they wait for the other run.
        """
        if self.prefix_cache is None or self.workers.size > 1:
            return None
        key, path = self.prefix_keys[epoch + 1], self.directory.epoch_path(epoch + 1)
        must_train = lease.enter_context(
            self.prefix_cache.acquire_training_lease(key, epoch + 1, self._complete_epoch)
        )
        if must_train:
            return None
        self._complete_epoch()
        reused = self.prefix_cache.reuse_state(key, path, self.config, self.history)
        if reused is not None:
            logger.info(
                "reused epoch %d from the prefix cache, key %s",
                epoch + 1,
                key,
                extra={"epoch": epoch + 1, "key": key, "event": "prefix_reused"},
            )
            reused.load_training_state(self.model, self.optimizer)
        return reused

    def _save_epoch(
        self,
        state: TrainingState,
        history: list[EpochMetrics],
        verdicts: ExampleVerdicts | None,
        histograms: dict[str, Histogram],
    ) -> TrainingCheckpoint:
        """Write the checkpoint of the last epoch in `history`, and share it with other runs."""
        epoch = len(history)
        saved = checkpoint.save_checkpoint(
            self.directory.epoch_path(epoch),
            self.config,
            state,
            history,
            self.data.fingerprint,
            verdicts=verdicts,
        )
        write_histograms(self.directory.path, epoch, histograms)
        if self.prefix_cache is not None:
            self.prefix_cache.store_state(self.prefix_keys[epoch], saved.path)
        return saved

    def _train_epoch(
        self, epoch: int
    ) -> tuple[EpochMetrics, ExampleVerdicts | None, dict[str, Histogram]]:
        """Train and validate one epoch; return its metrics, which validation examples it gets
        right, and the diagnostics' histograms.
        """
        epoch_config = self.config.resolve_at(epoch)
        self._apply_optimizer_settings(epoch_config.optim)
        diagnostics = EpochDiagnostics(epoch_config.method, self.workers)
        self._run_steps(epoch_config.method, epoch, diagnostics)
        metrics: EpochMetrics = {
            "epoch": epoch + 1,
            "train/lr": float(self.optimizer.param_groups[0]["lr"]),
            **diagnostics.compute_metrics(),
        }
        loss = metrics["train/loss"]
        if not math.isfinite(loss):
            raise TrainingFailed(
                f"the loss became {loss} in epoch {epoch + 1}; a smaller optim.lr may help"
            )
        # The checkpointer also counts the time that earlier processes spent on this epoch.
        metrics["train/seconds"] = self.checkpointer.elapsed_seconds
        verdicts = None
        if self.config.is_validated(epoch):
            validation_metrics, verdicts = self._validate(epoch)
            metrics |= validation_metrics
        return metrics, verdicts, diagnostics.compute_histograms()

    def _apply_optimizer_settings(self, optim: OptimizerSpec) -> None:
        """Set the epoch's learning rate and weight decay."""
        for group in self.optimizer.param_groups:
            group.update(
                lr=resolved_value(optim.lr), weight_decay=resolved_value(optim.weight_decay)
            )

    def _apply_step_lr(self, epoch: float) -> None:
        """Set the learning rate of a step that ends at this fraction of an epoch, if it has one."""
        if self.config.optim.lr_per_step:
            for group in self.optimizer.param_groups:
                group["lr"] = schedule_value_at(self.config.optim.lr, epoch)

    def _run_steps(self, method: Method, epoch: int, diagnostics: EpochDiagnostics) -> None:
        """Run the epoch's steps, except those that an interrupted process has already done."""
        n_done = self.checkpointer.resume_epoch(self.history, diagnostics)
        if n_done:
            logger.info(
                "resuming within epoch %d, after step %d",
                epoch + 1,
                n_done,
                extra={"epoch": epoch + 1, "step": n_done},
            )
        self.model.train()
        n_steps = self.device_data.count_train_batches(self.config.batch_size)
        with self.variants.training_precision():
            batches = self.device_data.iter_train_batches(
                self.config.batch_size,
                self.config.seed,
                epoch,
                self.workers.rank,
                self.workers.size,
            )
            for steps, batch in enumerate(islice(batches, n_done, None), n_done + 1):
                rng = ExampleRng.for_examples(batch.index, self.config.seed, "train", epoch)
                output = compute_step_gradients(method, self.variants, batch, rng, self.workers)
                self._apply_step_lr(epoch + steps / n_steps)
                self.optimizer.step()
                diagnostics.add_batch(output, batch.y)
                self._complete_epoch_if_saved()
                self.callback.on_step_end(epoch + 1, steps)
                if self.callback.should_interrupt():
                    self._complete_epoch()
                    self.checkpointer.save_and_interrupt(steps, diagnostics)

    def _validate(self, epoch: int) -> tuple[EpochMetrics, ExampleVerdicts]:
        """Measure the model on validation data, and on some training images."""
        started_at = time.perf_counter()
        val = self.validation_data
        with disable_tf32_and_autocast(val.y.device):
            # The same copy and precision as for AutoAttack, independent of `config.compute`.
            model = make_attack_model(self.model, val.get_float_images(slice(0, MIN_BATCH_ROWS)))
            metrics, correct = _compute_validation(self.config, model, val, self.workers)
            metrics["train/natural"] = measure_natural_accuracy(model, self.device_data.train)
            metrics |= _compute_training_accuracy(
                self.config, model, self.device_data.train, self.workers
            )
        metrics[CHANCE_LIMIT_METRIC] = _find_chance_limit(self.config, val, self.data.classes)
        metrics["validation_seconds"] = time.perf_counter() - started_at
        index = val.index[: len(correct)].cpu().numpy()
        objective = self.config.validation.objective
        mask = correct.cpu().numpy()
        return metrics, ExampleVerdicts.from_mask(objective, epoch + 1, mask, index)


def _reject_tf32_settings(config: TrainingConfig, device: torch.device) -> None:
    """Raise SpecError if any `tf32` setting is on, for a device without TF32."""
    for key, value in flatten_spec(config).items():
        if key.endswith(".tf32") and value is True:
            raise SpecError(f"{key} = true: there is no TF32 on {device.type}; leave it false")


def _reuse_longest_prefix(
    config: TrainingConfig, directory: RunDirectory, prefix_cache: PrefixCache, keys: list[str]
) -> None:
    """Reuse the longest cached prefix: its last and best epochs become checkpoints of the run."""
    for epoch in prefix_cache.find_stored_positions(keys):
        state = prefix_cache.find_state(keys[epoch]) if epoch > 0 else None
        if state is None:
            continue
        try:
            best = find_best_epoch(config, checkpoint.read_checkpoint(state).history)
            if prefix_cache.reuse_state(
                keys[best], directory.epoch_path(best), config
            ) and prefix_cache.reuse_state(keys[epoch], directory.epoch_path(epoch), config):
                logger.info(
                    "reused the first %s from the prefix cache, key %s",
                    format_count(epoch, "epoch"),
                    keys[epoch],
                    extra={"epoch": epoch, "key": keys[epoch], "event": "prefix_reused"},
                )
                return
        except (SpecError, DamagedFileError) as error:
            # Another run evicted the state meanwhile.
            logger.info("a prefix of %d epochs vanished, a shorter one is next: %s", epoch, error)


def _log_epoch(metrics: EpochMetrics, key: str | None) -> None:
    """Log the accuracies, loss and time of an epoch, and the key of its state if it has one."""
    shown = ("train/loss", "clean", "robust_worst", "train/seconds", "validation_seconds")
    numbers = {name: round(metrics[name], 4) for name in shown if name in metrics}
    epoch = int(metrics["epoch"])
    logger.info(
        "epoch %d %s: %s",
        epoch,
        "reused" if "shared" in metrics else "trained",
        ", ".join(f"{name} {value}" for name, value in numbers.items()),
        extra={"epoch": epoch, "metrics": numbers, "key": key},
    )


def _check_not_collapsed(
    config: TrainingConfig, history: list[EpochMetrics], data: DatasetSplits
) -> None:
    """Raise TrainingFailed if the model was no better than chance in two validations in a row."""
    validated = [metrics for metrics in history if "clean" in metrics][-2:]
    if config.collapse_after is None or len(validated) < 2:
        return
    if validated[0]["epoch"] <= config.collapse_after:
        return
    limit = _find_chance_limit(config, config.validation.select_split(data), data.classes)
    if all(metrics["clean"] <= limit for metrics in validated):
        last = validated[-1]
        raise TrainingFailed(
            f"the model collapsed: {last['clean']:.3f} of natural validation images are right "
            f"in epoch {last['epoch']:.0f}, no more than by chance"
        )


def _find_chance_limit(config: TrainingConfig, split: Split, n_classes: int) -> float:
    """Return the natural accuracy on the validated examples up to which a model may be guessing."""
    labels = split.y[: config.validation.size]
    return compute_chance_limit(n_classes, len(labels), int(labels.bincount().max()))


def _make_sgd_optimizer(config: TrainingConfig, model: nn.Module) -> torch.optim.SGD:
    """Build the optimizer; each epoch sets its learning rate and weight decay."""
    return EagerSGD(
        model.parameters(), lr=0.0, momentum=config.optim.momentum, nesterov=config.optim.nesterov
    )


def _compute_validation(
    config: TrainingConfig, model: nn.Module, val: Split, workers: WorkerGroup
) -> ValidationResult:
    """Run the validation attacks; several workers divide the examples among them."""
    n_examples = min(config.validation.size or len(val), len(val))
    if n_examples < workers.size or workers.size == 1:
        metrics, correct = config.validation.measure(model, val)
    else:
        share = _take_worker_share(val, n_examples, workers)
        metrics, correct = config.validation.measure(model, share)
        metrics = average_metrics(metrics, len(share), workers, val.y.device)
        correct = gather_rows(correct, n_examples, workers)
    # Sums of floats in another order must not decide between epochs.
    metrics = metrics | {"robust_margin": round(metrics["robust_margin"], 4)}
    return ValidationResult(metrics, correct)


def _compute_training_accuracy(
    config: TrainingConfig, model: nn.Module, train: Split, workers: WorkerGroup
) -> EpochMetrics:
    """Return `train/robust`, or {} if it is not measured; several workers divide the images."""
    n_examples = config.validation.count_train_examples(len(train))
    if not n_examples:
        return {}
    rows = torch.arange(len(train), device=train.y.device)[choose_covering_rows(train, n_examples)]
    chosen = Split(train.x[rows], train.y[rows], train.index[rows], train.pixel_max)
    is_divided = n_examples >= workers.size > 1
    share = _take_worker_share(chosen, n_examples, workers) if is_divided else chosen
    metrics = {"train/robust": config.validation.measure_training_accuracy(model, share)}
    if not is_divided:
        return metrics
    return average_metrics(metrics, len(share), workers, train.y.device)


def _take_worker_share(split: Split, n_examples: int, workers: WorkerGroup) -> Split:
    """Return every n-th of the first examples of a split, for a worker of n."""
    rows = slice(workers.rank, n_examples, workers.size)
    return Split(split.x[rows], split.y[rows], split.index[rows], split.pixel_max)
