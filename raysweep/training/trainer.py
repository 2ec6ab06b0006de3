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
from raysweep.data import Batch, Data, Split, load
from raysweep.evaluation.copies import LEAST_ROWS, attack_copy, full_precision, has_tf32
from raysweep.method import ONE_WORKER, Method, Step, Workers
from raysweep.rng import Rng, seed_of
from raysweep.schedules import now
from raysweep.spec import SpecError, flatten
from raysweep.training import checkpoint
from raysweep.training.batchnorm import synchronised
from raysweep.training.checkpoint import Checkpoint, Run
from raysweep.training.config import RunConfig
from raysweep.training.diagnostics import Diagnostics, Histogram, natural_accuracy, write_histograms
from raysweep.training.distributed import average_gradients, check, first_says, mean_metrics
from raysweep.training.faces import Faces
from raysweep.training.pause import Pause
from raysweep.training.prefix import Prefixes, chain

Report = Callable[[dict[str, float], Checkpoint], None]


class TrainingFailed(RuntimeError):
    """Training went wrong in a way that its settings explain: a loss of nan, for one."""


@dataclass(frozen=True)
class Fitted:
    """last: after all epochs; best: of the highest `validation.objective`, the earliest of equals."""

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
    reported: int = 0,
    interrupted: Callable[[], bool] = lambda: False,
    stepped: Callable[[int, int], None] = lambda epoch, steps: None,
) -> Fitted:
    """Train `config` in the folder `run_path`, going on from the last checkpoint there, if any.

    `report(metrics, checkpoint)` is called after each epoch, also for those in the folder but the first `reported`, for
    whoever was told of them last may have died before the next. prefixes: states that other runs trained and this one
    need not (see `training.prefix`). interrupted: asked after each step of a single worker; if it says yes, Interrupted
    is raised, and the next call goes on after that step. stepped: told of each step: its epoch, and how many of this
    epoch are done.

    A run with fewer epochs is gone on with: schedules count epochs from the first, so its weights are those of the
    longer run there. Raises SpecError if the folder holds a run with another config or other data, TrainingFailed if
    the loss becomes nan or inf or the model collapses (`collapse_after`).

    Each of several `workers` calls this with the same arguments and takes its share of each batch; the first writes the
    checkpoints, in a folder that all can read. Their weights are those of one worker, up to rounding.
    """
    check(config.method, workers)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = data or load(config.data)
    faces = build(config, data, device, workers)
    model, optimizer = faces.model, _sgd(config, faces.model)
    run = Run(run_path)
    keys = chain(config, data.fingerprint, workers.size, device) if prefixes else []
    if prefixes is not None and workers.rank == 0 and not run.epochs():
        _adopt_longest(config, run, prefixes, keys)
    last = first_says(max(run.epochs(), default=0), workers, device)
    saved = checkpoint.read(run.at(last)) if last else None
    history: list[dict[str, float]] = []
    if saved is not None:
        check_goes_on(saved, config, data.fingerprint)
        saved.load_state(model, optimizer)
        history = saved.history
        for row in history[reported:]:
            report(row, saved)
        _check_sound(config, history, data)
    splits = data.to(device)
    pause = Pause(interrupted, run, config, model, optimizer, data.fingerprint) if workers.size == 1 else None
    for epoch in range(last, config.epochs):
        # Several workers share prefixes at their start only: waiting for others would hold all of them.
        store = prefixes if workers.size == 1 else None
        with store.training(keys[epoch + 1]) if store else nullcontext(True) as ours:
            theirs = store.adopt(keys[epoch + 1], run.at(epoch + 1), config, history) if store and not ours else None
            if theirs is not None:
                saved = theirs
                saved.load_state(model, optimizer)
            else:
                row, histograms = _epoch(config, epoch, faces, optimizer, splits, workers, history, pause, stepped)
                if workers.rank == 0:
                    history = [*history, row]
                    saved = checkpoint.save(run.at(epoch + 1), config, model, optimizer, history, data.fingerprint)
                    write_histograms(run_path, epoch + 1, histograms)
                    if prefixes is not None:
                        prefixes.put(keys[epoch + 1], saved.path)
                first_says(epoch, workers, device)
                saved = checkpoint.read(run.at(epoch + 1)) if workers.rank or saved is None else saved
        history = saved.history
        if workers.rank == 0:
            run.prune({epoch + 1, best_epoch(config, history)})
        report(history[-1], saved)
        _check_sound(config, history, data)
    assert saved is not None
    first_says(0, workers, device)
    return Fitted(saved, checkpoint.read(run.at(best_epoch(config, history))))


def check_goes_on(saved: Checkpoint, config: RunConfig, fingerprint: str) -> None:
    """Raises SpecError unless a run of `config` on data of this fingerprint can go on from a checkpoint."""
    folder, do = storage.name(saved.path.parent), "choose another --name, or delete the folder"
    if saved.config.model_copy(update={"epochs": config.epochs}) != config or saved.epoch > config.epochs:
        raise SpecError(f"{folder} holds a run with other settings: {do}")
    if saved.meta["data_fingerprint"] != fingerprint:
        raise SpecError(f"{folder} holds a run on other {config.data.name!r} data: {do}")


