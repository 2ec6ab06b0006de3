"""Replay samplers and schedulers on recorded curves, and print what each finds for how many epochs.

    python benchmarks/search_quality.py run --work FOLDER [--repeats 200] [--variants ...]
    python benchmarks/search_quality.py report --work FOLDER [--figure FILE]

`run` simulates sweeps (`search_simulator.py` says how) and writes what they found into FOLDER, and
so does `search_other_tuners.py`. `report` prints tables and goals of all that is in FOLDER, and
each difference with its standard error.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from command_line import create_parser
from matplotlib.figure import Figure
from measure import describe_machine, describe_mean, format_table
from scipy.stats import kendalltau
from search_simulator import (
    Asha,
    NeverStop,
    OptunaSearch,
    Outcome,
    Scheduler,
    Search,
    Table,
    evaluate,
    load_outcomes,
    load_table,
    save_outcome,
    simulate,
)

from raysweep.sweep.search_space import Sampler

N_RANDOM = 64
"""Number of random trials whose gain a search should reach in a quarter of their epochs."""
N_FIRST = {"gairat": 47, "lrat": 27, "trades": 24, "fat": 24}
"""Number of settings that were recorded when scores, margins and rungs were chosen."""


@dataclass
class BelowPrediction:
    """Stop a trial whose best result is predicted to stay below the best one of the sweep.

    How much a trial still gains after an epoch is taken from earlier trials of the sweep: their
    mean gain plus one standard deviation.

    Attributes:
        grace_period: Epoch of the first comparison.
        min_trials: Earlier trials that a prediction needs.
    """

    grace_period: int
    min_trials: int = 3
    curves: dict[int, dict[int, float]] = field(default_factory=dict)

    def stops(self, table: Table, setting: int, seed: int, epoch: int) -> bool:
        value = float(table.objective[setting, seed, epoch - 1])
        self.curves.setdefault(setting, {})[epoch] = value
        rises = [
            max(curve.values()) - curve[epoch]
            for other, curve in self.curves.items()
            if other != setting and epoch in curve and table.n_epochs - 1 in curve
        ]
        if epoch < self.grace_period or len(rises) < self.min_trials:
            return False
        best = max(max(curve.values()) for curve in self.curves.values())
        return value + float(np.mean(rises) + np.std(rises)) < best


class FirstCandidateSearch(OptunaSearch):
    """The same, but the first random candidate becomes the trial, whatever it costs."""

    compares_costs = False


def build_as_shipped(table: Table, repeat: int) -> Search:
    """Build a search with the sampler and the scheduler of the space."""
    sampler, scheduler = table.space.sampler, table.space.scheduler
    make_scheduler = partial(Asha, scheduler.grace_period, scheduler.reduction_factor)
    assert scheduler.kind == "asha"
    return build(table, repeat, sampler.to_json_dict(), make_scheduler)


def build(
    table: Table,
    repeat: int,
    sampler: dict[str, Any],
    make_scheduler: Callable[[], Scheduler],
    with_points: bool = True,
    near_base: bool = False,
    search: type[OptunaSearch] = OptunaSearch,
) -> Search:
    """Build a search as the package does, with a seed of its own."""
    points = [*table.space.initial_points] if with_points else []
    if near_base and table.space.method == "gairat":
        points[1:] = [NEAR_BASE]
    seeded = Sampler.from_data({**sampler, "seed": 1000 * repeat})
    return search(table, seeded, make_scheduler(), points)


NEAR_BASE = {
    "method.terms.pgd.weight.shape": "tanh",
    "method.terms.pgd.weight.lam": 3.0,
    "method.terms.pgd.weight.burn_in": 6,
}
"""The corner of GAIRAT's space that is nearest to AT, in place of its second starting point."""

