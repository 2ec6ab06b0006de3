"""Specs: frozen pydantic settings; reading them from YAML, overriding them, and error lines.

Dotted paths such as `attacks.pgd.eps` name the settings of a nested spec.
"""

import copy
import difflib
import fnmatch
import functools
import hashlib
import itertools
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError, core_schema

from raysweep.errors import DamagedFileError
from raysweep.errors import SpecError as SpecError
from raysweep.formatting import shorten_value

SpecT = TypeVar("SpecT", bound="Spec")
# Other types, such as `path_type` and `unknown_setting`, are those of custom errors.
_CORE_ERROR_TYPES = frozenset(get_args(core_schema.ErrorType))
# pydantic's message for a list that is too short.
_MIN_ITEMS_MESSAGE = re.compile(r"^\w+ should have at least (\d+ items?).*$")
JsonDict = dict[str, Any]
# Messages list all known names if there are not more than this number.
_MAX_LISTED_NAMES = 30
# Characters of a name that are compared with known names.
_MAX_COMPARED = 200
_n_former_names = 0


class FormerNameWarning(FutureWarning):
    """A file or option uses a setting's name of raysweep 0.1, which is still accepted."""


class Spec(BaseModel):
    """Frozen pydantic base class of all settings. Method, attack and weight specs are callable.

    A spec can be written in YAML, searched, logged and stored in a checkpoint. Unknown keys are
    errors. Infinity and nan are strings in JSON.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        ser_json_inf_nan="strings",
        allow_inf_nan=True,
    )

    stored_keys: ClassVar[Mapping[str, str]] = {}
    """Field name -> key in files of raysweep 0.1.

    These keys are accepted as input everywhere. Files and digests still use them, so that earlier
    results stay valid.
    """

    later_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that raysweep 0.1 did not have.

    At their defaults they are left out of files and digests, so that earlier digests stay valid.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _check_keys(
        cls, data: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        """Accept former keys; replace the error of an unknown key by the nearest settings."""
        if cls.stored_keys and isinstance(data, dict):
            data = cls.rename_stored_keys(data, (info.context or {}).get("source"))
        try:
            return handler(data)
        except ValidationError as error:
            details = [
                _add_suggestion(item, list(cls.model_fields))
                for item in error.errors(include_url=False)
            ]
            raise ValidationError.from_exception_data(cls.__name__, details) from error

    @classmethod
    def rename_stored_keys(cls, data: JsonDict, source: str | None) -> JsonDict:
        """Replace the keys of raysweep 0.1 by the present field names.

        Args:
            data: Mapping from a file or option.
            source: File or option that warnings name; None for no warnings.

        Returns:
            A mapping with present names; other keys are unchanged.

        Raises:
            SpecError: A setting is there under both names.
        """
        names = {key: name for name, key in cls.stored_keys.items()}
        former_keys = [key for key in data if key in names]
        problems = [
            f"{key!r} and {names[key]!r} are the same setting; keep {names[key]!r} only"
            for key in former_keys
            if names[key] in data
        ]
        if problems:
            raise SpecError(problems)
        if source is not None:
            for key in former_keys:
                warn_former_name(key, names[key], source)
        return {names.get(key, key): value for key, value in data.items()}

    @model_serializer(mode="wrap")
    def _write_stored_keys(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> JsonDict:
        """Write field names as keys, or stored keys if the context asks for them."""
        data: JsonDict = handler(self)
        if not (info.context and info.context.get("stored")):
            return data
        for name in () if info.context.get("complete") else self.later_fields:
            default = type(self).model_fields[name].get_default(call_default_factory=True)
            if getattr(self, name) == default:
                del data[name]
        return {self.stored_keys.get(name, name): value for name, value in data.items()}

    def replace(self, **changes: Any) -> Self:
        """Create a validated copy.

        Args:
            **changes: Field name -> new value.

        Returns:
            The copy.

        Raises:
            pydantic.ValidationError: A name or value is not allowed.
        """
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate(fields | changes)

    def resolve_at(self, epoch: int) -> Self:
        """Replace every schedule, also in nested specs, by its value at an epoch.

        Args:
            epoch: Epoch, 0-based.

        Returns:
            A copy with plain numbers, or this spec if it has no schedule.
        """
        changed = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            resolved = _resolve_value_at(value, epoch)
            if resolved is not value:
                changed[name] = resolved
        return self.model_copy(update=changed) if changed else self

    def to_json_dict(self) -> JsonDict:
        """Convert to plain data for JSON or YAML.

        Returns:
            What `from_data` reads; infinity and nan are strings.
        """
        return json.loads(self.model_dump_json())  # type: ignore[no-any-return]

    def to_stored_dict(self) -> JsonDict:
        """Convert to plain data for files and digests.

        Returns:
            `to_json_dict` with the keys of `stored_keys`.
        """
        text = self.model_dump_json(context={"stored": True})
        return json.loads(text)  # type: ignore[no-any-return]

    def digest(self) -> str:
        """Compute a short identifier of this value.

        Returns:
            `json_digest` of `to_stored_dict()`: 16 hex digits.
        """
        return json_digest(self.to_stored_dict())

    @classmethod
    def from_data(cls, data: Any, source: str = "", *, stored: bool = False) -> Self:
        """Validate plain data.

        Args:
            data: Content of YAML or JSON, usually a mapping.
            source: File or option that messages name; "" for none.
            stored: Whether raysweep wrote the data. If so, former keys cause no warning.

        Returns:
            The spec.

        Raises:
            SpecError: One line for each problem.
            DamagedFileError: The same, for data that raysweep wrote.
        """
        try:
            return cls.model_validate(data, context=None if stored else {"source": source})
        except ValidationError as error:
            error_type = DamagedFileError if stored else SpecError
            raise error_type(_describe_validation_error(error, data, source)) from error


class EpochSchedule(Spec):
    """Base class of schedules: settings whose value is a number that depends on the epoch."""

    def value_at(self, epoch: float) -> float:
        """Compute the value at an epoch. Subclasses must override this.

        Args:
            epoch: Epoch, 0-based. It may be larger than the number of epochs of the run, and a
                fraction for a setting that changes within epochs.

        Returns:
            The value of the setting.
        """
        raise NotImplementedError


def json_digest(data: Any) -> str:
    """Compute a short identifier of plain data.

    Args:
        data: What `json.dumps` accepts.

    Returns:
        The first 16 hex digits of the sha256 of its JSON with sorted keys and without spaces.
    """
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def flatten_spec(spec: Spec) -> dict[str, Any]:
    """List the scalar settings of a nested spec.

    Args:
        spec: Any spec.

    Returns:
        Dotted path -> scalar; a list is its JSON text.
    """
    return dict(_iter_leaves(spec.to_json_dict(), ""))


def warn_former_name(former: str, name: str, source: str = "") -> None:
    """Issue a `FormerNameWarning` of one line.

    Args:
        former: Name in raysweep 0.1, as the user wrote it.
        name: Present name.
        source: File or option where it was written; "" for none.
    """
    global _n_former_names
    _n_former_names += 1
    prefix = f"{source}: " if source else ""
    warnings.warn(f"{prefix}{former!r} is now called {name!r}", FormerNameWarning, stacklevel=2)


def count_former_names() -> int:
    """Return the number of warnings that `warn_former_name` has issued in this process."""
    return _n_former_names


def apply_overrides(
    spec: SpecT,
    overrides: Mapping[str, Any],
    *,
    on_missing: Literal["error", "ignore"] = "error",
    stars_reach_parts: bool = True,
) -> SpecT:
    """Replace values at dotted paths and validate the result.

    Setting a `kind` resets the other settings of the same part to their defaults. A path without
    `*`, and what stands in a mapping for a whole part, takes precedence over a path with `*`. Of
    two with `*`, the one that the other matches does; two that overlap otherwise must agree.

    Args:
        spec: Spec to copy.
        overrides: Dotted path -> value. `*` in a path matches any characters, so `*.eps` is every
            eps. Names of raysweep 0.1 are accepted with a warning.
        on_missing: "error" raises SpecError for a path that matches no setting; "ignore" skips it,
            which the defaults of data sets need.
        stars_reach_parts: Whether paths with `*` also change what a mapping for a whole part leaves
            out. In raysweep 0.1 they did not.

    Returns:
        The changed copy.

    Raises:
        SpecError: One line for each unknown path and each value that is not allowed.
    """
    data = spec.to_json_dict()
    problems: list[str] = []
    parts, scalars = _split_overrides(overrides, stars_reach_parts)
    written_paths = set(_list_written_paths(overrides)) if stars_reach_parts else set()
    for items in (parts, scalars):
        if items is scalars and parts and scalars:
            data = _fill_in_defaults(type(spec), data)
        problems += _set_values(spec, data, items, written_paths, on_missing)
    if stars_reach_parts:
        problems += _find_star_conflicts(scalars, data, written_paths)
    try:
        result = type(spec).from_data(data)
    except SpecError as error:
        new_problems = [line for line in error.problems if line not in problems]
        raise SpecError([*problems, *new_problems]) from error
    if problems:
        raise SpecError(problems)
    return result


def _set_values(
    spec: Spec,
    data: JsonDict,
    items: list[tuple[str, Any]],
    written_paths: set[str],
    on_missing: Literal["error", "ignore"],
) -> list[str]:
    """Set values at dotted paths of `data`, in their order; `*` leaves out `written_paths`.

    Returns:
        A line for each path that matches no setting, for `on_missing` "error".
    """
    problems: list[str] = []
    known_paths: list[str] | None = None
    for path, value in items:
        if "*" in path and known_paths is None:
            known_paths = list_paths(data)
        targets = match_paths(path, data, known_paths)
        if not targets and on_missing == "error":
            # Only what users wrote can have former names; the lookup writes the spec out twice.
            targets = _match_former_paths(path, spec, data)
            if not targets:
                problems.append(describe_unknown_path(path, data))
        if "*" in path:
            targets = [target for target in targets if target not in written_paths]
        for target in targets:
            if _set_nested_value(data, target.split("."), value):
                known_paths = None
    return problems


def _find_star_conflicts(
    scalars: list[tuple[str, Any]], data: JsonDict, written_paths: set[str]
) -> Iterator[str]:
    """Yield a line for each setting to which two paths with `*` give different values.

    A path that another one matches is more specific, and wins.
    """
    stars = [(path, value) for path, value in scalars if "*" in path]
    for (first, first_value), (second, second_value) in itertools.combinations(stars, 2):
        names = {path.rpartition(".")[2] for path in (first, second)}
        can_overlap = len(names) == 1 or any("*" in name for name in names)
        is_nested = covers_path(first, second) or covers_path(second, first)
        if not can_overlap or is_nested or first_value == second_value:
            continue
        both = set(match_paths(first, data)) & set(match_paths(second, data)) - written_paths
        for target in sorted(both):
            yield (
                f"{target}: {first!r} sets it to {first_value!r}, and {second!r} to "
                f"{second_value!r}; set {target} itself"
            )


def _split_overrides(
    overrides: Mapping[str, Any], stars_reach_parts: bool
) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """Split overrides into those that may replace other settings, and the rest, each in order.

    Setting a part or its `kind` replaces the settings inside: these come first, shallow paths
    before deep ones, and a `kind` before its siblings. Of the rest, paths with `*` come first.
    Without `stars_reach_parts`, all are sorted together.
    """
    parts: list[tuple[str, Any]] = []
    scalars: list[tuple[str, Any]] = []
    for path, value in overrides.items():
        replaces_settings = path.endswith("kind") or isinstance(value, dict)
        is_scalar = stars_reach_parts and not replaces_settings
        (scalars if is_scalar else parts).append((path, value))
    parts.sort(key=lambda item: (item[0].count("."), not item[0].endswith("kind")))
    scalars.sort(key=lambda item: ("*" not in item[0], item[0].count(".")))
    return parts, scalars


def _fill_in_defaults(spec_type: type[Spec], data: JsonDict) -> JsonDict:
    """Return settings with all defaults, so that `*` finds them; unchanged if they are invalid."""
    with suppress(SpecError):
        return spec_type.from_data(data).to_json_dict()
    return data


def covers_path(pattern: str, path: str) -> bool:
    """Check whether an override sets everything that another one sets.

    Args:
        pattern: Path of the override, with or without `*`.
        path: Path of the other override, with or without `*`.

    Returns:
        Whether `pattern` is `path`, matches it, or names a part that holds it.
    """
    if "*" not in pattern:
        return path == pattern or path.startswith(f"{pattern}.")
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}.*")


def merge_overrides(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge layers of overrides, so that what a later layer sets wins.

    Within one layer, a path without `*` takes precedence over one with `*` that matches it. A later
    layer takes precedence in any case: `*.eps` of the command line also replaces the
    `method.attacks.pgd.eps` of a file. A whole part at the top, such as `method` or `optim`, leaves
    the paths below it as they are: they may be settings of the part that replaces it.

    Args:
        *layers: Mappings from dotted path to value, lowest precedence first.

    Returns:
        One mapping for `apply_overrides`; later paths come later.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for pattern in layer:
            is_top_part = "." not in pattern and "*" not in pattern
            for path in list(merged):
                if path not in layer and not is_top_part and covers_path(pattern, path):
                    del merged[path]
                elif "*" in pattern and isinstance(merged[path], dict):
                    merged[path] = _without_matches(merged[path], path, pattern)
        for path, value in layer.items():
            merged.pop(path, None)
            merged[path] = value
    return merged


def _without_matches(part: JsonDict, path: str, pattern: str) -> JsonDict:
    """Return the settings of a part at `path` that an override with `*` does not set."""
    kept = {}
    for key, value in part.items():
        setting = f"{path}.{key}"
        if isinstance(value, dict):
            kept[key] = _without_matches(value, setting, pattern)
        elif not fnmatch.fnmatchcase(setting, pattern):
            kept[key] = value
    return kept


def _list_written_paths(overrides: Mapping[str, Any]) -> Iterator[str]:
    """Yield the paths that overrides set without `*`, and those of the settings in mappings."""
    for path, value in overrides.items():
        if "*" not in path:
            yield path
            yield from (setting for setting, _ in _iter_nodes(value, path))


def _match_former_paths(pattern: str, spec: Spec, data: JsonDict) -> list[str]:
    """Match a path with names of raysweep 0.1; warn, and return the paths with present names."""
    stored = json.loads(spec.model_dump_json(context={"stored": True, "complete": True}))
    present_path_by_stored = dict(
        zip(list_paths(stored), list_paths(spec.to_json_dict()), strict=True)
    )
    matches = []
    for path in match_paths(pattern, stored):
        if path in present_path_by_stored:
            matches.append(present_path_by_stored[path])
    if matches:
        warn_former_name(pattern, matches[0])
    return [path for path in matches if match_paths(path, data)]


def describe_unknown_path(path: str, data: JsonDict) -> str:
    """Describe a dotted path that matches no setting, with the three nearest paths.

    Args:
        path: Path that a user wrote.
        data: The settings as nested mappings.

    Returns:
        One line. Paths with the same or a similar last part come first.
    """
    paths_by_leaf: dict[str, list[str]] = {}
    candidates = list_paths(data)
    for known_path in candidates:
        paths_by_leaf.setdefault(known_path.rsplit(".", 1)[-1], []).append(known_path)
    leaf = path.rsplit(".", 1)[-1]
    if leaf in paths_by_leaf:
        candidates = paths_by_leaf[leaf]
    elif near_leaf := _find_close_matches(leaf, tuple(paths_by_leaf), 1, 0.6):
        candidates = paths_by_leaf[near_leaf[0]]
    nearest = _find_close_matches(path, tuple(candidates), 3, 0.0)
    return f"no setting {shorten_value(path)}; nearest: {', '.join(nearest)}"


@functools.lru_cache(maxsize=256)
def _find_close_matches(name: str, known: tuple[str, ...], n: int, cutoff: float) -> list[str]:
    """Return what `difflib` finds, in 5 ms. A space asks for the same name at each of its ends."""
    return difflib.get_close_matches(name, known, n=n, cutoff=cutoff)


def describe_unknown_name(noun: str, name: object, known: Sequence[str]) -> str:
    """Describe an unknown name, with similar names or all names.

    Args:
        noun: What is named, such as "method".
        name: Name that a user wrote.
        known: All known names.

    Returns:
        One line.
    """
    near = difflib.get_close_matches(str(name)[:_MAX_COMPARED], known, n=3, cutoff=0.4)
    if near:
        hint = f"nearest: {', '.join(near)}"
    elif len(known) <= _MAX_LISTED_NAMES:
        hint = f"known: {', '.join(known)}"
    else:
        hint = "`raysweep list` names all"
    return f"no {noun} {shorten_value(name)}; {hint}"


def is_safe_name(name: str) -> bool:
    """Check that a name can be one folder name on every file system.

    Args:
        name: Name that a user wrote.

    Returns:
        Whether it has 1 to 100 letters, digits, `.`, `_` or `-`, and no dot at the start.
    """
    return (
        0 < len(name) <= 100
        and name[0] != "."
        and all(character.isalnum() or character in "._-" for character in name)
    )


@functools.cache
def find_builtin_folder(folder_name: str) -> Path:
    """Find a folder of YAML files that ships with raysweep.

    Args:
        folder_name: Such as "search_spaces".

    Returns:
        The folder inside the installed package, or beside the package in a checkout.
    """
    package = Path(__file__).parent
    installed = package / folder_name
    return installed if installed.is_dir() else package.parent / folder_name


def _resolve_value_at(value: Any, epoch: int) -> Any:
    """Resolve one field's value; return the same object if it has no schedule."""
    if isinstance(value, EpochSchedule):
        return value.value_at(epoch)
    if isinstance(value, Spec):
        return value.resolve_at(epoch)
    if isinstance(value, dict):
        resolved = {key: _resolve_value_at(item, epoch) for key, item in value.items()}
        has_changed = any(resolved[key] is not value[key] for key in value)
        return resolved if has_changed else value
    return value


