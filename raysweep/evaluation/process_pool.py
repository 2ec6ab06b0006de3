"""Run the shards of an evaluation in processes of this machine.

On CPUs, several processes with one thread each are faster than one process with many threads.
"""

import logging
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Self

import cloudpickle
import torch

from raysweep.code_files import list_code_modules
from raysweep.evaluation.shards import Shard, ShardResult

logger = logging.getLogger(__name__)

RunShard = Callable[[Shard], ShardResult]
# In a process of the pool: path of the runner file that it read last, and the runner in it.
_loaded_runner: tuple[Path, RunShard] | None = None


class ProcessPoolMap:
    """A `ShardMapper` with a pool of processes: `evaluate(..., map=ProcessPoolMap(8))`.

    The processes start at the first call and are reused by later calls. Each process loads the
    model once per evaluation. The model's classes may be those of a script or notebook, which the
    processes do not run again. As a context manager, the pool closes itself at the end.

    Attributes:
        n_processes: Number of processes.
        threads_per_process: PyTorch threads of each process.
    """

    def __init__(self, n_processes: int, threads_per_process: int = 1) -> None:
        self.n_processes, self.threads_per_process = n_processes, threads_per_process
        self._pool: ProcessPoolExecutor | None = None
        self._temp_dir: tempfile.TemporaryDirectory[str] | None = None
        self._published_runner: RunShard | None = None
        self._n_published = 0

    @property
    def width(self) -> int:
        """Number of shards that run at once (see `ShardMapper`)."""
        return self.n_processes

    def __call__(self, run_shard: RunShard, shards: Sequence[Shard]) -> Iterator[ShardResult]:
        """Run each shard in a process of the pool.

        Args:
            run_shard: Computes one shard. If it cannot be pickled, because its model cannot, the
                shards run in this process.
            shards: The shards to run.

        Yields:
            One result for each shard, in the order in which they finish.
        """
        path = self._publish_runner(run_shard)
        if path is None:
            yield from (run_shard(shard) for shard in shards)
            return
        for future in as_completed(self._submit_shards(path, shards)):
            yield future.result()

    def _submit_shards(self, path: Path, shards: Sequence[Shard]) -> list["Future[ShardResult]"]:
        """Give the shards to the pool; start it if there is none."""
        if self._pool is None:
            # PyTorch's threads do not survive a fork.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self.n_processes,
                context,
                initializer=_initialize_process,
                initargs=(self.threads_per_process,),
            )
        with _hide_main_module():
            return [self._pool.submit(_run_pickled_shard, path, shard) for shard in shards]

    def close(self) -> None:
        """End the processes and delete the temporary files. A later call starts a new pool."""
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

    def _publish_runner(self, run_shard: RunShard) -> Path | None:
        """Pickle `run_shard` into a file for the processes, and return the file's path.

        None if it cannot be pickled. A runner is written once. The folder is private, because
        unpickling executes code.
        """
        if self._temp_dir is None:
            self._temp_dir = tempfile.TemporaryDirectory(prefix="raysweep-")
        if self._published_runner is not run_shard:
            content = _pickle_runner(run_shard)
            if content is None:
                return None
            self._get_runner_path().unlink(missing_ok=True)
            self._n_published += 1
            self._published_runner = run_shard
            self._get_runner_path().write_bytes(content)
        return self._get_runner_path()

    def _get_runner_path(self) -> Path:
        """Return the path of the latest runner. Each runner has another file name."""
        assert self._temp_dir is not None
        return Path(self._temp_dir.name) / f"{self._n_published}.pickle"


def _pickle_runner(run_shard: RunShard) -> bytes | None:
    """Pickle a runner, with classes of a script or notebook; None if its model cannot be."""
    code_modules = list_code_modules()
    for module in code_modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        content: bytes = cloudpickle.dumps(run_shard)
    except Exception as error:
        # Models define how they are pickled, so any error may come.
        logger.warning(
            "fallback: shards run in this process, because the model cannot be sent to others "
            "(%s: %s)",
            type(error).__name__,
            (str(error).splitlines() or [""])[0],
        )
        return None
    finally:
        for module in code_modules:
            cloudpickle.unregister_pickle_by_value(module)
    return content


@contextmanager
def _hide_main_module() -> Iterator[None]:
    """Keep processes that are started in this block from running this process's script again.

    Scripts need no `if __name__ == "__main__"` then.
    """
    main_module = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main_module


def _initialize_process(n_threads: int) -> None:
    """Set the number of threads of a pool process, and make it exit when its parent ends."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(n_threads)


def _exit_with_parent() -> None:
    """Exit when the parent ends. Without this, processes of a killed parent would wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_pickled_shard(runner_path: Path, shard: Shard) -> ShardResult:
    """Run a shard with the runner in the file; read the file only if its path is a new one."""
    global _loaded_runner
    if _loaded_runner is None or _loaded_runner[0] != runner_path:
        _loaded_runner = runner_path, pickle.loads(runner_path.read_bytes())
    return _loaded_runner[1](shard)
