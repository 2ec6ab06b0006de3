"""Optuna studies rebuilt from ledgers, with the distributions of the search space."""

from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.search_space import SearchSpace
from raysweep.training.metric_history import EpochMetrics

MIN_IMPORTANCE_TRIALS = 10
"""Trials with a result that fANOVA needs: over fewer, its random forest finds only noise."""

TRIAL_NUMBER_ATTRIBUTE = "raysweep.number"
"""User attribute of Optuna's trials that holds the number in the ledger."""


def to_frozen_trial(
    space: SearchSpace, trial: Trial, system_attrs: dict[str, Any] | None = None
) -> FrozenTrial:
    """Convert an ended trial to Optuna's.

    Args:
        space: The sweep's search space.
        trial: The ended trial. If it failed, or has no epoch that counts, it becomes a failed one.
        system_attrs: Optuna's own attributes of the trial.

    Returns:
        A trial with the objectives of its best epoch and, for a single objective, the value of each
        epoch. Params that are not searched are left out.
    """
    has_result = trial.rank_best_epoch(space.find_selection_rule(trial.params)).is_eligible
    has_failed = trial.state == "failed" or not has_result
    values, constraints = None, None
    if not has_failed:
        values = [trial.score(name) for name in space.objectives]
        constraints = constraint_values(space, trial.best)
    intermediate_values = None
    if len(space.objectives) == 1:
        intermediate_values = {int(epoch): value for epoch, value in trial.curve}
    user_attrs: dict[str, Any] = {TRIAL_NUMBER_ATTRIBUTE: trial.number, "state": trial.state}
    if trial.reason:
        user_attrs["reason"] = trial.reason
    return optuna.trial.create_trial(
        state=TrialState.FAIL if has_failed else TrialState.COMPLETE,
        values=values,
        params=space.optuna_params(trial.params),
        distributions={
            path: space.space[path].to_optuna() for path in trial.params if path in space.space
        },
        constraints=constraints,
        intermediate_values=intermediate_values,
        user_attrs=user_attrs,
        system_attrs=system_attrs,
    )


def constraint_values(space: SearchSpace, best_metrics: EpochMetrics) -> dict[str, float]:
    """Return the constraints of a trial in Optuna's convention: feasible if none is above 0.

    Args:
        space: The sweep's search space.
        best_metrics: Metrics of the trial's best epoch.

    Returns:
        By how much the masking gap exceeds its limit; empty if the space sets no limit.
    """
    limit = space.max_masking_gap
    return {} if limit is None else {"masking_gap": best_metrics["masking_gap"] - limit}


def build_study(ledger: Ledger) -> optuna.Study:
    """Build an in-memory study of all ended trials.

    Args:
        ledger: The sweep.

    Returns:
        The study; its trials are ordered by their number in the ledger.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["maximize"] * len(ledger.space.objectives))
    for trial in ledger.load_trials():
        if trial.state != "running":
            study.add_trial(to_frozen_trial(ledger.space, trial))
    return study


def param_importances(ledger: Ledger) -> dict[str, float] | None:
    """Compute by fANOVA (Hutter et al. 2014) how much each searched parameter matters.

    Args:
        ledger: The sweep.

    Returns:
        For each dotted path its share of the variance of the (first) objective, in [0, 1], largest
        first. Parameters that only some trials have, because they are conditional, are left out.
        None if fewer than `MIN_IMPORTANCE_TRIALS` trials have a result, or if all results are
        equal.
    """
    study = build_study(ledger)
    trials = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    if len(trials) < MIN_IMPORTANCE_TRIALS or len({trial.values[0] for trial in trials}) < 2:
        return None
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(
        optuna.importance.get_param_importances(
            study, evaluator=evaluator, target=lambda trial: float(trial.values[0])
        )
    )
