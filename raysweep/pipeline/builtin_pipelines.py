"""The pipelines that ship with raysweep, by name."""

from pathlib import Path

from raysweep.spec import SpecError, describe_unknown_name, find_builtin_folder, read_yaml


def list_builtin_pipelines() -> dict[str, str]:
    """Names, and what each is about."""
    return {
        path.stem: str(read_yaml(path).get("about", ""))
        for path in sorted(find_builtin_folder("pipelines").glob("*.yaml"))
    }


def find_pipeline_file(name_or_file: str) -> Path:
    """The file of a pipeline given by name or as a file. Raises SpecError for an unknown name."""
    if name_or_file.endswith((".yaml", ".yml")):
        # Whether it is there, and can be read, is for who reads it.
        return Path(name_or_file)
    path = find_builtin_folder("pipelines") / f"{name_or_file}.yaml"
    if not path.is_file():
        raise SpecError(
            describe_unknown_name("pipeline", name_or_file, list(list_builtin_pipelines()))
        )
    return path