RANDOM = {"kind": "random"}
TPE = {"kind": "tpe", "n_startup_trials": 6}
GP = {"kind": "gp", "n_startup_trials": 6}
VARIANTS: dict[str, Callable[[Table, int], Search]] = {
    "as shipped": build_as_shipped,
    "random, none": partial(build, sampler=RANDOM, make_scheduler=NeverStop),
    "random, ASHA from 2": partial(build, sampler=RANDOM, make_scheduler=partial(Asha, 2)),
    "random, ASHA from 6": partial(build, sampler=RANDOM, make_scheduler=partial(Asha, 6)),
    "TPE, none": partial(build, sampler=TPE, make_scheduler=NeverStop),
    "TPE, ASHA from 2": partial(build, sampler=TPE, make_scheduler=partial(Asha, 2)),
    "TPE, ASHA from 6": partial(build, sampler=TPE, make_scheduler=partial(Asha, 6)),
    "TPE, ASHA from 6, 1 of 3": partial(build, sampler=TPE, make_scheduler=partial(Asha, 6, 3)),
    "TPE, ASHA from 6, 1 of 4": partial(build, sampler=TPE, make_scheduler=partial(Asha, 6, 4)),
    "TPE, ASHA from 6, 1 of 8": partial(build, sampler=TPE, make_scheduler=partial(Asha, 6, 8)),
    "TPE, ASHA from 6, 1 of 4, no points": partial(
        build, sampler=TPE, make_scheduler=partial(Asha, 6, 4), with_points=False
    ),
    "random, ASHA from 6, 1 of 4": partial(
        build, sampler=RANDOM, make_scheduler=partial(Asha, 6, 4)
    ),
    "TPE, ASHA from 7": partial(build, sampler=TPE, make_scheduler=partial(Asha, 7)),
    "TPE, predicted from 6": partial(
        build, sampler=TPE, make_scheduler=partial(BelowPrediction, 6)
    ),
    "TPE, ASHA from 6, no points": partial(
        build, sampler=TPE, make_scheduler=partial(Asha, 6), with_points=False
    ),
    "TPE, ASHA from 6, near base": partial(
        build, sampler=TPE, make_scheduler=partial(Asha, 6), near_base=True
    ),
    "GP, ASHA from 6, 3 random, near base": partial(
        build,
        sampler={**GP, "n_startup_trials": 3},
        make_scheduler=partial(Asha, 6),
        near_base=True,
    ),
    "TPE, ASHA from 6, 3 random": partial(
        build, sampler={**TPE, "n_startup_trials": 3}, make_scheduler=partial(Asha, 6)
    ),
    "TPE, ASHA from 6, 4 random": partial(
        build, sampler={**TPE, "n_startup_trials": 4}, make_scheduler=partial(Asha, 6)
    ),
    "TPE, ASHA from 6 among the same learning rates": partial(
        build, sampler=TPE, make_scheduler=partial(Asha, 6, compares_same_lr=True)
    ),
    "TPE, none, 3 random": partial(
        build, sampler={**TPE, "n_startup_trials": 3}, make_scheduler=NeverStop
    ),
    "TPE, ASHA from 4": partial(build, sampler=TPE, make_scheduler=partial(Asha, 4)),
    "TPE, ASHA from 2, 4 random": partial(
        build, sampler={**TPE, "n_startup_trials": 4}, make_scheduler=partial(Asha, 2)
    ),
    # The rungs of Ray's default: 1 and 4.
    "TPE, ASHA from 1, 1 of 4, 4 random": partial(
        build, sampler={**TPE, "n_startup_trials": 4}, make_scheduler=partial(Asha, 1, 4)
    ),
    "TPE, ASHA from 6, first candidates": partial(
        build, sampler=TPE, make_scheduler=partial(Asha, 6), search=FirstCandidateSearch
    ),
    "GP, none": partial(build, sampler=GP, make_scheduler=NeverStop),
    "GP, ASHA from 6": partial(build, sampler=GP, make_scheduler=partial(Asha, 6)),
    "GP, ASHA from 6, 3 random": partial(
        build, sampler={**GP, "n_startup_trials": 3}, make_scheduler=partial(Asha, 6)
    ),
    "GP, predicted from 6": partial(build, sampler=GP, make_scheduler=partial(BelowPrediction, 6)),
    "GP, predicted from 6, 3 random": partial(
        build,
        sampler={**GP, "n_startup_trials": 3},
        make_scheduler=partial(BelowPrediction, 6),
    ),
}


