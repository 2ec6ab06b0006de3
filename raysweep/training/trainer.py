"""The training loop, written once. It knows neither Ray nor MLflow."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from raysweep.data import Data, load
from raysweep.method import ONE_WORKER, Workers
from raysweep.rng import Rng, seed_of
from raysweep.schedules import now
from raysweep.spec import SpecError
from raysweep.training import checkpoint
from raysweep.training.checkpoint import Checkpoint, Run
from raysweep.training.config import RunConfig
from raysweep.training.diagnostics import Diagnostics, Histogram, natural_accuracy, write_histograms
from raysweep.training.prefix import Prefixes, chain

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
    prefixes: Prefixes | None = None,
) -> Fitted:
    """Train `config` in the folder `run_path`, going on from the last checkpoint there, if any.

    `report(metrics, checkpoint)` is called after each epoch, and once for the last epoch of a run that had already
    finished. prefixes: states that other runs trained and this one need not (see `training.prefix`). Raises SpecError
    if the folder holds another config's run, TrainingFailed if the loss becomes nan or inf.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = data or load(config.data)
    model = config.model.build(data.channels, data.classes, seed_of(config.seed, "weights")).to(device)
    optimizer = _sgd(config, model)
    run = Run(run_path)
    keys = chain(config, data.fingerprint, workers.size) if prefixes else []
    resumed = run.last()
    if resumed is not None and resumed.config != config:
        raise SpecError(f"{run_path} holds a run with other settings: choose another --out, or delete the folder")
    saved = resumed
    if saved is None and prefixes is not None and (saved := _longest_prefix(config, run, prefixes, keys)) is not None:
        for row in saved.history:
            report(row, saved)
    if saved is not None:
        saved.load_state(model, optimizer)
    history = saved.history if saved else []
    splits = data.to(device)
    for epoch in range(len(history), config.epochs):
        with prefixes.training(keys[epoch + 1]) if prefixes else nullcontext(True) as ours:
            if not ours and prefixes is not None and (state := prefixes.get(keys[epoch + 1])) is not None:
                saved = checkpoint.adopt(run.at(epoch + 1), state, config, history)
                saved.load_state(model, optimizer)
                history = saved.history
            else:
                metrics, histograms = _epoch(config, epoch, model, optimizer, splits, workers)
                history = [*history, metrics]
                saved = checkpoint.save(run.at(epoch + 1), config, model, optimizer, history, data.fingerprint)
                write_histograms(run_path, epoch + 1, histograms)
                if prefixes is not None:
                    prefixes.put(keys[epoch + 1], saved.path)
        run.prune({epoch + 1, best_epoch(history)})
        report(history[-1], saved)
    assert saved is not None
    if resumed is saved:
        report(saved.metrics, saved)
    return Fitted(saved, checkpoint.read(run.at(best_epoch(history))))


def _longest_prefix(config: RunConfig, run: Run, prefixes: Prefixes, keys: list[str]) -> Checkpoint | None:
    """Take over the longest stored prefix, and the best epoch in it if that is an earlier one."""
    for epoch in range(config.epochs, 0, -1):
        if (state := prefixes.get(keys[epoch])) is None:
            continue
        best = best_epoch(checkpoint.read(state).history)
        if (best_state := prefixes.get(keys[best])) is not None:
            checkpoint.adopt(run.at(best), best_state, config)
            return checkpoint.adopt(run.at(epoch), state, config)
    return None


def best_epoch(history: list[dict[str, float]]) -> int:
    """1-based epoch of the highest objective; the earliest of equals."""
    scores = [row.get(OBJECTIVE, -math.inf) for row in history]
    return scores.index(max(scores)) + 1


def _sgd(config: RunConfig, model: nn.Module) -> torch.optim.SGD:
    # lr and weight decay are set each epoch from their schedules.
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=config.optim.momentum, nesterov=config.optim.nesterov)


def _epoch(
    config: RunConfig, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, workers: Workers
) -> tuple[dict[str, float], dict[str, Histogram]]:
    """Train one epoch, then look at the model on validation: a row of metrics, and what was seen on the way."""
    settings = config.at(epoch)
    for group in optimizer.param_groups:
        group.update(lr=now(settings.optim.lr), weight_decay=now(settings.optim.weight_decay))
    started = time.perf_counter()
    seen = Diagnostics(settings.method)
    model.train()
    for batch in data.batches(config.batch_size, config.seed, epoch):
        rng = Rng.for_examples(batch.index, config.seed, "train", epoch)
        step = settings.method(model, batch.x, batch.y, rng, workers)
        optimizer.zero_grad(set_to_none=True)
        step.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seen.add(step, batch.y)
    row = {"epoch": epoch + 1, "train/lr": now(settings.optim.lr), **seen.metrics(workers)}
    if not math.isfinite(row["train/loss"]):
        raise TrainingFailed(f"the loss became {row['train/loss']} in epoch {epoch + 1}; a smaller optim.lr may help")
    row["train/seconds"] = time.perf_counter() - started
    if (epoch + 1) % config.validation.every == 0 or epoch + 1 == config.epochs:
        started = time.perf_counter()
        row |= config.validation(model, data.val)
        row["train/natural"] = natural_accuracy(model, data.train)
        row["validation_seconds"] = time.perf_counter() - started
    return row, seen.histograms(workers)
