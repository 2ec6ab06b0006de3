"""The tune stage: a search over hyperparameters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from raysweep.formatting import format_count
from raysweep.pipeline.facts import SweepFacts
from raysweep.pipeline.stage import (
    PlannedTraining,
    Stage,
    StageContext,
    StageResult,
    TrainingOverrides,
    UpstreamResults,
)
from raysweep.pipeline.stage_sweep import (
    describe_training,
    drop_data_location,
    make_candidate,
    run_stage_sweep,
    summarize_sweep,
)
from raysweep.schedules import Number
from raysweep.spec import JsonDict, SpecError
from raysweep.sweep.plan import expected_sweep_epochs
from raysweep.sweep.search_space import (
    SearchSpace,
    load_space,
    param_labels,
    rename_space_keys,
    restore_space_keys,
    split_sweep_settings,
)
from raysweep.sweep.space_warnings import list_space_warnings
from raysweep.training.config import TrainingConfig


class TuneStage(Stage):
    """Runs a sweep; each trial with a result becomes a candidate."""

    later_fields: ClassVar[frozenset[str]] = frozenset({"warm_start"})

    kind: Literal["tune"] = "tune"
    space: str | dict[str, Any]
    """Search space: the name of a built-in one, a YAML file, or the space itself."""
    label: str | None = None
    """Label of the trials in the report, unique in the pipeline (null: the method)."""
    trials: Annotated[int, Field(ge=1)] | None = None
    """Number of trials (null: as in the space)."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Training settings of all trials, by dotted path."""
    cpus: Annotated[Number, Field(gt=0)] = 1.0
    """CPU cores of a trial."""
    gpus: Annotated[Number, Field(ge=0)] | None = None
    """GPUs of a trial (null: one if the cluster has any)."""
    max_hours: Annotated[Number, Field(gt=0)] | None = None
    """Time limit in hours; the sweep then ends with the results that it has (null: no limit)."""
    warm_start: bool = True
    """Whether the sweep of a pipeline that runs every night begins with what this stage found on
    earlier nights, as with `raysweep tune --warm-start`."""

    @field_validator("space")
    @classmethod
    def _rename_space_keys(
        cls, space: str | dict[str, Any], info: ValidationInfo
    ) -> str | dict[str, Any]:
        """Give a space that is written out the present names of its settings."""
        if isinstance(space, str):
            return space
        return rename_space_keys(space, (info.context or {}).get("source"))

    @model_serializer(mode="wrap")
    def _write_stored_keys(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> JsonDict:
        """Write the stored keys, also of a space that is written out."""
        data = super()._write_stored_keys(handler, info)
        if isinstance(self.space, dict) and info.context and info.context.get("stored"):
            data["space"] = restore_space_keys(data["space"])
        return data

    def resolve_search_space(self, training_overrides: TrainingOverrides) -> SearchSpace:
        """Return the search space with all settings applied.

        Args:
            training_overrides: Settings of the pipeline and of the command line.

        Raises:
            SpecError: With all problems of the space at once.
        """
        changes = training_overrides.merge(self.set)
        if isinstance(self.space, dict):
            space = SearchSpace.from_data(self.space, "space")
            if "trials" not in self.space:
                space = space.with_whole_grid()
            of_sweep, changes = split_sweep_settings(changes)
            space = space.with_overrides(changes).with_sweep_settings(of_sweep)
            space = space.with_dataset_defaults().with_default_finalists()
            space = space.with_default_base_runs().with_default_score_epochs()
            if problems := space.find_problems():
                raise SpecError(problems)
        elif self.space.endswith((".yaml", ".yml")):
            space = load_space("", changes, Path(self.space))
        else:
            space = load_space(self.space, changes)
        return space.with_sweep_settings({"trials": self.trials}) if self.trials else space

    def plan_trainings(
        self, training_overrides: TrainingOverrides, upstream_configs: Sequence[TrainingConfig]
    ) -> list[PlannedTraining]:
        space = self.resolve_search_space(training_overrides)
        config = space.trial_config({})
        epochs = expected_sweep_epochs(space, config.epochs)
        n_runs = space.count_all_runs()
        return [PlannedTraining(config, n_runs, n_runs, epochs)]

    def list_warnings(
        self, training_overrides: TrainingOverrides, upstream_configs: Sequence[TrainingConfig] = ()
    ) -> list[str]:
        return list_space_warnings(self.resolve_search_space(training_overrides))

    def collect_digest_content(self, training_overrides: TrainingOverrides) -> JsonDict:
        return {"space": drop_data_location(self.resolve_search_space(training_overrides))}

    def list_candidate_labels(self, training_overrides: TrainingOverrides) -> list[str]:
        if self.label:
            return [self.label]
        return [self.resolve_search_space(training_overrides).trial_config({}).method.name]

    def describe_stage(self, training_overrides: TrainingOverrides) -> str:
        space = self.resolve_search_space(training_overrides)
        config = space.trial_config({})
        params = ", ".join(param_labels(list(space.space)).values())
        epochs = expected_sweep_epochs(space, config.epochs)
        max_epochs = space.count_all_runs() * config.epochs
        total = f"about {epochs} of {max_epochs}" if epochs < max_epochs else str(max_epochs)
        base_runs = ""
        if space.base_runs:
            runs = format_count(space.base_runs, "run")
            base_runs = f"and {runs} of {space.base_method_name}, "
        if n_repeats := sum(space.leaders_by_round):
            base_runs += f"then up to {format_count(n_repeats, 'repeat')} of the best, "
        return (
            f"{format_count(space.n_trials, 'trial')} of {describe_training(config)} each, "
            f"{base_runs}{total} in all; searched: {params}"
        )

    def run_stage(self, context: StageContext, upstream: UpstreamResults) -> StageResult:
        (label,) = self.list_candidate_labels(context.training_overrides)
        ledger = run_stage_sweep(
            context,
            context.choose_sweep_folder(label),
            self.resolve_search_space(context.training_overrides),
            self.cpus,
            self.gpus,
            self.max_hours,
            context.find_earlier_sweep_folders(label) if self.warm_start else (),
        )
        finalists = {trial.number for trial in ledger.find_attacked_finalists()}
        candidates = tuple(
            make_candidate(
                context,
                ledger,
                trial,
                f"{label}/{trial.number:04d}",
                finalists=finalists,
            )
            for trial in ledger.rank_trials()
            if trial.state != "failed"
        )
        return StageResult(candidates, facts=SweepFacts(sweeps=(summarize_sweep(context, ledger),)))
