"""Progress within an epoch, in a small file that the driver of a sweep reads to show it."""

import json
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from raysweep.atomic_files import atomic_write_text
from raysweep.stored_data import Count
from raysweep.stores import StoredFileNotFound, StorePath
from raysweep.training.callbacks import TrainingCallback
from raysweep.training.checkpoint import TrainingCheckpoint
from raysweep.training.metric_history import EpochMetrics

logger = logging.getLogger(__name__)

PROGRESS_FILE = "progress.json"
_WRITE_SECONDS = 2.0
_STORED_TYPES = {"epoch": Count, "step": Count, "steps": Count}


class EpochProgress(NamedTuple):
    """How far a run is in an epoch.

    Attributes:
        epoch: The epoch, from 1.
        step: Number of its optimizer steps that are done. The validation follows the last one.
        steps: Number of all its steps, at least 1.
    """

    epoch: int
    step: int
    steps: int


class EpochProgressWriter:
    """Writes the progress of a run every two seconds; shorter epochs write none.

    A run in a bucket writes none: each write would be a request, for a display only.
    """

    def __init__(
        self, run_path: StorePath, n_steps: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Prepare the writer.

        Args:
            run_path: Folder of the run.
            n_steps: Number of optimizer steps of an epoch.
            clock: Returns the present time in seconds.
        """
        folder = run_path.local_path
        self._file = None if folder is None else folder / PROGRESS_FILE
        self._n_steps = n_steps
        self._clock = clock
        self._next_write = clock() + _WRITE_SECONDS
        self._epoch = 0
        self._is_written = False

    def record_step(self, epoch: int, step: int) -> None:
        """Write the progress if it is time (see `TrainingCallback.on_step_end`).

        Args:
            epoch: 1-based number of the epoch.
            step: Number of finished steps in it.
        """
        now = self._clock()
        if epoch != self._epoch:
            self._epoch, self._next_write = epoch, now + _WRITE_SECONDS
        if self._file is None or now < self._next_write:
            return
        self._next_write = now + _WRITE_SECONDS
        self._is_written = True
        try:
            atomic_write_text(
                self._file, json.dumps(EpochProgress(epoch, step, self._n_steps)._asdict())
            )
        except OSError as error:
            logger.info("the progress of the epoch is not shown: %s", error)
            self._file = None

    def delete(self) -> None:
        """Delete the file, at the end of an epoch."""
        if self._file is None or not self._is_written:
            return
        self._is_written = False
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            logger.info("%s stays behind: %s", self._file, error)


class ProgressCallback(TrainingCallback):
    """Callback of a trial: reports its epochs, and writes the progress within them."""

    def __init__(
        self,
        writer: EpochProgressWriter | None,
        report_epoch: Callable[[EpochMetrics, TrainingCheckpoint], object],
        should_interrupt: Callable[[], bool],
    ) -> None:
        """Prepare the callback.

        Args:
            writer: Writes the progress; None on all workers but the first.
            report_epoch: Receives what `TrainingCallback.on_epoch_end` does.
            should_interrupt: See `TrainingCallback.should_interrupt`.
        """
        self._writer = writer
        self._report_epoch = report_epoch
        self._should_interrupt = should_interrupt

    def on_epoch_end(self, metrics: EpochMetrics, checkpoint: TrainingCheckpoint) -> None:
        if self._writer is not None:
            self._writer.delete()
        self._report_epoch(metrics, checkpoint)

    def on_step_end(self, epoch: int, steps: int) -> None:
        if self._writer is not None:
            self._writer.record_step(epoch, steps)

    def should_interrupt(self) -> bool:
        return self._should_interrupt()


def read_epoch_progress(run_path: StorePath, epoch: int) -> EpochProgress | None:
    """Read how far a run is in an epoch.

    Args:
        run_path: Folder of the run.
        epoch: The epoch that it trains now, from 1.

    Returns:
        The progress; None if it is unknown: the epoch takes less than two seconds, or the run is in
        a bucket.
    """
    if run_path.local_path is None:
        return None
    try:
        data = (run_path / PROGRESS_FILE).read_json(_STORED_TYPES)
    except StoredFileNotFound:
        return None
    progress = EpochProgress(data["epoch"], data["step"], data["steps"])
    is_current = progress.epoch == epoch and 0 < progress.step <= progress.steps
    return progress if is_current else None
