"""Shards over processes of one machine: single-thread processes beat threads on CPUs."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from types import TracebackType
from typing import Self

import torch

from raysweep.evaluation.shards import Outcome, Shard

Run = Callable[[Shard], Outcome]
_run: Run


class Processes:
    """`evaluate(..., map=Processes(8), shards=16)`: the model goes to each process once, over a pipe."""

    def __init__(self, count: int, threads: int = 1) -> None:
        self.count, self.threads = count, threads
        self._pool: ProcessPoolExecutor | None = None
        self._serves: Run | None = None

    @property
    def width(self) -> int:
        """Shards that run at once."""
        return self.count

    def __call__(self, run: Run, shards: Sequence[Shard]) -> Iterator[Outcome]:
        if self._pool is None or self._serves is not run:
            self.close()
            # Not fork: torch's threads do not survive one.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, context, initializer=_serve, initargs=(run, self.threads))
            self._serves = run
        for future in as_completed([self._pool.submit(_one, shard) for shard in shards]):
            yield future.result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = self._serves = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _serve(run: Run, threads: int) -> None:
    global _run
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _run = run


def _end_with_parent() -> None:
    """A parent that was killed tells nobody, and a pool's processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _one(shard: Shard) -> Outcome:
    return _run(shard)
