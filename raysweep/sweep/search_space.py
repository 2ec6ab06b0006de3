"""Search spaces: YAML that names the settings to search, their distributions, and everything that
stays fixed.
"""

import itertools
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raysweep.data import DataSpec
from raysweep.method import Method
from raysweep.schedules import Number
from raysweep.spec import (
    JsonDict,
    Spec,
    SpecError,
    describe_unknown_name,
    find_builtin_folder,
    read_yaml,
)
from raysweep.training.config import TrainingConfig, build_training_config
from raysweep.training.validation import ObjectiveName

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

ParamValue = float | str | bool | None
Params = dict[str, Any]
FloatRange = tuple[Number, Number]
IntRange = tuple[int, int]
# Last parts of dotted paths that say nothing without the part before them.
_AMBIGUOUS_NAMES = {
    *("kind", "name", "on", "coef", "total", "steps", "size"),
    *("values", "boundaries", "epochs", "first", "last", "start", "end"),
}


class Distribution(Spec):
    """One of `float: [low, high]`, `int: [low, high]`, `categorical: [...]`, in Optuna's terms.

    log: equal weight to each order of magnitude; step: only low, low + step, ...; when: searched
    only if these other searched settings have this value, or one of these (else the base config's
    value stands).
    """

    float: FloatRange | None = None
    int: IntRange | None = None
    categorical: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    log: bool = False
    step: Annotated[Number, Field(gt=0)] | None = None
    when: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        given = [
            kind for kind in ("float", "int", "categorical") if getattr(self, kind) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                "needs exactly one of float: [low, high], int: [low, high], categorical: [...]"
            )
        bounds = self.float or self.int
        if bounds is None and (self.log or self.step):
            raise ValueError("log and step belong to float and int, not to categorical")
        if bounds and not bounds[0] < bounds[1]:
            raise ValueError(
                f"the range [{bounds[0]:g}, {bounds[1]:g}] is empty: low must be below high"
            )
        if bounds and self.log and bounds[0] <= 0:
            raise ValueError(f"a log range must be positive, got [{bounds[0]:g}, {bounds[1]:g}]")
        if self.log and self.step:
            raise ValueError("log and step exclude each other")
        if self.int and self.step and self.step % 1:
            raise ValueError(f"step = {self.step:g}: steps of an int range are whole numbers")
        return self

    @property
    def kind(self) -> str:
        """`float`, `int` or `categorical`."""
        return next(
            kind for kind in ("float", "int", "categorical") if getattr(self, kind) is not None
        )

    def bounds_or_choices(self) -> list[Any]:
        """The values that bound the rest: both ends of a range, every choice."""
        return list(self.categorical or self.float or self.int or ())

    def can_propose(self, value: Any) -> bool:
        """Whether the search could ever propose `value`."""
        if self.categorical is not None:
            return value in self.categorical
        low, high = self.bounds_or_choices()
        if not isinstance(value, Real) or not low <= value <= high:
            return False
        steps = (value - low) / (self.step or 1)
        return abs(steps - round(steps)) < 1e-8 if self.step or self.int else True

    def to_optuna(self) -> "BaseDistribution":
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.categorical is not None:
            return CategoricalDistribution([_to_param_value(c) for c in self.categorical])
        if self.float is not None:
            return FloatDistribution(*self.float, log=self.log, step=self.step)
        assert self.int is not None
        return IntDistribution(*self.int, log=self.log, step=int(self.step or 1))

    def from_optuna(self, suggested: Any) -> Any:
        """The setting that Optuna's suggestion stands for: choices that are not scalars travel as
        text.
        """
        if self.categorical is None:
            return suggested
        return next(c for c in self.categorical if _to_param_value(c) == suggested)


class Sampler(Spec):
    """How settings are proposed: by Optuna, or every point of a grid once.

    startup: random trials before TPE models the results, or NSGA-II's population.
    """

    stored_keys: ClassVar[Mapping[str, str]] = {"n_startup_trials": "startup"}

    kind: Literal["tpe", "random", "grid", "nsga2"] = "tpe"
    seed: int = 0
    n_startup_trials: Annotated[int, Field(ge=1)] = 8

    def build_sampler(self, n_past_trials: int = 0) -> "optuna.samplers.BaseSampler":
        """A grid needs no sampler: its points are queued.

        past: trials before a restart; their draws must not come again.
        """
        from optuna.samplers import NSGAIISampler, RandomSampler, TPESampler

        seed = self.seed + n_past_trials
        if self.kind in ("random", "grid"):
            return RandomSampler(seed=seed)
        if self.kind == "nsga2":
            return NSGAIISampler(seed=seed, population_size=self.n_startup_trials)
        return TPESampler(seed=seed, n_startup_trials=self.n_startup_trials)


