"""Base class of stages, and the values that a stage receives and returns."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from raysweep.data import DatasetSplits, DataSpec, load_data
from raysweep.errors import WorkFailed
from raysweep.pipeline.artifact import (
    Artifact,
    Candidate,
    EvaluationResult,
    StageFacts,
    select_best_candidate,
)
from raysweep.pipeline.sweep_retention import list_nights
from raysweep.record_queue import RecordQueue
from raysweep.spec import JsonDict, Spec, SpecError, merge_overrides
from raysweep.stores import Location, StorePath, is_uri, open_path
from raysweep.stores.protocol import check_key
from raysweep.tracking import Tracker, tracking_uri
from raysweep.training.config import TrainingConfig
from raysweep.unrecorded_folders import clear_unrecorded, note_unrecorded

_RUNS_FOLDER = "runs"
CONFLICT_MESSAGE = "candidates of different threat models cannot be ranked"


class StageFailed(WorkFailed):
    """A stage has no result, for example because every trial failed."""


@dataclass(frozen=True)
class TrainingOverrides:
    """Training settings from outside of a stage, by dotted path.

    Precedence, from low to high: pipeline, stage, command line.

    Attributes:
        from_pipeline: `set` of the pipeline.
        from_command_line: `--set` of the command line.
    """

    from_pipeline: Mapping[str, Any]
    from_command_line: Mapping[str, Any]

    def merge(self, stage_overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Combine the settings of a stage with these.

        Args:
            stage_overrides: `set` of the stage, by dotted path.

        Returns:
            All settings by dotted path, with the precedence above.
        """
        return merge_overrides(self.from_pipeline, stage_overrides, self.from_command_line)


@dataclass(frozen=True)
class UpstreamResults:
    """Results of the earlier stages.

    Attributes:
        artifacts: Artifacts of all earlier stages, in the order of the pipeline.
    """

    artifacts: tuple[Artifact, ...] = ()

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Current candidates: tune and train add theirs, promote replaces all of them."""
        current: tuple[Candidate, ...] = ()
        for artifact in self.artifacts:
            if artifact.kind == "promote":
                current = artifact.candidates
            else:
                current = (*current, *artifact.candidates)
        return current

    @property
    def evaluations(self) -> tuple[EvaluationResult, ...]:
        """Evaluations of the current candidates."""
        checkpoints = {candidate.checkpoint for candidate in self.candidates}
        return tuple(
            evaluation
            for artifact in self.artifacts
            for evaluation in artifact.evaluations
            if evaluation.candidate.checkpoint in checkpoints
        )


def group_by_threat(
    evaluations: Sequence[EvaluationResult],
) -> dict[str, list[EvaluationResult]]:
    """Group evaluations that can be ranked: those with the same norm and radius.

    Args:
        evaluations: Results on the test set.

    Returns:
        Evaluations by norm and radius, such as `Linf eps 0.031`, in their order.
    """
    groups: dict[str, list[EvaluationResult]] = {}
    for evaluation in evaluations:
        groups.setdefault(f"{evaluation.norm} eps {evaluation.eps:.4g}", []).append(evaluation)
    return groups


def describe_threat_conflict(candidates: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Describe candidates that cannot be ranked, because their threat models differ.

    Args:
        candidates: Label of each candidate, and norm and radius of all attacks on it, such as
            `Linf eps 0.031`; none for a candidate whose threat model is unknown.

    Returns:
        The threat models with the labels, such as "Linf eps 0.031 (RST); Linf eps 0.03137 (AT)";
        "" if all candidates have the same ones.
    """
    labels: dict[str, list[str]] = {}
    for label, threats in candidates:
        if threats:
            labels.setdefault(" and ".join(dict.fromkeys(threats)), []).append(label)
    if len(labels) < 2:
        return ""
    return "; ".join(
        f"{threat} ({', '.join(dict.fromkeys(rows))})" for threat, rows in labels.items()
    )


