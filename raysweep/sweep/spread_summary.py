"""Which trials of a sweep cannot be told apart, and how much of their spread is measurement."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from raysweep.evaluation.paired_statistics import (
    SPREAD_CONFIDENCE,
    PairedDifference,
    SpreadSplit,
    compare_groups,
    estimate_training_variance,
    split_spread,
)
from raysweep.lazy_modules import np
from raysweep.spec import JsonDict, json_digest
from raysweep.sweep.ledger import EarlyEnd, Ledger
from raysweep.sweep.run_verdicts import pair_verdicts, stack_verdicts
from raysweep.sweep.trial import Trial

MIN_SPLIT_TRIALS = 4
"""Fully trained trials from which the spread is split into settings and measurement."""
MIN_CONCLUSIVE_TRIALS = 8
"""Trials from which a sweep with `until: told-apart` may end early."""
FLAT_SHARE = 0.5
"""A landscape is flat if the settings' share of the spread is below this with 95% confidence."""
_MAX_NUMBERS_SHOWN = 12
# More images or seeds than these are no advice.
_MAX_EXAMPLES_SHOWN, _MAX_SEEDS_SHOWN = 1_000_000, 1000


@dataclass(frozen=True)
class SpreadSummary:
    """Comparison of the trials of a sweep on the same validation examples.

    Attributes:
        best: The best trial.
        n_examples: Number of validation examples.
        differences: By number of each other trial: score of the best trial minus its own, each the
            mean over the seeds if there are several. The intervals hold together: with 95%
            confidence none of them is wrong.
        split: Parts of the spread of the fully trained trials; of all trials at ASHA's first rung
            if fewer than `MIN_SPLIT_TRIALS` were fully trained; None if the rung has fewer, too.
        rung: Epoch of this rung; None if `split` is of fully trained trials.
        n_finished: Number of fully trained trials.
    """

    best: Trial
    n_examples: int
    differences: Mapping[int, PairedDifference]
    split: SpreadSplit | None
    rung: int | None = None
    n_finished: int = 0

    @property
    def like_best(self) -> list[int]:
        """Numbers of the trials that may be as good as the best one, without its own: those that
        cannot be told apart from it, and `surpassing`.
        """
        return [n for n, pair in self.differences.items() if pair.verdict != "better"]

    @property
    def surpassing(self) -> list[int]:
        """Numbers of the trials whose checkpoints are better than that of the best one. The score
        ranks that one first, or the mean over its seeds.
        """
        return [n for n, pair in self.differences.items() if pair.verdict == "worse"]

    def describe_mark(self, trial: Trial) -> str:
        """Return the mark of a trial in tables: "best", "yes" if it may be as good, or ""."""
        if trial.key == self.best.key:
            return "best"
        pair = self.differences.get(trial.number) if trial.kind == "trial" else None
        return "" if pair is None or pair.verdict == "better" else "yes"

    def to_json_dict(self) -> JsonDict:
        """Return plain data for `--json`."""
        split = None
        if self.split is not None:
            split = {
                **vars(self.split),
                "rung": self.rung,
                "needed_examples": self.split.needed_examples,
                "needed_seeds": self.split.needed_seeds,
            }
        return {
            "best": self.best.number,
            "examples": self.n_examples,
            "like_best": self.like_best,
            "differences": [
                {"trial": number, "difference": pair.difference, "interval": [pair.low, pair.high]}
                for number, pair in self.differences.items()
            ],
            "spread": split,
        }


def summarize_spread(
    ledger: Ledger, ranked_trials: Sequence[Trial] | None = None
) -> SpreadSummary | None:
    """Compare the trials of a sweep that have ended and may be chosen, example by example.

    Args:
        ledger: The sweep.
        ranked_trials: Its trials, best first; by default those of `Ledger.rank_trials`.

    Returns:
        The comparison; None for a sweep with several objectives, before two trials have ended, or
        if the trials are those of an earlier version of raysweep.
    """
    if len(ledger.space.objectives) > 1:
        return None
    ranked = ledger.rank_trials() if ranked_trials is None else ranked_trials
    trials = select_comparable_runs(ledger, ranked)
    best_verdicts = trials[0].best_verdicts if trials else None
    if best_verdicts is None:
        return None
    best = trials[0]
    others = [
        trial
        for trial in trials[1:]
        if stack_verdicts([*best.trainings, *trial.trainings]) is not None
    ]
    if not others:
        return None
    groups = [_stack_seeds(trial) for trial in [best, *others]]
    training_variance = estimate_training_variance(groups)
    differences = {}
    for trial in others:
        pair = pair_verdicts(best.trainings, trial.trainings)
        assert pair is not None
        differences[trial.number] = compare_groups(*pair[:2], len(others), training_variance)
    finished = [trial for trial in [best, *others] if trial.state == "finished"]
    split, rung = _split_trials(finished), None
    if len(finished) < MIN_SPLIT_TRIALS:
        split, rung = _split_at_rung(trials)
    n_examples = best_verdicts.n_examples
    return SpreadSummary(best, n_examples, differences, split, rung, len(finished))


