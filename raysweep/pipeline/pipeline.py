"""A pipeline: stages in order, each of which runs once for equal inputs."""

import functools
import logging
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
from raysweep.folder_lock import require_no_links
from raysweep.leases import hold_pipeline_lock
from raysweep.logs import log_to_folder
from raysweep.models import ModelSpec
from raysweep.pipeline.artifact import Artifact
from raysweep.pipeline.autoattack import AutoAttackStage
from raysweep.pipeline.builtin_pipelines import find_pipeline_file
from raysweep.pipeline.promote import PromoteStage
from raysweep.pipeline.register import RegisterStage
from raysweep.pipeline.report.paper_figures import find_unknown_metrics, find_unknown_rows
from raysweep.pipeline.report.stage import ReportStage
from raysweep.pipeline.stage import (
    CONFLICT_MESSAGE,
    Stage,
    StageContext,
    TrainingOverrides,
    UpstreamResults,
    describe_threat_conflict,
)
from raysweep.pipeline.sweep_retention import get_today_date, prune_nightly_sweeps
from raysweep.pipeline.train import TrainStage
from raysweep.pipeline.tune import TuneStage
from raysweep.spec import (
    JsonDict,
    Spec,
    SpecError,
    apply_overrides,
    is_safe_name,
    json_digest,
)
from raysweep.stores import StorePath, open_path
from raysweep.training.checkpoint import describe_environment
from raysweep.training.config import TrainingConfig
from raysweep.unrecorded_folders import read_unrecorded
from raysweep.yaml_files import read_yaml

logger = logging.getLogger(__name__)

AnyStage = Annotated[
    TuneStage | TrainStage | PromoteStage | AutoAttackStage | RegisterStage | ReportStage,
    Field(discriminator="kind"),
]
_TRAINING_STAGES = (TuneStage, TrainStage)
# Paths of `--set` that start with one of these change the pipeline itself; the last two are the
# names of 0.1.
_PIPELINE_KEYS = {"stages", "rerun", "keep_nights", "again", "keep"}


class Pipeline(Spec):
    """Stages that run one after the other."""

    stored_keys: ClassVar[Mapping[str, str]] = {"rerun": "again", "keep_nights": "keep"}

    about: str = ""
    """Description in one line."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Training settings of all stages, by dotted path; the settings of a stage take precedence."""
    rerun: Literal["never", "revision", "daily"] = "never"
    """When to run all stages again although their inputs are equal: for each revision of the code,
    or each day."""
    keep_nights: Annotated[int, Field(ge=1)] | None = None
    """With `rerun: daily`, number of days to keep sweeps and checkpoints (null: all). Artifacts and
    reports are always kept."""
    stages: Annotated[tuple[AnyStage, ...], Field(min_length=1)]
    """The stages in order."""

    def find_problems(self, training_overrides: TrainingOverrides) -> list[str]:
        """Check the whole pipeline without running it.

        Args:
            training_overrides: Training settings of the pipeline and of the command line.

        Returns:
            One line for each problem; empty if there is none.
        """
        lines = []
        if self.keep_nights and self.rerun != "daily":
            lines.append("keep_nights: counts nights; it needs `rerun: daily`")
        upstream_configs: list[TrainingConfig] = []
        stage_of_label: dict[str, int] = {}
        for number, stage in enumerate(self.stages):
            where = f"stages.{number} ({stage.kind})"
            lines += [f"{where}: {line}" for line in self._find_order_problems(number)]
            problems = _find_stage_problems(stage, training_overrides, upstream_configs)
            if isinstance(stage, ReportStage) and not lines:
                problems += find_unknown_rows(stage.figures, list(stage_of_label))
                problems += find_unknown_metrics(stage.figures, upstream_configs)
            if not problems:
                upstream_configs = _list_candidate_configs(
                    stage, training_overrides, upstream_configs
                )
                for label in stage.list_candidate_labels(training_overrides):
                    first = stage_of_label.setdefault(label, number)
                    if first != number:
                        problems.append(
                            f"its label {label!r} is already used by stages.{first}; choose another"
                        )
            lines += [f"{where}: {line}" for line in problems]
        return lines

    def _find_order_problems(self, number: int) -> list[str]:
        """Check that the stages before a stage produce what it needs."""
        stage, earlier = self.stages[number], self.stages[:number]
        has_candidates = any(isinstance(s, _TRAINING_STAGES) for s in earlier)
        has_evaluations = any(isinstance(s, AutoAttackStage) for s in earlier)
        if isinstance(stage, PromoteStage | AutoAttackStage) and not has_candidates:
            return ["no stage before it trains anything; put tune or train first"]
        if isinstance(stage, RegisterStage | ReportStage) and not has_evaluations:
            return ["no stage before it evaluates anything; put autoattack first"]
        return []

    def iter_stages_with_received_configs(
        self, training_overrides: TrainingOverrides
    ) -> Iterator[tuple[AnyStage, list[TrainingConfig]]]:
        """Yield each stage with the training configs of the candidates that it receives.

        The configs are those that are known before the pipeline runs.

        Args:
            training_overrides: Training settings of the pipeline and of the command line.
        """
        upstream_configs: list[TrainingConfig] = []
        for stage in self.stages:
            yield stage, upstream_configs
            upstream_configs = _list_candidate_configs(stage, training_overrides, upstream_configs)

    def list_networks(self, training_overrides: TrainingOverrides) -> list[ModelSpec]:
        """List the networks that the stages train, as far as they are known before they run.

        Args:
            training_overrides: Training settings of the pipeline and of the command line.
        """
        return [
            config.model
            for stage, upstream in self.iter_stages_with_received_configs(training_overrides)
            for config in stage.list_training_configs(training_overrides, upstream)
        ]

    def compute_rerun_key(self) -> str:
        """Return what `rerun` adds to the digest of every stage: a date, a revision, or ""."""
        if self.rerun == "daily":
            return get_today_date()
        if self.rerun == "revision":
            environment = describe_environment()
            return str(environment["git_revision"] or environment["raysweep"])
        return ""


