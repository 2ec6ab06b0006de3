"""Whether the best trial of a sweep beats the base method, the method without instance weights."""

from dataclasses import dataclass

from raysweep.evaluation.paired_statistics import (
    PairedDifference,
    compare_groups,
    estimate_training_variance,
)
from raysweep.formatting import format_count
from raysweep.spec import JsonDict
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.run_verdicts import pair_verdicts
from raysweep.sweep.spread_summary import select_comparable_runs
from raysweep.sweep.trial import Trial


@dataclass(frozen=True)
class BaseComparison:
    """Comparison of the best trial with the base runs, on the same examples.

    Attributes:
        method: Name of the sweep's method.
        base_method: Name of its base method.
        best: The best trial.
        base_runs: The base runs that have a result.
        n_compared: Number of trials of which `best` is the best.
        n_examples: Number of validation examples.
        is_autoattack: Whether the verdicts are those of AutoAttack; else of the objective.
        difference: Accuracy of the best trial, as the mean over its seeds, minus that of the base
            method. The interval allows for the randomness of training, as far as seeds differ by
            more than the choice of the examples explains.
    """

    method: str
    base_method: str
    best: Trial
    base_runs: tuple[Trial, ...]
    n_compared: int
    n_examples: int
    is_autoattack: bool
    difference: PairedDifference

    @property
    def verdict(self) -> str:
        """How the best trial compares with the base method: "better", "worse" or "cannot tell"."""
        return self.difference.verdict

    def to_json_dict(self) -> JsonDict:
        """Return plain data for `--json`."""
        return {
            "method": self.method,
            "base_method": self.base_method,
            "best": self.best.number,
            "best_seeds": len(self.best.trainings),
            "seeds": [run.params["seed"] for run in self.base_runs],
            "compared_trials": self.n_compared,
            "examples": self.n_examples,
            "attack": "autoattack" if self.is_autoattack else "objective",
            "difference": self.difference.difference,
            "interval": [self.difference.low, self.difference.high],
            "verdict": self.verdict,
        }


def compare_with_base(ledger: Ledger) -> BaseComparison | None:
    """Compare the best trial of a sweep with the base method.

    Args:
        ledger: The sweep.

    Returns:
        The comparison; None without base runs, for a sweep with several objectives, until a trial
        and a base run have ended with a result, and if they were not measured on the same examples.
    """
    if not ledger.space.base_runs or len(ledger.space.objectives) > 1:
        return None
    trials = select_comparable_runs(ledger, ledger.rank_trials())
    base_runs = select_comparable_runs(ledger, ledger.load_base_runs())
    if not trials or not base_runs:
        return None
    best = trials[0]
    pair = pair_verdicts(best.trainings, base_runs)
    if pair is None:
        return None
    best_scores, base_scores, is_autoattack = pair
    training_variance = estimate_training_variance([best_scores, base_scores])
    return BaseComparison(
        ledger.space.trial_config({}).method.name,
        ledger.space.base_method_name,
        best,
        tuple(base_runs),
        len(trials),
        best_scores.shape[1],
        is_autoattack,
        compare_groups(best_scores, base_scores, len(trials), training_variance),
    )


def describe_base_comparison(ledger: Ledger) -> list[str]:
    """Describe whether the best trial beats the base method.

    Args:
        ledger: The sweep.

    Returns:
        The lines, also one for each base run that failed; empty for a sweep without base runs.
    """
    failed = [run for run in ledger.load_base_runs() if run.state == "failed"]
    lines = [f"{ledger.describe_row(run)} failed: {run.reason}" for run in failed]
    comparison = compare_with_base(ledger)
    if comparison is None:
        return lines
    pair, best = comparison.difference, f"trial {comparison.best.number:04d}"
    if comparison.best.repeats:
        best += f" ({format_count(len(comparison.best.trainings), 'seed')})"
    base = f"{comparison.base_method} ({format_count(len(comparison.base_runs), 'seed')})"
    attack = "AutoAttack" if comparison.is_autoattack else "the objective"
    n_compared = format_count(comparison.n_compared, "trial")
    numbers = (
        f"{best} is {abs(pair.difference):.3f} {'better' if pair.difference >= 0 else 'worse'} "
        f"than {base} by {attack} on the same {comparison.n_examples} validation images (95% "
        f"interval for the best of {n_compared}: {pair.low:+.3f} to {pair.high:+.3f})"
    )
    conclusion = {
        "better": f"{comparison.method} beats {comparison.base_method}",
        "worse": f"{comparison.base_method} beats {comparison.method}",
        "cannot tell": (
            f"{comparison.method} cannot be told apart from {comparison.base_method}, which has "
            "no instance weights"
        ),
    }
    return [*lines, f"{conclusion[comparison.verdict]}: {numbers}"]
