"""Which trials of a sweep get further seeds, by successive halving, and which of these count."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from raysweep.evaluation.paired_statistics import compare_groups, estimate_training_variance
from raysweep.sweep.run_verdicts import stack_verdicts
from raysweep.sweep.search_space import SearchSpace
from raysweep.sweep.trial import Trial
from raysweep.training.selection import RunRank


@dataclass(frozen=True)
class RepeatPlan:
    """State of the repeats of a sweep (see `SearchSpace.repeat`).

    Attributes:
        trials: All trials of the sweep, ordered by number, with the repeats that count: those of
            complete rounds.
        leaders: The trials between which the last complete round decided, best first; [] before
            the first.
        waiting: Repeats of the round that is not complete, as far as they have not ended.
        is_told_apart: Whether no more rounds follow because the best of `leaders` is told apart
            from the others.
    """

    trials: tuple[Trial, ...]
    leaders: tuple[Trial, ...] = ()
    waiting: tuple[Trial, ...] = ()
    is_told_apart: bool = False


def plan_repeats(
    space: SearchSpace,
    trials: Sequence[Trial],
    repeats: Sequence[Trial],
    rank: Callable[[Trial], RunRank],
) -> RepeatPlan:
    """Find out which repeats a sweep needs next, and which count already.

    A round gives each of its leaders one more seed, the same for all. It is complete when all these
    repeats have ended; only then do they count, because the mean over seeds of some trials beside
    the single best results of others would favour the others. Of the leaders that have a result
    with each seed, the better half by the mean over the seeds are the leaders of the next round.

    Args:
        space: The sweep's search space.
        trials: Its trials, ordered by number. Those that have ended and are eligible can be
            leaders.
        repeats: The repeats that were ever started.
        rank: Returns the rank of a trial or repeat by the objective, as the mean over its seeds.

    Returns:
        The plan.
    """
    run_by_key = {run.key: run for run in repeats}
    by_number = {trial.number: trial for trial in trials}
    ended = [trial for trial in trials if trial.state != "running" and rank(trial).is_eligible]
    ranked = sorted(ended, key=lambda trial: (rank(trial), trial.number))
    leaders: list[Trial] = []
    waiting: list[Trial] = []
    is_told_apart = False
    for n_seeds, n_leaders in enumerate(space.leaders_by_round, 2):
        is_told_apart = is_first_told_apart(leaders)
        if is_told_apart or len(ranked) < 2:
            break
        seed = space.trial_config({}).seed + n_seeds - 1
        chosen = ranked[:n_leaders]
        new_runs = [_make_repeat(trial, seed) for trial in chosen]
        runs = [run_by_key.get(run.key, run) for run in new_runs]
        waiting = [run for run in runs if run.state == "running"]
        if waiting:
            break
        repeated = [
            replace(trial, repeats=(*trial.repeats, run))
            for trial, run in zip(chosen, runs, strict=True)
            if rank(run).is_eligible
        ]
        leaders = ranked = sorted(repeated, key=lambda trial: (rank(trial), trial.number))
        by_number |= {trial.number: trial for trial in leaders}
    else:
        is_told_apart = is_first_told_apart(leaders)
    return RepeatPlan(tuple(by_number.values()), tuple(leaders), tuple(waiting), is_told_apart)


def _make_repeat(trial: Trial, seed: int) -> Trial:
    """Return a repeat of a trial, before its first epoch."""
    return Trial(trial.number, {**trial.params, "seed": seed}, kind="repeat")


def is_first_told_apart(trials: Sequence[Trial]) -> bool:
    """Return whether the first of several repeated trials is told apart from each of the others.

    Their means over the seeds are compared on the same validation examples. The intervals allow for
    the randomness of training, as far as the seeds show it, and hold together (Bonferroni).

    Args:
        trials: Trials with the same number of seeds, best first.

    Returns:
        The answer; False for less than two trials, and if their verdicts are not known.
    """
    groups = [stack_verdicts(trial.trainings) for trial in trials]
    known = [scores for scores in groups if scores is not None]
    if len(known) < max(2, len(trials)) or len({scores.shape[1] for scores in known}) > 1:
        return False
    training_variance = estimate_training_variance(known)
    first, *others = known
    return all(
        compare_groups(first, scores, len(others), training_variance).low > 0 for scores in others
    )
