"""Plan of a sweep: which trials are left, what they cost and how long they take."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from raysweep.data import DatasetSplits
from raysweep.lazy_modules import torch
from raysweep.models import ModelSpec
from raysweep.spec import JsonDict
from raysweep.sweep.resources import Resources
from raysweep.sweep.search_space import DEFAULT_PREFIX_GIB, SearchSpace
from raysweep.sweep.space_warnings import list_space_warnings
from raysweep.sweep.trial import Trial
from raysweep.training.config import TrainingConfig
from raysweep.training.training_summary import (
    count_per_class,
    list_data_warnings,
    summarize_training,
)


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will run and about how long it takes.

    Attributes:
        method_name: Name of the training method.
        dataset_name: Name of the data set.
        model_name: Name of the model.
        n_trials: Trials of the whole sweep.
        n_trials_left: Trials that still have epochs to run.
        has_existing_trials: Whether some trials were started before.
        epochs_per_trial: Epochs of a trial that is not stopped early.
        expected_epochs: Epochs left in all trials together, if early stopping works as expected.
        max_epochs: Epochs left in all trials together, without early stopping.
        base_method_name: Name of the base method; "" without runs of it.
        n_base_runs: Base runs of the whole sweep.
        n_base_epochs: Epochs left in them, which are part of `expected_epochs` and `max_epochs`.
        n_repeats: Repeats of the whole sweep, at most.
        n_repeat_epochs: Epochs left in them, at most, which are part of `expected_epochs` and
            `max_epochs`.
        n_finalists: Trials that AutoAttack attacks at the end; with several objectives, 1 or more
            stands for the whole Pareto front.
        distributions: For each searched parameter (dotted path) its distribution, without defaults.
        n_train_examples: Size of the training split.
        n_validation_examples: Size of the validation split.
        resources: Resources of one trial, with the number of GPUs resolved.
        concurrency: Number of trials that run at the same time.
        seconds_per_epoch: Estimated seconds of one epoch with its share of validation; nan if it
            cannot be estimated here in a few seconds.
        objective_half_width: Half the width of the objective's 95% confidence interval, for an
            accuracy (in [0, 1]) of 0.5, where the interval is widest.
        ranges: For each searched parameter its values in words.
        summary: Lines about images, attacks and learning rate (see `summarize_training`).
        warnings: What cannot act (see `list_space_warnings`).
        image_shape: Channels, height and width of an image.
        train_class_counts: Number of training examples of each class.
        validation_class_counts: Number of validation examples of each class.
        threat: Norm and radius of the validation attacks.
        checkpoint_bytes: Estimated size of the checkpoints that are still to be written: the last
            and the best one of each trial.
        prefix_bytes: Largest size of the states that its trials add to the prefix cache.
    """

    method_name: str
    dataset_name: str
    model_name: str
    n_trials: int
    n_trials_left: int
    has_existing_trials: bool
    epochs_per_trial: int
    expected_epochs: int
    max_epochs: int
    base_method_name: str
    n_base_runs: int
    n_base_epochs: int
    n_repeats: int
    n_repeat_epochs: int
    n_finalists: int
    distributions: dict[str, JsonDict]
    n_train_examples: int
    n_validation_examples: int
    resources: Resources
    concurrency: int
    seconds_per_epoch: float
    objective_half_width: float
    ranges: dict[str, str]
    summary: list[str]
    warnings: list[str]
    image_shape: list[int]
    train_class_counts: list[int]
    validation_class_counts: list[int]
    threat: str
    checkpoint_bytes: int
    prefix_bytes: int

    @property
    def remaining_trial_seconds(self) -> float:
        """Estimated seconds of all trials that are left, one after the other; nan if unknown."""
        return self.seconds_per_epoch * self.expected_epochs

    @property
    def wall_seconds(self) -> float:
        """Estimated seconds from start to end, `concurrency` trials at once; nan if unknown."""
        return self.remaining_trial_seconds / self.concurrency


