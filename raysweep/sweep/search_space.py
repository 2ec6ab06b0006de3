"""Search spaces: which settings a sweep searches, with what distributions, and what is fixed."""

import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raysweep.catalog import BASE_METHODS, build_base_method
from raysweep.data import DataSpec
from raysweep.method import Method
from raysweep.models import ModelSpec
from raysweep.schedules import Number
from raysweep.spec import (
    JsonDict,
    Spec,
    SpecError,
    covers_path,
    describe_unknown_name,
    find_builtin_folder,
    list_leaf_paths,
    list_paths,
    match_paths,
    merge_overrides,
)
from raysweep.training.config import (
    TrainingConfig,
    build_training_config,
    build_training_config_of_0_1,
    find_dataset_defaults,
    name_dataset,
)
from raysweep.training.dataset_defaults import is_small_array_set
from raysweep.training.selection import TIE_BREAK_METRICS, SelectionRule
from raysweep.training.validation import ObjectiveName, is_robust_objective
from raysweep.yaml_files import SettingsFile, read_yaml

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

DEFAULT_PREFIX_GIB = 20.0
"""Limit of the prefix cache of a new sweep, in GiB."""
DEFAULT_FINALISTS = 3
"""Number of finalists of a new sweep."""
DEFAULT_BASE_RUNS = 2
"""Number of base runs in a new sweep of a reweighting method."""
DEFAULT_SCORE_EPOCHS = 3
"""Number of epochs that the score of a trial averages in a new sweep with one metric and a fixed
learning rate."""
_KINDS = ("float", "int", "categorical")
ParamValue = float | str | bool | None
Params = dict[str, Any]
# Largest number of steps in a range; Optuna computes with 28 digits.
_MAX_STEPS = 1e15
FloatRange = tuple[Number, Number]
IntRange = tuple[int, int]
# Last parts of dotted paths that are ambiguous without the part before them.
_AMBIGUOUS_NAMES = {
    *("kind", "name", "on", "coef", "total", "steps", "size"),
    *("values", "boundaries", "epochs", "first", "last", "start", "end"),
}


