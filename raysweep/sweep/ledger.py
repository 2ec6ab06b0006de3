"""Record of a sweep as JSON files beside its checkpoints.

A driver that was killed resumes the sweep from these files alone.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from statistics import fmean
from typing import Any, Literal
from uuid import uuid4

from raysweep.bucket_lease import LeaseLost
from raysweep.errors import DamagedFileError, InfrastructureError, RaysweepError, WorkFailed
from raysweep.leases import is_folder_in_use
from raysweep.logs import discard_log
from raysweep.pareto import pareto_front_indices
from raysweep.spec import SpecError
from raysweep.stores import Location, StoredFileNotFound, StorePath, StoreUnavailable, open_path
from raysweep.sweep.extension_checks import check_extension
from raysweep.sweep.repeat_plan import RepeatPlan, plan_repeats
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial, load_runs
from raysweep.training.checkpoint import RunDirectory
from raysweep.training.config import TrainingConfig
from raysweep.training.example_verdicts import ExampleVerdicts
from raysweep.training.failure_reports import TRACEBACK_FILE
from raysweep.training.selection import (
    RunRank,
    SelectionRule,
    get_tie_break,
    measure_at_rung,
    rank_epoch,
)
from raysweep.unrecorded_folders import clear_unrecorded

logger = logging.getLogger(__name__)

EarlyEnd = Literal["told-apart", "flat"]
"""Why a sweep with `until: told-apart` has no more trials: its best one is told apart from the
others, or its landscape is flat."""

_EARLY_END_FILE = "early_end.json"
WARM_START_FILE = "warm_start.json"
"""File in a sweep's folder that holds results of earlier sweeps (see `warm_start`)."""


def find_run_config(space: SearchSpace, run: Trial) -> TrainingConfig:
    """Build the training config of a trial, base run or repeat.

    Args:
        space: The sweep's search space.
        run: The run.

    Raises:
        SpecError: If the config is invalid.
    """
    build_config = space.base_run_config if run.kind == "base run" else space.trial_config
    return build_config(run.params)


def _find_front(
    trials: Sequence[Trial], metrics: Sequence[str], get_score: Callable[[Trial, str], float]
) -> list[Trial]:
    """Return the trials of the Pareto front in some metrics, in their order."""
    points = [[get_score(trial, metric) for metric in metrics] for trial in trials]
    return [trials[index] for index in pareto_front_indices(points)]


