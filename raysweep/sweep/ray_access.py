"""Keep other users of a machine away from Ray: its token, its folder, and `--address auto`."""

import logging
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from raysweep.errors import InfrastructureError
from raysweep.file_privacy import make_folder_private, read_private_file, write_new_private_file
from raysweep.sweep.ray_environment import set_environment
from raysweep.user_folders import (
    can_create,
    create_private_folder,
    find_home,
    find_temporary_folder,
    private_folder_name,
)

logger = logging.getLogger(__name__)

_TOKEN_BYTES = 32
# Bytes that the path of a Unix socket may have.
_MAX_SOCKET_PATH = 107 if sys.platform == "linux" else 103
# What Ray adds to its folder: date, time, microseconds and process of the driver.
_LONGEST_SOCKET = "/session_2026-11-29_20-26-49_720904_4194304/sockets/plasma_store"
# What Python adds to the folder for temporary files in processes that start others, such as Ray's
# dashboard.
_LONGEST_PYTHON_SOCKET = "/pymp-12345678/listener-12345678"
_RAY_FOLDER = "ray"


def find_token_path() -> Path | None:
    """Return the file with the token of Ray's clusters.

    Returns:
        `RAY_AUTH_TOKEN_PATH`, or `~/.ray/auth_token`; None if the token is in the environment, or
        this user has no home folder that holds one or can be written.
    """
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return Path(path)
    home = find_home()
    if home is None:
        return None
    token = home / ".ray" / "auth_token"
    return token if token.exists() or can_create(token) else None


