"""Stages that train: a search, runs of the papers over several seeds."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from raysweep import storage
from raysweep.display import Progress
from raysweep.pipeline.artifact import Candidate
from raysweep.pipeline.lock import alone
from raysweep.pipeline.stage import Outcome, Past, Settings, Stage, StageFailed, Training, Work
from raysweep.schedules import Number
from raysweep.spec import Json, Spec, SpecError
from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.plan import expected_epochs
from raysweep.sweep.space import SearchSpace, labels, load_space
from raysweep.tracking import SweepTracker
from raysweep.training import checkpoint
from raysweep.training.config import RunConfig, run_config
from raysweep.training.presets import preset
from raysweep.wording import counted

Which = Literal["best", "last"]


class Tune(Stage):
    """A sweep. space: a method's own, a YAML file, or one written out; set: settings fixed for it.

    label: what its trials are called in the report (null: the method), unique in a pipeline.
    gpus: what a trial holds (null: one if the cluster has any); max_hours: ends the sweep with what it has.
    """

    kind: Literal["tune"] = "tune"
    space: str | dict[str, Any]
    label: str | None = None
    trials: Annotated[int, Field(ge=1)] | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    cpus: Annotated[Number, Field(gt=0)] = 1.0
    gpus: Annotated[Number, Field(ge=0)] | None = None
    max_hours: Annotated[Number, Field(gt=0)] | None = None

    def search(self, settings: Settings) -> SearchSpace:
        """The space with everything fixed that is fixed. Raises SpecError with all problems at once."""
        changes = settings.around(self.set)
        if isinstance(self.space, dict):
            space = SearchSpace.load(self.space, "space").fixed(changes)
            if problems := space.problems():
                raise SpecError(problems)
        elif self.space.endswith((".yaml", ".yml")):
            space = load_space("", changes, Path(self.space))
        else:
            space = load_space(self.space, changes)
        return space.model_copy(update={"trials": self.trials}) if self.trials else space

    def trainings(self, settings: Settings, before: Sequence[RunConfig]) -> list[Training]:
        space = self.search(settings)
        config = space.config({})
        return [Training(config, space.total, expected_epochs(space, config.epochs))]

    def content(self, settings: Settings) -> Json:
        return {"space": _decides(self.search(settings))}

    def labels(self, settings: Settings) -> list[str]:
        return [self.label or self.search(settings).config({}).method.name]

    def describe(self, settings: Settings) -> str:
        space = self.search(settings)
        config = space.config({})
        searched = ", ".join(labels(list(space.space)).values())
        epochs, most = expected_epochs(space, config.epochs), space.total * config.epochs
        about = f"about {epochs} of {most}" if epochs < most else str(most)
        return f"{counted(space.total, 'trial')} of {_what(config)} each, {about} in all; searched: {searched}"

    def run(self, work: Work, past: Past) -> Outcome:
        (label,) = self.labels(work.settings)
        ledger = sweep(work, work.sweep(label), self.search(work.settings), self.cpus, self.gpus, self.max_hours)
        candidates = [candidate(work, ledger, trial, f"{label}/{trial.number:04d}") for trial in ledger.ranked()]
        return Outcome(tuple(candidates), facts={"sweeps": [facts(work, ledger)]})


class Row(Spec):
    """One row of a table: a preset or a method, with settings of its own."""

    preset: str | None = None
    method: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)


class Train(Stage):
    """Training runs, each over several seeds. runs: row of the report -> what is trained.

    checkpoints: which epochs go on: the best on validation, the last.
    """

    kind: Literal["train"] = "train"
    runs: Annotated[dict[str, Row], Field(min_length=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    checkpoints: Annotated[tuple[Which, ...], Field(min_length=1)] = ("best",)
    set: dict[str, Any] = Field(default_factory=dict)
    cpus: Annotated[Number, Field(gt=0)] = 1.0
    gpus: Annotated[Number, Field(ge=0)] | None = None

    def labels(self, settings: Settings) -> list[str]:
        return list(self.runs)

    def spaces(self, settings: Settings) -> dict[str, SearchSpace]:
        """A grid over the seeds for each row. Raises SpecError with the problems of all rows."""
        spaces, problems = {}, []
        for label, row in self.runs.items():
            try:
                if (row.preset is None) == (row.method is None):
                    raise SpecError("needs exactly one of preset, method")
                method, base = preset(row.preset) if row.preset else (row.method, {})
                around = settings.around({**self.set, **row.set})
                spaces[label] = over_seeds(method, {**base, **around}, self.seeds)
            except SpecError as error:
                problems += [f"runs.{label}: {line}" for line in error.problems]
        if problems:
            raise SpecError(problems)
        return spaces

    def trainings(self, settings: Settings, before: Sequence[RunConfig]) -> list[Training]:
        configs = [space.config({}) for space in self.spaces(settings).values()]
        return [Training(config, len(self.seeds), len(self.seeds) * config.epochs) for config in configs]

    def content(self, settings: Settings) -> Json:
        return {label: _decides(space) for label, space in self.spaces(settings).items()}

    def describe(self, settings: Settings) -> str:
        configs = {label: space.config({}) for label, space in self.spaces(settings).items()}
        rows = [f"{label} ({_what(config)})" for label, config in configs.items()]
        epochs = len(self.seeds) * sum(config.epochs for config in configs.values())
        return f"{counted(len(self.seeds), 'seed')} of {'; '.join(rows)}: {counted(epochs, 'epoch')} in all"

    def run(self, work: Work, past: Past) -> Outcome:
        candidates: list[Candidate] = []
        found: list[Json] = []
        for label, space in self.spaces(work.settings).items():
            ledger = sweep(work, work.sweep(label), space, self.cpus, self.gpus)
            candidates += of_seeds(work, ledger, label, self.checkpoints)
            found.append(facts(work, ledger))
        return Outcome(tuple(candidates), facts={"sweeps": found})


def over_seeds(method: Any, base: dict[str, Any], seeds: tuple[int, ...]) -> SearchSpace:
    """One run for each seed, as a sweep: so it is spread, resumed, tracked and shares prefixes like any other."""
    space = SearchSpace.load(
        {
            "method": method,
            "metric": run_config(method, base).validation.objective,
            "base": base,
            "trials": len(seeds),
            "sampler": {"kind": "grid"},
            "scheduler": {"kind": "none"},
            "space": {"seed": {"categorical": list(seeds)}},
        }
    )
    if problems := space.problems():
        raise SpecError(problems)
    return space


def sweep(
    work: Work, path: Path, space: SearchSpace, cpus: float, gpus: float | None, max_hours: float | None = None
) -> Ledger:
    """The sweep in `path`, run to its end or budget. Raises StageFailed if it brought nothing."""
    from raysweep.sweep.relay import Budget, End, Listener, SweepFailed
    from raysweep.sweep.resources import Resources
    from raysweep.sweep.tuner import run_sweep

    with alone(path):
        ledger = Ledger.open(path) if storage.pull_file(path / "sweep.json") else Ledger.create(path, space)
        end: End = "done"
        if sum(trial.state != "running" for trial in ledger.trials()) < space.total:
            work.cluster()
            resources = Resources(cpus, gpus)
            fingerprint = work.data(space.config({}).data).fingerprint
            listeners: list[Listener] = [SweepTracker(work.tracker, fingerprint), Progress(work.console)]
            budget = Budget(math.inf if max_hours is None else 3600 * max_hours)
            try:
                end = run_sweep(ledger, listeners, resources, work.address, budget, fingerprint)
            except SweepFailed as error:
                raise StageFailed(str(error)) from None
    if end == "interrupted":
        raise KeyboardInterrupt
    if not ledger.ranked():
        reason = next((trial.reason for trial in ledger.trials() if trial.reason), "none reported the objective")
        raise StageFailed(f"no trial of {path.name} came to a result: {reason}")
    return ledger


def of_seeds(work: Work, ledger: Ledger, label: str, which: tuple[Which, ...]) -> Iterator[Candidate]:
    """The checkpoints of a grid over seeds, seed by seed."""
    for trial in sorted(ledger.ranked(), key=lambda trial: trial.number):
        for one in which:
            yield candidate(work, ledger, trial, label, one)


def candidate(work: Work, ledger: Ledger, trial: Trial, label: str, which: Which = "best") -> Candidate:
    path = ledger.checkpoint(trial) if which == "best" else ledger.run_path(trial.number) / f"epoch-{trial.epoch:04d}"
    saved = checkpoint.read(path)
    return Candidate(
        label=label,
        method=saved.config.method.name,
        checkpoint=work.reference(path),
        which=which,
        seed=saved.config.seed,
        epoch=saved.epoch,
        epochs=saved.config.epochs,
        metrics={key: value for key, value in saved.metrics.items() if "/" not in key},
        settings={key: value for key, value in trial.settings.items() if key != "seed"},
        masked=ledger.masks(trial),
        objectives=ledger.space.objectives,
    )


def facts(work: Work, ledger: Ledger) -> Json:
    """What a sweep cost and found, for the report."""
    trials = ledger.trials()
    metric = ledger.space.objectives[0]
    rows = [
        {
            "number": t.number,
            "state": t.state,
            "settings": t.settings,
            "score": t.best.get(metric),
            "masking_gap": t.best.get("masking_gap"),
            "reason": t.reason,
        }
        for t in trials
    ]
    return {
        "path": work.reference(ledger.path),
        "method": ledger.space.config({}).method.name,
        "metric": metric,
        "asked": sum(t.epoch for t in trials),
        "trained": sum(t.trained for t in trials),
        "seconds": sum(t.seconds for t in trials),
        "trials": rows,
    }


def _decides(space: SearchSpace) -> Json:
    """A space without where its data lie, which decides nothing: their fingerprint does."""
    base = {key: value for key, value in space.base.items() if key not in ("data.data_dir", "data.download")}
    return space.model_copy(update={"base": base}).json_dict()


def _what(config: RunConfig) -> str:
    return f"{config.method.name}, {config.model.name} on {config.data.name}, {counted(config.epochs, 'epoch')}"
