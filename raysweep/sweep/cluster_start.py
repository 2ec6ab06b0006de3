"""Start the cluster of a sweep while its data are read and libraries are imported.

Ray's processes take seconds to start, and the driver would only wait for them. This module does not
import Ray when it is imported.
"""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from threading import Event, Thread

from raysweep.sweep.ray_access import create_private_ray_folder, token_without_home
from raysweep.sweep.ray_environment import ray_environment
from raysweep.sweep.worker_server import can_fork_workers, run_worker_server
from raysweep.termination_signals import release_logging_locks


class ClusterStart:
    """A cluster on this machine that a thread starts.

    The thread lives as long as the cluster, because Linux ends Ray's processes with the thread that
    started them.
    """

    def __init__(self) -> None:
        self._started: Future[None] = Future()
        self._must_end = Event()
        self._has_ended = Event()
        self._thread: Thread | None = None

    def begin(self) -> None:
        """Begin to start the cluster, once; return at once."""
        if self._thread is None:
            self._thread = Thread(target=self._run, name="cluster start")
            self._thread.start()

    def wait(self) -> None:
        """Wait until the cluster has started.

        Raises:
            InfrastructureError: The cluster could not be started. One line.
        """
        self.begin()
        self._started.result()

    def end(self) -> None:
        """Stop the cluster, unless it was never begun. It also stops if Ctrl-C ends this call."""
        self._must_end.set()
        if self._thread is not None:
            release_logging_locks()
            # Ctrl-C during a `join` would make Python take the thread for one that has ended.
            self._has_ended.wait()
            self._thread.join()
        if self in _current_starts:
            _current_starts.remove(self)

    @property
    def is_ending(self) -> bool:
        """Whether `end` was called."""
        return self._must_end.is_set()

    def _run(self) -> None:
        """Start the cluster, wait for its end, and stop it."""
        try:
            import ray

            from raysweep.sweep.cluster import start_local_cluster
            from raysweep.sweep.ray_internals import keep_authentication_mode

            with keep_authentication_mode(), ExitStack() as workers:
                workers.callback(ray.shutdown)
                start_local_cluster(workers)
                self._started.set_result(None)
                self._must_end.wait()
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)
        finally:
            self._has_ended.set()


_current_starts: list[ClusterStart] = []


def find_cluster_start() -> ClusterStart | None:
    """Return the `ClusterStart` of the innermost `prepare_cluster`; None outside of one."""
    for start in [start for start in _current_starts if start.is_ending]:
        # Ctrl-C has interrupted the wait for its end.
        start.end()
    return _current_starts[-1] if _current_starts else None


@contextmanager
def prepare_cluster(address: str | None) -> Iterator[ClusterStart | None]:
    """Context manager that starts the worker server, and lets the caller start the cluster early.

    Args:
        address: As for `connect_to_cluster`, which uses the cluster that is prepared here.

    Yields:
        A `ClusterStart` that has not begun; None if `connect_to_cluster` will join a cluster, or if
        an outer block has prepared one.
    """
    is_prepared = find_cluster_start() is not None
    ray = sys.modules.get("ray")
    joins_cluster = address or os.environ.get("RAY_ADDRESS") or (ray and ray.is_initialized())
    if joins_cluster or is_prepared:
        yield None
        return
    with ExitStack() as prepared:
        prepared.enter_context(ray_environment())
        prepared.enter_context(token_without_home())
        if can_fork_workers():
            prepared.enter_context(run_worker_server(create_private_ray_folder().parent))
        start = ClusterStart()
        _current_starts.append(start)
        prepared.callback(start.end)
        yield start
