"""Users without a home, without an entry in passwd, and with a home that they cannot write."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from acting_users import act_as, needs_root

from raysweep import user_folders
from raysweep.errors import InfrastructureError, SpecError

# No entry in passwd has it.
NOBODY = 64321
VARIABLES = ("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TMPDIR")


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files that all users may write, and no variable that names others."""
    folder = Path(tempfile.mkdtemp(prefix="users-", dir="/tmp"))
    folder.chmod(0o1777)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder)


def act(home: str | None, action: Callable[[], object]) -> object:
    """Act as a user that has no entry in passwd, with this HOME."""

    def act_in_home() -> object:
        if home is not None:
            os.environ["HOME"] = home
        return action()

    return act_as(NOBODY, act_in_home)


def provide() -> tuple[str | None, str | None]:
    user_folders.provide_library_folders()
    return os.environ.get("HOME"), os.environ.get("MPLCONFIGDIR")


@needs_root
def test_a_user_without_a_home(temporary: Path) -> None:
    private = temporary / f"raysweep-{NOBODY}"
    assert act(None, user_folders.find_home) is None
    assert act(None, lambda: user_folders.find_cache_folder("x")) == private / "x"
    assert act(None, provide) == (str(private), None), "Ray cannot be imported without a home"
    status = private.stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (NOBODY, 0o700)
    error = act(None, lambda: user_folders.expand_home("~/x"))
    assert isinstance(error, SpecError)
    assert str(error) == "~/x: you have no home folder; set HOME"


@needs_root
@pytest.mark.parametrize(
    "kind", ["root of the disk", "somebody else's", "closed to others", "missing", "read-only"]
)
def test_a_home_that_cannot_be_written(kind: str, temporary: Path) -> None:
    homes = {
        "root of the disk": Path("/"),
        "somebody else's": temporary / "theirs",
        "closed to others": temporary / "closed",
        "missing": Path("/no/home"),
        "read-only": temporary / "home",
    }
    home = homes[kind]
    for name, mode in (("theirs", 0o755), ("closed", 0o700), ("home", 0o755)):
        (temporary / name).mkdir()
        (temporary / name).chmod(mode)
    os.chown(temporary / "home", NOBODY, NOBODY)
    if kind == "read-only":
        # What ProtectHome=read-only of systemd does.
        commands = (["mount", "--bind", home, home], ["mount", "-o", "remount,ro,bind", home])
        if any(subprocess.run(command, check=False).returncode for command in commands):
            pytest.skip("nothing can be mounted here")
    private = temporary / f"raysweep-{NOBODY}"
    try:
        assert act(str(home), user_folders.find_home) == home
        assert act(str(home), lambda: user_folders.find_cache_folder("x")) == private / "x"
        assert act(str(home), provide) == (str(home), str(private / "matplotlib"))
        assert act(str(home), lambda: user_folders.expand_home("~/x")) == home / "x"
    finally:
        if kind == "read-only":
            subprocess.run(["umount", "--lazy", home], check=True)


@needs_root
def test_a_home_of_ones_own_is_used(temporary: Path) -> None:
    home = temporary / "home"
    home.mkdir(mode=0o700)
    os.chown(home, NOBODY, NOBODY)
    assert act(str(home), lambda: user_folders.find_cache_folder("x")) == home / ".cache" / "x"
    assert act(str(home), provide) == (str(home), None)
    assert not list(home.iterdir()), "nothing is made before something is written"


@needs_root
def test_a_private_folder_of_somebody_else_is_not_entered(temporary: Path) -> None:
    taken = temporary / f"raysweep-{NOBODY}"
    taken.mkdir(mode=0o777)
    folder = act(None, user_folders.create_private_folder)
    assert isinstance(folder, Path)
    try:
        assert folder != taken and folder.stat().st_uid == NOBODY
        assert not list(taken.iterdir())
    finally:
        folder.rmdir()


def test_homes_that_do_not_exist_are_one_line(temporary: Path) -> None:
    with pytest.raises(SpecError, match=r"^~nosuch/x: there is no user 'nosuch'$"):
        user_folders.expand_home("~nosuch/x")
    assert user_folders.expand_home("a~b") == Path("a~b")


@needs_root
def test_no_folder_for_temporary_files_is_one_line(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/")
    error = act(None, user_folders.create_private_folder)
    assert isinstance(error, InfrastructureError)
    assert str(error) == (
        f"/raysweep-{NOBODY}: cannot be created for private temporary files: Permission denied; "
        "set TMPDIR to a folder that you can write"
    )


def test_sockets_fit_into_the_temporary_folder_of_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two levels below it lie the sockets of Python: 32 more characters, of at most 107."""
    from raysweep.sweep.ray_access import short_temporary_folder

    for length, is_replaced in ((75, sys.platform != "linux"), (76, True)):
        folder = "/tmp/" + "x" * (length - 5)
        monkeypatch.setattr("tempfile.tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        with short_temporary_folder(tmp_path):
            assert os.environ["TMPDIR"] == (str(tmp_path) if is_replaced else folder)
        assert os.environ["TMPDIR"] == folder
    monkeypatch.delenv("TMPDIR")
    with short_temporary_folder(tmp_path):
        assert os.environ["TMPDIR"] == str(tmp_path)
    assert "TMPDIR" not in os.environ
