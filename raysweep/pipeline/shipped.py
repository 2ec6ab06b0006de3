"""The pipelines that ship with raysweep, by name."""

from pathlib import Path

from raysweep.spec import SpecError, read_yaml, shipped, unknown_name


def pipelines() -> dict[str, str]:
    """Names, and what each is about."""
    return {path.stem: str(read_yaml(path).get("about", "")) for path in sorted(shipped("pipelines").glob("*.yaml"))}


def source(what: str) -> Path:
    """The file of a pipeline given by name or as a file. Raises SpecError for an unknown name."""
    if what.endswith((".yaml", ".yml")):
        # Whether it is there, and can be read, is for who reads it.
        return Path(what)
    path = shipped("pipelines") / f"{what}.yaml"
    if not path.is_file():
        raise SpecError(unknown_name("pipeline", what, list(pipelines())))
    return path
