"""Tables of the papers as data, and the comparison of results with them."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from raysweep.pipeline.artifact import EvaluationResult, StageFacts
from raysweep.pipeline.statistics import AccuracySummary, summarize_accuracies
from raysweep.schedules import Number
from raysweep.spec import Spec, SpecError, describe_unknown_name, find_builtin_folder
from raysweep.yaml_files import read_yaml

PaperVerdict = Literal["reproduced", "not reproduced", "cannot tell", "not comparable"]
NATURAL_COLUMN = "Natural"


class PaperValue(Spec):
    """A number of a paper's table."""

    value: Number
    """Accuracy in percent."""
    sd: Number | None = None
    """Standard deviation over the paper's runs in percentage points, if it states one."""
    tolerance: Number | None = None
    """Largest difference that counts as reproduced, in percentage points (null: the table's)."""


class PaperProtocol(Spec):
    """Settings that a run must share with the paper for its numbers to be comparable."""

    data: str
    """Name of the data set."""
    epochs: int
    """Number of training epochs."""
    eps: Number
    """Radius of the perturbations, in units of pixel values in [0, 1]; compared to within 0.1%."""
    norm: str = "Linf"
    """Norm of the perturbations."""
    examples: int
    """Number of attacked test examples."""


class PaperTable(Spec):
    """A table of a paper."""

    later_fields: ClassVar[frozenset[str]] = frozenset({"eps", "row_notes", "references"})

    source: str
    """Paper and number of the table."""
    tolerance: Annotated[Number, Field(gt=0)]
    """Largest difference that counts as reproduced, in percentage points."""
    protocol: PaperProtocol
    """Settings behind the numbers of the table."""
    models: dict[str, str]
    """Network of each row."""
    epochs: dict[str, int] = Field(default_factory=dict)
    """Training epochs of the rows that differ from the protocol."""
    eps: dict[str, Number] = Field(default_factory=dict)
    """Radius of the perturbations of the rows that differ from the protocol."""
    rows: dict[str, dict[str, dict[str, PaperValue]]]
    """Row, then checkpoint (`best` or `last`), then metric, with the number of the paper."""
    references: dict[str, dict[str, PaperValue]] = Field(default_factory=dict)
    """Further rows of the paper that are only shown: row, then metric, with the number."""
    row_notes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """What to say of a row, beside its numbers."""
    notes: tuple[str, ...] = ()
    """Sentences to print below the table."""


class PaperComparison(StageFacts):
    """A result beside the number of a paper, in percent where nothing else is stated."""

    stored_keys: ClassVar[Mapping[str, str]] = {"checkpoint_kind": "which", "paper_sd": "sd"}

    row: str
    """Row of the table."""
    checkpoint_kind: str
    """`best` or `last` epoch."""
    metric: str
    """Column of the table: `Natural` or the label of an attack."""
    ours: AccuracySummary
    """Our accuracy over all seeds, in [0, 1]."""
    paper: float
    """Accuracy in the paper."""
    paper_sd: float | None
    """Standard deviation in the paper, if it states one."""
    difference: float
    """Our median minus the paper's number, in percentage points."""
    tolerance: float
    """Largest difference that counts as reproduced, in percentage points."""
    verdict: PaperVerdict
    """What the comparison shows."""
    reasons: tuple[str, ...]
    """Why the numbers are not comparable; empty if they are."""


def load_paper_table(name: str) -> PaperTable:
    """Load a table of a paper.

    Args:
        name: Name of a file in `pipelines/paper`, without its ending.

    Returns:
        The table.

    Raises:
        SpecError: If there is no such table, or its file is not valid.
    """
    folder = find_builtin_folder("pipelines") / "paper"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise SpecError(describe_unknown_name("paper table", name, names))
    return PaperTable.from_data(read_yaml(folder / f"{name}.yaml"), f"paper/{name}.yaml")


