"""The parts of a report, each from what the stages left. A part with nothing to say is left out."""

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from raysweep.formatting import format_duration
from raysweep.pipeline.artifact import Artifact, EvaluationResult, select_ranking_metrics
from raysweep.pipeline.paper_tables import PaperComparison, PaperTable
from raysweep.pipeline.report import figures
from raysweep.pipeline.report.document import CaptionedFigure, Paragraph, Section, Table
from raysweep.pipeline.statistics import AccuracySummary, kendall_tau, summarize_accuracies
from raysweep.spec import JsonDict

_MAX_EVALUATIONS_SHOWN = 6
# A masking gap that deserves a word: four times what methods without masking have on digits.
_NOTABLE_MASKING_GAP = 0.02
_ALWAYS_SHOWN_METRICS = ("robust_worst", "clean")
_METRIC_PREFIX_LABELS = {
    "train/kappa_": "mean κ under",
    "train/ess_": "effective share of the sample,",
}


def build_paper_sections(
    table: PaperTable | None, comparisons: Sequence[PaperComparison]
) -> list[Section]:
    """Ours beside the paper's."""
    if table is None:
        return []
    rows = [
        [c.row, c.checkpoint_kind, c.metric, _format_measured_accuracy(c.ours), _format_interval(c.ours), _format_paper_accuracy(c), f"{c.difference:+.2f}",
         f"{c.tolerance:.1f}", c.verdict]
        for c in comparisons
    ]  # fmt: skip
    headers = [
        "row",
        "epoch",
        "metric",
        "ours",
        "95%",
        "paper",
        "difference",
        "tolerance",
        "verdict",
    ]
    parts: list[Any] = [
        Paragraph(
            f"{table.source}. Test accuracy in percent: median ± standard deviation over seeds; the interval has the "
            "seeds and the finite test set in it. Reproduced: within the tolerance, and known as exactly as that."
        ),
        Table(headers, rows, text_columns=("epoch", "metric", "verdict")),
    ]
    reasons = dict.fromkeys((c.row, "; ".join(c.reasons)) for c in comparisons if c.reasons)
    parts += [Paragraph(f"{row} is not comparable: {why}.", is_muted=True) for row, why in reasons]
    parts += [Paragraph(note, is_muted=True) for note in table.notes]
    if comparisons:
        parts.append(
            CaptionedFigure(
                "Ours and the paper's",
                figures.plot_paper_comparison(comparisons),
                is_full_width=len(comparisons) > 8,
            )
        )
    return [Section("Beside the paper", parts)]


def build_evaluation_sections(
    evaluations: Sequence[EvaluationResult], best_evaluation: EvaluationResult
) -> list[Section]:
    """Accuracies of everything that was judged; per attack and per class for the first few."""
    groups = _group_evaluations(evaluations)
    metric = select_ranking_metrics(j.candidate for j in evaluations)[0]
    rows = []
    for (label, which, attack), members in groups.items():
        clean, robust = (
            summarize_accuracies([getattr(j, name) for j in members], members[0].examples)
            for name in _ACCURACY_FIELDS
        )
        validation = [j.candidate for j in members]
        gaps = [c.metrics.get("masking_gap") for c in validation]
        gap = max((g for g in gaps if g is not None), default=None)
        rows.append(
            [
                label
                + (
                    " (chosen)"
                    if best_evaluation.candidate.label == label
                    and best_evaluation.candidate.checkpoint_kind == which
                    else ""
                ),
                f"{which} ({_format_range([c.epoch for c in validation])})",
                attack,
                str(robust.n_seeds),
                f"{100 * median(c.score(metric) for c in validation):.2f}",
                _format_measured_accuracy(clean),
                _format_measured_accuracy(robust),
                _format_interval(robust),
                "" if gap is None else f"{100 * gap:.2f}",
                "" if gap is None else "stands out" if gap > _NOTABLE_MASKING_GAP else "none",
            ]
        )
    headers = [
        "checkpoint",
        "epoch",
        "attack",
        "seeds",
        "validation",
        "clean",
        "robust",
        "95%",
        "masking gap",
        "masking",
    ]
    parts: list[Any] = [
        Paragraph(
            "On the test set, in percent. Masking gap: what PGD alone overstates on validation; over "
            f"{100 * _NOTABLE_MASKING_GAP:.0f} points it stands out. Each checkpoint saw the test set once."
        ),
        Table(headers, rows, text_columns=("epoch", "attack", "masking")),
    ]
    parts += [
        Paragraph(f"{j.candidate.title}: {warning}") for j in evaluations for warning in j.warnings
    ]
    shown = _select_shown_evaluations(evaluations)
    steps = list(dict.fromkeys(name for j in shown.values() for name in j.accuracy_after))
    parts.append(
        Table(
            ["left after", "clean", *steps],
            [
                [
                    n,
                    _format_percent(j.clean),
                    *(_format_percent(j.accuracy_after.get(s)) for s in steps),
                ]
                for n, j in shown.items()
            ],
        )
    )
    classes = list(dict.fromkeys(c for j in shown.values() for c in j.per_class))
    by_class = [
        [n, *(_format_percent(j.per_class.get(c, {}).get("robust_accuracy")) for c in classes)]
        for n, j in shown.items()
    ]
    parts.append(Table(["robust, by class", *classes], by_class))
    parts.append(
        CaptionedFigure(
            "Accuracy left after each attack", figures.plot_accuracy_after_attacks(shown)
        )
    )
    parts.append(
        CaptionedFigure("Robust accuracy of each class", figures.plot_accuracy_per_class(shown))
    )
    return [Section("Under attack", parts)]


