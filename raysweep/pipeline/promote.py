"""The promote stage: selects candidates by validation results, and can train them again."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from raysweep.pareto import pareto_front_indices
from raysweep.pipeline.artifact import (
    Candidate,
    choose_score,
    rank_candidates,
    select_ranking_metrics,
)
from raysweep.pipeline.facts import PromoteFacts, SweepSummary
from raysweep.pipeline.stage import (
    CONFLICT_MESSAGE,
    PlannedTraining,
    Stage,
    StageContext,
    StageFailed,
    StageResult,
    TrainingOverrides,
    UpstreamResults,
    describe_threat_conflict,
)
from raysweep.pipeline.stage_sweep import (
    build_seed_grid,
    iter_seed_candidates,
    run_stage_sweep,
    summarize_sweep,
)
from raysweep.schedules import Number
from raysweep.spec import SpecError, merge_overrides
from raysweep.sweep.search_space import SearchSpace
from raysweep.training import checkpoint
from raysweep.training.config import TrainingConfig
from raysweep.training.model_loading import replace_data_folder


class PromoteStage(Stage):
    """Selects the best candidates by their validation results; the test set plays no part."""

    stored_keys: ClassVar[Mapping[str, str]] = {"per_method": "each"}

    kind: Literal["promote"] = "promote"
    top: Annotated[int, Field(ge=1)] = 2
    """Number of candidates to select."""
    per_method: bool = False
    """Whether to select `top` candidates, or the Pareto set, of each training method."""
    pareto: bool = False
    """Whether to select the Pareto set of the objectives instead of the `top` candidates."""
    max_masking_gap: Annotated[Number, Field(ge=0, le=1)] | None = None
    """Candidates with a larger masking gap are left out (null: no limit)."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings to train the selected candidates again with, such as `epochs`, by dotted path."""
    seeds: tuple[int, ...] = ()
    """Seeds to train the selected candidates again with (empty: the candidate's own seed)."""
    cpus: Annotated[Number, Field(gt=0)] = 1.0
    """CPU cores of a run."""
    gpus: Annotated[Number, Field(ge=0)] | None = None
    """GPUs of a run (null: one if the cluster has any)."""

    def plan_trainings(
        self, training_overrides: TrainingOverrides, upstream_configs: Sequence[TrainingConfig]
    ) -> list[PlannedTraining]:
        if not self._trains_again():
            return []
        configs: dict[str, TrainingConfig] = {}
        problems: list[str] = []
        for upstream_config in upstream_configs:
            try:
                space = self.build_retraining_space(upstream_config, training_overrides)
                config = space.trial_config({})
                configs[config.digest()] = config
            except SpecError as error:
                problems += error.problems
        if problems:
            raise SpecError(list(dict.fromkeys(problems)))
        n_seeds = len(self.seeds) or 1
        n_runs = n_seeds * self.top
        if self.per_method:
            n_runs *= len({config.method.name for config in upstream_configs})
        trainings = []
        for config in configs.values():
            # The selection is unknown yet: assume that each config is selected equally often. The
            # size of a Pareto set is unknown too.
            n_runs_of_config = None if self.pareto else n_runs / len(configs)
            epochs = None if n_runs_of_config is None else config.epochs * n_runs_of_config
            trainings.append(PlannedTraining(config, n_runs_of_config, n_seeds, epochs))
        return trainings

    def _trains_again(self) -> bool:
        """Whether the selected candidates are trained again."""
        return bool(self.set or self.seeds)

    def describe_stage(self, training_overrides: TrainingOverrides) -> str:
        line = "the Pareto set" if self.pareto else f"the best {self.top}"
        if self.per_method:
            line += " of each method"
        line += " on validation"
        if self._trains_again():
            changes = {
                key: training_overrides.from_command_line.get(key, value)
                for key, value in self.set.items()
            }
            line += f", trained again with {changes or 'the same settings'}"
        if self.seeds:
            line += f" and seeds {list(self.seeds)}"
        return line

    def select_candidates(self, candidates: tuple[Candidate, ...]) -> list[Candidate]:
        """Select candidates by their validation results.

        Args:
            candidates: All candidates of the earlier stages.

        Returns:
            The selected candidates, best first.

        Raises:
            StageFailed: If the masking gap excludes all of them, or those to rank were validated
                under different threat models.
        """
        eligible = self._find_eligible_candidates(candidates)
        if not self.per_method:
            return rank_candidates(self._select_top_or_pareto(eligible))
        selected = []
        for method in dict.fromkeys(c.method for c in eligible):
            selected += self._select_top_or_pareto([c for c in eligible if c.method == method])
        return rank_candidates(selected)

    def _find_eligible_candidates(self, candidates: tuple[Candidate, ...]) -> list[Candidate]:
        """Leave out the candidates that the masking gap excludes; fail if none is left."""
        limit, n_candidates = self.max_masking_gap, len(candidates)
        eligible = list(candidates)
        if limit is not None:
            eligible = [c for c in eligible if c.metrics.get("masking_gap", 0.0) <= limit]
        if not eligible:
            raise StageFailed(
                f"each of {n_candidates} candidates has a masking gap over {limit}: "
                "nothing is promoted"
            )
        if self.pareto:
            eligible = [c for c in eligible if not (c.exceeds_masking_gap or c.is_ineligible)]
        if not eligible:
            raise StageFailed(
                f"each of {n_candidates} candidates has a masking gap over its space's, or no "
                "epoch in which its instance weights acted: nothing is promoted"
            )
        return eligible

    def _select_top_or_pareto(self, eligible: list[Candidate]) -> list[Candidate]:
        """Select the best candidates, or the Pareto set, of one group."""
        threats = [(c.label, [c.threat] if c.threat else []) for c in eligible]
        if conflict := describe_threat_conflict(threats):
            raise StageFailed(f"{CONFLICT_MESSAGE}: {conflict}; nothing is promoted")
        if not self.pareto:
            return rank_candidates(eligible)[: self.top]
        metrics = select_ranking_metrics(eligible)
        get_score = choose_score(eligible, metrics[0])
        if all(c.has_attacked_finalists for c in eligible):
            eligible = [c for c in eligible if not c.is_below_finalists]
        points = [[get_score(c, metric) for metric in metrics] for c in eligible]
        return [eligible[index] for index in pareto_front_indices(points)]

    def run_stage(self, context: StageContext, upstream: UpstreamResults) -> StageResult:
        selected = self.select_candidates(upstream.candidates)
        metric = select_ranking_metrics(selected)[0]
        for candidate in selected:
            score = f"{metric} {candidate.checkpoint_value(metric):.3f} on validation"
            if candidate.average is not None:
                name = "score with margin" if candidate.margin_factor else "score"
                score += f", {name} {candidate.average:.3f}"
            if candidate.autoattack is not None:
                score += f", {candidate.autoattack:.3f} under AutoAttack"
            context.print_line(f"promoted {candidate.title}: {score}")
        left_out = tuple(c.label for c in upstream.candidates if c not in selected)
        candidates: list[Candidate] = []
        sweeps: list[SweepSummary] = []
        if self._trains_again():
            for candidate in selected:
                retrained, sweep = self._retrain_candidate(context, candidate)
                candidates += retrained
                sweeps.append(sweep)
        else:
            candidates = selected
        facts = PromoteFacts(
            sweeps=tuple(sweeps), n_candidates=len(upstream.candidates), left_out=left_out
        )
        return StageResult(tuple(candidates), facts=facts)

    def _retrain_candidate(
        self, context: StageContext, candidate: Candidate
    ) -> tuple[list[Candidate], SweepSummary]:
        """Train a candidate again, over the seeds; return the new candidates and their sweep."""
        saved = checkpoint.read_checkpoint(context.resolve_reference(candidate.checkpoint))
        config = replace_data_folder(saved)
        try:
            space = self.build_retraining_space(config, context.training_overrides)
        except SpecError as error:
            # A searched parameter can decide which other settings exist: checks before the run of
            # the pipeline cannot find this error.
            raise StageFailed(f"{candidate.title} cannot be trained again: {error}") from error
        folder = context.choose_sweep_folder(candidate.label)
        ledger = run_stage_sweep(context, folder, space, self.cpus, self.gpus)
        retrained = [
            one.replace(params=candidate.params, objectives=candidate.objectives)
            for one in iter_seed_candidates(context, ledger, candidate.label, ("best",))
        ]
        return retrained, summarize_sweep(context, ledger)

    def build_retraining_space(
        self, config: TrainingConfig, training_overrides: TrainingOverrides
    ) -> SearchSpace:
        """Build the sweep that trains a config again, over the seeds.

        Args:
            config: Config of the candidate.
            training_overrides: The command line's settings take precedence over the stage's.

        Returns:
            A grid over the seeds.

        Raises:
            SpecError: If the config does not allow the settings.
        """
        # The base holds whole parts of the config, so that defaults of the data set do not apply.
        base = {key: value for key, value in config.to_json_dict().items() if key != "seed"}
        changes = merge_overrides(
            base, {"data.name": config.data.name}, self.set, training_overrides.from_command_line
        )
        try:
            return build_seed_grid(base["method"], changes, self.seeds or (config.seed,))
        except SpecError as error:
            raise error.with_prefix("set: ") from error
