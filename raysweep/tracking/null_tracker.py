"""Tracker for `raysweep train` and `raysweep eval` when MLflow is not installed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raysweep.data import DatasetSplits
from raysweep.errors import InfrastructureError
from raysweep.stores import StorePath
from raysweep.tracking.mlflow_tracker import EpochRecord, RunStatus, Tracker
from raysweep.training.checkpoint import TrainingCheckpoint
from raysweep.training.config import TrainingConfig


class NullTracker(Tracker):
    """Tracker that ignores everything that a training run or an evaluation logs.

    Attributes:
        uri: Always empty.
    """

    def __init__(self) -> None:
        self.uri = ""

    def find_run(self, tags: Mapping[str, str]) -> str | None:
        """Return None: there are no runs."""
        return None

    def get_last_epoch(self, run_id: str) -> int:
        """Return 0."""
        return 0

    def get_or_create_run(
        self, name: str, tags: Mapping[str, str], parent_run_id: str | None = None
    ) -> str:
        """Return an empty id."""
        return ""

    def download_checkpoint(self, reference: str, target_folder: Path) -> tuple[str, Path]:
        """Raise InfrastructureError: there are no runs."""
        raise InfrastructureError(
            f"{reference}: MLflow is not installed: pip install mlflow, "
            "or give the folder of the checkpoint"
        )

    def log_config(
        self, run_id: str, config: TrainingConfig, dataset: DatasetSplits | None = None
    ) -> None:
        """Do nothing."""

    def log_epochs(self, run_id: str, epochs: Sequence[EpochRecord]) -> None:
        """Do nothing."""

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Do nothing."""

    def log_folder(self, run_id: str, folder: Path, artifact_folder: str) -> None:
        """Do nothing."""

    def log_model(
        self, run_id: str, checkpoint: TrainingCheckpoint, dataset: DatasetSplits | None
    ) -> None:
        """Do nothing."""

    def log_figures(self, run_id: str, figures: Mapping[str, Any]) -> None:
        """Do nothing."""

    def log_training_plots(
        self, run_id: str, run_path: StorePath, history: Sequence[Mapping[str, float]]
    ) -> None:
        """Do nothing."""

    def log_text(self, run_id: str, text: str, file_name: str) -> None:
        """Do nothing."""

    def log_file(self, run_id: str, path: Path, artifact_folder: str | None = None) -> None:
        """Do nothing."""

    def end_run(self, run_id: str, status: RunStatus) -> None:
        """Do nothing."""
