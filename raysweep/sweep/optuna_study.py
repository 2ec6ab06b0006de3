"""Optuna studies rebuilt from ledgers, with the distributions of the search space."""

from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial
from raysweep.training.metric_history import EpochMetrics

MIN_IMPORTANCE_TRIALS = 10
"""Complete trials that fANOVA needs: over fewer, its random forest finds only noise."""

TRIAL_NUMBER_ATTRIBUTE = "raysweep.number"
"""User attribute of Optuna's trials that holds the number in the ledger."""

EXPORTED_ATTRIBUTES = frozenset({TRIAL_NUMBER_ATTRIBUTE, "state", "reason", "seeds"})
"""All user attributes that trials of an exported study have."""


def to_frozen_trial(space: SearchSpace, trial: Trial) -> FrozenTrial:
    """Convert an ended trial to Optuna's, as Optuna's analyses and its dashboard expect it.

    Args:
        space: The sweep's search space.
        trial: The ended trial. If it failed, or has no epoch that counts, it becomes a failed one;
            if the scheduler stopped it, a pruned one.

    Returns:
        A trial with the objectives of its best epoch, as the mean over its seeds, and, for a single
        objective, the value of each epoch. Params that are not searched are left out.
    """
    stopped_state = TrialState.PRUNED if len(space.objectives) == 1 else TrialState.COMPLETE
    return _build_frozen_trial(space, trial, space.optuna_params(trial.params), stopped_state, {})


def to_sampler_trial(
    space: SearchSpace, trial: Trial, system_attrs: dict[str, Any] | None = None
) -> FrozenTrial:
    """Convert a trial to Optuna's, for a sampler.

    Args:
        space: The sweep's search space.
        trial: The trial. One that has not ended stays so: the sampler avoids its surroundings. One
            that the scheduler stopped is complete: its best epoch is a result like any other.
        system_attrs: Optuna's own attributes of the trial.

    Returns:
        A trial as from `to_frozen_trial`, with all params that the sampler models.
    """
    params = space.optuna_params(trial.params, with_inactive=space.sampler.models_inactive_params)
    return _build_frozen_trial(space, trial, params, TrialState.COMPLETE, system_attrs or {})


def _build_frozen_trial(
    space: SearchSpace,
    trial: Trial,
    params: dict[str, Any],
    stopped_state: TrialState,
    system_attrs: dict[str, Any],
) -> FrozenTrial:
    """Build a trial of Optuna; a trial that the scheduler stopped gets `stopped_state`."""
    has_result = trial.rank_best_epoch(space.find_selection_rule(trial.params)).is_eligible
    if trial.state == "running":
        state = TrialState.RUNNING
    elif trial.state == "failed" or not has_result:
        state = TrialState.FAIL
    else:
        state = stopped_state if trial.state == "stopped" else TrialState.COMPLETE
    values, constraints = None, None
    if state in (TrialState.COMPLETE, TrialState.PRUNED):
        values = [trial.score(name) for name in space.objectives]
        constraints = constraint_values(space, trial.best)
    intermediate_values = None
    if len(space.objectives) == 1:
        intermediate_values = {int(epoch): value for epoch, value in trial.curve}
    user_attrs: dict[str, Any] = {TRIAL_NUMBER_ATTRIBUTE: trial.number, "state": trial.state}
    if trial.reason:
        user_attrs["reason"] = trial.reason
    if trial.repeats:
        user_attrs["seeds"] = len(trial.trainings)
    return optuna.trial.create_trial(
        state=state,
        values=values,
        params=params,
        distributions={path: space.space[path].to_optuna() for path in params},
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
        For each dotted path its share of the variance of the score or of the (first) objective, in
        [0, 1], largest first. Parameters that only some trials have, because they are conditional,
        are left out, and those with one value. None if fewer than `MIN_IMPORTANCE_TRIALS` trials
        trained to their end, or if all their results are equal.
    """
    study = build_study(ledger)
    trials = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    if len(trials) < MIN_IMPORTANCE_TRIALS or len({trial.values[0] for trial in trials}) < 2:
        return None
    varied_params = [
        path
        for path in optuna.search_space.intersection_search_space(trials)
        if len({trial.params[path] for trial in trials}) > 1
    ]
    if not varied_params:
        return None
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(
        optuna.importance.get_param_importances(
            study,
            evaluator=evaluator,
            params=varied_params,
            target=lambda trial: float(trial.values[0]),
        )
    )