@dataclass(frozen=True)
class PlannedStage:
    """A stage at its place in a pipeline.

    Attributes:
        number: Position in the pipeline, from 0.
        stage: The stage.
        stage_digest: Digest of the stage and of everything that goes into it.
        inputs: Digests of the earlier stages that it depends on.
        folder: Folder of its artifact.
    """

    number: int
    stage: Stage
    stage_digest: str
    inputs: tuple[str, ...]
    folder: Path

    @property
    def kind(self) -> str:
        """Kind of the stage."""
        return self.stage.kind


def load_pipeline(
    name_or_file: str, overrides: Mapping[str, Any]
) -> tuple[str, Pipeline, TrainingOverrides]:
    """Load and check a pipeline.

    Args:
        name_or_file: Name of a built-in pipeline, or path of a YAML file.
        overrides: Settings of the command line by dotted path. `stages.KIND.field`,
            `stages.NUMBER.field`, `rerun` and `keep_nights` change the pipeline. All other paths
            are training settings of all stages.

    Returns:
        Name of the pipeline, the pipeline, and the training settings outside of its stages.

    Raises:
        SpecError: With all problems at once.
    """
    path = find_pipeline_file(name_or_file)
    if not is_safe_name(path.stem):
        raise SpecError(
            f"{path}: its name names the folder of its artifacts: expected 1 to 100 letters, "
            "digits, '.', '_' or '-', and no dot at the start"
        )
    content = read_yaml(path)
    with content.name_lines_in_errors():
        pipeline = _validate_pipeline(content, path)
    pipeline_overrides: dict[str, Any] = {}
    command_line: dict[str, Any] = {}
    for key, value in overrides.items():
        if key.split(".")[0] in _PIPELINE_KEYS:
            pipeline_overrides[key] = value
        else:
            command_line[key] = value
    pipeline = _override_pipeline(pipeline, pipeline_overrides)
    training_overrides = TrainingOverrides(pipeline.set, command_line)
    with content.name_lines_in_errors(overrides):
        if problems := pipeline.find_problems(training_overrides):
            raise SpecError([f"{path}: {line}" for line in problems])
    return path.stem, pipeline, training_overrides


