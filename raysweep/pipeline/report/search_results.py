"""What the sweeps found, for the report: the best trials, what mattered, and what it costs in clean
accuracy.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from raysweep.pipeline.artifact import Artifact
from raysweep.pipeline.report import figures
from raysweep.pipeline.report.document import CaptionedFigure, Paragraph, Section, Table
from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.optuna_study import MIN_IMPORTANCE_TRIALS, param_importances
from raysweep.sweep.search_space import param_labels
from raysweep.terminal import format_param

_MAX_TRIALS_SHOWN = 6


def build_search_sections(
    artifacts: Sequence[Artifact], resolve_path: Callable[[str], Path]
) -> list[Section]:
    """A section for each stage that searched, from the sweeps' ledgers. path: the folder that an
    artifact calls so.
    """
    found = [(a, sweep) for a in artifacts if a.kind == "tune" for sweep in a.facts["sweeps"]]
    sections = []
    for artifact, sweep in found:
        ledger = Ledger.open(resolve_path(sweep["path"]))
        parts = _build_search_parts(ledger)
        name = artifact.stage.get("label") or sweep["method"]
        sections.append(Section(f"What was searched: {name}", parts))
    return sections


def _build_search_parts(ledger: Ledger) -> list[Any]:
    ranked, space = ledger.rank_trials(), ledger.space
    best = ranked[:_MAX_TRIALS_SHOWN]
    count = f"the best {len(best)} of {len(ledger.load_trials())} trials"
    parts: list[Any] = [
        Paragraph(
            f"{count[0].upper()}{count[1:]}, by {figures.format_metric_name(space.objectives[0])} on validation."
        )
    ]
    parts.append(_build_trial_table(ledger, best))
    if len(ranked) > 1:
        parts.append(
            CaptionedFigure(
                "Objective against each searched setting (darker: later)",
                figures.plot_param_slices(ledger),
                True,
            )
        )
        parts += _build_importance_parts(ledger, len(ranked))
        parts += _build_pareto_figures(ledger, ranked)
    return parts


def _build_trial_table(ledger: Ledger, best_trials: Sequence[Trial]) -> Table:
    metrics = list(dict.fromkeys((*ledger.space.objectives, "clean", "masking_gap")))
    paths = list(ledger.space.space)
    names = param_labels(paths)
    rows = [
        [
            f"{t.number:04d}",
            *(f"{100 * t.best[m]:.2f}" if m in t.best else "" for m in metrics),
            f"{int(t.best['epoch'])}{', stopped' if t.state == 'stopped' else ''}",
            *(format_param(t.params.get(path)) for path in paths),
        ]
        for t in best_trials
    ]
    return Table(
        [
            "trial",
            *map(figures.format_metric_name, metrics),
            "best epoch",
            *(names[p] for p in paths),
        ],
        rows,
    )


def _build_importance_parts(ledger: Ledger, n_results: int) -> list[Any]:
    metric = ledger.space.objectives[0]
    shares = param_importances(ledger)
    if not shares:
        why = (
            f"there are {n_results}, of at least {MIN_IMPORTANCE_TRIALS} that this needs"
            if n_results < MIN_IMPORTANCE_TRIALS
            else "they hardly differ"
        )
        return [
            Paragraph(
                f"Which setting mattered most cannot be told from the results: {why}.",
                is_muted=True,
            )
        ]
    parts: list[Any] = [
        CaptionedFigure(
            "Importance of the settings (fANOVA)", figures.plot_param_importances(shares, metric)
        )
    ]
    if left := [path for path in ledger.space.space if path not in shares]:
        names = ", ".join(param_labels(list(ledger.space.space))[path] for path in left)
        parts.append(
            Paragraph(f"Not every trial has {names}: left out of the importances.", is_muted=True)
        )
    return parts


def _build_pareto_figures(ledger: Ledger, ranked_trials: Sequence[Trial]) -> list[Any]:
    """The objectives against each other; one alone against clean accuracy."""
    first, *others = dict.fromkeys((*ledger.space.objectives, "clean"))
    if len(ledger.space.objectives) > 1:
        others = list(ledger.space.objectives[1:])
    if not others:
        return []
    best = ledger.pareto_front((first, *others))
    return [
        CaptionedFigure(f"Pareto front: {figures.format_metric_name(other)} and {figures.format_metric_name(first)}",
                figures.plot_pareto_front(ranked_trials, best, other, first))
        for other in others
    ]  # fmt: skip
