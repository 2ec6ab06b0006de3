"""Presets: YAML files with the settings of the papers' training runs.

A file has a `method`, and settings as `dotted.path: value`. With `extends: NAME` it inherits the
method and settings of another preset, and may override them. `protocols: {NAME: settings}` are
further settings that take effect with `protocol: NAME`: `paper` chooses the best epoch as the paper
does, on the test images. `notes` says of settings, by dotted path, that the paper does not give
them or has others.
"""

import copy
import functools
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from raysweep.catalog import METHODS
from raysweep.formatting import shorten_value
from raysweep.spec import (
    JsonDict,
    SpecError,
    describe_unknown_name,
    find_builtin_folder,
    merge_overrides,
)
from raysweep.training.config import (
    TrainingConfig,
    build_training_config,
    build_training_config_of_0_1,
)
from raysweep.yaml_files import SettingsFile, read_yaml

_NOTES_KEY = "notes"
PresetContent = tuple[str | dict[str, Any], dict[str, Any]]
"""Method (its name, or its settings as a mapping), and dotted path -> value of other settings."""


def load_preset(name: str, protocol: str | None = None) -> PresetContent:
    """Read a preset.

    Args:
        name: Name of the preset, as `raysweep list` prints it.
        protocol: Name of one of its protocols; None for that of raysweep.

    Returns:
        Method and settings, the arguments of `build_training_config`.

    Raises:
        SpecError: There is no such preset or protocol; the message suggests similar names.
    """
    content = _read_preset(name)
    return content.pop("method"), _choose_protocol(content, protocol)


def _read_preset(name: str) -> JsonDict:
    """Return the content of a preset, with that of the presets that it extends."""
    if name not in list_presets():
        raise SpecError(describe_unknown_name("preset", name, list_presets()))
    path = _presets_folder() / f"{name}.yaml"
    content = _read_preset_file(path)
    if "method" not in content:
        raise SpecError(f"{path}: method is missing")
    return content


@functools.cache
def _read_yaml_version(path: Path, modified_at: int) -> SettingsFile:
    """Read a file as of a time of modification. Callers must not change the result.

    A pipeline of a paper asks for some presets a hundred times.
    """
    return read_yaml(path)


def _choose_protocol(content: JsonDict, protocol: str | None) -> JsonDict:
    """Return the settings in the content of a file, with those of one of its protocols."""
    settings = dict(content)
    settings.pop(_NOTES_KEY, None)
    protocols = settings.pop("protocols", {})
    protocol = protocol or settings.pop("protocol", None)
    settings.pop("protocol", None)
    if protocol is None:
        return settings
    if not isinstance(protocols, dict) or not all(isinstance(p, dict) for p in protocols.values()):
        raise SpecError(f"protocols = {shorten_value(protocols)}: must be mappings by their names")
    if not isinstance(protocol, str) or protocol not in protocols:
        raise SpecError(describe_unknown_name("protocol", protocol, list(protocols)))
    return merge_overrides(settings, protocols[protocol])


def load_preset_notes(name: str, overridden_paths: Collection[str] = ()) -> dict[str, str]:
    """Read what a preset says about settings that its paper does not give, or gives otherwise.

    Args:
        name: Name of a preset, or path of a YAML file with the content of one.
        overridden_paths: Dotted paths, with or without `*`, that the run sets itself: notes on
            them are left out.

    Returns:
        Sentence by the dotted path of the setting. A file that sets a path of the preset that it
        extends drops the note on it.

    Raises:
        SpecError: There is no such preset or file.
    """
    is_file = name.endswith((".yaml", ".yml"))
    content = _read_preset_file(Path(name)) if is_file else _read_preset(name)
    notes = content.get(_NOTES_KEY, {})
    return {
        path: note
        for path, note in notes.items()
        if not any(fnmatchcase(path, pattern) for pattern in overridden_paths)
    }


def resolve_training_config(
    source: str, overrides: Mapping[str, Any], *, as_in_0_1: bool = False
) -> TrainingConfig:
    """Build a config from a method, a preset or a YAML file.

    Args:
        source: Name of a method or preset, or path of a YAML file with the content of a preset.
        overrides: Dotted path -> value; they override the settings of `source`. `protocol` is the
            name of one of its protocols.
        as_in_0_1: Whether the defaults of the data set apply as in 0.1, for runs that it began.

    Returns:
        The config.

    Raises:
        SpecError: The name is unknown, or settings are wrong; one line for each problem.
    """
    if source.endswith((".yaml", ".yml")):
        path = Path(source)
        with _read_current_yaml(path).name_lines_in_errors(overrides):
            content = _read_preset_file(path)
            method = content.pop("method", "at")
            return _build_config(method, content, overrides, as_in_0_1)
    if source in list_presets():
        content = _read_preset(source)
        return _build_config(content.pop("method"), content, overrides, as_in_0_1)
    if source not in METHODS:
        known = [*METHODS, *list_presets()]
        raise SpecError(describe_unknown_name("method or preset", source, known))
    return _build_config(source, {}, overrides, as_in_0_1)


def _build_config(
    method: Any, content: JsonDict, overrides: Mapping[str, Any], as_in_0_1: bool
) -> TrainingConfig:
    """Build a config from a method, the other content of a preset, and overrides."""
    overrides = dict(overrides)
    protocol = overrides.pop("protocol", None)
    build = build_training_config_of_0_1 if as_in_0_1 else build_training_config
    config = build(method, _choose_protocol(content, protocol), overrides)
    if problem := config.validation.find_threat_problem():
        raise SpecError(problem)
    return config


def _read_current_yaml(path: Path) -> SettingsFile:
    """Read a file unless this process has read its present version."""
    try:
        modified_at = path.stat().st_mtime_ns
    except (OSError, ValueError):
        # It gets an error when it is read.
        modified_at = 0
    return _read_yaml_version(path, modified_at)


def _read_preset_file(path: Path) -> JsonDict:
    """Return the content of a file, merged into that of the preset that it extends."""
    content = copy.deepcopy(dict(_read_current_yaml(path)))
    if "terms" in content:
        raise SpecError(f"{path}: describes a method: write its lines indented below `method:`")
    if "space" in content:
        raise SpecError(f"{path}: is a search space: `raysweep tune --space {path}` runs it")
    if "stages" in content:
        raise SpecError(f"{path}: is a pipeline: `raysweep run {path}` runs it")
    notes = content.get(_NOTES_KEY, {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise SpecError(f"{path}: {_NOTES_KEY} = {notes!r}: must be a mapping from paths to text")
    if "extends" not in content:
        return content
    inherited = _read_preset(str(content.pop("extends")))
    inherited_notes = {
        setting: note
        for setting, note in inherited.get(_NOTES_KEY, {}).items()
        if setting not in content
    }
    merged = merge_overrides(inherited, content)
    return {**merged, _NOTES_KEY: {**inherited_notes, **notes}}


def list_presets() -> list[str]:
    """Return the names of all presets, sorted."""
    folder = _presets_folder()
    return list(_list_presets_in(folder, folder.stat().st_mtime_ns))


@functools.cache
def _list_presets_in(folder: Path, modified_at: int) -> tuple[str, ...]:
    """List the presets of a folder as of a time of modification."""
    return tuple(sorted(path.stem for path in folder.glob("*.yaml")))


def _presets_folder() -> Path:
    """Return the folder of the presets that come with raysweep."""
    return find_builtin_folder("pipelines") / "presets"