def list_paths(data: Any) -> list[str]:
    """List the dotted paths of all parts and settings, each part before its settings.

    Args:
        data: Nested mappings.

    Returns:
        The paths, in their order.
    """
    paths: list[str] = []
    _append_paths(data, "", paths)
    return paths


def _append_paths(data: Any, prefix: str, paths: list[str]) -> None:
    if isinstance(data, dict):
        for key, value in data.items():
            path = f"{prefix}{key}"
            paths.append(path)
            if isinstance(value, dict):
                _append_paths(value, f"{path}.", paths)


def _iter_nodes(data: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every part and setting, each part before its settings."""
    if isinstance(data, dict):
        for key, value in data.items():
            path = f"{prefix}.{key}" if prefix else str(key)
            yield path, value
            yield from _iter_nodes(value, path)


def list_leaf_paths(data: JsonDict) -> list[str]:
    """List the dotted paths of all values that are no mappings.

    Args:
        data: Nested mappings.

    Returns:
        The paths, in their order.
    """
    return [path for path, value in _iter_nodes(data, "") if not isinstance(value, dict)]


def _iter_leaves(data: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, scalar) of every setting; a list becomes its JSON text."""
    for path, value in _iter_nodes(data, prefix):
        if not isinstance(value, dict):
            yield path, value if not isinstance(value, list) else json.dumps(value)


def match_paths(
    pattern: str, data: JsonDict, known_paths: Sequence[str] | None = None
) -> list[str]:
    """List the settings that an override may set.

    Args:
        pattern: Path that a user wrote.
        data: The settings as nested mappings.
        known_paths: All paths of `data`, if the caller has them: listing them takes long.

    Returns:
        The paths.
    """
    if "*" in pattern:
        if known_paths is None:
            known_paths = list_paths(data)
        is_match = _compile_pattern(pattern).match
        return [path for path in known_paths if is_match(path)]
    node: Any = data
    *parents, key = pattern.split(".")
    for part in parents:
        if not isinstance(node, dict) or part not in node:
            return []
        node = node[part]
    # In a part with a `kind`, accept unknown keys too: another override may change the `kind`, and
    # pydantic rejects wrong keys later.
    is_settable = isinstance(node, dict) and (key in node or (parents and "kind" in node))
    return [pattern] if is_settable else []


def list_values(pattern: str, data: JsonDict) -> list[Any]:
    """List the values of the parts and settings at a path.

    Args:
        pattern: Path; `*` matches any characters.
        data: The settings as nested mappings.

    Returns:
        The values, in the order of the settings; empty if there is none at the path.
    """
    values = dict(_iter_nodes(data, ""))
    return [values[path] for path in match_paths(pattern, data, list(values)) if path in values]


@functools.lru_cache(maxsize=1024)
def _compile_pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(pattern))


