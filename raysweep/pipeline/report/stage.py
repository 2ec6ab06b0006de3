"""The report: HTML and Markdown, and whether this is worse than last time."""

import shutil
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

from pydantic import Field

from raysweep.pipeline.artifact import Artifact, EvaluationResult
from raysweep.pipeline.paired_comparison import (
    EXAMPLES_FILE,
    compare_shared_examples,
    extract_comparison_protocol,
    find_protocol_differences,
)
from raysweep.pipeline.paper_tables import PaperTable, compare_with_paper, load_paper_table
from raysweep.pipeline.register import find_chosen_evaluation
from raysweep.pipeline.report.ablations import build_ablation_sections
from raysweep.pipeline.report.document import Banner, Paragraph, ReportDocument, Section, Table
from raysweep.pipeline.report.search_results import build_search_sections
from raysweep.pipeline.report.sections import (
    build_cost_sections,
    build_curve_sections,
    build_evaluation_sections,
    build_objective_sections,
    build_paper_sections,
    build_provenance_section,
    build_registry_sections,
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
)
from raysweep.schedules import Number
from raysweep.spec import JsonDict, SpecError
from raysweep.training import checkpoint
from raysweep.training.advice import advise_on_training
from raysweep.training.checkpoint import RunDirectory
from raysweep.training.model_loading import load_checkpoint_target

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"


class ReportStage(Stage):
    """What all stages before it found, beside the paper's numbers and the previous report's.

    paper: a table of `pipelines/paper`; floor: robust accuracy below which the chosen checkpoint is
    a regression.
    """

    kind: Literal["report"] = "report"
    paper: str | None = None
    floor: Annotated[Number, Field(ge=0, le=1)] | None = None

    def find_problems(self) -> list[str]:
        try:
            self._load_configured_table()
        except SpecError as error:
            return error.problems
        return []

    def describe_stage(self, training_overrides: TrainingOverrides) -> str:
        beside = f" beside {self.paper}" if self.paper else ""
        return f"{HTML_FILE} and {MARKDOWN_FILE}{beside}; a regression is exit code 1"

    def collect_digest_content(self, training_overrides: TrainingOverrides) -> JsonDict:
        table = self._load_configured_table()
        return {} if table is None else {"paper": table.to_stored_dict()}

    def _load_configured_table(self) -> PaperTable | None:
        return load_paper_table(self.paper) if self.paper else None

    def run_stage(self, context: StageContext, upstream: UpstreamResults) -> StageResult:
        best = find_chosen_evaluation(upstream)
        since = self._compare_with_previous(context, upstream, best)
        regressions = self._find_regressions(best, since)
        table = self._load_configured_table()
        lines = compare_with_paper(table, upstream.evaluations) if table else []
        pictures = draw_training_figures(
            load_checkpoint_target(context.resolve_reference(best.candidate.checkpoint), {})
        )
        banner = _build_verdict_banner(best, regressions)
        document = ReportDocument(
            title=f"raysweep {context.pipeline_name}",
            subtitle=_format_subtitle(best),
            sections=[
                Section("Verdict", [banner, *_build_changes_parts(since)]),
                *build_paper_sections(table, lines),
                *build_evaluation_sections(upstream.evaluations, best),
                *build_objective_sections(upstream.evaluations),
                *_build_training_sections(context, upstream),
                build_training_dynamics_section(best.candidate.title, pictures),
                *build_search_sections(upstream.artifacts, context.resolve_reference),
                *build_cost_sections(upstream.artifacts),
                *build_registry_sections(upstream.artifacts),
                build_provenance_section(upstream.artifacts, checkpoint.describe_environment()),
            ],
        )

        def files(folder: Path) -> None:
            (folder / HTML_FILE).write_text(document.render_html())
            (folder / MARKDOWN_FILE).write_text(document.render_markdown())
            shutil.copy2(context.out / best.folder / EXAMPLES_FILE, folder / EXAMPLES_FILE)
            self._log_report(context, folder, banner.text)
            context.tracker.log_figures(
                best.run_id,
                {name: figure for name, figure in pictures.items() if name.endswith("_map")},
            )

        facts: JsonDict = {
            "best": best.to_stored_dict(),
            "protocol": extract_comparison_protocol(best),
            "since": since,
            "regressions": regressions,
            "paper": [line.to_stored_dict() for line in lines],
            "medians": _compute_median_accuracies(upstream.evaluations),
        }
        return StageResult(facts=facts, write_files=files)

    def _compare_with_previous(
        self, context: StageContext, upstream: UpstreamResults, best_evaluation: EvaluationResult
    ) -> JsonDict:
        """What changed since the previous report of this pipeline."""
        previous = _find_previous_report(context)
        if previous is None:
            return {}
        folder, artifact = previous
        before = EvaluationResult.from_data(artifact.facts["best"], stored=True)
        facts: JsonDict = {
            "when": time.strftime("%Y-%m-%d %H:%M", time.localtime(artifact.finish_time)),
            "best": [before.candidate.title, best_evaluation.candidate.title],
            "robust": [before.robust, best_evaluation.robust],
            "clean": [before.clean, best_evaluation.clean],
            "different": find_protocol_differences(
                extract_comparison_protocol(best_evaluation), artifact.facts["protocol"]
            ),
        }
        now, then = _compute_median_accuracies(upstream.evaluations), artifact.facts["medians"]
        facts["medians"] = {name: [then[name], now[name]] for name in now if name in then}
        test = (
            None
            if facts["different"]
            else compare_shared_examples(
                context.out / best_evaluation.folder / EXAMPLES_FILE, folder / EXAMPLES_FILE
            )
        )
        return facts | ({"test": test._asdict()} if test else {})

    def _find_regressions(self, best_evaluation: EvaluationResult, changes: JsonDict) -> list[str]:
        lines = []
        if changes.get("test", {}).get("verdict") == "worse":
            test = changes["test"]
            lines.append(
                f"{best_evaluation.attack} of the chosen checkpoint fell from {changes['robust'][0]:.2%} to {best_evaluation.robust:.2%} "
                f"({test['lost']} examples lost, {test['gained']} gained, p = {test['p']:.2g})"
            )
        if self.floor is not None and best_evaluation.robust < self.floor:
            lines.append(
                f"{best_evaluation.attack} of the chosen checkpoint is {best_evaluation.robust:.2%}, below the floor {self.floor:.2%}"
            )
        return lines

    def _log_report(self, context: StageContext, folder: Path, verdict: str) -> None:
        """The report as a run of its own, beside those of the sweeps."""
        tags = {
            "raysweep.kind": "pipeline",
            "raysweep.pipeline": context.pipeline_name,
            "raysweep.report": context.stage_digest,
        }
        run = context.tracker.get_or_create_run(f"{context.pipeline_name} report", tags)
        for name in (HTML_FILE, MARKDOWN_FILE):
            context.tracker.log_file(run, folder / name, "report")
        context.tracker.set_description(run, [verdict])
        context.tracker.end_run(run, "FINISHED")


