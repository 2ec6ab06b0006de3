"""The papers' figures of a training run, drawn with matplotlib from its metrics and histograms.

GAIRAT is Zhang et al. 2021, LRAT is Gao et al. 2021. V is a confidence that is small where the
model is vulnerable (see `true_class_confidence`). κ (kappa) is the number of an attack's iterates
that are classified correctly.
"""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from raysweep.text_figure import TextFigure
from raysweep.training.diagnostics import LOW_WEIGHT_THRESHOLD, Histogram
from raysweep.training.instance_metrics import InstanceMetrics

MetricHistory = Sequence[Mapping[str, float]]
"""Metrics of each epoch in order; each has the key `epoch`."""

HistogramsByEpoch = Mapping[int, Mapping[str, Histogram]]
"""Epoch, from 1 -> name such as `kappa_pgd` -> histogram; see `training.diagnostics`."""


def create_axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """Create a figure with one panel.

    Args:
        x_label: Label of the horizontal axis.
        y_label: Label of the vertical axis.

    Returns:
        The figure and its axes.
    """
    # A constrained layout would draw everything twice.
    figure = TextFigure(figsize=(4.4, 3.2))
    figure.subplots_adjust(left=0.16, right=0.97, bottom=0.15, top=0.94)
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def create_epoch_axes(y_label: str) -> tuple[Figure, Axes]:
    """Create a figure with one panel over epochs.

    Args:
        y_label: Label of the vertical axis.

    Returns:
        The figure and its axes.
    """
    figure, axes = create_axes("", y_label)
    label_epoch_axis(axes)
    return figure, axes


def label_epoch_axis(axes: Axes, font_size: float | None = None) -> None:
    """Label the horizontal axis of a panel over epochs; its ticks are whole numbers.

    Args:
        axes: The panel.
        font_size: Size of the label in points (None: matplotlib's default).
    """
    axes.set_xlabel("epoch", fontsize=font_size)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))


def select_metric(history: MetricHistory, metric: str) -> tuple[list[float], list[float]]:
    """Select a metric from the epochs that have it.

    Args:
        history: Metrics of the run.
        metric: Name of the metric.

    Returns:
        The epochs, from 1, and the values.
    """
    rows = [metrics for metrics in history if metric in metrics]
    return [metrics["epoch"] for metrics in rows], [metrics[metric] for metrics in rows]


def plot_errors(history: MetricHistory) -> Figure:
    """Plot natural and robust errors over epochs (GAIRAT, figure 4, upper panels).

    Training errors are solid, validation errors dashed. Robust training errors are those of fixed
    images in eval mode (`validation.train_examples`); if the run has none, those of the training
    steps, in train mode and under the attack of the training.

    Args:
        history: Metrics of the run, at least one epoch.

    Returns:
        The figure; curves without a value are left out.
    """
    figure, axes = create_epoch_axes("error")
    training = {"natural": "train/natural", "under pgd": "train/robust"}
    if not any("train/robust" in metrics for metrics in history):
        for attack in _list_kappa_attacks(history):
            training[f"under {attack} in train mode"] = f"train/{attack}"
    validation = {"natural": "clean", "under pgd": "pgd", "worst case": "robust_worst"}
    for style, curves, split in (("-", training, "training"), ("--", validation, "validation")):
        for label, metric in curves.items():
            epochs, accuracies = select_metric(history, metric)
            if epochs:
                errors = [1 - accuracy for accuracy in accuracies]
                axes.plot(epochs, errors, style, label=f"{label}, {split}")
    axes.set_ylim(0, 1)
    axes.legend()
    return figure


def plot_kappa(history: MetricHistory, attack: str) -> Figure:
    """Plot mean and median kappa of the training data (GAIRAT, figure 4, bottom left).

    Args:
        history: Metrics of the run, at least one epoch.
        attack: Name of a training attack that counts kappa.

    Returns:
        The figure.
    """
    figure, axes = create_epoch_axes("geometry value κ")
    for label, metric, style in (
        ("mean", f"train/kappa_{attack}", "x-"),
        ("median", f"train/kappa_median_{attack}", "o-"),
    ):
        axes.plot(*select_metric(history, metric), style, label=label)
    axes.legend()
    return figure


