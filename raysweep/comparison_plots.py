"""The papers' figures that compare several training runs, drawn with matplotlib.

GAIRAT is Zhang et al. 2021, LRAT is Gao et al. 2021.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raysweep.attacks import PGD
from raysweep.evaluation.paired_statistics import PairedDifference
from raysweep.instance_weights import GeometryWeight, UniformWeight, WeightInputs
from raysweep.plots import MetricHistory, label_epoch_axis, select_metric
from raysweep.text_figure import TextFigure
from raysweep.training.config import TrainingConfig

_PANEL_WIDTH, _PANEL_HEIGHT = 2.7, 2.1
# Line style of matplotlib -> its name in labels.
_LINE_STYLES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dash-dotted"}
_LABEL_SIZE = 7
# Curves with more points are drawn without markers.
_MAX_MARKED_POINTS = 20


@dataclass(frozen=True)
class PlottedRun:
    """A training run in a figure.

    Attributes:
        config: Its config.
        history: Metrics of all its epochs.
    """

    config: TrainingConfig
    history: MetricHistory


def plot_metric_grid(
    runs: Mapping[str, PlottedRun],
    metrics: Sequence[str],
    panels: Mapping[str, Sequence[str]],
    *,
    as_errors: bool = False,
    is_overlaid: bool = False,
    has_weight_functions: bool = False,
) -> Figure:
    """Plot metrics of several runs over epochs, in a panel for each metric and group of runs.

    Args:
        runs: Runs by label.
        metrics: Metrics such as `clean` or `pgd`.
        panels: Title of each group -> labels of its runs.
        as_errors: Whether to plot 1 minus the accuracies.
        is_overlaid: Whether the metrics of a group share a panel, with a line style for each.
        has_weight_functions: Whether each group has a further panel with its weights w(kappa).

    Returns:
        The figure, with the larger number of panels in a row.
    """
    metric_sets = [tuple(metrics)] if is_overlaid else [(metric,) for metric in metrics]
    n_columns = len(metric_sets) + has_weight_functions
    is_turned = len(panels) > n_columns
    shape = (n_columns, len(panels)) if is_turned else (len(panels), n_columns)
    figure, grid = _create_grid(*shape)
    for group_number, (title, labels) in enumerate(panels.items()):
        group = {label: runs[label] for label in labels}
        axes_of_group = [row[group_number] for row in grid] if is_turned else grid[group_number]
        if has_weight_functions:
            draw_weight_functions(axes_of_group[0], group)
        for axes, metric_set in zip(
            axes_of_group[int(has_weight_functions) :], metric_sets, strict=True
        ):
            _draw_metrics(axes, group, metric_set, as_errors)
        axes_of_group[0].set_title(title, fontsize=_LABEL_SIZE + 1)
        # The first panel of a metric has all runs; that of the weights may lack some.
        axes_of_group[int(has_weight_functions)].legend(fontsize=_LABEL_SIZE - 1)
    return figure


def plot_run_comparison(
    runs: Mapping[str, PlottedRun],
    metrics: Sequence[str],
    differences: Mapping[str, PairedDifference],
) -> Figure:
    """Plot metrics of several runs over epochs, and their differences with intervals.

    Args:
        runs: Runs by label.
        metrics: Metrics such as `clean`, with a panel each.
        differences: Differences between accuracies, by what was compared.

    Returns:
        The figure. A difference whose interval includes 0 is grey.
    """
    figure, ((*panels, forest),) = _create_grid(1, len(metrics) + 1)
    figure.set_size_inches(
        _PANEL_WIDTH * (len(metrics) + 2), max(_PANEL_HEIGHT, 0.4 * len(differences) + 1)
    )
    for axes, metric in zip(panels, metrics, strict=True):
        _draw_metrics(axes, runs, (metric,), as_errors=False)
    panels[0].legend(fontsize=_LABEL_SIZE - 1)
    for row, pair in enumerate(differences.values()):
        color = "C0" if pair.is_told_apart else "0.5"
        forest.plot([pair.low, pair.high], [row, row], color=color, linewidth=1)
        forest.plot(pair.difference, row, "o", color=color, markersize=4)
    forest.axvline(0, color="0", linewidth=0.5)
    forest.set_yticks(range(len(differences)), list(differences))
    forest.invert_yaxis()
    forest.set_xlabel("difference in accuracy, 95% interval", fontsize=_LABEL_SIZE)
    return figure


def plot_training_statistics(runs: Mapping[str, PlottedRun], kappa_label: str) -> Figure:
    """Plot weights, errors, kappa and steepness of several runs (GAIRAT, figures 4 and 10).

    Args:
        runs: Runs by label, with `validation.flatness` and `validation.train_examples`.
        kappa_label: Label of the run whose kappa is plotted, that of AT in the paper.

    Returns:
        The figure. Training errors are solid, validation errors dashed.
    """
    figure, grid = _create_grid(2, 3)
    (weights, natural, robust), (kappa, friendly, adversarial) = grid
    draw_weight_functions(weights, runs)
    weights.legend(fontsize=_LABEL_SIZE - 1)
    for axes, metrics, y_label in (
        (natural, ("train/natural", "clean"), "natural error"),
        (robust, ("train/robust", "pgd"), "robust error"),
    ):
        _draw_metrics(axes, runs, metrics, as_errors=True)
        axes.set_ylabel(y_label, fontsize=_LABEL_SIZE)
        axes.set_title("solid: training, dashed: validation", fontsize=_LABEL_SIZE)
    _draw_kappa(kappa, runs[kappa_label])
    kappa.set_title(kappa_label, fontsize=_LABEL_SIZE)
    for axes, metric, title in (
        (friendly, "flatness_friendly", "friendly adversarial images"),
        (adversarial, "flatness_adversarial", "most adversarial images"),
    ):
        _draw_metrics(axes, runs, (metric,), as_errors=False)
        axes.set_ylabel("‖∇ℓ‖", fontsize=_LABEL_SIZE)
        axes.set_title(title, fontsize=_LABEL_SIZE)
    return figure


def draw_weight_functions(axes: Axes, runs: Mapping[str, PlottedRun]) -> None:
    """Draw the weights w(kappa) of several runs, before normalisation and after the burn-in.

    Args:
        axes: Where to draw.
        runs: Runs by label; those with other weights are left out.
    """
    for number, (label, run) in enumerate(runs.items()):
        weights = compute_weight_function(run.config)
        if weights is not None:
            axes.plot(range(len(weights)), weights, color=f"C{number % 10}", label=label)
    axes.set_xlabel("geometry value κ", fontsize=_LABEL_SIZE)
    axes.set_ylabel("weight ω", fontsize=_LABEL_SIZE)
    axes.set_ylim(bottom=0)


def compute_weight_function(config: TrainingConfig) -> list[float] | None:
    """Compute the weights w(kappa) of a run, as in its last epoch, before normalisation.

    Args:
        config: The run's config.

    Returns:
        The weights for kappa = 0, 1, ..., K. Ones if all weights are uniform; None without an
        attack with steps, or with other weights.
    """
    steps = {name: getattr(a, "steps", 0) for name, a in config.method.attacks.items()}
    for term in config.method.terms.values():
        if isinstance(term.weight, GeometryWeight):
            weight = term.weight.replace(burn_in=0).resolve_at(config.epochs - 1)
            n_steps = steps[term.weight.by or term.on.partition("+")[0]]
            return _evaluate_weight(weight, n_steps)
    is_uniform = all(isinstance(t.weight, UniformWeight) for t in config.method.terms.values())
    n_steps = next(iter(steps.values()), 0)
    return [1.0] * (n_steps + 1) if is_uniform and n_steps else None


def _evaluate_weight(weight: GeometryWeight, n_steps: int) -> list[float]:
    """Return w(kappa) for kappa = 0, 1, ..., n_steps."""
    kappa = torch.arange(n_steps + 1)
    # These weights do not depend on the logits, but on their type.
    logits = torch.zeros(len(kappa), 2, dtype=torch.float64)
    inputs = WeightInputs(logits, torch.zeros_like(kappa), kappa, n_steps)
    return [float(value) for value in weight(inputs)]


def describe_metric(metric: str, config: TrainingConfig, as_error: bool = False) -> str:
    """Describe a metric for people.

    Args:
        metric: Name of the metric, such as `pgd`.
        config: Config of a run that has it: it has the steps of the attack.
        as_error: Whether 1 minus the metric is meant.

    Returns:
        For example `error under PGD-20`.
    """
    what = "error" if as_error else "accuracy"
    names = {
        "clean": f"natural {what}",
        "robust_worst": f"{what} in the worst case",
        "train/natural": f"natural training {what}",
        "train/robust": f"training {what} under PGD-{config.validation.train_steps}",
        "train/lr": "learning rate",
    }
    if metric in names:
        return names[metric]
    attack = config.validation.attacks.get(metric)
    if isinstance(attack, PGD):
        kind = {"ce": "PGD", "cw": "CW"}.get(attack.loss, f"PGD ({attack.loss})")
        return f"{what} under {kind}-{attack.steps}"
    return metric


def _create_grid(n_rows: int, n_columns: int) -> tuple[Figure, list[list[Axes]]]:
    """Create a figure with rows of small panels."""
    size = (_PANEL_WIDTH * n_columns, _PANEL_HEIGHT * n_rows)
    figure = TextFigure(figsize=size, layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    for axes in grid.flat:
        axes.tick_params(labelsize=_LABEL_SIZE)
    return figure, [list(row) for row in grid]


def _draw_metrics(
    axes: Axes, runs: Mapping[str, PlottedRun], metrics: Sequence[str], as_errors: bool
) -> None:
    """Draw metrics over epochs: a color for each run, a line style for each metric."""
    names: dict[str, None] = {}
    for number, (label, run) in enumerate(runs.items()):
        for metric, line_style in zip(metrics, _LINE_STYLES, strict=False):
            is_error = as_errors and metric != "train/lr"
            epochs, values = select_metric(run.history, metric)
            if not epochs:
                continue
            axes.plot(
                epochs,
                [1 - value for value in values] if is_error else values,
                line_style,
                marker="." if len(epochs) <= _MAX_MARKED_POINTS else None,
                linewidth=1,
                color=f"C{number % 10}",
                label=label if metric == metrics[0] else None,
            )
            line_name = f" ({_LINE_STYLES[line_style]})" if len(metrics) > 1 else ""
            names[describe_metric(metric, run.config, is_error) + line_name] = None
    label_epoch_axis(axes, _LABEL_SIZE)
    axes.set_ylabel("\n".join(names), fontsize=_LABEL_SIZE)


def _draw_kappa(axes: Axes, run: PlottedRun) -> None:
    """Draw mean and median kappa of the first attack that counts it."""
    prefix = "train/kappa_median_"
    names = [name for name in run.history[-1] if name.startswith(prefix)]
    for label, metric, marker in (
        ("mean", names[0].replace("median_", "") if names else "", "x"),
        ("median", names[0] if names else "", "o"),
    ):
        epochs, values = select_metric(run.history, metric)
        axes.plot(epochs, values, marker, markersize=3, linestyle="-", linewidth=0.5, label=label)
    label_epoch_axis(axes, _LABEL_SIZE)
    axes.set_ylabel("geometry value κ", fontsize=_LABEL_SIZE)
    axes.legend(fontsize=_LABEL_SIZE - 1)
