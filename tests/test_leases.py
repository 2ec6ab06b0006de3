"""Leases on a shared prefix in a folder: live processes keep theirs on any machine; those of dead
and paused processes are taken over.
"""

import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock._soft
import forked_processes
import pytest
import torch
from forked_processes import ForkedProcess
from torch import nn

from raysweep.bucket_lease import LeaseTimes
from raysweep.leases import FolderLease, make_lease
from raysweep.stores import StoreUnavailable, open_path
from raysweep.training import checkpoint
from raysweep.training.config import build_training_config
from raysweep.training.prefix_cache import PrefixCache

HERE = socket.gethostname()
# Above the largest process number of Linux.
NOBODY = 2**22 + 1
FAST = LeaseTimes(renewal_interval=0.1, expires_after=0.5)
# Eight contenders are the threads of two processes, four in each.
ROUNDS, CONTENDERS = 50, ((0, 1, 2, 3), (4, 5, 6, 7))


def write_marker(path: Path, **changes: object) -> None:
    """Write a lease as filelock does, of another machine unless `changes` say otherwise."""
    values = {"pid": 123, "host": "elsewhere", "mode": "lease", "token": "0" * 32, "duration": 0.5}
    lines = ["filelock/2", *(f"{key}={value}" for key, value in {**values, **changes}.items())]
    path.write_text("".join(f"{line}\n" for line in lines))


def acquire_within(lease: FolderLease, seconds: float) -> float | None:
    """Try again and again; return after how many seconds the lease was acquired, or None."""
    began = time.monotonic()
    while not lease.try_acquire():
        if time.monotonic() - began > seconds:
            return None
        time.sleep(0.01)
    return time.monotonic() - began


def test_one_holder_keeps_a_lease_until_it_is_released(tmp_path: Path) -> None:
    first, second = make_lease(open_path(tmp_path), "key"), make_lease(open_path(tmp_path), "key")
    assert first.try_acquire() and not second.try_acquire() and first.try_acquire()
    assert make_lease(open_path(tmp_path), "other").try_acquire(), "another state is another lease"
    lines = (tmp_path / "key.claim").read_text().splitlines()
    assert f"pid={os.getpid()}" in lines and "duration=30.0" in lines
    second.release()
    assert (tmp_path / "key.claim").exists() and not first.is_lost
    first.release()
    assert not (tmp_path / "key.claim").exists()
    first.release()
    assert second.try_acquire()
    second.release()


@pytest.mark.parametrize("obstacle", ["a folder in its place", "a file in place of its folder"])
def test_a_lease_that_cannot_be_written_is_one_line(obstacle: str, tmp_path: Path) -> None:
    if obstacle == "a folder in its place":
        (tmp_path / "key.claim").mkdir()
        problem = "key.claim is a folder, where raysweep needs a file: rename or delete it"
    else:
        tmp_path = tmp_path / "prefixes"
        tmp_path.write_text("")
        problem = f"{tmp_path}: File exists"
    with pytest.raises(StoreUnavailable) as caught:
        make_lease(open_path(tmp_path), "key").try_acquire()
    assert str(caught.value).endswith(problem) and "\n" not in str(caught.value)