def run(args: argparse.Namespace) -> None:
    """Simulate the sweeps and write their outcomes."""
    for space in args.spaces:
        table = load_table(args.table, space)
        for name in args.variants:
            # Random search shows what its 64 trials find; the others have a quarter of the epochs.
            is_reference = name == "random, none" and args.score_epochs is None
            max_epochs = N_RANDOM * table.n_epochs if is_reference else args.epochs
            if args.score_epochs:
                table.score_epochs, table.margin_factor = args.score_epochs, 0.0
            outcome = evaluate(table, VARIANTS[name], max_epochs, args.repeats)
            save_outcome(args.work, space, name + describe_score(args.score_epochs), outcome)


def describe_score(score_epochs: int | None) -> str:
    """Return a suffix for the name of a search; "" if it has the score of the space."""
    if score_epochs is None:
        return ""
    return ", best epoch" if score_epochs == 1 else f", mean of {score_epochs}"


def describe_signal(table: Table) -> str:
    """Describe the share of the results' spread that settings explain: the covariance of seeds."""
    spread = table.test.var(0, ddof=1).mean()
    shared = np.cov(table.test.T)[0, 1]
    scores = table.objective.max(2).mean(1)
    correlation = np.corrcoef(scores, table.truth)[0, 1]
    return (
        f"{len(table.params)} settings; test accuracy {table.truth.min():.3f} to "
        f"{table.truth.max():.3f}; settings explain {max(0.0, shared / spread):.0%} of the spread "
        f"of one training; correlation of validation and test {correlation:.2f}"
    )


def describe_margins(table: Table, n_trials: int = 10, repeats: int = 400) -> str:
    """Describe what the margin adds to the score and to the order at the first rung.

    Args:
        table: The curves.
        n_trials: Number of random full-length trials of which the best by the score is chosen.
        repeats: Number of bootstrap samples of the settings, for the error.
    """
    scores = [list_scores(table, 3, factor) for factor in (0.0, 1.0)]

    def choose(numbers: np.ndarray) -> float:
        """Return the mean accuracy of the choice with the margin minus that without it."""
        n_settings = len(numbers)
        # The best of n_trials draws has the rank r with this probability.
        shares = np.diff((np.arange(n_settings + 1) / n_settings) ** n_trials)
        without, included = (
            np.mean([shares @ table.truth[numbers[np.argsort(values[numbers, seed])]]
                     for seed in (0, 1)])
            for values in scores
        )  # fmt: skip
        return float(included - without)

    rng = np.random.default_rng(0)
    n_settings = len(table.params)
    drawn = [choose(rng.integers(n_settings, size=n_settings)) for _ in range(repeats)]
    rung = table.space.scheduler.grace_period
    acts = table.burn_in < rung
    orders = [
        np.mean([kendalltau(values[acts, seed, rung - 1], table.truth[acts])[0] for seed in (0, 1)])
        for values in (table.objective, table.objective + table.margin)
    ]
    return (
        f"The margin in the score adds {choose(np.arange(n_settings)):+.4f} +- {np.std(drawn):.4f} "
        f"to the test accuracy of the best of {n_trials} random trials (error over tables). "
        f"Kendall's tau of epoch {rung} with the result: {orders[0]:.2f}, with the margin "
        f"{orders[1]:.2f}."
    )


def describe_difference(first: np.ndarray, second: np.ndarray) -> tuple[str, float]:
    """Return the difference of two means with its standard error, and their ratio."""
    difference = first.mean() - second.mean()
    error = sum(values.var(ddof=1) / len(values) for values in (first, second)) ** 0.5
    return f"{difference:+.3f} +- {error:.3f}", difference / error if error else 0.0


