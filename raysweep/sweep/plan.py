"""`--plan`: what a sweep would run, on what and for about how long, from a few real steps."""

import json
import math
import time
from argparse import Namespace

import torch

from raysweep.data import Data
from raysweep.evaluation.copies import LEAST_ROWS, attack_copy
from raysweep.rng import Rng
from raysweep.sweep.space import SearchSpace
from raysweep.training.config import RunConfig
from raysweep.training.trainer import build, train_step


def plan(space: SearchSpace, data: Data, args: Namespace) -> int:
    """Print the plan; nothing is written and no cluster is started."""
    config = space.config({})
    torch.set_num_threads(max(1, int(args.cpus_per_trial)))
    seconds = epoch_seconds(config, data)
    epochs = expected_epochs(space, config.epochs)
    half_width = 1.96 * math.sqrt(0.25 / min(len(data.val), config.validation.size or len(data.val)))
    searched = {path: d.model_dump(exclude_defaults=True) for path, d in space.space.items()}
    if args.json:
        facts = {
            "method": config.method.name,
            "trials": space.total,
            "epochs_per_trial": config.epochs,
            "epochs_expected": epochs,
            "searched": searched,
            "train_examples": len(data.train),
            "validation_examples": len(data.val),
            "cpus_per_trial": args.cpus_per_trial,
            "seconds_per_epoch": round(seconds, 2),
            "trial_hours": round(seconds * epochs / 3600, 3),
            "objective_95_half_width": round(half_width, 4),
        }
        print(json.dumps(facts, indent=1))
        return 0
    name, most = config.method.name, space.total * config.epochs
    print(f"{space.total} trials of {name} on {config.data.name}, {config.epochs} epochs each, {config.model.name}")
    for path, distribution in searched.items():
        print(f"  {path}: {distribution}")
    print(f"{len(data.train)} training and {len(data.val)} validation examples")
    print(f"95% interval of the objective: +-{half_width:.3f}")
    print(f"one epoch with validation takes about {seconds:.1f} s here on {args.cpus_per_trial:g} CPU(s)")
    print(f"about {epochs} epochs in all{f' ({most} without early stopping)' if epochs < most else ''}:")
    print(f"{seconds * epochs / 60:.0f} minutes of one worker, divided by the trials that run at once")
    return 0


def epoch_seconds(config: RunConfig, data: Data, steps: int = 2) -> float:
    """Seconds that an epoch with its validation takes, from `steps` real steps after the burn-in."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    faces, data = build(config, data, device), data.to(device)
    faces.model.train()
    settings = config.at(config.epochs - 1)
    batches = data.batches(config.batch_size, config.seed, 0)
    timings = []
    for _, batch in zip(range(steps + 1), batches, strict=False):
        started = time.perf_counter()
        train_step(settings.method, faces, batch, Rng.for_examples(batch.index, 0, "plan"))
        timings.append(time.perf_counter() - started)
    sample = min(len(data.val), config.batch_size)
    started = time.perf_counter()
    judged = attack_copy(faces.model, data.val.images(slice(0, LEAST_ROWS)))
    config.validation.model_copy(update={"size": sample})(judged, data.val)
    validation = (time.perf_counter() - started) / sample * min(len(data.val), config.validation.size or len(data.val))
    # The first step pays for warming up.
    return min(timings) * math.ceil(len(data.train) / config.batch_size) + validation / config.validation.every


def expected_epochs(space: SearchSpace, epochs: int) -> int:
    """Epochs that all trials train together if ASHA lets 1/factor pass at each rung."""
    if space.scheduler.kind == "none":
        return space.total * epochs
    total, going, begun, rung = 0.0, float(space.total), 0, space.scheduler.grace
    while rung < epochs:
        total += going * (rung - begun)
        going, begun, rung = going / space.scheduler.factor, rung, rung * space.scheduler.factor
    return round(total + going * (epochs - begun))
