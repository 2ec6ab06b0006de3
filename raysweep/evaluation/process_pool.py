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

from raysweep.evaluation.shards import Shard, ShardResult
from raysweep.spec import SpecError

RunShard = Callable[[Shard], ShardResult]
# In a process of the pool: the file that it read last, and what was in it.
_loaded_runner: tuple[Path, RunShard] | None = None


class ProcessPoolMap:
    """`evaluate(..., map=Processes(8))`: the model goes to each process once; the processes serve
    later calls too.
    """

    def __init__(self, n_processes: int, threads_per_process: int = 1) -> None:
        self.n_processes, self.threads_per_process = n_processes, threads_per_process
        self._pool: ProcessPoolExecutor | None = None
        self._temp_dir: tempfile.TemporaryDirectory[str] | None = None
        self._published_runner: RunShard | None = None
        self._n_published = 0

    @property
    def width(self) -> int:
        """Shards that run at once."""
        return self.n_processes

    def __call__(self, run_shard: RunShard, shards: Sequence[Shard]) -> Iterator[ShardResult]:
        file = self._publish_runner(run_shard)
        if self._pool is None:
            # Not fork: torch's threads do not survive one.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self.n_processes,
                context,
                initializer=_initialize_process,
                initargs=(self.threads_per_process,),
            )
        for future in as_completed(
            [self._pool.submit(_run_pickled_shard, file, shard) for shard in shards]
        ):
            yield future.result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._temp_dir is not None:
            self._temp_dir.cleanup()
        self._pool = self._temp_dir = self._published_runner = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _publish_runner(self, run_shard: RunShard) -> Path:
        """The file, which nobody else can write, where the processes find `run`."""
        if self._temp_dir is None:
            self._temp_dir = tempfile.TemporaryDirectory(prefix="raysweep-")
        if self._published_runner is not run_shard:
            content = _pickle_runner(run_shard)
            self._get_runner_path().unlink(missing_ok=True)
            self._n_published += 1
            self._published_runner = run_shard
            self._get_runner_path().write_bytes(content)
        return self._get_runner_path()

    def _get_runner_path(self) -> Path:
        assert self._temp_dir is not None
        return Path(self._temp_dir.name) / f"{self._n_published}.pickle"


def _pickle_runner(run_shard: RunShard) -> bytes:
    try:
        return pickle.dumps(run_shard)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SpecError(
            f"the model cannot be sent to other processes ({error}): define its classes and functions at the top of a "
            "module"
        ) from error


def _initialize_process(n_threads: int) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(n_threads)


def _exit_with_parent() -> None:
    """A parent that was killed tells nobody, and a pool's processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_pickled_shard(runner_path: Path, shard: Shard) -> ShardResult:
    global _loaded_runner
    if _loaded_runner is None or _loaded_runner[0] != runner_path:
        _loaded_runner = runner_path, pickle.loads(runner_path.read_bytes())
    return _loaded_runner[1](shard)