def _validate_pipeline(data: JsonDict, path: Path) -> Pipeline:
    """Validate the content of a file.

    If it is not a pipeline, its valid stages are checked too, to report all problems at once.
    """
    try:
        return Pipeline.from_data(data, str(path))
    except SpecError as error:
        lines = list(error.problems)
    stages, settings = data.get("stages"), data.get("set")
    overrides = TrainingOverrides(settings if isinstance(settings, dict) else {}, {})
    for number, stage_data in enumerate(stages if isinstance(stages, list) else []):
        with suppress(SpecError):
            (stage,) = Pipeline.from_data({"stages": [stage_data]}).stages
            where = f"{path}: stages.{number} ({stage.kind})"
            lines += [f"{where}: {line}" for line in _find_stage_problems(stage, overrides, [])]
    raise SpecError(lines)


def _find_stage_problems(
    stage: Stage, training_overrides: TrainingOverrides, upstream_configs: Sequence[TrainingConfig]
) -> list[str]:
    """Check the training configs and the settings of a stage."""
    try:
        stage.list_training_configs(training_overrides, upstream_configs)
    except SpecError as error:
        return error.problems
    return stage.find_problems()


def check_rankings(pipeline: Pipeline, training_overrides: TrainingOverrides) -> None:
    """Check that no stage ranks candidates that are validated at different radii.

    This is no part of the check of a file: those of raysweep 0.1 may rank them, and stay readable.

    Args:
        pipeline: The pipeline.
        training_overrides: Training settings of the pipeline and of the command line.

    Raises:
        SpecError: With a line for each such stage.
    """
    staged_configs = pipeline.iter_stages_with_received_configs(training_overrides)
    problems = [
        f"stages.{number} ({stage.kind}): {line}"
        for number, (stage, configs) in enumerate(staged_configs)
        for line in _find_ranking_problems(stage, configs)
    ]
    if problems:
        raise SpecError(problems)


def _find_ranking_problems(stage: Stage, upstream_configs: Sequence[TrainingConfig]) -> list[str]:
    """Describe candidates that a stage would rank although they are validated at different radii.

    `upstream_configs` are the configs of the candidates that it receives.
    """
    if not isinstance(stage, PromoteStage | RegisterStage):
        return []
    problems = []
    for method in dict.fromkeys(c.method.name for c in upstream_configs):
        of_group = [
            config
            for config in upstream_configs
            if not getattr(stage, "per_method", False) or config.method.name == method
        ]
        threats = [(config.method.name, [config.validation.threat]) for config in of_group]
        if conflict := describe_threat_conflict(threats):
            problems.append(
                f"{CONFLICT_MESSAGE}: {conflict}; give all of them one, for example with "
                "set: {'*.eps': 8/255}"
            )
    return list(dict.fromkeys(problems))


def _list_candidate_configs(
    stage: Stage, training_overrides: TrainingOverrides, upstream_configs: list[TrainingConfig]
) -> list[TrainingConfig]:
    """Return the configs of the candidates after a stage.

    The stages tune and train add candidates. Promote replaces them if it trains them again.
    """
    configs = stage.list_training_configs(training_overrides, upstream_configs)
    if isinstance(stage, _TRAINING_STAGES):
        return [*upstream_configs, *configs]
    return configs or upstream_configs


def plan_stages(
    pipeline: Pipeline, training_overrides: TrainingOverrides, folder: Path, salt: str
) -> list[PlannedStage]:
    """Compute the digests and folders of all stages.

    This loads the data sets, because their fingerprints are part of the digests, and because stages
    that evaluate need test images.

    Args:
        pipeline: The pipeline.
        training_overrides: Training settings outside of the stages.
        folder: Folder of the artifacts.
        salt: Result of `Pipeline.compute_rerun_key`.

    Returns:
        The stages in order, each with its digest and folder.

    Raises:
        SpecError: A data set cannot be loaded, or lacks the test images that a stage needs.
    """
    load_dataset = functools.cache(load_data)
    planned: list[PlannedStage] = []
    for number, (stage, upstream_configs) in enumerate(
        pipeline.iter_stages_with_received_configs(training_overrides)
    ):
        inputs: tuple[str, ...] = ()
        if not isinstance(stage, _TRAINING_STAGES):
            inputs = tuple(earlier.stage_digest for earlier in planned)
        configs = stage.list_training_configs(training_overrides, upstream_configs)
        fingerprints = sorted({load_dataset(config.data).fingerprint for config in configs})
        if isinstance(stage, AutoAttackStage):
            for config in upstream_configs:
                load_dataset(config.data).require_test()
        digest = json_digest(
            [
                stage.to_stored_dict(),
                stage.collect_digest_content(training_overrides),
                fingerprints,
                list(inputs),
                salt,
            ]
        )
        stage_folder = folder / f"{number:02d}-{stage.kind}-{digest}"
        planned.append(PlannedStage(number, stage, digest, inputs, stage_folder))
    return planned


