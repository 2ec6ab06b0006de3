"""What further seeds show about the best trials of a sweep (see `SearchSpace.repeat`)."""

from dataclasses import dataclass, replace

from raysweep.formatting import format_count
from raysweep.spec import JsonDict
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.trial import Trial


@dataclass(frozen=True)
class RepeatSummary:
    """Results of the trials of a sweep that have several seeds.

    Attributes:
        objective: The sweep's objective.
        trials: The repeated trials with their repeats, best first by the mean over the seeds; not
            empty.
        best_by_one_seed: Number of the trial that the first seed alone would have chosen.
        is_told_apart: Whether the best is told apart from those that have as many seeds.
    """

    objective: str
    trials: tuple[Trial, ...]
    best_by_one_seed: int
    is_told_apart: bool

    def to_json_dict(self) -> JsonDict:
        """Return plain data for `--json`."""
        return {
            "objective": self.objective,
            "chosen_by_one_seed": self.best_by_one_seed,
            "chosen": self.trials[0].number,
            "told_apart": self.is_told_apart,
            "trials": [
                {
                    "trial": trial.number,
                    "mean": trial.score(self.objective),
                    "scores": list_seed_scores(trial, self.objective),
                }
                for trial in self.trials
            ],
        }


def list_seed_scores(trial: Trial, metric: str) -> list[float]:
    """Return the score of each training of a trial by a metric, its own first."""
    return [replace(run, repeats=()).score(metric) for run in trial.trainings]


def summarize_repeats(ledger: Ledger) -> RepeatSummary | None:
    """Summarize the complete rounds of repeats of a sweep.

    Args:
        ledger: The sweep.

    Returns:
        The summary; None if no round is complete.
    """
    plan = ledger.load_repeat_plan()
    repeated = [trial for trial in plan.trials if trial.repeats]
    if not repeated:
        return None
    repeated.sort(key=lambda trial: (ledger.rank_trial(trial), trial.number))
    ended = [replace(trial, repeats=()) for trial in plan.trials if trial.state != "running"]
    first = min(ended, key=lambda trial: (ledger.rank_trial(trial), trial.number))
    objective = ledger.space.objectives[0]
    return RepeatSummary(objective, tuple(repeated), first.number, plan.is_told_apart)


def describe_repeats(ledger: Ledger) -> list[str]:
    """Describe in lines what further seeds show about the best trials.

    Args:
        ledger: The sweep.

    Returns:
        The lines, also one for each repeat that failed; empty for a sweep without repeats.
    """
    if not ledger.space.leaders_by_round:
        return []
    failed = [run for run in ledger.load_repeats() if run.state == "failed"]
    lines = [f"{run.title} failed: {run.reason}" for run in failed]
    summary = summarize_repeats(ledger)
    if summary is None:
        return lines
    name = ledger.space.score_name.replace("_", " ")
    means = []
    for trial in summary.trials:
        scores = ", ".join(f"{score:.3f}" for score in list_seed_scores(trial, summary.objective))
        means.append(f"trial {trial.number:04d} {trial.score(summary.objective):.3f} ({scores})")
    lines.append(f"mean {name} over seeds: {', '.join(means)}")
    best = summary.trials[0]
    choice = f"trial {summary.best_by_one_seed:04d}"
    if best.number == summary.best_by_one_seed:
        choice = "the same trial"
    n_seeds = len(best.trainings)
    rivals = [trial for trial in summary.trials[1:] if len(trial.trainings) == n_seeds]
    if rivals:
        verb = "is" if summary.is_told_apart else "cannot be"
        numbers = ", ".join(f"{trial.number:04d}" for trial in rivals)
        lines.append(
            f"with {format_count(n_seeds, 'seed')} trial {best.number:04d} {verb} told apart from "
            f"trial{'s' if len(rivals) > 1 else ''} {numbers}"
        )
    return [*lines, f"one seed alone would have chosen {choice}"]
