"""Verdicts of several runs of a sweep as score matrices, to compare the runs example by example."""

from collections.abc import Sequence

from raysweep.lazy_modules import np
from raysweep.sweep.trial import Trial


def stack_verdicts(runs: Sequence[Trial], is_autoattack: bool = False) -> "np.ndarray | None":
    """Return which validation examples each of several runs gets right.

    Args:
        runs: Trials, repeats or base runs, one or more. Repeats of these trials are ignored.
        is_autoattack: Whether to return the verdicts of AutoAttack; else those of the objective.

    Returns:
        1.0 for each example that counts as correct, else 0.0, (runs, N); None if the verdicts of a
        run are not known, or not all are of the same examples.
    """
    rows = [run.autoattack_verdicts if is_autoattack else run.best_verdicts for run in runs]
    first = rows[0]
    known = [row for row in rows if row is not None and first and row.is_comparable(first)]
    if len(known) < len(rows):
        return None
    return np.stack([row.mask.astype(float) for row in known])


def pair_verdicts(
    first: Sequence[Trial], second: Sequence[Trial]
) -> "tuple[np.ndarray, np.ndarray, bool] | None":
    """Return the score matrices of two groups of runs: by AutoAttack if it attacked all of them.

    Args:
        first: Runs, one or more.
        second: Others.

    Returns:
        Scores of the first group, (M, N), and of the second, (K, N), and whether they are those of
        AutoAttack; None if the runs were not measured on the same examples.
    """
    for is_autoattack in (True, False):
        scores = stack_verdicts([*first, *second], is_autoattack)
        if scores is not None:
            return scores[: len(first)], scores[len(first) :], is_autoattack
    return None
