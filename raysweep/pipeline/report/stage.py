"""The report stage: writes HTML and Markdown, and detects regressions."""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, ClassVar, Literal

from matplotlib.figure import Figure
from pydantic import Field

from raysweep.checkpoint_evaluation import EXAMPLES_FILE
from raysweep.comparison_plots import PlottedRun
from raysweep.pipeline.artifact import Artifact, EvaluationResult
from raysweep.pipeline.facts import ReportChanges, ReportFacts, SweepFacts
from raysweep.pipeline.paired_comparison import (
    compare_shared_examples,
    extract_comparison_protocol,
    find_protocol_differences,
)
from raysweep.pipeline.published_results import (
    PaperTable,
    compare_with_paper,
    load_paper_table,
)
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
    format_time,
)
from raysweep.pipeline.report.training_dynamics import (
    build_training_dynamics_section,
    draw_training_figures,
)
from raysweep.pipeline.stage import (
    Stage,
    StageContext,
    StageResult,
    TrainingOverrides,
    UpstreamResults,
    describe_evaluated_threat_conflict,
    find_best_candidate_evaluation,
)
from raysweep.schedules import Number
from raysweep.spec import JsonDict, SpecError
from raysweep.training import checkpoint
from raysweep.training.checkpoint import RunDirectory, TrainingCheckpoint
from raysweep.training.diagnostics import read_histograms
from raysweep.training.metric_advice import advise_on_training
from raysweep.training.model_loading import load_checkpoint_target

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"
FIGURES_FOLDER = "figures"
_FIGURE_NAME = r"^[A-Za-z0-9][\w-]*$"
_PNG_DPI = 100


class ReportStage(Stage):
    """Reports all results, beside a paper's numbers and the previous report."""

    later_fields: ClassVar[frozenset[str]] = frozenset({"figures"})

    kind: Literal["report"] = "report"
    paper: str | None = None
    """Name of a table in `pipelines/paper` to compare with (null: none)."""
    floor: Annotated[Number, Field(ge=0, le=1)] | None = None
    """Robust accuracy below which the best checkpoint is a regression (null: no limit)."""
    figures: dict[Annotated[str, Field(pattern=_FIGURE_NAME)], PaperFigure] = Field(
        default_factory=dict
    )
    """Figures of the paper, by name: letters, digits, `-`, `_`."""

    def find_problems(self) -> list[str]:
        try:
            self._load_configured_table()
        except SpecError as error:
            return error.problems
        return []

    def describe_stage(self, training_overrides: TrainingOverrides) -> str:
        beside = f" beside {self.paper}" if self.paper else ""
        return f"{HTML_FILE} and {MARKDOWN_FILE}{beside}; a regression is exit code 5"

    def collect_digest_content(self, training_overrides: TrainingOverrides) -> JsonDict:
        table = self._load_configured_table()
        return {} if table is None else {"paper": table.to_stored_dict()}

    def _load_configured_table(self) -> PaperTable | None:
        """Load the table to compare with, if there is one."""
        return load_paper_table(self.paper) if self.paper else None

    def run_stage(self, context: StageContext, upstream: UpstreamResults) -> StageResult:
        best = find_best_candidate_evaluation(upstream)
        changes = self._compare_with_previous(context, upstream, best)
        regressions = self._find_regressions(best, changes)
        table = self._load_configured_table()
        comparisons = compare_with_paper(table, upstream.evaluations) if table else []
        row_notes = _collect_row_notes(upstream, table)
        figures = draw_training_figures(
            load_checkpoint_target(context.resolve_reference(best.candidate.checkpoint), {})
        )
        paper_figures = {}
        if self.figures:
            source = _make_figure_source(context, upstream)
            paper_figures = draw_paper_figures(self.figures, source)
        banner = _build_verdict_banner(best, regressions, upstream.evaluations)
        document = ReportDocument(
            title=f"raysweep {context.pipeline_name}",
            subtitle=_format_subtitle(best),
            sections=[
                Section("Verdict", [banner, *_build_changes_parts(changes)]),
                *build_paper_comparison_sections(table, comparisons, row_notes),
                *([] if table else build_row_note_sections(row_notes)),
                *build_paper_figure_sections(self.figures, paper_figures),
                *_build_result_sections(context, upstream, best, figures),
            ],
        )

        def write_files(folder: Path) -> None:
            (folder / HTML_FILE).write_text(document.render_html(), encoding="utf-8")
            (folder / MARKDOWN_FILE).write_text(document.render_markdown(), encoding="utf-8")
            _write_figures(folder, paper_figures)
            shutil.copy2(context.out / best.folder / EXAMPLES_FILE, folder / EXAMPLES_FILE)
            context.records.write(lambda: self._log_report(context, document, banner.text))
            maps = {name: figure for name, figure in figures.items() if name.endswith("_map")}
            if best.run_id:
                context.records.write(lambda: context.tracker.log_figures(best.run_id, maps))

        facts = ReportFacts(
            best=best,
            protocol=extract_comparison_protocol(best),
            changes=changes,
            regressions=tuple(regressions),
            paper=tuple(comparisons),
            medians=_compute_median_accuracies(upstream.evaluations),
        )
        return StageResult(facts=facts, write_files=write_files)

    def _compare_with_previous(
        self, context: StageContext, upstream: UpstreamResults, best_evaluation: EvaluationResult
    ) -> ReportChanges | None:
        """Compare with the previous report of this pipeline; None if there is none."""
        previous = _find_previous_report(context)
        if previous is None:
            return None
        folder, artifact = previous
        old = artifact.read_facts(ReportFacts)
        differences = find_protocol_differences(
            extract_comparison_protocol(best_evaluation), old.protocol
        )
        test = None
        if not differences:
            test = compare_shared_examples(
                (context.resolve_reference(best_evaluation.folder) / EXAMPLES_FILE).working_path,
                folder / EXAMPLES_FILE,
            )
        medians = _compute_median_accuracies(upstream.evaluations)
        return ReportChanges(
            previous_time=format_time(artifact.finish_time),
            best=(old.best.candidate.title, best_evaluation.candidate.title),
            robust=(old.best.robust, best_evaluation.robust),
            clean=(old.best.clean, best_evaluation.clean),
            protocol_differences=tuple(differences),
            medians={
                name: (old.medians[name], value)
                for name, value in medians.items()
                if name in old.medians
            },
            test=test,
        )

    def _find_regressions(
        self, best_evaluation: EvaluationResult, changes: ReportChanges | None
    ) -> list[str]:
        """Describe each regression in one line."""
        subject = f"{best_evaluation.attack} of the chosen checkpoint"
        robust = best_evaluation.robust
        lines = []
        test = changes.test if changes else None
        if changes and test and test.verdict == "worse":
            lines.append(
                f"{subject} fell from {changes.robust[0]:.2%} to {robust:.2%} "
                f"({test.lost} examples lost, {test.gained} gained, p = {test.p:.2g})"
            )
        if self.floor is not None and robust < self.floor:
            lines.append(f"{subject} is {robust:.2%}, below the floor {self.floor:.2%}")
        return lines

    def _log_report(self, context: StageContext, document: ReportDocument, verdict: str) -> None:
        """Log the report as an MLflow run of its own, beside those of the sweeps."""
        tags = {
            "raysweep.kind": "pipeline",
            "raysweep.pipeline": context.pipeline_name,
            "raysweep.report": context.stage_digest,
        }
        run_id = context.tracker.get_or_create_run(f"{context.pipeline_name} report", tags)
        context.tracker.log_text(run_id, document.render_html(), f"report/{HTML_FILE}")
        context.tracker.log_text(run_id, document.render_markdown(), f"report/{MARKDOWN_FILE}")
        context.tracker.set_description(run_id, [verdict])
        context.tracker.end_run(run_id, "FINISHED")


