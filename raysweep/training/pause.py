"""Leaving an epoch halfway and going on at that step later, on this machine or another, to the last bit.

The order of an epoch's batches and all that is random in it belong to its examples: weights, momentum and the sums of
the diagnostics are all that must be kept.
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
from raysweep.spec import SpecError
from raysweep.training import checkpoint
from raysweep.training.checkpoint import Run
from raysweep.training.config import RunConfig
from raysweep.training.diagnostics import Diagnostics
from raysweep.wording import counted

_SEEN = "seen.safetensors"


class Interrupted(Exception):
    """Training was told to end. What it had is in its folder, and the same call goes on from there."""


class Pause:
    """What an epoch must know to be left when `interrupted()` says so, and to begin where an earlier process left it.

    The state is in `half` in the run's folder: a checkpoint of the epochs before, with weights and momentum of now.
    """

    def __init__(
        self,
        interrupted: Callable[[], bool],
        run: Run,
        config: RunConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        fingerprint: str,
    ) -> None:
        self._interrupted = interrupted
        self._run = run
        self._config = config
        self._model = model
        self._optimizer = optimizer
        self._fingerprint = fingerprint
        self._history: list[dict[str, float]] = []
        self._began = 0.0

    def begin(self, history: list[dict[str, float]], seen: Diagnostics) -> int:
        """Load what is there of the epoch after `history`: how many of its steps are done."""
        self._history, self._began = history, time.perf_counter()
        if not storage.pull(self._run.half):
            return 0
        try:
            saved = checkpoint.check(self._run.half)
        except SpecError:
            return 0
        alike = saved.config.model_copy(update={"epochs": self._config.epochs}) == self._config
        same = alike and saved.meta["data_fingerprint"] == self._fingerprint
        if not same or saved.history != history:
            return 0
        saved.load_state(self._model, self._optimizer)
        device = next(self._model.parameters()).device
        with safe_open(self._run.half / _SEEN, "pt") as file:
            facts = file.metadata()
            sums = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
        seen.restore(sums, json.loads(facts["edges"]))
        self._began -= float(facts["seconds"])
        return int(facts["steps"])

    def after(self, steps: int, seen: Diagnostics) -> None:
        """To be called after each step. Raises Interrupted, with everything kept, if it was the last for now."""
        if not self._interrupted():
            return
        sums, edges = seen.state()
        seconds = time.perf_counter() - self._began
        facts = {"steps": str(steps), "seconds": str(seconds), "edges": json.dumps(edges)}
        state = (self._config, self._model, self._optimizer, self._history, self._fingerprint)
        checkpoint.save(self._run.half, *state, also={_SEEN: save(sums, facts)})
        raise Interrupted(
            f"told to end in epoch {len(self._history) + 1}, after {counted(steps, 'step')}; all of it is kept"
        )

    @property
    def seconds(self) -> float:
        """Spent on this epoch so far, by all who worked on it."""
        return time.perf_counter() - self._began


@contextmanager
def told_to_end() -> Iterator[Callable[[], bool]]:
    """In this block SIGTERM and a first Ctrl-C end nothing: the function that it gives says whether there was one.

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
