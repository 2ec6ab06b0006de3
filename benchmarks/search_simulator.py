"""Sweeps replayed on recorded curves, for `search_quality.py` and `search_other_tuners.py`.

A simulated sweep proposes settings, trains the nearest recorded one that it has not tried, stops or
pauses trials as its scheduler says, and chooses the trial with the best score so far, as a real
sweep does. Its choice is evaluated on the test images, by the mean over the seeds of the setting:
the sweep has seen neither. Costs are epochs that a sweep trains itself; epochs within a
common burn-in are shared. Two trials run at once.

Gain: 0 is the mean of all recorded settings, which is what a single random trial finds, and 1 is
the best of them.
"""

import heapq
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
from measure import describe_mean

from raysweep.sweep.search_space import Params, Sampler, SearchSpace, load_space
from raysweep.training.selection import SelectionRule, average_epochs

CONCURRENCY = 2
LEARNING_RATES = "optim.lr.values"


@dataclass
class Table:
    """Recorded curves of one space.

    Attributes:
        space: The search space.
        params: The settings.
        objective: robust_worst on validation images after each epoch, (settings, seeds, epochs).
        margin: Mean margin on the same examples, (settings, seeds, epochs).
        test: Accuracy of the best checkpoint on test images, (settings, seeds).
        burn_in: First epochs in which a setting's weights do not act, (settings,).
        score_epochs: Number of epochs that a score averages (`SearchSpace.score_epochs`).
        margin_factor: Factor of the margin in the score and at rungs (`SearchSpace.margin_factor`).
        points: The settings in the unit cube, (settings, dimensions).
    """

    space: SearchSpace
    params: list[Params]
    objective: np.ndarray
    margin: np.ndarray
    test: np.ndarray
    burn_in: np.ndarray
    score_epochs: int = 1
    margin_factor: float = 0.0
    points: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.points = np.array([self.encode(params) for params in self.params])

    @property
    def n_epochs(self) -> int:
        return self.objective.shape[2]

    def from_setting(self, first: int) -> "Table":
        """Return the table without its first settings."""
        arrays = {
            name: getattr(self, name)[first:]
            for name in ("params", "objective", "margin", "test", "burn_in")
        }
        return replace(self, **arrays)

    @cached_property
    def truth(self) -> np.ndarray:
        """What a setting is worth: the mean over its seeds on test images, (settings,)."""
        return self.test.mean(1)

    def encode(self, params: Params) -> list[float]:
        """Return params as a point: ranges in [0, 1], a choice as one of several 1s."""
        point: list[float] = []
        for path, distribution in self.space.space.items():
            value = params.get(path)
            if distribution.categorical is not None:
                point += [float(value == choice) / 2**0.5 for choice in distribution.categorical]
                continue
            low, high = distribution.bounds_or_choices()
            scale = np.log if distribution.log else float
            is_missing = value is None
            part = (
                (scale(value) - scale(low)) / (scale(high) - scale(low)) if not is_missing else 0.5
            )
            point.append(float(part))
        return point

    def find_nearest(self, params: Params, tried: Sequence[int]) -> int:
        """Return the nearest setting that was not tried."""
        distances = ((self.points - np.array(self.encode(params))) ** 2).sum(1)
        distances[list(tried)] = np.inf
        return int(distances.argmin())

    def score(self, setting: int, seed: int, epoch: int) -> tuple[float, float]:
        """Return the score of a trial after an epoch, and the margin of its best epoch, which
        breaks ties; (-1, 0) within the burn-in. `margin_factor` times the margin is in the score.
        """
        first = int(self.burn_in[setting])
        if epoch <= first:
            return -1.0, 0.0
        values = self.objective[setting, seed, :epoch]
        rule = SelectionRule("", first, score_epochs=self.score_epochs)
        best = first + int(values[first:].argmax())
        score = max(average_epochs([*enumerate(values.tolist(), 1)], rule))
        margin = float(self.margin[setting, seed, best])
        return score + self.margin_factor * margin, margin


def load_table(path: Path, name: str) -> Table:
    """Read the settings of a space of which all seeds are recorded."""
    runs = json.loads(np.load(path)["runs"].tobytes().decode())
    by_number: dict[int, dict[int, dict[str, Any]]] = {}
    for run in runs:
        if run["space"] == name and "failed" not in run:
            by_number.setdefault(run["number"], {})[run["seed"]] = run
    complete = [seeds for _, seeds in sorted(by_number.items()) if len(seeds) == 2]
    # Random settings of a conditional space may be equal.
    rows = list({json.dumps(seeds[0]["params"]): seeds for seeds in complete}.values())
    space = load_space(name, {"finalists": 0})

    def curves(metric: str) -> np.ndarray:
        return np.array([[seeds[seed]["curves"][metric] for seed in (0, 1)] for seeds in rows])

    return Table(
        space,
        [seeds[0]["params"] for seeds in rows],
        curves("robust_worst"),
        curves("robust_margin"),
        np.array([[seeds[seed]["test"] for seed in (0, 1)] for seeds in rows]),
        np.array([seeds[0]["burn_in"] for seeds in rows]),
        space.score_epochs or 1,
        space.margin_factor,
    )


