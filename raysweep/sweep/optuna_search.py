"""Optuna as a searcher of Ray Tune, restored from the ledger instead of from pickled state."""

from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from raysweep.spec import SpecError, json_digest
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.optuna_study import constraint_values, to_sampler_trial
from raysweep.sweep.search_space import Params
from raysweep.sweep.trial import Trial
from raysweep.sweep.warm_start import load_warm_start
from raysweep.training.failure_reports import FAILURE_KEY
from raysweep.training.prefix_cache import prefix_keys
from raysweep.training.selection import SelectionRule


class LedgerSearcher(Searcher):
    """Ask Optuna for params, and tell it the scores of each trial.

    Results of earlier sweeps and ended trials of the ledger are added to the study first. Trials
    that have not ended are suggested before any new one, under their own numbers, so that they
    resume from their checkpoints; in the study they are running.

    While TPE or the Gaussian process draws at random, two candidates promise the same. The one that
    shares more epochs with earlier trials of the sweep becomes the trial.

    Args:
        ledger: The sweep.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(metric=ledger.space.objectives[0], mode="max")
        self._ledger = ledger
        space, past_trials = ledger.space, ledger.load_trials()
        # Its warnings are about optional packages.
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(
            directions=["maximize"] * len(space.objectives),
            sampler=space.sampler.build_sampler(len(past_trials)),
        )
        self._pending_trials: dict[str, optuna.Trial] = {}
        # The same trials, also by Tune's id, with the epochs that they have reported.
        self._reported_trials: dict[str, Trial] = {}
        self._rules: dict[str, SelectionRule] = {}
        self._n_complete = 0
        self._tried_params = {json_digest(trial.params): trial.params for trial in past_trials}
        # Keys of the states of a trial (see `prefix_keys`), by the digest of its params.
        self._prefix_keys: dict[str, list[str]] = {}
        # Numbers may have gaps: a driver can be killed before it has written a trial and after it
        # has written the next one.
        self._free_numbers = sorted(
            set(range(space.n_trials)) - {trial.number for trial in past_trials}
        )
        earlier_results = load_warm_start(ledger.path).select_results(space)
        earlier_trials = [result.to_trial() for result in earlier_results]
        for trial in earlier_trials + past_trials:
            if trial.state != "running":
                self._add_past_trial(trial)
        self._unfinished_trials = [
            (trial, self._ask_params(trial.params))
            for trial in past_trials
            if trial.state == "running"
        ]
        for point in space.initial_points:
            if not any(point.items() <= trial.params.items() for trial in past_trials):
                self._study.enqueue_trial(space.optuna_params(point))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the config of Tune's next trial.

        Returns:
            `number` and `params` of the trial, or `Searcher.FINISHED` when all trials have been
            suggested.
        """
        if self._unfinished_trials:
            trial, self._pending_trials[trial_id] = self._unfinished_trials.pop(0)
        elif self._free_numbers:
            self._pending_trials[trial_id], params = self._ask_new_params()
            trial = Trial(self._free_numbers.pop(0), params)
        else:
            return Searcher.FINISHED  # type: ignore[no-any-return]
        rule = self._ledger.space.find_selection_rule(trial.params)
        self._rules[trial_id] = rule
        self._reported_trials[trial_id] = trial.with_rule(rule)
        return {"number": trial.number, "params": trial.params}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Add an epoch to what the trial has reported."""
        if "epoch" in result:
            metrics = {
                name: float(value)
                for name, value in result.items()
                if isinstance(value, float) or name == "epoch"
            }
            trial = self._reported_trials[trial_id]
            self._reported_trials[trial_id] = trial.with_epoch(metrics, self._rules[trial_id])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell Optuna how the trial ended."""
        self.on_trial_result(trial_id, result or {})
        reported, rule = self._reported_trials.pop(trial_id), self._rules.pop(trial_id)
        has_result = reported.rank_best_epoch(rule).is_eligible
        pending = self._pending_trials.pop(trial_id)
        if error or FAILURE_KEY in (result or {}) or not has_result:
            self._study.tell(pending, state=TrialState.FAIL)
        else:
            for name, value in constraint_values(self._ledger.space, reported.best).items():
                pending.set_constraint(name, value)
            self._study.tell(pending, [reported.score(n) for n in self._ledger.space.objectives])

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the ledger is the source of truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: the ledger is the source of truth."""

    def _ask_params(self, params: Params) -> optuna.Trial:
        """Return a running trial of the study that has these params."""
        self._study.enqueue_trial(self._ledger.space.optuna_params(params))
        trial = self._study.ask()
        self._ledger.space.suggest_params(trial)
        return trial

    def _ask_new_params(self) -> tuple[optuna.Trial, Params]:
        """Ask Optuna for the params of a new trial."""
        draws_at_random = self._draws_at_random()
        trial, params = self._ask_untried_params()
        if draws_at_random:
            other_trial, other_params = self._ask_untried_params()
            if self._count_shared_epochs(other_params) > self._count_shared_epochs(params):
                trial, params, other_trial = other_trial, other_params, trial
            self._study.tell(other_trial, state=TrialState.FAIL)
        self._tried_params[json_digest(params)] = params
        return trial, params

    def _ask_untried_params(self, max_attempts: int = 10) -> tuple[optuna.Trial, Params]:
        """Ask Optuna for params that no trial has; accept a repetition after some attempts.

        The seed is one of a trial's params: repeated params would repeat the same training.
        """
        trial = self._study.ask()
        params = self._ledger.space.suggest_params(trial)
        if max_attempts and json_digest(params) in self._tried_params:
            self._study.tell(trial, state=TrialState.FAIL)
            return self._ask_untried_params(max_attempts - 1)
        return trial, params

    def _draws_at_random(self) -> bool:
        """Return whether the next proposal is a random one of a sampler that learns later, and not
        a starting point; False if trials share no epochs.
        """
        space = self._ledger.space
        n_results = len(self._study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))
        return (
            space.share_prefixes
            and space.sampler.learns_after_startup
            and n_results < space.sampler.n_startup_trials
            and not self._study.get_trials(deepcopy=False, states=[TrialState.WAITING])
        )

    def _count_shared_epochs(self, params: Params) -> int:
        """Return how many of the first epochs of a trial another trial of the sweep trains, too."""
        # A key depends on all epochs before it, so equal keys are those of common first epochs.
        known_keys = {
            key for tried in self._tried_params.values() for key in self._list_prefix_keys(tried)
        }
        n_known = sum(key in known_keys for key in self._list_prefix_keys(params))
        # The first key is that of the untrained network.
        return max(0, n_known - 1)

    def _list_prefix_keys(self, params: Params) -> list[str]:
        """Return the keys of a trial's states; other trials of the sweep have the same data."""
        digest = json_digest(params)
        if digest not in self._prefix_keys:
            try:
                config = self._ledger.space.trial_config(params)
            except SpecError:
                # Its params are not valid together: it fails when it starts.
                self._prefix_keys[digest] = []
            else:
                self._prefix_keys[digest] = prefix_keys(config, data_fingerprint="")
        return self._prefix_keys[digest]

    def _add_past_trial(self, trial: Trial) -> None:
        """Add an ended trial of the ledger to the study."""
        # Without this attribute NSGA-II would ignore the trial as a parent and start over.
        generation = self._n_complete // self._ledger.space.sampler.n_startup_trials
        frozen_trial = to_sampler_trial(
            self._ledger.space, trial, {"NSGAIISampler:generation": generation}
        )
        self._study.add_trial(frozen_trial)
        self._n_complete += frozen_trial.state == TrialState.COMPLETE
