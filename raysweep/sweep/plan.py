"""`--plan`: what a sweep would run, on what and for about how long, from a few real steps."""

import json
import math
import os
import time
from collections.abc import Sequence

import torch

from raysweep.data import Dataset
from raysweep.evaluation.attack_model import MIN_BATCH_ROWS, make_attack_model
from raysweep.formatting import format_count, format_duration
from raysweep.rng import ExampleRng
from raysweep.sweep.ledger import Trial
from raysweep.sweep.resources import Resources
from raysweep.sweep.search_space import SearchSpace
from raysweep.training.config import TrainingConfig
from raysweep.training.trainer import build_model_variants, compute_step_gradients

# Seconds for four images of 32 x 32: a small network needs a third to two thirds, a ResNet-18 up to
# twice as much.
_FAST_FORWARD_SECONDS = 0.03
# Seconds of a step beside which warming up is nothing.
_LONG_STEP_SECONDS = 5.0


def plan_sweep(
    space: SearchSpace,
    data: Dataset,
    resources: Resources,
    address: str | None,
    as_json: bool,
    existing_trials: Sequence[Trial] = (),
) -> int:
    """Print the plan; nothing is written and no cluster is started (one that is named is asked what
    it has).

    trials: what there is of the sweep already; the plan is for the rest.
    """
    config = space.trial_config({})
    cluster, nodes = available_capacity(address)
    resources = resources.resolve(cluster)
    begun = starting_epochs(space, config.epochs, existing_trials)
    concurrent = min(resources.max_concurrent_trials(cluster, nodes), max(len(begun), 1))
    seconds = estimate_epoch_seconds(config, data, resources)
    epochs = round(sum(expected_trial_epochs(space, config.epochs, epoch) for epoch in begun))
    half_width = 1.96 * math.sqrt(
        0.25 / min(len(data.val), config.validation.size or len(data.val))
    )
    searched = {path: d.model_dump(exclude_defaults=True) for path, d in space.space.items()}
    wall = seconds * epochs / concurrent
    if as_json:
        facts = {
            "method": config.method.name,
            "trials": space.n_trials,
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
    count = (
        f"{len(begun)} of {space.n_trials} trials are left:"
        if existing_trials
        else f"{format_count(space.n_trials, 'trial')} of"
    )
    print(
        f"{count} {name} on {config.data.name}, {format_count(config.epochs, 'epoch')} each, {config.model.name}"
    )
    for path, distribution in searched.items():
        print(f"  {path}: {distribution}")
    print(f"{len(data.train)} training and {len(data.val)} validation examples")
    print(f"95% interval of the objective: +-{half_width:.3f}")
    each = f", shared by {resources.workers} workers" if resources.workers > 1 else ""
    print(
        f"a trial holds {resources.cpus:g} CPU(s) and {resources.gpus:g} GPU(s){each}; {concurrent} run at once"
    )
    print(
        f"one epoch with validation takes about {seconds:.1f} s, estimated from a few steps of one worker here"
    )
    print(
        f"about {format_count(epochs, 'epoch')} in all{f' ({most} without early stopping)' if epochs < most else ''}:"
    )
    print(
        f"{format_duration(seconds * epochs)} of trials, {format_duration(wall)} from start to end"
    )
    return 0


def available_capacity(address: str | None) -> tuple[dict[str, float], list[dict[str, float]]]:
    """What the cluster has, in all and by node; without one, what a cluster on this machine would
    have.
    """
    if address or os.environ.get("RAY_ADDRESS"):
        from raysweep.sweep.cluster import connect_to_cluster, node_capacities

        with connect_to_cluster(address) as cluster:
            return cluster, node_capacities()
    here = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    return here, [here]


def estimate_epoch_seconds(
    config: TrainingConfig, data: Dataset, resources: Resources, n_steps: int = 2
) -> float:
    """Seconds of an epoch with its validation, from `steps` real steps after the burn-in, or one
    that takes long.

    Each of several workers takes its share of a batch and of the validation; what they say to each
    other comes on top.
    """
    torch.set_num_threads(resources.threads_per_worker)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    faces, data = build_model_variants(config, data, device), data.to(device)
    faces.model.train()
    settings = config.resolve_at(config.epochs - 1)
    batches = data.iter_train_batches(config.batch_size, config.seed, 0, 0, resources.workers)
    timings = []
    for _, batch in zip(range(n_steps + 1), batches, strict=False):
        started = time.perf_counter()
        compute_step_gradients(
            settings.method, faces, batch, ExampleRng.for_examples(batch.index, 0, "plan")
        )
        timings.append(time.perf_counter() - started)
        if timings[-1] > _LONG_STEP_SECONDS:
            break
    judged = min(len(data.val), config.validation.size or len(data.val)) / resources.workers
    sample = math.ceil(min(judged, config.batch_size))
    started = time.perf_counter()
    net = make_attack_model(faces.model, data.val.get_float_images(slice(0, MIN_BATCH_ROWS)))
    config.validation.replace(size=sample)(net, data.val)
    validation = (time.perf_counter() - started) / sample * judged
    # The first step pays for warming up.
    return (
        min(timings) * math.ceil(len(data.train) / config.batch_size)
        + validation / config.validation.every
    )


def maybe_estimate_epoch_seconds(
    config: TrainingConfig, data: Dataset, resources: Resources
) -> float | None:
    """`epoch_seconds`, or None where a few steps would take minutes here or say nothing of where
    the trials run.
    """
    nvidia = torch.cuda.is_available()
    torch.set_num_threads(resources.threads_per_worker)
    if bool(resources.n_gpus) != nvidia or not (nvidia or _is_forward_fast(config, data)):
        return None
    return estimate_epoch_seconds(config, data, resources)


def _is_forward_fast(config: TrainingConfig, data: Dataset) -> bool:
    """Whether this CPU is through with four images so soon that a step of training takes it
    seconds.
    """
    model = build_model_variants(config, data, torch.device("cpu")).model.eval()
    timings = []
    for _ in range(2):
        started = time.perf_counter()
        with torch.no_grad():
            model(data.val.get_float_images(slice(0, 4)))
        timings.append(time.perf_counter() - started)
    return min(timings) < _FAST_FORWARD_SECONDS


def starting_epochs(
    space: SearchSpace, max_epochs: int, existing_trials: Sequence[Trial]
) -> list[int]:
    """For each trial that is still to run the epochs that it has behind it. epochs: what the sweep
    is to have now.
    """
    wanted = [(trial, trial.params.get("epochs", max_epochs)) for trial in existing_trials]
    going = [
        t.epoch
        for t, most in wanted
        if t.state == "running" or (t.state == "finished" and t.epoch < most)
    ]
    return going + [0] * (space.n_trials - len(existing_trials))


def expected_sweep_epochs(space: SearchSpace, max_epochs: int) -> int:
    """Epochs that all trials train together."""
    return round(space.n_trials * expected_trial_epochs(space, max_epochs))


def expected_trial_epochs(space: SearchSpace, max_epochs: int, starting_epoch: int = 0) -> float:
    """Epochs that a trial with so many behind it can expect to train if ASHA lets 1/factor pass at
    each rung.
    """
    expected, share = 0.0, 1.0
    for rung in space.scheduler.rungs(max_epochs):
        if rung > starting_epoch:
            expected += share * (rung - starting_epoch)
            share, starting_epoch = share / space.scheduler.reduction_factor, rung
    return expected + share * (max_epochs - starting_epoch)
