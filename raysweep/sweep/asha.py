"""ASHA (Li et al. 2020) that respects burn-ins and knows the trials from before a restart."""

import logging
from bisect import insort
from typing import Any

from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import Params
from raysweep.sweep.trial import Trial
from raysweep.training.selection import SelectionRule, average_epochs

logger = logging.getLogger(__name__)


class AshaScheduler(FIFOScheduler):
    """Stop a trial at a rung unless it is among the best trials that have reached the rung.

    Rungs are the epochs grace_period, grace_period * reduction_factor, ... The best
    1 / reduction_factor of the trials continue. A trial's rungs within its own burn-in are ignored,
    because its weights have no effect there. Trials are compared by their mean objective over the
    last `SearchSpace.score_epochs` epochs after their burn-ins.

    Args:
        ledger: The sweep. Epochs that its trials reported before are recorded first.
        max_epochs: Epochs of a trial that is not stopped.
    """

    def __init__(self, ledger: Ledger, max_epochs: int) -> None:
        super().__init__()
        self._space = ledger.space
        self._rung_values: dict[int, list[float]] = {
            rung: [] for rung in self._space.scheduler.rungs(max_epochs)
        }
        self._recorded_rungs: set[tuple[int, int]] = set()
        # By number of the trial: epoch -> objective.
        self._curves: dict[int, dict[int, float]] = {}
        for trial in ledger.load_trials():
            for epoch, value in trial.curve:
                self._record_epoch(int(epoch), trial.number, trial.params, value)

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        """Return Tune's decision (`CONTINUE` or `STOP`) after an epoch."""
        if Trial.from_tune_config(trial.config).kind != "trial":
            return str(TrialScheduler.CONTINUE)
        objective = result.get(self._space.objectives[0])
        epoch, number = result.get("epoch"), trial.config["number"]
        if objective is None or epoch is None:
            return str(TrialScheduler.CONTINUE)
        value = self._record_epoch(epoch, number, trial.config["params"], objective)
        if value is not None and not self._is_promotable(epoch, value):
            self._log_stop(number, epoch, value)
            return str(TrialScheduler.STOP)
        return str(TrialScheduler.CONTINUE)

    def _record_epoch(
        self, epoch: int, trial_number: int, params: Params, objective: float
    ) -> float | None:
        """Record an epoch of a trial.

        Returns the value by which the trial is compared if `epoch` is a rung that it reaches for
        the first time; else None.
        """
        curve = self._curves.setdefault(trial_number, {})
        curve[epoch] = objective
        # Building the config is slow, and only needed at rungs.
        if epoch not in self._rung_values or (epoch, trial_number) in self._recorded_rungs:
            return None
        burn_in = self._space.trial_config(params).burn_in
        if epoch <= burn_in:
            return None
        rule = SelectionRule("", burn_in, score_epochs=self._space.score_epochs or 1)
        reached = [pair for pair in sorted(curve.items()) if pair[0] <= epoch]
        value = average_epochs(reached, rule)[-1]
        self._recorded_rungs.add((epoch, trial_number))
        insort(self._rung_values[epoch], value)
        return value

    def _is_promotable(self, epoch: int, value: float) -> bool:
        """Check whether `value` is among the best 1 / reduction_factor of the rung's values."""
        return value >= self._find_cut(epoch)[0]

    def _find_cut(self, epoch: int) -> tuple[float, int]:
        """Return the least value that a rung promotes, and the number of values it promotes."""
        values = self._rung_values[epoch]
        n_promoted = max(1, len(values) // self._space.scheduler.reduction_factor)
        return values[-n_promoted], n_promoted

    def _log_stop(self, trial_number: int, epoch: int, value: float) -> None:
        """Log the numbers for which a trial is stopped."""
        cut, n_promoted = self._find_cut(epoch)
        n_values, name = len(self._rung_values[epoch]), self._space.score_name
        logger.info(
            "ASHA stops trial %04d at epoch %d: its %s %.4f is below %.4f, the least of the best "
            "%d of %d trials that were there past their burn-ins",
            trial_number,
            epoch,
            name,
            value,
            cut,
            n_promoted,
            n_values,
            extra={"trial": trial_number, "epoch": epoch, "value": value, "cut": cut,
                   "n_promoted": n_promoted, "n_values": n_values, "event": "asha_stop"},
        )  # fmt: skip
