"""Only one process works in a folder, with flock and without; the system or another process takes
the lock of a dead one.
"""

import errno
import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import forked_processes
import pytest
from forked_processes import ForkedProcess

from raysweep import folder_lock
from raysweep.errors import InfrastructureError, SpecError
from raysweep.folder_lock import hold_folder_lock
from raysweep.process_identity import ProcessIdentity

HERE = socket.gethostname()
ROUNDS, CONTENDERS = 50, 8


def fail_flock(code: int) -> Callable[[int, int], None]:
    """flock of a mount that has none."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    return flock


@pytest.fixture(params=["flock", "no flock"])
def has_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both kinds of file systems, in this process."""
    if request.param == "no flock":
        monkeypatch.setattr(fcntl, "flock", fail_flock(errno.ENOSYS))
    return request.param == "flock"


def hold_and_sleep(folder: Path, has_flock: bool, held: Path, seconds: float) -> None:
    if not has_flock:
        fcntl.flock = fail_flock(errno.ENOSYS)
    with hold_folder_lock(folder, "it"):
        held.touch()
        time.sleep(seconds)
        held.unlink()


@pytest.fixture
def start_holder(tmp_path: Path, has_flock: bool) -> Iterator[Callable[..., ForkedProcess]]:
    """Function that starts a process which holds the lock of `tmp_path / "folder"`."""
    started: list[ForkedProcess] = []

    def start(seconds: float = 600, flock: bool = has_flock) -> ForkedProcess:
        held = tmp_path / f"held-{len(started)}"
        process = forked_processes.start_function(
            hold_and_sleep, tmp_path / "folder", flock, held, seconds
        )
        started.append(process)
        while not held.exists():
            assert process.poll() is None, process.err
            time.sleep(0.01)
        return process

    yield start
    for process in started:
        process.kill()


def test_a_live_holder_is_named_and_a_killed_one_is_replaced(start_holder, tmp_path: Path) -> None:
    holder = start_holder()
    named = rf"^it is running already \(process {holder.pid} on {HERE} since 20.*\).*; wait$"
    for pause in (None, signal.SIGSTOP):
        if pause:
            holder.send_signal(pause)
        with (
            pytest.raises(SpecError, match=named) as refusal,
            hold_folder_lock(tmp_path / "folder", "it", "; wait"),
        ):
            pass
        assert "\n" not in str(refusal.value)
    holder.kill()
    with hold_folder_lock(tmp_path / "folder", "it"):
        text = (tmp_path / "folder" / "lock").read_text()
        assert text.startswith(f"process {os.getpid()} on {HERE} since ")
    with hold_folder_lock(tmp_path / "folder", "it"):
        pass


def test_one_waits_for_the_end_of_the_other(start_holder, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(folder_lock, "_POLL_SECONDS", 0.05)
    holder = start_holder(seconds=0.3)
    with hold_folder_lock(tmp_path / "folder", "it", wait=True):
        assert not list(tmp_path.glob("held-*"))
    assert holder.wait() == 0


def test_a_folder_that_holds_only_its_lock_is_deleted(tmp_path: Path) -> None:
    with hold_folder_lock(tmp_path / "a", "it", delete_if_unused=True):
        assert (tmp_path / "a" / "lock").exists()
    with hold_folder_lock(tmp_path / "b", "it", delete_if_unused=True):
        (tmp_path / "b" / "file").touch()
    with hold_folder_lock(tmp_path / "c", "it"):
        pass
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "b",
        "b/file",
        "b/lock",
        "c",
        "c/lock",
    ]


def test_the_same_process_holds_it_once(tmp_path: Path, has_flock: bool) -> None:
    with (
        hold_folder_lock(tmp_path, "it"),
        pytest.raises(SpecError, match=rf"running already \(process {os.getpid()} on"),
        hold_folder_lock(tmp_path, "it"),
    ):
        pass


def contend(folder: Path, has_flock: bool, number: int) -> None:
    """Take part in every round, which begins when its file `go` is there."""
    if not has_flock:
        fcntl.flock = fail_flock(errno.ENOSYS)
    for turn in range(ROUNDS):
        place = folder / str(turn)
        while not (place / "go").exists():
            time.sleep(0.001)
        try:
            with hold_folder_lock(place, "it"):
                (place / f"won-{number}").touch()
                while not (place / "end").exists():
                    time.sleep(0.001)
        except SpecError:
            (place / f"lost-{number}").touch()


