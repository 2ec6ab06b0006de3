"""YAML 1.2: the only place that turns files and values of users into plain data, and back.

Text of any kind gives plain data or a SpecError that says where it is wrong: size, depth and number
of values have limits, and only the tags of the core schema are known. Scalars mean what the core
schema (https://yaml.org/spec/1.2.2/#103-core-schema) says, and `<<` merges mappings.
"""

import io
import json
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

from raysweep.errors import ChangedValueWarning, SpecError
from raysweep.formatting import shorten_value

MAX_BYTES = 4_000_000
"""Size of the largest file of settings."""
MAX_VALUES = 200_000
"""Number of values, with those that aliases repeat."""
MAX_DEPTH = 30
"""Number of mappings and lists inside of each other."""
MAX_KEY_LENGTH = 500
"""Characters of a name."""
_MAX_PURE_LENGTH = 100_000  # characters that the parser in Python reads in a second
_MAX_NUMBER_LENGTH = 300  # 10^300 is still a float
_TAG_PREFIX = "tag:yaml.org,2002:"
_MERGE_KEY = "<<"

_CONSTANTS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{text: float("nan") for text in (".nan", ".NaN", ".NAN")},
}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"[-+]?\.(?:inf|Inf|INF)")
# Some text that is no number and has no character with a meaning in YAML.
_PLAIN_WORDS = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")
# Integers of YAML 1.1 that YAML 1.2 reads as others, or as text.
_BINARY_OF_1_1 = re.compile(r"[-+]?0b[01_]+")
_OCTAL_OF_1_1 = re.compile(r"[-+]?0[0-7_]+")
_HEX_OF_1_1 = re.compile(r"[-+]?0x[0-9a-fA-F_]+")
_SEXAGESIMAL_OF_1_1 = re.compile(r"[-+]?[1-9][0-9_]*(?::[0-5]?[0-9])+")


class SettingsFile(dict[str, Any]):
    """Content of a YAML file that knows where its settings stand.

    Attributes:
        path: The file.
        line_by_path: Line, from 1, of each setting by its dotted path.
    """

    def __init__(self, data: Mapping[str, Any], path: Path, line_by_path: dict[str, int]) -> None:
        """Store the content, its file and the lines."""
        super().__init__(data)
        self.path = path
        self.line_by_path = line_by_path

    @contextmanager
    def name_lines_in_errors(self, overridden_paths: Collection[str] = ()) -> Iterator[None]:
        """Context manager that adds file and line to the problems of a SpecError.

        Problems about settings that are not in this file stay as they are.

        Args:
            overridden_paths: Dotted paths, with or without `*`, that do not come from this file.
        """
        try:
            yield
        except SpecError as error:
            lines = [self._locate_problem(line, overridden_paths) for line in error.problems]
            raise type(error)(lines) from error

    def _locate_problem(self, problem: str, overridden_paths: Collection[str]) -> str:
        """Return a problem with the line of its setting, which it begins with."""
        text = problem.removeprefix(f"{self.path}: ")
        if text.startswith(f"{self.path}:"):
            return problem
        settings = _list_named_settings(text)
        if any(fnmatchcase(name, path) for name in settings for path in overridden_paths):
            return problem
        # Of another problem it is unknown whether it is about a part of this file.
        line = self._find_line(settings, has_parts=text != problem)
        return problem if line is None else f"{self.path}:{line}: {text}"

    def _find_line(self, settings: Sequence[str], has_parts: bool) -> int | None:
        """Return the line of the innermost setting that is here; None if there is none.

        Args:
            settings: Dotted paths, each in the part that the one before it names.
            has_parts: Whether the line of a part that should hold the setting will do.
        """
        if not settings:
            return None
        outer, inner = settings[0], settings[-1]
        for path, line in self.line_by_path.items():
            is_inside = len(settings) == 1 or path.startswith(f"{outer}.")
            if path == inner or (path.endswith(f".{inner}") and is_inside):
                return line
        shorter = [*settings[:-1], *filter(None, [inner.rpartition(".")[0]])]
        return self._find_line(shorter, has_parts) if has_parts else None


def _list_named_settings(text: str) -> list[str]:
    """List the dotted paths at the start of a problem, the outermost part first.

    For example `stages.0 (train): runs.a: optim.lr = 'x': must be ...` names three.
    """
    settings: list[str] = []
    for part in text.split(": "):
        match = re.match(r"(?:no setting ')?([^\s:=']+)(?: \(\w+\)$| = |$|'|,| )", part)
        if match is None:
            break
        settings.append(match[1])
        if match.end() < len(part):
            break
    return settings


