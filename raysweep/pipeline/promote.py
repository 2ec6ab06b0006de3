"""Promotion: which candidates go on, chosen on validation alone, trained again where asked."""

from collections.abc import Iterator, Mapping, Sequence
from operator import ge
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from raysweep.pipeline.artifact import Candidate, select_ranking_metrics
from raysweep.pipeline.stage import (
    PlannedTraining,
    Stage,
    StageContext,
    StageFailed,
    StageResult,
    TrainingOverrides,
    UpstreamResults,
)
from raysweep.pipeline.train import build_seed_grid, iter_seed_candidates
from raysweep.pipeline.tune import run_stage_sweep, summarize_sweep
from raysweep.schedules import Number
from raysweep.spec import JsonDict, SpecError
from raysweep.sweep.search_space import SearchSpace
from raysweep.training import checkpoint
from raysweep.training.config import TrainingConfig


class PromoteStage(Stage):
    """The best by the validation objective, or the Pareto set. It never looks at the test set.

    top: how many, or the Pareto set instead with `pareto`; each: so many, or the set, of each
    method; max_masking_gap: leave out what PGD overstates by more; set, seeds: train what was
    chosen again, with other settings (epochs, model.name) and with several seeds.
    """

    stored_keys: ClassVar[Mapping[str, str]] = {"per_method": "each"}

    kind: Literal["promote"] = "promote"
    top: Annotated[int, Field(ge=1)] = 2
    per_method: bool = False
    pareto: bool = False
    max_masking_gap: Annotated[Number, Field(ge=0, le=1)] | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    cpus: Annotated[Number, Field(gt=0)] = 1.0
    gpus: Annotated[Number, Field(ge=0)] | None = None

    def plan_trainings(
        self, training_overrides: TrainingOverrides, upstream_configs: Sequence[TrainingConfig]
    ) -> list[PlannedTraining]:
        if not (self.set or self.seeds):
            return []
        found, problems = [], []
        for config in upstream_configs:
            try:
                found.append(
                    self.build_retraining_space(config, training_overrides).trial_config({})
                )
            except SpecError as error:
                problems += error.problems
        if problems:
            raise SpecError(list(dict.fromkeys(problems)))
        different = list({config.digest(): config for config in found}.values())
        seeds = len(self.seeds) or 1
        runs = (
            seeds
            * self.top
            * (len({config.method.name for config in upstream_configs}) if self.per_method else 1)
        )
        # Which of them is promoted nobody knows yet: each as often.
        return [
            PlannedTraining(
                config, seeds, None if self.pareto else config.epochs * runs / len(different)
            )
            for config in different
        ]

    def describe_stage(self, training_overrides: TrainingOverrides) -> str:
        what = "the Pareto set" if self.pareto else f"the best {self.top}"
        what += " of each method" if self.per_method else ""
        changes = {
            key: training_overrides.from_command_line.get(key, value)
            for key, value in self.set.items()
        }
        again = (
            f", trained again with {changes or 'the same settings'}"
            if self.set or self.seeds
            else ""
        )
        return (
            f"{what} on validation{again}{f' and seeds {list(self.seeds)}' if self.seeds else ''}"
        )

    def select_candidates(self, candidates: tuple[Candidate, ...]) -> list[Candidate]:
        """Best first. Raises StageFailed if nothing is fit to go on."""
        limit = self.max_masking_gap
        fit = [c for c in candidates if limit is None or c.metrics.get("masking_gap", 0.0) <= limit]
        if not fit:
            raise StageFailed(
                f"each of {len(candidates)} candidates has a masking gap over {limit}: nothing is promoted"
            )
        if self.pareto and not (fit := [c for c in fit if not c.exceeds_masking_gap]):
            raise StageFailed(
                f"each of {len(candidates)} candidates has a masking gap over its space's: nothing is promoted"
            )
        methods = dict.fromkeys(c.method for c in fit) if self.per_method else (None,)
        picked = [
            c
            for name in methods
            for c in self._select_top_or_pareto([c for c in fit if name in (None, c.method)])
        ]
        return _rank_candidates(picked)

    def _select_top_or_pareto(self, eligible: list[Candidate]) -> list[Candidate]:
        if not self.pareto:
            return _rank_candidates(eligible)[: self.top]
        metrics = select_ranking_metrics(eligible)
        points = [[c.score(metric) for metric in metrics] for c in eligible]
        return [
            c
            for c, mine in zip(eligible, points, strict=True)
            if not any(other != mine and all(map(ge, other, mine)) for other in points)
        ]

    def run_stage(self, context: StageContext, upstream: UpstreamResults) -> StageResult:
        picked = self.select_candidates(upstream.candidates)
        (metric, *_) = select_ranking_metrics(picked)
        for one in picked:
            context.print_line(
                f"promoted {one.title}: {metric} {one.score(metric):.3f} on validation"
            )
        left_out = [c.label for c in upstream.candidates if c not in picked]
        found: list[JsonDict] = []
        candidates = list(picked)
        if self.set or self.seeds:
            candidates = list(self._retrain_selected(context, picked, found))
        return StageResult(
            tuple(candidates),
            facts={"sweeps": found, "of": len(upstream.candidates), "left_out": left_out},
        )

    def _retrain_selected(
        self, context: StageContext, selected: list[Candidate], sweep_summaries: list[JsonDict]
    ) -> Iterator[Candidate]:
        for one in selected:
            config = checkpoint.read_checkpoint(context.resolve_reference(one.checkpoint)).config
            try:
                space = self.build_retraining_space(config, context.training_overrides)
            except SpecError as error:
                # A searched setting decides what other settings there are.
                raise StageFailed(f"{one.title} cannot be trained again: {error}") from None
            ledger = run_stage_sweep(
                context, context.choose_sweep_folder(one.label), space, self.cpus, self.gpus
            )
            sweep_summaries.append(summarize_sweep(context, ledger))
            for trained in iter_seed_candidates(context, ledger, one.label, ("best",)):
                yield trained.replace(settings=one.params, objectives=one.objectives)

    def build_retraining_space(
        self, config: TrainingConfig, training_overrides: TrainingOverrides
    ) -> SearchSpace:
        """A run with other settings, the command line's last, over the seeds. Raises SpecError."""
        # Whole parts of the config, so that no profile of a data set comes between.
        base = {key: value for key, value in config.to_json_dict().items() if key != "seed"}
        changes = {
            "data.name": config.data.name,
            **self.set,
            **training_overrides.from_command_line,
        }
        try:
            return build_seed_grid(
                base["method"], {**base, **changes}, self.seeds or (config.seed,)
            )
        except SpecError as error:
            raise SpecError([f"set: {line}" for line in error.problems]) from None


def _rank_candidates(candidates: list[Candidate]) -> list[Candidate]:
    metric = select_ranking_metrics(candidates)[0]
    return sorted(candidates, key=lambda c: (c.exceeds_masking_gap, -c.score(metric)))
