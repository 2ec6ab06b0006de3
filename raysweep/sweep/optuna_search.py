"""Optuna as a Ray Tune searcher, fed from the ledger instead of from pickled state."""

from dataclasses import replace
from typing import Any

import optuna
from ray.tune.search import Searcher

from raysweep.spec import json_digest
from raysweep.sweep.ledger import Ledger, Trial
from raysweep.sweep.optuna_study import constraint_values, to_frozen_trial
from raysweep.training.failure_reports import FAILURE_KEY


class LedgerSearcher(Searcher):
    """Asks Optuna for settings and tells it each trial's best objective.

    Trials that the ledger already holds are the study's past; those that never ended are handed out
    again first, under their own numbers, so that they go on from their checkpoints.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(metric=ledger.space.objectives[0], mode="max")
        self._ledger = ledger
        space, past = ledger.space, ledger.load_trials()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            directions=["maximize"] * len(space.objectives),
            sampler=space.sampler.build_sampler(len(past)),
        )
        self._pending_trials: dict[str, optuna.Trial | Trial] = {}
        self._best_metrics: dict[str, dict[str, float]] = {}
        self._n_complete = 0
        self._tried_digests = {json_digest(trial.params) for trial in past}
        self._unfinished_trials = [trial for trial in past if trial.state == "running"]
        # A driver may have been killed before it wrote down a trial, and after it wrote down the
        # next.
        self._free_numbers = sorted(set(range(space.n_trials)) - {trial.number for trial in past})
        for trial in past:
            if trial.state != "running":
                self._add_past_trial(trial)
        for point in space.initial_points:
            if not any(point.items() <= trial.params.items() for trial in past):
                self._study.enqueue_trial(space.optuna_params(point))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._unfinished_trials:
            trial = self._unfinished_trials.pop(0)
            self._pending_trials[trial_id] = trial
            self.on_trial_result(trial_id, trial.best)
            return {"number": trial.number, "params": trial.params}
        if not self._free_numbers:
            return Searcher.FINISHED  # type: ignore[no-any-return]
        self._pending_trials[trial_id], settings = self._ask_new_params()
        return {"number": self._free_numbers.pop(0), "params": settings}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        metric = self._ledger.space.objectives[0]
        best = self._best_metrics.get(trial_id)
        if metric in result and (best is None or result[metric] > best[metric]):
            self._best_metrics[trial_id] = {
                name: value for name, value in result.items() if isinstance(value, float)
            }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self.on_trial_result(trial_id, result or {})
        best = self._best_metrics.get(trial_id)
        failed = error or FAILURE_KEY in (result or {}) or best is None
        asked = self._pending_trials.pop(trial_id)
        if isinstance(asked, Trial):
            self._add_past_trial(
                replace(asked, state="failed" if failed else "finished", best=best or {})
            )
        elif failed or best is None:
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        else:
            for name, value in constraint_values(self._ledger.space, best).items():
                asked.set_constraint(name, value)
            self._study.tell(asked, [best[name] for name in self._ledger.space.objectives])

    def _ask_new_params(self, max_attempts: int = 10) -> tuple[optuna.Trial, dict[str, Any]]:
        """Settings that no trial has, if a few attempts find any: the same ones, seed included, end
        the same.
        """
        asked = self._study.ask()
        settings = self._ledger.space.suggest_params(asked)
        key = json_digest(settings)
        if max_attempts and key in self._tried_digests:
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
            return self._ask_new_params(max_attempts - 1)
        self._tried_digests.add(key)
        return asked, settings

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the truth."""

    def _add_past_trial(self, trial: Trial) -> None:
        # Without a generation NSGA-II would begin again, without parents.
        generation = {
            "NSGAIISampler:generation": self._n_complete
            // self._ledger.space.sampler.n_startup_trials
        }
        past = to_frozen_trial(self._ledger.space, trial, system_attrs=generation)
        self._study.add_trial(past)
        self._n_complete += past.state == optuna.trial.TrialState.COMPLETE