class Ledger:
    """Folder of a sweep.

    It holds `sweep.json`, and for each trial `trials/NNNN/` with `trial.json` and the trial's
    checkpoints; for each base run, `base/NNNN/` with the same files, and for each repeat of a trial
    `repeats/NNNN-seed-N/`.

    Attributes:
        path: The folder.
        name: Name of the folder, which is the name of the sweep on the command line.
        space: The sweep's search space.
        key: Random id of the sweep (32 hex digits), which stays when the folder is renamed.
    """

    def __init__(self, path: Location, space: SearchSpace, key: str) -> None:
        self.path = open_path(path)
        self.name = self.path.name
        self.space = space
        self.key = key
        # Trial key -> rule. Building a trial's config takes a millisecond, and displays rank all
        # trials again and again.
        self._rules: dict[str, SelectionRule] = {}

    @classmethod
    def create(cls, path: Location, space: SearchSpace) -> "Ledger":
        """Create the folder of a new sweep.

        Args:
            path: The folder; it may exist if it is empty or holds only a lock.
            space: The sweep's search space.

        Returns:
            The new ledger.

        Raises:
            SpecError: If the folder holds other files.
            InfrastructureError: If the folder cannot be written.
        """
        path = open_path(path)
        check_folder_is_free(path)
        ledger = cls(path, space.with_absolute_paths(), uuid4().hex)
        try:
            ledger._save_space()
        except OSError as error:
            raise InfrastructureError(
                f"{path} cannot be written: {error.strerror or error}"
            ) from error
        return ledger

    @classmethod
    def open(cls, path: Location) -> "Ledger":
        """Open the folder of an existing sweep.

        Args:
            path: The folder.

        Returns:
            The ledger.

        Raises:
            SpecError: If there is no sweep.
            DamagedFileError: If its files are damaged.
        """
        path = open_path(path)
        try:
            data = (path / "sweep.json").read_json({"key": str, "space": dict[str, Any]})
        except StoredFileNotFound as error:
            sweeps = path.parent.list_folders_containing("sweep.json")
            raise SpecError(
                f"no sweep in {path}; sweeps beside it: {', '.join(sweeps) or 'none'}"
            ) from error
        source = str(path / "sweep.json")
        return cls(path, SearchSpace.from_data(data["space"], source, stored=True), data["key"])

    def delete_if_empty(self) -> None:
        """Delete what `create` made, unless the sweep has trials or other files."""
        if not self.load_all_runs():
            discard_log(self.path)
            (self.path / "sweep.json").delete()
            (self.path / WARM_START_FILE).delete()
            clear_unrecorded(self.path)
            local_folder = self.path.local_path
            if local_folder is not None:
                with suppress(OSError):  # not empty
                    local_folder.rmdir()

    def extend_space(self, new_space: SearchSpace) -> None:
        """Continue the sweep with another search space.

        Finished trials that get more epochs are set to running again, to resume from their last
        checkpoints.

        Args:
            new_space: The search space to continue with.

        Raises:
            SpecError: For changes that `extension_checks.check_extension` does not allow.
        """
        trials = self.load_trials()
        check_extension(self.space, new_space, {trial.number: trial.params for trial in trials})
        if self.is_extended_by(new_space):
            (self.path / _EARLY_END_FILE).delete()
        self.space = new_space.with_absolute_paths()
        self._rules.clear()
        self._save_space()
        for trial in self.load_all_runs():
            if trial.state != "finished":
                continue
            max_epochs = self.find_config(trial).epochs
            if trial.epoch < max_epochs:
                # Its last epoch may be a rung now.
                resumed = self.with_rung_results(replace(trial, state="running"), max_epochs)
                self.save_trial(resumed)

    def is_extended_by(self, new_space: SearchSpace) -> bool:
        """Return whether a search space asks for more than this sweep's own: trials, epochs, values
        of settings, or another end. With more finalists, base runs or repeats, the sweep's answer
        stays as clear as it was.
        """
        keys = ("trials", "until", "space", "points_to_evaluate")
        if any(getattr(new_space, key) != getattr(self.space, key) for key in keys):
            return True
        return new_space.trial_config({}).epochs != self.space.trial_config({}).epochs

    def restart_failed_trials(self, retry_failed: bool = False) -> list[Trial]:
        """Set failed trials to running again, to resume from their last checkpoints.

        Args:
            retry_failed: Whether to restart all failed trials, not only those that the surroundings
                ended.

        Returns:
            The trials, as they were before.
        """
        failed_trials = [trial for trial in self.load_all_runs() if trial.runs_again(retry_failed)]
        for trial in failed_trials:
            (self.run_path(trial) / TRACEBACK_FILE).delete()
            self.save_trial(trial.as_running())
        return failed_trials

    def count_trials_left(self, n_trials: int | None = None, retry_failed: bool = False) -> int:
        """Return the number of trials that `--resume` would run.

        Every trial that has started runs to its end, also if the sweep needs no more trials.

        Args:
            n_trials: Number of trials of the sweep; None for that of its space.
            retry_failed: Whether all failed trials run again.
        """
        trials = self.load_trials()
        n_restarted = sum(
            trial.state == "running" or trial.runs_again(retry_failed) for trial in trials
        )
        n_new = (self.count_needed_trials() if n_trials is None else n_trials) - len(trials)
        return n_restarted + max(0, n_new)

    def load_early_end(self) -> EarlyEnd | None:
        """Return why the sweep ended before its last trial (see `SearchSpace.until`); else None.

        Raises:
            DamagedFileError: If its file is damaged.
        """
        if self.space.until is None:
            return None
        try:
            data = (self.path / _EARLY_END_FILE).read_json({"reason": EarlyEnd})
        except StoredFileNotFound:
            return None
        reason: EarlyEnd = data["reason"]
        return reason

    def save_early_end(self, reason: EarlyEnd) -> None:
        """Write that the sweep needs no more trials than have started, until it is extended."""
        (self.path / _EARLY_END_FILE).write_json({"reason": reason}, indent=1)

    def count_needed_trials(self) -> int:
        """Return the number of trials after which the sweep ends; 0 if it has ended early."""
        return 0 if self.load_early_end() else self.space.n_trials

    def count_base_runs_left(self, retry_failed: bool = False) -> int:
        """Return the number of base runs that `--resume` would run.

        Args:
            retry_failed: Whether all failed ones run again.
        """
        runs = self.load_base_runs()
        n_restarted = sum(run.state == "running" or run.runs_again(retry_failed) for run in runs)
        return n_restarted + max(0, (self.space.base_runs or 0) - len(runs))

    def count_repeats_left(self, retry_failed: bool = False) -> int:
        """Return the number of repeats that `--resume` would run, without those of later rounds.

        Args:
            retry_failed: Whether all failed ones run again.
        """
        n_restarted = sum(run.runs_again(retry_failed) for run in self.load_repeats())
        return n_restarted + len(self.find_waiting_repeats())

    def has_ended(self) -> bool:
        """Return whether the sweep has no work left.

        All its trials, base runs and repeats exist and have ended, even if some have failed, and
        AutoAttack has attacked the finalists.
        """
        plan, base_runs = self.load_repeat_plan(), self.load_base_runs()
        return (
            self._have_ended(plan.trials)
            and not plan.waiting
            and len(base_runs) >= (self.space.base_runs or 0)
            and all(run.state != "running" for run in base_runs)
            and not self._find_waiting_finalists(plan, base_runs)
        )

    def _have_ended(self, trials: Sequence[Trial]) -> bool:
        """Return whether these are all trials of the sweep, and all have ended."""
        return len(trials) >= self.count_needed_trials() and all(
            trial.state != "running" for trial in trials
        )

    def has_work_left(self, retry_failed: bool = False) -> bool:
        """Return whether `--resume` would run trials, base runs or repeats, or attack finalists.

        Args:
            retry_failed: Whether all failed trials run again.
        """
        return bool(
            self.count_trials_left(retry_failed=retry_failed)
            or self.count_base_runs_left(retry_failed)
            or self.count_repeats_left(retry_failed)
            or self.find_waiting_finalists()
        )

    def check_same_data(self, fingerprint: str) -> None:
        """Check that the sweep's trials were trained on data with this fingerprint.

        Raises:
            SpecError: The data are others.
        """
        if self.find_data_fingerprint() not in (None, fingerprint):
            name = self.space.trial_config({}).data.name
            raise SpecError(
                f"{self.path} holds a sweep on other {name!r} data: give the folder of the "
                "same data as --data-dir, or choose another --name"
            )

    def find_data_fingerprint(self) -> str | None:
        """Return the fingerprint of the data of the sweep's trials; None without a checkpoint."""
        for trial in self.load_all_runs():
            checkpoint = RunDirectory(self.run_path(trial)).read_last_checkpoint()
            if checkpoint is not None:
                return str(checkpoint.meta["data_fingerprint"])
        return None

    def count_ended_trials(self) -> int:
        """Return the number of trials that have ended."""
        return sum(trial.state != "running" for trial in self.load_trials())

    def is_interrupted(self) -> bool:
        """Return whether trials have not ended and no process works on them: its lock is free."""
        return not self.has_ended() and not is_folder_in_use(self.path)

    def is_lost(self) -> bool:
        """Return whether another driver has taken the sweep over from this process."""
        try:
            self.path.store.require_writable()
        except LeaseLost:
            return True
        return False

    def trial_path(self, trial_number: int) -> StorePath:
        """Return the folder of a trial."""
        return self.path / Trial(trial_number, {}).folder

    def run_path(self, trial: Trial) -> StorePath:
        """Return the folder of a trial, base run or repeat."""
        return self.path / trial.folder

    def find_config(self, trial: Trial) -> TrainingConfig:
        """Return the training config of a trial, base run or repeat."""
        return find_run_config(self.space, trial)

    def describe_row(self, trial: Trial) -> str:
        """Return the name of a run in tables: `0003`, `at (base) seed 0`, or `0003 seed 1`."""
        if trial.kind == "base run":
            return f"{self.space.base_method_name} (base) seed {trial.params.get('seed')}"
        return trial.title.removeprefix("trial ")

    def save_trial(self, trial: Trial) -> None:
        """Write trial.json."""
        (self.run_path(trial) / "trial.json").write_json(trial.to_stored_dict(), indent=1)

    def with_verdicts(self, trial: Trial) -> Trial:
        """Return a trial with the verdicts that are stored in the checkpoint of its best epoch."""
        if "epoch" not in trial.best:
            return trial
        return replace(trial, verdicts=self._read_verdicts(trial, int(trial.best["epoch"])))

    def with_rung_results(self, trial: Trial, max_epochs: int) -> Trial:
        """Return a trial with the results of its last epoch, if that is a rung of ASHA.

        With a margin in the score, `rung_values` gets the value that ASHA compares. At the first
        rung, `rung_verdicts` gets the verdicts.

        Args:
            trial: The trial, whose last epoch still has its checkpoint.
            max_epochs: Epochs of a trial that is not stopped.

        Returns:
            The trial; unchanged if the epoch is not a rung or lies within the burn-in, and for base
            runs and repeats.
        """
        rungs = self.space.scheduler.rungs(max_epochs)
        if trial.epoch not in rungs or trial.kind != "trial":
            return trial
        if trial.epoch <= (trial.burn_in or 0):
            return trial
        rule = self._find_rule(trial)
        if rule.margin_factor and rule.objective in trial.latest:
            value = measure_at_rung(trial.latest, rule)
            values = {**trial.rung_values, str(trial.epoch): value}
            trial = replace(trial, rung_values=values)
        if trial.epoch != rungs[0]:
            return trial
        return replace(trial, rung_verdicts=self._read_verdicts(trial, trial.epoch))

    def _read_verdicts(self, trial: Trial, epoch: int) -> ExampleVerdicts | None:
        """Read which validation examples an epoch of a trial gets right; None if not known."""
        try:
            return RunDirectory(self.run_path(trial)).read_verdicts(epoch)
        except DamagedFileError as error:
            logger.warning("%s cannot be compared: %s", trial.title, error)
            return None

    def load_trials(self) -> list[Trial]:
        """Load all trials that were ever started.

        Returns:
            The trials, ordered by number, with the repeats that count.

        Raises:
            DamagedFileError: If a trial.json is damaged.
        """
        return list(self.load_repeat_plan().trials)

    def load_base_runs(self) -> list[Trial]:
        """Load all base runs that were ever started, ordered by number.

        Raises:
            DamagedFileError: If a trial.json is damaged.
        """
        return load_runs(self.path, "base run")

    def load_repeats(self) -> list[Trial]:
        """Load all repeats that were ever started, ordered by number and seed.

        Raises:
            DamagedFileError: If a trial.json is damaged.
        """
        return load_runs(self.path, "repeat")

    def load_all_runs(self) -> list[Trial]:
        """Load the trials, and then the base runs and the repeats.

        Raises:
            DamagedFileError: If a trial.json is damaged.
        """
        return [*self.load_trials(), *self.load_base_runs(), *self.load_repeats()]

    def load_repeat_plan(self) -> RepeatPlan:
        """Load the trials and find out which repeats they need and which count.

        Raises:
            DamagedFileError: If a trial.json is damaged.
        """
        trials = load_runs(self.path, "trial")
        if not self.space.leaders_by_round:
            return RepeatPlan(tuple(trials))
        return plan_repeats(self.space, trials, self.load_repeats(), self.rank_trial)

    def find_waiting_repeats(self) -> list[Trial]:
        """Return the repeats that are to be trained now; none while trials run."""
        plan = self.load_repeat_plan()
        return list(plan.waiting) if self._have_ended(plan.trials) else []

    def rank_trials(self) -> list[Trial]:
        """Return the trials that reported the (first) objective, best first (see `rank_trial`).

        Once AutoAttack has attacked all finalists, they come first, in the order of their corrected
        scores.
        """
        plan = self.load_repeat_plan()
        by_objective = self._rank_by_objective(plan.trials)
        finalists = self._find_attacked_finalists(plan)
        if not finalists:
            return by_objective
        numbers = {trial.number for trial in finalists}
        metric = self.space.objectives[0]

        def rank_finally(trial: Trial) -> RunRank:
            rank = self.rank_trial(trial)
            if trial.number not in numbers:
                return rank._replace(is_below_finalists=True)
            score = trial.corrected_score(metric)
            return rank._replace(negated_seeds=0, negated_score=-score, negated_tie_break=0.0)

        # Stable: finalists with equal corrected scores keep their order before AutoAttack.
        return sorted(by_objective, key=rank_finally)

    def _rank_by_objective(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the trials that reported the (first) objective, in the order of `rank_trial`."""
        metric = self.space.objectives[0]
        scored = [trial for trial in trials if metric in trial.best]
        return sorted(scored, key=lambda trial: (self.rank_trial(trial), trial.number))

    def find_waiting_finalists(self) -> list[Trial]:
        """Return the finalists whose best epoch AutoAttack has not attacked yet.

        Finalists are the best trials by their scores that may be chosen, as many as
        `space.finalists` says; with several objectives the members of the Pareto front. There are
        none while trials or repeats run. Each seed of a finalist is attacked. If trials were
        repeated, only these can be finalists. The base runs that have ended with a result follow
        them, because the best trial is compared with them under AutoAttack, too.
        """
        if not self.space.finalists:
            return []
        return self._find_waiting_finalists(self.load_repeat_plan(), self.load_base_runs())

    def find_attacked_finalists(self) -> list[Trial]:
        """Return the finalists in their order before AutoAttack, if all have a result of it.

        Returns:
            The finalists; empty if one of them has no result: then the ranking leaves AutoAttack
            out.
        """
        if not self.space.finalists:
            return []
        return self._find_attacked_finalists(self.load_repeat_plan())

    def _find_finalists(self, plan: RepeatPlan) -> list[Trial]:
        """Return those of all trials that are finalists, in their order before AutoAttack."""
        if not self.space.finalists or not self._have_ended(plan.trials) or plan.waiting:
            return []
        ranked = self._rank_by_objective(plan.trials)
        eligible = [trial for trial in ranked if self.rank_trial(trial).is_eligible]
        if len(self.space.objectives) == 1:
            repeated = [trial for trial in eligible if trial.repeats]
            return (repeated or eligible)[: self.space.finalists]
        return _find_front(eligible, self.space.objectives, Trial.score)

    def _find_waiting_finalists(self, plan: RepeatPlan, base_runs: Sequence[Trial]) -> list[Trial]:
        """Return the finalists whose best epoch AutoAttack has not attacked yet, each with its
        repeats after it, and then the base runs that are to be compared with the best of them.
        """
        finalists = [
            replace(training, repeats=())
            for trial in self._find_finalists(plan)
            for training in trial.trainings
        ]
        rivals = [run for run in base_runs if self.rank_trial(run).is_eligible]
        if len(self.space.objectives) > 1:
            rivals = []
        return [
            trial
            for trial in [*finalists, *(rivals if finalists else [])]
            if trial.state != "running"
            and (trial.finalist is None or trial.finalist.epoch != trial.best["epoch"])
        ]

    def _find_attacked_finalists(self, plan: RepeatPlan) -> list[Trial]:
        """Return the finalists if all have a result of AutoAttack; else none."""
        finalists = self._find_finalists(plan)
        if any(trial.robust_under_autoattack is None for trial in finalists):
            return []
        return finalists

    def find_best_trial(self) -> Trial | None:
        """Return the first trial of `rank_trials`; None if none has a result or all have failed."""
        ranked_trials = self.rank_trials()
        if not ranked_trials or ranked_trials[0].state == "failed":
            return None
        return ranked_trials[0]

    def rank_trial(self, trial: Trial) -> RunRank:
        """Return the rank of a trial by its score, before AutoAttack: failed ones come last, before
        them those whose best epoch is not eligible, before them those above the masking gap. Of the
        others, those with more seeds come first.
        """
        metric = self.space.objectives[0]
        return RunRank(
            has_failed=trial.state == "failed",
            has_ineligible_best=not trial.rank_best_epoch(self._find_rule(trial)).is_eligible,
            exceeds_masking_gap=self.exceeds_masking_gap(trial),
            is_below_finalists=False,
            negated_seeds=-len(trial.trainings),
            negated_score=-trial.score(metric),
            negated_tie_break=-fmean(get_tie_break(run.best, metric) for run in trial.trainings),
        )

    def describe_choice(self, trial: Trial) -> str:
        """Describe in a few words what is wrong with a trial's best epoch; "" if nothing is."""
        rule = self._find_rule(trial)
        rank = rank_epoch(trial.best, rule)
        if rule.objective not in trial.best:
            return ""
        if not rank.is_after_burn_in:
            return "best before its weights acted"
        if not rank.is_in_window:
            return "best outside of validation.window"
        return "" if rank.is_above_chance else "no better than chance"

    def _find_rule(self, trial: Trial) -> SelectionRule:
        """Return the selection rule of a trial's config; built once for each trial."""
        if trial.key not in self._rules:
            self._rules[trial.key] = self.find_rule(trial)
        return self._rules[trial.key]

    def find_rule(self, trial: Trial) -> SelectionRule:
        """Return which epochs of a trial or of a base run can be its best."""
        if trial.kind == "base run":
            return self.space.find_run_rule(self.find_config(trial))
        return self.space.find_selection_rule(trial.params)

    def exceeds_masking_gap(self, trial: Trial) -> bool:
        """Return whether the trial's masking gap is above the space's `max_masking_gap`."""
        limit = self.space.max_masking_gap
        return limit is not None and trial.best.get("masking_gap", 0.0) > limit

    def unmasked_pareto_front(self, objectives: Sequence[str] = ()) -> list[Trial]:
        """Return the Pareto front of the trials that may be chosen, best first objective first.

        Left out are failed trials, those without an epoch that counts, and those above the masking
        gap. In a sweep with several objectives whose finalists AutoAttack has attacked, the front
        is that of the finalists, with its results in place of accuracies under other attacks. The
        front in the one objective of a sweep is its best trial.

        Args:
            objectives: Metrics of the trials' best epochs; by default the space's objectives.
        """
        metrics = tuple(objectives or self.space.objectives)
        candidates = self.find_attacked_finalists() if len(self.space.objectives) > 1 else []
        if candidates:
            numbers = {trial.number for trial in candidates}
            ranked = [trial for trial in self.rank_trials() if trial.number in numbers]
            return _find_front(ranked, metrics, Trial.final_value)
        ranked = [trial for trial in self.rank_trials() if self.rank_trial(trial).is_eligible]
        if metrics == self.space.objectives and len(metrics) == 1:
            # The best epochs would name another trial than the scores do.
            return ranked[:1]
        return _find_front(ranked, metrics, Trial.best_epoch_value)

    def best_checkpoint_path(self, trial: Trial) -> StorePath:
        """Return the path of the checkpoint of the trial's best epoch."""
        return self.run_path(trial) / f"epoch-{int(trial.best['epoch']):04d}"

    def _save_space(self) -> None:
        """Write sweep.json."""
        content = {"key": self.key, "space": self.space.to_stored_dict()}
        (self.path / "sweep.json").write_json(content, indent=1)


def check_folder_is_free(path: StorePath) -> None:
    """Check that a folder can become that of a new sweep.

    Args:
        path: The folder; it may exist if it is empty or holds only a lock.

    Raises:
        SpecError: If the folder holds other files.
    """
    top_names = {file.key[len(path.key) + 1 :].split("/")[0] for file in path.list_files()}
    if "sweep.json" in top_names:
        raise SpecError(
            f"there is a sweep in {path}: continue it with "
            f"`--resume {path.name}`, or choose another --name"
        )
    if any(name != "lock" and not name.startswith(".") for name in top_names):
        raise SpecError(f"{path} holds other files than a sweep: choose another --name")


@contextmanager
def delete_if_refused(ledger: Ledger) -> Iterator[None]:
    """Delete a new sweep if an error ends the block before a trial has started.

    The same command, run again, must not find a sweep of its name.

    Args:
        ledger: The sweep, which this process has just created.
    """
    try:
        yield
    except (WorkFailed, StoreUnavailable):
        raise
    except (RaysweepError, ImportError, OSError, KeyboardInterrupt):
        if not ledger.is_lost():
            ledger.delete_if_empty()
        raise
