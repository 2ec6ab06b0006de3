"""Descriptions of settings, read from the classes that declare them.

The description of a setting is the string literal below its field, see `Spec`.
"""

import ast
import inspect
import json
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from raysweep.spec import Spec

_TYPE_NAMES: dict[Any, str] = {
    int: "integer",
    float: "number",
    bool: "true or false",
    str: "text",
    Path: "path",
    Any: "any value",
    types.NoneType: "null",
}
_LIMITS = {
    annotated_types.Ge: ("ge", ">="),
    annotated_types.Gt: ("gt", ">"),
    annotated_types.Le: ("le", "<="),
    annotated_types.Lt: ("lt", "<"),
}


@dataclass(frozen=True)
class FieldDescription:
    """One setting of a spec class.

    Attributes:
        name: Name of the field, as users write it.
        type: Allowed values in words, for example "number >= 0".
        default: Default as YAML or JSON; "" if a user must set it.
        description: One or two sentences; "" if the field has no docstring.
    """

    name: str
    type: str
    default: str
    description: str


def describe_fields(
    spec_class: type[Spec], spec_names: Mapping[type, str] | None = None
) -> list[FieldDescription]:
    """Describe the fields of a spec class, in their order.

    Args:
        spec_class: The class. Its field `kind` is left out if it has only one allowed value.
        spec_names: Spec class -> its name in descriptions of types; by default the class name.

    Returns:
        One description per field.
    """
    names = spec_names or {}
    former_names = spec_class.stored_keys
    descriptions = []
    docstrings = _read_field_docstrings(spec_class)
    for name, field in spec_class.model_fields.items():
        if name == "kind" and len(get_args(field.annotation)) == 1:
            continue
        text = docstrings.get(name, "")
        if name in former_names:
            text = f"{text} Called `{former_names[name]}` in 0.1.".lstrip()
        descriptions.append(
            FieldDescription(name, _describe_field_type(field, names), _show_default(field), text)
        )
    return descriptions


def describe_settings(spec: Spec) -> dict[str, str]:
    """Describe all settings of a spec, also of nested specs.

    Args:
        spec: Any spec.

    Returns:
        Dotted path -> description of the field. Fields without a docstring and the keys of
        mappings, such as the names of attacks, are left out.
    """
    return dict(_iter_descriptions(spec, ""))


def describe_type(annotation: Any, spec_names: Mapping[type, str] | None = None) -> str:
    """Describe in words which values a type annotation allows.

    Args:
        annotation: Type annotation of a spec's field.
        spec_names: Spec class -> its name in the description; by default the class name.

    Returns:
        Such as "number >= 0 or null".
    """
    names = spec_names or {}
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe_type(arguments[0], names) + _describe_limits(arguments[1:])
    if origin is Literal:
        return _join_alternatives([f"`{value}`" for value in arguments])
    if origin in (Union, types.UnionType):
        return _join_alternatives([describe_type(part, names) for part in arguments])
    if origin is tuple:
        return _describe_tuple(arguments, names)
    if origin in (dict, Mapping):
        return f"mapping: name to {describe_type(arguments[1], names)}"
    if annotation in names:
        return names[annotation]
    return _TYPE_NAMES.get(annotation, str(getattr(annotation, "__name__", annotation)))


def _join_alternatives(words: list[str]) -> str:
    """Join words without repeats: "a", "a or b", "a, b or c"."""
    *others, last = dict.fromkeys(words)
    return f"{', '.join(others)} or {last}" if others else last


def _describe_tuple(item_types: tuple[Any, ...], names: Mapping[type, str]) -> str:
    if len(item_types) == 2 and item_types[1] is Ellipsis:
        return f"list of {describe_type(item_types[0], names)}"
    return f"[{', '.join(describe_type(item, names) for item in item_types)}]"


def _describe_field_type(field: FieldInfo, names: Mapping[type, str]) -> str:
    return describe_type(field.annotation, names) + _describe_limits(tuple(field.metadata))


def _describe_limits(metadata: tuple[Any, ...]) -> str:
    """Describe bounds such as `Field(ge=0)` and `bounded(0)`; "" if there are none."""
    limits: list[str] = []
    for item in metadata:
        if isinstance(item, FieldInfo):
            limits.append(_describe_limits(tuple(item.metadata)).strip())
        elif isinstance(item, AfterValidator):
            limits += _describe_schedule_bounds(item.func)
        elif isinstance(item, annotated_types.MinLen):
            limits.append(f"({item.min_length} or more)")
        elif type(item) in _LIMITS:
            attribute, sign = _LIMITS[type(item)]
            limits.append(f"{sign} {getattr(item, attribute):g}")
    texts = [limit for limit in limits if limit]
    return f" {' and '.join(texts)}" if texts else ""


def _describe_schedule_bounds(validator: Callable[..., Any]) -> list[str]:
    """Read the arguments `low` and `high` of `schedules.bounded` from the validator's closure."""
    arguments = inspect.getclosurevars(validator).nonlocals
    low, high = arguments.get("low", -math.inf), arguments.get("high", math.inf)
    limits = [f">= {low:g}"] if low > -math.inf else []
    return limits + ([f"<= {high:g}"] if high < math.inf else [])


def _show_default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    return _show_item(field.get_default(call_default_factory=True)) or "''"


def _show_value(value: Any) -> str:
    """Format a default as in YAML, but multiples of 1/255 as fractions and text without quotes."""
    if isinstance(value, float):
        is_fraction = len(repr(value)) > 8 and math.isclose(value * 255, round(value * 255))
        return f"{round(value * 255)}/255" if is_fraction else f"{value:g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_show_item(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(_show_item(item) for item in value)}]"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _show_item(item: Any) -> str:
    """Format a part of a default. Specs without their default values, but with their `kind`."""
    if not isinstance(item, Spec):
        return _show_value(item)
    kind = {"kind": item.kind} if hasattr(item, "kind") else {}
    return _show_value(kind | item.model_dump(exclude_defaults=True))


def _iter_descriptions(spec: Spec, prefix: str) -> Iterator[tuple[str, str]]:
    docstrings = _read_field_docstrings(type(spec))
    for name in type(spec).model_fields:
        path = f"{prefix}{name}"
        if name in docstrings:
            yield path, docstrings[name]
        value = getattr(spec, name)
        parts = {path: value}
        if isinstance(value, Mapping):
            parts = {f"{path}.{key}": part for key, part in value.items()}
        for part_path, part in parts.items():
            if isinstance(part, Spec):
                yield from _iter_descriptions(part, f"{part_path}.")


@cache
def _read_field_docstrings(spec_class: type[Spec]) -> dict[str, str]:
    """Return field -> the docstring below it, in one line, also of the fields of base classes.

    pydantic has an option for this, but it reads the source of each class as soon as that is
    defined, which was a quarter of the time that `raysweep list` takes.
    """
    docstrings: dict[str, str] = {}
    for base in reversed(spec_class.__mro__):
        if not issubclass(base, Spec):
            continue
        definition = _parse_classes(base.__module__).get(base.__name__)
        for field, text in pairwise(definition.body if definition else []):
            match field, text:
                case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(docstring))):
                    docstrings[name] = _join_lines(docstring)
    return docstrings


@cache
def _parse_classes(module_name: str) -> dict[str, ast.ClassDef]:
    """Return name -> definition of the classes of a module, none if it has no file."""
    file = getattr(sys.modules[module_name], "__file__", None)
    nodes = ast.parse(Path(file).read_text(encoding="utf-8")).body if file else []
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


def _join_lines(text: str) -> str:
    return " ".join(text.split())
