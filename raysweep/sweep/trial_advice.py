"""Notes on the training of a sweep's trial."""

from raysweep.sweep.ledger import Ledger
from raysweep.training.checkpoint import RunDirectory
from raysweep.training.metric_advice import advise_on_training


def advise_on_trial(ledger: Ledger, trial_number: int) -> list[str]:
    """Explain conspicuous metrics of a trial, such as symptoms of masked gradients.

    Args:
        ledger: The sweep.
        trial_number: Number of the trial.

    Returns:
        Sentences; empty before the trial's first epoch, or if no metric is conspicuous.

    Raises:
        SpecError: The trial's last checkpoint is damaged.
    """
    last = RunDirectory(ledger.trial_path(trial_number)).read_last_checkpoint()
    return advise_on_training(last.config, last.history) if last else []