class TestTakeover:
    @pytest.mark.parametrize("owner", [{"pid": NOBODY}, {"pid": os.getppid(), "start": 1}])
    def test_of_a_process_of_this_machine_that_is_gone_or_whose_number_is_used_again(
        self, owner: dict[str, object], tmp_path: Path
    ) -> None:
        held = FolderLease(tmp_path / "held.claim", FAST)
        assert held.try_acquire()
        host = next(
            line.removeprefix("host=")
            for line in (tmp_path / "held.claim").read_text().splitlines()
            if line.startswith("host=")
        )
        held.release()
        write_marker(tmp_path / "key.claim", host=host, duration=6000, **owner)
        lease = FolderLease(tmp_path / "key.claim", LeaseTimes(0.1, 6000))
        assert acquire_within(lease, 600) is not None, "at once, not when it expires"
        lease.release()

    def test_of_another_machine_when_it_has_been_silent(self, tmp_path: Path) -> None:
        """By this machine's own clock: the file's time may be of a clock that goes wrong."""
        leases = []
        for number, offset in enumerate((-3600, 0, 3600)):
            file = tmp_path / f"{number}.claim"
            write_marker(file)
            then = time.time() + offset
            os.utime(file, (then, then))
            leases.append(FolderLease(file, FAST))
        with ThreadPoolExecutor(len(leases)) as pool:
            for waited in pool.map(acquire_within, leases, [600] * len(leases)):
                assert waited is not None and waited >= FAST.expires_after
        for lease in leases:
            lease.release()

    def test_not_of_another_machine_that_renews_it(self, tmp_path: Path) -> None:
        write_marker(tmp_path / "key.claim")
        lease = FolderLease(tmp_path / "key.claim", FAST)
        for renewal in range(4):
            assert acquire_within(lease, 0.3) is None
            os.utime(tmp_path / "key.claim", (renewal, renewal))

    def test_of_a_claim_that_version_0_1_wrote(self, tmp_path: Path, monkeypatch) -> None:
        """At worst, two versions train the same prefix at once."""
        monkeypatch.setattr(filelock._soft, "MALFORMED_LOCK_AGE_THRESHOLD", 0.2)
        (tmp_path / "key.claim").write_text(f"{HERE} {os.getpid()}")
        lease = FolderLease(tmp_path / "key.claim", FAST)
        waited = acquire_within(lease, 600)
        assert waited is not None and waited >= 0.2
        lease.release()


def hold_and_report(file: Path, reports: Path) -> None:
    """Hold a lease until it is lost, then release it."""
    lease = FolderLease(file, FAST)
    assert lease.try_acquire()
    (reports / "held").touch()
    while not lease.is_lost:
        time.sleep(0.01)
    lease.release()
    (reports / "lost").touch()


def wait_for(path: Path, process: ForkedProcess) -> None:
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.err
        time.sleep(0.01)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[ForkedProcess]:
    """A process that holds a lease."""
    process = forked_processes.start_function(hold_and_report, tmp_path / "key.claim", tmp_path)
    wait_for(tmp_path / "held", process)
    yield process
    process.kill()


@pytest.mark.slow
def test_a_paused_holder_loses_its_lease_and_notices_when_it_wakes(
    holder: ForkedProcess, tmp_path: Path
) -> None:
    lease = FolderLease(tmp_path / "key.claim", FAST)
    assert acquire_within(lease, 2 * FAST.expires_after) is None, "it lives"
    holder.send_signal(signal.SIGSTOP)
    lease = FolderLease(tmp_path / "key.claim", FAST)
    waited = acquire_within(lease, 600)
    assert waited is not None and waited >= FAST.expires_after
    holder.send_signal(signal.SIGCONT)
    assert holder.wait() == 0
    assert (tmp_path / "lost").exists() and not lease.is_lost
    assert f"pid={os.getpid()}\n" in (tmp_path / "key.claim").read_text(), "it deleted nothing"
    lease.release()


def test_the_lease_of_a_killed_holder_is_taken_over_at_once(
    holder: ForkedProcess, tmp_path: Path
) -> None:
    holder.kill()
    lease = FolderLease(tmp_path / "key.claim", LeaseTimes(1.0, 6000.0))
    assert acquire_within(lease, 600) is not None
    lease.release()