def read_yaml(path: Path) -> SettingsFile:
    """Read a mapping of settings from a YAML file.

    Args:
        path: The file.

    Returns:
        Setting -> value.

    Raises:
        SpecError: The file cannot be read, is not valid YAML, is too large or is no mapping of
            names. One line.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpecError(f"{path}: cannot be read: {reason}") from error
    data, line_by_path = _read_document(text, str(path))
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise SpecError(f"{path}: expected a mapping of settings, got {kind}")
    return SettingsFile(data, path, line_by_path)


def parse_yaml(text: str, source: str = "") -> Any:
    """Read a YAML document or value.

    Args:
        text: YAML 1.2.
        source: File or option that messages name; "" for none.

    Returns:
        Plain data: None, bool, int, float, str, list, and dict with str as keys.

    Raises:
        SpecError: The text is not valid YAML, or too large. One line.
    """
    return _read_document(text, source)[0]


def dump_yaml(data: Any) -> str:
    """Write plain data as YAML that `parse_yaml` reads.

    Args:
        data: None, bool, int, float, str, lists and mappings of them.

    Returns:
        Block style, in the order of the mappings; it ends with a line break.
    """
    return _dump(data, quote=False)


def _dump(data: Any, quote: bool) -> str:
    """Write plain data as YAML; `quote` puts all scalars in quotes."""
    writer: Any = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.default_style = '"' if quote else None
    writer.sort_base_mapping_type_on_output = False
    writer.allow_unicode = False
    # ruamel.yaml breaks quoted text within words, which adds a space to it.
    writer.width = sys.maxsize
    writer.representer.ignore_aliases = lambda *_: True
    stream = io.StringIO()
    writer.dump(data, stream)
    return stream.getvalue().removesuffix("...\n")


def format_scalar(value: Any) -> str:
    """Write a value in one line as `--set` reads it.

    Args:
        value: None, bool, int, float or str.

    Returns:
        JSON; text without quotes if it is text also without them.
    """
    if not isinstance(value, str):
        return json.dumps(value)
    if _is_plain_text(value):
        return value
    if value.isprintable():
        return json.dumps(value, ensure_ascii=False)
    return _dump(value, quote=True).rstrip("\n")


def _is_plain_text(text: str) -> bool:
    """Return whether YAML reads text as itself without quotes."""
    if _PLAIN_WORDS.fullmatch(text):
        return text not in _CONSTANTS
    return dump_yaml(text) == f"{text}\n"


def check_key(key: Any) -> str:
    """Return a name of a setting, or the path of an override, if it is one.

    Args:
        key: Text from a user.

    Raises:
        SpecError: It is no text, or longer than `MAX_KEY_LENGTH`.
    """
    if not isinstance(key, str):
        raise SpecError(
            f"{shorten_value(key)}: expected the name of a setting, got {type(key).__name__}"
        )
    if len(key) > MAX_KEY_LENGTH:
        raise SpecError(
            f"{shorten_value(key)}: a name of {len(key)} characters; at most {MAX_KEY_LENGTH}"
        )
    return key


def _read_document(text: str, source: str) -> tuple[Any, dict[str, int]]:
    """Return the content of a text, and the line of each setting by its dotted path."""
    document = _Document(source)
    try:
        return document.read(text, pure=False), document.line_by_path
    except SpecError as error:
        # The parser in C is fast, but follows YAML 1.1: it refuses a colon as in [a:b].
        if not isinstance(error.__cause__, YAMLError) or len(text) > _MAX_PURE_LENGTH:
            raise
    document = _Document(source)
    return document.read(text, pure=True), document.line_by_path


@dataclass
class _Anchor:
    """A value with a name, and how much it adds where an alias repeats it."""

    value: Any
    n_values: int
    depth: int


@dataclass
class _Document:
    """Builds plain data from the events of a YAML parser, within the limits."""

    source: str
    line_by_path: dict[str, int] = field(default_factory=dict)
    _n_values: int = 0
    _anchors: dict[str, _Anchor | None] = field(default_factory=dict)
    _line: int = 1
    _depth_below: int = 0

    def read(self, text: str, pure: bool) -> Any:
        """Return the content of the only document of a text; None if there is none."""
        self._check_text(text)
        try:
            return self._read_events(YAML(typ="safe", pure=pure).parse(text))
        except MarkedYAMLError as error:
            if error.problem_mark is not None:
                n_lines = max(1, len(text.splitlines()))
                self._line = min(error.problem_mark.line + 1, n_lines)
            raise self._error(f"not valid YAML: {error.problem or error.context}") from error
        except YAMLError as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise self._error(f"not valid YAML: {reason}", has_line=False) from error

    def _read_events(self, events: Iterator[Any]) -> Any:
        """Return the content of the only document; None if there is none."""
        self._events = events
        value, n_documents = None, 0
        while not isinstance(event := self._next_event(), StreamEndEvent):
            if isinstance(event, DocumentStartEvent):
                n_documents += 1
                if n_documents > 1:
                    raise self._error("not valid YAML here: a second document")
                value = self._build(self._next_event(), "", 0)
        return value

    def _check_text(self, text: str) -> None:
        """Reject text that is too long or has parts of characters."""
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            self._line = text.count("\n", 0, error.start) + 1
            raise self._error("not valid YAML: it is not UTF-8") from error
        if size > MAX_BYTES:
            raise self._error(f"larger than {MAX_BYTES} bytes", has_line=False)

    def _error(self, reason: str, has_line: bool = True) -> SpecError:
        """Return an error at the present line."""
        is_file = self.source and not self.source.startswith("--")
        line = f":{self._line}" if has_line and is_file else ""
        prefix = f"{self.source}{line}: " if self.source else ""
        return SpecError(f"{prefix}{reason}")

    def _next_event(self) -> Any:
        """Return the next event, and remember its line."""
        event = next(self._events)
        if event.start_mark is not None:
            self._line = event.start_mark.line + 1
        return event

    def _build(self, event: Any, path: str, depth: int) -> Any:
        """Return the value that begins with an event.

        Args:
            event: The event.
            path: Dotted path of the value; "" at the top.
            depth: Number of mappings and lists around it.
        """
        if isinstance(event, AliasEvent):
            return self._repeat_anchor(event.anchor, path, depth)
        self._count_values(1, depth, path)
        n_before, self._depth_below = self._n_values, 0
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        value: Any
        if isinstance(event, ScalarEvent):
            value = self._build_scalar(event, path)
        elif isinstance(event, SequenceStartEvent):
            self._check_tag(event, ("seq",), path)
            value = self._build_list(path, depth)
        else:
            self._check_tag(event, ("map",), path)
            value = self._build_mapping(path, depth)
        if event.anchor is not None:
            n_values = self._n_values - n_before + 1
            self._anchors[event.anchor] = _Anchor(value, n_values, self._depth_below)
        return value

    def _repeat_anchor(self, name: str, path: str, depth: int) -> Any:
        """Return the value of an alias."""
        where = f"{path}: " if path else ""
        if name not in self._anchors:
            raise self._error(f"{where}there is no anchor &{name} before *{name}")
        anchor = self._anchors[name]
        if anchor is None:
            raise self._error(f"{where}&{name} contains itself")
        self._count_values(anchor.n_values, depth + anchor.depth, path)
        self._depth_below = anchor.depth
        return anchor.value

    def _count_values(self, n_values: int, depth: int, path: str) -> None:
        """Add to the number of values; reject what is too large or nested too deeply."""
        self._n_values += n_values
        if self._n_values <= MAX_VALUES and depth <= MAX_DEPTH:
            return
        where = f"{shorten_value(path, 60)}: " if path else ""
        if self._n_values > MAX_VALUES:
            raise self._error(f"{where}more than {MAX_VALUES} values, with those of aliases")
        raise self._error(f"{where}nested too deeply: more than {MAX_DEPTH} levels")

    def _build_list(self, path: str, depth: int) -> list[Any]:
        """Return the list whose start was read."""
        values: list[Any] = []
        depth_below = 0
        while not isinstance(event := self._next_event(), SequenceEndEvent):
            item_path = f"{path}.{len(values)}" if path else str(len(values))
            self.line_by_path.setdefault(item_path, self._line)
            values.append(self._build(event, item_path, depth + 1))
            depth_below = max(depth_below, self._depth_below + 1)
        self._depth_below = depth_below
        return values

    def _build_mapping(self, path: str, depth: int) -> dict[str, Any]:
        """Return the mapping whose start was read."""
        values: dict[str, Any] = {}
        merged: list[Any] = []
        depth_below = 0
        while not isinstance(event := self._next_event(), MappingEndEvent):
            key = self._build_key(event, path, depth)
            if key in values:
                where = f"{path}.{key}" if path else key
                raise self._error(f"{shorten_value(where)} is there twice; keep one")
            key_path = f"{path}.{key}" if path else key
            self.line_by_path.setdefault(key_path, self._line)
            value = self._build(self._next_event(), key_path, depth + 1)
            depth_below = max(depth_below, self._depth_below + 1)
            is_merge = key == _MERGE_KEY and isinstance(event, ScalarEvent) and event.implicit[0]
            if is_merge:
                merged += self._list_merged(value, path)
            else:
                values[key] = value
        self._depth_below = depth_below
        for mapping in merged:
            values = {**mapping, **values}
        return values

    def _build_key(self, event: Any, path: str, depth: int) -> str:
        """Return the name of a setting."""
        if isinstance(event, ScalarEvent) and event.value == _MERGE_KEY:
            return _MERGE_KEY
        line = self._line
        key = self._build(event, path, depth + 1)
        self._line = line
        try:
            return check_key(key)
        except SpecError as error:
            where = f"{path}: " if path else ""
            raise self._error(f"{where}{error}") from error

    def _list_merged(self, value: Any, path: str) -> list[dict[str, Any]]:
        """Return the mappings of a merge key `<<`."""
        mappings = value if isinstance(value, list) else [value]
        if not all(isinstance(mapping, dict) for mapping in mappings):
            where = f"{path}." if path else ""
            raise self._error(f"{where}<<: must be a mapping or a list of mappings")
        return mappings

    def _build_scalar(self, event: ScalarEvent, path: str) -> Any:
        """Return the value of a scalar by its tag or, if it is plain, by its form."""
        text: str = event.value
        where = f"{path}: " if path else ""
        if "\0" in text:
            raise self._error(f"{where}{shorten_value(text)}: has the character \\0")
        tags = ("str", "int", "float", "bool", "null")
        kind = self._check_tag(event, tags, path)
        if kind == "str" or (kind is None and not event.implicit[0]):
            return text
        if len(text) > _MAX_NUMBER_LENGTH and (_INTEGER.fullmatch(text) or _FLOAT.fullmatch(text)):
            raise self._error(
                f"{where}a number of {len(text)} characters; at most {_MAX_NUMBER_LENGTH}"
            )
        value = _resolve_plain(text)
        if kind is None:
            self._warn_of_changed_value(text, value, path)
            return value
        return self._convert(value, text, kind, where)

    def _convert(self, value: Any, text: str, kind: str, where: str) -> Any:
        """Return a scalar as the type that its tag names."""
        if kind == "float" and type(value) is int:
            return float(value)
        expected: dict[str, type] = {"int": int, "float": float, "bool": bool, "null": type(None)}
        if type(value) is not expected[kind]:
            raise self._error(f"{where}!!{kind} {shorten_value(text)}: is no {kind}")
        return value

    def _check_tag(self, event: Any, known: Sequence[str], path: str) -> str | None:
        """Return the short name of an explicit tag; None if there is none."""
        tag = None if event.ctag is None else str(event.ctag)
        if tag is None:
            return None
        if tag == "!":
            return known[0]
        name = tag.removeprefix(_TAG_PREFIX)
        if name in known and name != tag:
            return name
        where = f"{path}: " if path else ""
        raise self._error(f"{where}the tag {shorten_value(tag)} is not known: leave it out")

    def _warn_of_changed_value(self, text: str, value: Any, path: str) -> None:
        """Name a value that raysweep read otherwise when it followed YAML 1.1."""
        former = _resolve_as_1_1(text)
        if former is None or (former == value and type(former) is type(value)):
            return
        where = f"{path} = {text}" if path else text
        place = f"{self.source}:{self._line}" if not self.source.startswith("--") else self.source
        prefix = f"{place}: " if self.source else ""
        warnings.warn(
            f"{prefix}{where}: is {value!r} now, as YAML 1.2 says; up to version 0.2 of raysweep "
            f"it was {former!r}. Write the one that you mean",
            ChangedValueWarning,
            stacklevel=2,
        )


def _resolve_plain(text: str) -> Any:
    """Return the value of a plain scalar by the core schema of YAML 1.2."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITY.fullmatch(text):
        return float(text.replace(".", "").lower())
    return text


def _resolve_as_1_1(text: str) -> int | None:
    """Return the integer that a plain scalar was in YAML 1.1; None if it was none.

    Dates are left out, because no setting of raysweep took one, and digits with `_` such as 1_000:
    where a number is expected they are still one.
    """
    if len(text) > _MAX_NUMBER_LENGTH or not text or text[0] not in "+-0123456789":
        return None
    digits = text.replace("_", "")
    readers: tuple[tuple[re.Pattern[str], Callable[[str], int]], ...] = (
        (_BINARY_OF_1_1, lambda number: int(number, 2)),
        (_HEX_OF_1_1, lambda number: int(number, 16)),
        (_OCTAL_OF_1_1, lambda number: int(number, 8)),
        (_SEXAGESIMAL_OF_1_1, _read_sexagesimal),
    )
    for pattern, read in readers:
        if pattern.fullmatch(text):
            try:
                return read(digits)
            except ValueError:
                return None
    return None


def _read_sexagesimal(text: str) -> int:
    """Return the integer of digits to the base 60: 90 for `1:30`."""
    sign = -1 if text.startswith("-") else 1
    value = 0
    for part in text.lstrip("+-").split(":"):
        value = value * 60 + int(part)
    return sign * value
