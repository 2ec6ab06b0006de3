"""Report sections about searches: best trials, importances and Pareto fronts."""

from collections.abc import Callable, Sequence
from functools import partial

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
from raysweep.sweep.search_space import SearchSpace, param_labels
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
        name = ledger.space.score_name.capitalize() if ledger.space.has_score else "Objective"
        parts.append(
            CaptionedFigure(
                f"{name} against each searched setting (darker: later)",
                figures.plot_param_slices(ledger),
                is_full_width=True,
            )
        )
        n_complete = sum(trial.state == "finished" for trial in succeeded)
        parts += _build_importance_parts(ledger, n_complete)
        parts += _build_pareto_figures(ledger, succeeded)
    return parts


def _build_trial_table(ledger: Ledger, best_trials: Sequence[Trial]) -> Table:
    """Build the table of trials, base runs and repeats: metrics, scores, best epoch and parameters.
    Accuracies are in percent.
    """
    paths = list(ledger.space.space)
    labels = param_labels(paths)
    columns = _list_result_columns(ledger, best_trials)
    rows = []
    for trial in best_trials:
        cells = [format_cell(trial) for format_cell in columns.values()]
        params = [format_param(trial.params.get(path)) for path in paths]
        rows.append([ledger.describe_row(trial), *cells, *params])
    return Table(["trial", *columns, *(labels[path] for path in paths)], rows)


def _list_result_columns(
    ledger: Ledger, trials: Sequence[Trial]
) -> dict[str, Callable[[Trial], str]]:
    """Return the columns of the results of trials: {title: function that formats a cell}."""
    space, objective = ledger.space, ledger.space.objectives[0]

    format_score = partial(_format_score, space)

    def format_mean(trial: Trial) -> str:
        n_seeds = len(trial.trainings)
        return f"{format_score(trial.score(objective))} ({n_seeds})" if trial.repeats else ""

    columns: dict[str, Callable[[Trial], str]] = {}
    if any(trial.averages for trial in trials):
        columns[space.score_name] = lambda run: format_score(run.averages.get(objective))
    for metric in dict.fromkeys((*space.objectives, "clean", "masking_gap")):
        columns[figures.format_metric_name(metric)] = partial(_format_metric, metric=metric)
    if any(trial.repeats for trial in trials):
        columns["mean (seeds)"] = format_mean
    if any(trial.robust_under_autoattack is not None for trial in trials):
        columns["AutoAttack"] = lambda run: _format_percent(run.robust_under_autoattack)
        if space.has_score:
            columns["corrected"] = lambda run: format_score(run.find_corrected_score(objective))
    spread = summarize_spread(ledger)
    if spread is not None:
        columns["like best"] = spread.describe_mark
    columns["best epoch"] = partial(_describe_best_epoch, ledger)
    return columns


def _describe_best_epoch(ledger: Ledger, trial: Trial) -> str:
    """Describe the best epoch of a trial: its number, whether the trial was stopped or has failed,
    and what is wrong with the epoch.
    """
    notes: list[str] = [trial.state] if trial.state in ("stopped", "failed") else []
    if choice := ledger.describe_choice(trial):
        notes.append(choice)
    return ", ".join([str(int(trial.best["epoch"])), *notes])


def _format_metric(trial: Trial, metric: str) -> str:
    """Format a metric of the best epoch in percent; "" if the trial does not have it."""
    return _format_percent(trial.best.get(metric))


def _format_score(space: SearchSpace, score: float | None) -> str:
    """Format a score, in percent unless it has a margin and is no accuracy; "" if not known."""
    if space.has_margin_in_score:
        return "" if score is None else f"{score:.3f}"
    return _format_percent(score)


def _format_percent(share: float | None) -> str:
    """Format a share in percent, with two decimals; "" if it is not known."""
    return "" if share is None else f"{100 * share:.2f}"


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
    figure = figures.plot_param_importances(importances, ledger.space.score_name)
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
