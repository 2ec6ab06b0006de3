"""The papers' figures that a report can draw: what they show, and the section with them.

Each kind of figure is a spec with a field `kind`, listed in `PaperFigure`. The setting `figures` of
the stage `report` names those of a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from raysweep.attacks import PGD
from raysweep.data import Split
from raysweep.lazy_modules import torch
from raysweep.spec import Spec, describe_unknown_name
from raysweep.training.config import TrainingConfig
from raysweep.training.metric_names import list_metric_names
from raysweep.training.model_loading import EvaluationTarget

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from raysweep.comparison_plots import PlottedRun
    from raysweep.pipeline.report.document import Section
    from raysweep.plots import HistogramsByEpoch
    from raysweep.training.instance_metrics import InstanceMetrics

_KAPPA_STEPS = 10


@dataclass
class FigureSource:
    """What figures are drawn from: the first seed of each row of the report.

    Attributes:
        runs: Label of a row -> its run.
        histograms: Label of a row -> histograms of its run.
        load_target: Loads the last evaluated checkpoint of a row, by its label.
        pgd_step_curves: Curve -> number of PGD's steps -> accuracy.
    """

    runs: Mapping[str, PlottedRun]
    histograms: Mapping[str, HistogramsByEpoch]
    load_target: Callable[[str], EvaluationTarget]
    pgd_step_curves: Mapping[str, Mapping[float, float]]
    _instances: dict[tuple[str, int], InstanceMetrics] = field(default_factory=dict)

    def measure_instances(self, label: str, n_examples: int) -> InstanceMetrics:
        """Measure training examples of a row under PGD and CW of its validation; once for equal
        arguments.

        Args:
            label: Label of the row.
            n_examples: Number of examples, the first ones.

        Returns:
            Their metrics, with the attacks `pgd` and `cw`.
        """
        key = (label, n_examples)
        if key not in self._instances:
            target = self.load_target(label)
            pgd = find_row_pgd(target)
            attacks = {"pgd": pgd, "cw": pgd.replace(loss="cw")}
            split = _get_train_split(target)
            self._instances[key] = measure_target(target, split, attacks, n_examples)
        return self._instances[key]


def find_row_pgd(target: EvaluationTarget) -> PGD:
    """Return the first PGD on the cross-entropy in the validation of a checkpoint.

    Args:
        target: A checkpoint of a training run.

    Returns:
        The attack; one of raysweep's default settings if its validation has none.
    """
    assert target.checkpoint is not None
    config = target.checkpoint.config.resolve_at(target.checkpoint.epoch - 1)
    for attack in config.validation.attacks.values():
        if isinstance(attack, PGD) and attack.loss == "ce":
            return attack
    return PGD()


def measure_target(
    target: EvaluationTarget, split: Split, attacks: Mapping[str, PGD], n_examples: int
) -> InstanceMetrics:
    """Measure examples under a checkpoint, on the GPU if there is one.

    Args:
        target: A checkpoint of a training run.
        split: The examples.
        attacks: Attack name -> attack that counts kappa.
        n_examples: Number of examples, the first ones.
    """
    from raysweep.training.instance_metrics import compute_instance_metrics

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return compute_instance_metrics(target.model.to(device), split.to(device), attacks, n_examples)


def _get_train_split(target: EvaluationTarget) -> Split:
    """Return the training images of a checkpoint's run."""
    assert target.data is not None
    return target.data.train


class _FigureBase(Spec):
    """Base class of the figures."""

    caption: str
    """Text below the figure: the figure of the paper, and what differs from it."""

    def list_rows(self) -> list[str]:
        """Return the labels of the rows that the figure names."""
        return []

    def draw(self, source: FigureSource) -> Figure | None:
        """Draw the figure.

        Args:
            source: Runs and checkpoints of the report.

        Returns:
            The figure; None if the runs have nothing to draw.
        """
        raise NotImplementedError


