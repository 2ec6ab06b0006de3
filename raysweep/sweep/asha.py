"""ASHA (Li et al. 2020) that knows of burn-ins and of trials from before a restart."""

from bisect import insort
from typing import Any

from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from raysweep.sweep.ledger import Ledger


class AshaScheduler(FIFOScheduler):
    """Stops a trial at a rung unless it is in the best 1/factor of the trials that reached the rung
    before it.

    Rungs are the epochs grace, grace x factor, ... A trial is not compared, nor others with it, at
    rungs within its own burn-in: its weights have not acted there.
    """

    def __init__(self, ledger: Ledger, max_epochs: int) -> None:
        super().__init__()
        self._space = ledger.space
        self._rung_values: dict[int, list[float]] = {
            rung: [] for rung in self._space.scheduler.rungs(max_epochs)
        }
        self._recorded_rungs: set[tuple[int, int]] = set()
        for trial in ledger.load_trials():
            burn_in = self._space.trial_config(trial.params).burn_in
            for epoch, value in trial.curve:
                self._record_rung(int(epoch), trial.number, burn_in, value)

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        value, epoch, number = (
            result.get(self._space.objectives[0]),
            result.get("epoch"),
            trial.config["number"],
        )
        # Most epochs are no rung: the settings need not be validated again for those.
        if value is None or epoch not in self._rung_values:
            return str(TrialScheduler.CONTINUE)
        burn_in = self._space.trial_config(trial.config["params"]).burn_in
        if not self._record_rung(epoch, number, burn_in, value):
            return str(TrialScheduler.CONTINUE)
        return str(
            TrialScheduler.CONTINUE if self._is_promotable(epoch, value) else TrialScheduler.STOP
        )

    def _record_rung(self, epoch: int, trial_number: int, burn_in: int, value: float) -> bool:
        """Whether this is a rung that the trial reaches now for the first time."""
        if (
            epoch <= burn_in
            or epoch not in self._rung_values
            or (epoch, trial_number) in self._recorded_rungs
        ):
            return False
        self._recorded_rungs.add((epoch, trial_number))
        insort(self._rung_values[epoch], value)
        return True

    def _is_promotable(self, epoch: int, value: float) -> bool:
        reached = self._rung_values[epoch]
        passing = max(1, len(reached) // self._space.scheduler.reduction_factor)
        return value >= reached[-passing]