class Search(Protocol):
    """A sampler and a scheduler."""

    def propose(self, tried: Sequence[int]) -> int | None:
        """Return the setting to train next, a new one or one that was paused; None to wait."""

    def report(self, setting: int, seed: int, epoch: int) -> bool:
        """Receive the result of an epoch; return whether the trial trains another one."""


class Scheduler(Protocol):
    def stops(self, table: Table, setting: int, seed: int, epoch: int) -> bool: ...


class OptunaSearch:
    """Optuna as a sweep uses it: told of running trials, and of the settings that were trained."""

    compares_costs = True

    def __init__(
        self, table: Table, sampler: Sampler, scheduler: Scheduler, points: Sequence[Params]
    ) -> None:
        self.table, self.scheduler = table, scheduler
        self.space = table.space.replace(sampler=sampler)
        self.study = optuna.create_study(direction="maximize", sampler=sampler.build_sampler())
        self.points = [*points]
        self.pending: dict[int, optuna.Trial] = {}

    def draw_candidate(self) -> Params:
        draft = self.study.ask()
        params = self.space.suggest_params(draft)
        self.study.tell(draft, state=optuna.trial.TrialState.FAIL)
        return params

    def draw(self, tried: Sequence[int]) -> Params:
        """Draw the settings of a trial. While the sampler draws at random, of two candidates that
        which shares more epochs with the trials so far.
        """
        first, sampler = self.draw_candidate(), self.space.sampler
        n_told = len(self.study.get_trials(states=[optuna.trial.TrialState.COMPLETE]))
        draws_at_random = sampler.learns_after_startup and n_told < sampler.n_startup_trials
        if not (self.compares_costs and draws_at_random):
            return first
        second = self.draw_candidate()
        longest = max((self.table.burn_in[setting] for setting in tried), default=0)
        shared = [
            min(longest, self.table.burn_in[self.table.find_nearest(params, [])])
            for params in (first, second)
        ]
        return second if shared[1] > shared[0] else first

    def propose(self, tried: Sequence[int]) -> int | None:
        if len(tried) == len(self.table.params):
            return None
        params = self.points.pop(0) if self.points else self.draw(tried)
        setting = self.table.find_nearest(params, tried)
        with_inactive = self.space.sampler.models_inactive_params
        self.study.enqueue_trial(
            self.space.optuna_params(self.table.params[setting], with_inactive=with_inactive)
        )
        self.pending[setting] = self.study.ask()
        self.space.suggest_params(self.pending[setting])
        return setting

    def report(self, setting: int, seed: int, epoch: int) -> bool:
        is_last = epoch == self.table.n_epochs
        if epoch <= self.table.burn_in[setting]:
            return not is_last
        if not is_last and not self.scheduler.stops(self.table, setting, seed, epoch):
            return True
        score, _ = self.table.score(setting, seed, epoch)
        self.study.tell(self.pending.pop(setting), score)
        return False


