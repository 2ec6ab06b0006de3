"""Contents of a report: its sections and figures, from the results of all stages."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from raysweep.comparison_plots import PlottedRun
from raysweep.formatting import format_local_time
from raysweep.pipeline.artifact import EvaluationResult
from raysweep.pipeline.facts import ReportChanges, SweepFacts
from raysweep.pipeline.published_results import PaperComparison, PaperTable
from raysweep.pipeline.report.ablations import build_ablation_sections, collect_pgd_step_curves
from raysweep.pipeline.report.document import (
    Banner,
    Paragraph,
    ReportDocument,
    Section,
    SectionPart,
    Table,
)
from raysweep.pipeline.report.paper_figures import (
    FigureSource,
    PaperFigure,
    build_paper_figure_sections,
    draw_paper_figures,
)
from raysweep.pipeline.report.search_results import build_search_sections
from raysweep.pipeline.report.sections import (
    build_cost_sections,
    build_curve_sections,
    build_evaluation_sections,
    build_objective_sections,
    build_paper_comparison_sections,
    build_provenance_section,
    build_registry_sections,
    build_row_note_sections,
)
from raysweep.pipeline.report.training_dynamics import (
    build_training_dynamics_section,
    draw_training_figures,
)
from raysweep.pipeline.stage import (
    StageContext,
    UpstreamResults,
    describe_evaluated_threat_conflict,
)
from raysweep.training import checkpoint
from raysweep.training.checkpoint import RunDirectory, TrainingCheckpoint
from raysweep.training.diagnostics import read_histograms
from raysweep.training.metric_advice import advise_on_training
from raysweep.training.model_loading import load_checkpoint_target

FIGURES_FOLDER = "figures"
_PNG_DPI = 100


class ReportContents:
    """Draws the figures of a report and builds its document.

    Args:
        context: Folders and services.
        upstream: Results of the stages before.
        best: Evaluation of the chosen checkpoint.
        figures: Figures of the paper, by name.

    Attributes:
        figures: Figures of the chosen checkpoint, by name.
        paper_figures: Figures of the paper, by name; None for one that the runs have no data for.
    """

    def __init__(
        self,
        context: StageContext,
        upstream: UpstreamResults,
        best: EvaluationResult,
        figures: Mapping[str, PaperFigure],
    ) -> None:
        self._context, self._upstream, self._best = context, upstream, best
        self._figure_settings = figures
        self.figures = draw_training_figures(
            load_checkpoint_target(context.resolve_reference(best.candidate.checkpoint), {})
        )
        self.paper_figures: dict[str, Figure | None] = {}
        if figures:
            source = _make_figure_source(context, upstream)
            self.paper_figures = draw_paper_figures(figures, source)

    def build_document(
        self,
        changes: ReportChanges | None,
        regressions: list[str],
        table: PaperTable | None,
        comparisons: list[PaperComparison],
    ) -> tuple[ReportDocument, str]:
        """Build the document.

        Args:
            changes: Comparison with the previous report; None without one.
            regressions: Regressions, a line each.
            table: Table of a paper, or None.
            comparisons: Comparisons with its numbers.

        Returns:
            The document, and its verdict in one line.
        """
        upstream, best = self._upstream, self._best
        row_notes = _collect_row_notes(upstream, table)
        banner = _build_verdict_banner(best, regressions, upstream.evaluations)
        document = ReportDocument(
            title=f"raysweep {self._context.pipeline_name}",
            subtitle=_format_subtitle(best),
            sections=[
                Section("Verdict", [banner, *_build_changes_parts(changes)]),
                *build_paper_comparison_sections(table, comparisons, row_notes),
                *([] if table else build_row_note_sections(row_notes)),
                *build_paper_figure_sections(self._figure_settings, self.paper_figures),
                *_build_result_sections(self._context, upstream, best, self.figures),
            ],
        )
        return document, banner.text

    def write_paper_figures(self, folder: Path) -> None:
        """Write the figures of the paper that were drawn as PNG files.

        Args:
            folder: Folder of the artifact.
        """
        drawn = {name: figure for name, figure in self.paper_figures.items() if figure is not None}
        if drawn:
            (folder / FIGURES_FOLDER).mkdir()
        for name, figure in drawn.items():
            figure.savefig(folder / FIGURES_FOLDER / f"{name}.png", dpi=_PNG_DPI)


def _build_result_sections(
    context: StageContext,
    upstream: UpstreamResults,
    best_evaluation: EvaluationResult,
    figures: dict[str, Figure],
) -> list[Section]:
    """Build the sections about the results of all stages; `figures` are of the best checkpoint."""
    environment = checkpoint.describe_environment()
    return [
        *build_evaluation_sections(upstream.evaluations, best_evaluation),
        *build_objective_sections(upstream.evaluations),
        *_build_training_sections(context, upstream),
        build_training_dynamics_section(best_evaluation.candidate.title, figures),
        *build_search_sections(upstream.artifacts, context.resolve_reference),
        *build_cost_sections(upstream.artifacts),
        *build_registry_sections(upstream.artifacts),
        build_provenance_section(upstream.artifacts, environment),
    ]


def _build_training_sections(context: StageContext, upstream: UpstreamResults) -> list[Section]:
    """Build the sections about the training of the evaluated checkpoints.

    Curves show all epochs of the first seed of each row.
    """
    references = dict.fromkeys(e.candidate.checkpoint for e in upstream.evaluations)
    configs = {
        reference: checkpoint.read_checkpoint(context.resolve_reference(reference)).config
        for reference in references
    }
    last_checkpoints = _load_last_checkpoints(context, upstream)
    histories = {label: last.history for label, last in last_checkpoints.items()}
    advice = {
        label: advise_on_training(last.config, last.history)
        for label, last in last_checkpoints.items()
    }
    return [
        *build_ablation_sections(upstream.evaluations, configs, upstream.artifacts),
        *build_curve_sections(histories, advice),
    ]


def _load_last_checkpoints(
    context: StageContext, upstream: UpstreamResults
) -> dict[str, TrainingCheckpoint]:
    """Load the last checkpoint of the first seed of each row; it has the metrics of all epochs."""
    last_checkpoints: dict[str, TrainingCheckpoint] = {}
    for evaluation in upstream.evaluations:
        candidate = evaluation.candidate
        if candidate.label not in last_checkpoints:
            # The last checkpoint has the epochs after the best one too.
            folder = context.resolve_reference(candidate.checkpoint).parent
            last = RunDirectory(folder).read_last_checkpoint()
            if last is not None:
                last_checkpoints[candidate.label] = last
    return last_checkpoints


def _make_figure_source(context: StageContext, upstream: UpstreamResults) -> FigureSource:
    """Collect what figures are drawn from."""
    last_checkpoints = _load_last_checkpoints(context, upstream)
    # Of the first seed the last epoch, if it was evaluated.
    references: dict[str, str] = {}
    seeds: dict[str, int] = {}
    for evaluation in upstream.evaluations:
        candidate = evaluation.candidate
        is_first_seed = candidate.seed == seeds.setdefault(candidate.label, candidate.seed)
        is_last = candidate.checkpoint_kind == "last"
        if is_first_seed and (is_last or candidate.label not in references):
            references[candidate.label] = candidate.checkpoint
    return FigureSource(
        runs={
            label: PlottedRun(last.config, last.history) for label, last in last_checkpoints.items()
        },
        histograms={
            label: read_histograms(last.path.parent) for label, last in last_checkpoints.items()
        },
        load_target=lambda label: load_checkpoint_target(
            context.resolve_reference(references[label]), {}
        ),
        pgd_step_curves=collect_pgd_step_curves(upstream.evaluations, upstream.artifacts),
    )


def _format_subtitle(best_evaluation: EvaluationResult) -> str:
    """Describe time, data, network, threat model and number of examples."""
    protocol = best_evaluation.protocol
    return (
        f"{format_local_time(time.time())}; {protocol['data']}, {protocol['model']}, "
        f"{best_evaluation.norm} eps {best_evaluation.eps:.4g}; "
        f"{best_evaluation.describe_examples()}"
    )


def _collect_row_notes(
    upstream: UpstreamResults, table: PaperTable | None
) -> dict[str, tuple[str, ...]]:
    """Collect what the paper's table and the presets say of each row."""
    row_notes = dict(table.row_notes) if table else {}
    for artifact in upstream.artifacts:
        for label, notes in artifact.read_facts(SweepFacts).row_notes.items():
            row_notes[label] = (*row_notes.get(label, ()), *notes)
    return row_notes


