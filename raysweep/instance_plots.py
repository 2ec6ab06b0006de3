"""The papers' figures of single examples: pairs of classes, and vulnerability under two attacks.

GAIRAT is Zhang et al. 2021, LRAT is Gao et al. 2021. An example is vulnerable to an attack if its V
is small (see `true_class_confidence`), and attackable if its kappa is.
"""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from raysweep.plots import scatter_class_pair
from raysweep.text_figure import TextFigure
from raysweep.training.instance_metrics import InstanceMetrics

_TITLE_SIZE = 7
_N_HISTOGRAM_BINS = 40
_MAX_PAIR_COLUMNS = 9
# (View whose most vulnerable examples are drawn, view that colors them). The paper names the views,
# but not which panel has which.
_VIEW_PAIRS = (("GD", "CW"), ("CW", "GD"), ("PGD", "CW"), ("CW", "PGD"))


def plot_class_pairs(instances: InstanceMetrics) -> Figure:
    """Plot the logits of each pair of classes on their principal axes (GAIRAT, figures 3, 7, 8).

    Args:
        instances: Metrics of the examples, with kappa under one attack.

    Returns:
        The figure, with a panel for each pair; points of small kappa are lighter.
    """
    (kappa,) = instances.kappa.values()
    pairs = list(combinations(sorted(set(instances.y.tolist())), 2))
    n_columns = min(len(pairs), _MAX_PAIR_COLUMNS)
    n_rows = -(-len(pairs) // n_columns)
    figure = TextFigure(figsize=(1.5 * n_columns, 1.5 * n_rows), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, pair in zip(grid.flat, pairs, strict=False):
        scatter_class_pair(axes, instances.logits, instances.y, kappa, pair, size=2)
        axes.set_axis_on()
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"{pair[0]} (blue), {pair[1]} (red)", fontsize=_TITLE_SIZE)
    return figure


def plot_vulnerable_views(
    instances: Mapping[str, InstanceMetrics], vulnerable_share: float = 0.2, seed: int = 0
) -> Figure:
    """Plot which of the most vulnerable examples are so in two views (LRAT, figure 2).

    The views are the geometry distance kappa of PGD (GD), V under PGD, and V under CW. Each row is
    a t-SNE of the logits of all examples that are among the most vulnerable in any view.

    Args:
        instances: Label of a model -> metrics of its examples, with the attacks `pgd` and `cw`.
        vulnerable_share: Fraction of the examples that counts as most vulnerable, in (0, 1].
        seed: Seed of t-SNE.

    Returns:
        The figure: a row for each model, four pairs of views. A point is red if it is among the
        most vulnerable in both views of its panel, and blue if only in the first.
    """
    from sklearn.manifold import TSNE

    shape = (len(instances), len(_VIEW_PAIRS))
    figure = TextFigure(figsize=(2.3 * shape[1], 2.3 * shape[0]), layout="constrained")
    grid = figure.subplots(*shape, squeeze=False)
    for axes_of_model, (label, metrics) in zip(grid, instances.items(), strict=True):
        views = {
            view: find_most_vulnerable(values, vulnerable_share)
            for view, values in _list_views(metrics).items()
        }
        shown = torch.stack(list(views.values())).any(0)
        perplexity = min(30.0, (int(shown.sum()) - 1) / 3)
        points = np.zeros((len(shown), 2))
        points[shown.numpy()] = TSNE(perplexity=perplexity, random_state=seed).fit_transform(
            metrics.logits[shown].double().numpy()
        )
        for axes, (first, second) in zip(axes_of_model, _VIEW_PAIRS, strict=True):
            _draw_views(axes, points, views[first], views[second])
            axes.set_title(f"{label}: {first}, red: {second} too", fontsize=_TITLE_SIZE)
    return figure


def plot_vulnerability_overlap(instances: InstanceMetrics, vulnerable_share: float = 0.2) -> Figure:
    """Plot the distributions of V of all and of the most vulnerable examples (LRAT, figure 4).

    Args:
        instances: Metrics of the examples, with the attacks `pgd` and `cw`.
        vulnerable_share: Fraction of the examples that counts as most vulnerable, in (0, 1].

    Returns:
        The figure: a row for V under PGD and one for V under CW; columns for all examples, for the
        most vulnerable ones to the attack of the row, and to the other attack.
    """
    figure = TextFigure(figsize=(8.1, 4.2), layout="constrained")
    grid = figure.subplots(2, 3, sharey="row")
    colors = {"pgd": ("#f3d98b", "#b8860b"), "cw": ("#b5d0ee", "#1f4e96")}
    vulnerable = {
        name: find_most_vulnerable(instances.v[name], vulnerable_share).numpy() for name in colors
    }
    percent = f"{100 * vulnerable_share:.0f}%"
    for axes_of_view, name in zip(grid, colors, strict=True):
        other = "cw" if name == "pgd" else "pgd"
        values = instances.v[name].numpy()
        edges = np.linspace(-1.0 if values.min() < 0 else 0.0, 1.0, _N_HISTOGRAM_BINS + 1)
        for axes, ranked_by in zip(axes_of_view, (None, name, other), strict=True):
            axes.hist(values, edges, color=colors[name][0])
            title = "all examples"
            if ranked_by is not None:
                axes.hist(values[vulnerable[ranked_by]], edges, color=colors[ranked_by][1])
                title = f"dark: top {percent} vulnerable to {ranked_by.upper()}"
            axes.set_title(title, fontsize=_TITLE_SIZE + 1)
            axes.set_xlabel(f"V of {name.upper()}", fontsize=_TITLE_SIZE + 1)
            axes.tick_params(labelsize=_TITLE_SIZE)
    return figure


def find_most_vulnerable(values: Tensor, share: float) -> Tensor:
    """Find the examples with the smallest values.

    Args:
        values: V or kappa of each example, (N,).
        share: Fraction of the examples, in (0, 1]; at least 4 examples.

    Returns:
        Mask, (N,) bool. Of equal values the first examples count.
    """
    count = min(max(round(share * len(values)), 4), len(values))
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[values.argsort(stable=True)[:count]] = True
    return mask


def _list_views(instances: InstanceMetrics) -> dict[str, Tensor]:
    """Return the values of each view; small values are vulnerable."""
    return {"GD": instances.kappa["pgd"], "PGD": instances.v["pgd"], "CW": instances.v["cw"]}


def _draw_views(axes: Axes, points: np.ndarray, first: Tensor, second: Tensor) -> None:
    """Draw the most vulnerable examples of the first view; red if they are so in the second."""
    for mask, color in ((first & ~second, "blue"), (first & second, "red")):
        rows = mask.numpy()
        x, y = points[rows].T
        axes.scatter(x, y, c=color, s=3, label=str(len(x)), rasterized=True)
    axes.set_xticks([])
    axes.set_yticks([])
    # Below the panel: inside, it would hide points.
    axes.legend(
        fontsize=_TITLE_SIZE, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False
    )
