"""What the sweeps found, for the report: the best trials, what mattered, and what it costs in clean accuracy."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from raysweep.display import short
from raysweep.pipeline import figures
from raysweep.pipeline.artifact import Artifact
from raysweep.pipeline.document import Picture, Section, Table, Text
from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.space import labels
from raysweep.sweep.study import ENOUGH, importances

_SHOWN = 6


def searched(artifacts: Sequence[Artifact], path: Callable[[str], Path]) -> list[Section]:
    """A section for each stage that searched, from the sweeps' ledgers. path: the folder that an artifact calls so."""
    found = [(a, sweep) for a in artifacts if a.kind == "tune" for sweep in a.facts["sweeps"]]
    sections = []
    for artifact, sweep in found:
        ledger = Ledger.open(path(sweep["path"]))
        parts = _parts(ledger)
        name = artifact.stage.get("label") or sweep["method"]
        sections.append(Section(f"What was searched: {name}", parts))
    return sections


def _parts(ledger: Ledger) -> list[Any]:
    ranked, space = ledger.ranked(), ledger.space
    best = ranked[:_SHOWN]
    count = f"the best {len(best)} of {len(ledger.trials())} trials"
    parts: list[Any] = [Text(f"{count[0].upper()}{count[1:]}, by {figures.words(space.objectives[0])} on validation.")]
    parts.append(_table(ledger, best))
    if len(ranked) > 1:
        parts.append(Picture("Objective against each searched setting (darker: later)", figures.slices(ledger), True))
        parts += _importances(ledger, len(ranked))
        parts += _fronts(ledger, ranked)
    return parts


def _table(ledger: Ledger, best: Sequence[Trial]) -> Table:
    metrics = list(dict.fromkeys((*ledger.space.objectives, "clean", "masking_gap")))
    paths = list(ledger.space.space)
    names = labels(paths)
    rows = [
        [
            f"{t.number:04d}",
            *(f"{100 * t.best[m]:.2f}" if m in t.best else "" for m in metrics),
            f"{int(t.best['epoch'])}{', stopped' if t.state == 'stopped' else ''}",
            *(short(t.settings.get(path)) for path in paths),
        ]
        for t in best
    ]
    return Table(["trial", *map(figures.words, metrics), "best epoch", *(names[p] for p in paths)], rows)


def _importances(ledger: Ledger, results: int) -> list[Any]:
    metric = ledger.space.objectives[0]
    shares = importances(ledger)
    if not shares:
        why = f"there are {results}, of at least {ENOUGH} that this needs" if results < ENOUGH else "they hardly differ"
        return [Text(f"Which setting mattered most cannot be told from the results: {why}.", quiet=True)]
    parts: list[Any] = [Picture("Importance of the settings (fANOVA)", figures.importance(shares, metric))]
    if left := [path for path in ledger.space.space if path not in shares]:
        names = ", ".join(labels(list(ledger.space.space))[path] for path in left)
        parts.append(Text(f"Not every trial has {names}: left out of the importances.", quiet=True))
    return parts


def _fronts(ledger: Ledger, ranked: Sequence[Trial]) -> list[Any]:
    """The objectives against each other; one alone against clean accuracy."""
    first, *others = dict.fromkeys((*ledger.space.objectives, "clean"))
    if len(ledger.space.objectives) > 1:
        others = list(ledger.space.objectives[1:])
    if not others:
        return []
    best = ledger.front((first, *others))
    return [
        Picture(f"Pareto front: {figures.words(other)} and {figures.words(first)}",
                figures.pareto(ranked, best, other, first))
        for other in others
    ]  # fmt: skip
