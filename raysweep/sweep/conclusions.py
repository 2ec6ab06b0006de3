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
