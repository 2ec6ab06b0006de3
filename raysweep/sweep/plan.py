"""`--plan`: what a sweep would run, on what and for about how long, from a few real steps."""

import json
import math
import os
import time
from collections.abc import Sequence

import torch

from raysweep.data import Data
from raysweep.evaluation.copies import LEAST_ROWS, attack_copy
from raysweep.rng import Rng
from raysweep.sweep.ledger import Trial
from raysweep.sweep.resources import Resources
from raysweep.sweep.space import SearchSpace
from raysweep.training.config import RunConfig
from raysweep.training.trainer import build, train_step
from raysweep.wording import counted, duration

# Seconds for four images of 32 x 32: a small network needs a third to two thirds, a ResNet-18 up to twice as much.
_SMALL = 0.03
# Seconds of a step beside which warming up is nothing.
_LONG = 5.0


def plan(
    space: SearchSpace,
    data: Data,
    resources: Resources,
    address: str | None,
    as_json: bool,
    trials: Sequence[Trial] = (),
) -> int:
    """Print the plan; nothing is written and no cluster is started (one that is named is asked what it has).

    trials: what there is of the sweep already; the plan is for the rest.
    """
    config = space.config({})
    cluster, nodes = machine(address)
    resources = resources.on(cluster)
    begun = left(space, config.epochs, trials)
    concurrent = min(resources.concurrent(cluster, nodes), max(len(begun), 1))
    seconds = epoch_seconds(config, data, resources)
    epochs = round(sum(trial_epochs(space, config.epochs, epoch) for epoch in begun))
    half_width = 1.96 * math.sqrt(0.25 / min(len(data.val), config.validation.size or len(data.val)))
    searched = {path: d.model_dump(exclude_defaults=True) for path, d in space.space.items()}
    wall = seconds * epochs / concurrent
    if as_json:
        facts = {
            "method": config.method.name,
            "trials": space.total,
            "trials_left": len(begun),
            "epochs_per_trial": config.epochs,
            "epochs_expected": epochs,
            "searched": searched,
            "train_examples": len(data.train),
            "validation_examples": len(data.val),
            "workers_per_trial": resources.workers,
            "cpus_per_trial": resources.cpus,
            "gpus_per_trial": resources.gpus,
            "trials_at_once": concurrent,
            "seconds_per_epoch": round(seconds, 2),
            "trial_hours": round(seconds * epochs / 3600, 3),
            "wall_hours": round(wall / 3600, 3),
            "objective_95_half_width": round(half_width, 4),
        }
        print(json.dumps(facts, indent=1))
        return 0
    name, most = config.method.name, sum(config.epochs - epoch for epoch in begun)
    count = f"{len(begun)} of {space.total} trials are left:" if trials else f"{counted(space.total, 'trial')} of"
    print(f"{count} {name} on {config.data.name}, {counted(config.epochs, 'epoch')} each, {config.model.name}")
    for path, distribution in searched.items():
        print(f"  {path}: {distribution}")
    print(f"{len(data.train)} training and {len(data.val)} validation examples")
    print(f"95% interval of the objective: +-{half_width:.3f}")
    each = f", shared by {resources.workers} workers" if resources.workers > 1 else ""
    print(f"a trial holds {resources.cpus:g} CPU(s) and {resources.gpus:g} GPU(s){each}; {concurrent} run at once")
    print(f"one epoch with validation takes about {seconds:.1f} s, estimated from a few steps of one worker here")
    print(f"about {counted(epochs, 'epoch')} in all{f' ({most} without early stopping)' if epochs < most else ''}:")
    print(f"{duration(seconds * epochs)} of trials, {duration(wall)} from start to end")
    return 0


def machine(address: str | None) -> tuple[dict[str, float], list[dict[str, float]]]:
    """What the cluster has, in all and by node; without one, what a cluster on this machine would have."""
    if address or os.environ.get("RAY_ADDRESS"):
        from raysweep.sweep.cluster import connected, nodes

        with connected(address) as cluster:
            return cluster, nodes()
    here = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    return here, [here]


def epoch_seconds(config: RunConfig, data: Data, resources: Resources, steps: int = 2) -> float:
    """Seconds of an epoch with its validation, from `steps` real steps after the burn-in, or one that takes long.

    Each of several workers takes its share of a batch and of the validation; what they say to each other comes on top.
    """
    torch.set_num_threads(resources.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    faces, data = build(config, data, device), data.to(device)
    faces.model.train()
    settings = config.at(config.epochs - 1)
    batches = data.batches(config.batch_size, config.seed, 0, 0, resources.workers)
    timings = []
    for _, batch in zip(range(steps + 1), batches, strict=False):
        started = time.perf_counter()
        train_step(settings.method, faces, batch, Rng.for_examples(batch.index, 0, "plan"))
        timings.append(time.perf_counter() - started)
        if timings[-1] > _LONG:
            break
    judged = min(len(data.val), config.validation.size or len(data.val)) / resources.workers
    sample = math.ceil(min(judged, config.batch_size))
    started = time.perf_counter()
    net = attack_copy(faces.model, data.val.images(slice(0, LEAST_ROWS)))
    config.validation.model_copy(update={"size": sample})(net, data.val)
    validation = (time.perf_counter() - started) / sample * judged
    # The first step pays for warming up.
    return min(timings) * math.ceil(len(data.train) / config.batch_size) + validation / config.validation.every


def quick_epoch_seconds(config: RunConfig, data: Data, resources: Resources) -> float | None:
    """`epoch_seconds`, or None where a few steps would take minutes here or say nothing of where the trials run."""
    nvidia = torch.cuda.is_available()
    torch.set_num_threads(resources.threads)
    if bool(resources.held_gpus) != nvidia or not (nvidia or _small(config, data)):
        return None
    return epoch_seconds(config, data, resources)


def _small(config: RunConfig, data: Data) -> bool:
    """Whether this CPU is through with four images so soon that a step of training takes it seconds."""
    model = build(config, data, torch.device("cpu")).model.eval()
    timings = []
    for _ in range(2):
        started = time.perf_counter()
        with torch.no_grad():
            model(data.val.images(slice(0, 4)))
        timings.append(time.perf_counter() - started)
    return min(timings) < _SMALL


def left(space: SearchSpace, epochs: int, trials: Sequence[Trial]) -> list[int]:
    """For each trial that is still to run the epochs that it has behind it. epochs: what the sweep is to have now."""
    wanted = [(trial, trial.settings.get("epochs", epochs)) for trial in trials]
    going = [t.epoch for t, most in wanted if t.state == "running" or (t.state == "finished" and t.epoch < most)]
    return going + [0] * (space.total - len(trials))


def expected_epochs(space: SearchSpace, epochs: int) -> int:
    """Epochs that all trials train together."""
    return round(space.total * trial_epochs(space, epochs))


def trial_epochs(space: SearchSpace, epochs: int, begun: int = 0) -> float:
    """Epochs that a trial with so many behind it can expect to train if ASHA lets 1/factor pass at each rung."""
    expected, share = 0.0, 1.0
    for rung in space.scheduler.rungs(epochs):
        if rung > begun:
            expected += share * (rung - begun)
            share, begun = share / space.scheduler.factor, rung
    return expected + share * (epochs - begun)
