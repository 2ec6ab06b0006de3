"""Plan of `raysweep run --plan`: stages to run, their resources and expected training time."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from raysweep.data import DatasetSplits, load_data
from raysweep.pipeline.artifact import Artifact
from raysweep.pipeline.pipeline import Pipeline, find_stage_index, plan_stages
from raysweep.pipeline.promote import PromoteStage
from raysweep.pipeline.stage import PlannedTraining, Stage, TrainingOverrides
from raysweep.pipeline.train import TrainStage
from raysweep.pipeline.tune import TuneStage
from raysweep.spec import JsonDict
from raysweep.sweep.plan import available_capacity, maybe_estimate_epoch_seconds
from raysweep.sweep.resources import Resources
from raysweep.training.training_summary import summarize_training, wrap_plan_line

# Resources of each node of a cluster, by name.
NodeResources = Sequence[dict[str, float]]


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
        have `cpus_per_trial`, `gpus_per_trial`, `trials_at_once` and `expected_seconds` (None if
        unknown). Rows of stages to run have a `summary` of their trainings and `warnings`, which
        are lists of lines.

    Raises:
        SpecError: If there is no such first stage, or a trial fits on no node.
    """
    first_index = find_stage_index(first_stage, pipeline)
    cluster, nodes = available_capacity(address)
    salt = pipeline.compute_rerun_key()
    rows = []
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
            row |= _estimate_stage_effort(stage, trainings, cluster, nodes)
            row["summary"] = _summarize_trainings(stage, trainings, training_overrides)
            row["warnings"] = list(
                dict.fromkeys(stage.list_warnings(training_overrides, upstream_configs))
            )
        rows.append(row)
    return rows, cluster


def _estimate_stage_effort(
    stage: Stage,
    trainings: Sequence[PlannedTraining],
    cluster_resources: Mapping[str, float],
    node_resources: NodeResources,
) -> JsonDict:
    """Estimate the resources and the training time of a stage; empty if it trains nothing."""
    if not isinstance(stage, TuneStage | TrainStage | PromoteStage) or not trainings:
        return {}
    resources = Resources(stage.cpus, stage.gpus).resolve(dict(cluster_resources))
    concurrency = resources.max_concurrent_trials(dict(cluster_resources), node_resources)
    seconds = _estimate_training_seconds(trainings, resources, concurrency)
    if isinstance(stage, TuneStage) and stage.max_hours and seconds is not None:
        seconds = min(seconds, 3600 * stage.max_hours)
    return {
        "cpus_per_trial": resources.cpus,
        "gpus_per_trial": resources.n_gpus,
        "trials_at_once": min(concurrency, max(t.concurrency for t in trainings)),
        "expected_seconds": None if seconds is None else round(seconds, 1),
    }


def _summarize_trainings(
    stage: Stage, trainings: Sequence[PlannedTraining], training_overrides: TrainingOverrides
) -> list[str]:
    """Return lines about the trainings of a stage; what several have in common appears once."""
    ranges: dict[str, str] = {}
    if isinstance(stage, TuneStage):
        space = stage.resolve_search_space(training_overrides).space
        ranges = {path: distribution.describe() for path, distribution in space.items()}
    lines: list[str] = []
    for training in trainings:
        data = load_data(training.config.data)
        lines += summarize_training(training.config, data, list(ranges))
    for path, values in ranges.items():
        lines += wrap_plan_line(f"{'searched':<12}{path}: {values}", 14)
    return list(dict.fromkeys(lines))


def _estimate_training_seconds(
    trainings: Sequence[PlannedTraining], resources: Resources, concurrency: int
) -> float | None:
    """Estimate the wall-clock time of trainings one after the other; None if it is unknown.

    Savings by shared prefixes are not counted.
    """
    total = 0.0
    datasets: dict[str, DatasetSplits] = {}
    for training in trainings:
        config, epochs = training.config, training.total_epochs
        key = config.data.digest()
        if key not in datasets:
            datasets[key] = load_data(config.data)
        if epochs is None:
            return None
        epoch_seconds = maybe_estimate_epoch_seconds(config, datasets[key], resources)
        if epoch_seconds is None:
            return None
        total += epoch_seconds * epochs / min(concurrency, training.concurrency)
    return total
