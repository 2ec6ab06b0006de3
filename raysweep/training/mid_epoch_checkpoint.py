"""Checkpoints in the middle of an epoch, from which training resumes with identical results.

The order of batches and all random numbers depend only on (seed, epoch, example). So the state
consists of the weights, the momentum, the sums of the diagnostics and the number of finished steps.
Several workers share the weights and the momentum, but each has its own sums.
"""

import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from raysweep.errors import DamagedFileError, WorkInterrupted, get_first_line
from raysweep.formatting import format_count
from raysweep.spec import SpecError
from raysweep.stored_data import check_stored_types, parse_stored_json
from raysweep.termination_signals import handle_termination_signals, is_main_thread
from raysweep.training import checkpoint
from raysweep.training.checkpoint import RunDirectory, TrainingCheckpoint, TrainingState
from raysweep.training.config import TrainingConfig, has_same_settings
from raysweep.training.diagnostics import EpochDiagnostics
from raysweep.training.distributed import broadcast_int, gather_tensors
from raysweep.training.metric_history import EpochMetrics
from raysweep.visible_text import show_characters
from raysweep.worker_group import SINGLE_WORKER, WorkerGroup

logger = logging.getLogger(__name__)

# Diagnostics of the first worker, and of another one by its rank.
_DIAGNOSTICS_FILE = "seen.safetensors"
_OTHER_DIAGNOSTICS_FILE = "seen-{rank}.safetensors"

# Without these there are no metrics of an epoch.
_NEEDED_SUMS = {"sum rows", "sum loss"}
_MAX_STEPS = 10**9
_DAMAGED_MESSAGE = "the checkpoint within an epoch is damaged and not used: %s"


class _PartialEpoch(NamedTuple):
    """Diagnostics of an epoch whose first steps are done.

    Attributes:
        steps: Number of steps that are done.
        seconds: Wall seconds that they took.
        sums: Sums of the diagnostics by name.
        edges: Edges of the bins of the histograms by name.
    """

    steps: int
    seconds: float
    sums: dict[str, Tensor]
    edges: dict[str, list[float]]


class TrainingInterrupted(WorkInterrupted):
    """Training was interrupted after a step. The same call of `train_model` resumes there."""


class MidEpochCheckpointer:
    """Saves an unfinished epoch when training is interrupted, and resumes it later.

    The checkpoint is the folder `half` of the run. It has the current weights and momentum, and the
    metrics of the finished epochs. Of several workers the first one writes it. All of them must
    call each method.

    Args:
        run_directory: Folder of the run.
        config: Config of the run.
        model: The model that is trained.
        optimizer: Its optimizer.
        data_fingerprint: Fingerprint of the training data.
        workers: The processes that train the model together.
    """

    def __init__(
        self,
        run_directory: RunDirectory,
        config: TrainingConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_fingerprint: str,
        workers: WorkerGroup = SINGLE_WORKER,
    ) -> None:
        self._workers = workers
        self._run_directory = run_directory
        self._config = config
        self._model = model
        self._optimizer = optimizer
        self._data_fingerprint = data_fingerprint
        self._history: list[EpochMetrics] = []
        self._started_at = 0.0

    def resume_epoch(self, history: list[EpochMetrics], diagnostics: EpochDiagnostics) -> int:
        """Start an epoch. Load the epoch's checkpoint if an earlier process was interrupted in it.

        The number of workers may differ from that of the interrupted process.

        Args:
            history: Metrics of the finished epochs.
            diagnostics: Empty; receives the sums over the steps that are done already.

        Returns:
            The number of steps of this epoch that are done already; 0 without a checkpoint.
        """
        self._history, self._started_at = history, time.perf_counter()
        found = self._find_partial_epoch()
        is_found = torch.tensor(int(found is not None), device=self._device)
        if int(self._workers.all_reduce_sum(is_found)) < self._workers.size or found is None:
            return 0
        saved, partial_epoch = found
        saved.load_training_state(self._model, self._optimizer)
        sums = {name: tensor.to(self._device) for name, tensor in partial_epoch.sums.items()}
        diagnostics.restore_state(sums, partial_epoch.edges)
        self._started_at -= partial_epoch.seconds
        return partial_epoch.steps

    def save_and_interrupt(self, steps_done: int, diagnostics: EpochDiagnostics) -> NoReturn:
        """Save the unfinished epoch and stop.

        Args:
            steps_done: Number of finished steps of this epoch.
            diagnostics: Sums over these steps.

        Raises:
            TrainingInterrupted: The state was saved and training stops here.
        """
        sums, edges = diagnostics.export_state()
        seconds = time.perf_counter() - self._started_at
        facts = {"steps": str(steps_done), "seconds": str(seconds), "edges": json.dumps(edges)}
        rows = {name: gather_tensors(tensor, self._workers) for name, tensor in sums.items()}
        if self._workers.rank == 0:
            checkpoint.save_checkpoint(
                self._run_directory.mid_epoch_path,
                self._config,
                TrainingState.copy_from(self._model, self._optimizer),
                self._history,
                self._data_fingerprint,
                extra_files={
                    _name_diagnostics_file(rank): save(
                        {name: tensors[rank].clone() for name, tensors in rows.items()}, facts
                    )
                    for rank in range(self._workers.size)
                },
            )
        # No worker may end before the first one has written it.
        broadcast_int(0, self._workers, self._device)
        logger.warning(
            "interrupted in epoch %d after step %d; all progress is saved",
            len(self._history) + 1,
            steps_done,
            extra={"epoch": len(self._history) + 1, "step": steps_done, "is_shown_elsewhere": True},
        )
        raise TrainingInterrupted(
            f"interrupted in epoch {len(self._history) + 1} after "
            f"{format_count(steps_done, 'step')}; all progress is saved"
        )

    @property
    def elapsed_seconds(self) -> float:
        """Training time of this epoch so far, including that of earlier processes."""
        return time.perf_counter() - self._started_at

    @contextmanager
    def pause_clock(self) -> Iterator[None]:
        """Context manager whose time does not count as training time.

        Yields:
            Nothing.
        """
        started_at = time.perf_counter()
        try:
            yield
        finally:
            self._started_at += time.perf_counter() - started_at

    @property
    def _device(self) -> torch.device:
        """Device of the model."""
        return next(self._model.parameters()).device

    def _find_partial_epoch(self) -> tuple[TrainingCheckpoint, _PartialEpoch] | None:
        """Return the checkpoint of this epoch and this worker's diagnostics; None without one."""
        saved = self._read_checkpoint()
        if saved is None or not self._is_resumable(saved):
            return None
        try:
            return saved, _read_worker_share(saved, self._workers)
        except DamagedFileError as error:
            logger.warning(_DAMAGED_MESSAGE, error)
            return None

    def _read_checkpoint(self) -> TrainingCheckpoint | None:
        """Read the run's mid-epoch checkpoint; None if it is missing or damaged."""
        if self._run_directory.mid_epoch_path.fetch_checkpoint() is None:
            return None
        try:
            return checkpoint.read_checkpoint(self._run_directory.mid_epoch_path)
        except (SpecError, DamagedFileError) as error:
            logger.warning(_DAMAGED_MESSAGE, error)
            return None

    def _is_resumable(self, saved: TrainingCheckpoint) -> bool:
        """Return whether a checkpoint has this run's settings, data and earlier epochs."""
        return (
            has_same_settings(saved.config, self._config)
            and saved.meta["data_fingerprint"] == self._data_fingerprint
            and saved.history == self._history
        )


