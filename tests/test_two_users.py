"""Another user of the machine, with a real user id of its own, gets at nothing."""

import multiprocessing
import os
import re
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from acting_users import act_as, needs_root

from raysweep.commands import doctor
from raysweep.errors import InfrastructureError, SpecError
from raysweep.file_privacy import UMASK_VARIABLE, private_files, read_umask
from raysweep.redaction import redact_secrets
from raysweep.sweep import ray_access
from raysweep.sweep.cluster import connect_to_cluster
from raysweep.sweep.node_probe import NodeReport
from raysweep.sweep.ray_internals import check_ray_internals

VICTIM, ATTACKER = 65533, 65534


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files that all users may write, with a home folder for the victim."""
    folder = Path(tempfile.mkdtemp(prefix="two-", dir="/tmp"))
    folder.chmod(0o1777)
    (folder / "home").mkdir(mode=0o755)
    os.chown(folder / "home", VICTIM, VICTIM)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder)


def mode_of(path: Path) -> str:
    return f"{stat.S_IMODE(path.stat().st_mode):04o}"


@needs_root
def test_nobody_else_reads_the_token(machine: Path) -> None:
    act_as(VICTIM, ray_access.secure_token_file)
    token = machine / "home/.ray/auth_token"
    assert re.fullmatch("[0-9a-f]{64}", token.read_text())
    assert (mode_of(token), mode_of(token.parent)) == ("0600", "0700")
    assert token.stat().st_uid == VICTIM
    assert isinstance(act_as(ATTACKER, token.read_text), PermissionError)
    before = token.read_text()
    act_as(VICTIM, ray_access.secure_token_file)
    assert token.read_text() == before, "a token that is private is kept"


@needs_root
@pytest.mark.parametrize(
    ("folder_mode", "file_mode", "words"),
    [
        (0o755, 0o644, "can be read by other users (mode 0644)"),
        (0o777, 0o600, "can be replaced by other users (mode 0777 of its folder)"),
        (0o755, 0o600, ""),
    ],
)
def test_a_token_with_looser_modes_is_told_and_made_private(
    machine: Path, folder_mode: int, file_mode: int, words: str
) -> None:
    token = machine / "home/.ray/auth_token"
    token.parent.mkdir()
    token.write_text("f" * 64)
    token.chmod(file_mode)
    token.parent.chmod(folder_mode)
    for path in (token, token.parent):
        os.chown(path, VICTIM, VICTIM)
    exposure = act_as(VICTIM, ray_access.find_token_exposure)
    assert exposure == (f"{token} {words}" if words else "")
    act_as(VICTIM, ray_access.secure_token_file)
    assert (mode_of(token), mode_of(token.parent)) == ("0600", "0700")
    assert act_as(VICTIM, ray_access.find_token_exposure) == ""


@needs_root
def test_somebody_elses_token_is_not_used(machine: Path) -> None:
    token = machine / "home/.ray/auth_token"
    token.parent.mkdir()
    os.chown(token.parent, VICTIM, VICTIM)
    token.write_text("known to the attacker")
    os.chown(token, ATTACKER, ATTACKER)
    assert act_as(VICTIM, ray_access.find_token_exposure) == f"{token} belongs to user {ATTACKER}"
    refused = act_as(VICTIM, ray_access.secure_token_file)
    assert isinstance(refused, InfrastructureError)
    assert "it is not a file of your own" in redact_secrets(str(refused)), "not taken for a secret"
    token.unlink()
    token.symlink_to(machine / "elsewhere")
    assert isinstance(act_as(VICTIM, ray_access.secure_token_file), InfrastructureError)
    assert not (machine / "elsewhere").exists(), "no link is followed"


def test_two_commands_that_start_at_once_agree_on_a_token(machine: Path) -> None:
    context = multiprocessing.get_context("fork")
    starts = [context.Process(target=ray_access.secure_token_file) for _ in range(8)]
    for process in starts:
        process.start()
    for process in starts:
        process.join()
    assert [process.exitcode for process in starts] == [0] * 8
    (token,) = (machine / "home/.ray").iterdir()
    assert len(token.read_text()) == 64


def test_doctor_tells_of_a_token_that_others_can_read() -> None:
    def diagnose(problems: dict[str, str]) -> list[tuple[bool, str]]:
        report = NodeReport("n1", True, {}, 0.0, 0, 0.0, 1 << 40, 1 << 40, [], problems=problems)
        findings = doctor._diagnose_network([report])
        return [(found.ok, found.text) for found in findings if found.check == "token"]

    assert diagnose({}) == [(True, "no other user can read Ray's token")]
    problem = "/home/me/.ray/auth_token can be read by other users (mode 0644)"
    assert diagnose({"token": problem}) == [(False, f"n1: {problem}")]


@needs_root
def test_nobody_else_enters_rays_folder(machine: Path) -> None:
    folder = act_as(VICTIM, ray_access.create_private_ray_folder)
    assert folder == machine / f"raysweep-{VICTIM}" / "ray"
    # What Ray does: all of its folders have mode 0777.
    act_as(VICTIM, lambda: folder.mkdir(mode=0o777))
    folder.chmod(0o777)
    for action in (
        lambda: list(folder.iterdir()),
        lambda: (folder / "socket").touch(),
        lambda: folder.rename(machine / "mine"),
        lambda: folder.parent.rename(machine / "mine"),
    ):
        assert isinstance(act_as(ATTACKER, action), PermissionError)


@needs_root
@pytest.mark.parametrize("trap", ["folder", "link", "file"])
def test_a_folder_that_somebody_else_has_made_first_is_not_used(machine: Path, trap: str) -> None:
    taken = machine / f"raysweep-{VICTIM}"
    if trap == "folder":
        taken.mkdir()
    elif trap == "link":
        taken.symlink_to(machine / "home")
    else:
        taken.touch()
    os.chown(taken, ATTACKER, ATTACKER, follow_symlinks=False)
    folder = act_as(VICTIM, ray_access.create_private_ray_folder)
    assert isinstance(folder, Path) and taken not in folder.parents
    assert folder.parent.stat().st_uid == VICTIM and mode_of(folder.parent) == "0700"


def test_rays_folder_is_short_enough_for_sockets(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest_name = "session_2026-11-29_20-26-49_720904_4194304/sockets/plasma_store"
    for length in (1, 4, 30, 60, 200):
        parent = machine / ("d" * length)
        parent.mkdir()
        monkeypatch.setenv("RAY_TMPDIR", str(parent))
        folder = ray_access.create_private_ray_folder()
        assert len(str(folder / longest_name)) <= 107
        assert (parent in folder.parents) == (length <= 4)
    assert folder.parent.parent == Path("/tmp")


def start_raylet(user: int, address: str, *arguments: str) -> subprocess.Popen:
    """Start a process that looks like a node of a Ray cluster."""
    command = ["raylet", "-c", "sleep 60; :", "sh", f"--gcs-address={address}", *arguments]
    process = subprocess.Popen(
        command, executable="/bin/sh", user=user, group=user, start_new_session=True
    )
    time.sleep(0.02)  # Start times have a resolution of 10 ms.
    return process


@pytest.fixture
def raylets(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen]]:
    """Processes that a test starts; other tests' clusters, which are root's, are out of sight."""
    processes: list[subprocess.Popen] = []
    monkeypatch.setattr(
        psutil, "process_iter", lambda: [psutil.Process(process.pid) for process in processes]
    )
    yield processes
    for process in processes:
        os.killpg(process.pid, 9)
        process.wait()


@needs_root
def test_auto_never_connects_to_somebody_elses_cluster(
    machine: Path, raylets: list[subprocess.Popen], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.1)
        address = f"127.0.0.1:{trap.getsockname()[1]}"
        raylets.append(start_raylet(ATTACKER, address))

        def connect() -> None:
            # Another test may have connected the process from which this one is forked.
            monkeypatch.setattr(ray, "is_initialized", lambda: False)
            with connect_to_cluster("auto"):
                pass

        # The victim may not be able to read the modules of this Python.
        check_ray_internals("connect")
        refused = act_as(VICTIM, connect)
        assert isinstance(refused, InfrastructureError)
        assert "those that run here belong to other users" in str(refused)
        with pytest.raises(TimeoutError):
            trap.accept()


@needs_root
def test_auto_is_ones_own_cluster_that_started_last(raylets: list[subprocess.Popen]) -> None:
    def find() -> object:
        return act_as(VICTIM, ray_access.find_own_cluster)

    raylets.append(start_raylet(VICTIM, "10.0.0.1:1"))
    assert find() == "10.0.0.1:1"
    raylets.append(start_raylet(VICTIM, "10.0.0.2:1"))
    assert find() == "10.0.0.2:1"
    raylets.append(start_raylet(VICTIM, "10.0.0.3:1", f"--temp_dir=/tmp/raysweep-{VICTIM}/ray"))
    raylets.append(start_raylet(ATTACKER, "10.0.0.4:1"))
    assert find() == "10.0.0.2:1", "the last one is of one command, or of another user"


@pytest.mark.parametrize(
    ("value", "file_mode", "folder_mode"),
    [("", "0600", "0700"), ("027", "0640", "0750"), ("0007", "0660", "0770")],
)
def test_files_are_private_unless_they_are_shared_on_purpose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, file_mode: str, folder_mode: str
) -> None:
    monkeypatch.setenv(UMASK_VARIABLE, value)
    previous = os.umask(0o022)
    try:
        with private_files():
            (tmp_path / "folder").mkdir()
            (tmp_path / "file").touch()
        assert os.umask(0o022) == 0o022, "the caller has its own umask again"
    finally:
        os.umask(previous)
    assert mode_of(tmp_path / "file") == file_mode
    assert mode_of(tmp_path / "folder") == folder_mode


@pytest.mark.parametrize("value", ["8", "rw", "1777", "-7", "0x7"])
def test_a_umask_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(UMASK_VARIABLE, value)
    with pytest.raises(SpecError, match=f"RAYSWEEP_UMASK='{value}': expected an octal number"):
        read_umask()
