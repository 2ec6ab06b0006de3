"""How many epochs a sweep's trials needed, and how many of them were trained."""

from collections.abc import Iterable
from dataclasses import dataclass

from raysweep.sweep.trial import Trial


@dataclass(frozen=True)
class EpochCounts:
    """Epochs of all trials of a sweep.

    Attributes:
        completed: Epochs that the trials have finished, including reused ones.
        trained: Epochs that were trained; the rest came from the prefix cache.
    """

    completed: int
    trained: int

    @property
    def reused(self) -> int:
        """Number of epochs whose state came from another trial."""
        return self.completed - self.trained

    def __str__(self) -> str:
        return (
            f"epochs: {self.completed} completed, {self.trained} trained, "
            f"{self.reused} reused from other trials"
        )


def count_epochs(trials: Iterable[Trial]) -> EpochCounts:
    """Add up the epochs of trials.

    Args:
        trials: All trials of a sweep.

    Returns:
        Completed and trained epochs of all trials together.
    """
    completed = trained = 0
    for trial in trials:
        completed += trial.epoch
        trained += trial.trained_epochs
    return EpochCounts(completed, trained)