def leave_dead_lock(folder: Path, has_flock: bool) -> None:
    """What a process that was killed leaves in each folder."""
    if not has_flock:
        fcntl.flock = fail_flock(errno.ENOSYS)
    locks = []
    for turn in range(ROUNDS):
        locks.append(hold_folder_lock(folder / str(turn), "it"))
        locks[-1].__enter__()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_of_eight_contenders_for_a_dead_owner_one_gets_it(tmp_path: Path, has_flock: bool) -> None:
    dead = forked_processes.start_function(leave_dead_lock, tmp_path, has_flock)
    assert dead.wait() == -signal.SIGKILL
    contenders = [
        forked_processes.start_function(contend, tmp_path, has_flock, number)
        for number in range(CONTENDERS)
    ]
    for turn in range(ROUNDS):
        place = tmp_path / str(turn)
        (place / "go").touch()
        deadline = time.monotonic() + 600
        while len(list(place.glob("[wl]o*-*"))) < CONTENDERS:
            assert time.monotonic() < deadline, [process.err for process in contenders]
            time.sleep(0.002)
        assert len(list(place.glob("won-*"))) == 1, sorted(place.glob("[wl]o*-*"))
        (place / "end").touch()
    assert [process.wait() for process in contenders] == [0] * CONTENDERS


class TestWithoutFlock:
    @pytest.fixture(autouse=True)
    def no_flock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fcntl, "flock", fail_flock(errno.EOPNOTSUPP))

    def leave_lock_of(self, folder: Path, **changes: object) -> None:
        """Leave a lock as a process that did not release it."""
        lock = folder_lock._try_strict_lock(folder)
        assert lock is not None
        values = json.loads((folder / "lock").read_text().partition("\n")[2])
        identity = replace(ProcessIdentity.from_json_dict(values), **changes)
        values |= identity.to_json_dict()
        (folder / "lock").write_text(f"{identity} since 2026-01-01\n{json.dumps(values)}")
        self.locks.append(lock)

    @pytest.fixture(autouse=True)
    def kept(self) -> None:
        self.locks: list[object] = []

    @pytest.mark.parametrize(
        ("changes", "dead"),
        [
            ({}, False),
            ({"started": 1.0}, True),
            ({"pid": 2**22 + 1}, True),
            ({"host": "elsewhere", "pid": 2**22 + 1}, False),
            ({"boot": "before", "started": 1.0}, False),
        ],
        ids=["live", "number used again", "gone", "another machine", "another boot"],
    )
    def test_the_lock_of_an_ended_process_is_replaced(
        self, changes: dict[str, object], dead: bool, tmp_path: Path
    ) -> None:
        (tmp_path / "lock").touch()
        self.leave_lock_of(tmp_path, **changes)
        if dead:
            with hold_folder_lock(tmp_path, "it"):
                pass
            return
        with pytest.raises(SpecError, match="running already") as refusal:
            hold_folder_lock(tmp_path, "it").__enter__()
        # The line says what to delete; then it works.
        claims = tmp_path / ".lock.strict.filelock"
        assert str(refusal.value).endswith(f"if it has ended, delete {claims} and {tmp_path}/lock")
        self.locks[0].release()
        (tmp_path / "lock").unlink()
        with hold_folder_lock(tmp_path, "it"):
            pass

    def test_a_machine_whose_mount_has_flock_is_not_overlooked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In both orders: who comes second refuses."""
        without = fcntl.flock
        for first, second in ((without, self.flock), (self.flock, without)):
            monkeypatch.setattr(fcntl, "flock", first)
            with hold_folder_lock(tmp_path, "it"):
                monkeypatch.setattr(fcntl, "flock", second)
                with pytest.raises(SpecError, match=f"running already .process {os.getpid()} on"):
                    hold_folder_lock(tmp_path, "it").__enter__()
                monkeypatch.setattr(fcntl, "flock", first)

    flock = staticmethod(fcntl.flock)

    def test_without_hard_links_it_is_one_line(self, tmp_path: Path, monkeypatch) -> None:
        def link(*names: object, **options: object) -> None:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(os, "link", link)
        with pytest.raises(InfrastructureError, match="has no flock and cannot be locked") as line:
            hold_folder_lock(tmp_path, "it").__enter__()
        assert "hard-link" in str(line.value) and "\n" not in str(line.value)


def test_nfs_without_its_lock_service_is_refused(tmp_path: Path, monkeypatch) -> None:
    """Two machines of which one reaches the service would hold two different locks."""
    monkeypatch.setattr(fcntl, "flock", fail_flock(errno.ENOLCK))
    with pytest.raises(InfrastructureError, match=r"cannot be locked: No locks available; on NFS"):
        hold_folder_lock(tmp_path, "it").__enter__()
    assert not list(tmp_path.glob(".lock*"))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InfrastructureError, match="cannot be written: Not a directory"):
        hold_folder_lock(tmp_path / "file" / "x", "it").__enter__()


def test_the_lock_of_a_version_that_wrote_only_its_process_is_respected(tmp_path: Path) -> None:
    """0.1 locks the same file with flock."""
    with (tmp_path / "lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"process 7 on {HERE} since 2026-01-01 00:00:00")
        file.flush()
        with pytest.raises(SpecError, match=rf"already \(process 7 on {HERE} since 2026"):
            hold_folder_lock(tmp_path, "it").__enter__()
    with hold_folder_lock(tmp_path, "it"):
        pass