def build_objective_sections(evaluations: Sequence[EvaluationResult]) -> list[Section]:
    """Whether what the sweep went by ranks as AutoAttack does."""
    metric = select_ranking_metrics(j.candidate for j in evaluations)[0]
    standard = [j for j in evaluations if j.is_autoattack and metric in j.candidate.metrics]
    if len(standard) < 2:
        return []
    scores = [j.candidate.score(metric) for j in standard]
    tau = kendall_tau(scores, [j.robust for j in standard])
    said = "cannot be told: one of them is constant" if tau is None else f"{tau:+.2f}"
    line = f"Kendall's tau between the objective and AutoAttack over {len(standard)} judged checkpoints: {said}."
    few = [
        Paragraph(
            "So few checkpoints say little: 1 and -1 are both likely by chance.", is_muted=True
        )
    ]
    return [
        Section(
            "Does the objective rank as AutoAttack does?",
            [
                Paragraph(line),
                *(few if len(standard) < 5 else []),
                CaptionedFigure(
                    "Objective and AutoAttack",
                    figures.plot_objective_vs_autoattack(standard, scores),
                ),
            ],
        )
    ]


def build_curve_sections(
    histories: Mapping[str, Sequence[Mapping[str, float]]], advice: Mapping[str, Sequence[str]]
) -> list[Section]:
    """Training of what was judged, epoch by epoch: {run: all its epochs}, and what stands out of
    each, in words.
    """
    wanted = {
        "robust_worst": "worst case on validation",
        "clean": "clean accuracy on validation",
        "masking_gap": "masking gap on validation",
        "train/loss": "training loss",
    }
    there = {key for history in histories.values() for row in history for key in row}
    for prefix, label in _METRIC_PREFIX_LABELS.items():
        names = [
            key.removeprefix(prefix)
            for key in sorted(there)
            if key.startswith(prefix) and "median" not in key
        ]
        wanted |= {f"{prefix}{name}": f"{label} {name}" for name in names}
    pictures = [
        CaptionedFigure(
            f"{label[0].upper()}{label[1:]} over epochs",
            figures.plot_metric_curves(histories, key, label.replace(" of the sample", "")),
        )
        for key, label in wanted.items()
        if key in there and (key in _ALWAYS_SHOWN_METRICS or _has_varying_metric(histories, key))
    ]
    words = [Paragraph(f"{name}: {line}.") for name, lines in advice.items() for line in lines]
    return [Section("Training", [*words, *pictures])] if pictures else []


def _has_varying_metric(
    histories: Mapping[str, Sequence[Mapping[str, float]]], metric: str
) -> bool:
    """Without reweighting, the effective sample is the whole sample in each epoch."""
    return (
        len(
            {
                round(row[metric], 4)
                for history in histories.values()
                for row in history
                if metric in row
            }
        )
        > 1
    )


