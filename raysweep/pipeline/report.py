"""The report: HTML and Markdown, and whether this is worse than last time."""

import shutil
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

from pydantic import Field

from raysweep.pipeline.artifact import Artifact, Judgement
from raysweep.pipeline.compare import EXAMPLES, differences, facts_of, paired
from raysweep.pipeline.document import Banner, Document, Section, Table, Text
from raysweep.pipeline.inside import drawn, inside
from raysweep.pipeline.paper import PaperTable, compare, paper_table
from raysweep.pipeline.register import verdict_on_chosen
from raysweep.pipeline.searched import searched
from raysweep.pipeline.sections import cost, curves, evaluation, objective, paper, provenance, registry
from raysweep.pipeline.stage import Outcome, Past, Settings, Stage, Work
from raysweep.pipeline.varied import varied
from raysweep.schedules import Number
from raysweep.spec import Json, SpecError
from raysweep.training import checkpoint
from raysweep.training.advice import advise
from raysweep.training.checkpoint import Run
from raysweep.training.load import load_checkpoint

HTML, MARKDOWN = "report.html", "report.md"


class Report(Stage):
    """What all stages before it found, beside the paper's numbers and the previous report's.

    paper: a table of `pipelines/paper`; floor: robust accuracy below which the chosen checkpoint is a regression.
    """

    kind: Literal["report"] = "report"
    paper: str | None = None
    floor: Annotated[Number, Field(ge=0, le=1)] | None = None

    def problems(self) -> list[str]:
        try:
            self._table()
        except SpecError as error:
            return error.problems
        return []

    def describe(self, settings: Settings) -> str:
        beside = f" beside {self.paper}" if self.paper else ""
        return f"{HTML} and {MARKDOWN}{beside}; a regression is exit code 1"

    def content(self, settings: Settings) -> Json:
        table = self._table()
        return {} if table is None else {"paper": table.json_dict()}

    def _table(self) -> PaperTable | None:
        return paper_table(self.paper) if self.paper else None

    def run(self, work: Work, past: Past) -> Outcome:
        best = verdict_on_chosen(past)
        since = self._since(work, past, best)
        regressions = self._regressions(best, since)
        table = self._table()
        lines = compare(table, past.judged) if table else []
        pictures = drawn(load_checkpoint(work.path(best.candidate.checkpoint), {}))
        banner = _banner(best, regressions)
        document = Document(
            title=f"raysweep {work.name}",
            under=_under(best),
            sections=[
                Section("Verdict", [banner, *_since_lines(since)]),
                *paper(table, lines),
                *evaluation(past.judged, best),
                *objective(past.judged),
                *_trained(work, past),
                inside(best.candidate.title, pictures),
                *searched(past.artifacts, work.path),
                *cost(past.artifacts),
                *registry(past.artifacts),
                provenance(past.artifacts, checkpoint.environment()),
            ],
        )

        def files(folder: Path) -> None:
            (folder / HTML).write_text(document.html())
            (folder / MARKDOWN).write_text(document.markdown())
            shutil.copy2(work.out / best.folder / EXAMPLES, folder / EXAMPLES)
            self._track(work, folder, banner.text)
            work.tracker.figures(best.run, {name: figure for name, figure in pictures.items() if name.endswith("_map")})

        facts: Json = {
            "best": best.json_dict(),
            "protocol": facts_of(best),
            "since": since,
            "regressions": regressions,
            "paper": [line._asdict() for line in lines],
            "medians": _medians(past.judged),
        }
        return Outcome(facts=facts, files=files)

    def _since(self, work: Work, past: Past, best: Judgement) -> Json:
        """What changed since the previous report of this pipeline."""
        previous = _previous(work)
        if previous is None:
            return {}
        folder, artifact = previous
        before = Judgement.load(artifact.facts["best"])
        facts: Json = {
            "when": time.strftime("%Y-%m-%d %H:%M", time.localtime(artifact.finished)),
            "best": [before.candidate.title, best.candidate.title],
            "robust": [before.robust, best.robust],
            "clean": [before.clean, best.clean],
            "different": differences(facts_of(best), artifact.facts["protocol"]),
        }
        now, then = _medians(past.judged), artifact.facts["medians"]
        facts["medians"] = {name: [then[name], now[name]] for name in now if name in then}
        test = None if facts["different"] else paired(work.out / best.folder / EXAMPLES, folder / EXAMPLES)
        return facts | ({"test": test._asdict()} if test else {})

    def _regressions(self, best: Judgement, since: Json) -> list[str]:
        lines = []
        if since.get("test", {}).get("verdict") == "worse":
            test = since["test"]
            lines.append(
                f"{best.attack} of the chosen checkpoint fell from {since['robust'][0]:.2%} to {best.robust:.2%} "
                f"({test['lost']} examples lost, {test['gained']} gained, p = {test['p']:.2g})"
            )
        if self.floor is not None and best.robust < self.floor:
            lines.append(
                f"{best.attack} of the chosen checkpoint is {best.robust:.2%}, below the floor {self.floor:.2%}"
            )
        return lines

    def _track(self, work: Work, folder: Path, verdict: str) -> None:
        """The report as a run of its own, beside those of the sweeps."""
        tags = {"raysweep.kind": "pipeline", "raysweep.pipeline": work.name, "raysweep.report": work.digest}
        run = work.tracker.run(f"{work.name} report", tags)
        for name in (HTML, MARKDOWN):
            work.tracker.file(run, folder / name, "report")
        work.tracker.describe(run, [verdict])
        work.tracker.close(run, "FINISHED")


