"""A pipeline: stages in order, each run once for what goes into it."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from rich.console import Console

from raysweep.data import load
from raysweep.pipeline.artifact import Artifact
from raysweep.pipeline.autoattack import AutoAttack
from raysweep.pipeline.lock import locked
from raysweep.pipeline.nights import forget, today
from raysweep.pipeline.promote import Promote
from raysweep.pipeline.register import Register
from raysweep.pipeline.report import Report
from raysweep.pipeline.shipped import source
from raysweep.pipeline.stage import Past, Settings, Stage, Work
from raysweep.pipeline.tune import Train, Tune
from raysweep.spec import Json, Spec, SpecError, digest, override, read_yaml
from raysweep.training.checkpoint import environment
from raysweep.training.config import RunConfig

AnyStage = Annotated[Tune | Train | Promote | AutoAttack | Register | Report, Field(discriminator="kind")]
_TRAINS = (Tune, Train)


class Pipeline(Spec):
    """about: one line; set: training settings for all stages, which a stage's own win over.

    again: what else than its inputs makes a stage run again: nothing, a new revision of the code, a new day.
    keep: nights whose sweeps and checkpoints stay, with `again: daily` (null: all). Artifacts and reports stay always.
    """

    about: str = ""
    set: dict[str, Any] = Field(default_factory=dict)
    again: Literal["never", "revision", "daily"] = "never"
    keep: Annotated[int, Field(ge=1)] | None = None
    stages: Annotated[tuple[AnyStage, ...], Field(min_length=1)]

    def problems(self, settings: Settings) -> list[str]:
        """Everything that can be said before anything runs, one line each."""
        lines = ["keep: counts nights; it needs `again: daily`"] if self.keep and self.again != "daily" else []
        runs: list[RunConfig] = []
        candidates = judged = False
        taken: dict[str, int] = {}
        for number, stage in enumerate(self.stages):
            where = f"stages.{number} ({stage.kind})"
            if not candidates and isinstance(stage, Promote | AutoAttack):
                lines.append(f"{where}: no stage before it trains anything; put tune or train first")
            if not judged and isinstance(stage, Register | Report):
                lines.append(f"{where}: no stage before it judges anything; put autoattack first")
            candidates |= isinstance(stage, _TRAINS)
            judged |= isinstance(stage, AutoAttack)
            own = _own_problems(stage, settings, runs)
            if not own:
                runs = _in_the_running(stage, settings, runs)
            for label in [] if own else stage.labels(settings):
                if taken.setdefault(label, number) != number:
                    own.append(f"its label {label!r} is that of stages.{taken[label]}; give it another")
            lines += [f"{where}: {line}" for line in own]
        return lines

    def planned(self, settings: Settings) -> Iterator[tuple[AnyStage, list[RunConfig]]]:
        """Each stage with the runs whose checkpoints it finds, as far as they are known beforehand."""
        runs: list[RunConfig] = []
        for stage in self.stages:
            yield stage, runs
            runs = _in_the_running(stage, settings, runs)

    def salt(self) -> str:
        """What `again` adds to the inputs of every stage."""
        if self.again == "daily":
            return today()
        return str(environment()["git_revision"] or environment()["raysweep"]) if self.again == "revision" else ""


@dataclass(frozen=True)
class Step:
    """A stage in its place: `digest` names it and all that goes into it."""

    number: int
    stage: Stage
    digest: str
    inputs: tuple[str, ...]
    folder: Path

    @property
    def kind(self) -> str:
        return self.stage.kind


def load_pipeline(what: str, changes: Mapping[str, Any]) -> tuple[str, Pipeline, Settings]:
    """By name or from a file: its name, itself, and the settings around its stages.

    changes: `stages.KIND.field` (or `stages.NUMBER.field`), `again` and `keep` change the pipeline, every other path
    the training runs of all its stages. Raises SpecError with all problems at once.
    """
    path = source(what)
    pipeline = _checked(read_yaml(path), path)
    own = {key: value for key, value in changes.items() if key.split(".")[0] in ("stages", "again", "keep")}
    pipeline = _changed(pipeline, own)
    settings = Settings(pipeline.set, {key: value for key, value in changes.items() if key not in own})
    if problems := pipeline.problems(settings):
        raise SpecError([f"{path}: {line}" for line in problems])
    return path.stem, pipeline, settings


def _checked(data: Json, path: Path) -> Pipeline:
    """The file as a pipeline. Where it is none, its stages that are sound in themselves are looked at all the same."""
    try:
        return Pipeline.load(data, str(path))
    except SpecError as error:
        lines = list(error.problems)
    stages, around = data.get("stages"), data.get("set")
    settings = Settings(around if isinstance(around, dict) else {}, {})
    for number, stage in enumerate(stages if isinstance(stages, list) else []):
        with suppress(SpecError):
            (sound,) = Pipeline.load({"stages": [stage]}).stages
            lines += [f"{path}: stages.{number} ({sound.kind}): {line}" for line in _own_problems(sound, settings, [])]
    raise SpecError(lines)


def _own_problems(stage: Stage, settings: Settings, before: Sequence[RunConfig]) -> list[str]:
    try:
        stage.configs(settings, before)
    except SpecError as error:
        return error.problems
    return stage.problems()


def _in_the_running(stage: Stage, settings: Settings, before: list[RunConfig]) -> list[RunConfig]:
    """After a stage: tune and train add, promote replaces what it trains again."""
    configs = stage.configs(settings, before)
    return [*before, *configs] if isinstance(stage, _TRAINS) else configs or before


def steps(pipeline: Pipeline, settings: Settings, folder: Path, salt: str) -> list[Step]:
    """The stages with their digests. Reads the data sets, whose fingerprints are inputs. salt: the pipeline's, now."""
    found: list[Step] = []
    for number, (stage, before) in enumerate(pipeline.planned(settings)):
        inputs = () if isinstance(stage, _TRAINS) else tuple(step.digest for step in found)
        data = {config.data.digest(): config.data for config in stage.configs(settings, before)}
        fingerprints = sorted({load(spec).fingerprint for spec in data.values()})
        key = digest([stage.json_dict(), stage.content(settings), fingerprints, list(inputs), salt])
        found.append(Step(number, stage, key, inputs, folder / f"{number:02d}-{stage.kind}-{key}"))
    return found


