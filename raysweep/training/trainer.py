"""The training loop, written once. It knows neither Ray nor MLflow."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from raysweep.data import Batch, Data, epoch_batches, load
from raysweep.method import ONE_WORKER, Workers
from raysweep.rng import Rng, seed_of
from raysweep.schedules import now
from raysweep.spec import SpecError
from raysweep.training import checkpoint
from raysweep.training.checkpoint import Checkpoint, Run
from raysweep.training.config import RunConfig
from raysweep.training.diagnostics import Diagnostics, Histogram, natural_accuracy, write_histograms

OBJECTIVE = "robust_worst"
Report = Callable[[dict[str, float], Checkpoint], None]


class TrainingFailed(RuntimeError):
    """Training went wrong in a way that its settings explain: a loss of nan, for one."""


@dataclass(frozen=True)
class Fitted:
    """last: after all epochs; best: of the highest `robust_worst` on validation, the earliest of equals."""

    last: Checkpoint
    best: Checkpoint


def fit(
    config: RunConfig,
    run_path: Path,
    report: Report = lambda metrics, checkpoint: None,
    *,
    data: Data | None = None,
    device: torch.device | None = None,
    workers: Workers = ONE_WORKER,
) -> Fitted:
    """Train `config` in the folder `run_path`, going on from the last checkpoint there, if any.

    `report(metrics, checkpoint)` is called after each epoch, and once for the last epoch of a run that had already
    finished. Raises SpecError if the folder holds another config's run, TrainingFailed if the loss becomes nan or inf.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = data or load(config.data)
    model = config.model.build(data.channels, data.classes, seed_of(config.seed, "weights")).to(device)
    optimizer = _sgd(config, model)
    run = Run(run_path)
    resumed = run.last()
    history: list[dict[str, float]] = []
    if resumed is not None:
        if resumed.config != config:
            raise SpecError(f"{run_path} holds a run with other settings: choose another --out, or delete the folder")
        history = resumed.history
        resumed.load_model(model)
        resumed.load_optimizer(model, optimizer)
    train, val = data.train.to(device), data.val.to(device)
    unlabeled = None if data.unlabeled is None else data.unlabeled.to(device)
    saved = resumed
    for epoch in range(len(history), config.epochs):
        batches = epoch_batches(
            train,
            config.batch_size,
            config.seed,
            epoch,
            data.augment,
            unlabeled=unlabeled,
            unlabeled_fraction=data.unlabeled_fraction,
        )
        metrics, histograms = _epoch(config, epoch, model, optimizer, batches, workers)
        metrics["train/natural"] = natural_accuracy(model, train)
        if (epoch + 1) % config.validation.every == 0 or epoch + 1 == config.epochs:
            metrics |= config.validation(model, val)
        history = [*history, metrics]
        saved = checkpoint.save(run.at(epoch + 1), config, model, optimizer, history, data.fingerprint)
        run.prune({epoch + 1, best_epoch(history)})
        write_histograms(run_path, epoch + 1, histograms)
        report(metrics, saved)
    assert saved is not None
    if resumed is saved:
        report(saved.metrics, saved)
    return Fitted(saved, checkpoint.read(run.at(best_epoch(history))))


def best_epoch(history: list[dict[str, float]]) -> int:
    """1-based epoch of the highest objective; the earliest of equals."""
    scores = [row.get(OBJECTIVE, -math.inf) for row in history]
    return scores.index(max(scores)) + 1


def _sgd(config: RunConfig, model: nn.Module) -> torch.optim.SGD:
    # lr and weight decay are set each epoch from their schedules.
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=config.optim.momentum, nesterov=config.optim.nesterov)


def _epoch(
    config: RunConfig,
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    workers: Workers,
) -> tuple[dict[str, float], dict[str, Histogram]]:
    settings = config.at(epoch)
    for group in optimizer.param_groups:
        group.update(lr=now(settings.optim.lr), weight_decay=now(settings.optim.weight_decay))
    started = time.perf_counter()
    seen = Diagnostics(settings.method)
    model.train()
    for batch in batches:
        rng = Rng.for_examples(batch.index, config.seed, "train", epoch)
        step = settings.method(model, batch.x, batch.y, rng, workers)
        optimizer.zero_grad(set_to_none=True)
        step.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seen.add(step, batch.y)
    metrics = seen.metrics(workers)
    if not math.isfinite(metrics["train/loss"]):
        raise TrainingFailed(
            f"the loss became {metrics['train/loss']} in epoch {epoch + 1}; a smaller optim.lr may help"
        )
    row = {"epoch": epoch + 1, "train/lr": now(settings.optim.lr), "train/seconds": time.perf_counter() - started}
    return {**row, **metrics}, seen.histograms(workers)