@dataclass
class Asha:
    """ASHA as a sweep runs it.

    Attributes:
        grace_period: Epoch of the first rung.
        reduction_factor: The best 1 / reduction_factor of the trials continue.
        compares_same_lr: Whether only trials with the same learning rates are compared.
        values: {(epoch of the rung, learning rates as text): values of the trials that reached it};
            the text is empty if all trials are compared.
    """

    grace_period: int
    reduction_factor: int = 2
    compares_same_lr: bool = False
    values: dict[tuple[int, str], list[float]] = field(default_factory=dict)

    def stops(self, table: Table, setting: int, seed: int, epoch: int) -> bool:
        rung = self.grace_period
        while rung < epoch:
            rung *= self.reduction_factor
        if rung != epoch:
            return False
        value = float(table.objective[setting, seed, epoch - 1])
        value += table.margin_factor * float(table.margin[setting, seed, epoch - 1])
        group = str(table.params[setting].get(LEARNING_RATES)) if self.compares_same_lr else ""
        values = self.values.setdefault((rung, group), [])
        values.append(value)
        n_promoted = max(1, len(values) // self.reduction_factor)
        return value < sorted(values)[-n_promoted]


class NeverStop:
    def stops(self, table: Table, setting: int, seed: int, epoch: int) -> bool:
        return False


@dataclass
class Replay:
    """What a simulated sweep did.

    Attributes:
        choice_by_epoch: The setting chosen after 1, 2, ... epochs trained; -1 before the first
            result.
        reached: Last epoch of each setting tried, in the order of the trials.
        trained: Epochs that each of them trained itself.
        unfinished: Settings that trained when the budget ended.
        ranked: Settings that have a score, best first.
    """

    choice_by_epoch: list[int] = field(default_factory=list)
    reached: dict[int, int] = field(default_factory=dict)
    trained: dict[int, int] = field(default_factory=dict)
    unfinished: set[int] = field(default_factory=set)
    ranked: list[int] = field(default_factory=list)


def simulate(
    table: Table, search: Search, max_epochs: int, seed: int, max_trials: int = sys.maxsize
) -> Replay:
    """Run a sweep on the table, until it has trained for `max_epochs` or all trials have ended.

    Args:
        table: The curves.
        search: Sampler and scheduler.
        max_epochs: Epochs after which no trial trains another one.
        seed: Which recorded seed the trials train with.
        max_trials: Number of trials after which the sampler is asked for no more.
    """
    replay = Replay()
    reached = replay.reached
    running: list[tuple[float, int]] = []
    shared, now = 0, 0.0
    scores: dict[int, tuple[float, float]] = {}
    while len(replay.choice_by_epoch) < max_epochs:
        while len(running) < CONCURRENCY:
            # A paused trial continues only if it is proposed again.
            setting = search.propose([*reached]) if len(reached) < max_trials else None
            if setting is None:
                break
            reached.setdefault(setting, 0)
            replay.trained.setdefault(setting, 0)
            heapq.heappush(running, (now + 1, setting))
        if not running:
            break
        now, setting = heapq.heappop(running)
        reached[setting] += 1
        epoch = reached[setting]
        is_prefix = epoch <= table.burn_in[setting]
        if not is_prefix:
            scores[setting] = table.score(setting, seed, epoch)
        choice = max(scores, key=lambda number: scores[number], default=-1)
        if not is_prefix or epoch > shared:
            replay.choice_by_epoch.append(choice)
            replay.trained[setting] += 1
            shared = max(shared, epoch) if is_prefix else shared
        elif replay.choice_by_epoch:
            replay.choice_by_epoch[-1] = choice
        if search.report(setting, seed, epoch):
            heapq.heappush(running, (now + 1, setting))
    replay.unfinished = {setting for _, setting in running}
    replay.ranked = sorted(scores, key=lambda number: scores[number], reverse=True)
    return replay


@dataclass
class Outcome:
    """Many simulated sweeps of one kind.

    Attributes:
        gains: Gain after 1, 2, ... epochs, (sweeps, max_epochs).
        costs: Mean number of epochs that the first 1, 2, ... trials train.
        wrong: Share of the three best settings tried by a sweep that were stopped.
    """

    gains: np.ndarray
    costs: np.ndarray
    wrong: float


def evaluate(
    table: Table,
    make_search: Callable[[Table, int], Search],
    max_epochs: int,
    repeats: int,
    max_trials: int = 64,
) -> Outcome:
    """Run many sweeps, on the two recorded seeds in turn."""
    low, high = table.truth.mean(), table.truth.max()
    gains, costs = np.zeros((repeats, max_epochs)), np.zeros((repeats, max_trials))
    n_wrong = 0
    for repeat in range(repeats):
        replay = simulate(table, make_search(table, repeat), max_epochs, repeat % 2)
        choices = np.array(replay.choice_by_epoch)
        found = np.where(choices < 0, 0.0, (table.truth[choices] - low) / (high - low))
        gains[repeat, : len(found)] = found
        gains[repeat, len(found) :] = found[-1]
        trained = [*replay.trained.values(), *[0] * max_trials][:max_trials]
        costs[repeat] = np.cumsum(trained)
        best = sorted(replay.reached, key=lambda index: -table.truth[index])[:3]
        n_wrong += sum(
            replay.reached[index] < table.n_epochs and index not in replay.unfinished
            for index in best
        )
    return Outcome(gains, costs.mean(0), n_wrong / (3 * repeats))


def save_outcome(work: Path, space: str, name: str, outcome: Outcome) -> None:
    """Write an outcome into a folder, and print its end."""
    work.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(work / f"{space}; {name}.npz", **vars(outcome))
    print(f"{space}; {name}: {describe_mean(outcome.gains[:, -1])}", flush=True)


def load_outcomes(work: Path, space: str) -> dict[str, Outcome]:
    """Return the outcomes of a space in a folder, by their names."""
    outcomes = {}
    for path in sorted(work.glob(f"{space}; *.npz")):
        values = np.load(path)
        outcomes[path.stem.removeprefix(f"{space}; ")] = Outcome(
            values["gains"], values["costs"], float(values["wrong"])
        )
    return outcomes
