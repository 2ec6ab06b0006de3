"""One module for each command: `run(args) -> exit code`, and what several of them share."""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

from raysweep.spec import SpecError, parse_yaml


def settings(args: Namespace) -> dict[str, Any]:
    """`--set` and `--data-dir` as {dotted path: value}; values are read as YAML. Raises SpecError for a missing `=`."""
    changes: dict[str, Any] = {}
    for item in args.set:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise SpecError(f"--set {item!r}: expected PATH=VALUE, for example --set epochs=20")
        try:
            changes[path] = parse_yaml(text)
        except yaml.YAMLError:
            raise SpecError(f"--set {item!r}: {text!r} is not a YAML value") from None
    if args.data_dir is not None:
        changes["data.data_dir"] = str(args.data_dir.expanduser().resolve())
    return changes


def writable(folder: Path) -> Path:
    """`folder`, made if need be. Raises SpecError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"--out {folder}: cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise SpecError(f"--out {folder}: cannot be written")
    return folder.resolve()


def plain_name(name: str, option: str) -> str:
    """A name that is a folder's name and nothing more."""
    if not name or name.startswith(".") or not all(c.isalnum() or c in "._-" for c in name):
        raise SpecError(f"{option} {name!r}: use letters, digits, '-', '_' and '.', not starting with '.'")
    return name


def ui_command(uri: str) -> str:
    """What to type to look at an MLflow store."""
    if uri == f"sqlite:///{(Path() / 'mlflow.db').resolve()}":
        return "mlflow ui"
    return f"mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite") else f"open {uri}"