class Distribution(Spec):
    """Values of one searched setting: exactly one of `float`, `int` and `categorical`."""

    float: FloatRange | None = None
    """Range `[low, high]` of real numbers, both ends included."""
    int: IntRange | None = None
    """Range `[low, high]` of integers, both ends included."""
    categorical: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """List of choices."""
    log: bool = False
    """Whether each order of magnitude is equally likely. The range must be positive."""
    step: Annotated[Number, Field(gt=0)] | None = None
    """Only propose low, low + step, low + 2 step, ...; null for every number of the range."""
    when: dict[str, Any] = Field(default_factory=dict)
    """Condition: earlier searched settings and the value (or list of values) that they must have.

    If it does not hold, the setting is not searched and has the value of `base`.
    """

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        """Check that exactly one kind is set and that its options fit."""
        kinds = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(
                "needs exactly one of float: [low, high], int: [low, high], categorical: [...]"
            )
        bounds = self.float or self.int
        if bounds is None:
            if self.log or self.step:
                raise ValueError("log and step belong to float and int, not to categorical")
            return self
        low, high = bounds
        if not low < high:
            raise ValueError(f"the range [{low:g}, {high:g}] is empty: low must be below high")
        if self.log and low <= 0:
            raise ValueError(f"a log range must be positive, got [{low:g}, {high:g}]")
        if self.log and self.step:
            raise ValueError("log and step exclude each other")
        if self.int and self.step and self.step % 1:
            raise ValueError(f"step = {self.step:g}: steps of an int range are whole numbers")
        return self

    @property
    def kind(self) -> str:
        """`float`, `int` or `categorical`."""
        return next(kind for kind in _KINDS if getattr(self, kind) is not None)

    def bounds_or_choices(self) -> list[Any]:
        """Return both ends of a range, or all choices."""
        return list(self.categorical or self.float or self.int or ())

    def describe(self) -> str:
        """Describe the values in plain words, such as "whole numbers from 1 to 6"."""
        if self.categorical is not None:
            choices = ", ".join(_format_choice(choice) for choice in self.categorical)
            text = f"one of {choices}" if len(self.categorical) > 1 else choices
        else:
            low, high = (f"{bound:g}" for bound in self.bounds_or_choices())
            text = f"{'whole numbers ' if self.int else ''}from {low} to {high}"
            if self.log:
                text += ", each order of magnitude equally likely"
            if self.step:
                text += f", in steps of {self.step:g}"
        conditions = [
            f"{other} is {' or '.join(_format_choice(value) for value in _as_list(values))}"
            for other, values in self.when.items()
        ]
        return f"{text}; only if {' and '.join(conditions)}" if conditions else text

    def can_propose(self, value: Any) -> bool:
        """Return whether a value lies in the range (and on its steps) or among the choices."""
        if self.categorical is not None:
            return value in self.categorical
        low, high = self.bounds_or_choices()
        if not isinstance(value, Real) or not low <= value <= high:
            return False
        if not self.step and not self.int:
            return True
        n_steps: float = (value - low) / (self.step or 1)
        return abs(n_steps - round(n_steps)) < 1e-8

    def is_active(self, params: Mapping[str, Any]) -> bool:
        """Return whether `when` holds for a trial that has these earlier searched settings."""
        return all(
            other in params and params[other] in _as_list(values)
            for other, values in self.when.items()
        )

    def find_sampling_problem(self) -> str | None:
        """Return in one line why Optuna cannot draw from the range, or None if it can."""
        bounds = self.float or self.int
        if bounds is None:
            return None
        width = bounds[1] - bounds[0]
        if not abs(width) < sys.float_info.max:
            return f"the range {list(bounds)} is not finite; give two numbers"
        if self.step is not None and not width / _MAX_STEPS <= self.step <= width:
            return (
                f"step = {self.step:g}: must be at most the width of the range, {width:g}, and "
                f"leave at most {_MAX_STEPS:g} values"
            )
        return None

    def to_optuna(self) -> "BaseDistribution":
        """Return Optuna's distribution. Choices that are not scalars become strings."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.categorical is not None:
            return CategoricalDistribution([_to_param_value(c) for c in self.categorical])
        if self.float is not None:
            return FloatDistribution(*self.float, log=self.log, step=self.step)
        assert self.int is not None
        return IntDistribution(*self.int, log=self.log, step=int(self.step or 1))

    def to_optuna_value(self, value: Any) -> ParamValue:
        """Return a value of the setting as Optuna's storages return it: a file may have 1 for 1.0.

        Args:
            value: Value of the setting, one that `can_propose` accepts.
        """
        if self.categorical is not None:
            value = next((choice for choice in self.categorical if choice == value), value)
            return _to_param_value(value)
        return float(value) if self.float is not None else int(value)

    def choose_middle(self) -> Any:
        """Return the value in the middle of the range (of its logarithms), or the first choice."""
        if self.categorical is not None:
            return self.categorical[0]
        low, high = self.bounds_or_choices()
        middle = math.sqrt(low * high) if self.log else (low + high) / 2
        if self.step or self.int:
            step = self.step or 1
            middle = low + round((middle - low) // step) * step
        return int(middle) if self.int else float(middle)

    def from_optuna(self, suggested: Any) -> Any:
        """Convert a value from Optuna to the value of the setting.

        Args:
            suggested: Value that Optuna suggested for the distribution of `to_optuna`.

        Returns:
            The value; for choices that are not scalars, the choice that the string stands for.
        """
        if self.categorical is None:
            return suggested
        return next(c for c in self.categorical if _to_param_value(c) == suggested)


class Sampler(Spec):
    """How the params of new trials are proposed."""

    stored_keys: ClassVar[Mapping[str, str]] = {"n_startup_trials": "startup"}

    kind: Literal["tpe", "gp", "random", "grid", "nsga2"] = "tpe"
    """Optuna's sampler, or `grid` to try each combination of choices once. `gp` is a Gaussian
    process with a model of the noise of results."""
    seed: int = 0
    """Seed of the sampler."""
    n_startup_trials: Annotated[int, Field(ge=1)] = 8
    """Number of random trials before TPE or the Gaussian process models the results; population
    size of NSGA-II."""

    @property
    def max_earlier_results(self) -> int | None:
        """How many results of earlier sweeps the sampler is told at most; None for all.

        The cost of a proposal of the Gaussian process grows with the third power of their number.
        """
        return 500 if self.kind == "gp" else None

    @property
    def learns_after_startup(self) -> bool:
        """Whether the sampler draws at random until `n_startup_trials` trials have results, and
        models the results from then on.
        """
        return self.kind in ("tpe", "gp")

    @property
    def models_inactive_params(self) -> bool:
        """Whether the sampler needs a value of each searched setting, also of an inactive one."""
        return self.kind == "gp"

    def build_sampler(self, n_past_trials: int = 0) -> "optuna.samplers.BaseSampler":
        """Build Optuna's sampler.

        Args:
            n_past_trials: Trials before a restart; changes the seed, so that the sampler does not
                repeat their draws.

        Returns:
            The sampler. For a grid it is unused, because all points are queued.
        """
        from optuna.samplers import GPSampler, NSGAIISampler, RandomSampler, TPESampler

        seed = self.seed + n_past_trials
        if self.kind in ("random", "grid"):
            return RandomSampler(seed=seed)
        if self.kind == "nsga2":
            return NSGAIISampler(seed=seed, population_size=self.n_startup_trials)
        if self.kind == "gp":
            return GPSampler(
                seed=seed,
                n_startup_trials=self.n_startup_trials,
                independent_sampler=RandomSampler(seed=seed),
            )
        return TPESampler(seed=seed, n_startup_trials=self.n_startup_trials)


class Scheduler(Spec):
    """Early stopping of weak trials."""

    stored_keys: ClassVar[Mapping[str, str]] = {
        "grace_period": "grace",
        "reduction_factor": "factor",
    }

    kind: Literal["asha", "none"] = "asha"
    """`asha` (Li et al. 2020) compares trials at rungs: the epochs grace_period,
    grace_period * reduction_factor, and so on. `none` stops no trial."""
    grace_period: Annotated[int, Field(ge=1)] = 2
    """Epoch of the first rung. No trial is stopped before it."""
    reduction_factor: Annotated[int, Field(ge=2)] = 2
    """At each rung the best 1 / reduction_factor of the trials continue."""

    def rungs(self, max_epochs: int) -> list[int]:
        """Return the epochs below `max_epochs` at which trials are compared."""
        epochs: list[int] = []
        rung = self.grace_period
        while self.kind == "asha" and rung < max_epochs:
            epochs.append(rung)
            rung *= self.reduction_factor
        return epochs


class SearchSpace(Spec):
    """A sweep: which settings are searched, which are fixed, and how trials are compared."""

    stored_keys: ClassVar[Mapping[str, str]] = {"points_to_evaluate": "start"}
    later_fields: ClassVar[frozenset[str]] = frozenset(
        {
            *("dataset_defaults", "finalists", "base_runs", "disk_reserve_gib", "until", "repeat"),
            *("score_epochs", "margin_factor"),
        }
    )

    method: str | dict[str, Any]
    """Name of a method of the catalog, or a method written out."""
    metric: ObjectiveName | Annotated[tuple[ObjectiveName, ...], Field(min_length=2)] = (
        "robust_worst"
    )
    """Validation metric to maximise, or a list of several for a Pareto front. The first decides
    which epoch of a trial is its best."""
    score_epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Number of epochs that the score of a trial averages: the best mean of the metric over that
    many consecutive validated epochs after the burn-in, or over all while there are fewer. Trials
    are ranked by their scores, and the sampler is told the scores. The best epoch alone is partly
    best by luck; it remains the checkpoint of its trial, and ASHA compares single epochs. 1: the
    metric of the best epoch takes the place of the mean. null: 3 in a new sweep with one metric; 1
    with several, and in a sweep of an earlier version."""
    margin_factor: Annotated[Number, Field(ge=0, le=100)] = 0.0
    """Factor f of the margin in the score. The score is the best mean over `score_epochs` epochs,
    plus f times the `robust_margin` of the best epoch; at its rungs, ASHA compares `robust_worst`
    plus f times the `robust_margin` of that epoch. `robust_margin`, in [0, 1], is the margin of an
    image under the worst attack divided by its margin without an attack, averaged over the images;
    0 for an image that does not survive. It has less noise than an accuracy, and at a rung it helps
    to compare trials whose learning rates differ. 0: no margin. It has no effect with several
    metrics or with another metric than `robust_worst`."""
    max_masking_gap: Annotated[Number, Field(ge=0, le=1)] | None = None
    """Largest masking gap of a feasible trial: by how much PGD may overstate its robust accuracy.
    Infeasible trials are ranked last, and the sampler avoids them. null: no limit."""
    trials: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    """Number of trials. A grid has at most as many as it has points, and by default one for each
    point."""
    until: Literal["told-apart"] | None = None
    """`told-apart`: start no more trials once the answer is clear on the validation images: either
    the best trial is told apart from all others, of which there are at least seven; or the
    landscape is flat, that is, with 95% confidence the settings explain less than half of the
    spread of at least eight fully trained trials. Running trials are trained to their end. null:
    run all `trials`."""
    finalists: Annotated[int, Field(ge=0)] | None = None
    """Number of the best trials that full AutoAttack attacks on the validation images when all
    trials have ended. Then the score of each falls by as much as AutoAttack lowers the metric of
    its best epoch. With several metrics, any number above 0 stands for all trials on the Pareto
    front, which is then computed again from the results of AutoAttack. 0: none. null: 3 in a new
    sweep whose metric is an accuracy under attacks; none in a sweep of an earlier version."""
    base_runs: Annotated[int, Field(ge=0)] | None = None
    """Number of base runs: trainings of the method without its instance weights, such as `at` for
    `gairat`, each with another seed and all epochs. The best trial is compared with them; they are
    not ranked among the trials. 0: none. null: 2 in a new sweep of a method that has a base method;
    none in a sweep of an earlier version."""
    repeat: Annotated[int, Field(ge=0, le=8)] = 0
    """Largest number of seeds R for the best trials. When all trials have ended, the best 2^(R - 1)
    are trained again with a second seed, the better half of them with a third, and so on until R
    seeds, or until the best one is told apart from the others. Trials with more seeds rank above
    the others, by the mean over their seeds. 3 takes 4 + 2 trainings with all epochs. 0 or 1: no
    repeats."""
    share_prefixes: bool = True
    """Whether trials start from epochs that other trials have trained with equal settings."""
    prefix_gib: Annotated[Number, Field(ge=0)] = DEFAULT_PREFIX_GIB
    """Size in GiB of the states that trials share; above it the least recently used are deleted."""
    disk_reserve_gib: Annotated[Number, Field(ge=0)] = 0.25
    """Free space in GiB below which a sweep in a folder stops as at the end of a budget. When
    there is more, `--resume` continues the sweep."""
    sampler: Sampler = Field(default_factory=Sampler)
    """How the params of new trials are proposed."""
    scheduler: Scheduler = Field(default_factory=Scheduler)
    """Early stopping of weak trials."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Settings of all trials by dotted path."""
    space: Annotated[dict[str, Distribution], Field(min_length=1)]
    """Searched settings by dotted path, with their distributions. `*` in a path matches any
    characters, so that several settings get the same value."""
    points_to_evaluate: tuple[dict[str, Any], ...] = ()
    """Params to try first: each a mapping from searched settings to values."""
    dataset_defaults: dict[str, Any] | None = None
    """Defaults of the data set by dotted path, which raysweep stores for its sweeps, so that they
    stay what they were; there is no need to write them. null: those of 0.1."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the metrics that are maximised."""
        return (self.metric,) if isinstance(self.metric, str) else self.metric

    @property
    def n_trials(self) -> int:
        """Number of trials of the whole sweep; for a grid at most the number of its points."""
        if self.sampler.kind == "grid":
            return min(self.trials, len(self.initial_points))
        return self.trials

    def with_default_finalists(self) -> "SearchSpace":
        """Return this space for a new sweep, with a number of finalists."""
        if self.finalists is not None:
            return self
        has_robust_metric = any(map(is_robust_objective, self.objectives))
        return self.replace(finalists=DEFAULT_FINALISTS if has_robust_metric else 0)

    def with_default_base_runs(self) -> "SearchSpace":
        """Return this space for a new sweep, with base runs if the method has a base method."""
        if self.base_runs is not None or self._find_base_config() is None:
            return self
        return self.replace(base_runs=DEFAULT_BASE_RUNS)

    def with_default_score_epochs(self) -> "SearchSpace":
        """Return this space for a new sweep, with a number of epochs that a score averages."""
        if self.score_epochs is not None or len(self.objectives) > 1:
            return self
        return self.replace(score_epochs=DEFAULT_SCORE_EPOCHS)

    @property
    def has_score(self) -> bool:
        """Whether trials are ranked by a score: a mean over several epochs, or the margin is part
        of it. Otherwise they are ranked by the objective of their best epochs.
        """
        return (self.score_epochs or 1) > 1 or self.has_margin_in_score

    @property
    def has_margin_in_score(self) -> bool:
        """Whether the margin is part of the score, which then is no accuracy and may exceed 1."""
        return self._used_margin_factor > 0

    @property
    def score_name(self) -> str:
        """Name of what trials are ranked by: `score`, `score with margin`, or the objective."""
        if self.has_margin_in_score:
            return "score with margin"
        return "score" if self.has_score else self.objectives[0]

    @property
    def _used_margin_factor(self) -> float:
        """`margin_factor`; 0 with several metrics, or with a metric other than `robust_worst`."""
        return self.margin_factor if self.metric in TIE_BREAK_METRICS else 0.0

    def describe_score(self) -> str:
        """Describe what trials are ranked by, in words."""
        objective = self.objectives[0].replace("_", " ")
        if not self.has_score:
            return objective
        n_epochs = self.score_epochs or 1
        text = f"the best mean {objective} over {n_epochs} consecutive epochs"
        if n_epochs == 1:
            text = f"{objective} of the best epoch"
        if factor := self._used_margin_factor:
            text += f", plus {'' if factor == 1 else f'{factor:g} times '}"
            text += "its robust margin" if n_epochs == 1 else "the robust margin of the best epoch"
        return f"{self.score_name} ({text})"

    def describe_score_epochs(self, best_epoch: float) -> str:
        """Describe from which epochs the score of a training is.

        Args:
            best_epoch: Number of its best epoch.

        Returns:
            Such as `over 3 epochs` or `in epoch 7`.
        """
        n_epochs = self.score_epochs or 1
        return f"over {n_epochs} epochs" if n_epochs > 1 else f"in epoch {best_epoch:.0f}"

    @property
    def leaders_by_round(self) -> list[int]:
        """Number of trials that get a second seed, a third one, and so on, at most."""
        if self.n_trials < 2:
            return []
        return [min(2**n_halvings, self.n_trials) for n_halvings in range(self.repeat - 1, 0, -1)]

    def count_all_runs(self) -> int:
        """Return the number of trainings of the whole sweep: trials, base runs and, at most,
        repeats.
        """
        return self.n_trials + (self.base_runs or 0) + sum(self.leaders_by_round)

    def _find_base_config(self) -> TrainingConfig | None:
        """Return the base config with the base method; None if the method has none."""
        config = self.trial_config({})
        base_method = build_base_method(config.method)
        return None if base_method is None else config.replace(method=base_method)

    @property
    def base_method_name(self) -> str:
        """Name of the base method; "" for a sweep without base runs."""
        base_config = self._find_base_config() if self.base_runs else None
        return base_config.method.name if base_config else ""

    def list_base_params(self) -> list[Params]:
        """Return the params of each base run: its seed."""
        if not self.base_runs:
            return []
        first_seed = self.trial_config({}).seed
        return [{"seed": first_seed + number} for number in range(self.base_runs)]

    def base_run_config(self, params: Mapping[str, Any]) -> TrainingConfig:
        """Build the training config of a base run.

        Args:
            params: Its params, from `list_base_params`.

        Returns:
            The config of a trial without searched params, with the base method and another seed.

        Raises:
            SpecError: If the config is invalid, or the method has no base method.
        """
        base_config = self._find_base_config()
        if base_config is None:
            raise SpecError(self._describe_missing_base_method())
        return base_config.replace(seed=params["seed"])

    def _describe_missing_base_method(self) -> str:
        """Return the problem of a space that asks for runs of a base method that does not exist."""
        name, others = self.trial_config({}).method.name, ", ".join(BASE_METHODS)
        return (
            f"base_runs = {self.base_runs}: {name} has no base method; set it to 0 (methods that "
            f"have one: {others})"
        )

    def with_whole_grid(self) -> "SearchSpace":
        """Return this space with a trial for each point of its grid; itself if it is no grid."""
        n_points = len(self.initial_points)
        is_cut = self.sampler.kind == "grid" and n_points > self.trials
        return self.replace(trials=n_points) if is_cut else self

    def describe_cut_grid(self) -> str:
        """Return a line about a grid that has more points than trials; "" for other spaces."""
        n_points = len(self.initial_points)
        if self.sampler.kind != "grid" or n_points <= self.trials:
            return ""
        return f"trials = {self.trials}: {self.trials} of {n_points} points of the grid are tried"

    @property
    def initial_points(self) -> list[Params]:
        """Points to try before the sampler proposes any: `points_to_evaluate`, or the whole grid.

        Inactive params are dropped first, and then points that have become equal.
        """
        points: Iterable[Params] = self.points_to_evaluate
        if self.sampler.kind == "grid":
            choices = [distribution.categorical or () for distribution in self.space.values()]
            points = (
                dict(zip(self.space, values, strict=True)) for values in itertools.product(*choices)
            )
        active_points = map(self.drop_inactive, points)
        return list({json.dumps(point, default=str): point for point in active_points}.values())

    def optuna_params(
        self, params: Params, *, with_inactive: bool = False
    ) -> dict[str, ParamValue]:
        """Return the searched params in the form that Optuna stores.

        Args:
            params: Values by dotted path.
            with_inactive: Whether searched settings that `params` lacks are added, with the middle
                of their range.
        """
        if with_inactive:
            params = {
                path: params.get(path, distribution.choose_middle())
                for path, distribution in self.space.items()
            }
        return {
            path: self.space[path].to_optuna_value(value)
            for path, value in params.items()
            if path in self.space
        }

    def trial_config(self, params: Mapping[str, Any]) -> TrainingConfig:
        """Build the training config of a trial.

        Args:
            params: Values by dotted path; they replace those of `base`. Empty for the base config.

        Returns:
            The config, with all defaults filled in.

        Raises:
            SpecError: If the config is invalid.
        """
        layers = ({"validation.objective": self.objectives[0]}, self.base, params)
        if self.dataset_defaults is None:
            return build_training_config_of_0_1(self.method, *layers)
        return build_training_config(self.method, *layers, dataset_defaults=self.dataset_defaults)

    def with_dataset_defaults(self, *, former_objective: bool = False) -> "SearchSpace":
        """Return this space for a new sweep, with the defaults of its data set and objective.

        They are stored only if they make a difference to the rule of 0.1.

        Args:
            former_objective: Whether to leave the attacks of validation as they were in 0.1.

        Returns:
            The space, with `data.name` in `base` if only the folder was given.

        Raises:
            SpecError: If the base config is invalid.
        """
        base = name_dataset(self.base)
        defaults = find_dataset_defaults(self.method, base, former_objective=former_objective)
        named = self.replace(base=base) if base != self.base else self
        current = named.replace(dataset_defaults=defaults)
        current.trial_config({})
        with suppress(SpecError):
            if all(
                named.trial_config(params) == current.trial_config(params)
                for params in self._list_probe_params()
                # Points that set only the seed are skipped: no default depends on it.
                if params.keys() != {"seed"}
            ):
                return named
        return current

    def _list_probe_params(self) -> Iterator[Params]:
        """Yield no params, and each end of a range and each choice with a condition of its own."""
        yield {}
        for path, distribution in self.space.items():
            condition = {other: _as_list(values)[0] for other, values in distribution.when.items()}
            for value in distribution.bounds_or_choices():
                yield {**condition, path: value}

    def list_networks(self) -> list[ModelSpec]:
        """List the networks that trials may have."""
        networks = []
        for params in self._list_probe_params():
            # Ends of ranges may be invalid together with settings that are not searched now.
            with suppress(SpecError):
                networks.append(self.trial_config(params).model)
        return networks

    def find_selection_rule(self, params: Mapping[str, Any]) -> SelectionRule:
        """Return which epochs of a trial can be its best, and how its score is computed.

        Args:
            params: Values by dotted path. If they are invalid together, the rule allows all epochs:
                the trial fails when it starts.
        """
        try:
            return self.find_run_rule(self.trial_config(params))
        except SpecError:
            return self._add_score_settings(SelectionRule(self.objectives[0]))

    def find_run_rule(self, config: TrainingConfig) -> SelectionRule:
        """Return which epochs of a run can be its best, and how its score is computed.

        Args:
            config: Training config of a trial, base run or repeat.
        """
        return self._add_score_settings(SelectionRule.from_config(config))

    def _add_score_settings(self, rule: SelectionRule) -> SelectionRule:
        """Return the rule with the `score_epochs` and the `margin_factor` of this space."""
        return rule._replace(
            score_epochs=self.score_epochs or 1, margin_factor=self._used_margin_factor
        )

    def with_absolute_paths(self) -> "SearchSpace":
        """Return this space with absolute paths of the data, because trials run elsewhere."""
        data = self.trial_config({}).data.to_json_dict()
        paths = {
            f"data.{key}": data[key] for key in ("data_dir", "unlabeled") if data[key] is not None
        }
        return self.replace(base={**self.base, **paths}) if paths else self

    def with_sweep_settings(self, settings: Mapping[str, Any]) -> "SearchSpace":
        """Return this space with other settings of the sweep itself.

        Args:
            settings: Values by path, as from `split_sweep_settings`.

        Raises:
            SpecError: If a name or a value is not allowed.
        """
        data = self.to_json_dict()
        for path, value in settings.items():
            name, _, rest = path.partition(".")
            data[name] = {**data[name], rest: value} if rest else value
        return SearchSpace.from_data(data)

    def with_overrides(self, overrides: Mapping[str, Any]) -> "SearchSpace":
        """Return this space with some settings fixed.

        A searched setting that is fixed is no longer searched, also if a path with `*` or a mapping
        for the part around it fixes it, or replaces the part by one without the setting. A setting
        whose condition depends on it is searched if the fixed value satisfies the condition.

        Args:
            overrides: Values by dotted path.

        Returns:
            The new space; `points_to_evaluate` loses the fixed settings.

        Raises:
            SpecError: If an override fixes only a part of a searched `*` path or of searched
                mappings, or if nothing is left to search.
        """
        fixed_values = self._find_fixed_values(overrides)
        space: JsonDict = {}
        for path, distribution in self.space.items():
            # A setting whose own condition never holds is not searched and meets no condition.
            can_hold = all(
                fixed_values[other] in _as_list(values)
                if other in fixed_values
                else other in space or other not in self.space
                for other, values in distribution.when.items()
            )
            if path not in fixed_values and can_hold:
                when = {
                    other: values
                    for other, values in distribution.when.items()
                    if other not in fixed_values
                }
                space[path] = distribution.to_json_dict() | {"when": when}
        if not space:
            raise SpecError(
                "nothing is left to search: every searched setting is fixed by --set; "
                "use `raysweep train`"
            )
        removed = (set(self.space) - set(space)) | set(overrides)
        points = [
            {path: value for path, value in point.items() if path not in removed}
            for point in self.points_to_evaluate
        ]
        changes = {
            "base": merge_overrides(self.base, overrides),
            "space": space,
            "points_to_evaluate": [point for point in points if point],
        }
        return SearchSpace.from_data(self.to_json_dict() | changes)

    def _find_fixed_values(self, overrides: Mapping[str, Any]) -> Params:
        """Return the searched settings that overrides fix, with their values.

        Raises:
            SpecError: If an override fixes only a part of a searched `*` path or of searched
                mappings.
        """
        fixed_values: Params = {}
        for path in self.space:
            # Of several overrides, apply_overrides uses the most specific one.
            for pattern, value in sorted(overrides.items(), key=lambda item: "*" not in item[0]):
                if pattern == path or ("*" in pattern and fnmatchcase(path, pattern)):
                    fixed_values[path] = value
                elif covers_path(pattern, path):
                    try:
                        fixed_values[path] = _find_in_part(pattern, value, path)
                    except KeyError:
                        if self._loses_setting(path, overrides):
                            # Settings whose condition depends on it are not searched either.
                            fixed_values[path] = _NO_VALUE
                elif "*" in path:
                    self._require_no_overlap(path, pattern)
                elif _reaches_into(pattern, path, self.space[path].categorical or ()):
                    raise _part_of_searched_setting(pattern, path)
        return fixed_values

    def _loses_setting(self, path: str, overrides: Mapping[str, Any]) -> bool:
        """Return whether overrides replace the part with a setting by a part without it."""
        try:
            config = self.replace(base=merge_overrides(self.base, overrides)).trial_config({})
        except SpecError:
            return False  # The overrides are refused for their own reason.
        return not any(fnmatchcase(other, path) for other in list_paths(config.to_json_dict()))

    def _require_no_overlap(self, path: str, override: str) -> None:
        """Raise SpecError if an override fixes one of the settings that a `*` path searches."""
        if "*" in override:
            data = self.trial_config({}).to_json_dict()
            is_part = bool({*match_paths(path, data)} & {*match_paths(override, data)})
        else:
            is_part = fnmatchcase(override, path)
        if is_part:
            raise _part_of_searched_setting(override, path)

    def suggest_params(self, optuna_trial: "optuna.Trial") -> Params:
        """Let Optuna suggest a value of each active setting, in the order of `space`.

        Args:
            optuna_trial: Trial that Optuna's study has just created. If the sampler models inactive
                settings, it suggests values of these, too.

        Returns:
            Values by dotted path, without the settings whose condition does not hold.
        """
        params: Params = {}
        for path, distribution in self.space.items():
            is_active = distribution.is_active(params)
            if is_active or self.sampler.models_inactive_params:
                suggested = _suggest_value(optuna_trial, path, distribution.to_optuna())
                if is_active:
                    params[path] = distribution.from_optuna(suggested)
        return params

    def has_all_active(self, params: Params) -> bool:
        """Return whether params have a value of each setting that is active with them."""
        return all(
            path in params
            for path, distribution in self.space.items()
            if distribution.is_active(params)
        )

    def find_problems(self) -> list[str]:
        """Check settings, ranges, conditions and points to evaluate.

        Each end of a range, each choice and each point is validated as a setting of a trial.

        Returns:
            One line for each problem.
        """
        try:
            config = self.trial_config({})
        except SpecError as error:
            return error.problems
        lines = [
            *self._find_objective_problems(config),
            *self.find_finalist_problems(),
            *self.find_base_run_problems(),
            *self.find_until_problems(),
            *self.find_repeat_problems(),
            *self.find_score_problems(),
            *self._find_scheduler_problems(config),
            *self._find_distribution_problems(config.validation.threat),
            *self._find_point_problems(config.validation.threat),
        ]
        if threat_problem := config.validation.find_threat_problem():
            lines.insert(0, threat_problem)
        return list(dict.fromkeys(lines))

    def _find_objective_problems(self, config: TrainingConfig) -> Iterator[str]:
        """Yield a line if trials would select their best epoch by another metric than the sweep."""
        objective, metric = config.validation.objective, self.objectives[0]
        if objective != metric:
            yield (
                f"validation.objective = {objective!r}: the space maximises metric = {metric!r}; "
                "change that instead"
            )

    def find_finalist_problems(self) -> Iterator[str]:
        """Yield a line if AutoAttack cannot decide between the best trials."""
        if not self.finalists:
            return
        if not any(map(is_robust_objective, self.objectives)):
            yield (
                f"finalists = {self.finalists}: AutoAttack cannot decide between trials that are "
                f"compared by metric = {self.metric!r}; set it to 0"
            )
        elif self.trial_config({}).validation.find_threat_model() is None:
            yield (
                f"finalists = {self.finalists}: no attack of the validation has a radius, which "
                "AutoAttack needs; set it to 0"
            )

    def find_until_problems(self) -> Iterator[str]:
        """Yield a line if there is no best trial to tell from the others."""
        if self.until is not None and len(self.objectives) > 1:
            yield (
                f"until = {self.until!r}: with several metrics there is no best trial to tell from "
                "the others; set it to null, or give one metric"
            )

    def find_score_problems(self) -> Iterator[str]:
        """Yield a line if the score is a mean over epochs in a sweep with several metrics."""
        if len(self.objectives) > 1 and (self.score_epochs or 1) > 1:
            yield (
                f"score_epochs = {self.score_epochs}: with several metrics, each point of the "
                "Pareto front is one epoch; set it to 1, or give one metric"
            )

    def find_repeat_problems(self) -> Iterator[str]:
        """Yield a line if `repeat` is set with several metrics, or where `seed` is searched."""
        if self.repeat < 2:
            return
        if len(self.objectives) > 1:
            yield (
                f"repeat = {self.repeat}: with several metrics there is no best trial to repeat; "
                "set it to 0, or give one metric"
            )
        if "seed" in self.space:
            yield (
                f"repeat = {self.repeat}: the space searches seed, which repeats choose; set it to "
                "0, or fix seed"
            )

    def find_base_run_problems(self) -> Iterator[str]:
        """Yield a line if there is no base method to run."""
        if self.base_runs and self._find_base_config() is None:
            yield self._describe_missing_base_method()

    def _find_scheduler_problems(self, config: TrainingConfig) -> Iterator[str]:
        """Yield a line if ASHA cannot compare the trials."""
        every = config.validation.every
        rungs = self.scheduler.rungs(config.epochs)
        unmeasured = [rung for rung in rungs if not config.is_validated(rung - 1)]
        if unmeasured:
            yield (
                f"scheduler: trials cannot be compared at epoch {unmeasured[0]}, "
                f"because validation.every = {every} skips it; "
                f"make grace_period a multiple of {every}"
            )
        if len(self.objectives) > 1 and self.scheduler.kind != "none":
            yield ("scheduler.kind = 'asha': cannot rank trials by several metrics; set it to none")

    def _find_distribution_problems(self, threat: str) -> Iterator[str]:
        """Yield a line for each invalid condition, range or choice.

        `threat` is that of the trial without any of them.
        """
        earlier_paths: list[str] = []
        for path, distribution in self.space.items():
            location = f"space.{path}"
            for other in distribution.when:
                if other not in earlier_paths:
                    yield f"{location}.when: {other!r} is not a searched setting before it"
            yield from self._find_impossible_conditions(location, distribution)
            if problem := distribution.find_sampling_problem():
                yield f"{location}: {problem}"
                earlier_paths.append(path)
                continue
            if self.sampler.kind == "grid" and distribution.categorical is None:
                yield f"{location}: a grid needs `categorical: [...]`"
            condition = {other: _as_list(values)[0] for other, values in distribution.when.items()}
            for value in distribution.bounds_or_choices():
                yield from self._find_invalid_params({**condition, path: value}, location, threat)
            for other in self.base:
                if other != path and not condition and covers_path(path, other):
                    yield f"base.{other}: it has no effect: the space searches {path}"
            if self._is_overridden(condition, path, distribution.bounds_or_choices()):
                yield f"{location}: it has no effect: `base` sets it to a fixed value"
            earlier_paths.append(path)

    def _find_impossible_conditions(
        self, location: str, distribution: Distribution
    ) -> Iterator[str]:
        """Yield a line for each condition on a value that the other setting never has."""
        for other, values in distribution.when.items():
            if other not in self.space:
                continue
            for value in _as_list(values):
                if not self.space[other].can_propose(value):
                    limits = self.space[other].bounds_or_choices()
                    yield (
                        f"{location}.when.{other} = {_format_choice(value)}: never happens, the "
                        f"searched values are {limits}"
                    )

    def _is_overridden(self, condition: Params, path: str, values: list[Any]) -> bool:
        """Return whether a searched setting makes no difference, because `base` fixes it."""
        if values[0] == values[-1]:
            return False
        try:
            first, last = (
                self.trial_config({**condition, path: value}) for value in (values[0], values[-1])
            )
        except SpecError:
            return False
        return first == last

    def _find_point_problems(self, threat: str) -> Iterator[str]:
        """Yield a line for each value of `points_to_evaluate` that cannot be tried."""
        for position, point in enumerate(self.points_to_evaluate):
            for path, value in point.items():
                location = f"points_to_evaluate.{position}.{path}"
                if path not in self.space:
                    paths = list(self.space)
                    yield f"{location}: {describe_unknown_name('searched setting', path, paths)}"
                elif not self.space[path].can_propose(value):
                    limits = self.space[path].bounds_or_choices()
                    yield f"{location} = {value!r}: outside the searched {limits}"
                else:
                    yield from self._find_invalid_params({path: value}, location, threat)

    def _find_invalid_params(self, params: Params, location: str, threat: str) -> list[str]:
        """Return the problems of a trial with these params, each after `location`.

        Trials whose validation has another threat model than `threat` cannot be ranked.
        """
        try:
            validation = self.trial_config(params).validation
        except SpecError as error:
            return [f"{location}: {line}" for line in error.problems]
        if problem := validation.find_threat_problem():
            return [f"{location}: {problem}"]
        if validation.threat == threat:
            return []
        return [
            f"{location}: trials that are validated at {validation.threat} and at {threat} cannot "
            "be ranked; set 'validation.*.eps' in base"
        ]

    def drop_inactive(self, point: Params) -> Params:
        """Return a point without the params whose conditions do not hold."""
        active: Params = {}
        for path, distribution in self.space.items():
            # A point need not have all params: conditions on those that it lacks are ignored.
            conditions = {
                other: values for other, values in distribution.when.items() if other in point
            }
            if path in point and all(
                other in active and active[other] in _as_list(values)
                for other, values in conditions.items()
            ):
                active[path] = point[path]
        return active