def run_pipeline(
    name: str,
    pipeline: Pipeline,
    training_overrides: TrainingOverrides,
    out: Path,
    console: Console,
    *,
    runs_folder: StorePath | None = None,
    address: str | None = None,
    first_stage: str | None = None,
    wait: bool = False,
) -> Iterator[tuple[PlannedStage, Artifact, bool]]:
    """Run the stages that have not finished yet, one after the other.

    Args:
        name: Name of the pipeline.
        pipeline: The pipeline.
        training_overrides: Training settings outside of the stages.
        out: Output folder.
        console: Console for progress messages.
        runs_folder: Folder of the sweeps; None for `runs` in `out`.
        address: Address of the Ray cluster; None to start Ray locally.
        first_stage: Kind or number of a stage: make the artifacts of this stage and of all later
            ones again.
        wait: Whether to wait while another process runs this pipeline.

    Yields:
        Each stage, its artifact, and whether it had finished before.

    Raises:
        SpecError: If another process runs this pipeline, or there is no such first stage.
        DamagedFileError: If its folder has links or the like (see `require_no_links`).
        StageFailed: If a stage has no result.
    """
    folder = out / "runs" / "pipelines" / name
    find_stage_index(first_stage, pipeline)
    salt = pipeline.compute_rerun_key()
    runs_folder = runs_folder or open_path(out / "runs")
    nights_folder = runs_folder / "pipelines" / name / "sweeps"
    sweeps_folder = nights_folder / salt if salt else runs_folder
    require_no_links(folder, out / "runs")
    with hold_pipeline_lock(folder, wait), log_to_folder(folder), ExitStack() as exit_stack:
        for partial in folder.glob(".[0-9]*"):
            # A run was killed while it wrote an artifact.
            logger.warning(
                "deleted half of an artifact, of a run that was killed: %s",
                partial.name,
                extra={"is_shown_elsewhere": True},
            )
            shutil.rmtree(partial, ignore_errors=True)
        if salt:
            # At the start, so that nights that fail do not fill the disk.
            prune_nightly_sweeps(nights_folder, salt, pipeline.keep_nights)
        context = StageContext(
            name, out, folder, sweeps_folder, training_overrides, console, address, exit_stack
        )
        context.storage = runs_folder
        first_index = find_first_repeated_stage(first_stage, pipeline, folder)
        context.has_missing_records = read_unrecorded(folder) is not None
        if context.has_missing_records:
            context.print_line(
                "MLflow lacks records of an earlier run: they are written from its results"
            )
        finished: tuple[Artifact, ...] = ()
        for planned_stage in plan_stages(pipeline, training_overrides, folder, salt):
            artifact = None
            if planned_stage.number < first_index:
                artifact = Artifact.read_if_finished(planned_stage.folder)
            was_finished = artifact is not None
            _log_stage_start(planned_stage, artifact, planned_stage.number >= first_index)
            if artifact is None:
                artifact = _run_planned_stage(planned_stage, context, finished)
            finished = (*finished, artifact)
            yield planned_stage, artifact, was_finished


def _log_stage_start(
    planned_stage: PlannedStage, artifact: Artifact | None, is_repeated: bool
) -> None:
    """Log whether a stage runs or its artifact is used, and why."""
    what = f"stage {planned_stage.number:02d} {planned_stage.kind}"
    if artifact is not None:
        reason = "is taken from its artifact: an earlier run finished it with equal inputs"
    elif is_repeated:
        reason = "runs again: --from asks for it, or MLflow lacks records of an earlier run"
    else:
        reason = "runs: no artifact has the digest of its inputs"
    logger.info(
        "%s %s",
        what,
        reason,
        extra={
            "event": "stage_start",
            "stage": planned_stage.number,
            "kind": planned_stage.kind,
            "digest": planned_stage.stage_digest,
            "artifact": str(planned_stage.folder),
            "is_from_artifact": artifact is not None,
        },
    )