def select_comparable_runs(ledger: Ledger, runs: Sequence[Trial]) -> list[Trial]:
    """Return the trials or base runs that have ended and may be chosen, in the same order.

    Args:
        ledger: The sweep.
        runs: Trials or base runs of the sweep.
    """
    return [run for run in runs if run.state != "running" and ledger.rank_trial(run).is_eligible]


def _split_trials(trials: Sequence[Trial]) -> SpreadSplit | None:
    """Split the spread of fully trained trials and their repeats; None if there are too few."""
    if len(trials) < MIN_SPLIT_TRIALS:
        return None
    groups = [_stack_seeds(trial) for trial in trials]
    runs = [run for trial in trials for run in trial.trainings]
    return split_spread(np.concatenate(groups), [_digest_without_seed(run) for run in runs])


def _split_at_rung(trials: Sequence[Trial]) -> tuple[SpreadSplit | None, int | None]:
    """Split the spread of all trials at ASHA's first rung.

    Trials whose weights had not acted there have no verdicts of it.

    Returns:
        The parts and the epoch; (None, None) if too few trials were compared there.
    """
    known = [trial.rung_verdicts for trial in trials if trial.rung_verdicts is not None]
    if not known:
        return None, None
    compared = [
        trial
        for trial in trials
        if (verdicts := trial.rung_verdicts) is not None
        and verdicts.epoch == known[0].epoch
        and verdicts.is_comparable(known[0])
    ]
    if len(compared) < MIN_SPLIT_TRIALS:
        return None, None
    at_rung = [
        replace(
            trial,
            best={"epoch": float(known[0].epoch)},
            repeats=(),
            verdicts=trial.rung_verdicts,
            state="finished",
        )
        for trial in compared
    ]
    return _split_trials(at_rung), known[0].epoch


def _stack_seeds(trial: Trial) -> "np.ndarray":
    """Return what each seed of a trial gets right by the objective, (seeds, N)."""
    scores = stack_verdicts(trial.trainings)
    assert scores is not None
    return scores


def _digest_without_seed(trial: Trial) -> str:
    """Return a digest of the searched settings of a trial or repeat without its seed."""
    return json_digest({path: value for path, value in trial.params.items() if path != "seed"})


def find_early_end(ledger: Ledger, trials: Sequence[Trial]) -> EarlyEnd | None:
    """Find the reason why a sweep needs no more trials (see `SearchSpace.until`).

    Args:
        ledger: The sweep.
        trials: All its trials, in any order.

    Returns:
        The reason; None if the sweep needs more trials, or if they cannot be compared.
    """
    measured = [trial for trial in trials if trial.best]
    ranked = sorted(measured, key=lambda trial: (ledger.rank_trial(trial), trial.number))
    summary = summarize_spread(ledger, ranked)
    if summary is None:
        return None
    return decide_early_end(summary.differences, None if summary.rung else summary.split)


def decide_early_end(
    differences: Mapping[int, PairedDifference], split: SpreadSplit | None
) -> EarlyEnd | None:
    """Decide whether the answer of a sweep is clear, as `find_early_end` does.

    Args:
        differences: By number of each other trial: score of the best trial minus its own.
        split: What the spread of the fully trained trials consists of; None if unknown.

    Returns:
        The reason why no more trials are needed; None if more are.
    """
    if len(differences) + 1 < MIN_CONCLUSIVE_TRIALS:
        return None
    # One that is told apart as the better checkpoint contradicts the ranking: nothing is clear yet.
    if all(pair.verdict == "better" for pair in differences.values()):
        return "told-apart"
    if split is None or split.n_models < MIN_CONCLUSIVE_TRIALS:
        return None
    return "flat" if split.share_high < FLAT_SHARE else None


def describe_early_end(reason: EarlyEnd) -> str:
    """Describe why a sweep needs no more trials, in words."""
    if reason == "told-apart":
        return "the best trial is told apart from the others"
    return (
        "the landscape is flat: with 95% confidence settings explain less than "
        f"{FLAT_SHARE:.0%} of the spread"
    )


def describe_spread(ledger: Ledger) -> list[str]:
    """Describe which trials cannot be told apart, and what the spread of all consists of.

    Args:
        ledger: The sweep.

    Returns:
        The lines; empty where `summarize_spread` compares nothing.
    """
    summary = summarize_spread(ledger)
    if summary is None:
        return []
    lines = _describe_like_best(summary)
    if (reason := ledger.load_early_end()) is not None:
        n_trials = ledger.space.n_trials
        lines.insert(
            0,
            f"ended early, with {len(ledger.load_trials())} of {n_trials} trials: "
            f"{describe_early_end(reason)} (until = {ledger.space.until})",
        )
    return [*lines, *describe_settings_share(summary)]


