"""Leases in stores: one holder at a time, also when holders die, are paused, or lose the store for
a while.
"""

import itertools
import json
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import forked_processes
import pytest
from forked_processes import ForkedProcess
from test_stores import gcs, s3_host, store

from raysweep.bucket_lease import BucketLease, LeaseLost, LeaseTimes, LegacyClaims
from raysweep.errors import SpecError
from raysweep.leases import hold_folder_lease, is_folder_in_use
from raysweep.process_identity import ProcessIdentity
from raysweep.stores import (
    Store,
    StorePath,
    StoreUnavailable,
    open_path,
    open_store,
)
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import load_space
from raysweep.sweep.trial import Trial

__all__ = ["gcs", "s3_host", "store"]
pytestmark = pytest.mark.parametrize("store", ["s3", "gs"], indirect=True)

HERE, ME = socket.gethostname(), os.getpid()
# Above the largest process number of Linux.
NOBODY = 2**22 + 1
KEY = ".claims/alone.lease"
FAST = LeaseTimes(renewal_interval=0.1, expires_after=0.6)
CALM = LeaseTimes(renewal_interval=0.5, expires_after=60.0)
# Eight contenders are the threads of two processes, four in each.
ROUNDS, CONTENDERS = 50, ((0, 1, 2, 3), (4, 5, 6, 7))


