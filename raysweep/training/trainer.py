"""The training loop, written once. It knows neither Ray nor MLflow."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from raysweep.data import Data, Split, epoch_batches, load
from raysweep.method import NATURAL, ONE_WORKER, Step, Workers
from raysweep.rng import Rng, seed_of
from raysweep.schedules import now
from raysweep.spec import SpecError
from raysweep.training import checkpoint
from raysweep.training.batchnorm import synchronised
from raysweep.training.checkpoint import Checkpoint, Run
from raysweep.training.config import RunConfig
from raysweep.training.distributed import average_gradients, check, first_says, mean_metrics

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

    Each of several `workers` calls this with the same arguments and takes its share of each batch; the first writes the
    checkpoints, in a folder that all can read. Their weights are those of one worker, up to rounding.
    """
    check(config.method, workers)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = data or load(config.data)
    model = config.model.build(data.channels, data.classes, seed_of(config.seed, "weights")).to(device)
    if workers.size > 1:
        model = synchronised(model, workers)
    optimizer = _sgd(config, model)
    run = Run(run_path)
    last = first_says(max(run.epochs(), default=0), workers, device)
    resumed = checkpoint.read(run.at(last)) if last else None
    history: list[dict[str, float]] = []
    if resumed is not None:
        if resumed.config != config:
            raise SpecError(f"{run_path} holds a run with other settings: choose another --out, or delete the folder")
        history = resumed.history
        resumed.load_model(model)
        resumed.load_optimizer(model, optimizer)
    train, val = data.train.to(device), data.val.to(device)
    saved = resumed
    for epoch in range(len(history), config.epochs):
        metrics = _epoch(config, epoch, model, optimizer, train, data.augment, workers)
        if (epoch + 1) % config.validation.every == 0 or epoch + 1 == config.epochs:
            metrics |= _validate(config, model, val, workers)
        if workers.rank == 0:
            history = [*history, metrics]
            saved = checkpoint.save(run.at(epoch + 1), config, model, optimizer, history, data.fingerprint)
            run.prune({epoch + 1, best_epoch(history)})
        first_says(epoch, workers, device)
        if workers.rank:
            saved = checkpoint.read(run.at(epoch + 1))
            history = saved.history
        assert saved is not None
        report(saved.metrics, saved)
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
    train: Split,
    augment: bool,
    workers: Workers,
) -> dict[str, float]:
    settings = config.at(epoch)
    for group in optimizer.param_groups:
        group.update(lr=now(settings.optim.lr), weight_decay=now(settings.optim.weight_decay))
    started = time.perf_counter()
    seen = _Seen(workers)
    model.train()
    for batch in epoch_batches(train, config.batch_size, config.seed, epoch, augment, workers.rank, workers.size):
        rng = Rng.for_examples(batch.index, config.seed, "train", epoch)
        step = settings.method(model, batch.x, batch.y, rng, workers)
        optimizer.zero_grad(set_to_none=True)
        step.loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(model, workers)
        optimizer.step()
        seen.add(step, batch.y)
    metrics = seen.metrics()
    if not math.isfinite(metrics["train/loss"]):
        raise TrainingFailed(
            f"the loss became {metrics['train/loss']} in epoch {epoch + 1}; a smaller optim.lr may help"
        )
    return {
        "epoch": epoch + 1,
        "train/lr": now(settings.optim.lr),
        "train/seconds": time.perf_counter() - started,
        **metrics,
    }


def _validate(config: RunConfig, model: nn.Module, val: Split, workers: Workers) -> dict[str, float]:
    """The validation metrics; several workers share out the examples."""
    count = min(config.validation.size or len(val), len(val))
    if count < workers.size or workers.size == 1:
        return config.validation(model, val)
    mine = slice(workers.rank, count, workers.size)
    share = Split(val.x[mine], val.y[mine], val.index[mine], val.white)
    return mean_metrics(config.validation(model, share), len(share), workers, val.y.device)


class _Seen:
    """Sums over an epoch, on the device: nothing waits for it until the end."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._sums: dict[str, Tensor] = {}
        self._rows = 0

    def add(self, step: Step, y: Tensor) -> None:
        self._rows += len(y)
        self._sum("loss", step.loss.detach() * step.rows / self._workers.size)
        for name, logits in step.logits.items():
            self._sum("clean" if name == NATURAL else name, (logits.detach().argmax(1) == y).sum())
        for name, adversarial in step.adversarial.items():
            if adversarial.kappa is not None:
                self._sum(f"kappa_{name}", adversarial.kappa.sum())
        for name, weight in step.weights.items():
            self._sum(f"weight_{name}", weight.sum())

    def metrics(self) -> dict[str, float]:
        rows = self._workers.sum(torch.full_like(self._sums["loss"], self._rows)).item()
        return {f"train/{name}": self._workers.sum(total).item() / rows for name, total in self._sums.items()}

    def _sum(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