@contextmanager
def token_without_home() -> Iterator[None]:
    """Context manager that has the token of Ray's clusters elsewhere if it cannot be in the home.

    `RAY_AUTH_TOKEN_PATH` then names a file in a private temporary folder, for this process and
    those that it starts.

    Raises:
        InfrastructureError: There is no such folder.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or find_token_path() is not None:
        yield
        return
    path = create_private_folder() / "auth_token"
    logger.info("no home folder can be written: the token of Ray's clusters is %s", path)
    with set_environment({"RAY_AUTH_TOKEN_PATH": str(path)}):
        _secure_token(path)
        yield


def find_token_exposure() -> str:
    """Describe who else can read or replace the file with the token of Ray's clusters.

    Returns:
        A sentence such as `~/.ray/auth_token can be read by other users (mode 0644)`; "" if only
        its owner can read and replace it, or there is none. A file that `RAY_AUTH_TOKEN_PATH`
        names is not looked at: containers mount secrets with other modes.
    """
    path = find_token_path()
    if path is None or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return ""
    try:
        file_status, folder_status = path.stat(), path.parent.stat()
    except OSError:
        return ""
    if file_status.st_uid != os.geteuid():
        return f"{path} belongs to user {file_status.st_uid}"
    if file_status.st_mode & 0o077:
        return f"{path} can be read by other users (mode {stat.S_IMODE(file_status.st_mode):04o})"
    if folder_status.st_mode & 0o022:
        mode = stat.S_IMODE(folder_status.st_mode)
        return f"{path} can be replaced by other users (mode {mode:04o} of its folder)"
    return ""


def secure_token_file() -> None:
    """Create the token of Ray's clusters if there is none, and make it private.

    The file has mode 0600 in a folder of mode 0700. Ray itself would create it with the umask.

    Raises:
        InfrastructureError: If the file or its folder belongs to somebody else, or cannot be made
            private. One line.
    """
    path = find_token_path()
    uses_token = os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"
    if path is None or "RAY_AUTH_TOKEN_PATH" in os.environ or not uses_token:
        return
    _secure_token(path)


def _secure_token(path: Path) -> None:
    """Create a token if there is none, and make it private."""
    try:
        make_folder_private(path.parent)
        if not _make_token_private(path):
            write_new_private_file(path, secrets.token_hex(_TOKEN_BYTES).encode())
    except OSError as error:
        raise InfrastructureError(
            f"{path}: the token of Ray's clusters cannot be kept private: "
            f"{error.strerror or error}; set RAY_AUTH_TOKEN_PATH to a file that only you can read"
        ) from error


def _make_token_private(path: Path) -> bool:
    """Give the token file mode 0600; return False if there is none. An empty one is deleted."""
    token = read_private_file(path)
    if token is None:
        return False
    if token.exposed_mode:
        logger.warning(
            "other users could read %s (mode %04o); it is private now. Whoever has read the "
            "token can still use it: stop your Ray clusters, delete the file, and start again",
            path,
            token.exposed_mode,
            extra={"is_shown_elsewhere": True},
        )
    if not token.content:
        path.unlink(missing_ok=True)
    return bool(token.content)


def create_private_ray_folder() -> Path:
    """Create the folder for the sockets and logs of Ray clusters on this machine.

    Ray gives its folders mode 0777, whatever the umask. Nobody else can enter the folder around
    them.

    Returns:
        `raysweep-UID/ray`, where `raysweep-UID` has mode 0700. It is in `RAY_TMPDIR` or the folder
        for temporary files; in /tmp if that path is too long for sockets. A new folder in /tmp
        takes its place if `raysweep-UID` is somebody else's.

    Raises:
        InfrastructureError: If no folder can be created.
    """
    name = private_folder_name()
    parent = Path(os.environ.get("RAY_TMPDIR") or find_temporary_folder())
    longest_path = f"{parent}/{name}/{_RAY_FOLDER}{_LONGEST_SOCKET}"
    if len(os.fsencode(longest_path)) > _MAX_SOCKET_PATH:
        logger.info("%s is too long for the paths of Ray's sockets: they are in /tmp", parent)
        parent = Path("/tmp")
    return create_private_folder(parent) / _RAY_FOLDER


@contextmanager
def short_temporary_folder(folder: Path) -> Iterator[None]:
    """Context manager that gives processes another folder for temporary files, if theirs has a path
    that is too long for sockets.

    Ray's dashboard would fail in it, and the start of Ray wait for the dashboard for a minute.

    Args:
        folder: The other folder, a private one.
    """
    longest_path = f"{find_temporary_folder()}{_LONGEST_PYTHON_SOCKET}"
    if len(os.fsencode(longest_path)) <= _MAX_SOCKET_PATH:
        yield
        return
    with set_environment({"TMPDIR": str(folder)}):
        yield


def find_own_cluster() -> str:
    """Find the Ray cluster of this machine that `--address auto` means.

    Ray itself would follow a file that anybody can write, and processes of any user.

    Returns:
        `host:port` of the cluster of this user or root whose process on this machine started last;
        one that raysweep started for a single command comes after all others.

    Raises:
        InfrastructureError: If there is none.
    """
    trusted_users = {os.geteuid(), 0}
    candidates, has_foreign = [], False
    for started_at, user_ids, arguments in _iter_raylets():
        address = arguments.get("gcs-address", "")
        if not address:
            continue
        if not set(user_ids) <= trusted_users:
            has_foreign = True
            continue
        is_private = f"/{private_folder_name()}" in arguments.get("temp-dir", "")
        candidates.append((not is_private, started_at, address))
    if candidates:
        return max(candidates)[2]
    hint = "; those that run here belong to other users" if has_foreign else ""
    raise InfrastructureError(
        f"no Ray cluster at --address auto: none of yours runs on this machine{hint}; "
        "start one with `ray start --head`, or give --address host:port"
    )


def _iter_raylets() -> Iterator[tuple[float, tuple[int, int], dict[str, str]]]:
    """Yield start time, real and effective user, and `--name=value` arguments of Ray's nodes."""
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if not command or Path(command[0]).name != "raylet":
                continue
            user_ids = process.uids()
            started_at = process.create_time()
        except psutil.Error:
            continue
        arguments = {}
        for argument in command[1:]:
            name, _, value = argument.removeprefix("--").partition("=")
            arguments[name.replace("_", "-")] = value
        yield started_at, (user_ids.real, user_ids.effective), arguments
