"""ASHA (Li et al. 2020) that respects burn-ins and knows the trials from before a restart."""

import logging
from bisect import insort
from typing import Any

from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from raysweep.sweep.ledger import Ledger
from raysweep.sweep.trial import Trial
from raysweep.training.selection import SelectionRule, measure_at_rung

logger = logging.getLogger(__name__)


class AshaScheduler(FIFOScheduler):
    """Stop a trial at a rung unless it is among the best trials that have reached the rung.

    Rungs are the epochs grace_period, grace_period * reduction_factor, ... The best
    1 / reduction_factor of the trials continue. They are compared by the objective of that epoch,
    plus `SearchSpace.margin_factor` times its `robust_margin`. A trial's rungs within its own
    burn-in are ignored, because its weights have no effect there.

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
        for trial in ledger.load_trials():
            burn_in = ledger.find_rule(trial).burn_in
            for epoch, value in trial.curve:
                if int(epoch) in trial.guessing_epochs:
                    value = 0.0
                rung_value = trial.rung_values.get(str(int(epoch)), value)
                self._record_rung(int(epoch), trial.number, burn_in, rung_value)

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        """Return Tune's decision (`CONTINUE` or `STOP`) after an epoch."""
        if Trial.from_tune_config(trial.config).kind != "trial":
            return str(TrialScheduler.CONTINUE)
        value = result.get(self._space.objectives[0])
        epoch = result.get("epoch")
        # Building the config is slow, and only needed at rungs.
        if value is None or epoch not in self._rung_values:
            return str(TrialScheduler.CONTINUE)
        rule = self._space.find_run_rule(self._space.trial_config(trial.config["params"]))
        burn_in, value = rule.burn_in, measure_at_rung(result, rule)
        is_new = self._record_rung(epoch, trial.config["number"], burn_in, value)
        if is_new and not self._is_promotable(epoch, value):
            self._log_stop(trial.config["number"], epoch, value, rule)
            return str(TrialScheduler.STOP)
        return str(TrialScheduler.CONTINUE)

    def _record_rung(self, epoch: int, trial_number: int, burn_in: int, value: float) -> bool:
        """Record the value if `epoch` is a rung that the trial reaches for the first time.

        Returns whether it was recorded.
        """
        if epoch <= burn_in or epoch not in self._rung_values:
            return False
        if (epoch, trial_number) in self._recorded_rungs:
            return False
        self._recorded_rungs.add((epoch, trial_number))
        insort(self._rung_values[epoch], value)
        return True

    def _is_promotable(self, epoch: int, value: float) -> bool:
        """Check whether `value` is among the best 1 / reduction_factor of the rung's values."""
        return value >= self._find_cut(epoch)[0]

    def _find_cut(self, epoch: int) -> tuple[float, int]:
        """Return the least value that a rung promotes, and the number of values it promotes."""
        values = self._rung_values[epoch]
        n_promoted = max(1, len(values) // self._space.scheduler.reduction_factor)
        return values[-n_promoted], n_promoted

    def _log_stop(self, trial_number: int, epoch: int, value: float, rule: SelectionRule) -> None:
        """Log the numbers for which a trial is stopped."""
        cut, n_promoted = self._find_cut(epoch)
        n_values = len(self._rung_values[epoch])
        name = f"{rule.objective} plus margin" if rule.margin_factor else rule.objective
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