def describe_evaluated_threat_conflict(evaluations: Sequence[EvaluationResult]) -> str:
    """Describe candidates that were attacked under different threat models.

    Args:
        evaluations: Results on the test set.

    Returns:
        As `describe_threat_conflict`.
    """
    labels = {e.candidate.checkpoint: e.candidate.label for e in evaluations}
    threats: dict[str, list[str]] = {checkpoint: [] for checkpoint in labels}
    for threat, members in group_by_threat(evaluations).items():
        for evaluation in members:
            threats[evaluation.candidate.checkpoint].append(threat)
    return describe_threat_conflict(
        (label, threats[checkpoint]) for checkpoint, label in labels.items()
    )


def find_best_candidate_evaluation(
    upstream: UpstreamResults, attack: str | None = None
) -> EvaluationResult:
    """Find the evaluation of the candidate with the best validation result.

    Candidates that were attacked with other radii cannot be compared: if there are any, those
    with the radius of the first evaluation are.

    Args:
        upstream: Results of the earlier stages.
        attack: Label of the attack; None for any.

    Returns:
        AutoAttack's evaluation if there is one, else the last one.

    Raises:
        StageFailed: If no such attack was run on the candidate.
    """
    candidates, threats = upstream.candidates, group_by_threat(upstream.evaluations)
    if len(threats) > 1:
        first_group = next(iter(threats.values()))
        checkpoints = {evaluation.candidate.checkpoint for evaluation in first_group}
        candidates = tuple(c for c in candidates if c.checkpoint in checkpoints)
    best = select_best_candidate(candidates)
    of_best = [
        evaluation
        for evaluation in upstream.evaluations
        if evaluation.candidate.checkpoint == best.checkpoint
        and attack in (None, evaluation.attack)
    ]
    if not of_best:
        raise StageFailed(f"{best.title} was not evaluated")
    by_autoattack = [evaluation for evaluation in of_best if evaluation.is_autoattack]
    return by_autoattack[0] if by_autoattack else of_best[-1]


@dataclass(frozen=True)
class StageResult:
    """Result of a stage.

    Attributes:
        candidates: Checkpoints for the next stages.
        evaluations: Results of attacks on the test set.
        facts: Further results; each kind of stage has its own class.
        write_files: Writes further files into the folder of the artifact.
    """

    candidates: tuple[Candidate, ...] = ()
    evaluations: tuple[EvaluationResult, ...] = ()
    facts: StageFacts = field(default_factory=StageFacts)
    write_files: Callable[[Path], None] | None = None