class Scheduler(Spec):
    """Early stopping. asha: at epochs grace, grace x factor, ... only the best 1/factor of the
    trials go on.
    """

    stored_keys: ClassVar[Mapping[str, str]] = {
        "grace_period": "grace",
        "reduction_factor": "factor",
    }

    kind: Literal["asha", "none"] = "asha"
    grace_period: Annotated[int, Field(ge=1)] = 2
    reduction_factor: Annotated[int, Field(ge=2)] = 2

    def rungs(self, max_epochs: int) -> list[int]:
        """Epochs at which trials of so many are compared."""
        found, rung = [], self.grace_period
        while self.kind == "asha" and rung < max_epochs:
            found.append(rung)
            rung *= self.reduction_factor
        return found


class SearchSpace(Spec):
    """A sweep, declared: method, what is fixed (`base`), what is searched (`space`), where to
    start, how to judge.

    metric: what is maximised, or several for a Pareto front (the first decides each trial's best
    epoch). max_masking_gap: a trial that PGD overstates by more is infeasible: last in the ranking,
    a place for the sampler to leave. share_prefixes: start from states that other trials have
    trained (see `training.prefix`); prefix_gib: when their folder outgrows so many GiB, the least
    recently used go.
    """

    stored_keys: ClassVar[Mapping[str, str]] = {"points_to_evaluate": "start"}

    method: str | dict[str, Any]
    metric: ObjectiveName | Annotated[tuple[ObjectiveName, ...], Field(min_length=2)] = (
        "robust_worst"
    )
    max_masking_gap: Annotated[Number, Field(ge=0, le=1)] | None = None
    trials: Annotated[int, Field(ge=1)] = 16
    share_prefixes: bool = True
    prefix_gib: Annotated[Number, Field(ge=0)] = 20.0
    sampler: Sampler = Field(default_factory=Sampler)
    scheduler: Scheduler = Field(default_factory=Scheduler)
    base: dict[str, Any] = Field(default_factory=dict)
    space: Annotated[dict[str, Distribution], Field(min_length=1)]
    points_to_evaluate: tuple[dict[str, Any], ...] = ()

    @property
    def objectives(self) -> tuple[str, ...]:
        return (self.metric,) if isinstance(self.metric, str) else self.metric

    @property
    def n_trials(self) -> int:
        """Trials that the sweep has when it is done."""
        return (
            min(self.trials, len(self.initial_points))
            if self.sampler.kind == "grid"
            else self.trials
        )

    @property
    def initial_points(self) -> list[Params]:
        """Points to try before the sampler has a say: the starting points, or the whole grid."""
        points: Iterable[Params] = self.points_to_evaluate
        if self.sampler.kind == "grid":
            choices = [d.categorical or () for d in self.space.values()]
            points = (
                dict(zip(self.space, point, strict=True)) for point in itertools.product(*choices)
            )
        # Points that differ in nothing that a trial has are one.
        return list(
            {json.dumps(met, default=str): met for met in map(self._drop_inactive, points)}.values()
        )

    def _drop_inactive(self, point: Params) -> Params:
        """A point without what it does not have: settings whose conditions are not met."""
        met: Params = {}
        for path, distribution in self.space.items():
            known = {other: wanted for other, wanted in distribution.when.items() if other in point}
            if path in point and all(
                other in met and met[other] in _as_list(w) for other, w in known.items()
            ):
                met[path] = point[path]
        return met

    def optuna_params(self, params: Params) -> dict[str, ParamValue]:
        """Searched settings in the form that Optuna stores."""
        return {
            path: _to_param_value(value) for path, value in params.items() if path in self.space
        }

    def trial_config(self, params: Mapping[str, Any]) -> TrainingConfig:
        """The run that a trial with these settings is."""
        return build_training_config(
            self.method, {"validation.objective": self.objectives[0]}, self.base, params
        )

    def with_absolute_paths(self) -> "SearchSpace":
        """This space with the paths of its data absolute, as seen from here: trials work elsewhere."""
        data = self.trial_config({}).data.to_json_dict()
        paths = {
            f"data.{key}": data[key] for key in ("data_dir", "unlabeled") if data[key] is not None
        }
        return self.replace(base={**self.base, **paths}) if paths else self

    def find_problems(self) -> list[str]:
        """What is wrong with settings, ranges, conditions and starting points: one line each.

        Each end of each range, each choice and each starting point is validated as a run's setting.
        """
        try:
            config = self.trial_config({})
        except SpecError as error:
            return error.problems
        every, goal = config.validation.every, config.validation.objective
        lines = []
        if goal != (metric := self.objectives[0]):
            lines.append(
                f"validation.objective = {goal!r}: the space goes by metric = {metric!r}; change that instead"
            )
        lines += [
            f"scheduler: trials cannot be compared at epoch {rung}, validation.every = {every} leaves it out; "
            f"make grace a multiple of {every}"
            for rung in self.scheduler.rungs(config.epochs)
            if rung % every
        ][:1]
        if len(self.objectives) > 1 and self.scheduler.kind != "none":
            lines.append(
                "scheduler.kind = 'asha': with several metrics nothing says which trial is weak; set it to none"
            )
        for position, (path, distribution) in enumerate(self.space.items()):
            where = f"space.{path}"
            for other in distribution.when:
                if other not in list(self.space)[:position]:
                    lines.append(f"{where}.when: {other!r} is not a searched setting before it")
            if self.sampler.kind == "grid" and distribution.categorical is None:
                lines.append(f"{where}: a grid needs `categorical: [...]`")
            for value in distribution.bounds_or_choices():
                given = {other: _as_list(wanted)[0] for other, wanted in distribution.when.items()}
                lines += self._find_invalid_params({**given, path: value}, where)
        for position, point in enumerate(self.points_to_evaluate):
            for path, value in point.items():
                where = f"start.{position}.{path}"
                if path not in self.space:
                    lines.append(
                        f"{where}: {describe_unknown_name('searched setting', path, list(self.space))}"
                    )
                elif not self.space[path].can_propose(value):
                    lines.append(
                        f"{where} = {value!r}: outside the searched {self.space[path].bounds_or_choices()}"
                    )
                else:
                    lines += self._find_invalid_params({path: value}, where)
        return list(dict.fromkeys(lines))

    def _find_invalid_params(self, params: Params, location: str) -> list[str]:
        try:
            self.trial_config(params)
        except SpecError as error:
            return [f"{location}: {line}" for line in error.problems]
        return []

    def suggest_params(self, optuna_trial: "optuna.Trial") -> Params:
        """Values for every searched setting whose condition holds, in the order of the file."""
        chosen: Params = {}
        for path, distribution in self.space.items():
            if all(
                chosen.get(other) in _as_list(wanted) for other, wanted in distribution.when.items()
            ):
                chosen[path] = distribution.from_optuna(
                    _suggest_value(optuna_trial, path, distribution.to_optuna())
                )
        return chosen

    def with_overrides(self, overrides: Mapping[str, Any]) -> "SearchSpace":
        """This space with settings fixed from outside.

        A setting that was searched is searched no more; one that hangs on it is searched if the
        fixed value allows it.
        """
        space: JsonDict = {}
        for path, distribution in self.space.items():
            if parts := [
                key for key in overrides if key != path and "*" in path and fnmatchcase(key, path)
            ]:
                raise SpecError(
                    f"--set {parts[0]}: searched as {path}; set that, or search what is left in a --space"
                )
            when = distribution.when
            met = all(
                overrides[other] in _as_list(wanted)
                for other, wanted in when.items()
                if other in overrides
            )
            if path not in overrides and met:
                rest = {other: wanted for other, wanted in when.items() if other not in overrides}
                space[path] = distribution.to_json_dict() | {"when": rest}
        if not space:
            raise SpecError(
                "nothing is left to search: every searched setting is fixed by --set; use `raysweep train`"
            )
        gone = (set(self.space) - set(space)) | set(overrides)
        start = [
            {path: v for path, v in point.items() if path not in gone}
            for point in self.points_to_evaluate
        ]
        data = self.to_json_dict() | {"base": {**self.base, **overrides}, "space": space}
        return SearchSpace.from_data(data | {"points_to_evaluate": [p for p in start if p]})


