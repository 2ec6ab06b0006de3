"""Named settings: one training run of the papers each, as YAML of a method and {dotted path: value}.

`extends: NAME` starts from another preset: the rest of the file is what differs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysweep.catalog import METHODS
from raysweep.spec import Json, SpecError, read_yaml, shipped, unknown_name
from raysweep.training.config import RunConfig, run_config

Preset = tuple[str | dict[str, Any], dict[str, Any]]


def preset(name: str) -> Preset:
    """Method (a name, or one written out) and settings, as `run_config` takes them. SpecError for an unknown name."""
    path = shipped("pipelines") / "presets" / f"{name}.yaml"
    if name not in presets():
        raise SpecError(unknown_name("preset", name, presets()))
    settings = _extended(read_yaml(path))
    if "method" not in settings:
        raise SpecError(f"{path}: method is missing")
    return settings.pop("method"), settings


def resolve(what: str, changes: Mapping[str, Any]) -> RunConfig:
    """The run that a method, a preset or a YAML file ({method or extends: ..., dotted path: value}) stands for."""
    if what.endswith((".yaml", ".yml")):
        settings = _extended(read_yaml(Path(what)))
        return run_config(settings.pop("method", "at"), settings, changes)
    if what in METHODS:
        return run_config(what, changes)
    if what in presets():
        method, settings = preset(what)
        return run_config(method, settings, changes)
    raise SpecError(unknown_name("method or preset", what, [*METHODS, *presets()]))


def _extended(settings: Json) -> Json:
    """The settings over those of the preset that they extend, if they do."""
    if "extends" not in settings:
        return settings
    method, base = preset(str(settings.pop("extends")))
    return {"method": method, **base, **settings}


def presets() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(path.stem for path in (shipped("pipelines") / "presets").glob("*.yaml"))
