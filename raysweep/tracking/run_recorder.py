"""Record one run in MLflow, also if the store does not answer for a while."""

from collections.abc import Callable, Mapping

from raysweep.record_queue import RecordQueue
from raysweep.tracking.mlflow_tracker import RunStatus, Tracker
from raysweep.training.config import TrainingConfig
from raysweep.training.metric_history import EpochMetrics


class RunRecorder:
    """Records of one run. During an outage of the store they wait.

    Args:
        tracker: Client of the store.
        name: Name of a new run.
        tags: Tags that identify the run.
    """

    def __init__(self, tracker: Tracker, name: str, tags: Mapping[str, str]) -> None:
        self._tracker = tracker
        self._name = name
        self._tags = dict(tags)
        self._run_id: str | None = None
        self._records = RecordQueue("MLflow store", tracker.uri)

    def count_logged_epochs(self) -> int:
        """Return the last epoch that the store has of this run; 0 without a run.

        Raises:
            RecordStoreUnavailable: The store does not answer.
        """
        run_id = self._tracker.find_run(self._tags)
        return self._tracker.get_last_epoch(run_id) if run_id else 0

    def open(self, config: TrainingConfig, fingerprint: str) -> None:
        """Open the run, or create it, and log its config.

        Args:
            config: Config of the run.
            fingerprint: Fingerprint of its data.
        """
        self.write(lambda tracker, run_id: tracker.log_config(run_id, config, fingerprint))

    def log_epoch(self, metrics: EpochMetrics) -> None:
        """Log the metrics of an epoch."""
        epoch = int(metrics["epoch"])
        self.write(lambda tracker, run_id: tracker.log_metrics(run_id, metrics, epoch))

    def end(self, status: RunStatus) -> None:
        """End the run with its final status."""
        self.write(lambda tracker, run_id: tracker.end_run(run_id, status))

    def write(self, record: Callable[[Tracker, str], None]) -> None:
        """Write a record, now or when the store answers again.

        Args:
            record: Function of the tracker and the id of the run; it may be called again.
        """

        def write_record() -> None:
            if self._run_id is None:
                self._run_id = self._tracker.get_or_create_run(self._name, self._tags)
            record(self._tracker, self._run_id)

        self._records.write(write_record)

    def discard(self) -> None:
        """Forget what waits: another process writes the run now."""
        self._records.discard()

    def finish(self) -> None:
        """Try once more to write what waits; say in one line what the store lacks."""
        self._records.finish("; the same command writes them")
