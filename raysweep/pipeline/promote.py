"""Promotion: which candidates go on, chosen on validation alone, trained again where asked."""

from collections.abc import Iterator, Sequence
from operator import ge
from typing import Annotated, Any, Literal

from pydantic import Field

from raysweep.pipeline.artifact import Candidate, ranked_by
from raysweep.pipeline.stage import Outcome, Past, Settings, Stage, StageFailed, Training, Work
from raysweep.pipeline.tune import facts, of_seeds, over_seeds, sweep
from raysweep.schedules import Number
from raysweep.spec import Json, SpecError
from raysweep.sweep.space import SearchSpace
from raysweep.training import checkpoint
from raysweep.training.config import RunConfig


class Promote(Stage):
    """The best by the validation objective, or the Pareto set. It never looks at the test set.

    top: how many, or the Pareto set instead with `pareto`; each: so many, or the set, of each method; max_masking_gap:
    leave out what PGD overstates by more; set, seeds: train what was chosen again, with other settings (epochs,
    model.name) and with several seeds.
    """

    kind: Literal["promote"] = "promote"
    top: Annotated[int, Field(ge=1)] = 2
    each: bool = False
    pareto: bool = False
    max_masking_gap: Annotated[Number, Field(ge=0, le=1)] | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    cpus: Annotated[Number, Field(gt=0)] = 1.0
    gpus: Annotated[Number, Field(ge=0)] | None = None

    def trainings(self, settings: Settings, before: Sequence[RunConfig]) -> list[Training]:
        if not (self.set or self.seeds):
            return []
        found, problems = [], []
        for config in before:
            try:
                found.append(self.again(config, settings).config({}))
            except SpecError as error:
                problems += error.problems
        if problems:
            raise SpecError(list(dict.fromkeys(problems)))
        different = list({config.digest(): config for config in found}.values())
        seeds = len(self.seeds) or 1
        runs = seeds * self.top * (len({config.method.name for config in before}) if self.each else 1)
        # Which of them is promoted nobody knows yet: each as often.
        return [
            Training(config, seeds, None if self.pareto else config.epochs * runs / len(different))
            for config in different
        ]

    def describe(self, settings: Settings) -> str:
        what = "the Pareto set" if self.pareto else f"the best {self.top}"
        what += " of each method" if self.each else ""
        changes = {key: settings.command.get(key, value) for key, value in self.set.items()}
        again = f", trained again with {changes or 'the same settings'}" if self.set or self.seeds else ""
        return f"{what} on validation{again}{f' and seeds {list(self.seeds)}' if self.seeds else ''}"

    def choose(self, pool: tuple[Candidate, ...]) -> list[Candidate]:
        """Best first. Raises StageFailed if nothing is fit to go on."""
        limit = self.max_masking_gap
        fit = [c for c in pool if limit is None or c.metrics.get("masking_gap", 0.0) <= limit]
        if not fit:
            raise StageFailed(f"each of {len(pool)} candidates has a masking gap over {limit}: nothing is promoted")
        if self.pareto and not (fit := [c for c in fit if not c.masked]):
            raise StageFailed(f"each of {len(pool)} candidates has a masking gap over its space's: nothing is promoted")
        methods = dict.fromkeys(c.method for c in fit) if self.each else (None,)
        picked = [c for name in methods for c in self._best([c for c in fit if name in (None, c.method)])]
        return _ranked(picked)

    def _best(self, fit: list[Candidate]) -> list[Candidate]:
        if not self.pareto:
            return _ranked(fit)[: self.top]
        metrics = ranked_by(fit)
        points = [[c.score(metric) for metric in metrics] for c in fit]
        return [
            c
            for c, mine in zip(fit, points, strict=True)
            if not any(other != mine and all(map(ge, other, mine)) for other in points)
        ]

    def run(self, work: Work, past: Past) -> Outcome:
        picked = self.choose(past.pool)
        (metric, *_) = ranked_by(picked)
        for one in picked:
            work.say(f"promoted {one.title}: {metric} {one.score(metric):.3f} on validation")
        left_out = [c.label for c in past.pool if c not in picked]
        found: list[Json] = []
        candidates = list(picked)
        if self.set or self.seeds:
            candidates = list(self._again(work, picked, found))
        return Outcome(tuple(candidates), facts={"sweeps": found, "of": len(past.pool), "left_out": left_out})

    def _again(self, work: Work, picked: list[Candidate], found: list[Json]) -> Iterator[Candidate]:
        for one in picked:
            config = checkpoint.read(work.path(one.checkpoint)).config
            try:
                space = self.again(config, work.settings)
            except SpecError as error:
                # A searched setting decides what other settings there are.
                raise StageFailed(f"{one.title} cannot be trained again: {error}") from None
            ledger = sweep(work, work.sweep(one.label), space, self.cpus, self.gpus)
            found.append(facts(work, ledger))
            for trained in of_seeds(work, ledger, one.label, ("best",)):
                yield trained.model_copy(update={"settings": one.settings, "objectives": one.objectives})

    def again(self, config: RunConfig, settings: Settings) -> SearchSpace:
        """A run with other settings, the command line's last, over the seeds. Raises SpecError."""
        # Whole parts of the config, so that no profile of a data set comes between.
        base = {key: value for key, value in config.json_dict().items() if key != "seed"}
        changes = {"data.name": config.data.name, **self.set, **settings.command}
        try:
            return over_seeds(base["method"], {**base, **changes}, self.seeds or (config.seed,))
        except SpecError as error:
            raise SpecError([f"set: {line}" for line in error.problems]) from None


def _ranked(candidates: list[Candidate]) -> list[Candidate]:
    metric = ranked_by(candidates)[0]
    return sorted(candidates, key=lambda c: (c.masked, -c.score(metric)))
