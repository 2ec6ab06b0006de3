"""What the results of a sweep show, in the lines that the terminal, MLflow and reports print."""

from raysweep.sweep.base_comparison import describe_base_comparison
from raysweep.sweep.finalist_summary import describe_finalists
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.repeat_summary import describe_repeats
from raysweep.sweep.spread_summary import describe_spread


def describe_conclusions(ledger: Ledger) -> list[str]:
    """Describe what AutoAttack, further seeds, the spread of the trials and the base method show.

    Args:
        ledger: The sweep.

    Returns:
        The lines, as far as there is something to compare.

    Raises:
        DamagedFileError: If a file of a trial is damaged.
    """
    return [
        *describe_finalists(ledger),
        *describe_repeats(ledger),
        *describe_spread(ledger),
        *describe_base_comparison(ledger),
    ]


def describe_complete_failure(ledger: Ledger) -> str:
    """Describe that no trial of a sweep has a result because trials failed.

    Args:
        ledger: The sweep.

    Returns:
        One line with the first reason; "" if a trial has a result, or if none failed.
    """
    trials = ledger.load_trials()
    failed = [trial for trial in trials if trial.state == "failed"]
    if not failed or ledger.find_best_trial() is not None:
        return ""
    count = "every trial" if len(failed) == len(trials) else "no trial has a result:"
    if len(failed) < len(trials):
        count += f" {len(failed)} of {len(trials)}"
    return f"{count} failed; the first: {failed[0].reason}"
