"""`raysweep run --plan`: which stages would run, what their trials hold and for about how long they train."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from raysweep.data import Data, load
from raysweep.pipeline.artifact import Artifact
from raysweep.pipeline.pipeline import Pipeline, position, steps
from raysweep.pipeline.promote import Promote
from raysweep.pipeline.stage import Settings, Stage, Training
from raysweep.pipeline.tune import Train, Tune
from raysweep.spec import Json
from raysweep.sweep.plan import machine, quick_epoch_seconds
from raysweep.sweep.resources import Resources

Nodes = Sequence[dict[str, float]]


def planned(
    pipeline: Pipeline, settings: Settings, folder: Path, address: str | None, first: str | None
) -> tuple[list[Json], dict[str, float]]:
    """A row for each stage, and what the machine or the cluster has; nothing is written.

    first: as for `run_pipeline`. Raises SpecError if it is no stage, or if a trial fits nowhere.
    """
    again = position(first, pipeline)
    cluster, nodes = machine(address)
    rows = []
    for step, (stage, before) in zip(
        steps(pipeline, settings, folder, pipeline.salt()), pipeline.planned(settings), strict=True
    ):
        artifact = Artifact.read(step.folder)
        row: Json = {
            "number": step.number,
            "kind": step.kind,
            "digest": step.digest,
            "done": artifact is not None and step.number < again,
            "again": artifact is not None and step.number >= again,
            "seconds": artifact.seconds if artifact else None,
            "what": stage.describe(settings),
        }
        if artifact is None:
            row |= _effort(stage, stage.trainings(settings, before), cluster, nodes)
        rows.append(row)
    return rows, cluster


def _effort(stage: Stage, trainings: Sequence[Training], cluster: Mapping[str, float], nodes: Nodes) -> Json:
    """What a stage's trials hold and how long they train together; nothing for a stage that trains nothing."""
    if not isinstance(stage, Tune | Train | Promote) or not trainings:
        return {}
    resources = Resources(stage.cpus, stage.gpus).on(dict(cluster))
    concurrent = resources.concurrent(dict(cluster), nodes)
    seconds = _seconds(trainings, resources, concurrent)
    if isinstance(stage, Tune) and stage.max_hours and seconds is not None:
        seconds = min(seconds, 3600 * stage.max_hours)
    return {
        "cpus_per_trial": resources.cpus,
        "gpus_per_trial": resources.held_gpus,
        "trials_at_once": min(concurrent, max(one.at_once for one in trainings)),
        "expected_seconds": None if seconds is None else round(seconds, 1),
    }


def _seconds(trainings: Sequence[Training], resources: Resources, concurrent: int) -> float | None:
    """One after the other, without what shared prefixes save; None where it cannot be told."""
    total = 0.0
    data: dict[str, Data] = {}
    for config, at_once, epochs in trainings:
        key = config.data.digest()
        data[key] = data.get(key) or load(config.data)
        if epochs is None or (each := quick_epoch_seconds(config, data[key], resources)) is None:
            return None
        total += each * epochs / min(concurrent, at_once)
    return total
