"""A sweep's past in Optuna's terms, rebuilt from the ledger with the distributions of its space."""

from collections.abc import Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.space import SearchSpace

# A random forest over fewer points finds importance in noise.
ENOUGH = 10
NUMBER = "raysweep.number"


def frozen(
    space: SearchSpace,
    trial: Trial,
    objectives: Sequence[str] = (),
    system_attrs: dict[str, Any] | None = None,
) -> FrozenTrial:
    """An ended trial as Optuna keeps it; objectives: of its best epoch, by default the space's."""
    failed = trial.state == "failed" or not trial.best
    known = {path: space.space[path].optuna() for path in trial.settings if path in space.space}
    names = objectives or space.objectives
    return optuna.trial.create_trial(
        state=TrialState.FAIL if failed else TrialState.COMPLETE,
        values=None if failed else [trial.score(name) for name in names],
        params=space.params(trial.settings),
        distributions=known,
        constraints=None if failed else constraints(space, trial.best),
        intermediate_values={int(epoch): value for epoch, value in trial.curve} if len(names) == 1 else None,
        user_attrs={NUMBER: trial.number, "state": trial.state, **({"reason": trial.reason} if trial.reason else {})},
        system_attrs=system_attrs,
    )


def constraints(space: SearchSpace, best: dict[str, float]) -> dict[str, float]:
    """Optuna's convention: feasible when no value is above 0."""
    limit = space.max_masking_gap
    return {} if limit is None else {"masking_gap": best["masking_gap"] - limit}


def study(ledger: Ledger, objectives: Sequence[str] = ()) -> optuna.Study:
    """A study of all ended trials, in their order. objectives: metrics to maximise, by default the space's."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    objectives = objectives or ledger.space.objectives
    made = optuna.create_study(directions=["maximize"] * len(objectives))
    for trial in ledger.trials():
        if trial.state != "running":
            made.add_trial(frozen(ledger.space, trial, objectives))
    return made


def importances(ledger: Ledger) -> dict[str, float] | None:
    """Share of the (first) objective's variance that each searched setting explains, by fANOVA, largest first.

    Settings that only some trials have (those with a condition) are left out. None where that says nothing: fewer than
    `ENOUGH` trials with a result, or results that are all the same.
    """
    past = study(ledger)
    trials = [trial for trial in past.trials if trial.state == TrialState.COMPLETE]
    if len(trials) < ENOUGH or len({trial.values[0] for trial in trials}) < 2:
        return None
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(
        optuna.importance.get_param_importances(past, evaluator=evaluator, target=lambda trial: float(trial.values[0]))
    )


def front(ledger: Ledger, objectives: Sequence[str]) -> list[Trial]:
    """Feasible trials that no other beats in one of the metrics without losing in another, at their best epochs."""
    ended = [trial for trial in ledger.trials() if trial.state != "running"]
    return [ended[best.number] for best in study(ledger, objectives).best_trials]
