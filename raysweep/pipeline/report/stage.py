"""The report stage: writes HTML and Markdown, and detects regressions."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from raysweep.bounded_files import read_regular_file
from raysweep.checkpoint_evaluation import EXAMPLES_FILE
from raysweep.formatting import format_local_time
from raysweep.pipeline.artifact import Artifact, EvaluationResult
from raysweep.pipeline.facts import ReportChanges, ReportFacts
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
from raysweep.pipeline.report.paper_figures import PaperFigure
from raysweep.pipeline.stage import (
    Stage,
    StageContext,
    StageResult,
    TrainingOverrides,
    UpstreamResults,
    find_best_candidate_evaluation,
)
from raysweep.schedules import Number
from raysweep.spec import JsonDict, SpecError
from raysweep.tracking import Tracker

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"
_FIGURE_NAME = r"^[A-Za-z0-9][\w-]*$"


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
        # Figures import matplotlib and torch, which settings do not need.
        from raysweep.pipeline.report.contents import ReportContents

        best = find_best_candidate_evaluation(upstream)
        changes = self._compare_with_previous(context, upstream, best)
        regressions = self._find_regressions(best, changes)
        table = self._load_configured_table()
        comparisons = compare_with_paper(table, upstream.evaluations) if table else []
        contents = ReportContents(context, upstream, best, self.figures)
        document, verdict = contents.build_document(changes, regressions, table, comparisons)

        def write_files(folder: Path) -> None:
            # Drawing the figures takes most of the stage's time.
            reports = {HTML_FILE: document.render_html(), MARKDOWN_FILE: document.render_markdown()}
            for file_name, text in reports.items():
                (folder / file_name).write_text(text, encoding="utf-8")
            contents.write_paper_figures(folder)
            shutil.copy2(context.out / best.folder / EXAMPLES_FILE, folder / EXAMPLES_FILE)
            # MLflow gets texts instead of paths: the folder is renamed when it is complete.
            name, digest = context.pipeline_name, context.stage_digest
            context.records.write(
                lambda: _log_report(context.tracker, name, digest, reports, verdict)
            )
            figures = contents.figures
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
            verdict=verdict,
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
            previous_time=format_local_time(artifact.finish_time),
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


def log_report_files(
    tracker: Tracker, pipeline_name: str, stage_digest: str, folder: Path, verdict: str
) -> None:
    """Log the report of a finished stage to its MLflow run.

    Args:
        tracker: Client of the store.
        pipeline_name: Name of the pipeline.
        stage_digest: Digest of the stage.
        folder: Folder of its artifact.
        verdict: The report in one line.
    """
    reports = {
        name: read_regular_file(folder / name).decode() for name in (HTML_FILE, MARKDOWN_FILE)
    }
    _log_report(tracker, pipeline_name, stage_digest, reports, verdict)


def _log_report(
    tracker: Tracker,
    pipeline_name: str,
    stage_digest: str,
    reports: Mapping[str, str],
    verdict: str,
) -> None:
    """Log the report as an MLflow run of its own, beside those of the sweeps."""
    tags = {
        "raysweep.kind": "pipeline",
        "raysweep.pipeline": pipeline_name,
        "raysweep.report": stage_digest,
    }
    run_id = tracker.get_or_create_run(f"{pipeline_name} report", tags)
    for name, text in reports.items():
        tracker.log_text(run_id, text, f"report/{name}")
    tracker.set_description(run_id, [verdict] if verdict else [])
    tracker.end_run(run_id, "FINISHED")


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


def _compute_median_accuracies(evaluations: tuple[EvaluationResult, ...]) -> dict[str, float]:
    """Compute the median robust accuracy of each method under each attack."""
    accuracies: dict[str, list[float]] = {}
    for evaluation in evaluations:
        name = f"{evaluation.candidate.method} under {evaluation.attack}"
        accuracies.setdefault(name, []).append(evaluation.robust)
    return {name: median(values) for name, values in accuracies.items()}
