"""Sections of the report, built from the artifacts of the stages.

A section without content is left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from raysweep.formatting import format_duration, format_local_time
from raysweep.pipeline.artifact import (
    Artifact,
    Candidate,
    EvaluationResult,
    select_ranking_metrics,
)
from raysweep.pipeline.facts import RegisterFacts, SweepFacts
from raysweep.pipeline.published_results import PaperComparison, PaperTable
from raysweep.pipeline.report import figures
from raysweep.pipeline.report.document import (
    CaptionedFigure,
    Paragraph,
    Section,
    SectionPart,
    Table,
)
from raysweep.pipeline.stage import group_by_threat
from raysweep.pipeline.statistics import AccuracySummary, kendall_tau, summarize_accuracies
from raysweep.spec import JsonDict

History = Sequence[Mapping[str, float]]
# Label, kind of checkpoint and attack.
_GroupKey = tuple[str, str, str]

_MAX_EVALUATIONS_SHOWN = 6
# Four times the gap of methods without gradient masking on digits.
_NOTABLE_MASKING_GAP = 0.02
# Fewer checkpoints are noted as too few for a rank correlation.
_MIN_RANKED_CHECKPOINTS = 5
# More comparisons with a paper than this need the full width of the page.
_MAX_NARROW_COMPARISONS = 8
_CURVE_LABELS = {
    "robust_worst": "worst case on validation",
    "clean": "clean accuracy on validation",
    "pgd": "accuracy under PGD on validation",
    "cw": "accuracy under CW on validation",
    "masking_gap": "masking gap on validation",
    "train/loss": "training loss",
}
_ALWAYS_SHOWN_METRICS = ("robust_worst", "clean")
_METRIC_PREFIX_LABELS = {
    "train/kappa_": "mean κ under",
    "train/ess_": "effective share of the sample,",
}


def build_paper_comparison_sections(
    table: PaperTable | None,
    comparisons: Sequence[PaperComparison],
    row_notes: Mapping[str, Sequence[str]] | None = None,
) -> list[Section]:
    """Build the section that compares our results with a paper.

    Args:
        table: The paper's table; None if the pipeline compares with none.
        comparisons: Our results beside the paper's.
        row_notes: Sentences about rows, by label; the first line of a row shows them.

    Returns:
        One section; empty without a table.
    """
    if table is None:
        return []
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
    rows = [
        [
            c.row,
            c.checkpoint_kind,
            c.metric,
            _format_measured_accuracy(c.ours),
            _format_interval(c.ours),
            _format_paper_accuracy(c),
            f"{c.difference:+.2f}",
            f"{c.tolerance:.1f}",
            c.verdict,
        ]
        for c in comparisons
    ]
    rows += [
        [row, "", metric, "", "", f"{value.value:.2f}", "", "", "reference only"]
        for row, metrics in table.references.items()
        for metric, value in metrics.items()
    ]
    if row_notes:
        headers.append("note")
        _add_row_notes(rows, row_notes)
    parts: list[SectionPart] = [
        Paragraph(
            f"{table.source}. Test accuracy in percent: median ± standard deviation over seeds. "
            "The interval accounts for the seeds and for the finite test set. Reproduced: the "
            "difference is within the tolerance, and so is half the width of the interval."
        ),
        Table(headers, rows, text_columns=("epoch", "metric", "verdict", "note")),
    ]
    reasons = dict.fromkeys((c.row, "; ".join(c.reasons)) for c in comparisons if c.reasons)
    for row, reason in reasons:
        parts.append(Paragraph(f"{row} is not comparable: {reason}.", is_muted=True))
    parts += [Paragraph(note, is_muted=True) for note in table.notes]
    if comparisons:
        parts.append(
            CaptionedFigure(
                "Ours and the paper's",
                figures.plot_paper_comparison(comparisons),
                is_full_width=len(comparisons) > _MAX_NARROW_COMPARISONS,
            )
        )
    return [Section("Beside the paper", parts)]


def _add_row_notes(rows: list[list[str]], row_notes: Mapping[str, Sequence[str]]) -> None:
    """Append a cell to each line: the notes of its row in the first line, "" in the others."""
    seen: set[str] = set()
    for cells in rows:
        row = cells[0]
        cells.append("" if row in seen else "; ".join(row_notes.get(row, ())))
        seen.add(row)


def build_row_note_sections(row_notes: Mapping[str, Sequence[str]]) -> list[Section]:
    """Build the section of settings that the paper of the rows does not give, or gives otherwise.

    Args:
        row_notes: Sentences about rows, by label.

    Returns:
        One section; empty without notes.
    """
    rows = [[row, note] for row, notes in row_notes.items() for note in notes]
    if not rows:
        return []
    table = Table(["row", "note"], rows, text_columns=("note",))
    return [Section("What the paper does not say", [table])]


def build_evaluation_sections(
    evaluations: Sequence[EvaluationResult], best_evaluation: EvaluationResult
) -> list[Section]:
    """Build the section of accuracies on the test set.

    Args:
        evaluations: All results; the first few are shown by attack and by class too.
        best_evaluation: Result of the candidate with the best validation result.

    Returns:
        One section.
    """
    shown = _select_shown_evaluations(evaluations)
    gap = f"{100 * _NOTABLE_MASKING_GAP:.0f}"
    return [
        Section(
            "Under attack",
            [
                Paragraph(
                    "On the test set, in percent. Masking gap: by how much PGD alone overstates "
                    f"the robust accuracy on validation; a gap over {gap} points stands out. "
                    "Each checkpoint was run on the test set once."
                ),
                *_build_accuracy_tables(evaluations, best_evaluation),
                *_build_selection_paragraphs(evaluations),
                *_build_warning_paragraphs(evaluations),
                _build_attack_table(shown),
                _build_class_table(shown),
                CaptionedFigure(
                    "Accuracy left after each attack", figures.plot_accuracy_after_attacks(shown)
                ),
                CaptionedFigure(
                    "Robust accuracy of each class", figures.plot_accuracy_per_class(shown)
                ),
            ],
        )
    ]


def _build_accuracy_tables(
    evaluations: Sequence[EvaluationResult], best_evaluation: EvaluationResult
) -> Iterator[SectionPart]:
    """Yield a table for each threat model; with several of them no checkpoint is the chosen one."""
    threats = group_by_threat(evaluations)
    if len(threats) == 1:
        yield _build_accuracy_table(evaluations, best_evaluation.candidate)
        return
    for threat, members in threats.items():
        yield Paragraph(f"{threat}:")
        yield _build_accuracy_table(members, None)


def _build_accuracy_table(evaluations: Sequence[EvaluationResult], best: Candidate | None) -> Table:
    """Build a table with a row for each label, kind of checkpoint and attack."""
    metric = select_ranking_metrics(e.candidate for e in evaluations)[0]
    rows = []
    for key, members in _group_evaluations(evaluations).items():
        label, checkpoint_kind, _ = key
        is_best = best is not None and (label, checkpoint_kind) == best.row
        rows.append(_format_accuracy_row(key, members, metric, is_best))
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
    return Table(headers, rows, text_columns=("epoch", "attack", "masking"))


def _format_accuracy_row(
    key: _GroupKey, members: Sequence[EvaluationResult], metric: str, is_best: bool
) -> list[str]:
    """Format one row of the accuracy table; `members` are the seeds of one group."""
    label, checkpoint_kind, attack = key
    n_examples = members[0].examples
    clean = summarize_accuracies([e.clean for e in members], n_examples)
    robust = summarize_accuracies([e.robust for e in members], n_examples)
    candidates = [e.candidate for e in members]
    gaps = [c.metrics["masking_gap"] for c in candidates if "masking_gap" in c.metrics]
    gap, masking = "", ""
    if gaps:
        gap = f"{100 * max(gaps):.2f}"
        masking = "stands out" if max(gaps) > _NOTABLE_MASKING_GAP else "none"
    return [
        f"{label} (chosen)" if is_best else label,
        f"{checkpoint_kind} ({_format_range([c.epoch for c in candidates])})",
        attack,
        str(robust.n_seeds),
        f"{100 * median(c.checkpoint_value(metric) for c in candidates):.2f}",
        _format_measured_accuracy(clean),
        _format_measured_accuracy(robust),
        _format_interval(robust),
        gap,
        masking,
    ]


def _build_selection_paragraphs(evaluations: Sequence[EvaluationResult]) -> list[Paragraph]:
    """Build paragraphs about epochs chosen on the test images, or before the weights acted."""
    candidates = [e.candidate for e in evaluations]
    on_test = dict.fromkeys(c.label for c in candidates if c.is_chosen_on_test)
    before = dict.fromkeys(c.title for c in candidates if c.is_ineligible)
    paragraphs = []
    if on_test:
        paragraphs.append(
            Paragraph(
                f"The best epoch of {', '.join(on_test)} was chosen on the test images, as in the "
                "paper (protocol: paper). These numbers are too high beside those of the others, "
                "whose epochs were chosen on validation images."
            )
        )
    if before:
        paragraphs.append(
            Paragraph(
                f"{', '.join(before)}: no later epoch counts, so this is a model whose instance "
                "weights had not acted yet, or one no better than chance."
            )
        )
    return paragraphs


def _build_warning_paragraphs(evaluations: Sequence[EvaluationResult]) -> list[Paragraph]:
    """Build a paragraph for each warning of the evaluations."""
    return [
        Paragraph(f"{e.candidate.title}: {warning}") for e in evaluations for warning in e.warnings
    ]


def _build_attack_table(evaluations: Mapping[str, EvaluationResult]) -> Table:
    """Build a table of the accuracy that remains after each attack of the cascades."""
    attacks = list(dict.fromkeys(name for e in evaluations.values() for name in e.accuracy_after))
    rows = []
    for name, evaluation in evaluations.items():
        after = [_format_percent(evaluation.accuracy_after.get(attack)) for attack in attacks]
        rows.append([name, _format_percent(evaluation.clean), *after])
    return Table(["left after", "clean", *attacks], rows)


def _build_class_table(evaluations: Mapping[str, EvaluationResult]) -> Table:
    """Build a table of the robust accuracy of each class."""
    classes = list(dict.fromkeys(c for e in evaluations.values() for c in e.per_class))
    rows = []
    for name, evaluation in evaluations.items():
        shares = [evaluation.per_class.get(c, {}).get("robust_accuracy") for c in classes]
        rows.append([name, *map(_format_percent, shares)])
    return Table(["robust, by class", *classes], rows)


def build_objective_sections(evaluations: Sequence[EvaluationResult]) -> list[Section]:
    """Build the section about the rank correlation of the objective with AutoAttack.

    Args:
        evaluations: Results on the test set.

    Returns:
        One section; empty for fewer than two evaluations by AutoAttack.
    """
    metric = select_ranking_metrics(e.candidate for e in evaluations)[0]
    standard = [e for e in evaluations if e.is_autoattack and metric in e.candidate.metrics]
    if len(standard) < 2:
        return []
    if len(group_by_threat(standard)) > 1:
        text = "Not computed: the checkpoints were attacked under different threat models."
        return [Section("Does the objective rank as AutoAttack does?", [Paragraph(text)])]
    scores = [e.candidate.checkpoint_value(metric) for e in standard]
    tau = kendall_tau(scores, [e.robust for e in standard])
    result = "unknown, because one of them is constant" if tau is None else f"{tau:+.2f}"
    parts: list[SectionPart] = [
        Paragraph(
            "Kendall's tau between the objective and AutoAttack over "
            f"{len(standard)} evaluated checkpoints: {result}."
        )
    ]
    if len(standard) < _MIN_RANKED_CHECKPOINTS:
        parts.append(
            Paragraph(
                "These are too few checkpoints: 1 and -1 are both likely by chance.", is_muted=True
            )
        )
    figure = figures.plot_objective_vs_autoattack(standard, scores)
    parts.append(CaptionedFigure("Objective and AutoAttack", figure))
    return [Section("Does the objective rank as AutoAttack does?", parts)]


def build_curve_sections(
    histories: Mapping[str, History], advice: Mapping[str, Sequence[str]]
) -> list[Section]:
    """Build the training curves of the evaluated checkpoints.

    Args:
        histories: Metrics of all epochs of each run.
        advice: Notes about each run.

    Returns:
        One section; empty if the runs have no metrics to plot.
    """
    reported = {key for history in histories.values() for row in history for key in row}
    labels = _CURVE_LABELS | _label_prefixed_metrics(reported)
    pictures = [
        CaptionedFigure(
            f"{label[0].upper()}{label[1:]} over epochs",
            figures.plot_metric_curves(histories, key, label.replace(" of the sample", "")),
        )
        for key, label in labels.items()
        if key in reported and (key in _ALWAYS_SHOWN_METRICS or _has_varying_metric(histories, key))
    ]
    notes = [Paragraph(f"{name}: {line}.") for name, lines in advice.items() for line in lines]
    return [Section("Training", [*notes, *pictures])] if pictures else []


def _label_prefixed_metrics(metrics: set[str]) -> dict[str, str]:
    """Label the metrics that exist for each attack; leave out medians."""
    labels = {}
    for prefix, label in _METRIC_PREFIX_LABELS.items():
        for key in sorted(metrics):
            if key.startswith(prefix) and "median" not in key:
                labels[key] = f"{label} {key.removeprefix(prefix)}"
    return labels


def _has_varying_metric(histories: Mapping[str, History], metric: str) -> bool:
    """Check whether a metric has more than one value, to four digits.

    Without reweighting, for example, the effective sample is the whole sample in each epoch.
    """
    values = {
        round(row[metric], 4) for history in histories.values() for row in history if metric in row
    }
    return len(values) > 1


def build_cost_sections(artifacts: Sequence[Artifact]) -> list[Section]:
    """Build the section of epochs, run times and forward passes.

    Args:
        artifacts: Artifacts of all stages.
    """
    headers = [
        "sweep",
        "trials",
        "stopped",
        "failed",
        "epochs completed",
        "trained",
        "reused",
        "trial time",
    ]
    rows = []
    for sweep in [s for a in artifacts for s in a.read_facts(SweepFacts).sweeps]:
        completed, trained = sweep.epochs_completed, sweep.epochs_trained
        reused = completed - trained
        share = f"{reused / completed:.0%}" if completed else ""
        states = [trial.state for trial in sweep.trials]
        rows.append(
            [
                sweep.path.rpartition("/")[2],
                str(len(states)),
                str(states.count("stopped")),
                str(states.count("failed")),
                str(completed),
                str(trained),
                f"{reused} ({share})",
                format_duration(sweep.seconds),
            ]
        )
    stages = [[a.kind, format_duration(a.seconds)] for a in artifacts]
    queries = sum(e.queries for a in artifacts for e in a.evaluations)
    return [
        Section(
            "Cost",
            [
                Table(headers, rows),
                Table(["stage", "wall time of its last run"], stages),
                Paragraph(f"The attacks on the test set took {queries:,} forward passes."),
            ],
        )
    ]


def build_registry_sections(artifacts: Sequence[Artifact]) -> list[Section]:
    """Build the section of registered versions.

    Args:
        artifacts: Artifacts of all stages.

    Returns:
        One section; empty without a stage `register`.
    """
    rows = []
    for artifact in artifacts:
        if artifact.kind == "register":
            facts = artifact.read_facts(RegisterFacts)
            rows.append(
                [
                    f"{facts.name} version {facts.version}",
                    facts.candidate,
                    facts.verdict,
                    facts.reason,
                    f"version {facts.champion}" if facts.champion else "none",
                ]
            )
    headers = ["registered", "checkpoint", "against the champion", "why", "champion now"]
    return [Section("Registry", [Table(headers, rows, text_columns=headers)])] if rows else []


def build_provenance_section(artifacts: Sequence[Artifact], environment: JsonDict) -> Section:
    """Build the section of digests and software versions, which identify the inputs.

    Args:
        artifacts: Artifacts of all stages.
        environment: Result of `describe_environment`: versions by name.
    """
    stages = [[a.kind, a.key, format_local_time(a.finish_time)] for a in artifacts]
    versions = [[name, str(version)] for name, version in environment.items() if version]
    return Section(
        "Provenance",
        [
            Table(["stage", "digest", "finished"], stages),
            Table(["", "version"], versions, text_columns=("version",)),
        ],
    )


def _group_evaluations(
    evaluations: Sequence[EvaluationResult],
) -> dict[_GroupKey, list[EvaluationResult]]:
    """Group the evaluations of different seeds."""
    groups: dict[_GroupKey, list[EvaluationResult]] = {}
    for evaluation in evaluations:
        candidate = evaluation.candidate
        key = (candidate.label, candidate.checkpoint_kind, evaluation.attack)
        groups.setdefault(key, []).append(evaluation)
    return groups


def _select_shown_evaluations(
    evaluations: Sequence[EvaluationResult],
) -> dict[str, EvaluationResult]:
    """Select the first evaluation of the first groups; only those of AutoAttack if it ran."""
    standard = [e for e in evaluations if e.is_autoattack] or list(evaluations)
    groups = list(_group_evaluations(standard).items())[:_MAX_EVALUATIONS_SHOWN]
    return {", ".join(key): members[0] for key, members in groups}


def _format_measured_accuracy(accuracy_summary: AccuracySummary) -> str:
    """Format median and standard deviation in percent."""
    spread = "" if accuracy_summary.sd is None else f" ± {100 * accuracy_summary.sd:.2f}"
    return f"{100 * accuracy_summary.median:.2f}{spread}"


def _format_paper_accuracy(comparison: PaperComparison) -> str:
    """Format the paper's number and its standard deviation."""
    spread = "" if comparison.paper_sd is None else f" ± {comparison.paper_sd:.2f}"
    return f"{comparison.paper:.2f}{spread}"


def _format_interval(accuracy_summary: AccuracySummary) -> str:
    """Format the 95% interval in percent."""
    return f"{100 * accuracy_summary.low:.2f} to {100 * accuracy_summary.high:.2f}"


def _format_range(numbers: Sequence[int]) -> str:
    """Format the smallest and the largest number, or the only one."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _format_percent(share: float | None) -> str:
    """Format a share in percent; "" if there is none."""
    return "" if share is None else f"{100 * share:.2f}"