class CurvesFigure(_FigureBase):
    """Metrics of several rows over epochs."""

    kind: Literal["curves"] = "curves"
    """Selects this figure."""
    metrics: Annotated[tuple[str, ...], Field(min_length=1)]
    """Metrics of an epoch, such as `clean`, `pgd`, `train/natural` or `train/lr`."""
    panels: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Title of a group of panels -> its rows ({}: one group of all rows)."""
    errors: bool = False
    """Plot errors instead of accuracies."""
    overlay: bool = False
    """Plot all metrics of a group in one panel."""
    weights: bool = False
    """Also plot the weights w(kappa) of each group."""

    def list_rows(self) -> list[str]:
        return [row for rows in self.panels.values() for row in rows]

    def draw(self, source: FigureSource) -> Figure | None:
        from raysweep.comparison_plots import plot_metric_grid

        measured = {
            name for run in source.runs.values() for metrics in run.history for name in metrics
        }
        # `train/robust`, for example, is measured on large data sets only.
        metrics = tuple(metric for metric in self.metrics if metric in measured)
        if not metrics:
            return None
        return plot_metric_grid(
            source.runs,
            metrics,
            self.panels or {"": tuple(source.runs)},
            as_errors=self.errors,
            is_overlaid=self.overlay,
            has_weight_functions=self.weights,
        )


class StatisticsFigure(_FigureBase):
    """Weights, errors, kappa and steepness of all rows over epochs (GAIRAT, figures 4 and 10)."""

    kind: Literal["statistics"] = "statistics"
    """Selects this figure."""
    kappa_of: str
    """Row whose kappa is plotted."""

    def list_rows(self) -> list[str]:
        return [self.kappa_of]

    def draw(self, source: FigureSource) -> Figure | None:
        from raysweep.comparison_plots import plot_training_statistics

        return plot_training_statistics(source.runs, self.kappa_of)


class WeightsFigure(_FigureBase):
    """Distribution of the instance weights of a row in its last epoch (LRAT, figure 1a)."""

    kind: Literal["weights"] = "weights"
    """Selects this figure."""
    row: str
    """The row."""
    term: str
    """Term of the loss whose weights are plotted."""

    def list_rows(self) -> list[str]:
        return [self.row]

    def draw(self, source: FigureSource) -> Figure | None:
        from raysweep.plots import plot_weight_histogram

        histograms = source.histograms[self.row]
        # Epochs that were reused from other runs have no histograms.
        epochs = [epoch for epoch in histograms if f"weight_{self.term}" in histograms[epoch]]
        if not epochs:
            return None
        return plot_weight_histogram(histograms, self.term, max(epochs))


class ClassPairsFigure(_FigureBase):
    """Logits of each pair of classes, with kappa (GAIRAT, figures 3, 7 and 8)."""

    kind: Literal["class-pairs"] = "class-pairs"
    """Selects this figure."""
    row: str
    """The row, whose last evaluated checkpoint is used."""
    per_class: Annotated[int, Field(ge=2)] = 1000
    """Number of training images of each class, the first ones."""
    attack: PGD | None = None
    """The PGD that counts kappa (null: that of the validation, with ten steps)."""

    def list_rows(self) -> list[str]:
        return [self.row]

    def draw(self, source: FigureSource) -> Figure | None:
        from raysweep.instance_plots import plot_class_pairs
        from raysweep.training.instance_metrics import select_first_of_each_class

        target = source.load_target(self.row)
        pgd = self.attack or find_row_pgd(target).replace(steps=_KAPPA_STEPS)
        split = select_first_of_each_class(_get_train_split(target), self.per_class)
        return plot_class_pairs(measure_target(target, split, {"pgd": pgd}, len(split)))


class VulnerableViewsFigure(_FigureBase):
    """Examples that are most vulnerable in one view, and in two (LRAT, figure 2)."""

    kind: Literal["vulnerable-views"] = "vulnerable-views"
    """Selects this figure."""
    rows: Annotated[tuple[str, ...], Field(min_length=1)]
    """A line of panels for each of these rows."""
    examples: Annotated[int, Field(ge=20)] = 5000
    """Number of training images, of which the most vulnerable fifth is drawn."""

    def list_rows(self) -> list[str]:
        return list(self.rows)

    def draw(self, source: FigureSource) -> Figure | None:
        from raysweep.instance_plots import plot_vulnerable_views

        return plot_vulnerable_views(
            {row: source.measure_instances(row, self.examples) for row in self.rows}
        )


class VulnerabilityFigure(_FigureBase):
    """Distributions of V under PGD and CW, with the most vulnerable fifth (LRAT, figure 4)."""

    kind: Literal["vulnerability"] = "vulnerability"
    """Selects this figure."""
    row: str
    """The row, whose last evaluated checkpoint is used."""
    examples: Annotated[int, Field(ge=20)] = 50_000
    """Number of training images."""

    def list_rows(self) -> list[str]:
        return [self.row]

    def draw(self, source: FigureSource) -> Figure | None:
        from raysweep.instance_plots import plot_vulnerability_overlap

        return plot_vulnerability_overlap(source.measure_instances(self.row, self.examples))


class PgdStepsFigure(_FigureBase):
    """Test accuracy against the number of PGD's steps (GAIRAT, figure 21)."""

    kind: Literal["pgd-steps"] = "pgd-steps"
    """Selects this figure."""

    def draw(self, source: FigureSource) -> Figure | None:
        from raysweep.pipeline.report.figures import plot_accuracy_curves

        if not source.pgd_step_curves:
            return None
        return plot_accuracy_curves(source.pgd_step_curves, "PGD steps")


