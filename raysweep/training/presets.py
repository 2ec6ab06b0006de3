"""Named settings: one training run of the papers each, as YAML of a method and {dotted path:
value}.

`extends: NAME` starts from another preset: the rest of the file is what differs.
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


def load_preset(name: str) -> PresetContent:
    """Method (a name, or one written out) and settings, as `run_config` takes them. SpecError for
    an unknown name.
    """
    path = find_builtin_folder("pipelines") / "presets" / f"{name}.yaml"
    if name not in list_presets():
        raise SpecError(describe_unknown_name("preset", name, list_presets()))
    settings = _apply_extends(read_yaml(path))
    if "method" not in settings:
        raise SpecError(f"{path}: method is missing")
    return settings.pop("method"), settings


def resolve_training_config(source: str, overrides: Mapping[str, Any]) -> TrainingConfig:
    """The run that a method, a preset or a YAML file ({method or extends: ..., dotted path: value})
    stands for.
    """
    if source.endswith((".yaml", ".yml")):
        settings = _apply_extends(read_yaml(Path(source)))
        return build_training_config(settings.pop("method", "at"), settings, overrides)
    if source in METHODS:
        return build_training_config(source, overrides)
    if source in list_presets():
        method, settings = load_preset(source)
        return build_training_config(method, settings, overrides)
    raise SpecError(describe_unknown_name("method or preset", source, [*METHODS, *list_presets()]))


def _apply_extends(content: JsonDict) -> JsonDict:
    """The settings over those of the preset that they extend, if they do."""
    if "extends" not in content:
        return content
    method, base = load_preset(str(content.pop("extends")))
    return {"method": method, **base, **content}


def list_presets() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(
        path.stem for path in (find_builtin_folder("pipelines") / "presets").glob("*.yaml")
    )