def leave_leases(folder: Path) -> None:
    leases = []
    for turn in range(ROUNDS):
        (folder / str(turn)).mkdir()
        leases.append(FolderLease(folder / str(turn) / "key.claim"))
        assert leases[-1].try_acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def contend(folder: Path, number: int) -> None:
    for turn in range(ROUNDS):
        place = folder / str(turn)
        forked_processes.wait_for_file(place / "go")
        lease = FolderLease(place / "key.claim")
        # An attempt may only find that another contender is replacing the file. The last one, after
        # somebody has won, must fail.
        while not (has_won := lease.try_acquire()) and not list(place.glob("won-*")):
            time.sleep(0.001)
        has_won = has_won or lease.try_acquire()
        (place / f"{'won' if has_won else 'lost'}-{number}").touch()
        forked_processes.wait_for_file(place / "end")
        assert not lease.is_lost
        lease.release()


def contend_in_threads(folder: Path, numbers: tuple[int, ...]) -> None:
    with ThreadPoolExecutor(len(numbers)) as pool:
        list(pool.map(lambda number: contend(folder, number), numbers))


def test_an_empty_file_is_taken_over_when_it_has_stayed_so(tmp_path: Path, monkeypatch) -> None:
    """What a power cut leaves of a lease that was just created."""
    monkeypatch.setattr(filelock._soft, "MALFORMED_LOCK_AGE_THRESHOLD", 0.1)
    (tmp_path / "key.claim").touch()
    lease = FolderLease(tmp_path / "key.claim", FAST)
    began = time.monotonic()
    while not lease.try_acquire():
        assert time.monotonic() < began + 600
        time.sleep(0.05)
    assert time.monotonic() - began >= FAST.expires_after
    other = FolderLease(tmp_path / "key.claim", FAST)
    assert not other.try_acquire()
    lease.release()
    assert other.try_acquire()
    other.release()


@pytest.mark.slow
def test_of_eight_contenders_for_a_dead_owner_one_gets_it(tmp_path: Path) -> None:
    dead = forked_processes.start_function(leave_leases, tmp_path)
    assert dead.wait() == -signal.SIGKILL, dead.err
    contenders = [
        forked_processes.start_function(contend_in_threads, tmp_path, numbers)
        for numbers in CONTENDERS
    ]
    for turn in range(ROUNDS):
        place = tmp_path / str(turn)
        (place / "go").touch()
        deadline = time.monotonic() + 600
        while len(list(place.glob("[wl]o*-*"))) < 8:
            assert time.monotonic() < deadline, [process.err for process in contenders]
            time.sleep(0.002)
        assert len(list(place.glob("won-*"))) == 1, sorted(place.glob("[wl]o*-*"))
        (place / "end").touch()
    assert [process.wait() for process in contenders] == [0, 0]


class TestTraining:
    @pytest.fixture
    def prefixes(self, tmp_path: Path) -> PrefixCache:
        """A store with one state, `there`."""
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        path = tmp_path / "run" / "epoch-0001"
        saved = checkpoint.save_checkpoint(
            path,
            build_training_config("standard"),
            checkpoint.TrainingState.copy_from(model, optimizer),
            [{"epoch": 1.0}],
            "data",
        )
        store = PrefixCache(tmp_path / "prefixes")
        store.store_state("there", saved.path)
        return store

    def test_a_state_that_exists_is_not_trained(self, prefixes: PrefixCache) -> None:
        with prefixes.acquire_training_lease("there") as ours:
            assert not ours
        with prefixes.acquire_training_lease("missing") as ours:
            assert ours and (prefixes.path / "missing.claim").is_file()
        assert prefixes.path.list_subfolders() == ["there"]
        assert not (prefixes.path / "missing.claim").is_file()

    def test_the_lease_of_another_process_is_not_touched_if_the_state_exists(
        self, prefixes: PrefixCache
    ) -> None:
        write_marker(prefixes.path.working_path / "there.claim", duration=30.0)
        before = (prefixes.path / "there.claim").read_text()
        with prefixes.acquire_training_lease("there") as ours:
            assert not ours
        assert (prefixes.path / "there.claim").read_text() == before

    def test_a_lease_is_released_also_after_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), PrefixCache(tmp_path).acquire_training_lease("key"):
            raise ZeroDivisionError
        assert not list(tmp_path.iterdir())
