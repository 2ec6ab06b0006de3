"""Interrupt a group of workers before one of its machines is taken away.

Ray Train tells the workers when one of their nodes is drained. The trial's own process, without
which the group ends, may be on another node: when it receives SIGTERM, it writes a file that the
workers look for. In both cases all workers save the unfinished epoch after the same step.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import ray.train
import torch

from raysweep.stores import StorePath, StoreUnavailable
from raysweep.sweep.preemption import defer_sigterm, termination_requested
from raysweep.sweep.ray_environment import PREEMPTION_POLL_VARIABLE, RAY_ENVIRONMENT
from raysweep.training.distributed import broadcast_int, collective_errors
from raysweep.worker_group import WorkerGroup

logger = logging.getLogger(__name__)

_REQUEST_FILE = "interruption-request"
_SIGTERM_POLL_SECONDS = 0.2


class GroupInterruption(NamedTuple):
    """Result of a group of workers that has saved its unfinished epoch and stopped.

    Attributes:
        preempted_nodes: Ray's ids of the drained nodes; empty if the trial's own process asked for
            the interruption.
    """

    preempted_nodes: tuple[str, ...]


class GroupPreemptionWatch:
    """Decides after each step whether the workers must stop; all of them decide the same.

    It asks Ray Train, and looks for the file of `relay_sigterm`, as often as Ray Train itself polls
    for preempted nodes (`PREEMPTION_POLL_VARIABLE`): every 2 s by default.
    """

    def __init__(
        self,
        run_path: StorePath,
        workers: WorkerGroup,
        device: torch.device,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the watch.

        Args:
            run_path: Folder of the trial.
            workers: The workers.
            device: Device of the tensors that the workers exchange.
            clock: Returns the current time in seconds.
        """
        self._request_file = run_path / _REQUEST_FILE
        self._workers = workers
        self._device = device
        self._clock = clock
        # Not after each step, because a check sends Ray a request and may ask a bucket.
        default = RAY_ENVIRONMENT[PREEMPTION_POLL_VARIABLE]
        self._check_seconds = float(os.environ.get(PREEMPTION_POLL_VARIABLE, default))
        self._next_check = clock()
        self._interruption = GroupInterruption(())

    @property
    def interruption(self) -> GroupInterruption:
        """Why `should_interrupt` returned True."""
        return self._interruption

    def should_interrupt(self) -> bool:
        """Return whether the workers must save and stop now. All workers must call it.

        Raises:
            WorkerLost: Another worker died.
        """
        is_first, now = self._workers.rank == 0, self._clock()
        if not self._broadcast(is_first and now >= self._next_check):
            return False
        self._next_check = now + self._check_seconds
        with collective_errors():
            notice = ray.train.get_preemption_info()
        if notice is not None:
            self._interruption = GroupInterruption(tuple(notice.preempted_node_ids))
            return True
        return self._broadcast(is_first and self._is_requested())

    def _is_requested(self) -> bool:
        """Return whether the trial's own process asks for an interruption."""
        try:
            return self._request_file.is_file()
        except StoreUnavailable as error:
            logger.info("cannot check whether %s exists: %s", self._request_file, error)
            return False

    def _broadcast(self, value: bool) -> bool:
        """Return the first worker's value on all workers."""
        return bool(broadcast_int(int(value), self._workers, self._device))


@contextmanager
def relay_sigterm(run_path: StorePath) -> Iterator[None]:
    """Defer SIGTERM in this block, and ask the workers to stop when it comes.

    Args:
        run_path: Folder of the trial.
    """
    request_file = run_path / _REQUEST_FILE
    request_file.delete()
    has_ended = threading.Event()

    def request_interruption() -> None:
        while not has_ended.wait(_SIGTERM_POLL_SECONDS):
            if termination_requested():
                try:
                    request_file.write_text("")
                except StoreUnavailable as error:
                    logger.warning("the workers cannot be asked to stop: %s", error)
                return

    thread = threading.Thread(target=request_interruption, name="relay SIGTERM", daemon=True)
    thread.start()
    try:
        with defer_sigterm():
            yield
    finally:
        has_ended.set()
        thread.join()
