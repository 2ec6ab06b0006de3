"""Named settings: one training run of the papers each, as YAML of a method and {dotted path: value}."""

from typing import Any

from raysweep.spec import SpecError, read_yaml, shipped, unknown_name

Preset = tuple[str | dict[str, Any], dict[str, Any]]


def preset(name: str) -> Preset:
    """Method (a name, or one written out) and settings, as `run_config` takes them. SpecError for an unknown name."""
    path = shipped("pipelines") / "presets" / f"{name}.yaml"
    if name not in presets():
        raise SpecError(unknown_name("preset", name, presets()))
    settings = read_yaml(path)
    if "method" not in settings:
        raise SpecError(f"{path}: method is missing")
    return settings.pop("method"), settings


def presets() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(path.stem for path in (shipped("pipelines") / "presets").glob("*.yaml"))