def build_cost_sections(artifacts: Sequence[Artifact]) -> list[Section]:
    """Epochs and seconds, and what was taken over instead of trained."""
    rows = []
    for sweep in _collect_sweep_summaries(artifacts):
        saved = sweep["asked"] - sweep["trained"]
        share = f"{saved / sweep['asked']:.0%}" if sweep["asked"] else ""
        states = [t["state"] for t in sweep["trials"]]
        numbers = [
            len(states),
            states.count("stopped"),
            states.count("failed"),
            sweep["asked"],
            sweep["trained"],
        ]
        rows.append(
            [
                sweep["path"].rpartition("/")[2],
                *map(str, numbers),
                f"{saved} ({share})",
                format_duration(sweep["seconds"]),
            ]
        )
    headers = [
        "sweep",
        "trials",
        "stopped",
        "failed",
        "epochs asked",
        "trained",
        "saved by sharing",
        "trial time",
    ]
    stages = [[a.kind, format_duration(a.seconds)] for a in artifacts]
    queries = sum(j.queries for a in artifacts for j in a.evaluations)
    parts: list[Any] = [Table(headers, rows), Table(["stage", "wall time of its last run"], stages)]
    parts.append(Paragraph(f"The attacks on the test set took {queries:,} forward passes."))
    return [Section("Cost", parts)]


def build_registry_sections(artifacts: Sequence[Artifact]) -> list[Section]:
    rows = [
        [
            f"{a.facts['name']} version {a.facts['version']}",
            a.facts["candidate"],
            a.facts["verdict"],
            a.facts["reason"],
            f"version {a.facts['champion']}" if "champion" in a.facts else "none",
        ]
        for a in artifacts
        if a.kind == "register"
    ]
    headers = ["registered", "checkpoint", "against the champion", "why", "champion now"]
    return [Section("Registry", [Table(headers, rows, text_columns=headers)])] if rows else []


def build_provenance_section(artifacts: Sequence[Artifact], environment: JsonDict) -> Section:
    """Enough to do it again."""
    stages = [
        [a.kind, a.key, time.strftime("%Y-%m-%d %H:%M", time.localtime(a.finish_time))]
        for a in artifacts
    ]
    versions = [[name, str(version)] for name, version in environment.items() if version]
    return Section(
        "Provenance",
        [
            Table(["stage", "digest", "finished"], stages),
            Table(["", "version"], versions, text_columns=("version",)),
        ],
    )


_ACCURACY_FIELDS = ("clean", "robust")


def _group_evaluations(
    evaluations: Sequence[EvaluationResult],
) -> dict[tuple[str, str, str], list[EvaluationResult]]:
    groups: dict[tuple[str, str, str], list[EvaluationResult]] = {}
    for j in evaluations:
        groups.setdefault((j.candidate.label, j.candidate.checkpoint_kind, j.attack), []).append(j)
    return groups


def _select_shown_evaluations(
    evaluations: Sequence[EvaluationResult],
) -> dict[str, EvaluationResult]:
    """One of each group, AutoAttack's where there is any."""
    standard = [j for j in evaluations if j.is_autoattack] or list(evaluations)
    names = {
        f"{label}, {which}, {attack}": members[0]
        for (label, which, attack), members in _group_evaluations(standard).items()
    }
    return dict(list(names.items())[:_MAX_EVALUATIONS_SHOWN])


def _collect_sweep_summaries(
    artifacts: Sequence[Artifact], kind: str | None = None
) -> list[JsonDict]:
    return [
        sweep for a in artifacts if kind in (None, a.kind) for sweep in a.facts.get("sweeps", [])
    ]


def _format_measured_accuracy(accuracy_summary: AccuracySummary) -> str:
    spread = "" if accuracy_summary.sd is None else f" ± {100 * accuracy_summary.sd:.2f}"
    return f"{100 * accuracy_summary.median:.2f}{spread}"


def _format_paper_accuracy(comparison: PaperComparison) -> str:
    return f"{comparison.paper:.2f}" + (
        "" if comparison.paper_sd is None else f" ± {comparison.paper_sd:.2f}"
    )


def _format_interval(accuracy_summary: AccuracySummary) -> str:
    return f"{100 * accuracy_summary.low:.2f} to {100 * accuracy_summary.high:.2f}"


def _format_range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _format_percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"
