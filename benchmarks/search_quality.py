"""Replay samplers and schedulers on recorded curves, and print what each finds for how many epochs.

    python benchmarks/search_quality.py [--table benchmarks/search_curves.npz] [--repeats 100]
    python benchmarks/search_quality.py --spaces gairat --prefer-shared

A simulated sweep proposes settings, trains the nearest recorded one that it has not tried, stops
trials as its scheduler says, and chooses the trial with the best validated epoch, as a real sweep
does. What it found is judged on the test images, by the mean over the seeds of the setting: the
sweep has seen neither. Costs are epochs that a sweep trains itself; epochs within a common burn-in
are shared. Two trials run at once.

Gain: 0 is the mean of all recorded settings, which is what a single random trial finds, and 1 is
the best of them.
"""

import argparse
import heapq
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from matplotlib.figure import Figure
from measure import describe_machine, format_table

from raysweep.sweep.optuna_study import to_sampler_trial
from raysweep.sweep.search_space import Params, Sampler, SearchSpace, load_space
from raysweep.sweep.trial import Trial

CONCURRENCY = 2


@dataclass
class Table:
    """Recorded settings of a space.

    Attributes:
        space: The search space.
        params: Params of each setting.
        objective: Validated accuracy, (settings, seeds, epochs).
        margin: Mean margin on the same examples, (settings, seeds, epochs).
        test: Accuracy of the best checkpoint on test images, (settings, seeds).
        burn_in: First epochs in which a setting's weights do not act, (settings,).
        points: The settings in the unit cube, (settings, dimensions).
    """

    space: SearchSpace
    params: list[Params]
    objective: np.ndarray
    margin: np.ndarray
    test: np.ndarray
    burn_in: np.ndarray
    points: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.points = np.array([self.encode(params) for params in self.params])

    @property
    def n_epochs(self) -> int:
        return self.objective.shape[2]

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

    def best_so_far(self, setting: int, seed: int, epochs: int) -> tuple[float, float]:
        """Return the best objective up to an epoch after the burn-in, and its margin."""
        first = self.burn_in[setting]
        if epochs <= first:
            return -1.0, 0.0
        pairs = zip(
            self.objective[setting, seed, first:epochs],
            self.margin[setting, seed, first:epochs],
            strict=True,
        )
        return max((float(value), float(margin)) for value, margin in pairs)


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
    )


class Proposer:
    """A sampler as a sweep builds it, told of the settings that were really trained."""

    def __init__(self, table: Table, sampler: Sampler) -> None:
        self.space = table.space.replace(sampler=sampler)
        self.params = table.params
        self.study = optuna.create_study(direction="maximize", sampler=sampler.build_sampler())
        for point in self.space.initial_points:
            self.study.enqueue_trial(self.space.optuna_params(point))

    def propose(self) -> Params:
        trial = self.study.ask()
        params = self.space.suggest_params(trial)
        self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return params

    def tell(self, setting: int, value: float) -> None:
        best = {"epoch": 1.0, "robust_worst": value}
        trial = Trial(setting, self.params[setting], "finished", best=best)
        self.study.add_trial(to_sampler_trial(self.space, trial))


class SharedProposer(Proposer):
    """The same, but of two random candidates it takes the one that shares more epochs.

    Only random candidates are equally promising: those at the start, or all of random search.
    """

    def __init__(self, table: Table, sampler: Sampler) -> None:
        super().__init__(table, sampler)
        self.table = table
        self.n_points = len(self.space.initial_points)
        self.n_random = np.inf if sampler.kind == "random" else sampler.n_startup_trials
        self.n_proposed = 0

    def propose(self) -> Params:
        first = super().propose()
        self.n_proposed += 1
        if not self.n_points < self.n_proposed <= self.n_random:
            return first
        second = super().propose()
        first_shared, second_shared = (
            self.table.burn_in[self.table.find_nearest(params, [])] for params in (first, second)
        )
        return second if second_shared > first_shared else first


@dataclass
class Asha:
    """ASHA as the sweep runs it."""

    grace_period: int
    reduction_factor: int = 2
    values: dict[int, list[float]] = field(default_factory=dict)

    def stops(self, table: Table, setting: int, seed: int, epoch: int) -> bool:
        rung = self.grace_period
        while rung < epoch:
            rung *= self.reduction_factor
        if rung != epoch or epoch >= table.n_epochs or epoch <= table.burn_in[setting]:
            return False
        value = float(table.objective[setting, seed, epoch - 1])
        values = self.values.setdefault(rung, [])
        values.append(value)
        n_promoted = max(1, len(values) // self.reduction_factor)
        return value < sorted(values)[-n_promoted]


class NeverStop:
    def stops(self, table: Table, setting: int, seed: int, epoch: int) -> bool:
        return False


def simulate(
    table: Table,
    proposer: Proposer,
    scheduler: Any,
    max_epochs: int,
    shared_seed: int,
) -> tuple[list[tuple[int, float]], list[int], list[int]]:
    """Run a sweep on the table, until it has trained for `max_epochs`.

    Returns:
        After each trial the epochs trained and the truth of the choice; the settings in the order
        of their trials; and those that were stopped.
    """
    tried: list[int] = []
    running: list[tuple[float, int, int]] = []
    ended: dict[int, int] = {}
    shared, cost = 0, 0
    trace: list[tuple[int, float]] = []

    def start(now: float) -> None:
        setting = table.find_nearest(proposer.propose(), tried)
        tried.append(setting)
        heapq.heappush(running, (now + 1, setting, 1))

    for _ in range(CONCURRENCY):
        start(0.0)
    while running:
        now, setting, epoch = heapq.heappop(running)
        is_prefix = epoch <= min(int(table.burn_in[setting]), table.n_epochs)
        if not is_prefix or epoch > shared:
            cost += 1
            shared = max(shared, epoch) if is_prefix else shared
        if epoch < table.n_epochs and not scheduler.stops(table, setting, shared_seed, epoch):
            heapq.heappush(running, (now + 1, setting, epoch + 1))
            continue
        ended[setting] = epoch
        value, _ = table.best_so_far(setting, shared_seed, epoch)
        if value >= 0:
            proposer.tell(setting, value)
        choice = max(ended, key=lambda index: table.best_so_far(index, shared_seed, ended[index]))
        trace.append((cost, float(table.truth[choice])))
        if cost < max_epochs and len(tried) < len(table.params):
            start(now)
    return trace, tried, [index for index, epochs in ended.items() if epochs < table.n_epochs]


SAMPLERS: dict[str, dict[str, Any]] = {
    "random": {"kind": "random"},
    "tpe": {"kind": "tpe", "n_startup_trials": 6},
    "gp": {"kind": "gp", "n_startup_trials": 6},
}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "none": NeverStop,
    "ASHA from 2": lambda: Asha(2),
    "ASHA from 6": lambda: Asha(6),
}