class Clock:
    """Fake monotonic clock, in seconds, which only a test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Clock by which leases measure how long a holder has been silent. It is also the
    `time.monotonic` of this file, because `time` is the same module.
    """
    clock = Clock()
    monkeypatch.setattr("raysweep.bucket_lease.time.monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def lease_of(store: Store) -> Iterator[Callable[..., BucketLease]]:
    """Function that makes leases, which are released at the end."""
    made: list[BucketLease] = []

    def make(times: LeaseTimes = FAST) -> BucketLease:
        made.append(BucketLease(store, KEY, "'s1'", times))
        return made[-1]

    yield make
    for lease in made:
        lease.release()


def wait_until_true(
    condition: Callable[[], bool], seconds: float, pause: Callable[[float], None] = time.sleep
) -> float | None:
    """Check a condition every 0.05 s.

    Args:
        condition: Returns whether to stop.
        seconds: How long to wait at most.
        pause: Sleeps for some seconds, or advances a fake clock.

    Returns:
        After how many seconds the condition was true; None if it was not.
    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            return None
        pause(0.05)
    return time.monotonic() - began


def acquire_within(
    lease: BucketLease, seconds: float, pause: Callable[[float], None] = time.sleep
) -> float | None:
    """Try to acquire a lease every 0.05 s (see `wait_until_true`)."""
    return wait_until_true(lease.try_acquire, seconds, pause)


def is_expiry(waited: float | None) -> bool:
    """Return whether a contender that tries every 0.05 s waited until a silent lease expired, and
    not longer.
    """
    return waited is not None and FAST.expires_after <= waited <= FAST.expires_after + 0.11


def write_lease(store: Store, **changes: object) -> str:
    """Write the lease of a process of another machine, unless `changes` say otherwise."""
    identity = replace(ProcessIdentity.of_this_process(), host="elsewhere")
    values = {"token": "other", "since": "2026-01-01 00:00:00", **identity.to_json_dict()}
    version = store.create(KEY, json.dumps({**values, **changes}).encode())
    assert version is not None
    return version


def read_holder(store: Store) -> tuple[str, int]:
    values = json.loads(store.read_bytes(KEY))
    return values["host"], values["pid"]


def test_one_holder_keeps_it_until_it_is_released(store: Store, lease_of) -> None:
    first, second = lease_of(), lease_of()
    assert first.try_acquire() and first.try_acquire() and not second.try_acquire()
    assert [file.key for file in store.list_files()] == [KEY]
    assert read_holder(store) == (HERE, ME)
    assert acquire_within(second, 2 * FAST.expires_after) is None, "it is renewed"
    assert second.describe_live_holder().startswith(f"process {ME} on {HERE} since 20")
    second.release()
    first.require_held()
    first.release()
    first.release()
    assert json.loads(store.read_bytes(KEY))["released"] is True
    assert second.try_acquire() and read_holder(store) == (HERE, ME)
    assert [file.key for file in store.list_files()] == [KEY]


class TestTakeover:
    def test_of_another_machine_when_it_has_been_silent(
        self, store: Store, lease_of, clock: Clock
    ) -> None:
        write_lease(store)
        lease = lease_of()
        assert is_expiry(acquire_within(lease, 600, clock.advance))
        assert read_holder(store) == (HERE, ME) and lease.describe_live_holder() == ""

    def test_not_of_another_machine_that_renews_it(
        self, store: Store, lease_of, clock: Clock
    ) -> None:
        version, lease = write_lease(store), lease_of()
        assert not lease.try_acquire() and lease.describe_live_holder() == "", (
            "a single renewal may be of a process that has died"
        )
        for number in range(4):
            assert acquire_within(lease, 0.3, clock.advance) is None
            values = {**json.loads(store.read_bytes(KEY)), "renewals": number}
            version = store.replace(KEY, json.dumps(values).encode(), version)
            assert version is not None
        assert not lease.try_acquire()
        assert (
            lease.describe_live_holder() == f"process {ME} on elsewhere since 2026-01-01 00:00:00"
        )

    @pytest.mark.parametrize(
        ("changes", "at_once"),
        [
            ({"host": HERE, "pid": NOBODY}, True),
            ({"host": HERE, "started": 1.0}, True),
            ({"host": HERE}, False),
            ({"host": HERE, "pid": NOBODY, "boot": "before"}, False),
            ({"host": "elsewhere", "pid": NOBODY}, False),
        ],
        ids=["gone", "number used again", "alive", "gone, before a reboot", "another machine"],
    )
    def test_at_once_of_a_process_that_this_machine_knows_to_be_gone(
        self, changes: dict[str, object], at_once: bool, store: Store, lease_of
    ) -> None:
        write_lease(store, **changes)
        assert lease_of().try_acquire() is at_once

    @pytest.mark.parametrize("content", [b"", b"damaged", b"[1]", b'{"token": 1}'])
    def test_of_a_file_that_names_nobody_when_it_stays(
        self, content: bytes, store: Store, lease_of, clock: Clock
    ) -> None:
        """Earlier versions emptied the file of a lease before they deleted it."""
        store.create(KEY, content)
        assert is_expiry(acquire_within(lease_of(), 600, clock.advance))

    def test_a_time_without_the_store_is_no_silence(
        self, store: Store, lease_of, clock: Clock
    ) -> None:
        """The holder could not renew its lease in that time either."""
        write_lease(store)
        lease = lease_of()
        assert not lease.try_acquire()
        clock.advance(3600)
        assert not lease.try_acquire()
        for _ in range(4):
            clock.advance(FAST.renewal_interval)
            assert not lease.try_acquire()
        clock.advance(FAST.renewal_interval)
        lease.try_acquire()
        clock.advance(FAST.renewal_interval)
        assert lease.try_acquire()


def count_while_held(location: str, folder: Path, times: LeaseTimes) -> None:
    """Hold the lease; append a line each time that it is held, until it is lost."""
    lease = BucketLease(open_store(location), KEY, "'s1'", times)
    assert lease.try_acquire()
    with (folder / "lines").open("a") as file:
        while True:
            try:
                lease.require_held()
            except LeaseLost as error:
                (folder / "lost").write_text(str(error))
                lease.release()
                return
            file.write("held\n")
            file.flush()
            time.sleep(0.001)


def wait_until(condition: Callable[[], bool], process: ForkedProcess) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.err
        time.sleep(0.01)


@pytest.fixture
def start_holder(store: Store, tmp_path: Path) -> Iterator[Callable[[LeaseTimes], ForkedProcess]]:
    """Function that starts a process which holds the lease and writes as long as it may."""
    started = []

    def start(times: LeaseTimes) -> ForkedProcess:
        process = forked_processes.start_function(count_while_held, store.uri, tmp_path, times)
        started.append(process)
        wait_until((tmp_path / "lines").exists, process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("renewal_interval", [0.1, 300.0], ids=["heartbeat", "before a write"])
def test_a_paused_holder_wakes_notices_and_writes_nothing(
    renewal_interval: float, store: Store, start_holder, lease_of, tmp_path: Path
) -> None:
    """Its own check before each write notices it also before the heartbeat does."""
    holder = start_holder(LeaseTimes(renewal_interval, FAST.expires_after))
    lease = lease_of()
    if renewal_interval < 1:
        assert acquire_within(lease, 2 * FAST.expires_after) is None
    holder.send_signal(signal.SIGSTOP)
    lease = lease_of()
    waited = acquire_within(lease, 600)
    assert waited is not None and waited >= FAST.expires_after
    n_lines = len((tmp_path / "lines").read_text())
    holder.send_signal(signal.SIGCONT)
    assert holder.wait() == 0
    assert len((tmp_path / "lines").read_text()) <= n_lines + len("held\n"), (
        "at most the line for which it had looked before it was paused"
    )
    lost = (tmp_path / "lost").read_text()
    assert lost.startswith(f"'s1' was taken over by process {ME} on {HERE} since 20")
    assert "\n" not in lost
    assert read_holder(store) == (HERE, ME), "it deleted nothing"
    lease.require_held()


def test_a_bucket_folder_is_in_use_while_its_lease_is_renewed(store: Store) -> None:
    """A lease of another machine counts for two periods; a dead process of this one not at all."""
    folder = open_path(store.uri)
    assert not is_folder_in_use(folder), "there is no lease"
    with hold_folder_lease(folder):
        assert is_folder_in_use(folder)
    assert not is_folder_in_use(folder), "it was released"
    store.delete(KEY)
    write_lease(store)
    assert is_folder_in_use(folder)
    long_past = LeaseTimes(renewal_interval=0.0, expires_after=-1.0)
    assert not is_folder_in_use(folder, long_past), "its last renewal is too old"
    store.delete(KEY)
    write_lease(store, host=HERE, pid=NOBODY)
    assert not is_folder_in_use(folder)


def test_the_lease_of_a_killed_holder_is_taken_over_at_once(start_holder, lease_of) -> None:
    slow = LeaseTimes(10.0, 6000.0)
    holder = start_holder(slow)
    lease = lease_of(slow)
    assert not lease.try_acquire()
    holder.kill()
    assert acquire_within(lease, 600) is not None


class TestOutage:
    """A store that answers with errors, before or after it has done what was asked."""

    @pytest.mark.parametrize("arrives", [False, True], ids=["before", "after"])
    def test_a_holder_keeps_its_lease(self, arrives: bool, store, lease_of, monkeypatch) -> None:
        lease = lease_of(LeaseTimes(300.0, 600.0))
        assert lease.try_acquire()
        replace_file = store.replace

        def fail(*arguments: object) -> None:
            if arrives:
                assert replace_file(*arguments) is not None
            raise StoreUnavailable("it does not answer")

        monkeypatch.setattr(store, "replace", fail)
        for _ in range(2 - arrives):
            with pytest.raises(StoreUnavailable):
                lease.renew()
        monkeypatch.undo()
        lease.renew()
        lease.require_held()
        assert read_holder(store) == (HERE, ME)
        lease.release()
        assert json.loads(store.read_bytes(KEY))["released"] is True

    @pytest.mark.parametrize("kind", ["create", "replace"])
    def test_an_acquisition_that_arrived_is_found(self, kind, store, lease_of, monkeypatch) -> None:
        if kind == "replace":
            write_lease(store, host=HERE, pid=NOBODY)
        lease, act = lease_of(), getattr(store, kind)

        def fail(*arguments: object) -> None:
            assert act(*arguments) is not None
            raise StoreUnavailable("it does not answer")

        monkeypatch.setattr(store, kind, fail)
        with pytest.raises(StoreUnavailable):
            lease.try_acquire()
        monkeypatch.undo()
        assert lease.try_acquire()
        lease.require_held()

    @pytest.mark.slow
    def test_a_heartbeat_goes_on_afterwards(self, store: Store, lease_of, monkeypatch) -> None:
        lease, n_failures = lease_of(), [0]
        assert lease.try_acquire()

        def fail(*arguments: object) -> None:
            n_failures[0] += 1
            raise StoreUnavailable("it does not answer")

        monkeypatch.setattr(store, "replace", fail)
        deadline = time.monotonic() + 600
        while n_failures[0] < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        monkeypatch.undo()
        other = lease_of()
        assert acquire_within(other, 2 * FAST.expires_after) is None and not lease.is_lost
        assert other.describe_live_holder()

    def test_a_release_without_the_store_is_no_error(
        self, store, lease_of, monkeypatch, clock: Clock
    ) -> None:
        lease = lease_of()
        assert lease.try_acquire()

        def fail(*arguments: object) -> None:
            raise StoreUnavailable("it does not answer")

        with monkeypatch.context() as patch:
            patch.setattr(store, "replace", fail)
            patch.setattr(store, "delete", fail)
            lease.release()
        assert is_expiry(acquire_within(lease_of(), 600, clock.advance))


class TestLegacyClaims:
    """What version 0.1 wrote."""

    def claim(self, store: Store, host: str, pid: int) -> str:
        key = f".claims/alone/1764000000.123456 {host} {pid}"
        store.write_bytes(key, b"")
        return key

    def test_those_of_silent_and_dead_processes_are_deleted(
        self, store: Store, clock: Clock
    ) -> None:
        self.claim(store, HERE, NOBODY)
        claims = LegacyClaims(store, ".claims/alone", FAST)
        assert not claims.observe() and not store.list_files()
        for name in ("README", "2026 elsewhere x", "a b c d"):
            store.write_bytes(f".claims/alone/{name}", b"")
        assert not claims.observe() and len(store.list_files()) == 3, "they are no claims"
        store.delete_folder(".claims")
        self.claim(store, "elsewhere", NOBODY)
        assert is_expiry(wait_until_true(lambda: not claims.observe(), 600, clock.advance))
        assert claims.live_owner == "" and not store.list_files()

    def test_that_of_a_live_process_stays(self, store: Store) -> None:
        times = LeaseTimes(0.5, 3.0)  # Object stores count in whole seconds.
        claims = LegacyClaims(store, ".claims/alone", times)
        key = self.claim(store, "elsewhere", 77)
        deadline = time.monotonic() + 600
        while not claims.live_owner:
            assert claims.observe() and time.monotonic() < deadline
            time.sleep(0.3)
            self.claim(store, "elsewhere", 77)
        assert claims.live_owner == "process 77 on elsewhere"
        assert [file.key for file in store.list_files()] == [key]


def contend(location: str, folder: Path, numbers: tuple[int, ...]) -> None:
    stores = [open_store(location) for _ in numbers]
    with ThreadPoolExecutor(len(numbers)) as pool:
        for turn in range(ROUNDS):
            leases = [BucketLease(store, f"{turn}.lease", "", CALM) for store in stores]
            forked_processes.wait_for_file(folder / f"go-{turn}")
            for lease, has_won, number in zip(
                leases, pool.map(BucketLease.try_acquire, leases), numbers, strict=True
            ):
                if has_won:
                    lease.require_held()
                (folder / f"{turn}-{'won' if has_won else 'lost'}-{number}").touch()
            forked_processes.wait_for_file(folder / f"end-{turn}")
            for lease in leases:
                lease.release()


def save_trials(location: str, folder: Path) -> None:
    """Write a trial again and again, as the driver of a sweep does."""
    space = load_space("gairat", {})
    with hold_folder_lease(location, FAST) as held:
        ledger = Ledger.create(held, space)
        for epoch in itertools.count(1):
            try:
                ledger.save_trial(Trial(0, {}, epoch=epoch))
            except LeaseLost as error:
                (folder / "lost").write_text(f"{error}")
                assert ledger.is_lost()
                return
            (folder / "lines").touch()


@contextmanager
def hold_when_silent(location: StorePath) -> Iterator[StorePath]:
    """Hold a folder whose holder was just paused: a renewal that was under way may still arrive."""
    with ExitStack() as stack:
        held = None
        while held is None:
            with suppress(SpecError):
                held = stack.enter_context(hold_folder_lease(location, FAST))
        yield held


def test_a_driver_that_was_paused_leaves_the_sweep_to_the_next(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raysweep.leases._POLL_SECONDS", 0.05)
    location = open_path(store.uri) / "s1"
    driver = forked_processes.start_function(save_trials, str(location), tmp_path)
    wait_until((tmp_path / "lines").exists, driver)
    with (
        pytest.raises(
            SpecError, match=rf"'s1' is running already \(process {driver.pid} on {HERE}"
        ),
        hold_folder_lease(location, FAST),
    ):
        pass
    driver.send_signal(signal.SIGSTOP)
    with hold_when_silent(location) as held:
        ledger = Ledger.open(held)
        (before,) = ledger.load_trials()
        driver.send_signal(signal.SIGCONT)
        assert driver.wait() == 0, driver.err
        assert "'s1' was taken over by process" in (tmp_path / "lost").read_text()
        (after,) = ledger.load_trials()
        assert after.epoch <= before.epoch + 1, "at most the request that was under way"
        assert not ledger.is_lost()
    assert (location / "sweep.json").is_file()
    (lease,) = location.list_files(".claims/*")
    assert json.loads(location.store.read_bytes(lease.key))["released"] is True


def test_the_check_of_a_held_folder_stays_in_its_process(store: Store) -> None:
    with hold_folder_lease(open_path(store.uri) / "s1", FAST) as held:
        sent = pickle.loads(pickle.dumps(held))
        assert sent == held
        held.store.require_writable()
        (lease,) = held.list_files(".claims/*")
        values = {**json.loads(held.store.read_bytes(lease.key)), "token": "another"}
        sent.store.write_bytes(lease.key, json.dumps(values).encode())
        deadline = time.monotonic() + 600
        while True:
            try:
                held.store.require_writable()
            except LeaseLost:
                break
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for write in (
            lambda: (held / "x").write_bytes(b""),
            lambda: held.store.create((held / "x").key, b""),
            (held / "sweep.json").delete,
            held.delete_folder,
        ):
            with pytest.raises(LeaseLost, match="was taken over by process"):
                write()
        with pytest.raises(LeaseLost), (held / "e").write_checkpoint() as partial:
            (partial / "meta.json").write_text("{}")
        (sent / "y").write_bytes(b"of a trial's own process")
    assert sorted(file.key.rpartition("/")[2] for file in sent.list_files()) == [
        "alone.lease",
        "y",
    ]


@pytest.mark.slow
def test_of_eight_contenders_for_a_dead_owner_one_gets_it(store: Store, tmp_path: Path) -> None:
    process = ProcessIdentity.of_this_process()
    dead = {"token": "dead", **replace(process, pid=NOBODY).to_json_dict()}
    for turn in range(ROUNDS):
        store.create(f"{turn}.lease", json.dumps(dead).encode())
    contenders = [
        forked_processes.start_function(contend, store.uri, tmp_path, numbers)
        for numbers in CONTENDERS
    ]
    for turn in range(ROUNDS):
        (tmp_path / f"go-{turn}").touch()
        deadline = time.monotonic() + 600
        while len(list(tmp_path.glob(f"{turn}-*"))) < 8:
            assert time.monotonic() < deadline, [process.err for process in contenders]
            time.sleep(0.002)
        assert len(list(tmp_path.glob(f"{turn}-won-*"))) == 1, turn
        (tmp_path / f"end-{turn}").touch()
    assert [process.wait() for process in contenders] == [0, 0]
    contents = store.read_matching("", "*.lease").values()
    assert [json.loads(content)["released"] for content in contents] == [True] * ROUNDS