def load_space(
    name: str, overrides: Mapping[str, Any], space_path: Path | None = None
) -> SearchSpace:
    """A shipped space by its name, or a method's from a file, with `--set` applied.

    Raises SpecError with all problems at once.
    """
    given = space_path is not None
    if space_path is None:
        space_path = find_builtin_folder("search_spaces") / f"{name}.yaml"
        if not space_path.is_file():
            raise SpecError(describe_unknown_name("search space", name, list_builtin_spaces()))
    data = _merge_dataset_section(read_yaml(space_path), overrides, str(space_path))
    try:
        space = SearchSpace.from_data(data, str(space_path))
    except SpecError as error:
        raise SpecError(
            list(dict.fromkeys([*error.problems, *_find_remaining_problems(data, space_path)]))
        ) from None
    unnamed = Method.model_fields["name"].default
    method = space.method if isinstance(space.method, str) else space.method.get("name", unnamed)
    if given and name and method != name:
        raise SpecError(f"{space_path} is a space for method {method!r}, not for {name!r}")
    space = space.with_overrides(overrides)
    if problems := space.find_problems():
        raise SpecError(problems if overrides else [f"{space_path}: {line}" for line in problems])
    return space


def _merge_dataset_section(data: JsonDict, overrides: Mapping[str, Any], source: str) -> JsonDict:
    """Merge the section for the data set: `for: {cifar10: {space: ..., trials: ..., ...}}`.

    `space` and `base` are changed entry by entry, every other key as a whole.
    """
    data = SearchSpace.rename_stored_keys(data, source)
    sections = data.pop("for", None) or {}
    name = (
        overrides.get("data.name") or (data.get("base") or {}).get("data.name") or DataSpec().name
    )
    section = SearchSpace.rename_stored_keys(sections.get(name) or {}, source)
    for key, value in section.items():
        data[key] = {**data.get(key, {}), **value} if key in ("space", "base") else value
    return data


