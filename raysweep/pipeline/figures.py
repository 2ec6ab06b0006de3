"""The report's pictures: curves of what was promoted, the searched settings, attacks, the paper's numbers."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raysweep.pipeline.artifact import Judgement
from raysweep.pipeline.paper import Comparison
from raysweep.sweep.space import labels

History = Sequence[Mapping[str, float]]
_SLICES = 6


def curves(histories: Mapping[str, History], metric: str, label: str) -> Figure:
    """A metric of several runs over their epochs."""
    figure, axes = _figure("epoch", label)
    for name, history in histories.items():
        rows = [row for row in history if metric in row]
        axes.plot([row["epoch"] for row in rows], [row[metric] for row in rows], "o-", markersize=3, label=name)
    axes.legend(fontsize=8)
    return figure


def slices(trials: Sequence[Mapping[str, Any]], metric: str) -> Figure:
    """The objective of every trial against each searched setting."""
    scored = [t for t in trials if t["score"] is not None]
    paths = list(dict.fromkeys(path for t in scored for path in t["settings"]))[:_SLICES]
    short = labels(paths)
    across = min(len(paths), 3)
    down = -(-len(paths) // across)
    figure = Figure(figsize=(3 * across, 2.6 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes, path in zip(grid.flat, paths, strict=False):
        points = [(t["settings"][path], t["score"]) for t in scored if path in t["settings"]]
        words = not all(isinstance(x, Real) for x, _ in points)
        axes.scatter([str(x) if words else x for x, _ in points], [y for _, y in points], s=14)
        axes.set_xlabel(short[path], fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in list(grid.flat)[len(paths) :]:
        axes.set_axis_off()
    for row in grid:
        row[0].set_ylabel(metric.replace("_", " "), fontsize=9)
    return figure


def after_attacks(judged: Mapping[str, Judgement]) -> Figure:
    """Accuracy that is left after each attack of the cascade."""
    figure, axes = _figure("", "test accuracy")
    for name, judgement in judged.items():
        steps = {"clean": judgement.clean, **judgement.after}
        axes.plot(list(steps), list(steps.values()), "o-", label=name)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def per_class(judged: Mapping[str, Judgement]) -> Figure:
    """Robust accuracy of each class."""
    figure, axes = _figure("class", "robust test accuracy")
    width = 0.8 / max(len(judged), 1)
    for number, (name, judgement) in enumerate(judged.items()):
        names = list(judgement.per_class)
        shares = [judgement.per_class[c]["robust_accuracy"] for c in names]
        axes.bar([x + number * width for x in range(len(names))], shares, width, label=name)
        axes.set_xticks([x + 0.4 - width / 2 for x in range(len(names))], names)
    axes.legend(fontsize=8)
    return figure


def objective_against_autoattack(judged: Sequence[Judgement]) -> Figure:
    """What the sweep went by against what AutoAttack says."""
    figure, axes = _figure("objective on validation", "AutoAttack on test")
    axes.scatter([j.candidate.objective for j in judged], [j.robust for j in judged], s=20)
    for j in judged:
        axes.annotate(j.candidate.label, (j.candidate.objective, j.robust), fontsize=7, xytext=(4, 3),
                      textcoords="offset points")  # fmt: skip
    _diagonal(axes)
    return figure


def against_paper(lines: Sequence[Comparison]) -> Figure:
    """Our medians with 95% intervals, and the paper's numbers with their tolerance."""
    figure = Figure(figsize=(6.4, 0.9 + 0.3 * len(lines)), layout="constrained")
    axes = figure.subplots()
    places = list(range(len(lines)))
    axes.barh(places, [2 * c.tolerance for c in lines], 0.7, [c.paper - c.tolerance for c in lines],
              color="#dfe6ef", label="paper, with tolerance")  # fmt: skip
    for place, c in zip(places, lines, strict=True):
        low, middle, high = (100 * v for v in (c.ours.low, c.ours.median, c.ours.high))
        axes.errorbar(middle, place, xerr=[[max(middle - low, 0)], [max(high - middle, 0)]], fmt="o", color="#1f5fa8",
                      capsize=3)  # fmt: skip
        axes.plot([c.paper] * 2, [place - 0.35, place + 0.35], color="black")
    axes.set_yticks(places, [f"{c.row} {c.metric} ({c.which})" for c in lines], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, % (dots: ours with 95% interval; bars: paper)")
    return figure


def _diagonal(axes: Axes) -> None:
    low = min(*axes.get_xlim(), *axes.get_ylim())
    high = max(*axes.get_xlim(), *axes.get_ylim())
    axes.plot([low, high], [low, high], ":", color="grey", linewidth=1)


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes
