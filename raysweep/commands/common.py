"""Functions that several commands share: read overrides, find folders, open MLflow.

Command modules import this inside functions, because it imports pydantic and YAML.
"""

import importlib.util
import logging
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from raysweep.code_files import CodeFile, list_code_functions
from raysweep.errors import InfrastructureError
from raysweep.formatting import shorten_value
from raysweep.models import ModelSpec
from raysweep.redaction import redact_secrets
from raysweep.spec import SpecError, is_safe_name
from raysweep.stores import StorePath, open_path, require_conditional_writes, require_reachable
from raysweep.tracking import NullTracker, Tracker, tracking_uri
from raysweep.yaml_files import check_key, parse_yaml

logger = logging.getLogger(__name__)

# Folders in `runs` that hold neither a sweep nor a training run.
_RESERVED_NAMES = ("pipelines", "eval", "from-mlflow", "comparisons")


def parse_overrides(
    assignments: Sequence[str], data_dir: Path | None, code: CodeFile | None = None
) -> dict[str, Any]:
    """Read `--set` and `--data-dir`.

    Args:
        assignments: The values of `--set`, each `PATH=VALUE` with a value in YAML.
        data_dir: The value of `--data-dir`; it overrides `--set data.data_dir=`.
        code: The file of `--code`, whose SHA-256 becomes `model.code`.

    Returns:
        {dotted path: value}.

    Raises:
        SpecError: An assignment has no path or no `=`, or its value is not YAML.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        source = f"--set {shorten_value(assignment)}"
        if not equals or not path:
            raise SpecError(f"{source}: expected PATH=VALUE, for example --set epochs=20")
        check_key(path)
        overrides[path] = parse_yaml(text, source)
    if data_dir is not None:
        overrides["data.data_dir"] = str(data_dir.resolve())
    if code is not None:
        overrides["model.code"] = code.sha256
    return overrides


def check_code(code: CodeFile | None, networks: Iterable[ModelSpec]) -> None:
    """Check, before anything starts, that `--code` has the networks, and that one needs it.

    Args:
        code: The file of `--code`; or None.
        networks: All networks that the command may train.

    Raises:
        SpecError: A network is a function of a file that was not given, or that has no such
            function; or `--code` was given and no network needs it.
    """
    networks = list(networks)
    for network in networks:
        network.find_factory()
    if code is not None and all(network.code is None for network in networks):
        names = ", ".join(list_code_functions(code)) or "none"
        trained = ", ".join(dict.fromkeys(network.name for network in networks)) or "none"
        raise SpecError(
            f"--code {code.path}: has no effect: model.name = {trained} is a network of raysweep; "
            f"set model.name to a function of the file: {names}"
        )


def parse_data_overrides(
    assignments: Sequence[str],
    data_dir: Path | None,
    command_label: str,
    other_settings: Sequence[str] = (),
) -> dict[str, Any]:
    """Read `--set data.*` and `--data-dir` for a command that uses few other settings.

    Args:
        assignments: The values of `--set`.
        data_dir: The value of `--data-dir`.
        command_label: What error messages call the command, such as "an evaluation".
        other_settings: Settings outside `data` that the command reads itself; they are left out.

    Returns:
        {path below `data`: value}.

    Raises:
        SpecError: An assignment is malformed or changes another setting outside `data`.
    """
    overrides = parse_overrides(assignments, data_dir)
    data_paths = [path for path in overrides if path.startswith("data.")]
    unused_paths = [path for path in overrides if path not in (*data_paths, *other_settings)]
    suffix = "".join(f", and {name}" for name in other_settings)
    if unused_paths:
        raise SpecError(
            [
                f"--set {path}: only data.* settings matter to {command_label}{suffix}"
                for path in unused_paths
            ]
        )
    return {path.removeprefix("data."): overrides[path] for path in data_paths}


def make_writable_folder(folder: Path, option: str = "--out") -> Path:
    """Create a folder if it does not exist, and check that files can be written there.

    Args:
        folder: The folder.
        option: The option that names it, for error messages.

    Returns:
        Its absolute path.

    Raises:
        SpecError: The path is a file, leads through one, or is none for MLflow's database.
        InfrastructureError: The folder cannot be created or written.
    """
    if option == "--out":
        # Before the folder is made: MLflow must be able to have its database there.
        tracking_uri(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise SpecError(f"{option} {folder}: cannot be made: {error.strerror}") from error
    except OSError as error:
        raise InfrastructureError(f"{option} {folder}: cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise InfrastructureError(f"{option} {folder}: cannot be written")
    return folder.resolve()


def resolve_runs_folder(
    out: Path, storage_location: str | None, for_writing: bool = True
) -> StorePath:
    """Return the folder of all sweeps and training runs.

    Args:
        out: The value of `--out`; its folder `runs` is used if there is no `--storage`.
        storage_location: The value of `--storage`: a folder or the URI of a bucket.
        for_writing: Whether to create the folder of `--storage`, and to check that a bucket has
            conditional writes.

    Raises:
        SpecError: The location is malformed.
        InfrastructureError: The folder cannot be written, or the bucket does not answer, refuses
            access or ignores conditions.
    """
    if storage_location is None:
        return open_path(out / "runs")
    folder = open_path(storage_location)
    require_reachable(folder)
    if for_writing:
        if folder.local_path is not None:
            make_writable_folder(folder.local_path, "--storage")
        require_conditional_writes(folder)
    return folder


def format_location_flags(out: Path, storage_location: str | None) -> str:
    """Return the flags `--out` and `--storage` of a suggested command, a space before each word.

    Args:
        out: The value of `--out`; the default is left out.
        storage_location: The value of `--storage`.
    """
    words: list[str] = []
    if out != Path():
        words += ["--out", str(out)]
    if storage_location:
        words += ["--storage", storage_location]
    return "".join(f" {shlex.quote(word)}" for word in words)


def check_plain_name(name: str, option: str) -> str:
    """Return the name of a sweep or run if it is a valid folder name.

    Args:
        name: The name, as the user typed it.
        option: The option that gave it, for error messages.

    Raises:
        SpecError: The name is reserved, or could leave the folder of all runs.
    """
    if name in _RESERVED_NAMES:
        raise SpecError(f"{option} {name!r}: raysweep uses this folder itself; choose another name")
    if not is_safe_name(name):
        raise SpecError(
            f"{option} {name!r}: use letters, digits, '-', '_' and '.', not starting with '.'"
        )
    return name


def print_warnings(lines: Iterable[str]) -> None:
    """Log each warning; the terminal shows `raysweep: warning: LINE`, unless it was told not to."""
    for line in lines:
        logger.warning("%s", line)


def open_tracker(out: Path) -> Tracker:
    """Open the MLflow store of `out`.

    Returns:
        The tracker; if MLflow is not installed, a warning is printed and the tracker does nothing.

    Raises:
        InfrastructureError: The store does not answer.
    """
    if importlib.util.find_spec("mlflow") is None:
        print_warnings(["MLflow is not installed, nothing is tracked: pip install mlflow"])
        return NullTracker()
    return Tracker(tracking_uri(out), out / "mlruns").wait_until_ready()


def format_ui_command(tracking_uri: str) -> str:
    """Return the shell command that shows an MLflow store, without any password.

    Args:
        tracking_uri: URI of a database or server.
    """
    if tracking_uri == f"sqlite:///{(Path() / 'mlflow.db').resolve()}":
        return "mlflow ui"
    is_public = tracking_uri.startswith(("http", "sqlite")) and (
        redact_secrets(tracking_uri) == tracking_uri
    )
    # A URI with a password comes from this variable only.
    store = shlex.quote(tracking_uri) if is_public else '"$MLFLOW_TRACKING_URI"'
    if tracking_uri.startswith("http"):
        return f"open {store}"
    return f"mlflow ui --backend-store-uri {store}"
