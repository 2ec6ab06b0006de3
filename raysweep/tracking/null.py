"""Tracker for `raysweep train` and `raysweep eval` where MLflow is not installed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raysweep.spec import SpecError
from raysweep.tracking.store import Status, Tracker
from raysweep.training.config import RunConfig


class NullTracker(Tracker):
    """Accepts what a training run or an evaluation logs and keeps nothing. uri: empty."""

    def __init__(self) -> None:
        self.uri = ""

    def find(self, tags: Mapping[str, str]) -> str | None:
        return None

    def last_step(self, run: str) -> int:
        return 0

    def run(self, name: str, tags: Mapping[str, str], parent: str | None = None) -> str:
        return ""

    def checkpoint(self, what: str, into: Path) -> tuple[str, Path]:
        raise SpecError(f"{what}: MLflow is not installed: pip install mlflow, or give the folder of the checkpoint")

    def config(self, run: str, config: RunConfig, fingerprint: str = "") -> None:
        pass

    def metrics(self, run: str, metrics: Mapping[str, float], step: int) -> None:
        pass

    def tag(self, run: str, tags: Mapping[str, str]) -> None:
        pass

    def artifacts(self, run: str, folder: Path, under: str) -> None:
        pass

    def figures(self, run: str, figures: Mapping[str, Any]) -> None:
        pass

    def plots(self, run: str, run_path: Path, history: Sequence[Mapping[str, float]]) -> None:
        pass

    def file(self, run: str, path: Path, under: str | None = None) -> None:
        pass

    def close(self, run: str, status: Status) -> None:
        pass
