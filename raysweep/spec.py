"""Spec: a frozen, validated value that is also the thing it describes, and the four operations
every spec has.
"""

import copy
import difflib
import fnmatch
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import yaml
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
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

_BOOL_TAG, _FLOAT_TAG = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
SpecT = TypeVar("SpecT", bound="Spec")
_MIN_ITEMS_MESSAGE = re.compile(r"^\w+ should have at least (\d+ items?).*$")
JsonDict = dict[str, Any]


class SpecError(ValueError):
    """A user's mistake. Each problem is one line that names the key, the value and what is allowed."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class FormerNameWarning(FutureWarning):
    """A setting was given by the name that it had in raysweep 0.1."""


class Spec(BaseModel):
    """Frozen pydantic base class of all settings. Method, attack and weight specs are callable.

    A spec can be written in YAML, searched, logged and stored in a checkpoint.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        ser_json_inf_nan="strings",
        allow_inf_nan=True,
        use_attribute_docstrings=True,
    )

    # Field name -> its key in files of raysweep 0.1. These keys are read everywhere; files and
    # digests keep them, so that earlier results stay valid.
    stored_keys: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="wrap")
    @classmethod
    def _suggest_known_keys(
        cls, data: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        """Accept former keys, and give each unknown key the nearest settings of this class."""
        if cls.stored_keys and isinstance(data, dict):
            data = cls.rename_stored_keys(data, (info.context or {}).get("source"))
        try:
            return handler(data)
        except ValidationError as error:
            details = [
                _add_suggestion(item, list(cls.model_fields))
                for item in error.errors(include_url=False)
            ]
            raise ValidationError.from_exception_data(cls.__name__, details) from None

    @classmethod
    def rename_stored_keys(cls, data: JsonDict, source: str | None) -> JsonDict:
        """Return `data` with the present names as keys; warn about each if `source` names a file."""
        names = {key: name for name, key in cls.stored_keys.items()}
        if source is not None:
            for key in names.keys() & data.keys():
                warn_former_name(key, names[key], source)
        return {names.get(key, key): value for key, value in data.items()}

    @model_serializer(mode="wrap")
    def _write_stored_keys(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> JsonDict:
        data: JsonDict = handler(self)
        if self.stored_keys and info.context and info.context.get("stored"):
            return {self.stored_keys.get(name, name): value for name, value in data.items()}
        return data

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy with some fields changed. Raises ValidationError."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate(fields | changes)

    def resolve_at(self, epoch: int) -> Self:
        """This spec with every schedule replaced by its value at `epoch` (0-based)."""
        changed = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            resolved = _resolve_value_at(value, epoch)
            if resolved is not value:
                changed[name] = resolved
        return self.model_copy(update=changed) if changed else self

    def to_json_dict(self) -> JsonDict:
        """Return plain data that `from_data` reads; inf and nan are written as strings."""
        return json.loads(self.model_dump_json())  # type: ignore[no-any-return]

    def to_stored_dict(self) -> JsonDict:
        """Return `to_json_dict` with the keys that files and digests have had since 0.1."""
        return json.loads(self.model_dump_json(context={"stored": True}))  # type: ignore[no-any-return]

    def digest(self) -> str:
        """Return 16 hex digits that name this value: sha256 of its canonical stored JSON."""
        return json_digest(self.to_stored_dict())

    @classmethod
    def from_data(cls, data: Any, source: str = "", *, stored: bool = False) -> Self:
        """Validate plain data.

        Args:
            data: What YAML or JSON holds, usually a mapping.
            source: File or option that messages name.
            stored: Whether raysweep wrote the data: then former keys are no reason to warn.

        Raises:
            SpecError: One line for each problem.
        """
        try:
            return cls.model_validate(data, context=None if stored else {"source": source})
        except ValidationError as error:
            raise SpecError(_describe_validation_error(error, data, source)) from None


class EpochSchedule(Spec):
    """A spec that stands for one number at each epoch."""

    def value_at(self, epoch: int) -> float:
        """The number at `epoch` (0-based)."""
        raise NotImplementedError


def json_digest(data: Any) -> str:
    """16 hex digits of the sha256 of canonical JSON."""
    return hashlib.sha256(
        json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()[:16]


def flatten_spec(spec: Spec) -> dict[str, Any]:
    """Dotted path -> scalar, for every leaf of the spec."""
    return dict(_iter_leaves(spec.to_json_dict(), ""))


def warn_former_name(former: str, name: str, source: str = "") -> None:
    """Warn in one line that a setting has another name now."""
    prefix = f"{source}: " if source else ""
    warnings.warn(f"{prefix}{former!r} is now called {name!r}", FormerNameWarning, stacklevel=2)


def apply_overrides(
    spec: SpecT, overrides: Mapping[str, Any], *, on_missing: Literal["error", "ignore"] = "error"
) -> SpecT:
    """A copy of `spec` with the values at dotted paths replaced, validated as a whole.

    A path may contain `*`, which stands for any run of characters: `*.eps` is every eps there is.
    Setting a `kind` puts the other settings of that part back to their defaults. Raises SpecError
    for all problems at once; with `missing="ignore"`, paths that match nothing are skipped (the
    defaults that a data set brings).
    """
    data = spec.to_json_dict()
    problems: list[str] = []
    # Shallow paths first and a `kind` before its siblings, so that a part exists before its details
    # are set.
    for path, value in sorted(
        overrides.items(), key=lambda item: (item[0].count("."), not item[0].endswith("kind"))
    ):
        targets = _match_paths(path, data) or _match_former_paths(path, spec, data)
        if not targets:
            if on_missing == "error":
                problems.append(describe_unknown_path(path, data))
            continue
        for target in targets:
            _set_nested_value(data, target.split("."), value)
    try:
        result = type(spec).from_data(data)
    except SpecError as error:
        raise SpecError(
            [*problems, *(line for line in error.problems if line not in problems)]
        ) from None
    if problems:
        raise SpecError(problems)
    return result


def _match_former_paths(pattern: str, spec: Spec, data: JsonDict) -> list[str]:
    """Match a path that uses the key names of 0.1, and return the present paths."""
    stored = spec.to_stored_dict()
    present = [path for path, _ in _iter_nodes(spec.to_json_dict(), "")]
    names = dict(zip((path for path, _ in _iter_nodes(stored, "")), present, strict=True))
    found = [names[path] for path in _match_paths(pattern, stored) if path in names]
    for path in found[:1]:
        warn_former_name(pattern, path)
    return [path for path in found if _match_paths(path, data)]


def describe_unknown_path(path: str, data: JsonDict) -> str:
    """One line that names the nearest settings that do exist."""
    known = [path for path, _ in _iter_nodes(data, "")]
    leaf = path.rsplit(".", 1)[-1]
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    near_leaf = difflib.get_close_matches(leaf, {k.rsplit(".", 1)[-1] for k in known}, n=1)
    candidates = (
        same_leaf
        or [k for k in known if near_leaf and k.rsplit(".", 1)[-1] == near_leaf[0]]
        or known
    )
    nearest = difflib.get_close_matches(path, candidates, n=3, cutoff=0.0)
    return f"no setting {path!r}; nearest: {', '.join(nearest)}"


# More names than this are no line to read.
_MAX_LISTED_NAMES = 30


def describe_unknown_name(noun: str, name: object, known: Sequence[str]) -> str:
    """One line for a name that no table has."""
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    others = (
        f"known: {', '.join(known)}"
        if len(known) <= _MAX_LISTED_NAMES
        else "`raysweep list` names all"
    )
    hint = f"nearest: {', '.join(near)}" if near else others
    return f"no {noun} {name!r}; {hint}"


class _Yaml12Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: `on` and `no` are words, `1e-3` is a number."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL_TAG, _FLOAT_TAG)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Yaml12Loader.add_implicit_resolver(
    _BOOL_TAG, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Yaml12Loader.add_implicit_resolver(
    _FLOAT_TAG,
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$",
        re.I,
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """A YAML document or value. Raises yaml.YAMLError."""
    return yaml.load(text, _Yaml12Loader)  # a safe loader


def read_yaml(path: Path) -> JsonDict:
    """A mapping from a YAML file; SpecError in one line for anything else."""
    try:
        data = parse_yaml(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise SpecError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(data, dict):
        raise SpecError(f"{path}: expected a mapping of settings, got {type(data).__name__}")
    if odd := [key for key in data if not isinstance(key, str)]:
        raise SpecError(
            f"{path}: {odd[0]!r}: expected the name of a setting, got {type(odd[0]).__name__}"
        )
    return data


def is_safe_name(name: str) -> bool:
    """Whether a name is a folder's name on every system, and nothing more."""
    return 0 < len(name) <= 100 and name[0] != "." and all(c.isalnum() or c in "._-" for c in name)


def find_builtin_folder(folder_name: str) -> Path:
    """A folder of YAML that ships with raysweep: beside the package in a checkout, inside it in a
    wheel.
    """
    inside = Path(__file__).parent / folder_name
    return inside if inside.is_dir() else Path(__file__).parent.parent / folder_name


def _resolve_value_at(value: Any, epoch: int) -> Any:
    if isinstance(value, EpochSchedule):
        return value.value_at(epoch)
    if isinstance(value, Spec):
        return value.resolve_at(epoch)
    if isinstance(value, dict):
        resolved = {k: _resolve_value_at(v, epoch) for k, v in value.items()}
        return resolved if any(resolved[k] is not value[k] for k in value) else value
    return value


def _iter_nodes(data: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict):
        for key, value in data.items():
            path = f"{prefix}.{key}" if prefix else str(key)
            yield path, value
            yield from _iter_nodes(value, path)


def _iter_leaves(data: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for path, value in _iter_nodes(data, prefix):
        if not isinstance(value, dict):
            yield path, value if not isinstance(value, list) else json.dumps(value)


def _match_paths(pattern: str, data: JsonDict) -> list[str]:
    if "*" in pattern:
        return [p for p, _ in _iter_nodes(data, "") if fnmatch.fnmatchcase(p, pattern)]
    node: Any = data
    *parents, key = pattern.split(".")
    for part in parents:
        if not isinstance(node, dict) or part not in node:
            return []
        node = node[part]
    # A key that the part lacks now may be one that it has under another `kind`: pydantic is the
    # judge of that.
    addable = isinstance(node, dict) and (key in node or (parents and "kind" in node))
    return [pattern] if addable else []


def _set_nested_value(data: JsonDict, path_parts: list[str], value: Any) -> None:
    """Set the value at a path. Do nothing if a wider match of the same `*` has replaced the part
    that held it.
    """
    node: Any = data
    for part in path_parts[:-1]:
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        return
    if path_parts[-1] == "kind" and node.get("kind") != value:
        node.clear()
    # Each place gets its own copy: a deeper path may change it later, and the caller's value must
    # not change.
    node[path_parts[-1]] = copy.deepcopy(value)


def _describe_validation_error(error: ValidationError, data: Any, source: str) -> list[str]:
    prefix = f"{source}: " if source else ""
    lines = []
    for item in error.errors(include_url=False):
        key_is_wrong = item["type"] in ("unknown_setting", "missing")
        path, value = _locate_error(item["loc"], data, key_is_wrong)
        if item["type"] == "unknown_setting":
            head = path.rpartition(".")[0]
            near = ", ".join(f"{head}.{name}" if head else name for name in item["msg"].split())
            lines.append(f"{prefix}no setting {path!r}; nearest: {near}")
        elif item["type"] == "union_tag_invalid":
            tags = [tag.strip(" '") for tag in item["ctx"]["expected_tags"].split(",")]
            lines.append(
                f"{prefix}{path}: {describe_unknown_name('kind', item['ctx']['tag'], tags)}"
            )
        elif item["type"] == "missing":
            lines.append(f"{prefix}{path} is missing")
        elif item["type"] == "value_error" and isinstance(
            item.get("ctx", {}).get("error"), SpecError
        ):
            for line in item["ctx"]["error"].problems:
                lines.append(f"{prefix}{f'{path}: ' if path else ''}{line}")
        else:
            message = (
                item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            )
            message = _MIN_ITEMS_MESSAGE.sub(r"must have at least \1", message)
            lines.append(f"{prefix}{path} = {value!r}: {message}")
    return list(dict.fromkeys(lines))


def _add_suggestion(error: ErrorDetails, field_names: list[str]) -> InitErrorDetails:
    detail = InitErrorDetails(
        type=error["type"], loc=error["loc"], input=error["input"], ctx=error.get("ctx", {})
    )
    if error["type"] == "extra_forbidden":
        near = (
            difflib.get_close_matches(str(error["loc"][-1]), field_names, n=3, cutoff=0.3)
            or field_names
        )
        detail["type"] = PydanticCustomError("unknown_setting", " ".join(near))
    elif error["type"] == "unknown_setting":
        detail["type"] = PydanticCustomError("unknown_setting", error["msg"])
    return detail


def _locate_error(loc: tuple[int | str, ...], data: Any, is_key_error: bool) -> tuple[str, Any]:
    """Dotted path and value of a pydantic location, without the tags of unions that pydantic puts
    between.
    """
    parts: list[str] = []
    node: Any = data
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and isinstance(part, int):
            node = node[int(part)]
        elif not (last and is_key_error):
            continue
        parts.append(str(part))
    return ".".join(parts), node