def evaluate(
    table: Table,
    sampler: str,
    scheduler: str,
    max_epochs: int,
    repeats: int,
    make_proposer: type[Proposer] = Proposer,
) -> tuple[np.ndarray, float, float]:
    """Run many sweeps.

    Returns:
        The gain after 1, 2, ... epochs, (repeats, max_epochs); the share of the three best settings
        of a sweep that were stopped; and the mean number of epochs of the first ten trials.
    """
    low, high = table.truth.mean(), table.truth.max()
    gains = np.zeros((repeats, max_epochs))
    n_wrong, ten_trials = 0, []
    for repeat in range(repeats):
        trace, tried, stopped = simulate(
            table,
            make_proposer(table, Sampler.from_data({**SAMPLERS[sampler], "seed": 1000 * repeat})),
            SCHEDULERS[scheduler](),
            max_epochs,
            repeat % 2,
        )
        for cost, truth in trace:
            gains[repeat, cost - 1 :] = (truth - low) / (high - low)
        ten_trials.append(trace[:10][-1][0])
        best = sorted(tried, key=lambda index: -table.truth[index])[:3]
        n_wrong += sum(index in best for index in stopped)
    return gains, n_wrong / (3 * repeats), float(np.mean(ten_trials))


def draw_gains(curves: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Draw the mean gain against the epochs trained, with two standard errors, for each space."""
    figure = Figure(figsize=(5 * len(curves), 3.6), layout="constrained")
    for axes, (name, by_variant) in zip(
        np.atleast_1d(figure.subplots(1, len(curves))), curves.items(), strict=True
    ):
        for variant, gains in by_variant.items():
            epochs, mean = np.arange(1, gains.shape[1] + 1), gains.mean(0)
            error = 2 * gains.std(0) / len(gains) ** 0.5
            (line,) = axes.plot(epochs, 1 - mean, label=variant, linewidth=1)
            axes.fill_between(
                epochs, 1 - mean - error, 1 - mean + error, color=line.get_color(), alpha=0.15
            )
        axes.set(title=name, xlabel="epochs trained", ylabel="regret (1: a random trial)")
        axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    figure.savefig(path)


def describe_signal(table: Table) -> str:
    """Say how much of the spread of the results is settings: the covariance of the two seeds."""
    spread = table.test.var(0, ddof=1).mean()
    shared = np.cov(table.test.T)[0, 1]
    scores = table.objective.max(2).mean(1)
    correlation = np.corrcoef(scores, table.truth)[0, 1]
    return (
        f"{len(table.params)} settings; test accuracy {table.truth.min():.3f} to "
        f"{table.truth.max():.3f}; settings explain {max(0.0, shared / spread):.0%} of the spread "
        f"of one training; correlation of validation and test {correlation:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--table", type=Path, default=Path(__file__).with_name("search_curves.npz"))
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--spaces", nargs="+", default=["gairat", "lrat"])
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=SAMPLERS)
    parser.add_argument(
        "--prefer-shared",
        action="store_true",
        help="of two random candidates take the one that shares more epochs",
    )
    parser.add_argument("--figure", type=Path, help="file of the figure of regret")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    curves: dict[str, dict[str, np.ndarray]] = {}
    print(f"{describe_machine()}; {args.repeats} simulated sweeps each, +- standard error")
    for name in args.spaces:
        table = load_table(args.table, name)
        budgets = [factor * table.n_epochs for factor in (4, 8, 16)]
        print(f"\n## {name}\n\n{describe_signal(table)}\n")
        header = [
            *("sampler", "scheduler"),
            *(f"gain, {budget} epochs" for budget in budgets),
            *("best three stopped", "epochs of ten trials"),
        ]
        rows: list[list[str]] = []
        curves[name] = {}
        for sampler in args.samplers:
            for scheduler in SCHEDULERS:
                gains, wrong, epochs = evaluate(
                    table,
                    sampler,
                    scheduler,
                    budgets[-1],
                    args.repeats,
                    SharedProposer if args.prefer_shared else Proposer,
                )
                curves[name][f"{sampler}, {scheduler}"] = gains
                cells = [
                    f"{column.mean():.2f} +- {column.std() / len(column) ** 0.5:.2f}"
                    for column in gains[:, [budget - 1 for budget in budgets]].T
                ]
                rows.append([sampler, scheduler, *cells, f"{wrong:.0%}", f"{epochs:.1f}"])
        print(format_table(header, rows), flush=True)
    if args.figure:
        draw_gains(curves, args.figure)


if __name__ == "__main__":
    main()
