"""Validate what is read from JSON files that raysweep wrote, or that somebody else made look so."""

import json
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from raysweep.bounded_files import FileTooLarge, check_text_length
from raysweep.errors import DamagedFileError

# Largest number of an epoch, trial or example.
_MAX_COUNT = 10**12
_MAX_SHOWN = 60

Count = Annotated[int, Field(ge=0, le=_MAX_COUNT)]
"""A whole number from 0."""
Metrics = dict[str, float]
"""Metrics of an epoch by name. JSON has no NaN, but Python writes and reads it."""


def parse_stored_json(data: bytes, source: str, types: Mapping[str, Any]) -> dict[str, Any]:
    """Parse a JSON object and check the types of its values.

    Args:
        data: Content of the file.
        source: Location of the file, for errors.
        types: Type of each key that must be there, such as `dict[str, float]`.

    Returns:
        The object; keys that `types` lacks are not checked.

    Raises:
        DamagedFileError: It is too long, no JSON object, lacks a key, or a value has another type.
            One line.
    """
    try:
        check_text_length(len(data))
        content = json.loads(data)
        # Half of a character, which no file and no terminal can hold.
        json.dumps(content, ensure_ascii=False).encode()
    except FileTooLarge as error:
        raise DamagedFileError(f"{source}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise make_damaged_file_error(source, "it is no JSON object") from error
    if not isinstance(content, dict):
        raise make_damaged_file_error(source, "it is no JSON object")
    require_stored_types(content, types, source)
    return content


def require_stored_types(content: Mapping[str, Any], types: Mapping[str, Any], source: str) -> None:
    """Check that a stored object has some keys, and the types of their values.

    Args:
        content: The object.
        types: Type of each key that must be there.
        source: Location of the file, for errors.

    Raises:
        DamagedFileError: It lacks a key, or a value has another type. One line.
    """
    if missing_keys := sorted(set(types) - content.keys()):
        raise make_damaged_file_error(source, f"it lacks {', '.join(missing_keys)}")
    check_stored_types(content, types, source)


def check_stored_types(content: Mapping[str, Any], types: Mapping[str, Any], source: str) -> None:
    """Check the types of the values of a stored object.

    Args:
        content: The object.
        types: Type of each key; keys that `content` lacks are not checked.
        source: Location of the file, for errors.

    Raises:
        DamagedFileError: A value has another type. One line.
    """
    for key, kind in types.items():
        if key not in content:
            continue
        try:
            _type_adapter(kind).validate_python(content[key], strict=True)
        except ValidationError as error:
            details = error.errors(include_url=False)[0]
            place = ".".join([key, *(str(part) for part in details["loc"])])
            value = _shorten(repr(details["input"]))
            expected = details["msg"].removeprefix("Input should be ").removeprefix("a valid ")
            problem = f"{_shorten(place)} = {value}: expected {expected}"
            raise make_damaged_file_error(source, problem) from error


def make_damaged_file_error(source: str, problem: str) -> DamagedFileError:
    """Return the error of a file whose content is damaged.

    Args:
        source: Location of the file.
        problem: What is wrong with it.
    """
    return DamagedFileError(
        f"{source} is damaged: {problem}; restore it, or start anew under another --name"
    )


@cache
def _type_adapter(kind: Any) -> TypeAdapter[Any]:
    """Return pydantic's validator of a type."""
    return TypeAdapter(kind)


def _shorten(text: str) -> str:
    """Return the start of a long text."""
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