def plot_input_gradient_norms(history: MetricHistory) -> Figure:
    """Plot the norm of the loss's input gradient (GAIRAT, figure 4, bottom middle and right).

    Args:
        history: Metrics of a run with `validation.flatness`.

    Returns:
        The figure, with means at friendly and at PGD-20 adversarial examples of the validation
        split.
    """
    figure, axes = create_epoch_axes("‖∇ℓ‖")
    for label in ("friendly", "adversarial"):
        axes.plot(*select_metric(history, f"flatness_{label}"), label=label)
    axes.legend()
    return figure


def plot_weight_histogram(
    histograms: HistogramsByEpoch, term: str, epoch: int | None = None
) -> Figure:
    """Plot the distribution of a term's instance weights (LRAT, figure 1a).

    Args:
        histograms: Histograms of the run.
        term: Name of a term of the loss.
        epoch: Epoch, from 1; by default the last.

    Returns:
        The figure, with weights as multiples of their batch's mean.
    """
    x_label = f"weight of {term} / mean; last bar: and larger"
    figure, axes = create_axes(x_label, "training examples")
    _draw_histogram(axes, histograms, f"weight_{term}", epoch)
    axes.axvline(LOW_WEIGHT_THRESHOLD, color="black", linestyle=":")
    return figure


def plot_vulnerability_histogram(
    histograms: HistogramsByEpoch, attack: str, epoch: int | None = None
) -> Figure:
    """Plot the distribution of V under an attack (LRAT, figure 4).

    Args:
        histograms: Histograms of the run.
        attack: Name of a training attack.
        epoch: Epoch, from 1; by default the last.

    Returns:
        The figure.
    """
    figure, axes = create_axes(f"V of {attack}", "training examples")
    _draw_histogram(axes, histograms, f"V_{attack}", epoch)
    return figure


def plot_kappa_histogram(
    histograms: HistogramsByEpoch, attack: str, epoch: int | None = None
) -> Figure:
    """Plot the distribution of kappa.

    Args:
        histograms: Histograms of the run.
        attack: Name of a training attack that counts kappa.
        epoch: Epoch, from 1; by default the last.

    Returns:
        The figure.
    """
    figure, axes = create_axes(f"κ of {attack}", "training examples")
    _draw_histogram(axes, histograms, f"kappa_{attack}", epoch)
    return figure


def plot_logits_map(
    logits: Tensor, y: Tensor, kappa: Tensor, class_pair: tuple[int, int]
) -> Figure:
    """Plot the logits of two classes on their first two principal axes (GAIRAT, figures 7 and 8).

    Args:
        logits: Logits of natural images, (N, classes).
        y: Labels, (N,).
        kappa: kappa of each example, (N,); points of small kappa are lighter.
        class_pair: The two labels.

    Returns:
        The figure.
    """
    figure, axes = create_axes("first principal axis", "second")
    scatter_class_pair(axes, logits, y, kappa, class_pair, size=8)
    colors = ("tab:blue", "tab:red")
    axes.legend(
        handles=[
            Patch(color=color, label=f"class {label}")
            for label, color in zip(class_pair, colors, strict=True)
        ]
    )
    return figure


def scatter_class_pair(
    axes: Axes,
    logits: Tensor,
    y: Tensor,
    kappa: Tensor,
    class_pair: tuple[int, int],
    size: float,
) -> None:
    """Draw the logits of two classes on their first two principal axes.

    Args:
        axes: Where to draw.
        logits: Logits of natural images, (N, classes).
        y: Labels, (N,).
        kappa: kappa of each example, (N,); points of small kappa are lighter.
        class_pair: The two labels; the first is blue, the second red.
        size: Area of a point, in square points of typography.
    """
    rows = (y == class_pair[0]) | (y == class_pair[1])
    centred = (logits[rows] - logits[rows].mean(0)).double()
    _, _, principal_axes = torch.linalg.svd(centred, full_matrices=False)
    points = centred @ principal_axes[:2].T
    for label, color_map in zip(class_pair, ("Blues", "Reds"), strict=True):
        members = y[rows] == label
        axes.scatter(
            points[members, 0],
            points[members, 1],
            c=kappa[rows][members],
            cmap=color_map,
            s=size,
            vmin=-2,
            vmax=max(int(kappa.max()), 1),
            rasterized=True,
        )


