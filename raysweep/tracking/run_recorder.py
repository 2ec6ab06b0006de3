"""Record one run in MLflow in the background, also if the store does not answer for a while."""

from collections.abc import Callable, Mapping

from raysweep.data import DatasetSplits
from raysweep.record_queue import RecordQueue
from raysweep.stores import StorePath
from raysweep.tracking.mlflow_tracker import EpochRecord, RunStatus, Tracker, current_time_ms
from raysweep.training.checkpoint import TrainingCheckpoint
from raysweep.training.config import TrainingConfig
from raysweep.training.metric_advice import advise_on_training
from raysweep.training.metric_history import EpochMetrics
from raysweep.unrecorded_folders import clear_unrecorded, note_unrecorded


class RunRecorder:
    """Records of one run. During an outage of the store they wait.

    Args:
        tracker: Client of the store.
        name: Name of a new run.
        tags: Tags that identify the run.
        folder: Folder of the run, which gets a note while MLflow lacks records.
        records: Queue of the records; None for one of its own.
    """

    def __init__(
        self,
        tracker: Tracker,
        name: str,
        tags: Mapping[str, str],
        folder: StorePath,
        records: RecordQueue | None = None,
    ) -> None:
        self._tracker = tracker
        self._name = name
        self._tags = dict(tags)
        self._folder = folder
        self._is_lost = False
        self._run_id: str | None = None
        self._records = records or RecordQueue("MLflow store", tracker.uri)

    def count_logged_epochs(self) -> int:
        """Return the last epoch that the store has of this run; 0 without a run.

        Raises:
            RecordStoreUnavailable: The store does not answer.
        """
        run_id = self._tracker.find_run(self._tags)
        return self._tracker.get_last_epoch(run_id) if run_id else 0

    def open(self, config: TrainingConfig, dataset: DatasetSplits | None) -> None:
        """Open the run, or create it, and log its config.

        Args:
            config: Config of the run.
            dataset: Its data; None to log no data set.
        """
        if self._tracker.uri:
            note_unrecorded(self._folder)
        self.write(lambda tracker, run_id: tracker.log_config(run_id, config, dataset))

    def log_epoch(self, metrics: EpochMetrics) -> None:
        """Log the metrics of an epoch."""
        record = EpochRecord(metrics, int(metrics["epoch"]), current_time_ms())
        self.write(lambda tracker, run_id: tracker.log_epochs(run_id, [record]))

    def log_result(
        self,
        config: TrainingConfig,
        best: TrainingCheckpoint,
        last: TrainingCheckpoint,
        dataset: DatasetSplits | None,
    ) -> list[str]:
        """Log and end a run whose epochs are all trained.

        Args:
            config: Config of the run.
            best: Checkpoint of its best epoch.
            last: Checkpoint of its last epoch.
            dataset: Its data, with which MLflow can serve the model.

        Returns:
            The notes on the run, which are also its description.
        """
        advice = advise_on_training(config, last.history)

        def log(tracker: Tracker, run_id: str) -> None:
            tracker.log_best(run_id, best.last_metrics)
            tracker.log_model(run_id, best, dataset)
            tracker.log_training_plots(run_id, last.path.parent, last.history)
            tracker.set_description(run_id, advice)

        self.write(log)
        self.end("FINISHED")
        return advice

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
        self._is_lost = True
        self._records.discard()

    def flush(self) -> bool:
        """Wait until all is written or the store fails; return whether all is written."""
        return self._records.flush()

    def finish(self) -> int:
        """Write what waits, for a minute at most; say in one line what the store lacks.

        Returns:
            The number of records that it lacks.
        """
        n_missing = self._records.finish(f"; `raysweep sync {self._folder.name}` writes them")
        if not n_missing and not self._is_lost:
            clear_unrecorded(self._folder)
        return n_missing