def run_pipeline(
    name: str,
    pipeline: Pipeline,
    settings: Settings,
    out: Path,
    console: Console,
    *,
    runs: Path | None = None,
    address: str | None = None,
    first: str | None = None,
    wait: bool = False,
) -> Iterator[tuple[Step, Artifact, bool]]:
    """Run what has not run yet: step, artifact, and whether it was there already, one by one.

    runs: where sweeps live (default: `out`/runs); first: make the artifacts from this stage on again. Raises
    SpecError if another process runs this pipeline.
    """
    folder = out / "runs" / "pipelines" / name
    again = position(first, pipeline)
    salt = pipeline.salt()
    runs = runs or out / "runs"
    nights = runs / "pipelines" / name / "sweeps"
    sweeps = nights / salt if salt else runs
    with locked(folder, wait), ExitStack() as stack:
        for half in folder.glob(".[0-9]*"):
            # Left by a run that was killed while it wrote.
            shutil.rmtree(half, ignore_errors=True)
        if salt:
            # At the start, so that the disk is bounded however many nights fail.
            forget(nights, salt, pipeline.keep)
        work = Work(name, out, folder, sweeps, settings, console, address, stack)
        done: tuple[Artifact, ...] = ()
        for step in steps(pipeline, settings, folder, salt):
            artifact = Artifact.read(step.folder) if step.number < again else None
            ready = artifact is not None
            if artifact is None:
                artifact = _run(step, work, done)
            done = (*done, artifact)
            yield step, artifact, ready


def _run(step: Step, work: Work, done: tuple[Artifact, ...]) -> Artifact:
    work.number, work.digest = step.number, step.digest
    began = time.monotonic()
    work.say(f"[{time.strftime('%H:%M:%S')}] {step.number:02d} {step.kind}: {step.stage.describe(work.settings)}")
    outcome = step.stage.run(work, Past(done))
    artifact = Artifact(
        kind=step.kind,
        key=step.digest,
        stage=step.stage.json_dict(),
        inputs=step.inputs,
        finished=time.time(),
        seconds=time.monotonic() - began,
        candidates=outcome.candidates,
        judged=outcome.judged,
        facts=outcome.facts,
    )
    artifact.write(step.folder, outcome.files)
    return artifact


def position(first: str | None, pipeline: Pipeline) -> int:
    """Number of the stage named by kind or number, beyond the last if none is. Raises SpecError for an unknown one."""
    if first is None:
        return len(pipeline.stages)
    kinds: Sequence[str] = [stage.kind for stage in pipeline.stages]
    if first in kinds:
        return kinds.index(first)
    if first.isdecimal() and int(first) < len(kinds):
        return int(first)
    raise SpecError(f"--from {first!r}: this pipeline has {', '.join(f'{n} {kind}' for n, kind in enumerate(kinds))}")


def _changed(pipeline: Pipeline, changes: Mapping[str, Any]) -> Pipeline:
    stages, problems = list(pipeline.stages), []
    for path, value in changes.items():
        if path in ("again", "keep"):
            pipeline = override(pipeline, {path: value})
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
                stages[number] = override(stages[number], {field: value})
            except SpecError as error:
                problems += [f"--set {path}: {line}" for line in error.problems]
    if problems:
        raise SpecError(problems)
    return pipeline.model_copy(update={"stages": tuple(stages)})
