"""Figures of the report."""

import math
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from raysweep.pipeline.artifact import EvaluationResult
from raysweep.pipeline.published_results import PaperComparison
from raysweep.plots import create_axes, create_epoch_axes
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import Distribution, param_labels
from raysweep.sweep.trial import Trial
from raysweep.text_figure import TextFigure

History = Sequence[Mapping[str, float]]

_MAX_SLICE_COLUMNS = 3


def format_metric_name(metric: str) -> str:
    """Return the name of a metric for people, such as `robust worst`."""
    return metric.replace("_", " ")


def plot_metric_curves(histories: Mapping[str, History], metric: str, y_label: str) -> Figure:
    """Plot a metric of several runs over their epochs.

    Args:
        histories: Metrics of all epochs of each run; epochs without the metric are skipped.
        metric: Name of the metric.
        y_label: Label of the vertical axis.
    """
    figure, axes = create_epoch_axes(y_label)
    for name, history in histories.items():
        rows = [row for row in history if metric in row]
        epochs, values = [row["epoch"] for row in rows], [row[metric] for row in rows]
        axes.plot(epochs, values, "o-", markersize=3, label=name)
    axes.legend(fontsize=8)
    return figure


def plot_param_slices(ledger: Ledger) -> Figure:
    """Plot the score or objective of every trial against each parameter; later ones are darker.

    Failed trials are left out. Each parameter has the scale of its distribution.

    Args:
        ledger: The sweep.
    """
    metric, space = ledger.space.objectives[0], ledger.space.space
    scored = [
        trial for trial in ledger.load_trials() if metric in trial.best and trial.state != "failed"
    ]
    labels = param_labels(list(space))
    n_columns = min(len(space), _MAX_SLICE_COLUMNS)
    n_rows = -(-len(space) // n_columns)
    figure = TextFigure(figsize=(0.6 + 3 * n_columns, 2.6 * n_rows), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True)
    for axes, (path, distribution) in zip(grid.flat, space.items(), strict=False):
        _set_param_scale(axes, distribution)
        _scatter_param(axes, scored, path, distribution, metric)
        axes.set_xlabel(labels[path], fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in list(grid.flat)[len(space) :]:
        axes.set_axis_off()
    for row in grid:
        row[0].set_ylabel(format_metric_name(ledger.space.score_name), fontsize=9)
    return figure


def _scatter_param(
    axes: Axes, trials: Sequence[Trial], path: str, distribution: Distribution, metric: str
) -> None:
    """Plot the metric of the trials that have a parameter against its value."""
    with_param = [trial for trial in trials if path in trial.params]
    values = [trial.params[path] for trial in with_param]
    if distribution.categorical:
        values = [str(value) for value in values]
    dots = axes.scatter(
        values,
        [trial.score(metric) for trial in with_param],
        c=[trial.number for trial in with_param],
        cmap="Blues",
        vmin=-len(trials) / 2,
        vmax=len(trials),
        s=22,
        edgecolors="#33475b",
        linewidths=0.5,
    )
    dots.set_clip_on(False)


def _set_param_scale(axes: Axes, distribution: Distribution) -> None:
    """Show the whole range of a parameter, or all choices in the order of the search space."""
    if distribution.categorical:
        choices = [str(choice) for choice in distribution.categorical]
        axes.plot(choices, [math.nan] * len(choices))
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
    """Plot the importances of parameters.

    Args:
        importances: Share of the variance of the metric that each parameter explains, in [0, 1].
        metric: Name of the metric.
    """
    figure = TextFigure(
        figsize=(4.4, max(1.6, 0.9 + 0.34 * len(importances))), layout="constrained"
    )
    axes = figure.subplots()
    labels = param_labels(list(importances))
    bars = axes.barh([labels[path] for path in importances], list(importances.values()), 0.6)
    axes.bar_label(bars, [f"{share:.0%}" for share in importances.values()], padding=3, fontsize=8)
    axes.set_xlim(0, 1.08)
    axes.invert_yaxis()
    axes.set_xlabel(f"share of the variance of {format_metric_name(metric)}")
    return figure


def plot_pareto_front(
    trials: Sequence[Trial],
    front: Sequence[Trial],
    x_metric: str,
    y_metric: str,
    get_score: Callable[[Trial, str], float] = Trial.score,
) -> Figure:
    """Plot the trials in two metrics of their best epochs, and join those of the Pareto front.

    Args:
        trials: All trials.
        front: Trials of the Pareto front; they are numbered.
        x_metric: Metric of the horizontal axis.
        y_metric: Metric of the vertical axis.
        get_score: Returns a metric of a trial.
    """
    figure, axes = create_axes(format_metric_name(x_metric), format_metric_name(y_metric))
    dominated = [trial for trial in trials if trial not in front]
    axes.scatter(
        [get_score(trial, x_metric) for trial in dominated],
        [get_score(trial, y_metric) for trial in dominated],
        s=20,
        color="#9fb0c3",
        label="beaten",
    )
    ordered = sorted(front, key=lambda trial: get_score(trial, x_metric))
    axes.plot(
        [get_score(trial, x_metric) for trial in ordered],
        [get_score(trial, y_metric) for trial in ordered],
        "o--",
        color="#b3261e",
        label="Pareto front",
    )
    for trial in ordered:
        point = (get_score(trial, x_metric), get_score(trial, y_metric))
        _annotate_point(axes, f"{trial.number:04d}", point, offset=(4, 4))
    axes.margins(0.12)
    axes.legend(fontsize=8)
    return figure


def plot_accuracy_curves(
    accuracy_curves: Mapping[str, Mapping[float, float]], x_label: str
) -> Figure:
    """Plot test accuracy against one setting.

    Args:
        accuracy_curves: For each curve, the accuracy by value of the setting. `NAME, best` and
            `NAME, last` share a color; the line of the last epoch is dashed.
        x_label: Label of the horizontal axis.
    """
    figure, axes = create_axes(x_label, "test accuracy")
    colors: dict[str, str] = {}
    for name, points in accuracy_curves.items():
        values = sorted(points)
        accuracies = [points[value] for value in values]
        row, _, checkpoint_kind = name.rpartition(", ")
        color = colors.setdefault(row, f"C{len(colors) % 10}")
        style = "o--" if checkpoint_kind == "last" else "o-"
        axes.plot(values, accuracies, style, color=color, markersize=4, label=name)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def plot_accuracy_after_attacks(evaluations: Mapping[str, EvaluationResult]) -> Figure:
    """Plot the accuracy that remains after each attack of a cascade.

    Args:
        evaluations: Evaluations by the name of their curve.
    """
    figure, axes = create_axes("", "test accuracy")
    for name, evaluation in evaluations.items():
        steps = {"clean": evaluation.clean, **evaluation.accuracy_after}
        axes.plot(list(steps), list(steps.values()), "o-", label=name)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def plot_accuracy_per_class(evaluations: Mapping[str, EvaluationResult]) -> Figure:
    """Plot the robust accuracy of each class as bars.

    Args:
        evaluations: Evaluations by the name of their bars.
    """
    figure, axes = create_axes("class", "robust test accuracy")
    width = 0.8 / max(len(evaluations), 1)
    for number, (name, evaluation) in enumerate(evaluations.items()):
        classes = list(evaluation.per_class)
        shares = [evaluation.per_class[c]["robust_accuracy"] for c in classes]
        positions = range(len(classes))
        axes.bar([x + number * width for x in positions], shares, width, label=name)
        axes.set_xticks([x + 0.4 - width / 2 for x in positions], classes)
    axes.legend(fontsize=8)
    return figure


def plot_objective_vs_autoattack(
    evaluations: Sequence[EvaluationResult], scores: Sequence[float]
) -> Figure:
    """Plot AutoAttack's accuracy on the test set against the objective on validation.

    Args:
        evaluations: Results of AutoAttack.
        scores: Objective of each evaluated checkpoint.
    """
    figure, axes = create_axes("objective on validation", "AutoAttack on test")
    axes.scatter(scores, [evaluation.robust for evaluation in evaluations], s=20)
    for evaluation, score in zip(evaluations, scores, strict=True):
        point = (score, evaluation.robust)
        _annotate_point(axes, evaluation.candidate.label, point, offset=(4, 3))
    axes.margins(x=0.15)
    _draw_diagonal(axes)
    return figure


def plot_paper_comparison(comparisons: Sequence[PaperComparison]) -> Figure:
    """Plot our medians with 95% intervals, and the paper's numbers with their tolerance.

    Args:
        comparisons: Our results beside the paper's, one for each row of the figure.
    """
    figure = TextFigure(figsize=(6.4, 0.9 + 0.3 * len(comparisons)), layout="constrained")
    axes = figure.subplots()
    positions = list(range(len(comparisons)))
    axes.barh(
        positions,
        [2 * c.tolerance for c in comparisons],
        0.7,
        [c.paper - c.tolerance for c in comparisons],
        color="#dfe6ef",
        label="paper, with tolerance",
    )
    for position, c in zip(positions, comparisons, strict=True):
        low, middle, high = (100 * share for share in (c.ours.low, c.ours.median, c.ours.high))
        # Rounding can put the median a little outside of the interval.
        errors = [[max(middle - low, 0)], [max(high - middle, 0)]]
        axes.errorbar(middle, position, xerr=errors, fmt="o", color="#1f5fa8", capsize=3)
        axes.plot([c.paper] * 2, [position - 0.35, position + 0.35], color="black")
    labels = [f"{c.row} {c.metric} ({c.checkpoint_kind})" for c in comparisons]
    axes.set_yticks(positions, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, % (dots: ours with 95% interval; bars: paper)")
    return figure


def _annotate_point(
    axes: Axes, text: str, point: tuple[float, float], offset: tuple[float, float]
) -> None:
    """Write small text beside a point; `offset` is in points of typography."""
    axes.annotate(text, point, fontsize=7, xytext=offset, textcoords="offset points")


def _draw_diagonal(axes: Axes) -> None:
    """Draw the line of equal values over the visible range."""
    low = min(*axes.get_xlim(), *axes.get_ylim())
    high = max(*axes.get_xlim(), *axes.get_ylim())
    axes.plot([low, high], [low, high], ":", color="grey", linewidth=1)
