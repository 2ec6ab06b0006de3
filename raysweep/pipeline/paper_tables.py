"""The papers' tables as data, and what our numbers say about them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from raysweep.pipeline.artifact import EvaluationResult
from raysweep.pipeline.statistics import AccuracySummary, summarize_accuracies
from raysweep.schedules import Number
from raysweep.spec import (
    JsonDict,
    Spec,
    SpecError,
    describe_unknown_name,
    find_builtin_folder,
    read_yaml,
)

PaperVerdict = Literal["reproduced", "not reproduced", "cannot tell", "not comparable"]
NATURAL_COLUMN = "Natural"


class PaperValue(Spec):
    """A number of the paper in percent, its standard deviation if given; tolerance: in points, null
    for the table's.
    """

    value: Number
    sd: Number | None = None
    tolerance: Number | None = None


class PaperProtocol(Spec):
    """What a run must share with the paper for its numbers to be comparable; eps within 0.1%."""

    data: str
    epochs: int
    eps: Number
    norm: str = "Linf"
    examples: int


class PaperTable(Spec):
    """rows: row -> checkpoint (best, last) -> metric -> value; models: row -> network; source:
    where it stands.

    epochs: rows trained for another number than the protocol's.
    """

    source: str
    tolerance: Annotated[Number, Field(gt=0)]
    protocol: PaperProtocol
    models: dict[str, str]
    epochs: dict[str, int] = Field(default_factory=dict)
    rows: dict[str, dict[str, dict[str, PaperValue]]]
    notes: tuple[str, ...] = ()


class PaperComparison(NamedTuple):
    """Ours beside the paper's, in percent."""

    row: str
    checkpoint_kind: str
    metric: str
    ours: AccuracySummary
    paper: float
    paper_sd: float | None
    difference: float
    tolerance: float
    verdict: PaperVerdict
    reasons: tuple[str, ...]

    def to_stored_dict(self) -> JsonDict:
        """Return what a report's artifact holds, with the keys that it has had since 0.1."""
        names = {"checkpoint_kind": "which", "paper_sd": "sd"}
        return {names.get(name, name): value for name, value in self._asdict().items()}


def load_paper_table(name: str) -> PaperTable:
    """By name, from `pipelines/paper`. Raises SpecError for an unknown name."""
    folder = find_builtin_folder("pipelines") / "paper"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise SpecError(describe_unknown_name("paper table", name, known))
    return PaperTable.from_data(read_yaml(folder / f"{name}.yaml"), f"paper/{name}.yaml")


def compare_with_paper(
    table: PaperTable, evaluations: Sequence[EvaluationResult]
) -> list[PaperComparison]:
    """A line for every number of the paper that we have one for."""
    lines = []
    for row, checkpoints in table.rows.items():
        for which, metrics in checkpoints.items():
            own = [
                j
                for j in evaluations
                if j.candidate.label == row and j.candidate.checkpoint_kind == which
            ]
            for metric, value in metrics.items():
                mine = own if metric == NATURAL_COLUMN else [j for j in own if j.attack == metric]
                if mine:
                    lines.append(_compare_with_value(table, row, which, metric, value, mine))
    return lines


def _compare_with_value(
    table: PaperTable,
    row: str,
    checkpoint_kind: str,
    metric: str,
    value: PaperValue,
    evaluations: Sequence[EvaluationResult],
) -> PaperComparison:
    by_seed = {
        j.candidate.seed: j.clean if metric == NATURAL_COLUMN else j.robust for j in evaluations
    }
    ours = summarize_accuracies(list(by_seed.values()), min(j.examples for j in evaluations))
    tolerance = value.tolerance if value.tolerance is not None else table.tolerance
    reasons = _find_incomparable_reasons(table, row, evaluations[0])
    verdict = "not comparable" if reasons else decide_paper_verdict(ours, value.value, tolerance)
    difference = 100 * ours.median - value.value
    return PaperComparison(
        row,
        checkpoint_kind,
        metric,
        ours,
        value.value,
        value.sd,
        difference,
        tolerance,
        verdict,
        tuple(reasons),
    )


def decide_paper_verdict(ours: AccuracySummary, paper: float, tolerance: float) -> PaperVerdict:
    """reproduced: within the tolerance, and known as exactly; not: no value in our interval is
    within it.
    """
    low, high = 100 * ours.low, 100 * ours.high
    if high < paper - tolerance or low > paper + tolerance:
        return "not reproduced"
    exact = (high - low) / 2 <= tolerance
    return "reproduced" if exact and abs(100 * ours.median - paper) <= tolerance else "cannot tell"


def _find_incomparable_reasons(
    table: PaperTable, row: str, evaluation: EvaluationResult
) -> list[str]:
    """Why our number is about something else."""
    wanted, have = table.protocol, evaluation.protocol
    epochs = table.epochs.get(row, wanted.epochs)
    checks: list[tuple[str, Any, Any]] = [
        ("data", have["data"], wanted.data),
        ("model", have["model"], table.models.get(row, have["model"])),
        ("norm", have["norm"], wanted.norm),
    ]
    reasons = [
        f"other {what} ({mine}, not {theirs})" for what, mine, theirs in checks if mine != theirs
    ]
    if have["epochs"] != epochs:
        reasons.append(
            f"{'fewer' if have['epochs'] < epochs else 'more'} epochs ({have['epochs']}, not {epochs})"
        )
    if abs(have["eps"] - wanted.eps) > 1e-3 * wanted.eps:
        reasons.append(f"other eps ({have['eps']:.4g}, not {wanted.eps:.4g})")
    if have["examples"] != wanted.examples:
        reasons.append(f"{have['examples']} test examples, not {wanted.examples}")
    if have["train_size"] is not None:
        reasons.append(f"only {have['train_size']} training examples")
    return reasons