def plan_sweep(
    space: SearchSpace,
    data: DatasetSplits,
    resources: Resources,
    address: str | None,
    existing_trials: Sequence[Trial] = (),
) -> SweepPlan:
    """Plan a sweep, or the rest of it. Writes nothing and starts no cluster.

    Args:
        space: The sweep's search space.
        data: Its data; a few training steps on it are timed.
        resources: What one trial holds.
        address: Ray cluster to ask for its resources; None for `RAY_ADDRESS` or, if that is not
            set, this machine.
        existing_trials: Trials, base runs and repeats that were started before.

    Returns:
        The plan.

    Raises:
        SpecError: If not even one trial fits the cluster, or no cluster answers at `address`.
    """
    # It imports torch, which settings do not need.
    from raysweep.sweep.epoch_timing import count_validated_examples, estimate_epoch_seconds

    config = space.trial_config({})
    cluster, nodes = available_capacity(address)
    resources = resources.resolve(cluster)
    trials = [trial for trial in existing_trials if trial.kind == "trial"]
    start_epochs = list_completed_epochs(space, config.epochs, trials)
    base_runs = [trial for trial in existing_trials if trial.kind == "base run"]
    base_epochs = _list_completed_epochs(space.base_runs or 0, config.epochs, base_runs)
    n_base_epochs = sum(config.epochs - epoch for epoch in base_epochs)
    repeats = [trial for trial in existing_trials if trial.kind == "repeat"]
    n_repeats = sum(space.leaders_by_round)
    repeat_epochs = _list_completed_epochs(n_repeats, config.epochs, repeats)
    n_repeat_epochs = sum(config.epochs - epoch for epoch in repeat_epochs)
    n_fixed_epochs = n_base_epochs + n_repeat_epochs
    concurrency = min(
        resources.max_concurrent_trials(cluster, nodes),
        max(len(start_epochs) + len(base_epochs), *space.leaders_by_round[:1], 1),
    )
    seconds_per_epoch = estimate_epoch_seconds(config, data, resources)
    max_epochs = sum(config.epochs - epoch for epoch in start_epochs) + n_fixed_epochs
    expected_epochs = sum(
        expected_trial_epochs(space, config.epochs, epoch) for epoch in start_epochs
    )
    return SweepPlan(
        method_name=config.method.name,
        dataset_name=config.data.name,
        model_name=config.model.name,
        n_trials=space.n_trials,
        n_trials_left=len(start_epochs),
        has_existing_trials=bool(trials),
        epochs_per_trial=config.epochs,
        expected_epochs=round(expected_epochs) + n_fixed_epochs,
        max_epochs=max_epochs,
        base_method_name=space.base_method_name,
        n_base_runs=space.base_runs or 0,
        n_base_epochs=n_base_epochs,
        n_repeats=n_repeats,
        n_repeat_epochs=n_repeat_epochs,
        n_finalists=min(space.finalists or 0, space.n_trials),
        distributions={
            path: distribution.model_dump(exclude_defaults=True)
            for path, distribution in space.space.items()
        },
        n_train_examples=len(data.train),
        n_validation_examples=len(config.validation.select_split(data)),
        resources=resources,
        concurrency=concurrency,
        seconds_per_epoch=math.nan if seconds_per_epoch is None else seconds_per_epoch,
        objective_half_width=1.96 * math.sqrt(0.25 / count_validated_examples(config, data)),
        ranges={path: distribution.describe() for path, distribution in space.space.items()},
        summary=summarize_training(config, data, list(space.space)),
        warnings=[*list_space_warnings(space), *list_data_warnings(config, data)],
        image_shape=list(data.train.x.shape[1:]),
        train_class_counts=count_per_class(data.train, data.classes),
        validation_class_counts=count_per_class(config.validation.select_split(data), data.classes),
        threat=config.validation.threat,
        checkpoint_bytes=(len(start_epochs) + len(base_epochs) + len(repeat_epochs))
        * estimate_trial_bytes(config, data),
        prefix_bytes=estimate_prefix_bytes(space, max_epochs, data),
    )


def estimate_trial_bytes(config: TrainingConfig, data: DatasetSplits) -> int:
    """Estimate the bytes of a trial's checkpoints: the states of the last and the best epoch.

    Args:
        config: Training config of the trial.
        data: Its data.
    """
    return 2 * estimate_state_bytes(config, data)


