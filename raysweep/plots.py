"""The papers' figures of a run, each from what its training recorded: (history, histograms) ->
matplotlib Figure.
"""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from raysweep.training.diagnostics import LOW_WEIGHT_THRESHOLD, Histogram
from raysweep.training.instance_metrics import InstanceMetrics

MetricHistory = Sequence[Mapping[str, float]]
HistogramsByEpoch = Mapping[int, Mapping[str, Histogram]]


def create_axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """A figure of one panel, with the names of its axes."""
    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def plot_errors(history: MetricHistory) -> Figure:
    """Natural and robust training error (solid) and validation error (dashed) over epochs (G fig.
    4, upper panels).
    """
    figure, axes = create_axes("epoch", "error")
    attacks = [
        k.removeprefix("train/kappa_median_")
        for k in history[-1]
        if k.startswith("train/kappa_median_")
    ]
    solid = {"natural": "train/natural", **{f"under {name}": f"train/{name}" for name in attacks}}
    dashed = {"natural": "clean", "under pgd": "pgd", "worst case": "robust_worst"}
    for style, curves, split in (("-", solid, "training"), ("--", dashed, "validation")):
        for label, key in curves.items():
            epochs, values = _select_metric(history, key)
            if epochs:
                axes.plot(epochs, [1 - v for v in values], style, label=f"{label}, {split}")
    axes.set_ylim(0, 1)
    axes.legend()
    return figure


def plot_kappa(history: MetricHistory, attack: str) -> Figure:
    """Mean and median geometry value of the training data over epochs (G fig. 4, bottom left)."""
    figure, axes = create_axes("epoch", "geometry value κ")
    for label, key, style in (
        ("mean", f"train/kappa_{attack}", "x-"),
        ("median", f"train/kappa_median_{attack}", "o-"),
    ):
        axes.plot(*_select_metric(history, key), style, label=label)
    axes.legend()
    return figure


def plot_input_gradient_norms(history: MetricHistory) -> Figure:
    """Mean norm of the loss's gradient at friendly and most adversarial data (G fig. 4, bottom
    middle and right).
    """
    figure, axes = create_axes("epoch", "‖∇ℓ‖")
    for label in ("friendly", "adversarial"):
        axes.plot(*_select_metric(history, f"flatness_{label}"), label=label)
    axes.legend()
    return figure


def plot_weight_histogram(
    histograms: HistogramsByEpoch, term: str, epoch: int | None = None
) -> Figure:
    """Frequency of weights, as multiples of their mean, in the last or a given epoch (L fig. 1a)."""
    figure, axes = create_axes(f"weight of {term} / mean", "training examples")
    _draw_histogram(axes, histograms, f"weight_{term}", epoch)
    axes.axvline(LOW_WEIGHT_THRESHOLD, color="black", linestyle=":")
    return figure


def plot_vulnerability_histogram(
    histograms: HistogramsByEpoch, attack: str, epoch: int | None = None
) -> Figure:
    """Frequency of V in the view of an attack, in the last or a given epoch (L fig. 4)."""
    figure, axes = create_axes(f"V of {attack}", "training examples")
    _draw_histogram(axes, histograms, f"V_{attack}", epoch)
    return figure


def plot_kappa_histogram(
    histograms: HistogramsByEpoch, attack: str, epoch: int | None = None
) -> Figure:
    """Frequency of each geometry value in the last or a given epoch."""
    figure, axes = create_axes(f"κ of {attack}", "training examples")
    _draw_histogram(axes, histograms, f"kappa_{attack}", epoch)
    return figure


