"""Leaving an epoch halfway and going on at that step later, on this machine or another, to the last
bit.

The order of an epoch's batches and all that is random in it belong to its examples: weights,
momentum and the sums of the diagnostics are all that must be kept.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from raysweep import storage
from raysweep.formatting import format_count
from raysweep.spec import SpecError
from raysweep.training import checkpoint
from raysweep.training.checkpoint import RunDirectory
from raysweep.training.config import TrainingConfig
from raysweep.training.diagnostics import EpochDiagnostics

_DIAGNOSTICS_FILE = "seen.safetensors"


class TrainingInterrupted(Exception):
    """Training was told to end. What it had is in its folder, and the same call goes on from there."""


class MidEpochCheckpointer:
    """What an epoch must know to be left when `interrupted()` says so, and to begin where an
    earlier process left it.

    The state is in `half` in the run's folder: a checkpoint of the epochs before, with weights and
    momentum of now.
    """

    def __init__(
        self,
        should_interrupt: Callable[[], bool],
        run_directory: RunDirectory,
        config: TrainingConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_fingerprint: str,
    ) -> None:
        self._should_interrupt = should_interrupt
        self._run_directory = run_directory
        self._config = config
        self._model = model
        self._optimizer = optimizer
        self._data_fingerprint = data_fingerprint
        self._history: list[dict[str, float]] = []
        self._started_at = 0.0

    def resume_epoch(self, history: list[dict[str, float]], diagnostics: EpochDiagnostics) -> int:
        """Load what is there of the epoch after `history`: how many of its steps are done."""
        self._history, self._started_at = history, time.perf_counter()
        if not storage.pull_checkpoint(self._run_directory.mid_epoch_path):
            return 0
        try:
            saved = checkpoint.read_local_checkpoint(self._run_directory.mid_epoch_path)
        except SpecError:
            return 0
        alike = saved.config.replace(epochs=self._config.epochs) == self._config
        same = alike and saved.meta["data_fingerprint"] == self._data_fingerprint
        if not same or saved.history != history:
            return 0
        saved.load_training_state(self._model, self._optimizer)
        device = next(self._model.parameters()).device
        with safe_open(self._run_directory.mid_epoch_path / _DIAGNOSTICS_FILE, "pt") as file:
            facts = file.metadata()
            sums = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
        diagnostics.restore_state(sums, json.loads(facts["edges"]))
        self._started_at -= float(facts["seconds"])
        return int(facts["steps"])

    def save_if_interrupted(self, steps_done: int, diagnostics: EpochDiagnostics) -> None:
        """To be called after each step. Raises Interrupted, with everything kept, if it was the
        last for now.
        """
        if not self._should_interrupt():
            return
        sums, edges = diagnostics.export_state()
        seconds = time.perf_counter() - self._started_at
        facts = {"steps": str(steps_done), "seconds": str(seconds), "edges": json.dumps(edges)}
        state = (self._config, self._model, self._optimizer, self._history, self._data_fingerprint)
        checkpoint.save_checkpoint(
            self._run_directory.mid_epoch_path,
            *state,
            extra_files={_DIAGNOSTICS_FILE: save(sums, facts)},
        )
        raise TrainingInterrupted(
            f"told to end in epoch {len(self._history) + 1}, after {format_count(steps_done, 'step')}; all of it is kept"
        )

    @property
    def elapsed_seconds(self) -> float:
        """Spent on this epoch so far, by all who worked on it."""
        return time.perf_counter() - self._started_at


@contextmanager
def catch_termination_signals() -> Iterator[Callable[[], bool]]:
    """In this block SIGTERM and a first Ctrl-C end nothing: the function that it gives says whether
    there was one.

    Main thread only.
    """
    told: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: FrameType | None) -> None:
        told.append(number)
        # Who cannot wait for the end of a step says it again.
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(told)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