def split_sweep_settings(
    overrides: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide overrides into those of the sweep and those of the training.

    Args:
        overrides: Values by dotted path (`--set`).

    Returns:
        Settings of the sweep, such as `finalists` or `scheduler.kind`; and all others.
    """
    of_sweep = {
        path: value for path, value in overrides.items() if path.partition(".")[0] in _SWEEP_NAMES
    }
    return of_sweep, {path: value for path, value in overrides.items() if path not in of_sweep}


def load_space(
    name: str, overrides: Mapping[str, Any], space_path: Path | None = None
) -> SearchSpace:
    """Load a search space and fix some of its settings.

    Args:
        name: Name of a built-in space. With a file: the method that it must search, or empty.
        overrides: Values to fix, by dotted path (`--set`): of the training, or of the sweep, such
            as `finalists`.
        space_path: YAML file to read instead of a built-in space.

    Returns:
        The search space, checked by `SearchSpace.find_problems`.

    Raises:
        SpecError: All problems at once.
    """
    is_user_file = space_path is not None
    if space_path is None:
        space_path = find_builtin_folder("search_spaces") / f"{name}.yaml"
        if not space_path.is_file():
            raise SpecError(describe_unknown_name("search space", name, list_builtin_spaces()))
    sweep_settings, overrides = split_sweep_settings(overrides)
    content = read_yaml(space_path)
    with content.name_lines_in_errors(overrides):
        space = _build_space(content, overrides)
        method_name = _method_name(space)
        if is_user_file and name and method_name != name:
            raise SpecError(f"{space_path} is a space for method {method_name!r}, not for {name!r}")
        space = space.with_overrides(overrides).with_sweep_settings(sweep_settings)
        space = space.with_default_finalists().with_default_score_epochs()
        try:
            space = space.with_dataset_defaults().with_default_base_runs()
            problems = space.find_problems()
        except SpecError as error:
            problems = error.problems
        if problems and not overrides:
            problems = [f"{space_path}: {line}" for line in problems]
        if problems:
            raise SpecError(problems)
    return space


def read_space_settings(space_path: Path, overrides: Mapping[str, Any]) -> JsonDict:
    """Read what a file of a search space itself sets, with its section for a data set.

    Args:
        space_path: The YAML file.
        overrides: Values by dotted path, which may name another data set than the file's.

    Returns:
        Its content; sections for other data sets are left out.

    Raises:
        SpecError: If the file is malformed.
    """
    return _merge_dataset_section(dict(read_yaml(space_path)), overrides, str(space_path))


def _build_space(content: SettingsFile, overrides: Mapping[str, Any]) -> SearchSpace:
    """Validate the content of a file, with its section for the data set of the overrides."""
    data = _merge_dataset_section(dict(content), overrides, str(content.path))
    try:
        space = SearchSpace.from_data(data, str(content.path))
    except SpecError as error:
        problems = [*error.problems, *_find_remaining_problems(data, content.path)]
        raise SpecError(list(dict.fromkeys(problems))) from error
    return space if "trials" in data else space.with_whole_grid()


def resolve_space_path(path_or_name: Path) -> Path:
    """Find the file of a search space.

    Args:
        path_or_name: Value of `--space`: a path, or the name of a built-in space.

    Returns:
        The path; a file that exists takes precedence over a built-in space of the same name.
    """
    if path_or_name.exists() or str(path_or_name) not in list_builtin_spaces():
        return path_or_name
    return find_builtin_folder("search_spaces") / f"{path_or_name}.yaml"


def list_builtin_spaces() -> list[str]:
    """Return the names of the search spaces that ship with raysweep."""
    return sorted(path.stem for path in find_builtin_folder("search_spaces").glob("*.yaml"))


def param_labels(paths: list[str]) -> dict[str, str]:
    """Choose a short label of each dotted path that is unique among them.

    Args:
        paths: Dotted paths of params.

    Returns:
        Labels by path, for example `alpha`; `pgd.alpha` where there are two of them; `lr.values`
        because `values` alone is ambiguous.
    """
    omitted_parts = {"method", "terms", "attacks", "weight", "optim"}
    parts_by_path = {
        path: [part for part in path.split(".") if part not in omitted_parts] or [path]
        for path in paths
    }
    labels = {}
    for path, parts in parts_by_path.items():
        min_length = min(1 + (parts[-1] in _AMBIGUOUS_NAMES), len(parts))
        labels[path] = path
        for length in range(min_length, len(parts) + 1):
            suffixes = [other_parts[-length:] for other_parts in parts_by_path.values()]
            if suffixes.count(parts[-length:]) == 1:
                labels[path] = ".".join(parts[-length:])
                break
    return labels


# Value of a setting that a config does not have.
_NO_VALUE = object()
# Settings of a sweep that `--set` may change; `trials` has its own option.
_SWEEP_NAMES = frozenset(
    {
        *("metric", "max_masking_gap", "finalists", "share_prefixes", "prefix_gib"),
        *("base_runs", "until", "repeat", "disk_reserve_gib", "sampler", "scheduler"),
        *("score_epochs", "margin_factor"),
    }
)
_SPACE_PARTS: Mapping[str, type[Spec]] = {"sampler": Sampler, "scheduler": Scheduler}


def rename_space_keys(data: JsonDict, source: str | None) -> JsonDict:
    """Replace the keys of raysweep 0.1 in a search space that is not validated yet.

    Args:
        data: The search space as plain data.
        source: Where a user has written it, for the warnings; None for no warnings.

    Returns:
        The search space with present names.

    Raises:
        SpecError: A setting is there under both names.
    """
    data = SearchSpace.rename_stored_keys(data, source)
    for key, part in _SPACE_PARTS.items():
        if isinstance(data.get(key), dict):
            data[key] = part.rename_stored_keys(data[key], source)
    return data


def restore_space_keys(data: JsonDict) -> JsonDict:
    """Undo `rename_space_keys`, for files and digests.

    Args:
        data: A search space as plain data with present names.

    Returns:
        The search space with the keys of raysweep 0.1.
    """
    data = _rename_to_stored_keys(SearchSpace, data)
    for key, part in _SPACE_PARTS.items():
        if isinstance(data.get(key), dict):
            data[key] = _rename_to_stored_keys(part, data[key])
    return data


def _rename_to_stored_keys(spec_type: type[Spec], data: JsonDict) -> JsonDict:
    """Replace the field names of a spec by its stored keys."""
    return {spec_type.stored_keys.get(name, name): value for name, value in data.items()}


def _merge_dataset_section(data: JsonDict, overrides: Mapping[str, Any], source: str) -> JsonDict:
    """Merge the section `for.DATASET` of a file into its general settings.

    An example is `for: {cifar10: {space: ..., trials: ...}}`, which applies to CIFAR-10 only.
    `space` and `base` are merged entry by entry; every other key replaces the general one.
    """
    data = _rename_stored_keys_of_file(data, source)
    sections = _require_mapping(data.pop("for", None), f"{source}: for")
    base = _require_mapping(data.get("base"), f"{source}: base")
    section_name = _choose_dataset_section(sections, merge_overrides(base, overrides))
    location = f"{source}: for.{section_name}"
    section = _require_mapping(sections.get(section_name), location)
    for key, value in _rename_stored_keys_of_file(section, source).items():
        if key in ("space", "base"):
            general = _require_mapping(data.get(key), f"{source}: {key}")
            data[key] = merge_overrides(general, _require_mapping(value, f"{location}.{key}"))
        else:
            data[key] = value
    return data


def _choose_dataset_section(sections: JsonDict, settings: Mapping[str, Any]) -> str:
    """Return the name of the section for the data set; small sets of arrays may have their own."""
    settings = name_dataset(settings)
    part = settings.get("data")
    if isinstance(part, Mapping):
        settings = merge_overrides({f"data.{key}": value for key, value in part.items()}, settings)
    name = str(settings.get("data.name") or DataSpec().name)
    if name == "arrays" and "small_arrays" in sections:
        return "small_arrays" if is_small_array_set(settings.get("data.data_dir")) else name
    return name


def _require_mapping(value: Any, location: str) -> JsonDict:
    """Return `value`, or an empty mapping for null. Raises SpecError for other types."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SpecError(f"{location} = {value!r}: must be a mapping of settings")
    return value


def _rename_stored_keys_of_file(data: JsonDict, source: str) -> JsonDict:
    """Replace the keys of raysweep 0.1; errors name the file."""
    try:
        return SearchSpace.rename_stored_keys(data, source)
    except SpecError as error:
        raise error.with_prefix(f"{source}: ") from error


def _find_remaining_problems(data: JsonDict, space_path: Path) -> list[str]:
    """Find more problems in a file that is invalid: check its valid distributions."""
    entries = data.get("space")
    if not isinstance(entries, dict):
        return []
    valid_entries: JsonDict = {}
    for path, entry in entries.items():
        with suppress(SpecError):
            valid_entries[path] = Distribution.from_data(entry)
    reduced = {key: data[key] for key in ("method", "base") if key in data}
    try:
        problems = SearchSpace.from_data({**reduced, "space": valid_entries}).find_problems()
    except SpecError:
        return []
    return [f"{space_path}: {line}" for line in problems]


def _method_name(space: SearchSpace) -> Any:
    """Return the name of the space's method; one that is written out may lack a name."""
    if isinstance(space.method, str):
        return space.method
    return space.method.get("name", Method.model_fields["name"].default)


def _find_in_part(part_path: str, part: Any, path: str) -> Any:
    """Return the value at a path inside of a part; KeyError if the part does not set it."""
    if "*" in part_path:
        raise KeyError(path)
    value = part
    for key in path[len(part_path) + 1 :].split("."):
        if not isinstance(value, Mapping):
            raise KeyError(path)
        value = value[key]
    return value


def _reaches_into(override: str, path: str, choices: Iterable[Any]) -> bool:
    """Return whether an override sets a part of a searched setting whose choices are mappings."""
    if override.startswith(f"{path}."):
        return True
    written = (list_leaf_paths({path: choice}) for choice in choices)
    return any(fnmatchcase(leaf, override) for leaves in written for leaf in leaves)


def _part_of_searched_setting(override: str, path: str) -> SpecError:
    """Return the error of an override that fixes a part of a searched setting."""
    return SpecError(
        f"--set {override}: a part of the searched {path}; set {path}, or write a --space that "
        "does not search it"
    )


def _format_choice(choice: Any) -> str:
    """Format a choice as in YAML: text without quotes."""
    return choice if isinstance(choice, str) else json.dumps(choice)


def _as_list(value: Any) -> list[Any]:
    """Return a list as it is, and any other value as a list of one."""
    return value if isinstance(value, list) else [value]


def _to_param_value(choice: Any) -> ParamValue:
    """Return a value that Optuna can store: choices that are not scalars become strings."""
    return choice if isinstance(choice, str | int | float | bool) or choice is None else str(choice)


def _suggest_value(
    optuna_trial: "optuna.Trial", path: str, distribution: "BaseDistribution"
) -> Any:
    """Let Optuna suggest a value from one of its distributions."""
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
