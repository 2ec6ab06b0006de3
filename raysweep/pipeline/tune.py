"""Stages that train: a search, runs of the papers over several seeds."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from raysweep import storage
from raysweep.formatting import format_count
from raysweep.leases import hold_folder_lease
from raysweep.pipeline.artifact import Candidate, CheckpointKind
from raysweep.pipeline.stage import (
    PlannedTraining,
    Stage,
    StageContext,
    StageFailed,
    StageResult,
    TrainingOverrides,
    UpstreamResults,
)
from raysweep.schedules import Number
from raysweep.spec import JsonDict, SpecError
from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.plan import expected_sweep_epochs
from raysweep.sweep.search_space import SearchSpace, load_space, param_labels
from raysweep.terminal import SweepDisplay
from raysweep.tracking import SweepTracker
from raysweep.training import checkpoint
from raysweep.training.config import TrainingConfig


class TuneStage(Stage):
    """A sweep. space: a method's own, a YAML file, or one written out; set: settings fixed for it.

    label: what its trials are called in the report (null: the method), unique in a pipeline. gpus:
    what a trial holds (null: one if the cluster has any); max_hours: ends the sweep with what it
    has.
    """

    kind: Literal["tune"] = "tune"
    space: str | dict[str, Any]
    label: str | None = None
    trials: Annotated[int, Field(ge=1)] | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    cpus: Annotated[Number, Field(gt=0)] = 1.0
    gpus: Annotated[Number, Field(ge=0)] | None = None
    max_hours: Annotated[Number, Field(gt=0)] | None = None

    def resolve_search_space(self, training_overrides: TrainingOverrides) -> SearchSpace:
        """The space with everything fixed that is fixed. Raises SpecError with all problems at
        once.
        """
        changes = training_overrides.merge(self.set)
        if isinstance(self.space, dict):
            space = SearchSpace.from_data(self.space, "space").with_overrides(changes)
            if problems := space.find_problems():
                raise SpecError(problems)
        elif self.space.endswith((".yaml", ".yml")):
            space = load_space("", changes, Path(self.space))
        else:
            space = load_space(self.space, changes)
        return space.replace(trials=self.trials) if self.trials else space

    def plan_trainings(
        self, training_overrides: TrainingOverrides, upstream_configs: Sequence[TrainingConfig]
    ) -> list[PlannedTraining]:
        space = self.resolve_search_space(training_overrides)
        config = space.trial_config({})
        return [
            PlannedTraining(config, space.n_trials, expected_sweep_epochs(space, config.epochs))
        ]

    def collect_digest_content(self, training_overrides: TrainingOverrides) -> JsonDict:
        return {"space": _without_keys(self.resolve_search_space(training_overrides))}

    def list_candidate_labels(self, training_overrides: TrainingOverrides) -> list[str]:
        return [
            self.label or self.resolve_search_space(training_overrides).trial_config({}).method.name
        ]

    def describe_stage(self, training_overrides: TrainingOverrides) -> str:
        space = self.resolve_search_space(training_overrides)
        config = space.trial_config({})
        searched = ", ".join(param_labels(list(space.space)).values())
        epochs, most = expected_sweep_epochs(space, config.epochs), space.n_trials * config.epochs
        about = f"about {epochs} of {most}" if epochs < most else str(most)
        return f"{format_count(space.n_trials, 'trial')} of {_describe_config(config)} each, {about} in all; searched: {searched}"

    def run_stage(self, context: StageContext, upstream: UpstreamResults) -> StageResult:
        (label,) = self.list_candidate_labels(context.training_overrides)
        ledger = run_stage_sweep(
            context,
            context.choose_sweep_folder(label),
            self.resolve_search_space(context.training_overrides),
            self.cpus,
            self.gpus,
            self.max_hours,
        )
        candidates = [
            make_candidate(context, ledger, trial, f"{label}/{trial.number:04d}")
            for trial in ledger.rank_trials()
        ]
        return StageResult(tuple(candidates), facts={"sweeps": [summarize_sweep(context, ledger)]})


def run_stage_sweep(
    context: StageContext,
    sweep_folder: Path,
    space: SearchSpace,
    cpus: float,
    gpus: float | None,
    max_hours: float | None = None,
) -> Ledger:
    """The sweep in `path`, run to its end or budget. Raises StageFailed if it brought nothing."""
    from raysweep.sweep.resources import Resources
    from raysweep.sweep.tune_callbacks import Budget, SweepEndReason, SweepFailed, SweepListener
    from raysweep.sweep.tuner import run_sweep

    with hold_folder_lease(sweep_folder):
        ledger = (
            Ledger.open(sweep_folder)
            if storage.pull_file(sweep_folder / "sweep.json")
            else Ledger.create(sweep_folder, space)
        )
        end: SweepEndReason = "done"
        if sum(trial.state != "running" for trial in ledger.load_trials()) < space.n_trials:
            context.connect_cluster()
            resources = Resources(cpus, gpus)
            fingerprint = context.get_dataset(space.trial_config({}).data).fingerprint
            listeners: list[SweepListener] = [
                SweepTracker(context.tracker, fingerprint),
                SweepDisplay(context.console),
            ]
            budget = Budget(math.inf if max_hours is None else 3600 * max_hours)
            try:
                end = run_sweep(ledger, listeners, resources, context.address, budget, fingerprint)
            except SweepFailed as error:
                raise StageFailed(str(error)) from None
    if end == "interrupted":
        raise KeyboardInterrupt
    if not ledger.rank_trials():
        reason = next(
            (trial.reason for trial in ledger.load_trials() if trial.reason),
            "none reported the objective",
        )
        raise StageFailed(f"no trial of {sweep_folder.name} came to a result: {reason}")
    return ledger


def make_candidate(
    context: StageContext,
    ledger: Ledger,
    trial: Trial,
    label: str,
    checkpoint_kind: CheckpointKind = "best",
) -> Candidate:
    path = (
        ledger.best_checkpoint_path(trial)
        if checkpoint_kind == "best"
        else ledger.trial_path(trial.number) / f"epoch-{trial.epoch:04d}"
    )
    saved = checkpoint.read_checkpoint(path)
    return Candidate(
        label=label,
        method=saved.config.method.name,
        checkpoint=context.make_reference(path),
        checkpoint_kind=checkpoint_kind,
        seed=saved.config.seed,
        epoch=saved.epoch,
        epochs=saved.config.epochs,
        metrics={key: value for key, value in saved.last_metrics.items() if "/" not in key},
        params={key: value for key, value in trial.params.items() if key != "seed"},
        exceeds_masking_gap=ledger.exceeds_masking_gap(trial),
        objectives=ledger.space.objectives,
    )


def summarize_sweep(context: StageContext, ledger: Ledger) -> JsonDict:
    """What a sweep cost and found, for the report."""
    trials = ledger.load_trials()
    metric = ledger.space.objectives[0]
    rows = [
        {
            "number": t.number,
            "state": t.state,
            "settings": t.params,
            "score": t.best.get(metric),
            "masking_gap": t.best.get("masking_gap"),
            "reason": t.reason,
        }
        for t in trials
    ]
    return {
        "path": context.make_reference(ledger.path),
        "method": ledger.space.trial_config({}).method.name,
        "metric": metric,
        "asked": sum(t.epoch for t in trials),
        "trained": sum(t.trained_epochs for t in trials),
        "seconds": sum(t.seconds for t in trials),
        "trials": rows,
    }


def _without_keys(space: SearchSpace) -> JsonDict:
    """A space without where its data lie, which decides nothing: their fingerprint does."""
    base = {
        key: value
        for key, value in space.base.items()
        if key not in ("data.data_dir", "data.download")
    }
    return space.replace(base=base).to_stored_dict()


def _describe_config(config: TrainingConfig) -> str:
    return f"{config.method.name}, {config.model.name} on {config.data.name}, {format_count(config.epochs, 'epoch')}"