def plot_vulnerable_map(
    logits: Tensor, v_first: Tensor, v_second: Tensor, vulnerable_share: float = 0.2, seed: int = 0
) -> Figure:
    """Plot a t-SNE of the examples that are most vulnerable to one attack (LRAT, figure 2).

    A point is red if the example is also among the most vulnerable to a second attack, else blue.

    Args:
        logits: Logits of natural images, (N, classes).
        v_first: V under the first attack, (N,).
        v_second: V under the second attack, (N,).
        vulnerable_share: Fraction of the examples that is drawn, in (0, 1]; at least 4 examples.
        seed: Seed of t-SNE.

    Returns:
        The figure.
    """
    from sklearn.manifold import TSNE

    figure, axes = create_axes("", "")
    count = max(round(vulnerable_share * len(v_first)), 4)
    vulnerable = v_first.argsort()[:count]
    is_consistent = torch.isin(vulnerable, v_second.argsort()[:count])
    perplexity = min(30.0, (count - 1) / 3)
    points = TSNE(perplexity=perplexity, random_state=seed).fit_transform(
        logits[vulnerable].double().numpy()
    )
    for rows, color, label in (
        (is_consistent.numpy(), "red", "consistent"),
        (~is_consistent.numpy(), "blue", "inconsistent"),
    ):
        axes.scatter(points[rows, 0], points[rows, 1], c=color, s=6, label=f"{label}: {rows.sum()}")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend()
    return figure


def plot_instance_maps(instances: InstanceMetrics) -> dict[str, Figure]:
    """Plot the papers' maps of single examples.

    Args:
        instances: Metrics of the examples.

    Returns:
        `logits_map`, the two classes that the model confuses most (GAIRAT, figure 7), if an attack
        counts kappa; `vulnerable_map` (LRAT, figure 2), if there are two attacks.
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
    """Plot every figure for which the run has metrics or histograms.

    Args:
        history: Metrics of the run, at least one epoch.
        histograms: Histograms of the run; may be empty.

    Returns:
        Name, such as `errors` or `kappa_pgd_histogram` -> figure.
    """
    figures = {"errors": plot_errors(history)}
    if any("flatness_friendly" in metrics for metrics in history):
        figures["flatness"] = plot_input_gradient_norms(history)
    for attack in _list_kappa_attacks(history):
        figures[f"kappa_{attack}"] = plot_kappa(history, attack)
    if not histograms:
        return figures
    plot_functions = {
        "weight": plot_weight_histogram,
        "V": plot_vulnerability_histogram,
        "kappa": plot_kappa_histogram,
    }
    for name in histograms[max(histograms)]:
        kind, _, attack_or_term = name.partition("_")
        figures[f"{name}_histogram"] = plot_functions[kind](histograms, attack_or_term)
    return figures


def _list_kappa_attacks(history: MetricHistory) -> list[str]:
    """List the training attacks whose kappa is among the metrics of the last epoch."""
    prefix = "train/kappa_median_"
    return [name.removeprefix(prefix) for name in history[-1] if name.startswith(prefix)]


def _draw_histogram(
    axes: Axes, histograms: HistogramsByEpoch, name: str, epoch: int | None
) -> None:
    """Draw one histogram of an epoch, by default the last."""
    epoch = max(histograms) if epoch is None else epoch
    histogram = histograms[epoch][name]
    axes.stairs(histogram["counts"], histogram["edges"], fill=True)
    axes.locator_params(axis="x", nbins=6)
    # At its usual size the title would not fit above the panel.
    axes.set_title(f"epoch {epoch}", fontsize="small", pad=3)
