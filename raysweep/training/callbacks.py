"""Callbacks with which a caller of `train_model` observes a run and can interrupt it."""

from collections.abc import Callable

from raysweep.training.checkpoint import TrainingCheckpoint
from raysweep.training.metric_history import EpochMetrics


class TrainingCallback:
    """Observes a training run. Subclasses override the methods that they need.

    The methods of this class do nothing. With several workers, each worker calls its own callback.
    An exception in a callback ends the training.
    """

    def on_epoch_end(self, metrics: EpochMetrics, checkpoint: TrainingCheckpoint) -> None:
        """Receive the metrics of an epoch after its checkpoint was written.

        With one worker, the checkpoint is written during the first steps of the next epoch, so some
        of these steps may end before this call.

        On resume it is called again for saved epochs, except the first `n_reported_epochs` (see
        `train_model`).

        Args:
            metrics: The epoch's row of metrics; `metrics["epoch"]` is its 1-based number.
            checkpoint: The run's last checkpoint; when saved epochs are repeated on resume, the
                same one for all of them.
        """

    def on_step_end(self, epoch: int, steps: int) -> None:
        """Receive the progress after each optimizer step.

        Args:
            epoch: 1-based number of the current epoch.
            steps: Number of finished steps in this epoch, from 1.
        """

    def should_interrupt(self) -> bool:
        """Decide after each step whether to interrupt training.

        Returns:
            True to save the unfinished epoch and raise `TrainingInterrupted`. If several workers
            train together, all of them must return the same.
        """
        return False


class FunctionCallback(TrainingCallback):
    """A callback made of plain functions, for callers that need no class.

    Args:
        on_epoch_end: Called with (metrics, checkpoint); see `TrainingCallback.on_epoch_end`.
        on_step_end: Called with (epoch, steps); see `TrainingCallback.on_step_end`.
        should_interrupt: Called after each step; True interrupts training.
    """

    def __init__(
        self,
        on_epoch_end: Callable[[EpochMetrics, TrainingCheckpoint], object] | None = None,
        on_step_end: Callable[[int, int], object] | None = None,
        should_interrupt: Callable[[], bool] | None = None,
    ) -> None:
        self._on_epoch_end = on_epoch_end
        self._on_step_end = on_step_end
        self._should_interrupt = should_interrupt

    def on_epoch_end(self, metrics: EpochMetrics, checkpoint: TrainingCheckpoint) -> None:
        if self._on_epoch_end is not None:
            self._on_epoch_end(metrics, checkpoint)

    def on_step_end(self, epoch: int, steps: int) -> None:
        if self._on_step_end is not None:
            self._on_step_end(epoch, steps)

    def should_interrupt(self) -> bool:
        return self._should_interrupt is not None and self._should_interrupt()
