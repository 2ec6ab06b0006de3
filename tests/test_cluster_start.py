"""The cluster of a sweep starts in a thread, which ends whatever happens to the sweep."""

import os
import signal
import threading
import time
from contextlib import ExitStack

import forked_processes
import pytest

from raysweep.sweep.cluster_start import ClusterStart, prepare_cluster
from raysweep.sweep.worker_server import SWITCH_VARIABLE

pytestmark = pytest.mark.needs_ray


def press_ctrl_c_at_the_end_of(start: ClusterStart) -> None:
    while not start.is_ending:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def press_ctrl_c_twice_and_prepare_the_next_cluster() -> None:
    from raysweep.sweep import cluster

    is_starting, has_started = threading.Event(), threading.Event()

    def start_slowly(workers: ExitStack) -> None:
        is_starting.set()
        assert has_started.wait(600)

    cluster.start_local_cluster = start_slowly  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt), prepare_cluster(None) as first:
        assert first is not None
        first.begin()
        assert is_starting.wait(600)
        threading.Thread(target=press_ctrl_c_at_the_end_of, args=[first]).start()
        raise KeyboardInterrupt
    names = [thread.name for thread in threading.enumerate()]
    assert "cluster start" in names, "the call that starts Ray cannot be interrupted"
    threading.Timer(0.1, has_started.set).start()
    with prepare_cluster(None) as second:
        assert has_started.is_set() and second is not None and second is not first
        names = [thread.name for thread in threading.enumerate()]
        assert "cluster start" not in names


def test_a_second_ctrl_c_while_ray_starts_leaves_nothing_behind() -> None:
    process = forked_processes.start_function(
        press_ctrl_c_twice_and_prepare_the_next_cluster,
        environment={SWITCH_VARIABLE: "0"},
        imports=forked_processes.COMMANDS,
    )
    assert process.wait() == 0, process.err
