"""Shards over processes of one machine: single-thread processes beat threads on CPUs."""

import multiprocessing
import os
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from raysweep.evaluation.shards import Outcome, Shard
from raysweep.spec import SpecError

Run = Callable[[Shard], Outcome]
# In a process of the pool: the file that it read last, and what was in it.
_served: tuple[Path, Run] | None = None


class Processes:
    """`evaluate(..., map=Processes(8))`: the model goes to each process once; the processes serve later calls too."""

    def __init__(self, count: int, threads: int = 1) -> None:
        self.count, self.threads = count, threads
        self._pool: ProcessPoolExecutor | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._serves: Run | None = None
        self._calls = 0

    @property
    def width(self) -> int:
        """Shards that run at once."""
        return self.count

    def __call__(self, run: Run, shards: Sequence[Shard]) -> Iterator[Outcome]:
        file = self._give(run)
        if self._pool is None:
            # Not fork: torch's threads do not survive one.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, context, initializer=_serve, initargs=(self.threads,))
        for future in as_completed([self._pool.submit(_one, file, shard) for shard in shards]):
            yield future.result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._folder is not None:
            self._folder.cleanup()
        self._pool = self._folder = self._serves = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _give(self, run: Run) -> Path:
        """The file, which nobody else can write, where the processes find `run`."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="raysweep-")
        if self._serves is not run:
            content = _pickled(run)
            self._file().unlink(missing_ok=True)
            self._calls += 1
            self._serves = run
            self._file().write_bytes(content)
        return self._file()

    def _file(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{self._calls}.pickle"


def _pickled(run: Run) -> bytes:
    try:
        return pickle.dumps(run)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SpecError(
            f"the model cannot be sent to other processes ({error}): define its classes and functions at the top of a "
            "module"
        ) from error


def _serve(threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """A parent that was killed tells nobody, and a pool's processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _one(file: Path, shard: Shard) -> Outcome:
    global _served
    if _served is None or _served[0] != file:
        _served = file, pickle.loads(file.read_bytes())
    return _served[1](shard)
