"""Searcher of Ray Tune that proposes the repeats of a sweep's leaders."""

from collections.abc import Sequence
from typing import Any

from ray.tune.search import Searcher

from raysweep.sweep.trial import Trial


class RepeatSearcher(Searcher):
    """Suggest the repeats of one round (see `plan_repeats`), each once.

    Args:
        metric: The sweep's (first) objective.
        waiting_repeats: The repeats.
    """

    def __init__(self, metric: str, waiting_repeats: Sequence[Trial]) -> None:
        super().__init__(metric=metric, mode="max")
        self._waiting_repeats = list(waiting_repeats)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the config of the next repeat, or `Searcher.FINISHED` if there is none."""
        if not self._waiting_repeats:
            return Searcher.FINISHED  # type: ignore[no-any-return]
        return self._waiting_repeats.pop(0).to_tune_config()

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Learn nothing: the ledger says what follows."""

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the ledger is the source of truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: the ledger is the source of truth."""