def estimate_prefix_bytes(space: SearchSpace, n_epochs: int, data: DatasetSplits) -> int:
    """Estimate what trials of a sweep leave in the prefix cache.

    Args:
        space: Search space of the sweep.
        n_epochs: Epochs that the trials train.
        data: Their data.
    """
    if not space.share_prefixes:
        return 0
    stored_bytes = n_epochs * estimate_state_bytes(space.trial_config({}), data)
    return limit_prefix_bytes(stored_bytes, space.prefix_gib)


def limit_prefix_bytes(stored_bytes: int, prefix_gib: float = DEFAULT_PREFIX_GIB) -> int:
    """Return how many bytes of states a prefix cache keeps.

    Args:
        stored_bytes: Size of all states that trials store.
        prefix_gib: Limit of the cache in GiB.
    """
    return min(stored_bytes, int(prefix_gib * 2**30))


def estimate_state_bytes(config: TrainingConfig, data: DatasetSplits) -> int:
    """Estimate the bytes of the state after an epoch: weights and momentum.

    Args:
        config: Training config of the trial.
        data: Its data.
    """
    return _measure_state(config.model, data.channels, data.classes)


@functools.cache
def _measure_state(model_spec: ModelSpec, channels: int, classes: int) -> int:
    """Return the bytes of a network's weights and momentum; each network is built once."""
    model = model_spec.build_model(channels, classes, 0)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    momentum = sum(parameter.nbytes for parameter in model.parameters())
    return int(weights + momentum)


def available_capacity(address: str | None) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Look up the resources on which a sweep would run.

    Args:
        address: Ray cluster to ask; None for `RAY_ADDRESS` or, if that is not set, this machine.

    Returns:
        Resources of all nodes together, and of each node, by Ray's names (`CPU`, `GPU`).

    Raises:
        SpecError: If no cluster answers at `address`.
    """
    if address or os.environ.get("RAY_ADDRESS"):
        from raysweep.sweep.cluster import connect_to_cluster, node_capacities

        with connect_to_cluster(address) as cluster:
            return cluster, node_capacities()
    import joblib

    machine = {"CPU": float(joblib.cpu_count()), "GPU": float(torch.cuda.device_count())}
    return machine, [machine]


def list_completed_epochs(
    space: SearchSpace, max_epochs: int, existing_trials: Sequence[Trial]
) -> list[int]:
    """List how many epochs each trial that is still to run already has.

    Args:
        space: The sweep's search space.
        max_epochs: Epochs of a trial whose params do not set `epochs`.
        existing_trials: Trials that were started before.

    Returns:
        Numbers of epochs: first of the trials that will resume, then a 0 for each new trial.
    """
    return _list_completed_epochs(space.n_trials, max_epochs, existing_trials)


def _list_completed_epochs(
    n_runs: int, max_epochs: int, existing_trials: Sequence[Trial]
) -> list[int]:
    """List the epochs that runs which are still to be trained have; `n_runs` are all runs."""
    resumed_epochs = []
    for trial in existing_trials:
        trial_epochs = trial.params.get("epochs", max_epochs)
        is_extended = trial.state == "finished" and trial.epoch < trial_epochs
        if trial.state == "running" or is_extended:
            resumed_epochs.append(trial.epoch)
    return resumed_epochs + [0] * max(0, n_runs - len(existing_trials))


def expected_sweep_epochs(space: SearchSpace, max_epochs: int) -> int:
    """Return the epochs that a new sweep is expected to train, with base runs and repeats.

    Args:
        space: The sweep's search space.
        max_epochs: Epochs of a trial that is not stopped early.
    """
    other_epochs = (space.count_all_runs() - space.n_trials) * max_epochs
    return round(space.n_trials * expected_trial_epochs(space, max_epochs)) + other_epochs


def expected_trial_epochs(space: SearchSpace, max_epochs: int, starting_epoch: int = 0) -> float:
    """Return the epochs that a trial is expected to train.

    Assumes that a share of 1 / reduction_factor of the trials passes each rung of ASHA.

    Args:
        space: The sweep's search space.
        max_epochs: Epochs of a trial that is not stopped early.
        starting_epoch: Epochs that the trial already has.
    """
    expected, share = 0.0, 1.0
    for rung in space.scheduler.rungs(max_epochs):
        if rung > starting_epoch:
            expected += share * (rung - starting_epoch)
            share, starting_epoch = share / space.scheduler.reduction_factor, rung
    return expected + share * (max_epochs - starting_epoch)
