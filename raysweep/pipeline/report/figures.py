"""The report's pictures: curves of what was promoted, the searched settings, attacks, the paper's
numbers.
"""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from raysweep.pipeline.artifact import EvaluationResult
from raysweep.pipeline.paper_tables import PaperComparison
from raysweep.plots import create_axes
from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.search_space import Distribution, param_labels

History = Sequence[Mapping[str, float]]


def plot_metric_curves(histories: Mapping[str, History], metric: str, y_label: str) -> Figure:
    """A metric of several runs over their epochs."""
    figure, axes = create_axes("epoch", y_label)
    for name, history in histories.items():
        rows = [row for row in history if metric in row]
        axes.plot(
            [row["epoch"] for row in rows],
            [row[metric] for row in rows],
            "o-",
            markersize=3,
            label=name,
        )
    axes.legend(fontsize=8)
    return figure


def plot_param_slices(ledger: Ledger) -> Figure:
    """The objective of every trial against each searched setting, on its distribution's own scale;
    darker: later.
    """
    metric, space = ledger.space.objectives[0], ledger.space.space
    scored = [trial for trial in ledger.load_trials() if metric in trial.best]
    short = param_labels(list(space))
    across = min(len(space), 3)
    down = -(-len(space) // across)
    figure = Figure(figsize=(0.6 + 3 * across, 2.6 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes, (path, distribution) in zip(grid.flat, space.items(), strict=False):
        own = [trial for trial in scored if path in trial.params]
        _set_param_scale(axes, distribution)
        values = [trial.params[path] for trial in own]
        dots = axes.scatter(
            [str(v) for v in values] if distribution.categorical else values,
            [trial.score(metric) for trial in own],
            c=[trial.number for trial in own],
            cmap="Blues", vmin=-len(scored) / 2, vmax=len(scored), s=22, edgecolors="#33475b", linewidths=0.5,
        )  # fmt: skip
        dots.set_clip_on(False)
        axes.set_xlabel(short[path], fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in list(grid.flat)[len(space) :]:
        axes.set_axis_off()
    for row in grid:
        row[0].set_ylabel(format_metric_name(metric), fontsize=9)
    return figure


def _set_param_scale(axes: Axes, distribution: Distribution) -> None:
    """The range that was searched, or every choice in the order of the file."""
    if distribution.categorical:
        axes.plot(
            [str(choice) for choice in distribution.categorical],
            [math.nan] * len(distribution.categorical),
        )
        axes.margins(x=0.2)
        return
    low, high = distribution.bounds_or_choices()
    axes.set_xlim(low, high)
    if distribution.log:
        axes.set_xscale("log")
        ticks = [low, math.sqrt(low * high), high]
        axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())


def plot_param_importances(importances: Mapping[str, float], metric: str) -> Figure:
    """What share of the objective's variance each searched setting explains."""
    figure = Figure(figsize=(4.4, max(1.6, 0.9 + 0.34 * len(importances))), layout="constrained")
    axes = figure.subplots()
    short = param_labels(list(importances))
    bars = axes.barh([short[path] for path in importances], list(importances.values()), 0.6)
    axes.bar_label(bars, [f"{share:.0%}" for share in importances.values()], padding=3, fontsize=8)
    axes.set_xlim(0, 1.08)
    axes.invert_yaxis()
    axes.set_xlabel(f"share of the variance of {format_metric_name(metric)}")
    return figure


def plot_pareto_front(
    trials: Sequence[Trial], front: Sequence[Trial], x_metric: str, y_metric: str
) -> Figure:
    """Every trial in two objectives, each at its best epoch; those that no other beats are joined
    and numbered.
    """
    figure, axes = create_axes(format_metric_name(x_metric), format_metric_name(y_metric))
    rest = [trial for trial in trials if trial not in front]
    axes.scatter(
        [t.score(x_metric) for t in rest],
        [t.score(y_metric) for t in rest],
        s=20,
        color="#9fb0c3",
        label="beaten",
    )
    best = sorted(front, key=lambda trial: trial.score(x_metric))
    axes.plot(
        [t.score(x_metric) for t in best],
        [t.score(y_metric) for t in best],
        "o--",
        color="#b3261e",
        label="Pareto front",
    )
    for trial in best:
        axes.annotate(f"{trial.number:04d}", (trial.score(x_metric), trial.score(y_metric)), fontsize=7, xytext=(4, 4),
                      textcoords="offset points")  # fmt: skip
    axes.margins(0.12)
    axes.legend(fontsize=8)
    return figure


def plot_accuracy_curves(
    accuracy_curves: Mapping[str, Mapping[float, float]], x_label: str
) -> Figure:
    """Test accuracy against one setting: {curve: {value: accuracy}}."""
    figure, axes = create_axes(x_label, "test accuracy")
    for name, points in accuracy_curves.items():
        axes.plot(
            sorted(points),
            [points[value] for value in sorted(points)],
            "o-",
            markersize=4,
            label=name,
        )
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def format_metric_name(metric: str) -> str:
    return metric.replace("_", " ")


def plot_accuracy_after_attacks(evaluations: Mapping[str, EvaluationResult]) -> Figure:
    """Accuracy that is left after each attack of the cascade."""
    figure, axes = create_axes("", "test accuracy")
    for name, judgement in evaluations.items():
        steps = {"clean": judgement.clean, **judgement.accuracy_after}
        axes.plot(list(steps), list(steps.values()), "o-", label=name)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def plot_accuracy_per_class(evaluations: Mapping[str, EvaluationResult]) -> Figure:
    """Robust accuracy of each class."""
    figure, axes = create_axes("class", "robust test accuracy")
    width = 0.8 / max(len(evaluations), 1)
    for number, (name, judgement) in enumerate(evaluations.items()):
        names = list(judgement.per_class)
        shares = [judgement.per_class[c]["robust_accuracy"] for c in names]
        axes.bar([x + number * width for x in range(len(names))], shares, width, label=name)
        axes.set_xticks([x + 0.4 - width / 2 for x in range(len(names))], names)
    axes.legend(fontsize=8)
    return figure


def plot_objective_vs_autoattack(
    evaluations: Sequence[EvaluationResult], scores: Sequence[float]
) -> Figure:
    """What the sweep went by, `scores`, against what AutoAttack says."""
    figure, axes = create_axes("objective on validation", "AutoAttack on test")
    axes.scatter(scores, [j.robust for j in evaluations], s=20)
    for j, score in zip(evaluations, scores, strict=True):
        axes.annotate(j.candidate.label, (score, j.robust), fontsize=7, xytext=(4, 3),
                      textcoords="offset points")  # fmt: skip
    axes.margins(x=0.15)
    _draw_diagonal(axes)
    return figure


def plot_paper_comparison(comparisons: Sequence[PaperComparison]) -> Figure:
    """Our medians with 95% intervals, and the paper's numbers with their tolerance."""
    figure = Figure(figsize=(6.4, 0.9 + 0.3 * len(comparisons)), layout="constrained")
    axes = figure.subplots()
    places = list(range(len(comparisons)))
    axes.barh(places, [2 * c.tolerance for c in comparisons], 0.7, [c.paper - c.tolerance for c in comparisons],
              color="#dfe6ef", label="paper, with tolerance")  # fmt: skip
    for place, c in zip(places, comparisons, strict=True):
        low, middle, high = (100 * v for v in (c.ours.low, c.ours.median, c.ours.high))
        axes.errorbar(middle, place, xerr=[[max(middle - low, 0)], [max(high - middle, 0)]], fmt="o", color="#1f5fa8",
                      capsize=3)  # fmt: skip
        axes.plot([c.paper] * 2, [place - 0.35, place + 0.35], color="black")
    axes.set_yticks(
        places, [f"{c.row} {c.metric} ({c.checkpoint_kind})" for c in comparisons], fontsize=8
    )
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, % (dots: ours with 95% interval; bars: paper)")
    return figure


def _draw_diagonal(axes: Axes) -> None:
    low = min(*axes.get_xlim(), *axes.get_ylim())
    high = max(*axes.get_xlim(), *axes.get_ylim())
    axes.plot([low, high], [low, high], ":", color="grey", linewidth=1)
