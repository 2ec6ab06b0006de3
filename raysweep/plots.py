"""The papers' figures of a run, each from what its training recorded: (history, histograms) -> matplotlib Figure."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from raysweep.evaluation.instances import Instances
from raysweep.training.diagnostics import LOW_WEIGHT, Histogram

History = Sequence[Mapping[str, float]]
Histograms = Mapping[int, Mapping[str, Histogram]]


def empty_axes(x: str, y: str) -> tuple[Figure, Axes]:
    """A figure of one panel, with the names of its axes."""
    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def errors(history: History) -> Figure:
    """Natural and robust training error (solid) and validation error (dashed) over epochs (G fig. 4, upper panels)."""
    figure, axes = empty_axes("epoch", "error")
    attacks = [k.removeprefix("train/kappa_median_") for k in history[-1] if k.startswith("train/kappa_median_")]
    solid = {"natural": "train/natural", **{f"under {name}": f"train/{name}" for name in attacks}}
    dashed = {"natural": "clean", "under pgd": "pgd", "worst case": "robust_worst"}
    for style, curves, split in (("-", solid, "training"), ("--", dashed, "validation")):
        for label, key in curves.items():
            epochs, values = _curve(history, key)
            if epochs:
                axes.plot(epochs, [1 - v for v in values], style, label=f"{label}, {split}")
    axes.set_ylim(0, 1)
    axes.legend()
    return figure


def kappa(history: History, attack: str) -> Figure:
    """Mean and median geometry value of the training data over epochs (G fig. 4, bottom left)."""
    figure, axes = empty_axes("epoch", "geometry value κ")
    for label, key, style in (
        ("mean", f"train/kappa_{attack}", "x-"),
        ("median", f"train/kappa_median_{attack}", "o-"),
    ):
        axes.plot(*_curve(history, key), style, label=label)
    axes.legend()
    return figure


def flatness(history: History) -> Figure:
    """Mean norm of the loss's gradient at friendly and most adversarial data (G fig. 4, bottom middle and right)."""
    figure, axes = empty_axes("epoch", "‖∇ℓ‖")
    for label in ("friendly", "adversarial"):
        axes.plot(*_curve(history, f"flatness_{label}"), label=label)
    axes.legend()
    return figure


def weight_histogram(histograms: Histograms, term: str, epoch: int | None = None) -> Figure:
    """Frequency of weights, as multiples of their mean, in the last or a given epoch (L fig. 1a)."""
    figure, axes = empty_axes(f"weight of {term} / mean", "training examples")
    _bars(axes, histograms, f"weight_{term}", epoch)
    axes.axvline(LOW_WEIGHT, color="black", linestyle=":")
    return figure


def vulnerability_histogram(histograms: Histograms, attack: str, epoch: int | None = None) -> Figure:
    """Frequency of V in the view of an attack, in the last or a given epoch (L fig. 4)."""
    figure, axes = empty_axes(f"V of {attack}", "training examples")
    _bars(axes, histograms, f"V_{attack}", epoch)
    return figure


def kappa_histogram(histograms: Histograms, attack: str, epoch: int | None = None) -> Figure:
    """Frequency of each geometry value in the last or a given epoch."""
    figure, axes = empty_axes(f"κ of {attack}", "training examples")
    _bars(axes, histograms, f"kappa_{attack}", epoch)
    return figure


def logits_map(logits: Tensor, y: Tensor, kappa: Tensor, classes: tuple[int, int]) -> Figure:
    """Two classes' logits on their two principal axes, lighter where kappa is small (G fig. 7 and 8)."""
    figure, axes = empty_axes("first principal axis", "second")
    rows = (y == classes[0]) | (y == classes[1])
    centred = (logits[rows] - logits[rows].mean(0)).double()
    _, _, axes_of_variance = torch.linalg.svd(centred, full_matrices=False)
    points = centred @ axes_of_variance[:2].T
    for label, shades in zip(classes, ("Blues", "Reds"), strict=True):
        own = y[rows] == label
        axes.scatter(points[own, 0], points[own, 1], c=kappa[rows][own], cmap=shades, s=8, vmin=-2)
    colours = ("tab:blue", "tab:red")
    axes.legend(handles=[Patch(color=c, label=f"class {label}") for c, label in zip(colours, classes, strict=True)])
    return figure


def vulnerable_map(logits: Tensor, first: Tensor, second: Tensor, share: float = 0.2, seed: int = 0) -> Figure:
    """t-SNE of the instances most vulnerable in the view of one attack; red where another attack agrees (L fig. 2).

    logits (N, classes) of natural data; first, second: V in the two views, (N,); share: how many count as vulnerable.
    """
    from sklearn.manifold import TSNE

    figure, axes = empty_axes("", "")
    count = max(round(share * len(first)), 4)
    chosen = first.argsort()[:count]
    agreed = torch.isin(chosen, second.argsort()[:count])
    perplexity = min(30.0, (count - 1) / 3)
    points = TSNE(perplexity=perplexity, random_state=seed).fit_transform(logits[chosen].double().numpy())
    for rows, colour, label in ((agreed.numpy(), "red", "consistent"), (~agreed.numpy(), "blue", "inconsistent")):
        axes.scatter(points[rows, 0], points[rows, 1], c=colour, s=6, label=f"{label}: {rows.sum()}")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend()
    return figure


def maps(seen: Instances) -> dict[str, Figure]:
    """The papers' pictures of single examples: G fig. 7 for the two classes that are confused most, L fig. 2."""
    figures = {}
    if seen.kappa:
        figures["logits_map"] = logits_map(seen.logits, seen.y, next(iter(seen.kappa.values())), seen.confused())
    if len(seen.v) > 1:
        first, second, *_ = seen.v.values()
        figures["vulnerable_map"] = vulnerable_map(seen.logits, first, second)
    return figures


def all_figures(history: History, histograms: Histograms) -> dict[str, Figure]:
    """Every figure that the records of a run allow, by name."""
    figures = {"errors": errors(history)}
    if any("flatness_friendly" in row for row in history):
        figures["flatness"] = flatness(history)
    for key in history[-1]:
        if key.startswith("train/kappa_median_"):
            attack = key.removeprefix("train/kappa_median_")
            figures[f"kappa_{attack}"] = kappa(history, attack)
    makers = {"weight": weight_histogram, "V": vulnerability_histogram, "kappa": kappa_histogram}
    for name in histograms[max(histograms)] if histograms else ():
        kind, _, of = name.partition("_")
        figures[f"{name}_histogram"] = makers[kind](histograms, of)
    return figures


def _curve(history: History, key: str) -> tuple[list[float], list[float]]:
    """Epochs that have the metric, and its values."""
    rows = [row for row in history if key in row]
    return [row["epoch"] for row in rows], [row[key] for row in rows]


def _bars(axes: Axes, histograms: Histograms, name: str, epoch: int | None) -> None:
    epoch = max(histograms) if epoch is None else epoch
    histogram = histograms[epoch][name]
    axes.stairs(histogram["counts"], histogram["edges"], fill=True)
    axes.locator_params(axis="x", nbins=6)
    axes.set_title(f"epoch {epoch}")