def _name_diagnostics_file(rank: int) -> str:
    """Return the name of the file with a worker's diagnostics."""
    return _OTHER_DIAGNOSTICS_FILE.format(rank=rank) if rank else _DIAGNOSTICS_FILE


def _read_worker_share(saved: TrainingCheckpoint, workers: WorkerGroup) -> _PartialEpoch:
    """Read the diagnostics of a mid-epoch checkpoint with which this worker continues.

    A worker continues with the sums of the same rank. If there were more workers than now, the sums
    of the other ranks are added to those of the remaining workers; additional workers begin with
    zeros.

    Raises:
        DamagedFileError: They are missing, or have wrong types or shapes.
    """
    n_saved = 1
    while (saved.local_folder / _name_diagnostics_file(n_saved)).is_file():
        n_saved += 1
    first = _read_partial_epoch(saved.local_folder / _DIAGNOSTICS_FILE)
    sums = {name: torch.zeros_like(tensor) for name, tensor in first.sums.items()}
    for rank in range(workers.rank, n_saved, workers.size):
        share = _read_partial_epoch(saved.local_folder / _name_diagnostics_file(rank))
        if share.sums.keys() != sums.keys() or share.steps != first.steps:
            raise DamagedFileError(f"{saved.path}: its workers had finished different steps")
        sums = {name: total + share.sums[name] for name, total in sums.items()}
    return first._replace(sums=sums)


def _read_partial_epoch(path: Path) -> _PartialEpoch:
    """Read a worker's diagnostics, which the hashes of the checkpoint do not cover.

    Raises:
        DamagedFileError: They are missing, or have wrong types or shapes.
    """
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        with safe_open(path, "pt") as file:
            facts = dict(file.metadata() or {})
            sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        edges = parse_stored_json(facts["edges"].encode(), str(path), {})
        check_stored_types({"edges": edges}, {"edges": dict[str, list[float]]}, str(path))
        for name, tensor in sums.items():
            kind, _, key = name.partition(" ")
            shape = () if kind == "sum" else (len(edges[key]) - 1,)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}")
        start = _PartialEpoch(int(facts["steps"]), float(facts["seconds"]), sums, edges)
        if not 0 <= start.steps <= _MAX_STEPS or not 0 <= start.seconds < math.inf:
            raise ValueError(f"{facts['steps'][:20]} steps in {start.seconds} s")
        if start.steps and not sums.keys() >= _NEEDED_SUMS:
            raise ValueError("it lacks sums")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        reason = show_characters(get_first_line(error))
        raise DamagedFileError(f"{path}: {reason}") from error
    return start


@contextmanager
def catch_termination_signals() -> Iterator[Callable[[], bool]]:
    """Context manager that records SIGTERM, SIGHUP and the first Ctrl-C; none ends the process.

    SIGHUP is left alone if it is ignored (`nohup`). A second Ctrl-C uses the original handler. In
    other threads than the main one, which may set no handlers, it records nothing.

    Yields:
        A function that returns whether one of these signals has arrived.
    """
    if not is_main_thread():
        yield lambda: False
        return
    received: list[int] = []
    original_handler = signal.getsignal(signal.SIGINT)

    def record_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)
        # A step may take long: a second Ctrl-C must be able to end it.
        signal.signal(signal.SIGINT, original_handler)

    def has_received_signal() -> bool:
        if received and not is_logged:
            # Not in the handler: it may have interrupted the very logging of another record.
            is_logged.append(True)
            logger.warning(
                "received %s", signal.Signals(received[0]).name, extra={"is_shown_elsewhere": True}
            )
        return bool(received)

    is_logged: list[bool] = []
    with handle_termination_signals(record_signal):
        signal.signal(signal.SIGINT, record_signal)
        try:
            yield has_received_signal
        finally:
            signal.signal(signal.SIGINT, original_handler)
