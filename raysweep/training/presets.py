"""Presets: YAML files with the settings of the papers' training runs.

A file has a `method`, and settings as `dotted.path: value`. With `extends: NAME` it inherits the
method and settings of another preset, and may override them. `protocols: {NAME: settings}` are
further settings that take effect with `protocol: NAME`: `paper` chooses the best epoch as the paper
does, on the test images.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysweep.catalog import METHODS
from raysweep.spec import (
    JsonDict,
    SpecError,
    describe_unknown_name,
    find_builtin_folder,
    read_yaml,
)
from raysweep.training.config import TrainingConfig, build_training_config

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
    content = _apply_extends(read_yaml(path))
    if "method" not in content:
        raise SpecError(f"{path}: method is missing")
    return content


def _choose_protocol(content: JsonDict, protocol: str | None) -> JsonDict:
    """Return the settings in the content of a file, with those of one of its protocols."""
    settings = dict(content)
    protocols = settings.pop("protocols", {})
    protocol = protocol or settings.pop("protocol", None)
    settings.pop("protocol", None)
    if protocol is None:
        return settings
    if protocol not in protocols:
        raise SpecError(describe_unknown_name("protocol", protocol, list(protocols)))
    return {**settings, **protocols[protocol]}


def resolve_training_config(source: str, overrides: Mapping[str, Any]) -> TrainingConfig:
    """Build a config from a method, a preset or a YAML file.

    Args:
        source: Name of a method or preset, or path of a YAML file with the content of a preset.
        overrides: Dotted path -> value; they override the settings of `source`. `protocol` is the
            name of one of its protocols.

    Returns:
        The config.

    Raises:
        SpecError: The name is unknown, or settings are wrong; one line for each problem.
    """
    overrides = dict(overrides)
    protocol = overrides.pop("protocol", None)
    if source.endswith((".yaml", ".yml")):
        content = _apply_extends(read_yaml(Path(source)))
        method = content.pop("method", "at")
        return build_training_config(method, _choose_protocol(content, protocol), overrides)
    if source in METHODS:
        return build_training_config(source, _choose_protocol({}, protocol), overrides)
    if source in list_presets():
        method, settings = load_preset(source, protocol)
        return build_training_config(method, settings, overrides)
    raise SpecError(describe_unknown_name("method or preset", source, [*METHODS, *list_presets()]))


def _apply_extends(content: JsonDict) -> JsonDict:
    """Merge a file's settings into those of the preset that it extends, if any."""
    if "extends" not in content:
        return content
    return {**_read_preset(str(content.pop("extends"))), **content}


def list_presets() -> list[str]:
    """Return the names of all presets, sorted."""
    return sorted(path.stem for path in _presets_folder().glob("*.yaml"))


def _presets_folder() -> Path:
    """Return the folder of the presets that come with raysweep."""
    return find_builtin_folder("pipelines") / "presets"