PaperFigure = Annotated[
    CurvesFigure
    | StatisticsFigure
    | WeightsFigure
    | ClassPairsFigure
    | VulnerableViewsFigure
    | VulnerabilityFigure
    | PgdStepsFigure,
    Field(discriminator="kind"),
]


def find_unknown_rows(figures: Mapping[str, PaperFigure], labels: Sequence[str]) -> list[str]:
    """Find rows that figures name and that no stage has.

    Args:
        figures: Figures by name.
        labels: Labels of all rows.

    Returns:
        One line for each figure with such a row.
    """
    problems = []
    for name, figure in figures.items():
        unknown = [row for row in figure.list_rows() if row not in labels]
        if unknown:
            problems.append(
                f"figures.{name}: no row {unknown[0]!r}; the rows are {', '.join(labels)}"
            )
    return problems


def find_unknown_metrics(
    figures: Mapping[str, PaperFigure], configs: Sequence[TrainingConfig]
) -> list[str]:
    """Find metrics that figures name and that no run can have.

    Args:
        figures: Figures by name.
        configs: Configs of the rows, as far as they are known; if none is, nothing is found.

    Returns:
        One line for each such metric.
    """
    known = list(dict.fromkeys(name for config in configs for name in list_metric_names(config)))
    return [
        f"figures.{name}: {describe_unknown_name('metric', metric, known)}"
        for name, figure in figures.items()
        if isinstance(figure, CurvesFigure) and known
        for metric in figure.metrics
        if metric not in known
    ]


def draw_paper_figures(
    figures: Mapping[str, PaperFigure], source: FigureSource
) -> dict[str, Figure | None]:
    """Draw the figures of a report.

    Args:
        figures: Figures by name.
        source: Runs and checkpoints of the report.

    Returns:
        Figures by name; None for one that the runs have no data for, or one of whose rows failed.
    """
    return {
        name: figure.draw(source) if set(figure.list_rows()) <= source.runs.keys() else None
        for name, figure in figures.items()
    }


def build_paper_figure_sections(
    figures: Mapping[str, PaperFigure], drawn: Mapping[str, Figure | None]
) -> list[Section]:
    """Build the section with the figures of the paper.

    Args:
        figures: Figures by name.
        drawn: Result of `draw_paper_figures`.

    Returns:
        One section; empty without figures.
    """
    from raysweep.pipeline.report.document import CaptionedFigure, Paragraph, Section

    if not figures:
        return []
    parts: list[Paragraph | CaptionedFigure] = [
        Paragraph(
            "Runs are the first seed of their row. Accuracies and errors are of validation images "
            "(with protocol: paper, of test images) unless they say training. Files: "
            f"{', '.join(f'figures/{name}.png' for name, figure in drawn.items() if figure)}."
        )
    ]
    for name, figure in drawn.items():
        if figure is None:
            parts.append(
                Paragraph(f"{name} is not drawn: its rows have no data for it.", is_muted=True)
            )
        else:
            caption = f"{name}: {figures[name].caption}"
            parts.append(CaptionedFigure(caption, figure, is_full_width=True))
    return [Section("Figures of the paper", parts)]
