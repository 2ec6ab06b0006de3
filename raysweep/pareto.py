"""Pareto front of points with several objectives, all of them maximized."""

from collections.abc import Sequence


def pareto_front_indices(points: Sequence[Sequence[float]]) -> list[int]:
    """Find the points that no other point dominates.

    A point dominates another one if it is at least as good in every objective and better in at
    least one. Equal points do not dominate each other: all of them are on the front.

    Args:
        points: Objective values of each point, in the same order for all. Larger is better; a
            missing value is -inf.

    Returns:
        Positions in `points` of the points on the front, ascending.

    Raises:
        ValueError: If two points do not have the same number of objectives.
    """
    return [
        index
        for index, point in enumerate(points)
        if not any(_dominates(other, point) for other in points)
    ]


def _dominates(point: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether `point` is better in at least one objective and worse in none."""
    pairs = list(zip(point, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