def _find_previous_report(context: StageContext) -> tuple[Path, Artifact] | None:
    """The newest report of this pipeline that is not this one.

    One that saw no regression if there is any: else a fault that stays would be silent from the
    second night on.
    """
    found = []
    for folder in context.artifacts_folder.glob("[0-9]*-report-*"):
        artifact = Artifact.read_if_finished(folder)
        if artifact is not None and artifact.key != context.stage_digest:
            found.append(
                (not artifact.facts["regressions"], artifact.finish_time, folder, artifact)
            )
    return max(found, key=lambda item: item[:2])[2:] if found else None


def _build_training_sections(context: StageContext, upstream: UpstreamResults) -> list[Section]:
    """What the judged checkpoints' settings vary in, and all epochs of the first seed of each row."""
    judged = {j.candidate.checkpoint: j.candidate for j in upstream.evaluations}
    saved = {
        place: checkpoint.read_checkpoint(context.resolve_reference(place)) for place in judged
    }
    histories: dict[str, list[dict[str, float]]] = {}
    notes: dict[str, list[str]] = {}
    for place, candidate in judged.items():
        last = RunDirectory(saved[place].path.parent).read_last_checkpoint()
        if last is not None:
            # The epochs after the best are in the last checkpoint.
            histories.setdefault(candidate.label, last.history)
            notes.setdefault(candidate.label, advise_on_training(last.config, last.history))
    configs = {place: one.config for place, one in saved.items()}
    return [
        *build_ablation_sections(upstream.evaluations, configs, upstream.artifacts),
        *build_curve_sections(histories, notes),
    ]


def _compute_median_accuracies(evaluations: tuple[EvaluationResult, ...]) -> dict[str, float]:
    """Robust accuracy of each method under each attack: what the next report compares with."""
    found: dict[str, list[float]] = {}
    for j in evaluations:
        found.setdefault(f"{j.candidate.method} under {j.attack}", []).append(j.robust)
    return {name: median(shares) for name, shares in found.items()}


def _format_subtitle(best_evaluation: EvaluationResult) -> str:
    data, model = best_evaluation.protocol["data"], best_evaluation.protocol["model"]
    when = time.strftime("%Y-%m-%d %H:%M")
    examples = f"{best_evaluation.examples} of {best_evaluation.test_examples} test examples"
    return (
        f"{when}; {data}, {model}, {best_evaluation.norm} eps {best_evaluation.eps:.4g}; {examples}"
    )


def _build_verdict_banner(best_evaluation: EvaluationResult, regressions: list[str]) -> Banner:
    if regressions:
        return Banner("Regression: " + "; ".join(regressions) + ".", is_good=False)
    low, high = best_evaluation.intervals["robust"]
    return Banner(
        f"No regression. {best_evaluation.candidate.title}, chosen on validation: {best_evaluation.robust:.2%} under {best_evaluation.attack} "
        f"(95% {low:.2%} to {high:.2%}), {best_evaluation.clean:.2%} clean.",
        is_good=True,
    )


def _build_changes_parts(changes: JsonDict) -> list[Any]:
    if not changes:
        return [Paragraph("This is the first report of this pipeline.", is_muted=True)]
    parts: list[Any] = [
        Table(
            [f"since {changes['when']}", "before", "now"],
            [
                ["chosen checkpoint", *changes["best"]],
                ["robust accuracy", *(f"{v:.2%}" for v in changes["robust"])],
                ["clean accuracy", *(f"{v:.2%}" for v in changes["clean"])],
                *(
                    [f"{name} (median)", *(f"{v:.2%}" for v in values)]
                    for name, values in changes["medians"].items()
                    if len(changes["medians"]) > 1
                ),
            ],
        )
    ]
    if changes["different"]:
        parts.append(
            Paragraph(
                "Not comparable with the previous report: " + "; ".join(changes["different"]) + "."
            )
        )
    elif "test" in changes:
        test = changes["test"]
        parts.append(
            Paragraph(
                f"McNemar's test on {test['examples']} shared examples: {test['gained']} gained, {test['lost']} lost, "
                f"p = {test['p']:.3g}: {test['verdict']}."
            )
        )
    return parts
