"""A pipeline: stages in order, each run once for what goes into it."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from rich.console import Console

from raysweep.data import load_data
from raysweep.leases import hold_pipeline_lease
from raysweep.pipeline.artifact import Artifact
from raysweep.pipeline.autoattack import AutoAttackStage
from raysweep.pipeline.builtin_pipelines import find_pipeline_file
from raysweep.pipeline.night_cleanup import delete_old_nights, get_today_date
from raysweep.pipeline.promote import PromoteStage
from raysweep.pipeline.register import RegisterStage
from raysweep.pipeline.report.stage import ReportStage
from raysweep.pipeline.stage import Stage, StageContext, TrainingOverrides, UpstreamResults
from raysweep.pipeline.train import TrainStage
from raysweep.pipeline.tune import TuneStage
from raysweep.spec import JsonDict, Spec, SpecError, apply_overrides, json_digest, read_yaml
from raysweep.training.checkpoint import describe_environment
from raysweep.training.config import TrainingConfig

AnyStage = Annotated[
    TuneStage | TrainStage | PromoteStage | AutoAttackStage | RegisterStage | ReportStage,
    Field(discriminator="kind"),
]
_TRAINING_STAGES = (TuneStage, TrainStage)
# What `--set` changes of a pipeline itself; the last two are the names of 0.1.
_PIPELINE_KEYS = {"stages", "rerun", "keep_nights", "again", "keep"}


class Pipeline(Spec):
    """about: one line; set: training settings for all stages, which a stage's own win over.

    again: what else than its inputs makes a stage run again: nothing, a new revision of the code, a
    new day. keep: nights whose sweeps and checkpoints stay, with `again: daily` (null: all).
    Artifacts and reports stay always.
    """

    stored_keys: ClassVar[Mapping[str, str]] = {"rerun": "again", "keep_nights": "keep"}

    about: str = ""
    set: dict[str, Any] = Field(default_factory=dict)
    rerun: Literal["never", "revision", "daily"] = "never"
    keep_nights: Annotated[int, Field(ge=1)] | None = None
    stages: Annotated[tuple[AnyStage, ...], Field(min_length=1)]

    def find_problems(self, training_overrides: TrainingOverrides) -> list[str]:
        """Everything that can be said before anything runs, one line each."""
        lines = (
            ["keep: counts nights; it needs `again: daily`"]
            if self.keep_nights and self.rerun != "daily"
            else []
        )
        runs: list[TrainingConfig] = []
        candidates = judged = False
        taken: dict[str, int] = {}
        for number, stage in enumerate(self.stages):
            where = f"stages.{number} ({stage.kind})"
            if not candidates and isinstance(stage, PromoteStage | AutoAttackStage):
                lines.append(
                    f"{where}: no stage before it trains anything; put tune or train first"
                )
            if not judged and isinstance(stage, RegisterStage | ReportStage):
                lines.append(f"{where}: no stage before it judges anything; put autoattack first")
            candidates |= isinstance(stage, _TRAINING_STAGES)
            judged |= isinstance(stage, AutoAttackStage)
            own = _find_stage_problems(stage, training_overrides, runs)
            if not own:
                runs = _active_configs(stage, training_overrides, runs)
            for label in [] if own else stage.list_candidate_labels(training_overrides):
                if taken.setdefault(label, number) != number:
                    own.append(
                        f"its label {label!r} is that of stages.{taken[label]}; give it another"
                    )
            lines += [f"{where}: {line}" for line in own]
        return lines

    def iter_upstream_configs(
        self, training_overrides: TrainingOverrides
    ) -> Iterator[tuple[AnyStage, list[TrainingConfig]]]:
        """Each stage with the runs whose checkpoints it finds, as far as they are known beforehand."""
        runs: list[TrainingConfig] = []
        for stage in self.stages:
            yield stage, runs
            runs = _active_configs(stage, training_overrides, runs)

    def compute_digest_salt(self) -> str:
        """What `again` adds to the inputs of every stage."""
        if self.rerun == "daily":
            return get_today_date()
        return (
            str(describe_environment()["git_revision"] or describe_environment()["raysweep"])
            if self.rerun == "revision"
            else ""
        )


@dataclass(frozen=True)
class PlannedStage:
    """A stage in its place: `digest` names it and all that goes into it."""

    number: int
    stage: Stage
    stage_digest: str
    inputs: tuple[str, ...]
    folder: Path

    @property
    def kind(self) -> str:
        return self.stage.kind


def load_pipeline(
    name_or_file: str, overrides: Mapping[str, Any]
) -> tuple[str, Pipeline, TrainingOverrides]:
    """By name or from a file: its name, itself, and the settings around its stages.

    changes: `stages.KIND.field` (or `stages.NUMBER.field`), `again` and `keep` change the pipeline,
    every other path the training runs of all its stages. Raises SpecError with all problems at
    once.
    """
    path = find_pipeline_file(name_or_file)
    pipeline = _validate_pipeline(read_yaml(path), path)
    own = {key: value for key, value in overrides.items() if key.split(".")[0] in _PIPELINE_KEYS}
    pipeline = _override_pipeline(pipeline, own)
    settings = TrainingOverrides(
        pipeline.set, {key: value for key, value in overrides.items() if key not in own}
    )
    if problems := pipeline.find_problems(settings):
        raise SpecError([f"{path}: {line}" for line in problems])
    return path.stem, pipeline, settings


def _validate_pipeline(data: JsonDict, path: Path) -> Pipeline:
    """The file as a pipeline. Where it is none, its stages that are sound in themselves are looked
    at all the same.
    """
    try:
        return Pipeline.from_data(data, str(path))
    except SpecError as error:
        lines = list(error.problems)
    stages, around = data.get("stages"), data.get("set")
    settings = TrainingOverrides(around if isinstance(around, dict) else {}, {})
    for number, stage in enumerate(stages if isinstance(stages, list) else []):
        with suppress(SpecError):
            (sound,) = Pipeline.from_data({"stages": [stage]}).stages
            lines += [
                f"{path}: stages.{number} ({sound.kind}): {line}"
                for line in _find_stage_problems(sound, settings, [])
            ]
    raise SpecError(lines)


def _find_stage_problems(
    stage: Stage, training_overrides: TrainingOverrides, upstream_configs: Sequence[TrainingConfig]
) -> list[str]:
    try:
        stage.list_training_configs(training_overrides, upstream_configs)
    except SpecError as error:
        return error.problems
    return stage.find_problems()


def _active_configs(
    stage: Stage, training_overrides: TrainingOverrides, upstream_configs: list[TrainingConfig]
) -> list[TrainingConfig]:
    """After a stage: tune and train add, promote replaces what it trains again."""
    configs = stage.list_training_configs(training_overrides, upstream_configs)
    return (
        [*upstream_configs, *configs]
        if isinstance(stage, _TRAINING_STAGES)
        else configs or upstream_configs
    )


def plan_stages(
    pipeline: Pipeline, training_overrides: TrainingOverrides, folder: Path, salt: str
) -> list[PlannedStage]:
    """The stages with their digests. Reads the data sets, whose fingerprints are inputs. salt: the
    pipeline's, now.
    """
    found: list[PlannedStage] = []
    for number, (stage, before) in enumerate(pipeline.iter_upstream_configs(training_overrides)):
        inputs = (
            ()
            if isinstance(stage, _TRAINING_STAGES)
            else tuple(step.stage_digest for step in found)
        )
        data = {
            config.data.digest(): config.data
            for config in stage.list_training_configs(training_overrides, before)
        }
        fingerprints = sorted({load_data(spec).fingerprint for spec in data.values()})
        key = json_digest(
            [
                stage.to_stored_dict(),
                stage.collect_digest_content(training_overrides),
                fingerprints,
                list(inputs),
                salt,
            ]
        )
        found.append(
            PlannedStage(number, stage, key, inputs, folder / f"{number:02d}-{stage.kind}-{key}")
        )
    return found


def run_pipeline(
    name: str,
    pipeline: Pipeline,
    training_overrides: TrainingOverrides,
    out: Path,
    console: Console,
    *,
    runs_folder: Path | None = None,
    address: str | None = None,
    first_stage: str | None = None,
    wait: bool = False,
) -> Iterator[tuple[PlannedStage, Artifact, bool]]:
    """Run what has not run yet: step, artifact, and whether it was there already, one by one.

    runs: where sweeps live (default: `out`/runs); first: make the artifacts from this stage on
    again. Raises SpecError if another process runs this pipeline.
    """
    folder = out / "runs" / "pipelines" / name
    again = find_stage_index(first_stage, pipeline)
    salt = pipeline.compute_digest_salt()
    runs_folder = runs_folder or out / "runs"
    nights = runs_folder / "pipelines" / name / "sweeps"
    sweeps = nights / salt if salt else runs_folder
    with hold_pipeline_lease(folder, wait), ExitStack() as stack:
        for half in folder.glob(".[0-9]*"):
            # Left by a run that was killed while it wrote.
            shutil.rmtree(half, ignore_errors=True)
        if salt:
            # At the start, so that the disk is bounded however many nights fail.
            delete_old_nights(nights, salt, pipeline.keep_nights)
        work = StageContext(name, out, folder, sweeps, training_overrides, console, address, stack)
        done: tuple[Artifact, ...] = ()
        for step in plan_stages(pipeline, training_overrides, folder, salt):
            artifact = Artifact.read_if_finished(step.folder) if step.number < again else None
            ready = artifact is not None
            if artifact is None:
                artifact = _run_planned_stage(step, work, done)
            done = (*done, artifact)
            yield step, artifact, ready


def _run_planned_stage(
    planned_stage: PlannedStage, context: StageContext, finished_artifacts: tuple[Artifact, ...]
) -> Artifact:
    context.stage_number, context.stage_digest = planned_stage.number, planned_stage.stage_digest
    began = time.monotonic()
    context.print_line(
        f"[{time.strftime('%H:%M:%S')}] {planned_stage.number:02d} {planned_stage.kind}: {planned_stage.stage.describe_stage(context.training_overrides)}"
    )
    outcome = planned_stage.stage.run_stage(context, UpstreamResults(finished_artifacts))
    artifact = Artifact(
        kind=planned_stage.kind,
        key=planned_stage.stage_digest,
        stage=planned_stage.stage.to_stored_dict(),
        inputs=planned_stage.inputs,
        finish_time=time.time(),
        seconds=time.monotonic() - began,
        candidates=outcome.candidates,
        evaluations=outcome.evaluations,
        facts=outcome.facts,
    )
    artifact.write(planned_stage.folder, outcome.write_files)
    return artifact


def find_stage_index(stage_name: str | None, pipeline: Pipeline) -> int:
    """Number of the stage named by kind or number, beyond the last if none is. Raises SpecError for
    an unknown one.
    """
    if stage_name is None:
        return len(pipeline.stages)
    kinds: Sequence[str] = [stage.kind for stage in pipeline.stages]
    if stage_name in kinds:
        return kinds.index(stage_name)
    if stage_name.isdecimal() and int(stage_name) < len(kinds):
        return int(stage_name)
    raise SpecError(
        f"--from {stage_name!r}: this pipeline has {', '.join(f'{n} {kind}' for n, kind in enumerate(kinds))}"
    )


def _override_pipeline(pipeline: Pipeline, overrides: Mapping[str, Any]) -> Pipeline:
    stages, problems = list(pipeline.stages), []
    for path, value in overrides.items():
        if path in _PIPELINE_KEYS - {"stages"}:
            pipeline = apply_overrides(pipeline, {path: value})
            continue
        _, _, rest = path.partition(".")
        which, _, field = rest.partition(".")
        hit = [n for n, stage in enumerate(stages) if which in (stage.kind, str(n), "*")]
        if not hit or not field:
            known = ", ".join(dict.fromkeys(stage.kind for stage in stages))
            problems.append(
                f"--set {path}: expected stages.STAGE.SETTING=..., where STAGE is a number or one of {known}"
            )
        for number in hit if field else ():
            try:
                stages[number] = apply_overrides(stages[number], {field: value})
            except SpecError as error:
                problems += [f"--set {path}: {line}" for line in error.problems]
    if problems:
        raise SpecError(problems)
    return pipeline.replace(stages=tuple(stages))