def gain_at(outcome: Outcome, epochs: float) -> np.ndarray:
    """Return the gains after so many epochs, (sweeps,)."""
    return outcome.gains[:, round(epochs) - 1]


def draw_random(table: Table, n_trials: int, repeats: int) -> tuple[np.ndarray, float]:
    """Choose the best of random full-length trials, drawn from the recorded settings with
    replacement, because there may be fewer settings than trials.

    Returns:
        The gains, (repeats,), and the mean number of epochs; each draw counts as another setting.
    """
    rng = np.random.default_rng(0)
    low, high = table.truth.mean(), table.truth.max()
    gains, costs = np.zeros(repeats), np.zeros(repeats)
    settings = range(len(table.params))
    ranks = [
        [table.score(setting, seed, table.n_epochs) for setting in settings] for seed in (0, 1)
    ]
    for repeat in range(repeats):
        draws = rng.integers(len(table.params), size=n_trials)
        choice = max(draws, key=lambda setting: ranks[repeat % 2][setting])
        gains[repeat] = (table.truth[choice] - low) / (high - low)
        burn_in = table.burn_in[draws]
        costs[repeat] = (table.n_epochs - burn_in).sum() + burn_in.max()
    return gains, float(costs.mean())


def list_scores(table: Table, score_epochs: int, margin_factor: float = 0.0) -> np.ndarray:
    """Return the scores of all settings at their ends, (settings, seeds).

    The margin also breaks ties: objectives are multiples of 1 / 300 or so.
    """
    ranked_table = replace(table, score_epochs=score_epochs, margin_factor=margin_factor)
    scores = [
        [
            score + 1e-5 * margin
            for score, margin in (
                ranked_table.score(setting, seed, table.n_epochs) for seed in (0, 1)
            )
        ]
        for setting in range(len(table.params))
    ]
    return np.array(scores)


class RandomSubsets:
    """Choices among random subsets of the settings, trained to their ends.

    Args:
        table: The curves.
        repeats: Number of subsets of each kind.
    """

    def __init__(self, table: Table, repeats: int) -> None:
        low, high = table.truth.mean(), table.truth.max()
        self.gain, self.repeats = (table.truth - low) / (high - low), repeats
        self.rng = np.random.default_rng(0)

    def describe_choice(
        self, size: int, scores: np.ndarray, n_leaders: int = 1, final: np.ndarray | None = None
    ) -> str:
        """Return the mean gain of the best of `size` settings by the scores of one seed.

        Args:
            size: Number of settings.
            scores: Scores, (settings, seeds).
            n_leaders: Number of the best settings of which `final` chooses one.
            final: Scores, (settings, seeds).
        """
        found = []
        for repeat in range(self.repeats):
            subset = self.rng.choice(len(self.gain), size, replace=False)
            leaders = subset[np.argsort(-scores[subset, repeat % 2])][:n_leaders]
            if final is not None:
                leaders = leaders[np.argsort(-final[leaders, repeat % 2])]
            found.append(self.gain[leaders[0]])
        return describe_mean(found)


