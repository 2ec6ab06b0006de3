"""What every stage has, what it is given, and what it may use."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from raysweep import storage
from raysweep.data import Dataset, DataSpec, load_data
from raysweep.pipeline.artifact import Artifact, Candidate, EvaluationResult
from raysweep.spec import JsonDict, Spec
from raysweep.tracking import Tracker, tracking_uri
from raysweep.training.config import TrainingConfig


class StageFailed(RuntimeError):
    """A stage could not do its work: every trial failed, for one."""


@dataclass(frozen=True)
class TrainingOverrides:
    """Training settings from around a stage: the pipeline's give way to the stage's own, the
    command line's do not.
    """

    from_pipeline: Mapping[str, Any]
    from_command_line: Mapping[str, Any]

    def merge(self, stage_overrides: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.from_pipeline, **stage_overrides, **self.from_command_line}


@dataclass(frozen=True)
class UpstreamResults:
    """What the earlier stages left, in order."""

    artifacts: tuple[Artifact, ...] = ()

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Candidates that are still in the running: tune and train add, promote replaces."""
        pool: tuple[Candidate, ...] = ()
        for artifact in self.artifacts:
            pool = (
                artifact.candidates if artifact.kind == "promote" else (*pool, *artifact.candidates)
            )
        return pool

    @property
    def evaluations(self) -> tuple[EvaluationResult, ...]:
        """Verdicts on the candidates that are still in the running."""
        pool = {candidate.checkpoint for candidate in self.candidates}
        return tuple(
            j for a in self.artifacts for j in a.evaluations if j.candidate.checkpoint in pool
        )


@dataclass(frozen=True)
class StageResult:
    """What a stage found; `files` writes what belongs beside it."""

    candidates: tuple[Candidate, ...] = ()
    evaluations: tuple[EvaluationResult, ...] = ()
    facts: JsonDict = field(default_factory=dict)
    write_files: Callable[[Path], None] | None = None


@dataclass
class StageContext:
    """Where a pipeline works. sweeps: the folder of its sweeps; folder: of its artifacts; address:
    Ray's.
    """

    pipeline_name: str
    out: Path
    artifacts_folder: Path
    sweeps_folder: Path
    training_overrides: TrainingOverrides
    console: Console
    address: str | None
    exit_stack: ExitStack
    stage_number: int = 0
    stage_digest: str = ""
    _datasets: dict[str, Dataset] = field(default_factory=dict)

    @cached_property
    def tracker(self) -> Tracker:
        """Connected when a stage first needs it: a pipeline with nothing to do needs no store."""
        return Tracker(tracking_uri(self.out), self.out / "mlruns")

    def get_dataset(self, data_spec: DataSpec) -> Dataset:
        """Read once, whichever stage asks."""
        key = data_spec.digest()
        if key not in self._datasets:
            self._datasets[key] = load_data(data_spec)
        return self._datasets[key]

    def connect_cluster(self) -> dict[str, float]:
        """Resources of the cluster, which stays connected until the pipeline ends."""
        from raysweep.sweep.cluster import connect_to_cluster

        return self.exit_stack.enter_context(connect_to_cluster(self.address))

    def choose_sweep_folder(self, label: str) -> Path:
        """The folder of this stage's sweep of `part`; its name is that of the sweep in MLflow."""
        plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in label)
        return (
            self.sweeps_folder
            / f"{self.pipeline_name}-{self.stage_number:02d}-{plain}-{self.stage_digest[:8]}"
        )

    def make_reference(self, path: Path) -> str:
        """What an artifact calls a file: relative to `--out`, or elsewhere by its whole path or
        URI.
        """
        path = path.resolve()
        inside = path.is_relative_to(self.out) and not storage.is_bucket_copy(path)
        return str(path.relative_to(self.out)) if inside else storage.uri_of(path)

    def resolve_reference(self, reference: str) -> Path:
        """The file that an artifact calls so."""
        return storage.local_path(reference) if storage.is_uri(reference) else self.out / reference

    def print_line(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class PlannedTraining(NamedTuple):
    """Runs of one config, at most so many at once, and the epochs of all together (None: not known
    beforehand).
    """

    config: TrainingConfig
    concurrency: int
    total_epochs: float | None


class Stage(Spec):
    """One step of a pipeline. Its class says what it needs, whether it is sound, and what it does."""

    kind: str

    def plan_trainings(
        self, training_overrides: TrainingOverrides, upstream_configs: Sequence[TrainingConfig]
    ) -> list[PlannedTraining]:
        """What this stage trains, as far as it is known beforehand. Raises SpecError.

        before: the runs whose checkpoints it finds.
        """
        return []

    def list_training_configs(
        self, training_overrides: TrainingOverrides, upstream_configs: Sequence[TrainingConfig] = ()
    ) -> list[TrainingConfig]:
        """The runs of `trainings`."""
        return [one.config for one in self.plan_trainings(training_overrides, upstream_configs)]

    def collect_digest_content(self, training_overrides: TrainingOverrides) -> JsonDict:
        """What the files that it names, and the settings around it, make of this stage: part of its
        digest.
        """
        return {}

    def list_candidate_labels(self, training_overrides: TrainingOverrides) -> list[str]:
        """What the candidates of this stage are called."""
        return []

    def find_problems(self) -> list[str]:
        """What is wrong with the stage itself, one line each."""
        return []

    def describe_stage(self, training_overrides: TrainingOverrides) -> str:
        """One line for `--plan`."""
        raise NotImplementedError

    def run_stage(self, context: StageContext, upstream: UpstreamResults) -> StageResult:
        """Do the work, going on where a killed run of it stopped."""
        raise NotImplementedError
