"""The train stage: runs of the papers over several seeds."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from raysweep.formatting import format_count
from raysweep.pipeline.artifact import Candidate, CheckpointKind
from raysweep.pipeline.stage import (
    PlannedTraining,
    Stage,
    StageContext,
    StageResult,
    TrainingOverrides,
    UpstreamResults,
)
from raysweep.pipeline.tune import (
    _describe_config,
    _without_keys,
    make_candidate,
    run_stage_sweep,
    summarize_sweep,
)
from raysweep.schedules import Number
from raysweep.spec import JsonDict, Spec, SpecError
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace
from raysweep.training.config import TrainingConfig, build_training_config
from raysweep.training.presets import load_preset


class TrainingRow(Spec):
    """One row of a table: a preset or a method, with settings of its own."""

    preset: str | None = None
    method: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)


class TrainStage(Stage):
    """Training runs, each over several seeds. runs: row of the report -> what is trained.

    checkpoints: which epochs go on: the best on validation, the last.
    """

    kind: Literal["train"] = "train"
    runs: Annotated[dict[str, TrainingRow], Field(min_length=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    checkpoints: Annotated[tuple[CheckpointKind, ...], Field(min_length=1)] = ("best",)
    set: dict[str, Any] = Field(default_factory=dict)
    cpus: Annotated[Number, Field(gt=0)] = 1.0
    gpus: Annotated[Number, Field(ge=0)] | None = None

    def list_candidate_labels(self, training_overrides: TrainingOverrides) -> list[str]:
        return list(self.runs)

    def build_seed_spaces(self, training_overrides: TrainingOverrides) -> dict[str, SearchSpace]:
        """A grid over the seeds for each row. Raises SpecError with the problems of all rows."""
        spaces, problems = {}, []
        for label, row in self.runs.items():
            try:
                if (row.preset is None) == (row.method is None):
                    raise SpecError("needs exactly one of preset, method")
                method, base = load_preset(row.preset) if row.preset else (row.method, {})
                around = training_overrides.merge({**self.set, **row.set})
                spaces[label] = build_seed_grid(method, {**base, **around}, self.seeds)
            except SpecError as error:
                problems += [f"runs.{label}: {line}" for line in error.problems]
        if problems:
            raise SpecError(problems)
        return spaces

    def plan_trainings(
        self, training_overrides: TrainingOverrides, upstream_configs: Sequence[TrainingConfig]
    ) -> list[PlannedTraining]:
        configs = [
            space.trial_config({}) for space in self.build_seed_spaces(training_overrides).values()
        ]
        return [
            PlannedTraining(config, len(self.seeds), len(self.seeds) * config.epochs)
            for config in configs
        ]

    def collect_digest_content(self, training_overrides: TrainingOverrides) -> JsonDict:
        return {
            label: _without_keys(space)
            for label, space in self.build_seed_spaces(training_overrides).items()
        }

    def describe_stage(self, training_overrides: TrainingOverrides) -> str:
        configs = {
            label: space.trial_config({})
            for label, space in self.build_seed_spaces(training_overrides).items()
        }
        rows = [f"{label} ({_describe_config(config)})" for label, config in configs.items()]
        epochs = len(self.seeds) * sum(config.epochs for config in configs.values())
        return f"{format_count(len(self.seeds), 'seed')} of {'; '.join(rows)}: {format_count(epochs, 'epoch')} in all"

    def run_stage(self, context: StageContext, upstream: UpstreamResults) -> StageResult:
        candidates: list[Candidate] = []
        found: list[JsonDict] = []
        for label, space in self.build_seed_spaces(context.training_overrides).items():
            ledger = run_stage_sweep(
                context, context.choose_sweep_folder(label), space, self.cpus, self.gpus
            )
            candidates += iter_seed_candidates(context, ledger, label, self.checkpoints)
            found.append(summarize_sweep(context, ledger))
        return StageResult(tuple(candidates), facts={"sweeps": found})


def build_seed_grid(method: Any, overrides: dict[str, Any], seeds: tuple[int, ...]) -> SearchSpace:
    """One run for each seed, as a sweep: so it is spread, resumed, tracked and shares prefixes like
    any other.
    """
    space = SearchSpace.from_data(
        {
            "method": method,
            "metric": build_training_config(method, overrides).validation.objective,
            "base": overrides,
            "trials": len(seeds),
            "sampler": {"kind": "grid"},
            "scheduler": {"kind": "none"},
            "space": {"seed": {"categorical": list(seeds)}},
        }
    )
    if problems := space.find_problems():
        raise SpecError(problems)
    return space


def iter_seed_candidates(
    context: StageContext, ledger: Ledger, label: str, checkpoint_kinds: tuple[CheckpointKind, ...]
) -> Iterator[Candidate]:
    """The checkpoints of a grid over seeds, seed by seed."""
    for trial in sorted(ledger.rank_trials(), key=lambda trial: trial.number):
        for one in checkpoint_kinds:
            yield make_candidate(context, ledger, trial, label, one)