def compare_with_paper(
    table: PaperTable, evaluations: Sequence[EvaluationResult]
) -> list[PaperComparison]:
    """Compare results with a paper.

    Args:
        table: Numbers of the paper.
        evaluations: Our results; the label of a candidate names its row.

    Returns:
        A comparison for each number of the paper that we have results for, in the table's order.
    """
    comparisons = []
    for row, checkpoints in table.rows.items():
        for checkpoint_kind, metrics in checkpoints.items():
            of_row = [
                e
                for e in evaluations
                if (e.candidate.label, e.candidate.checkpoint_kind) == (row, checkpoint_kind)
            ]
            for metric, value in metrics.items():
                of_metric = [e for e in of_row if metric in (NATURAL_COLUMN, e.attack)]
                if of_metric:
                    comparisons.append(_compare_with_value(table, metric, value, of_metric))
    return comparisons


def _compare_with_value(
    table: PaperTable, metric: str, value: PaperValue, evaluations: Sequence[EvaluationResult]
) -> PaperComparison:
    """Compare the results of one row, checkpoint kind and metric with the paper's number."""
    candidate = evaluations[0].candidate
    # Several attacks on one seed have the same natural accuracy: it counts once.
    by_seed: dict[int, float] = {}
    for e in evaluations:
        by_seed[e.candidate.seed] = e.clean if metric == NATURAL_COLUMN else e.robust
    ours = summarize_accuracies(list(by_seed.values()), min(e.examples for e in evaluations))
    tolerance = value.tolerance if value.tolerance is not None else table.tolerance
    reasons = _find_incomparable_reasons(table, candidate.label, evaluations[0])
    verdict = "not comparable" if reasons else decide_paper_verdict(ours, value.value, tolerance)
    return PaperComparison(
        row=candidate.label,
        checkpoint_kind=candidate.checkpoint_kind,
        metric=metric,
        ours=ours,
        paper=value.value,
        paper_sd=value.sd,
        difference=100 * ours.median - value.value,
        tolerance=tolerance,
        verdict=verdict,
        reasons=tuple(reasons),
    )


def decide_paper_verdict(ours: AccuracySummary, paper: float, tolerance: float) -> PaperVerdict:
    """Decide whether a number of a paper is reproduced.

    Args:
        ours: Our accuracy with its 95% interval.
        paper: Number of the paper in percent.
        tolerance: Largest difference that counts as reproduced, in percentage points.

    Returns:
        "not reproduced" if our whole interval is farther from the paper than the tolerance.
        "reproduced" if our median is within the tolerance and half the width of our interval is at
        most the tolerance. Otherwise "cannot tell".
    """
    low, high = 100 * ours.low, 100 * ours.high
    if high < paper - tolerance or low > paper + tolerance:
        return "not reproduced"
    is_exact = (high - low) / 2 <= tolerance
    is_close = abs(100 * ours.median - paper) <= tolerance
    return "reproduced" if is_exact and is_close else "cannot tell"


def _find_incomparable_reasons(
    table: PaperTable, row: str, evaluation: EvaluationResult
) -> list[str]:
    """List the settings that differ from those of the paper."""
    expected, actual = table.protocol, evaluation.protocol
    epochs = table.epochs.get(row, expected.epochs)
    checks: list[tuple[str, Any, Any]] = [
        ("data", actual["data"], expected.data),
        ("model", actual["model"], table.models.get(row, actual["model"])),
        ("norm", actual["norm"], expected.norm),
    ]
    reasons = [
        f"other {name} ({our_value}, not {paper_value})"
        for name, our_value, paper_value in checks
        if our_value != paper_value
    ]
    if actual["epochs"] != epochs:
        fewer_or_more = "fewer" if actual["epochs"] < epochs else "more"
        reasons.append(f"{fewer_or_more} epochs ({actual['epochs']}, not {epochs})")
    eps = table.eps.get(row, expected.eps)
    if abs(actual["eps"] - eps) > 1e-3 * eps:
        reasons.append(f"other eps ({actual['eps']:.4g}, not {eps:.4g})")
    if actual["examples"] != expected.examples:
        reasons.append(f"{actual['examples']} test examples, not {expected.examples}")
    elif actual.get("subset", "first") != "first":
        reasons.append(f"test examples chosen {actual['subset']!r}, not the first")
    if actual["train_size"] is not None:
        reasons.append(f"only {actual['train_size']} training examples")
    return reasons