def _build_verdict_banner(
    best_evaluation: EvaluationResult,
    regressions: list[str],
    evaluations: Sequence[EvaluationResult],
) -> Banner:
    """Build the line that states the regressions, or that there is none.

    Checkpoints that were attacked with different radii are not ranked.
    """
    if regressions:
        return Banner("Regression: " + "; ".join(regressions) + ".", is_good=False)
    if conflict := describe_evaluated_threat_conflict(evaluations):
        return Banner(
            f"Not ranked: the rows have different threat models, {conflict}. Accuracies at one of "
            "them say nothing about another."
        )
    low, high = best_evaluation.intervals["robust"]
    return Banner(
        f"No regression. {best_evaluation.candidate.title}, chosen on validation: "
        f"{best_evaluation.robust:.2%} under {best_evaluation.attack} "
        f"(95% {low:.2%} to {high:.2%}), {best_evaluation.clean:.2%} clean.",
        is_good=True,
    )


def _build_changes_parts(changes: ReportChanges | None) -> list[SectionPart]:
    """Build the comparison with the previous report."""
    if changes is None:
        return [Paragraph("This is the first report of this pipeline.", is_muted=True)]
    rows = [
        ["chosen checkpoint", *changes.best],
        ["robust accuracy", *(f"{v:.2%}" for v in changes.robust)],
        ["clean accuracy", *(f"{v:.2%}" for v in changes.clean)],
    ]
    # The median of a single method would repeat the robust accuracy.
    if len(changes.medians) > 1:
        for name, values in changes.medians.items():
            rows.append([f"{name} (median)", *(f"{v:.2%}" for v in values)])
    parts: list[SectionPart] = [Table([f"since {changes.previous_time}", "before", "now"], rows)]
    if changes.protocol_differences:
        differences = "; ".join(changes.protocol_differences)
        parts.append(Paragraph(f"Not comparable with the previous report: {differences}."))
    elif changes.test:
        test = changes.test
        parts.append(
            Paragraph(
                f"McNemar's test on {test.examples} shared examples: {test.gained} gained, "
                f"{test.lost} lost, p = {test.p:.3g}: {test.verdict}."
            )
        )
    return parts