def compare_choices(table: Table, repeats: int, n_trials: int = 10) -> list[list[str]]:
    """Compare ways to choose among fully trained trials: random subsets of the settings.

    Returns:
        For each way its name, trainings and mean gain. The second seed of a setting is its repeat.
        The last two rows are the choice among all settings (see `find_limit`).
    """
    subsets = RandomSubsets(table, repeats)
    rows = []
    for score_epochs, margin_factor in ((1, 0), (2, 0), (3, 0), (4, 0), (3, 0.3), (3, 1)):
        name = f"mean of {score_epochs} epochs" if score_epochs > 1 else "best epoch"
        if margin_factor:
            name += f" plus {margin_factor:g} times the margin"
        scores = list_scores(table, score_epochs, margin_factor)
        rows.append([name, str(n_trials), subsets.describe_choice(n_trials, scores)])
        if (score_epochs, margin_factor) == (table.score_epochs, table.margin_factor):
            again = f"{name}; of the best 3 the one with the best epoch"
            found = subsets.describe_choice(n_trials, scores, 3, list_scores(table, 1))
            rows.append([again, str(n_trials), found])
        elif score_epochs > 1:
            continue
        means = scores.mean(1, keepdims=True).repeat(2, axis=1)
        for n_repeated in (2, 4):
            size = n_trials + n_repeated
            rows.append([name, str(size), subsets.describe_choice(size, scores)])
            repeated = f"{name}, the best {n_repeated} with a second seed"
            found = subsets.describe_choice(n_trials, scores, n_repeated, means)
            rows.append([repeated, str(size), found])
    for n_seeds, text in ((1, "the score"), (2, "the score, two seeds")):
        limit, error = find_limit(table, n_seeds)
        n_trainings = str(n_seeds * len(table.params))
        rows.append([f"{text}, among all settings", n_trainings, f"{limit:.3f} +- {error:.3f}"])
    return rows


def compare_later_choices(table: Table, repeats: int, n_trials: int = 10) -> list[list[str]]:
    """Compare ways to choose among fully trained trials, on settings that were recorded later.

    Returns:
        For each way its name and the mean gain.
    """
    subsets = RandomSubsets(table, repeats)
    return [
        [name, subsets.describe_choice(n_trials, list_scores(table, score_epochs, factor))]
        for name, score_epochs, factor in (
            ("best epoch", 1, 0.0),
            ("mean of 3 epochs", 3, 0.0),
            ("mean of 3 epochs plus the margin", 3, 1.0),
        )
    ]


def find_limit(table: Table, n_seeds: int, repeats: int = 1000) -> tuple[float, float]:
    """Find the gain of the best by the score of all recorded settings.

    Args:
        table: The curves.
        n_seeds: Number of trainings whose mean score decides; 1 for the mean over the two seeds of
            the gains of two choices.
        repeats: Number of bootstrap samples of the settings, for the error.

    Returns:
        The gain, and its bootstrap standard error over settings.
    """
    scores = list_scores(table, table.score_epochs, table.margin_factor)
    if n_seeds == 2:
        scores = scores.mean(1, keepdims=True)

    def choose(numbers: np.ndarray) -> float:
        truth = table.truth[numbers]
        found = truth[scores[numbers].argmax(0)].mean()
        return float((found - truth.mean()) / (truth.max() - truth.mean()))

    rng = np.random.default_rng(0)
    n_settings = len(table.params)
    drawn = [choose(rng.integers(n_settings, size=n_settings)) for _ in range(repeats)]
    return choose(np.arange(n_settings)), float(np.std(drawn))


def compare_repeats(table: Table, name: str, repeats: int) -> list[list[str]]:
    """Compare a second seed for the leaders of a sweep with more trials for the same epochs.

    The leaders are ranked by the same two trainings, one of each recorded seed, by whose test
    results the choice is evaluated. This favours the second seed a little.

    Returns:
        For each number of leaders its name and the mean gains with and without a second seed.
    """
    gain = (table.truth - table.truth.mean()) / (table.truth.max() - table.truth.mean())
    rows = []
    for n_leaders in (2, 4):
        repeated, more = np.zeros(repeats), np.zeros(repeats)
        for repeat in range(repeats):
            seed, limit = repeat % 2, 64 * table.n_epochs
            search = VARIANTS[name](table, repeat)
            sweep = simulate(table, search, limit, seed, table.space.n_trials)
            leaders = sweep.ranked[:n_leaders]
            means = [
                sum(table.score(number, other, table.n_epochs)[0] for other in (0, 1))
                for number in leaders
            ]
            repeated[repeat] = gain[leaders[int(np.argmax(means))]]
            # The base runs train the burn-ins of the second seed.
            epochs = len(sweep.choice_by_epoch)
            epochs += sum(table.n_epochs - int(table.burn_in[number]) for number in leaders)
            longer = simulate(table, VARIANTS[name](table, repeat), epochs, seed)
            more[repeat] = gain[longer.choice_by_epoch[-1]]
        rows.append(
            [
                f"the best {n_leaders} of {table.space.n_trials}",
                describe_mean(repeated.tolist()),
                describe_mean(more.tolist()),
                describe_difference(repeated, more)[0],
            ]
        )
    return rows


