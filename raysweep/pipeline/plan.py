"""`raysweep run --plan`: which stages would run, what their trials hold and for about how long they
train.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from raysweep.data import Dataset, load_data
from raysweep.pipeline.artifact import Artifact
from raysweep.pipeline.pipeline import Pipeline, find_stage_index, plan_stages
from raysweep.pipeline.promote import PromoteStage
from raysweep.pipeline.stage import PlannedTraining, Stage, TrainingOverrides
from raysweep.pipeline.train import TrainStage
from raysweep.pipeline.tune import TuneStage
from raysweep.spec import JsonDict
from raysweep.sweep.plan import available_capacity, maybe_estimate_epoch_seconds
from raysweep.sweep.resources import Resources

NodeResources = Sequence[dict[str, float]]


def plan_pipeline(
    pipeline: Pipeline,
    training_overrides: TrainingOverrides,
    folder: Path,
    address: str | None,
    first_stage: str | None,
) -> tuple[list[JsonDict], dict[str, float]]:
    """A row for each stage, and what the machine or the cluster has; nothing is written.

    first: as for `run_pipeline`. Raises SpecError if it is no stage, or if a trial fits nowhere.
    """
    again = find_stage_index(first_stage, pipeline)
    cluster, nodes = available_capacity(address)
    rows = []
    for step, (stage, before) in zip(
        plan_stages(pipeline, training_overrides, folder, pipeline.compute_digest_salt()),
        pipeline.iter_upstream_configs(training_overrides),
        strict=True,
    ):
        artifact = Artifact.read_if_finished(step.folder)
        row: JsonDict = {
            "number": step.number,
            "kind": step.kind,
            "digest": step.stage_digest,
            "done": artifact is not None and step.number < again,
            "again": artifact is not None and step.number >= again,
            "seconds": artifact.seconds if artifact else None,
            "what": stage.describe_stage(training_overrides),
        }
        if artifact is None:
            row |= _estimate_stage_effort(
                stage, stage.plan_trainings(training_overrides, before), cluster, nodes
            )
        rows.append(row)
    return rows, cluster


def _estimate_stage_effort(
    stage: Stage,
    trainings: Sequence[PlannedTraining],
    cluster_resources: Mapping[str, float],
    node_resources: NodeResources,
) -> JsonDict:
    """What a stage's trials hold and how long they train together; nothing for a stage that trains
    nothing.
    """
    if not isinstance(stage, TuneStage | TrainStage | PromoteStage) or not trainings:
        return {}
    resources = Resources(stage.cpus, stage.gpus).resolve(dict(cluster_resources))
    concurrent = resources.max_concurrent_trials(dict(cluster_resources), node_resources)
    seconds = _estimate_training_seconds(trainings, resources, concurrent)
    if isinstance(stage, TuneStage) and stage.max_hours and seconds is not None:
        seconds = min(seconds, 3600 * stage.max_hours)
    return {
        "cpus_per_trial": resources.cpus,
        "gpus_per_trial": resources.n_gpus,
        "trials_at_once": min(concurrent, max(one.concurrency for one in trainings)),
        "expected_seconds": None if seconds is None else round(seconds, 1),
    }


def _estimate_training_seconds(
    trainings: Sequence[PlannedTraining], resources: Resources, concurrency: int
) -> float | None:
    """One after the other, without what shared prefixes save; None where it cannot be told."""
    total = 0.0
    data: dict[str, Dataset] = {}
    for config, at_once, epochs in trainings:
        key = config.data.digest()
        data[key] = data.get(key) or load_data(config.data)
        if (
            epochs is None
            or (each := maybe_estimate_epoch_seconds(config, data[key], resources)) is None
        ):
            return None
        total += each * epochs / min(concurrency, at_once)
    return total
