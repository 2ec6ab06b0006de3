"""The train stage: training runs with fixed settings, each over several seeds."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from raysweep.formatting import format_count
from raysweep.pipeline.artifact import Candidate, CheckpointKind
from raysweep.pipeline.facts import SweepFacts, SweepSummary
from raysweep.pipeline.stage import (
    PlannedTraining,
    Stage,
    StageContext,
    StageResult,
    TrainingOverrides,
    UpstreamResults,
)
from raysweep.pipeline.stage_sweep import (
    build_seed_grid,
    describe_training,
    drop_data_location,
    iter_seed_candidates,
    run_stage_sweep,
    summarize_sweep,
)
from raysweep.schedules import Number
from raysweep.spec import JsonDict, Spec, SpecError, flatten_spec, merge_overrides
from raysweep.sweep.search_space import SearchSpace, param_labels
from raysweep.training.config import TrainingConfig
from raysweep.training.presets import load_preset, load_preset_notes


class TrainingRow(Spec):
    """Training of one row of a table: a preset or a method."""

    later_fields: ClassVar[frozenset[str]] = frozenset({"protocol"})

    preset: str | None = None
    """Name of a preset. A row has either `preset` or `method`."""
    method: str | None = None
    """Name of a training method."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Training settings of this row, by dotted path."""
    protocol: str | None = None
    """Protocol of the preset, such as `paper`, by which the best epoch is chosen (null: that of the
    stage)."""


class TrainStage(Stage):
    """Trains runs over several seeds; each checkpoint becomes a candidate."""

    later_fields: ClassVar[frozenset[str]] = frozenset({"protocol"})

    kind: Literal["train"] = "train"
    runs: Annotated[dict[str, TrainingRow], Field(min_length=1)]
    """What to train, by its row in the report."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    """Seeds of each run."""
    checkpoints: Annotated[tuple[CheckpointKind, ...], Field(min_length=1)] = ("best",)
    """Checkpoints that become candidates: `best` on validation, `last`."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Training settings of all runs, by dotted path."""
    protocol: str | None = None
    """Protocol of the presets, such as `paper`, by which the best epoch is chosen (null: on
    validation images)."""
    cpus: Annotated[Number, Field(gt=0)] = 1.0
    """CPU cores of a run."""
    gpus: Annotated[Number, Field(ge=0)] | None = None
    """GPUs of a run (null: one if the cluster has any)."""

    def list_candidate_labels(self, training_overrides: TrainingOverrides) -> list[str]:
        return list(self.runs)

    def build_seed_spaces(self, training_overrides: TrainingOverrides) -> dict[str, SearchSpace]:
        """Build the sweep over the seeds of each row.

        Args:
            training_overrides: Settings of the pipeline and of the command line.

        Returns:
            A search space for each row, by its label.

        Raises:
            SpecError: With the problems of all rows.
        """
        spaces, problems = {}, []
        for label, row in self.runs.items():
            try:
                spaces[label] = self._build_seed_space(row, training_overrides)
            except SpecError as error:
                problems += [f"runs.{label}: {line}" for line in error.problems]
        if problems:
            raise SpecError(problems)
        return spaces

    def _build_seed_space(
        self, row: TrainingRow, training_overrides: TrainingOverrides
    ) -> SearchSpace:
        """Build the sweep over the seeds of one row."""
        if (row.preset is None) == (row.method is None):
            raise SpecError("needs exactly one of preset, method")
        protocol = row.protocol or self.protocol
        method: str | dict[str, Any]
        if row.preset:
            method, base = load_preset(row.preset, protocol)
        elif protocol:
            raise SpecError(f"protocol = {protocol!r}: only presets have protocols")
        else:
            method, base = row.method or "", {}
        overrides = training_overrides.merge(merge_overrides(self.set, row.set))
        return build_seed_grid(method, merge_overrides(base, overrides), self.seeds)

    def collect_row_notes(
        self, training_overrides: TrainingOverrides
    ) -> dict[str, tuple[str, ...]]:
        """Collect the notes of the rows' presets, with the values of the settings.

        Args:
            training_overrides: Settings of the pipeline and of the command line. There is no note
                on what these or the stage set for all rows.

        Returns:
            Sentences for each row that has any, by its label.
        """
        overridden = training_overrides.merge(self.set)
        row_notes = {}
        for label, config in self._build_configs(training_overrides).items():
            preset = self.runs[label].preset
            if preset is None:
                continue
            notes = load_preset_notes(preset, overridden)
            values, names = flatten_spec(config), param_labels(list(notes))
            sentences = []
            for path, note in notes.items():
                value = f" = {_format_value(values[path])}" if path in values else ""
                sentences.append(f"{names[path]}{value}: {note}")
            if sentences:
                row_notes[label] = tuple(sentences)
        return row_notes

    def _build_configs(self, training_overrides: TrainingOverrides) -> dict[str, TrainingConfig]:
        """Build the training config of each row, by label."""
        spaces = self.build_seed_spaces(training_overrides)
        return {label: space.trial_config({}) for label, space in spaces.items()}

    def plan_trainings(
        self, training_overrides: TrainingOverrides, upstream_configs: Sequence[TrainingConfig]
    ) -> list[PlannedTraining]:
        n_seeds = len(self.seeds)
        return [
            PlannedTraining(config, n_seeds, n_seeds, n_seeds * config.epochs)
            for config in self._build_configs(training_overrides).values()
        ]

    def collect_digest_content(self, training_overrides: TrainingOverrides) -> JsonDict:
        spaces = self.build_seed_spaces(training_overrides)
        return {label: drop_data_location(space) for label, space in spaces.items()}

    def describe_stage(self, training_overrides: TrainingOverrides) -> str:
        configs = self._build_configs(training_overrides)
        rows = [f"{label} ({describe_training(config)})" for label, config in configs.items()]
        epochs = len(self.seeds) * sum(config.epochs for config in configs.values())
        seeds = format_count(len(self.seeds), "seed")
        return f"{seeds} of {'; '.join(rows)}: {format_count(epochs, 'epoch')} in all"

    def run_stage(self, context: StageContext, upstream: UpstreamResults) -> StageResult:
        candidates: list[Candidate] = []
        sweeps: list[SweepSummary] = []
        for label, space in self.build_seed_spaces(context.training_overrides).items():
            folder = context.choose_sweep_folder(label)
            ledger = run_stage_sweep(context, folder, space, self.cpus, self.gpus)
            candidates += iter_seed_candidates(context, ledger, label, self.checkpoints)
            sweeps.append(summarize_sweep(context, ledger))
        facts = SweepFacts(
            sweeps=tuple(sweeps), row_notes=self.collect_row_notes(context.training_overrides)
        )
        return StageResult(tuple(candidates), facts=facts)


def _format_value(value: Any) -> str:
    """Format a number with four digits, anything else as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
