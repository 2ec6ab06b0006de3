"""Report sections about searches: best trials, importances and Pareto fronts."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from raysweep.pipeline.artifact import Artifact
from raysweep.pipeline.facts import SweepFacts
from raysweep.pipeline.report import figures
from raysweep.pipeline.report.document import (
    CaptionedFigure,
    Paragraph,
    Section,
    SectionPart,
    Table,
)
from raysweep.stores import StorePath
from raysweep.sweep.conclusions import describe_conclusions
from raysweep.sweep.finalist_summary import describe_ranking
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.optuna_study import MIN_IMPORTANCE_TRIALS, param_importances
from raysweep.sweep.search_space import param_labels
from raysweep.sweep.spread_summary import summarize_spread
from raysweep.sweep.trial import Trial
from raysweep.terminal import format_param

_MAX_TRIALS_SHOWN = 6


def build_search_sections(
    artifacts: Sequence[Artifact], resolve_path: Callable[[str], StorePath]
) -> list[Section]:
    """Build a section for each sweep of the tune stages, from its ledger.

    Args:
        artifacts: Artifacts of all stages.
        resolve_path: Returns the path for a path in an artifact.
    """
    sections = []
    for artifact in artifacts:
        if artifact.kind != "tune":
            continue
        for sweep in artifact.read_facts(SweepFacts).sweeps:
            name = artifact.stage.get("label") or sweep.method
            parts = _build_search_parts(Ledger.open(resolve_path(sweep.path)))
            sections.append(Section(f"What was searched: {name}", parts))
    return sections


def _build_search_parts(ledger: Ledger) -> list[SectionPart]:
    """Build the content of a sweep's section."""
    ranked = ledger.rank_trials()
    best = ranked[:_MAX_TRIALS_SHOWN]
    others = [*ledger.load_base_runs(), *ledger.load_repeats()]
    parts: list[SectionPart] = [
        Paragraph(
            f"The best {len(best)} of {len(ledger.load_trials())} trials by "
            f"{describe_ranking(ledger)}."
        ),
        _build_trial_table(ledger, [*best, *(run for run in others if run.best)]),
        *[Paragraph(f"{line[:1].upper()}{line[1:]}.") for line in describe_conclusions(ledger)],
    ]
    succeeded = [trial for trial in ranked if trial.state != "failed"]
    if len(succeeded) > 1:
        parts.append(
            CaptionedFigure(
                f"{'Score' if ledger.space.score_name == 'score' else 'Objective'} against each "
                "searched setting (darker: later)",
                figures.plot_param_slices(ledger),
                is_full_width=True,
            )
        )
        n_complete = sum(trial.state == "finished" for trial in succeeded)
        parts += _build_importance_parts(ledger, n_complete)
        parts += _build_pareto_figures(ledger, succeeded)
    return parts


def _build_trial_table(ledger: Ledger, best_trials: Sequence[Trial]) -> Table:
    """Build the table of trials, base runs and repeats: metrics and scores in percent (a score
    with a margin may be above 100), best epoch and parameters.
    """
    metrics = list(dict.fromkeys((*ledger.space.objectives, "clean", "masking_gap")))
    paths = list(ledger.space.space)
    labels = param_labels(paths)
    has_finalists = any(trial.robust_under_autoattack is not None for trial in best_trials)
    has_repeats = any(trial.repeats for trial in best_trials)
    has_score = any(trial.averages for trial in best_trials)
    spread = summarize_spread(ledger)
    rows = []
    for trial in best_trials:
        scores = [_format_score(trial, metric) for metric in metrics]
        if has_score:
            scores.insert(0, f"{100 * replace(trial, repeats=()).score(metrics[0]):.2f}")
        if has_repeats:
            mean, n_seeds = trial.score(metrics[0]), len(trial.trainings)
            scores.append(f"{100 * mean:.2f} ({n_seeds})" if trial.repeats else "")
        if has_finalists:
            robust = trial.robust_under_autoattack
            scores.append("" if robust is None else f"{100 * robust:.2f}")
        if spread is not None:
            scores.append(spread.describe_mark(trial))
        params = [format_param(trial.params.get(path)) for path in paths]
        epoch = _describe_best_epoch(ledger, trial)
        rows.append([ledger.describe_row(trial), *scores, epoch, *params])
    metric_names = [figures.format_metric_name(metric) for metric in metrics]
    if has_score:
        metric_names.insert(0, "score")
    if has_repeats:
        metric_names.append("mean (seeds)")
    if has_finalists:
        metric_names.append("AutoAttack")
    if spread is not None:
        metric_names.append("like best")
    return Table(["trial", *metric_names, "best epoch", *(labels[p] for p in paths)], rows)


def _describe_best_epoch(ledger: Ledger, trial: Trial) -> str:
    """Describe the best epoch of a trial: its number, whether the trial was stopped or has failed,
    and what is wrong with the epoch.
    """
    notes: list[str] = [trial.state] if trial.state in ("stopped", "failed") else []
    if choice := ledger.describe_choice(trial):
        notes.append(choice)
    return ", ".join([str(int(trial.best["epoch"])), *notes])


def _format_score(trial: Trial, metric: str) -> str:
    """Format a metric of the best epoch in percent; "" if the trial does not have it."""
    return f"{100 * trial.best[metric]:.2f}" if metric in trial.best else ""


def _build_importance_parts(ledger: Ledger, n_complete: int) -> list[SectionPart]:
    """Build the importances of the parameters, or the reason why they are unknown."""
    importances = param_importances(ledger)
    if not importances:
        reason = "the results hardly differ"
        if n_complete < MIN_IMPORTANCE_TRIALS:
            reason = (
                f"this needs at least {MIN_IMPORTANCE_TRIALS} complete trials, not {n_complete}"
            )
        text = f"The importance of the settings is unknown: {reason}."
        return [Paragraph(text, is_muted=True)]
    figure = figures.plot_param_importances(importances, ledger.space.objectives[0])
    parts: list[SectionPart] = [CaptionedFigure("Importance of the settings (fANOVA)", figure)]
    if left_out := [path for path in ledger.space.space if path not in importances]:
        labels = param_labels(list(ledger.space.space))
        names = ", ".join(labels[path] for path in left_out)
        text = (
            f"Not every trial has {names}, or all have the same value, so the importances leave "
            "them out."
        )
        parts.append(Paragraph(text, is_muted=True))
    return parts


def _build_pareto_figures(ledger: Ledger, ranked_trials: Sequence[Trial]) -> list[SectionPart]:
    """Plot the objectives against each other; a single objective against clean accuracy."""
    objectives = ledger.space.objectives
    first, *others = objectives if len(objectives) > 1 else dict.fromkeys((*objectives, "clean"))
    if not others:
        return []
    front = ledger.unmasked_pareto_front((first, *others))
    # With a single objective, AutoAttack decides which trial is the best, not the front.
    get_score = Trial.final_value if len(objectives) > 1 else Trial.best_epoch_value
    pictures: list[SectionPart] = []
    for other in others:
        names = f"{figures.format_metric_name(other)} and {figures.format_metric_name(first)}"
        figure = figures.plot_pareto_front(ranked_trials, front, other, first, get_score)
        pictures.append(CaptionedFigure(f"Pareto front: {names}", figure))
    return pictures