def _write_figures(folder: Path, figures: Mapping[str, Figure | None]) -> None:
    """Write the figures that were drawn as PNG files."""
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    if drawn:
        (folder / FIGURES_FOLDER).mkdir()
    for name, figure in drawn.items():
        figure.savefig(folder / FIGURES_FOLDER / f"{name}.png", dpi=_PNG_DPI)


def _find_previous_report(context: StageContext) -> tuple[Path, Artifact] | None:
    """Find the newest other report of this pipeline, and its folder.

    Reports without a regression are preferred. Otherwise a lasting regression would be reported in
    the first night only.
    """
    reports = []
    for folder in context.artifacts_folder.glob("[0-9]*-report-*"):
        artifact = Artifact.read_if_finished(folder)
        if artifact is not None and artifact.key != context.stage_digest:
            is_good = not artifact.read_facts(ReportFacts).regressions
            reports.append((is_good, artifact.finish_time, folder, artifact))
    if not reports:
        return None
    _, _, folder, artifact = max(reports, key=lambda report: report[:2])
    return folder, artifact


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


def _compute_median_accuracies(evaluations: tuple[EvaluationResult, ...]) -> dict[str, float]:
    """Compute the median robust accuracy of each method under each attack."""
    accuracies: dict[str, list[float]] = {}
    for evaluation in evaluations:
        name = f"{evaluation.candidate.method} under {evaluation.attack}"
        accuracies.setdefault(name, []).append(evaluation.robust)
    return {name: median(values) for name, values in accuracies.items()}


def _format_subtitle(best_evaluation: EvaluationResult) -> str:
    """Describe time, data, network, threat model and number of examples."""
    protocol = best_evaluation.protocol
    return (
        f"{format_time(time.time())}; {protocol['data']}, {protocol['model']}, "
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
