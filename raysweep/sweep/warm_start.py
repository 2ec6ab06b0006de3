"""Warm start: what a new sweep takes from earlier sweeps, results for its sampler and settings to
try first.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from raysweep.formatting import format_count
from raysweep.spec import SpecError, list_values
from raysweep.stored_data import (
    Metrics,
    check_stored_types,
    make_damaged_file_error,
    require_stored_types,
)
from raysweep.stores import StoredFileNotFound, StorePath
from raysweep.sweep.ledger import WARM_START_FILE, Ledger
from raysweep.sweep.search_space import Params, SearchSpace
from raysweep.sweep.trial import Trial
from raysweep.training.config import TrainingConfig
from raysweep.training.selection import get_tie_break

N_POINTS_OF_OTHER_DATA = 3
"""How many of the best settings are tried first if no result of a sweep is comparable, for example
because its data are others."""


@dataclass(frozen=True)
class EarlierResult:
    """A result of an earlier sweep that the sampler of a new one is told.

    Attributes:
        sweep: Name of the earlier sweep.
        number: Number of the trial.
        params: Values of the new sweep's searched settings by dotted path.
        best: Metrics of the trial's best epoch, with its scores in place of the objectives.
    """

    sweep: str
    number: int
    params: Params
    best: Metrics

    def is_possible_in(self, space: SearchSpace) -> bool:
        """Return whether a trial of this space could have the result.

        Args:
            space: Search space of the new sweep. Its ranges may have changed since it began.
        """
        needed = {*space.objectives, *(() if space.max_masking_gap is None else ("masking_gap",))}
        return needed <= self.best.keys() and all(
            path in space.space and space.space[path].can_propose(value)
            for path, value in self.params.items()
        )

    def to_trial(self) -> Trial:
        """Return the result as a finished trial of the new sweep."""
        return Trial(self.number, self.params, "finished", best=self.best, latest=self.best)


@dataclass(frozen=True)
class WarmStart:
    """What a new sweep takes from earlier ones.

    Attributes:
        results: Results that the sampler is told: trials on the same data that differ from those of
            the new sweep only in searched settings and the seed.
        points: Params that are tried first: of each sweep with such results the best one, by the
            scores of the new sweep if these are others; of any other sweep the best
            `N_POINTS_OF_OTHER_DATA`.
    """

    results: tuple[EarlierResult, ...] = ()
    points: tuple[Params, ...] = ()

    def select_results(self, space: SearchSpace) -> list[EarlierResult]:
        """Return the results that the sampler of a sweep is told.

        Args:
            space: Search space of the sweep.

        Returns:
            Those that are possible in the space. If they are more than the sampler can take
            (`Sampler.max_earlier_results`), the better half of that number are the best, and the
            others are spread evenly over the ranks of the rest: a model of the best
            results alone knows nothing about the bad regions.
        """
        results = [result for result in self.results if result.is_possible_in(space)]
        limit = space.sampler.max_earlier_results
        if limit is None or len(results) <= limit:
            return results
        metric = space.objectives[0]
        ranked = sorted(results, key=lambda result: result.best[metric], reverse=True)
        n_best, n_spread = limit - limit // 2, limit // 2
        rest = ranked[n_best:]
        spread = [rest[index * len(rest) // n_spread] for index in range(n_spread)]
        return [*ranked[:n_best], *spread]

    def add_points(self, space: SearchSpace) -> SearchSpace:
        """Return a search space that tries `points` before its own, as far as they lie in it."""
        possible_points = [
            point
            for point in self.points
            if all(
                path in space.space and space.space[path].can_propose(value)
                for path, value in point.items()
            )
        ]
        points = [*possible_points, *space.points_to_evaluate]
        unique_points = {repr(sorted(point.items())): point for point in points}
        return space.replace(points_to_evaluate=tuple(unique_points.values()))

    def describe(self) -> str:
        """Return one line about what is taken."""
        return (
            f"warm start: the sampler is told {format_count(len(self.results), 'earlier result')}, "
            f"and {format_count(len(self.points), 'point')} of earlier sweeps "
            f"{'is' if len(self.points) == 1 else 'are'} tried first"
        )


def collect_warm_start(
    space: SearchSpace, fingerprint: str, ledgers: Iterable[Ledger]
) -> WarmStart:
    """Collect what a new sweep takes from earlier ones.

    Args:
        space: Search space of the new sweep.
        fingerprint: Fingerprint of its data.
        ledgers: The earlier sweeps.

    Returns:
        The results and the points.

    Raises:
        SpecError: A sweep has no trial whose settings the new space contains, or the new space is a
            grid. One line.
    """
    if space.sampler.kind == "grid":
        raise SpecError("--warm-start: a grid tries its points whatever earlier sweeps found")
    results: list[EarlierResult] = []
    points: list[Params] = []
    for ledger in {ledger.key: ledger for ledger in ledgers}.values():
        trials = [trial for trial in ledger.rank_trials() if ledger.rank_trial(trial).is_eligible]
        pairs = [(trial, _adopt_params(space, ledger, trial)) for trial in trials]
        usable = [(trial, params) for trial, params in pairs if params]
        if not usable:
            raise SpecError(
                f"--warm-start {ledger.name}: it has no result with settings of this search space"
            )
        comparable = [pair for pair in usable if _is_comparable(space, pair[1], ledger, pair[0])]
        if comparable and ledger.find_data_fingerprint() != fingerprint:
            comparable = []
        results += [
            EarlierResult(ledger.name, trial.number, params, _rescore_metrics(space, params, trial))
            for trial, params in comparable
            # What an interrupted trial would have come to is not known.
            if trial.state != "running" and _has_margin(space, params, trial)
        ]
        if not _has_same_scores(space, ledger.space):
            # The earlier sweep's best trial need not be the best by the scores of the new one.
            comparable.sort(key=lambda pair: -_rescore(space, pair[1], pair[0])[0])
        points += [params for _, params in comparable[:1] or usable[:N_POINTS_OF_OTHER_DATA]]
    return WarmStart(tuple(results), tuple(points))


def _has_margin(space: SearchSpace, params: Params, trial: Trial) -> bool:
    """Return whether a trial has the margin that is part of a score of this space, if it is; trials
    of early versions have none, so their scores would be on another scale.
    """
    rule = space.find_selection_rule(params)
    margins = [get_tie_break(run.best, rule.objective) for run in trial.trainings]
    return not rule.margin_factor or min(margins) > -math.inf


def _rescore_metrics(space: SearchSpace, params: Params, trial: Trial) -> Metrics:
    """Return the metrics of a trial's best epoch, with the scores that this space gives it in place
    of its objectives.
    """
    scores = _rescore(space, params, trial)
    return {**trial.best, **dict(zip(space.objectives, scores, strict=True))}


def _rescore(space: SearchSpace, params: Params, trial: Trial) -> list[float]:
    """Return the scores that a space gives a trial of another sweep, one for each objective."""
    rescored = trial.with_score(space.find_selection_rule(params))
    return [rescored.score(name) for name in space.objectives]


def _has_same_scores(space: SearchSpace, other: SearchSpace) -> bool:
    """Return whether two spaces with the same objectives give a trial the same scores."""
    rules = [one.find_selection_rule({}) for one in (space, other)]
    return len({(rule.score_epochs, rule.margin_factor) for rule in rules}) == 1


def save_warm_start(warm_start: WarmStart, sweep_path: StorePath) -> None:
    """Write a warm start into a sweep's folder, so that `--resume` needs no earlier sweep.

    Args:
        warm_start: What the sweep takes from earlier ones.
        sweep_path: Folder of the sweep.
    """
    content = {
        "results": [asdict(result) for result in warm_start.results],
        "points": list(warm_start.points),
    }
    (sweep_path / WARM_START_FILE).write_json(content, indent=1)


def load_warm_start(sweep_path: StorePath) -> WarmStart:
    """Read what `save_warm_start` wrote.

    Returns:
        The warm start; an empty one for a sweep without.

    Raises:
        DamagedFileError: The file is damaged.
    """
    file = sweep_path / WARM_START_FILE
    try:
        content = file.read_json({"results": list[dict[str, Any]]})
    except StoredFileNotFound:
        return WarmStart()
    check_stored_types(content, {"points": list[dict[str, Any]]}, str(file))
    rows = content["results"]
    types = {"sweep": str, "number": int, "params": dict[str, Any], "best": Metrics}
    for row in rows:
        require_stored_types(row, types, str(file))
        if unknown_keys := sorted(row.keys() - types.keys()):
            raise make_damaged_file_error(str(file), f"unknown keys {unknown_keys}")
    results = tuple(EarlierResult(**row) for row in rows)
    return WarmStart(results, tuple(content.get("points", ())))


def _adopt_params(space: SearchSpace, ledger: Ledger, trial: Trial) -> Params:
    """Return the values that a trial has for the settings of a space, without those out of range.

    Settings that were fixed in the earlier sweep have their fixed value. Without any value,
    or if a trial of the space with them is not valid, the params are empty.
    """
    # The earlier sweep may be of a network that this call does not know.
    config = _find_config(ledger.space, trial.params)
    settings = {} if config is None else config.to_json_dict()
    params: Params = {}
    for path, distribution in space.space.items():
        # A path with `*` names several settings, which need one value.
        values = [trial.params[path]] if path in trial.params else list_values(path, settings)
        is_one_value = bool(values) and values.count(values[0]) == len(values)
        if is_one_value and distribution.can_propose(values[0]):
            params[path] = values[0]
    params = space.drop_inactive(params)
    return {} if _find_config(space, params) is None else params


def _find_config(space: SearchSpace, params: Params) -> TrainingConfig | None:
    """Return the config of a trial of a space; None if its settings are not valid."""
    try:
        return space.trial_config(params)
    except SpecError:
        return None


def _is_comparable(space: SearchSpace, params: Params, ledger: Ledger, trial: Trial) -> bool:
    """Return whether a trial of the new sweep with these params differs at most in its seed."""
    config, earlier_config = _find_config(space, params), _find_config(ledger.space, trial.params)
    return (
        config is not None
        and earlier_config is not None
        and space.objectives == ledger.space.objectives
        # The sampler must know where the trial lies, also in settings that have the base's value.
        and space.has_all_active(params)
        and _without_seed(config) == _without_seed(earlier_config)
    )


def _without_seed(config: TrainingConfig) -> TrainingConfig:
    """Return a config with seed 0 and without the location of its data."""
    data = config.data.replace(data_dir=None, download=False)
    return config.replace(seed=0, data=data)