def _set_nested_value(data: JsonDict, path_parts: list[str], value: Any) -> bool:
    """Set the value at a path; do nothing if another match of the same `*` replaced its parent.

    Returns:
        Whether `data` may have other paths than before.
    """
    node: Any = data
    for part in path_parts[:-1]:
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        return False
    former_value = node.get(path_parts[-1])
    is_new_kind = path_parts[-1] == "kind" and former_value != value
    if is_new_kind:
        node.clear()
    is_new_key = path_parts[-1] not in node
    # Copied, because a deeper path may change this value later, but must not change the caller's
    # object or the value at the other matches.
    node[path_parts[-1]] = copy.deepcopy(value) if isinstance(value, dict | list) else value
    return is_new_kind or is_new_key or isinstance(former_value, dict) or isinstance(value, dict)


def _describe_validation_error(error: ValidationError, data: Any, source: str) -> list[str]:
    """Return one line for each problem that pydantic found in `data`, without repetitions."""
    prefix = f"{source}: " if source else ""
    lines: list[str] = []
    for details in error.errors(include_url=False):
        lines.extend(f"{prefix}{line}" for line in _describe_problem(details, data))
    return list(dict.fromkeys(lines))


def _describe_problem(details: ErrorDetails, data: Any) -> list[str]:
    """Return the lines of one pydantic error: several if a validator raised SpecError."""
    kind, context = details["type"], details.get("ctx", {})
    path, value = _locate_error(details["loc"], data, kind in ("unknown_setting", "missing"))
    if kind == "unknown_setting":
        parent = path.rpartition(".")[0]
        prefix = f"{parent}." if parent else ""
        near = ", ".join(f"{prefix}{name}" for name in details["msg"].split())
        return [f"no setting {shorten_value(path)}; nearest: {near}"]
    if kind == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
        return [f"{path}: {describe_unknown_name('kind', context['tag'], tags)}"]
    if kind == "union_tag_not_found":
        return [f"{path}.kind is missing"]
    if kind == "missing":
        return [f"{path} is missing"]
    cause = context.get("error")
    if kind == "value_error" and isinstance(cause, SpecError):
        return [f"{path}: {line}" if path else line for line in cause.problems]
    message = details["msg"].removeprefix("Value error, ")
    message = re.sub("^Input (should be|is not)", r"\1", message).replace("should be", "must be")
    message = message.removesuffix(" or object to extract fields from")
    message = _MIN_ITEMS_MESSAGE.sub(r"must have at least \1", message)
    if path:
        return [f"{path} = {shorten_value(value)}: {message}"]
    # Settings that are not valid together: the message names them, and all others do not matter.
    is_whole_spec = kind == "value_error" and isinstance(value, Mapping)
    return [message if is_whole_spec else f"{shorten_value(value)}: {message}"]


