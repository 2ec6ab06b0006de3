"""Compare the objective of a sweep with AutoAttack on its finalists."""

from collections.abc import Sequence
from dataclasses import dataclass

from raysweep.spec import JsonDict
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.trial import Trial
from raysweep.training.validation import is_robust_objective

# Accuracies are shown with three digits.
_SMALLEST_SHOWN = 5e-4


@dataclass(frozen=True)
class FinalistSummary:
    """Comparison of the objective with AutoAttack on the finalists of a sweep.

    Attributes:
        objective: The (first) objective that is an accuracy under attacks.
        n_examples: Number of validation images.
        by_objective: The finalists in their order before AutoAttack, by score or objective, best
            first; not empty.
        by_autoattack: The same trials by their corrected scores, best first.
        front: With several objectives the members of the Pareto front under AutoAttack; else empty.
    """

    objective: str
    n_examples: int
    by_objective: tuple[Trial, ...]
    by_autoattack: tuple[Trial, ...]
    front: tuple[Trial, ...] = ()

    @property
    def overestimates(self) -> list[float]:
        """Objective minus accuracy under AutoAttack, for each of `by_objective`."""
        return [
            trial.best_epoch_value(self.objective) - trial.final_value(self.objective)
            for trial in self.by_objective
        ]

    @property
    def gain(self) -> float:
        """Corrected score of the chosen trial, minus that of the trial that would have been chosen
        without AutoAttack; at least 0 with one objective.
        """
        chosen, expected = self.by_autoattack[0], self.by_objective[0]
        return chosen.corrected_score(self.objective) - expected.corrected_score(self.objective)

    def to_json_dict(self) -> JsonDict:
        """Return plain data for `--json`."""
        return {
            "attack": "autoattack",
            "examples": self.n_examples,
            "objective": self.objective,
            "chosen_by_objective": self.by_objective[0].number,
            "chosen": self.by_autoattack[0].number,
            "gain": self.gain,
            "trials": [
                {
                    "trial": trial.number,
                    "objective": trial.best_epoch_value(self.objective),
                    "robust": trial.final_value(self.objective),
                    "corrected_score": trial.corrected_score(self.objective),
                }
                for trial in self.by_autoattack
            ],
        }


def summarize_finalists(ledger: Ledger) -> FinalistSummary | None:
    """Compare the objective of a sweep with AutoAttack on its finalists.

    Args:
        ledger: The sweep.

    Returns:
        The comparison; None if AutoAttack has not attacked all finalists, or there are none.
    """
    by_objective = ledger.find_attacked_finalists()
    if not by_objective:
        return None
    numbers = {trial.number for trial in by_objective}
    by_autoattack = [trial for trial in ledger.rank_trials() if trial.number in numbers]
    objective = next(filter(is_robust_objective, ledger.space.objectives))
    assert by_objective[0].finalist is not None
    return FinalistSummary(
        objective,
        by_objective[0].finalist.n_examples,
        tuple(by_objective),
        tuple(by_autoattack),
        tuple(ledger.unmasked_pareto_front()) if len(ledger.space.objectives) > 1 else (),
    )


def describe_finalists(ledger: Ledger) -> list[str]:
    """Describe the results of AutoAttack, and whether they changed which trial is the best.

    Args:
        ledger: The sweep.

    Returns:
        The lines; empty without finalists, or while some of them have not been attacked.
    """
    summary = summarize_finalists(ledger)
    if summary is None:
        return _describe_failed_attacks(ledger)
    name = summary.objective.replace("_", " ")
    chooser = "the score" if ledger.space.has_score else name
    results = ", ".join(
        f"trial {trial.number:04d} {trial.final_value(summary.objective):.3f} "
        f"({name} {trial.best_epoch_value(summary.objective):.3f})"
        for trial in summary.by_autoattack
    )
    lines = [f"AutoAttack on {summary.n_examples} validation images: {results}"]
    if len(ledger.space.objectives) > 1:
        lines.append(_describe_new_front(summary))
    elif summary.by_autoattack[0].number == summary.by_objective[0].number:
        lines.append(f"{chooser} alone would have chosen the same trial")
    else:
        other = f"trial {summary.by_objective[0].number:04d}"
        if chooser == "the score":
            text = (
                f"{other}, whose score, lowered by AutoAttack, is {summary.gain:.3f} below that of "
                f"trial {summary.by_autoattack[0].number:04d}"
            )
        else:
            text = f"{other}, which is {summary.gain:.3f} worse under AutoAttack"
        lines.append(f"{chooser} alone would have chosen {text}")
    lines.append(_describe_overestimates(name, summary.overestimates))
    return lines


def describe_ranking(ledger: Ledger) -> str:
    """Describe by what `Ledger.rank_trials` ranks, after the words "trials by".

    Args:
        ledger: The sweep.
    """
    order = f"{ledger.space.describe_score()} on the validation split"
    n_finalists = len(ledger.find_attacked_finalists())
    if not n_finalists:
        return order
    if ledger.space.has_score:
        return f"{order}, lowered by AutoAttack for the first {n_finalists}"
    return f"AutoAttack (the first {n_finalists}), then by {order}"


def _describe_failed_attacks(ledger: Ledger) -> list[str]:
    """Say which finalists AutoAttack could not attack, so that the ranking leaves it out."""
    errors = [
        f"AutoAttack could not attack {run.title}: {run.finalist.error}; the ranking leaves "
        "AutoAttack out"
        for trial in ledger.rank_trials()
        for run in trial.trainings
        if run.finalist is not None and run.finalist.error
    ]
    return errors if ledger.has_ended() else []


def _describe_new_front(summary: FinalistSummary) -> str:
    """Say which trials AutoAttack takes from the Pareto front."""
    kept = {trial.number for trial in summary.front}
    lost = [f"{t.number:04d}" for t in summary.by_objective if t.number not in kept]
    if not lost:
        return "the Pareto front keeps all its trials under AutoAttack"
    return f"trials that leave the Pareto front under AutoAttack: {', '.join(lost)}"


def _describe_overestimates(name: str, overestimates: Sequence[float]) -> str:
    """Say by how much the objective was above the accuracy under AutoAttack."""
    low, high = max(0.0, min(overestimates)), max(overestimates)
    if high < _SMALLEST_SHOWN:
        return f"{name} was not too high for any of them"
    amount = f"{high:.3f}" if high - low < _SMALLEST_SHOWN else f"{low:.3f} to {high:.3f}"
    return f"{name} was {amount} too high"
