"""The built-in pipelines, by name."""

from pathlib import Path

from raysweep.spec import SpecError, describe_unknown_name, find_builtin_folder
from raysweep.yaml_files import read_yaml


def list_builtin_pipelines() -> list[str]:
    """Return the names of the built-in pipelines."""
    return sorted(path.stem for path in find_builtin_folder("pipelines").glob("*.yaml"))


def describe_builtin_pipelines() -> dict[str, str]:
    """Return the description of each built-in pipeline, by name."""
    folder = find_builtin_folder("pipelines")
    return {
        name: str(read_yaml(folder / f"{name}.yaml").get("about", ""))
        for name in list_builtin_pipelines()
    }


def find_pipeline_file(name_or_file: str) -> Path:
    """Find the file of a pipeline.

    Args:
        name_or_file: Name of a built-in pipeline, or path of a YAML file, which may not exist.

    Returns:
        Path of the YAML file.

    Raises:
        SpecError: If there is no built-in pipeline of this name.
    """
    if name_or_file.endswith((".yaml", ".yml")):
        return Path(name_or_file)
    path = find_builtin_folder("pipelines") / f"{name_or_file}.yaml"
    if not path.is_file():
        raise SpecError(describe_unknown_name("pipeline", name_or_file, list_builtin_pipelines()))
    return path