def list_goals(table: Table, outcomes: dict[str, Outcome], ours: str) -> list[list[str]]:
    """Return the goals of a space: what, the figure, and whether it is met."""
    chosen, random = outcomes[ours], outcomes["random, none"]
    size = chosen.costs[table.space.n_trials - 1]
    all_of_them = random.gains[:, -1], random.costs[-1]
    drawn = draw_random(table, N_RANDOM, len(random.gains))
    quarter = min(drawn[1] / 4, chosen.gains.shape[1])
    rows = []
    for what, (gains, epochs) in (
        (f"{N_RANDOM} random full-length trials, drawn with replacement,", drawn),
        (f"all {len(table.params)} recorded settings", all_of_them),
    ):
        text, ratio = describe_difference(gain_at(chosen, epochs / 4), gains)
        rows.append(
            [
                f"as good in {epochs / 4:.0f} epochs as {what} in {epochs:.0f}",
                text,
                "met" if ratio > -2 else "missed",
            ]
        )
    gains = gain_at(chosen, size)
    near = 1 - gains.mean() <= 2 * gains.std(ddof=1) / len(gains) ** 0.5
    for name, rule in (
        ("random, none", "raysweep's rule"),
        ("random, none, best epoch", "the best epoch"),
    ):
        if name not in outcomes:
            continue
        text, ratio = describe_difference(gains, gain_at(outcomes[name], size))
        rows.append(
            [
                f"at the default size ({table.space.n_trials} trials, {size:.0f} epochs) better "
                f"than random full-length trials, chosen by {rule}, by two standard errors, or "
                "within them of the optimum",
                f"{text}; gain {describe_mean(gains.tolist())}",
                "met" if ratio >= 2 or near else "missed",
            ]
        )
    limit, limit_error = find_limit(table, 1)
    error = (gains.var(ddof=1) / len(gains) + limit_error**2) ** 0.5
    rows.append(
        [
            f"at the default size as good as the choice among all {len(table.params)} settings by "
            "their scores with one seed; the error is also over tables",
            f"{gains.mean() - limit:+.3f} +- {error:.3f}",
            "met" if gains.mean() - limit >= -2 * error else "missed",
        ]
    )
    for name, other in outcomes.items():
        if any(name.startswith(variant) for variant in VARIANTS):
            continue
        budgets = [epochs for epochs in (size, quarter) if epochs <= other.gains.shape[1]]
        if not budgets:
            continue
        differences = [
            describe_difference(gain_at(chosen, epochs), gain_at(other, epochs))
            for epochs in budgets
        ]
        rows.append(
            [
                f"ahead of {name} ({len(other.gains)} sweeps) after "
                f"{' and '.join(f'{epochs:.0f}' for epochs in budgets)} epochs",
                "; ".join(text for text, _ in differences),
                "; ".join(
                    "met" if ratio >= 2 else "not told apart" if ratio > -2 else "missed"
                    for _, ratio in differences
                ),
            ]
        )
    return rows