def describe_settings_share(summary: SpreadSummary) -> list[str]:
    """Describe which share of the spread the settings explain, or that it is not known.

    Args:
        summary: Comparison of the trials of a sweep.

    Returns:
        One line; none if the sweep has too few trials and none of them was stopped.
    """
    has_stopped = len(summary.differences) + 1 > summary.n_finished
    if summary.split is None:
        if not has_stopped or summary.n_finished >= MIN_SPLIT_TRIALS:
            return []
        return [f"how much the settings explain is not known: {_describe_few_trials(summary)}"]
    if summary.rung is None:
        return [describe_split(summary.split)]
    split = summary.split
    return [
        f"at epoch {summary.rung}, ASHA's first rung, settings explain at most "
        f"{split.share:.0%} of the spread of {split.n_models} trials ({SPREAD_CONFIDENCE:.0%} "
        f"interval {split.share_low:.0%} to {split.share_high:.0%}); the share at the end is not "
        f"known: {_describe_few_trials(summary)}"
    ]


def _describe_few_trials(summary: SpreadSummary) -> str:
    """Describe that too few trials were trained to the end."""
    n_finished, plural = summary.n_finished, "" if summary.n_finished == 1 else "s"
    was = "was" if n_finished == 1 else "were"
    return (
        f"only {n_finished} trial{plural} {was} trained to the end, and {MIN_SPLIT_TRIALS} are "
        "needed"
    )


def _describe_like_best(summary: SpreadSummary) -> list[str]:
    """Return the lines about the trials that may be as good as the best one."""
    where = f"on the same {summary.n_examples} validation images"
    n_others = len(summary.differences)
    surpassing = summary.surpassing
    undecided = [number for number in summary.like_best if number not in surpassing]
    best = f"trial {summary.best.number:04d}"
    if not summary.like_best:
        margin = min(pair.low for pair in summary.differences.values())
        return [
            f"{best} is told apart from the other {n_others} trials {where}: it is better than "
            f"each by at least {margin:.3f}"
        ]
    lines = []
    if len(undecided) == n_others:
        lines.append(f"these {1 + n_others} trials cannot be told apart {where}")
    elif undecided:
        plural = "s" if len(undecided) > 1 else ""
        lines.append(
            f"trial{plural} {format_trial_numbers(undecided)} cannot be told apart from the best, "
            f"{best}, {where}"
        )
    if surpassing:
        plural, verb = ("s", "do") if len(surpassing) > 1 else ("", "does")
        lines.append(
            f"the checkpoint{plural} of trial{plural} {format_trial_numbers(surpassing)} {verb} "
            f"better {where} than that of {best}, which is ranked first"
        )
    return lines


def describe_split(split: SpreadSplit) -> str:
    """Describe which share of the spread the settings explain, and what would tell trials apart.

    Args:
        split: Parts of the spread of fully trained trials.
    """
    # Without repeats, the randomness of training counts as an effect of the settings.
    limit = "" if split.n_repeats else "at most "
    trained = f"{split.n_models} fully trained trials"
    if split.n_repeats:
        trained = f"{split.n_models} full trainings, {split.n_repeats} of them with another seed"
    text = (
        f"settings explain {limit}{split.share:.0%} of the spread of the {trained} "
        f"({SPREAD_CONFIDENCE:.0%} interval {split.share_low:.0%} to {split.share_high:.0%})"
    )
    remedies = []
    examples, seeds = split.needed_examples, split.needed_seeds
    if examples is not None and split.n_examples < examples <= _MAX_EXAMPLES_SHOWN:
        remedies.append(f"{_round_up(examples):,} validation images")
    if seeds is not None and 1 < seeds <= _MAX_SEEDS_SHOWN:
        remedies.append(f"{seeds} seeds each")
    if remedies:
        text += f"; {' or '.join(remedies)} would tell two typical settings apart"
    elif seeds is None:
        text += "; nothing shows that they differ"
    return text


def format_trial_numbers(numbers: Sequence[int]) -> str:
    """Return the numbers of trials as `0000, 0001 and 3 more`."""
    shown = ", ".join(f"{number:04d}" for number in numbers[:_MAX_NUMBERS_SHOWN])
    n_more = len(numbers) - _MAX_NUMBERS_SHOWN
    return f"{shown} and {n_more} more" if n_more > 0 else shown


def _round_up(count: int) -> int:
    """Round a number up to two digits."""
    unit: int = 10 ** max(0, math.floor(math.log10(count)) - 1)
    return math.ceil(count / unit) * unit
