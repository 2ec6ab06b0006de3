"""How long a running sweep still takes, with early stopping, shared epochs and AutoAttack."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median

from raysweep.sweep.attack_timing import estimate_autoattack_seconds
from raysweep.sweep.epoch_counts import count_epochs
from raysweep.sweep.plan import expected_trial_epochs
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial

# From this number of ended trials on, their mean number of epochs replaces what the rule of ASHA
# predicts. With fewer it would be too low: the first to end are those that are stopped early.
_MIN_ENDED_TRIALS = 8


class SweepTimer:
    """Estimates how long the trials, base runs and repeats of a sweep still take.

    Epochs and seconds of before this process began do not count: they may be those of another
    machine.
    """

    def __init__(
        self, space: SearchSpace, max_epochs: int, concurrency: int, existing_runs: Sequence[Trial]
    ) -> None:
        """Begin to measure.

        Args:
            space: The sweep's search space.
            max_epochs: Epochs of a trial that is not stopped early.
            concurrency: Number of trials that run at the same time, at least 1.
            existing_runs: Trials, base runs and repeats that were started before.
        """
        self._space, self._max_epochs, self._concurrency = space, max_epochs, concurrency
        self._before: Mapping[str, Trial] = {run.key: run for run in existing_runs}

    def estimate_seconds_left(
        self, trials: Sequence[Trial], other_runs: Sequence[Trial]
    ) -> float | None:
        """Estimate the wall seconds until the last trial, base run or repeat ends.

        The epochs that are expected are multiplied by the seconds that an epoch took on average,
        those included whose state came from another trial.

        Args:
            trials: All trials that have started, as they are now.
            other_runs: All base runs and repeats that have started.

        Returns:
            The estimate; None before the first epoch has ended.
        """
        runs = [*trials, *other_runs]
        earlier = [self._before[run.key] for run in runs if run.key in self._before]
        n_epochs = count_epochs(runs).completed - count_epochs(earlier).completed
        seconds = sum(run.seconds for run in runs) - sum(run.seconds for run in earlier)
        if n_epochs <= 0 or seconds <= 0:
            return None
        lengths = self._list_expected_epochs(trials) + [
            self._max_epochs - run.epoch for run in other_runs if run.state == "running"
        ]
        n_other_runs = self._space.count_all_runs() - self._space.n_trials
        lengths += [self._max_epochs] * max(0, n_other_runs - len(other_runs))
        if not lengths:
            return 0.0
        # Runs at the same time share the work; none is shorter than the longest of them.
        epochs_in_a_row = max(sum(lengths) / min(self._concurrency, len(lengths)), max(lengths))
        return seconds / n_epochs * epochs_in_a_row

    def estimate_autoattack_seconds_left(
        self, trials: Sequence[Trial], other_runs: Sequence[Trial]
    ) -> float | None:
        """Estimate the wall seconds that AutoAttack still takes on the finalists and base runs.

        Args:
            trials: All trials that have started, as they are now.
            other_runs: All base runs and repeats that have started.

        Returns:
            The estimate, from the attacks that this process has seen or, before the first, from the
            validations; None before the first validation.
        """
        runs = [*trials, *other_runs]
        attacked = [run for run in runs if _has_current_attack(run)]
        n_left = max(0, self._count_attacks() - len(attacked))
        if not n_left:
            return 0.0
        newly_attacked = [
            run for run in attacked if not _has_current_attack(self._before.get(run.key))
        ]
        if newly_attacked:
            return n_left * fmean(run.finalist.seconds for run in newly_attacked if run.finalist)
        validation = self._space.trial_config({}).validation
        estimates = [
            seconds
            for run in runs
            if (seconds := estimate_autoattack_seconds(validation, run.best)) is not None
        ]
        # The median, because other work on a machine may have slowed down some validations.
        return n_left * median(estimates) / self._concurrency if estimates else None

    def _count_attacks(self) -> int:
        """Return the number of trainings that AutoAttack attacks in the whole sweep."""
        n_finalists = min(self._space.finalists or 0, self._space.n_trials)
        if not n_finalists:
            return 0
        n_repeats = sum(min(n, n_finalists) for n in self._space.leaders_by_round)
        n_base_runs = (self._space.base_runs or 0) if len(self._space.objectives) == 1 else 0
        return n_finalists + n_repeats + n_base_runs

    def _list_expected_epochs(self, trials: Sequence[Trial]) -> list[float]:
        """List the epochs that each trial which has not ended is expected to need."""
        ended = [trial.epoch for trial in trials if trial.state in ("finished", "stopped")]
        lengths = [
            expected_trial_epochs(self._space, self._max_epochs, trial.epoch)
            for trial in trials
            if trial.state == "running"
        ]
        expected = expected_trial_epochs(self._space, self._max_epochs)
        if len(ended) >= _MIN_ENDED_TRIALS:
            expected = sum(ended) / len(ended)
        return lengths + [expected] * max(0, self._space.n_trials - len(trials))


def _has_current_attack(run: Trial | None) -> bool:
    """Return whether AutoAttack has attacked the best epoch of a run."""
    return (
        run is not None and run.finalist is not None and run.finalist.epoch == run.best.get("epoch")
    )