def draw_regret(found: dict[str, dict[str, Outcome]], lines: Sequence[str], path: Path) -> None:
    """Draw the mean regret against the epochs trained, with two standard errors, for each space."""
    figure = Figure(figsize=(5 * len(found), 4.2), layout="constrained")
    for axes, (space, outcomes) in zip(
        np.atleast_1d(figure.subplots(1, len(found))), found.items(), strict=True
    ):
        for name, outcome in outcomes.items():
            is_ours = any(name.startswith(variant) for variant in VARIANTS)
            if is_ours and name not in lines:
                continue
            gains = outcome.gains[:, :128]
            epochs, mean = np.arange(1, gains.shape[1] + 1), gains.mean(0)
            error = 2 * gains.std(0, ddof=1) / len(gains) ** 0.5
            style = "-" if is_ours else "--"
            (line,) = axes.plot(epochs, 1 - mean, style, label=name, linewidth=1)
            axes.fill_between(
                epochs, 1 - mean - error, 1 - mean + error, color=line.get_color(), alpha=0.12
            )
        axes.set(title=space, xlabel="epochs trained", ylabel="regret (1: a random trial)")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=6)
    figure.savefig(path)


def report(args: argparse.Namespace) -> None:
    """Print the tables and goals of all outcomes, and draw the figure."""
    print(f"{describe_machine()}; +- standard error over the sweeps of this table")
    found: dict[str, dict[str, Outcome]] = {}
    for space in args.spaces:
        table = load_table(args.table, space)
        outcomes = found[space] = load_outcomes(args.work, space)
        budgets = [factor * table.n_epochs for factor in (4, 8, 16)]
        header = ["search", "sweeps", *(f"gain, {budget} epochs" for budget in budgets)]
        header += ["best three stopped", f"epochs of {table.space.n_trials} trials"]
        rows = [
            [
                name,
                str(len(outcome.gains)),
                *(
                    describe_mean(gain_at(outcome, budget))
                    if budget <= outcome.gains.shape[1]
                    else ""
                    for budget in budgets
                ),
                f"{outcome.wrong:.0%}",
                f"{outcome.costs[table.space.n_trials - 1]:.1f}",
            ]
            for name, outcome in outcomes.items()
        ]
        print(f"\n## {space}\n\n{describe_signal(table)}\n")
        print(format_table(header, rows))
        print(f"\n{describe_margins(table)}")
        print("\nRandom trials, all trained to the end:\n")
        print(format_table(["choice by", "trainings", "gain"], compare_choices(table, 4000)))
        later = table.from_setting(N_FIRST[space])
        n_later = len(later.params)
        print(f"\nThe {n_later} settings recorded after the choices, best of 10 random trials:\n")
        print(format_table(["choice by", "gain"], compare_later_choices(later, 4000)))
        print(f"\n{describe_margins(later)}")
        print(f"\nA second seed for the leaders of `{args.ours}`, or more trials:\n")
        header = ["leaders", "second seed", "more trials for the same epochs", "difference"]
        print(format_table(header, compare_repeats(table, args.ours, args.repeats)))
        print()
        goals = list_goals(table, outcomes, args.ours)
        print(format_table([f"goal of `{args.ours}`", "difference", "result"], goals), flush=True)
    if args.figure:
        draw_regret(found, [args.ours, "random, none", "TPE, ASHA from 6"], args.figure)


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("--work", type=Path, required=True, help="folder of the outcomes")
    parser.add_argument("--table", type=Path, default=Path(__file__).with_name("search_curves.npz"))
    parser.add_argument("--repeats", type=int, default=200, help="simulated sweeps of each search")
    parser.add_argument("--spaces", nargs="+", default=["gairat", "lrat", "trades", "fat"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument(
        "--score-epochs",
        type=int,
        help="number of epochs that a score averages, without the margin (default: the space's)",
    )
    parser.add_argument("--epochs", type=int, default=128, help="epochs of a sweep")
    parser.add_argument(
        "--ours", default="as shipped", choices=VARIANTS, help="the search whose goals are printed"
    )
    parser.add_argument("--figure", type=Path, help="file of the figure of regret")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    {"run": run, "report": report}[args.action](args)


if __name__ == "__main__":
    main()
