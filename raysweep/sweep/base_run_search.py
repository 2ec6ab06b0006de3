"""Searcher of Ray Tune that adds base runs to the trials of another searcher."""

from typing import Any

from ray.tune.search import Searcher

from raysweep.sweep.ledger import Ledger
from raysweep.sweep.trial import Trial


class BaseRunSearcher(Searcher):
    """Suggest first the base runs that have not ended, then the trials of another searcher.

    Base runs come first because trials reuse their epochs: in a burn-in, where all weights are 1, a
    trial trains what the base method trains. The other searcher is not told of base runs. Once the
    sweep has ended early (see `SearchSpace.until`), only trials that had started are suggested.

    Args:
        ledger: The sweep.
        trial_searcher: Searcher of the trials.
    """

    def __init__(self, ledger: Ledger, trial_searcher: Searcher) -> None:
        super().__init__(metric=trial_searcher.metric, mode=trial_searcher.mode)
        self._trial_searcher = trial_searcher
        state_by_number = {run.number: run.state for run in ledger.load_base_runs()}
        self._waiting_runs = [
            Trial(number, params, kind="base run").to_tune_config()
            for number, params in enumerate(ledger.space.list_base_params())
            if state_by_number.get(number, "running") == "running"
        ]
        self._base_run_ids: set[str] = set()
        self._ledger = ledger
        self._n_resumed_left = sum(trial.state == "running" for trial in ledger.load_trials())

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the config of Tune's next trial (see `LedgerSearcher.suggest`)."""
        if self._waiting_runs:
            self._base_run_ids.add(trial_id)
            return self._waiting_runs.pop(0)
        if not self._n_resumed_left and self._ledger.load_early_end():
            return Searcher.FINISHED  # type: ignore[no-any-return]
        self._n_resumed_left = max(0, self._n_resumed_left - 1)
        return self._trial_searcher.suggest(trial_id)  # type: ignore[no-any-return]

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tell the other searcher of an epoch of its trials."""
        if trial_id not in self._base_run_ids:
            self._trial_searcher.on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the other searcher how one of its trials ended."""
        if trial_id not in self._base_run_ids:
            self._trial_searcher.on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the ledger is the source of truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: the ledger is the source of truth."""