def _run_planned_stage(
    planned_stage: PlannedStage, context: StageContext, finished_artifacts: tuple[Artifact, ...]
) -> Artifact:
    """Run a stage and write its artifact."""
    stage = planned_stage.stage
    context.stage_number, context.stage_digest = planned_stage.number, planned_stage.stage_digest
    start = time.monotonic()
    description = stage.describe_stage(context.training_overrides)
    context.print_line(
        f"[{time.strftime('%H:%M:%S')}] {planned_stage.number:02d} {stage.kind}: {description}"
    )
    try:
        result = stage.run_stage(context, UpstreamResults(finished_artifacts))
    finally:
        context.note_waiting_records()
    artifact = Artifact(
        kind=stage.kind,
        key=planned_stage.stage_digest,
        stage=stage.to_stored_dict(),
        inputs=planned_stage.inputs,
        finish_time=time.time(),
        seconds=time.monotonic() - start,
        candidates=result.candidates,
        evaluations=result.evaluations,
        facts=result.facts.to_stored_dict(),
    )
    artifact.write(planned_stage.folder, result.write_files)
    logger.info(
        "stage %02d %s is done after %.1f s: %d candidates, %d evaluations",
        planned_stage.number,
        stage.kind,
        artifact.seconds,
        len(artifact.candidates),
        len(artifact.evaluations),
        extra={"event": "stage_end", "stage": planned_stage.number, "kind": stage.kind},
    )
    return artifact


def find_stage_index(stage_name: str | None, pipeline: Pipeline) -> int:
    """Find the position of a stage.

    Args:
        stage_name: Kind or number of the stage, or None.
        pipeline: The pipeline.

    Returns:
        Position from 0; the number of stages for None.

    Raises:
        SpecError: If there is no such stage.
    """
    if stage_name is None:
        return len(pipeline.stages)
    kinds: Sequence[str] = [stage.kind for stage in pipeline.stages]
    if stage_name in kinds:
        return kinds.index(stage_name)
    if stage_name.isdecimal() and int(stage_name) < len(kinds):
        return int(stage_name)
    names = ", ".join(f"{number} {kind}" for number, kind in enumerate(kinds))
    raise SpecError(f"--from {stage_name!r}: this pipeline has {names}")


def find_first_repeated_stage(first_stage: str | None, pipeline: Pipeline, folder: Path) -> int:
    """Find the position of the first stage whose artifact is made again.

    Args:
        first_stage: Kind or number of the stage that the user names, or None.
        pipeline: The pipeline.
        folder: Folder of the artifacts. A note there says that MLflow lacks records of an earlier
            run: making the artifacts again from its results writes them.

    Returns:
        Position from 0; the number of stages if all artifacts are kept.

    Raises:
        SpecError: If there is no such stage.
        DamagedFileError: If the note cannot be read.
    """
    index = find_stage_index(first_stage, pipeline)
    note = read_unrecorded(folder, {"first_stage": int})
    return index if note is None else min(index, int(note["first_stage"]))


def _override_pipeline(pipeline: Pipeline, overrides: Mapping[str, Any]) -> Pipeline:
    """Apply the settings of the command line that change the pipeline itself."""
    stages, problems = list(pipeline.stages), []
    for path, value in overrides.items():
        if path in _PIPELINE_KEYS - {"stages"}:
            pipeline = apply_overrides(pipeline, {path: value})
            continue
        stage_name, _, field = path.partition(".")[2].partition(".")
        numbers = [n for n, s in enumerate(stages) if stage_name in (s.kind, str(n), "*")]
        if not numbers or not field:
            kinds = ", ".join(dict.fromkeys(stage.kind for stage in stages))
            problems.append(
                f"--set {path}: expected stages.STAGE.SETTING=..., "
                f"where STAGE is a number or one of {kinds}"
            )
            continue
        for number in numbers:
            try:
                stages[number] = apply_overrides(stages[number], {field: value})
            except SpecError as error:
                problems += [f"--set {path}: {line}" for line in error.problems]
    if problems:
        raise SpecError(problems)
    return pipeline.replace(stages=tuple(stages))