def _previous(work: Work) -> tuple[Path, Artifact] | None:
    """The newest report of this pipeline that is not this one.

    One that saw no regression if there is any: else a fault that stays would be silent from the second night on.
    """
    found = []
    for folder in work.folder.glob("[0-9]*-report-*"):
        artifact = Artifact.read(folder)
        if artifact is not None and artifact.key != work.digest:
            found.append((not artifact.facts["regressions"], artifact.finished, folder, artifact))
    return max(found, key=lambda item: item[:2])[2:] if found else None


def _trained(work: Work, past: Past) -> list[Section]:
    """What the judged checkpoints' settings vary in, and all epochs of the first seed of each row."""
    judged = {j.candidate.checkpoint: j.candidate for j in past.judged}
    saved = {place: checkpoint.read(work.path(place)) for place in judged}
    histories: dict[str, list[dict[str, float]]] = {}
    notes: dict[str, list[str]] = {}
    for place, candidate in judged.items():
        last = Run(saved[place].path.parent).last()
        if last is not None:
            # The epochs after the best are in the last checkpoint.
            histories.setdefault(candidate.label, last.history)
            notes.setdefault(candidate.label, advise(last.config, last.history))
    configs = {place: one.config for place, one in saved.items()}
    return [*varied(past.judged, configs, past.artifacts), *curves(histories, notes)]


def _medians(judged: tuple[Judgement, ...]) -> dict[str, float]:
    """Robust accuracy of each method under each attack: what the next report compares with."""
    found: dict[str, list[float]] = {}
    for j in judged:
        found.setdefault(f"{j.candidate.method} under {j.attack}", []).append(j.robust)
    return {name: median(shares) for name, shares in found.items()}


def _under(best: Judgement) -> str:
    data, model = best.protocol["data"], best.protocol["model"]
    when = time.strftime("%Y-%m-%d %H:%M")
    examples = f"{best.examples} of {best.test_examples} test examples"
    return f"{when}; {data}, {model}, {best.norm} eps {best.eps:.4g}; {examples}"


def _banner(best: Judgement, regressions: list[str]) -> Banner:
    if regressions:
        return Banner("Regression: " + "; ".join(regressions) + ".", good=False)
    low, high = best.intervals["robust"]
    return Banner(
        f"No regression. {best.candidate.title}, chosen on validation: {best.robust:.2%} under {best.attack} "
        f"(95% {low:.2%} to {high:.2%}), {best.clean:.2%} clean.",
        good=True,
    )


def _since_lines(since: Json) -> list[Any]:
    if not since:
        return [Text("This is the first report of this pipeline.", quiet=True)]
    parts: list[Any] = [
        Table(
            [f"since {since['when']}", "before", "now"],
            [
                ["chosen checkpoint", *since["best"]],
                ["robust accuracy", *(f"{v:.2%}" for v in since["robust"])],
                ["clean accuracy", *(f"{v:.2%}" for v in since["clean"])],
                *(
                    [f"{name} (median)", *(f"{v:.2%}" for v in values)]
                    for name, values in since["medians"].items()
                    if len(since["medians"]) > 1
                ),
            ],
        )
    ]
    if since["different"]:
        parts.append(Text("Not comparable with the previous report: " + "; ".join(since["different"]) + "."))
    elif "test" in since:
        test = since["test"]
        parts.append(
            Text(
                f"McNemar's test on {test['examples']} shared examples: {test['gained']} gained, {test['lost']} lost, "
                f"p = {test['p']:.3g}: {test['verdict']}."
            )
        )
    return parts