def build(config: RunConfig, data: Data, device: torch.device, workers: Workers = ONE_WORKER) -> Faces:
    """The config's network on a device, with the weights that its seed gives, ready to be trained and attacked."""
    compute = config.compute.on(device)
    if not has_tf32(device):
        for key, value in flatten(config).items():
            if key.endswith(".tf32") and value is True:
                raise SpecError(f"{key} = true: there is no TF32 on {device.type}; leave it false")
    model = config.model.build(data.channels, data.classes, seed_of(config.seed, "weights")).to(device)
    if workers.size > 1:
        model = synchronised(model, workers)
    return Faces(model, data.train.images(slice(0, 1)).to(device), compute)


def train_step(settings: Method, faces: Faces, batch: Batch, rng: Rng, workers: Workers = ONE_WORKER) -> Step:
    """Attacks, losses and their gradient, in `.grad` of the model's parameters: all of a step but the update."""
    faces.refresh()
    x = batch.x.contiguous(memory_format=faces.layout)
    step = settings(faces.trained, x, batch.y, rng, workers, faces.attacked)
    faces.model.zero_grad(set_to_none=True)
    step.loss.backward()  # type: ignore[no-untyped-call]
    average_gradients(faces.model, workers)
    return step


def _adopt_longest(config: RunConfig, run: Run, prefixes: Prefixes, keys: list[str]) -> None:
    """Take over the longest stored prefix, if there is one, and the best epoch in it if that is an earlier one."""
    for epoch in prefixes.stored(keys):
        if epoch == 0 or (state := prefixes.get(keys[epoch])) is None:
            continue
        with suppress(SpecError):  # it has just outgrown another run's limit
            best = best_epoch(config, checkpoint.read(state).history)
            if prefixes.adopt(keys[best], run.at(best), config) and prefixes.adopt(keys[epoch], run.at(epoch), config):
                return


def _check_sound(config: RunConfig, history: list[dict[str, float]], data: Data) -> None:
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


def best_epoch(config: RunConfig, history: list[dict[str, float]]) -> int:
    """1-based epoch of the highest `validation.objective`; the earliest of equals."""
    scores = [row.get(config.validation.objective, -math.inf) for row in history]
    return scores.index(max(scores)) + 1


def _sgd(config: RunConfig, model: nn.Module) -> torch.optim.SGD:
    # lr and weight decay are set each epoch from their schedules.
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=config.optim.momentum, nesterov=config.optim.nesterov)


def _epoch(
    config: RunConfig,
    epoch: int,
    faces: Faces,
    optimizer: torch.optim.Optimizer,
    data: Data,
    workers: Workers,
    history: list[dict[str, float]],
    pause: Pause | None,
    stepped: Callable[[int, int], None],
) -> tuple[dict[str, float], dict[str, Histogram]]:
    """Train one epoch, then look at the model on validation: a row of metrics, and what was seen on the way."""
    settings = config.at(epoch)
    for group in optimizer.param_groups:
        group.update(lr=now(settings.optim.lr), weight_decay=now(settings.optim.weight_decay))
    started = time.perf_counter()
    seen = Diagnostics(settings.method, workers)
    done = pause.begin(history, seen) if pause else 0
    faces.model.train()
    with faces.float32():
        batches = data.batches(config.batch_size, config.seed, epoch, workers.rank, workers.size)
        for steps, batch in enumerate(islice(batches, done, None), done + 1):
            rng = Rng.for_examples(batch.index, config.seed, "train", epoch)
            step = train_step(settings.method, faces, batch, rng, workers)
            optimizer.step()
            seen.add(step, batch.y)
            stepped(epoch + 1, steps)
            if pause:
                pause.after(steps, seen)
    row = {"epoch": epoch + 1, "train/lr": now(settings.optim.lr), **seen.metrics()}
    if not math.isfinite(row["train/loss"]):
        raise TrainingFailed(f"the loss became {row['train/loss']} in epoch {epoch + 1}; a smaller optim.lr may help")
    row["train/seconds"] = pause.seconds if pause else time.perf_counter() - started
    if (epoch + 1) % config.validation.every == 0 or epoch + 1 == config.epochs:
        started = time.perf_counter()
        with full_precision(data.val.y.device):
            # The form in which AutoAttack will meet it, whatever `compute` says.
            judged = attack_copy(faces.model, data.val.images(slice(0, LEAST_ROWS)))
            row |= _validate(config, judged, data.val, workers)
            row["train/natural"] = natural_accuracy(judged, data.train)
        row["validation_seconds"] = time.perf_counter() - started
    return row, seen.histograms()


def _validate(config: RunConfig, model: nn.Module, val: Split, workers: Workers) -> dict[str, float]:
    """The validation metrics; several workers share out the examples."""
    count = min(config.validation.size or len(val), len(val))
    if count < workers.size or workers.size == 1:
        return config.validation(model, val)
    mine = slice(workers.rank, count, workers.size)
    share = Split(val.x[mine], val.y[mine], val.index[mine], val.white)
    return mean_metrics(config.validation(model, share), len(share), workers, val.y.device)