def plot_logits_map(
    logits: Tensor, y: Tensor, kappa: Tensor, class_pair: tuple[int, int]
) -> Figure:
    """Two classes' logits on their two principal axes, lighter where kappa is small (G fig. 7 and
    8).
    """
    figure, axes = create_axes("first principal axis", "second")
    rows = (y == class_pair[0]) | (y == class_pair[1])
    centred = (logits[rows] - logits[rows].mean(0)).double()
    _, _, axes_of_variance = torch.linalg.svd(centred, full_matrices=False)
    points = centred @ axes_of_variance[:2].T
    for label, shades in zip(class_pair, ("Blues", "Reds"), strict=True):
        own = y[rows] == label
        axes.scatter(points[own, 0], points[own, 1], c=kappa[rows][own], cmap=shades, s=8, vmin=-2)
    colours = ("tab:blue", "tab:red")
    axes.legend(
        handles=[
            Patch(color=c, label=f"class {label}")
            for c, label in zip(colours, class_pair, strict=True)
        ]
    )
    return figure


def plot_vulnerable_map(
    logits: Tensor, v_first: Tensor, v_second: Tensor, vulnerable_share: float = 0.2, seed: int = 0
) -> Figure:
    """t-SNE of the instances most vulnerable in the view of one attack; red where another attack
    agrees (L fig. 2).

    logits (N, classes) of natural data; first, second: V in the two views, (N,); share: how many
    count as vulnerable.
    """
    from sklearn.manifold import TSNE

    figure, axes = create_axes("", "")
    count = max(round(vulnerable_share * len(v_first)), 4)
    chosen = v_first.argsort()[:count]
    agreed = torch.isin(chosen, v_second.argsort()[:count])
    perplexity = min(30.0, (count - 1) / 3)
    points = TSNE(perplexity=perplexity, random_state=seed).fit_transform(
        logits[chosen].double().numpy()
    )
    for rows, colour, label in (
        (agreed.numpy(), "red", "consistent"),
        (~agreed.numpy(), "blue", "inconsistent"),
    ):
        axes.scatter(
            points[rows, 0], points[rows, 1], c=colour, s=6, label=f"{label}: {rows.sum()}"
        )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend()
    return figure


def plot_instance_maps(instances: InstanceMetrics) -> dict[str, Figure]:
    """The papers' pictures of single examples: G fig. 7 for the two classes that are confused most,
    L fig. 2.
    """
    figures = {}
    if instances.kappa:
        figures["logits_map"] = plot_logits_map(
            instances.logits,
            instances.y,
            next(iter(instances.kappa.values())),
            instances.find_most_confused_classes(),
        )
    if len(instances.v) > 1:
        first, second, *_ = instances.v.values()
        figures["vulnerable_map"] = plot_vulnerable_map(instances.logits, first, second)
    return figures


def plot_run_figures(history: MetricHistory, histograms: HistogramsByEpoch) -> dict[str, Figure]:
    """Every figure that the records of a run allow, by name."""
    figures = {"errors": plot_errors(history)}
    if any("flatness_friendly" in row for row in history):
        figures["flatness"] = plot_input_gradient_norms(history)
    for key in history[-1]:
        if key.startswith("train/kappa_median_"):
            attack = key.removeprefix("train/kappa_median_")
            figures[f"kappa_{attack}"] = plot_kappa(history, attack)
    makers = {
        "weight": plot_weight_histogram,
        "V": plot_vulnerability_histogram,
        "kappa": plot_kappa_histogram,
    }
    for name in histograms[max(histograms)] if histograms else ():
        kind, _, of = name.partition("_")
        figures[f"{name}_histogram"] = makers[kind](histograms, of)
    return figures


def _select_metric(history: MetricHistory, metric: str) -> tuple[list[float], list[float]]:
    """Epochs that have the metric, and its values."""
    rows = [row for row in history if metric in row]
    return [row["epoch"] for row in rows], [row[metric] for row in rows]


def _draw_histogram(
    axes: Axes, histograms: HistogramsByEpoch, name: str, epoch: int | None
) -> None:
    epoch = max(histograms) if epoch is None else epoch
    histogram = histograms[epoch][name]
    axes.stairs(histogram["counts"], histogram["edges"], fill=True)
    axes.locator_params(axis="x", nbins=6)
    axes.set_title(f"epoch {epoch}")
