"""Whether a process has ended is known for those of this machine and boot, also when its number is
used again.
"""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from raysweep.process_identity import ProcessIdentity


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until the end of the test."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def identity_of(pid: int) -> ProcessIdentity:
    """Identity of another process of this machine, read from the kernel's own record."""
    # The command's name is in brackets and may contain anything.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return replace(ProcessIdentity.of_this_process(), pid=pid, started=started)


def test_this_process_is_not_gone_and_started_when_the_kernel_says() -> None:
    mine = ProcessIdentity.of_this_process()
    assert (mine.host, mine.pid) == (socket.gethostname(), os.getpid()) and not mine.is_gone()
    assert mine.started == pytest.approx(identity_of(os.getpid()).started, abs=1)
    assert str(mine) == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_process_is_gone_when_it_was_killed_before_anybody_waits_for_it(sleeper) -> None:
    identity = identity_of(sleeper.pid)
    assert not identity.is_gone()
    sleeper.send_signal(signal.SIGSTOP)
    assert not identity.is_gone(), "a paused process works on later"
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert psutil.pid_exists(sleeper.pid) and identity.is_gone()
    sleeper.wait()
    assert not psutil.pid_exists(sleeper.pid) and identity.is_gone()


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({}, False),
        ({"started": 1000.0}, True),
        ({"host": "elsewhere"}, False),
        ({"host": "elsewhere", "pid": 2**22 + 1}, False),
        ({"boot": "before", "started": 1000.0}, False),
        ({"pid": 2**22 + 1}, True),
        ({"boot": "before", "pid": 2**22 + 1}, False),
    ],
)
def test_a_number_that_is_used_again_is_another_process(sleeper, changes, gone: bool) -> None:
    """Of another machine or boot nothing is known: two machines may have the same name."""
    identity = identity_of(sleeper.pid)
    changes = {**changes}
    if "started" in changes:
        changes["started"] = identity.started - changes["started"]
    assert replace(identity, **changes).is_gone() is gone


def test_a_clock_that_is_set_ends_no_process(sleeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's boot time, from which psutil computes start times, moves with the clock."""
    identity = identity_of(sleeper.pid)
    boot_time = psutil.boot_time()
    for module in (psutil, psutil._psplatform):
        monkeypatch.setattr(module, "boot_time", lambda: boot_time + 7200)
    assert psutil.Process(sleeper.pid).create_time() == pytest.approx(
        boot_time + 7200 + identity.started
    )
    assert not identity.is_gone() and not ProcessIdentity.of_this_process().is_gone()


def test_identities_are_read_as_they_were_written() -> None:
    identity = ProcessIdentity("host", 12, "boot 4026531836", 1234.56)
    assert ProcessIdentity.from_json_dict({**identity.to_json_dict(), "since": "x"}) == identity
    for damaged in ({}, {"host": "h", "pid": None, "boot": "", "started": 1}, {"pid": "x"}):
        with pytest.raises(ValueError, match="no identity"):
            ProcessIdentity.from_json_dict(damaged)
    with pytest.raises(ValueError, match="invalid literal"):
        ProcessIdentity.from_json_dict({**identity.to_json_dict(), "pid": "x"})
