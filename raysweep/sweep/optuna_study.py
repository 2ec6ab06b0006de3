"""A sweep's past in Optuna's terms, rebuilt from the ledger with the distributions of its space."""

from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.search_space import SearchSpace

# A random forest over fewer points finds importance in noise.
MIN_IMPORTANCE_TRIALS = 10
TRIAL_NUMBER_ATTRIBUTE = "raysweep.number"


def to_frozen_trial(
    space: SearchSpace, trial: Trial, system_attrs: dict[str, Any] | None = None
) -> FrozenTrial:
    """An ended trial as Optuna keeps it, with the objectives of its best epoch."""
    failed = trial.state == "failed" or not trial.best
    known = {path: space.space[path].to_optuna() for path in trial.params if path in space.space}
    return optuna.trial.create_trial(
        state=TrialState.FAIL if failed else TrialState.COMPLETE,
        values=None if failed else [trial.score(name) for name in space.objectives],
        params=space.optuna_params(trial.params),
        distributions=known,
        constraints=None if failed else constraint_values(space, trial.best),
        intermediate_values={int(epoch): value for epoch, value in trial.curve}
        if len(space.objectives) == 1
        else None,
        user_attrs={
            TRIAL_NUMBER_ATTRIBUTE: trial.number,
            "state": trial.state,
            **({"reason": trial.reason} if trial.reason else {}),
        },
        system_attrs=system_attrs,
    )


def constraint_values(space: SearchSpace, best_metrics: dict[str, float]) -> dict[str, float]:
    """Optuna's convention: feasible when no value is above 0."""
    limit = space.max_masking_gap
    return {} if limit is None else {"masking_gap": best_metrics["masking_gap"] - limit}


def build_study(ledger: Ledger) -> optuna.Study:
    """A study of all ended trials, in their order."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made = optuna.create_study(directions=["maximize"] * len(ledger.space.objectives))
    for trial in ledger.load_trials():
        if trial.state != "running":
            made.add_trial(to_frozen_trial(ledger.space, trial))
    return made


def param_importances(ledger: Ledger) -> dict[str, float] | None:
    """Share of the (first) objective's variance that each searched setting explains, by fANOVA,
    largest first.

    Settings that only some trials have (those with a condition) are left out. None where that says
    nothing: fewer than `ENOUGH` trials with a result, or results that are all the same.
    """
    past = build_study(ledger)
    trials = [trial for trial in past.trials if trial.state == TrialState.COMPLETE]
    if len(trials) < MIN_IMPORTANCE_TRIALS or len({trial.values[0] for trial in trials}) < 2:
        return None
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(
        optuna.importance.get_param_importances(
            past, evaluator=evaluator, target=lambda trial: float(trial.values[0])
        )
    )
