"""docs/settings.md is what the classes of settings say, and their descriptions can be read."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field

from raysweep.catalog import METHODS
from raysweep.method import Term
from raysweep.schedules import Schedule, bounded
from raysweep.settings_reference import FieldDescription, describe_fields, describe_settings
from raysweep.spec import Spec, flatten_spec
from raysweep.training.config import TrainingConfig

DOCS = Path(__file__).parent.parent / "docs"


class Inner(Spec):
    size: int = 3
    """How large
    it is."""


class Outer(Spec):
    stored_keys: ClassVar = {"shape": "form"}

    kind: Literal["outer"] = "outer"
    shape: Literal["round", "square"] = "round"
    """What it looks like."""
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    rate: Annotated[Schedule, bounded(0, 2)] = 8 / 255
    names: tuple[str, ...]
    parts: dict[str, Inner] = Field(default_factory=dict)
    """Parts by name."""


def test_fields_are_described_with_type_default_and_former_name() -> None:
    assert describe_fields(Inner) == [FieldDescription("size", "integer", "3", "How large it is.")]
    shape, share, rate, names, parts = describe_fields(Outer, {Inner: "part"})
    assert shape == FieldDescription(
        "shape", "`round` or `square`", "round", "What it looks like. Called `form` in 0.1."
    )
    assert (share.type, share.default) == ("number > 0 and <= 1 or null", "null")
    assert rate.type.startswith("number, ") and rate.type.endswith(" >= 0 and <= 2")
    assert rate.default == "8/255"
    assert (names.type, names.default) == ("list of text", "")
    assert (parts.type, parts.default) == ("mapping: name to part", "{}")


def test_settings_of_a_value_are_described_by_their_paths() -> None:
    value = Outer(names=("a",), parts={"left": Inner(), "right": Inner()})
    assert describe_settings(value) == {
        "shape": "What it looks like.",
        "parts": "Parts by name.",
        "parts.left.size": "How large it is.",
        "parts.right.size": "How large it is.",
    }


@pytest.mark.parametrize("name", METHODS)
def test_paths_of_descriptions_are_those_that_show_prints(name) -> None:
    config = TrainingConfig.from_data({"method": name})
    leaves = flatten_spec(config)
    for path in describe_settings(config):
        assert (
            path in leaves
            or any(leaf.startswith(f"{path}.") for leaf in leaves)
            or (path.rpartition(".")[2] in ("attacks", "finish"))
        )


def test_types_name_the_classes_of_a_union_once() -> None:
    weight = next(field for field in describe_fields(Term) if field.name == "weight")
    assert weight.type.count("UniformWeight") == 1 and weight.default == "{kind: uniform}"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    path = DOCS / "generate_settings.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(generator) -> None:
    page = (DOCS / "settings.md").read_text()
    assert page == generator.render_page(), "run `python docs/generate_settings.py`"


def test_every_setting_has_a_description(generator) -> None:
    sections = [section for chapter in generator.CHAPTERS for section in chapter.sections]
    classes = [spec_class for section in sections for spec_class in section.classes]
    assert len(classes) == len(set(classes)) > 30
    missing = [
        f"{spec_class.__name__}.{field.name}"
        for spec_class in classes
        for field in describe_fields(spec_class)
        if not field.description
    ]
    assert missing == []