@dataclass
class StageContext:
    """Folders and services that the stages of one pipeline run share.

    Attributes:
        pipeline_name: Name of the pipeline.
        out: Output folder (`--out`).
        artifacts_folder: Folder with one subfolder for each finished stage.
        sweeps_folder: Folder of the sweeps.
        training_overrides: Training settings of the pipeline and of the command line.
        console: Console for progress messages.
        address: Address of the Ray cluster; None to start Ray locally.
        exit_stack: Closed at the end of the pipeline run.
        stage_number: Position of the current stage, from 0.
        stage_digest: Digest of the current stage.
        storage: Folder of all sweeps and training runs, which artifacts may refer to besides `out`.
        has_missing_records: Whether MLflow lacks records of an earlier run, so that ended sweeps
            are recorded again.
        first_unrecorded_stage: Position of the first stage of which records wait for MLflow.
    """

    pipeline_name: str
    out: Path
    artifacts_folder: Path
    sweeps_folder: StorePath
    training_overrides: TrainingOverrides
    console: Console
    address: str | None
    exit_stack: ExitStack
    stage_number: int = 0
    stage_digest: str = ""
    storage: StorePath | None = None
    has_missing_records: bool = False
    first_unrecorded_stage: int | None = None
    _datasets: dict[str, DatasetSplits] = field(default_factory=dict)

    @cached_property
    def records(self) -> RecordQueue:
        """Records for MLflow that wait until it answers; the last attempt is the pipeline's end."""
        self.exit_stack.callback(self._finish_records)
        return RecordQueue("MLflow store", tracking_uri(self.out))

    def note_waiting_records(self) -> None:
        """Write the records of a stage; remember the first one of which MLflow lacks some."""
        has_queue = "records" in vars(self)
        lacks_records = has_queue and not self.records.flush(retry=False)
        if lacks_records and self.first_unrecorded_stage is None:
            self.first_unrecorded_stage = self.stage_number

    def _finish_records(self) -> None:
        """Write the records that wait; leave a note for the next run if MLflow lacks some."""
        if self.records.finish("; the same command writes them"):
            first_stage = self.first_unrecorded_stage or 0
            note_unrecorded(self.artifacts_folder, {"first_stage": first_stage})
        else:
            clear_unrecorded(self.artifacts_folder)

    @cached_property
    def tracker(self) -> Tracker:
        """MLflow, connected at first use, so that a finished pipeline needs no store."""
        return Tracker(tracking_uri(self.out), self.out / "mlruns")

    def get_dataset(self, data_spec: DataSpec) -> DatasetSplits:
        """Load a data set at its first use; all stages share one copy in memory.

        Args:
            data_spec: Settings of the data set.

        Returns:
            The data set.

        Raises:
            SpecError: If its files are missing or damaged.
        """
        key = data_spec.digest()
        if key not in self._datasets:
            self._datasets[key] = load_data(data_spec)
        return self._datasets[key]

    def connect_cluster(self) -> dict[str, float]:
        """Connect to the Ray cluster until the pipeline ends.

        Returns:
            Total resources of the cluster by name, such as `CPU` and `GPU`.
        """
        from raysweep.sweep.cluster import connect_to_cluster

        return self.exit_stack.enter_context(connect_to_cluster(self.address))

    def choose_sweep_folder(self, label: str) -> StorePath:
        """Return the folder of a sweep of the current stage.

        Args:
            label: Distinguishes the sweeps of the stage. The name of the folder is also the name
                of the sweep in MLflow.
        """
        return self.sweeps_folder / f"{self._sweep_prefix(label)}{self.stage_digest[:8]}"

    def find_earlier_sweep_folders(self, label: str) -> list[StorePath]:
        """Return the folders of this stage's sweeps of earlier nights, the latest night first.

        Args:
            label: That of `choose_sweep_folder`.
        """
        nights_folder, prefix = self.sweeps_folder.parent, self._sweep_prefix(label)
        return [
            nights_folder / night / name
            for night in reversed(list_nights(nights_folder))
            if night < self.sweeps_folder.name
            for name in (nights_folder / night).list_folders_containing("sweep.json")
            if name.startswith(prefix)
        ]

    def _sweep_prefix(self, label: str) -> str:
        """Return the name of the folder of a stage's sweep, without the digest of the stage."""
        plain = re.sub(r"[^\w.-]", "-", label)
        return f"{self.pipeline_name}-{self.stage_number:02d}-{plain}-"

    def make_reference(self, path: Location) -> str:
        """Return what artifacts store for a path.

        Args:
            path: A file or folder.

        Returns:
            The path relative to `--out` if it lies inside, else an absolute path or a URI.
        """
        stored = open_path(path)
        local_path = stored.local_path
        if local_path is not None and local_path.is_relative_to(self.out):
            return str(local_path.relative_to(self.out))
        return str(stored)

    def resolve_reference(self, reference: str) -> StorePath:
        """Return the path for a result of `make_reference`.

        Args:
            reference: Content of an artifact, which may come from anybody.

        Raises:
            SpecError: It leads out of `--out` and of the storage. One line.
            DamagedFileError: It leads through a symbolic link below them. One line.
        """
        if not is_uri(reference) and not reference.startswith("/"):
            # A user's own `runs` may be a link.
            folder, _, rest = reference.partition("/")
            if folder == _RUNS_FOLDER and rest:
                return open_path(self.out / folder) / check_key(rest)
            return open_path(self.out) / check_key(reference)
        path = open_path(reference)
        for root in filter(None, (open_path(self.out), self.storage, self.sweeps_folder)):
            if path.store == root.store and path.key.startswith(f"{root.key}/"):
                return path
        raise SpecError(
            f"an artifact of {self.artifacts_folder} refers to {reference}, which is neither below "
            f"--out {self.out} nor below the storage {self.storage}: give the --storage that it "
            "was made with, or run the stage again (--from)"
        )

    def print_line(self, line: str) -> None:
        """Print a progress message."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class PlannedTraining(NamedTuple):
    """Training runs of one config.

    Attributes:
        config: Training config of the runs.
        n_runs: Expected number of runs; None if unknown.
        concurrency: Largest number of runs that can train at the same time.
        total_epochs: Expected epochs of all runs together; None if unknown.
    """

    config: TrainingConfig
    n_runs: float | None
    concurrency: int
    total_epochs: float | None


class Stage(Spec):
    """Base class of the stages of a pipeline.

    A subclass declares its settings as fields, and a `kind` that names it in YAML. It implements
    `describe_stage` and `run_stage`, and what else differs from the defaults below.
    """

    kind: str

    def plan_trainings(
        self, training_overrides: TrainingOverrides, upstream_configs: Sequence[TrainingConfig]
    ) -> list[PlannedTraining]:
        """List what this stage trains, as far as that is known before it runs.

        Args:
            training_overrides: Settings of the pipeline and of the command line.
            upstream_configs: Configs of the candidates that the earlier stages pass on.

        Returns:
            One item for each config; empty for a stage that trains nothing.

        Raises:
            SpecError: If a config is not valid.
        """
        return []

    def list_training_configs(
        self, training_overrides: TrainingOverrides, upstream_configs: Sequence[TrainingConfig] = ()
    ) -> list[TrainingConfig]:
        """List the training configs of this stage; the arguments are those of `plan_trainings`."""
        trainings = self.plan_trainings(training_overrides, upstream_configs)
        return [training.config for training in trainings]

    def list_warnings(
        self, training_overrides: TrainingOverrides, upstream_configs: Sequence[TrainingConfig] = ()
    ) -> list[str]:
        """List what trainings of this stage do other than users may expect.

        Args:
            training_overrides: Settings of the pipeline and of the command line.
            upstream_configs: Configs of the candidates that the earlier stages pass on.

        Returns:
            One line for each warning.
        """
        configs = self.list_training_configs(training_overrides, upstream_configs)
        return [line for config in configs for line in config.list_warnings()]

    def collect_digest_content(self, training_overrides: TrainingOverrides) -> JsonDict:
        """Return data that is part of the stage's digest besides its settings.

        The stage runs again when this data changes. Examples are the content of files that the
        settings name, and the training settings that result from `training_overrides`.

        Args:
            training_overrides: Settings of the pipeline and of the command line.

        Returns:
            Data that can be written as JSON.
        """
        return {}

    def list_candidate_labels(self, training_overrides: TrainingOverrides) -> list[str]:
        """List the labels of the candidates that this stage adds.

        Args:
            training_overrides: Settings of the pipeline and of the command line.

        Returns:
            Labels that no other stage of the pipeline may have; empty if it adds no candidates.
        """
        return []

    def find_problems(self) -> list[str]:
        """Check the settings of this stage alone, beyond the types of its fields.

        Returns:
            One line for each problem; empty if there is none.
        """
        return []

    def describe_stage(self, training_overrides: TrainingOverrides) -> str:
        """Describe the work of this stage, for `--plan` and progress messages.

        Args:
            training_overrides: Settings of the pipeline and of the command line.

        Returns:
            One line, without the kind of the stage.
        """
        raise NotImplementedError

    def run_stage(self, context: StageContext, upstream: UpstreamResults) -> StageResult:
        """Run the stage; resume the work of an earlier run that was killed.

        Args:
            context: Folders and services.
            upstream: Results of the earlier stages.

        Returns:
            The result, which is written to the artifact of the stage.

        Raises:
            StageFailed: If there is no result.
        """
        raise NotImplementedError
