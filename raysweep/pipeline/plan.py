"""Plan of `raysweep run --plan`: stages to run, their resources and expected training time."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from raysweep.data import DatasetSplits, DataSpec, load_data
from raysweep.pipeline.artifact import Artifact
from raysweep.pipeline.pipeline import Pipeline, find_first_repeated_stage, plan_stages
from raysweep.pipeline.promote import PromoteStage
from raysweep.pipeline.stage import PlannedTraining, Stage, TrainingOverrides
from raysweep.pipeline.train import TrainStage
from raysweep.pipeline.tune import TuneStage
from raysweep.spec import JsonDict
from raysweep.sweep.epoch_timing import estimate_epoch_seconds
from raysweep.sweep.plan import (
    available_capacity,
    estimate_state_bytes,
    estimate_trial_bytes,
)
from raysweep.sweep.resources import Resources
from raysweep.training.config import TrainingConfig
from raysweep.training.training_summary import (
    PLAN_WIDTH,
    list_data_warnings,
    list_summary_rows,
    wrap_summary_rows,
)

# Resources of each node of a cluster, by name.
NodeResources = Sequence[dict[str, float]]
DatasetLoader = Callable[[DataSpec], DatasetSplits]
SUMMARY_WIDTH = PLAN_WIDTH - 3
"""Columns of the lines about the trainings of a stage, which are indented below it."""


def plan_pipeline(
    pipeline: Pipeline,
    training_overrides: TrainingOverrides,
    folder: Path,
    address: str | None,
    first_stage: str | None,
) -> tuple[list[JsonDict], dict[str, float]]:
    """Plan a pipeline without writing anything.

    Args:
        pipeline: The pipeline.
        training_overrides: Training settings outside of the stages.
        folder: Folder of the artifacts.
        address: Address of the Ray cluster; None for this machine.
        first_stage: Kind or number of the first stage to make again, as for `run_pipeline`.

    Returns:
        A row for each stage, and the resources of the cluster by name. Rows of stages that train
        have `cpus_per_trial`, `gpus_per_trial`, `trials_at_once`, and `expected_seconds`,
        `checkpoint_bytes` and `state_bytes` (of the states after all epochs, which the prefix cache
        keeps up to its limit), each None if unknown. Rows of stages to run have a `summary` of
        their trainings and `warnings`, which are lists of lines.

    Raises:
        SpecError: If there is no such first stage, or a trial fits on no node.
    """
    first_index = find_first_repeated_stage(first_stage, pipeline, folder)
    cluster, nodes = available_capacity(address)
    salt = pipeline.compute_rerun_key()
    load_dataset = functools.cache(load_data)
    rows: list[JsonDict] = []
    stages_to_run: list[tuple[JsonDict, Stage, list[PlannedTraining]]] = []
    for planned_stage, (stage, upstream_configs) in zip(
        plan_stages(pipeline, training_overrides, folder, salt),
        pipeline.iter_stages_with_received_configs(training_overrides),
        strict=True,
    ):
        artifact = Artifact.read_if_finished(planned_stage.folder)
        is_before_first = planned_stage.number < first_index
        row: JsonDict = {
            "number": planned_stage.number,
            "kind": planned_stage.kind,
            "digest": planned_stage.stage_digest,
            "done": artifact is not None and is_before_first,
            "again": artifact is not None and not is_before_first,
            "seconds": artifact.seconds if artifact else None,
            "what": stage.describe_stage(training_overrides),
        }
        if artifact is None:
            trainings = stage.plan_trainings(training_overrides, upstream_configs)
            stages_to_run.append((row, stage, trainings))
            row["summary"] = _summarize_trainings(
                stage, trainings, training_overrides, load_dataset
            )
            warnings = [*stage.list_warnings(training_overrides, upstream_configs)]
            for training in trainings:
                warnings += list_data_warnings(training.config, load_dataset(training.config.data))
            row["warnings"] = list(dict.fromkeys(warnings))
        rows.append(row)
    all_trainings = [training for _, _, trainings in stages_to_run for training in trainings]
    estimator = _TrainingEstimator(all_trainings, load_dataset)
    for row, stage_to_run, trainings in stages_to_run:
        row |= _estimate_stage_effort(stage_to_run, trainings, estimator, cluster, nodes)
    return rows, cluster


class _TrainingEstimator:
    """Estimates time and disk space of trainings; each config is timed once.

    Args:
        trainings: All trainings of a plan, which share the time for timing them.
        load_dataset: Loads data sets.
    """

    def __init__(self, trainings: Sequence[PlannedTraining], load_dataset: DatasetLoader) -> None:
        self._load_dataset = load_dataset
        configs = {_timing_digest(training.config) for training in trainings}
        self._share_of_limit = 1 / max(len(configs), 1)
        self._epoch_seconds: dict[tuple[str, Resources], float | None] = {}

    def estimate_wall_seconds(
        self, trainings: Sequence[PlannedTraining], resources: Resources, concurrency: int
    ) -> float | None:
        """Estimate the wall-clock time of trainings one after the other; None if it is unknown.

        Savings by shared prefixes are not counted.
        """
        total = 0.0
        for training in trainings:
            if training.total_epochs is None:
                return None
            key = _timing_digest(training.config), resources
            if key not in self._epoch_seconds:
                self._epoch_seconds[key] = estimate_epoch_seconds(
                    training.config,
                    self._load_dataset(training.config.data),
                    resources,
                    share_of_limit=self._share_of_limit,
                )
            epoch_seconds = self._epoch_seconds[key]
            if epoch_seconds is None:
                return None
            runs_at_once = min(concurrency, training.concurrency)
            total += epoch_seconds * training.total_epochs / runs_at_once
        return total

    def estimate_checkpoint_bytes(self, trainings: Sequence[PlannedTraining]) -> int | None:
        """Estimate the size of the checkpoints of trainings; None if their number is unknown."""
        total = 0.0
        for training in trainings:
            if training.n_runs is None:
                return None
            dataset = self._load_dataset(training.config.data)
            total += training.n_runs * estimate_trial_bytes(training.config, dataset)
        return round(total)

    def estimate_state_bytes(self, trainings: Sequence[PlannedTraining]) -> int | None:
        """Estimate the size of the states after all epochs; None if their number is unknown."""
        total = 0
        for training in trainings:
            if training.total_epochs is None:
                return None
            dataset = self._load_dataset(training.config.data)
            total += round(training.total_epochs * estimate_state_bytes(training.config, dataset))
        return total


def _timing_digest(config: TrainingConfig) -> str:
    """Return the digest of what decides how long an epoch takes: all settings but the seed."""
    return config.replace(seed=0).digest()


def _estimate_stage_effort(
    stage: Stage,
    trainings: Sequence[PlannedTraining],
    estimator: _TrainingEstimator,
    cluster_resources: Mapping[str, float],
    node_resources: NodeResources,
) -> JsonDict:
    """Estimate resources, time and disk space of a stage's training; empty if it has none."""
    if not isinstance(stage, TuneStage | TrainStage | PromoteStage) or not trainings:
        return {}
    resources = Resources(stage.cpus, stage.gpus).resolve(dict(cluster_resources))
    concurrency = resources.max_concurrent_trials(dict(cluster_resources), node_resources)
    seconds = estimator.estimate_wall_seconds(trainings, resources, concurrency)
    if isinstance(stage, TuneStage) and stage.max_hours and seconds is not None:
        seconds = min(seconds, 3600 * stage.max_hours)
    return {
        "cpus_per_trial": resources.cpus,
        "gpus_per_trial": resources.n_gpus,
        "trials_at_once": min(concurrency, max(t.concurrency for t in trainings)),
        "expected_seconds": None if seconds is None else round(seconds, 1),
        "checkpoint_bytes": estimator.estimate_checkpoint_bytes(trainings),
        "state_bytes": estimator.estimate_state_bytes(trainings),
    }


def _summarize_trainings(
    stage: Stage,
    trainings: Sequence[PlannedTraining],
    training_overrides: TrainingOverrides,
    load_dataset: DatasetLoader,
) -> list[str]:
    """Return lines about the trainings of a stage; what several have in common appears once."""
    ranges: dict[str, str] = {}
    if isinstance(stage, TuneStage):
        space = stage.resolve_search_space(training_overrides).space
        ranges = {path: distribution.describe() for path, distribution in space.items()}
    rows: list[tuple[str, str]] = []
    for training in trainings:
        data = load_dataset(training.config.data)
        rows += list_summary_rows(training.config, data, list(ranges))
    rows += [("searched", f"{path}: {values}") for path, values in ranges.items()]
    return wrap_summary_rows(dict.fromkeys(rows), SUMMARY_WIDTH)