def _add_suggestion(error: ErrorDetails, field_names: list[str]) -> InitErrorDetails:
    """Convert an error for `from_exception_data`.

    The error of an unknown key gets the type `unknown_setting`; its message is the list of the
    nearest field names.
    """
    detail = InitErrorDetails(
        type=error["type"], loc=error["loc"], input=error["input"], ctx=error.get("ctx", {})
    )
    if error["type"] == "extra_forbidden":
        near = (
            difflib.get_close_matches(str(error["loc"][-1]), field_names, n=3, cutoff=0.3)
            or field_names
        )
        detail["type"] = PydanticCustomError("unknown_setting", " ".join(near))
    elif error["type"] not in _CORE_ERROR_TYPES:
        detail["type"] = PydanticCustomError(error["type"], error["msg"])
    return detail


def _locate_error(loc: tuple[int | str, ...], data: Any, is_key_error: bool) -> tuple[str, Any]:
    """Return dotted path and value of a pydantic error location, without its union tags.

    If `is_key_error`, the last part is kept although `data` does not contain it.
    """
    parts: list[str] = []
    node: Any = data
    for position, part in enumerate(loc):
        is_last = position == len(loc) - 1
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and isinstance(part, int) and 0 <= part < len(node):
            node = node[int(part)]
        elif not (is_last and is_key_error):
            continue
        parts.append(str(part))
    return ".".join(parts), node