def _find_remaining_problems(data: JsonDict, space_path: Path) -> list[str]:
    """A file that does not validate may be wrong in more ways: check the distributions that are
    sound by themselves.
    """
    entries = data.get("space")
    sound: JsonDict = {}
    for path, entry in entries.items() if isinstance(entries, dict) else ():
        with suppress(SpecError):
            sound[path] = Distribution.from_data(entry)
    kept = {key: data[key] for key in ("method", "base") if key in data}
    try:
        return [
            f"{space_path}: {line}"
            for line in SearchSpace.from_data({**kept, "space": sound}).find_problems()
        ]
    except SpecError:
        return []


def resolve_space_path(path_or_name: Path) -> Path:
    """What `--space` names: a file, or a space that ships with raysweep."""
    return (
        path_or_name
        if path_or_name.exists() or str(path_or_name) not in list_builtin_spaces()
        else find_builtin_folder("search_spaces") / f"{path_or_name}.yaml"
    )


def list_builtin_spaces() -> list[str]:
    """Names of the spaces that ship with raysweep."""
    return sorted(path.stem for path in find_builtin_folder("search_spaces").glob("*.yaml"))


def param_labels(paths: list[str]) -> dict[str, str]:
    """A short name for each dotted path, unique among them: `alpha`, where there are two
    `pgd.alpha`; `lr.values`.
    """
    noise = {"method", "terms", "attacks", "weight", "optim"}
    short = {
        path: [part for part in path.split(".") if part not in noise] or [path] for path in paths
    }
    result = {}
    for path, parts in short.items():
        least = min(1 + (parts[-1] in _AMBIGUOUS_NAMES), len(parts))
        alone = (
            n
            for n in range(least, len(parts) + 1)
            if [o[-n:] for o in short.values()].count(parts[-n:]) == 1
        )
        length = next(alone, None)
        result[path] = ".".join(parts[-length:]) if length else path
    return result


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _to_param_value(choice: Any) -> ParamValue:
    return choice if isinstance(choice, str | int | float | bool) or choice is None else str(choice)


def _suggest_value(
    optuna_trial: "optuna.Trial", path: str, distribution: "BaseDistribution"
) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return optuna_trial.suggest_categorical(path, distribution.choices)
    if isinstance(distribution, FloatDistribution):
        return optuna_trial.suggest_float(
            path, distribution.low, distribution.high, log=distribution.log, step=distribution.step
        )
    assert isinstance(distribution, IntDistribution)
    return optuna_trial.suggest_int(
        path, distribution.low, distribution.high, log=distribution.log, step=distribution.step
    )
