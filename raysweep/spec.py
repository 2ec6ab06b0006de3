"""Spec: a frozen, validated value that is also the thing it describes, and the four operations every spec has."""

import copy
import difflib
import fnmatch
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
S = TypeVar("S", bound="Spec")
_AT_LEAST = re.compile(r"^\w+ should have at least (\d+ items?).*$")
Json = dict[str, Any]


class SpecError(ValueError):
    """A user's mistake. Each problem is one line that names the key, the value and what is allowed."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class Spec(BaseModel):
    """Base of everything that can be written in YAML, searched, logged and stored in a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", allow_inf_nan=True)

    @model_validator(mode="wrap")
    @classmethod
    def _suggest(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Give each unknown key the nearest settings that this class does have."""
        try:
            return handler(data)
        except ValidationError as error:
            details = [_with_suggestion(item, list(cls.model_fields)) for item in error.errors(include_url=False)]
            raise ValidationError.from_exception_data(cls.__name__, details) from None

    def at(self, epoch: int) -> Self:
        """This spec with every schedule replaced by its value at `epoch` (0-based)."""
        changed = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            resolved = _at(value, epoch)
            if resolved is not value:
                changed[name] = resolved
        return self.model_copy(update=changed) if changed else self

    def json_dict(self) -> Json:
        """Plain data that `load` reads back; inf and nan are written as strings."""
        return json.loads(self.model_dump_json())  # type: ignore[no-any-return]

    def digest(self) -> str:
        """16 hex digits that name this value: sha256 of its canonical JSON."""
        return digest(self.json_dict())

    @classmethod
    def load(cls, data: Any, source: str = "") -> Self:
        """Validate plain data. Raises SpecError with one line for each problem."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise SpecError(_problems(error, data, source)) from None


class Varying(Spec):
    """A spec that stands for one number at each epoch."""

    def value(self, epoch: int) -> float:
        """The number at `epoch` (0-based)."""
        raise NotImplementedError


def digest(data: Any) -> str:
    """16 hex digits of the sha256 of canonical JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def flatten(spec: Spec) -> dict[str, Any]:
    """Dotted path -> scalar, for every leaf of the spec."""
    return dict(_leaves(spec.json_dict(), ""))


def override(spec: S, changes: Mapping[str, Any], *, missing: Literal["error", "ignore"] = "error") -> S:
    """A copy of `spec` with the values at dotted paths replaced, validated as a whole.

    A path may contain `*`, which stands for any run of characters: `*.eps` is every eps there is. Setting a `kind` puts
    the other settings of that part back to their defaults. Raises SpecError for all problems at once; with
    `missing="ignore"`, paths that match nothing are skipped (the defaults that a data set brings).
    """
    data = spec.json_dict()
    problems: list[str] = []
    # Shallow paths first and a `kind` before its siblings, so that a part exists before its details are set.
    for path, value in sorted(changes.items(), key=lambda item: (item[0].count("."), not item[0].endswith("kind"))):
        targets = _match(path, data)
        if not targets:
            if missing == "error":
                problems.append(unknown_setting(path, data))
            continue
        for target in targets:
            _assign(data, target.split("."), value)
    try:
        result = type(spec).load(data)
    except SpecError as error:
        raise SpecError([*problems, *(line for line in error.problems if line not in problems)]) from None
    if problems:
        raise SpecError(problems)
    return result


def unknown_setting(path: str, data: Json) -> str:
    """One line that names the nearest settings that do exist."""
    known = [path for path, _ in _nodes(data, "")]
    leaf = path.rsplit(".", 1)[-1]
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    near_leaf = difflib.get_close_matches(leaf, {k.rsplit(".", 1)[-1] for k in known}, n=1)
    candidates = same_leaf or [k for k in known if near_leaf and k.rsplit(".", 1)[-1] == near_leaf[0]] or known
    nearest = difflib.get_close_matches(path, candidates, n=3, cutoff=0.0)
    return f"no setting {path!r}; nearest: {', '.join(nearest)}"


# More names than this are no line to read.
_MANY = 30


def unknown_name(what: str, name: object, known: Sequence[str]) -> str:
    """One line for a name that no table has."""
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    others = f"known: {', '.join(known)}" if len(known) <= _MANY else "`raysweep list` names all"
    hint = f"nearest: {', '.join(near)}" if near else others
    return f"no {what} {name!r}; {hint}"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: `on` and `no` are words, `1e-3` is a number."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$", re.I),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """A YAML document or value. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)  # a safe loader


def read_yaml(path: Path) -> Json:
    """A mapping from a YAML file; SpecError in one line for anything else."""
    try:
        data = parse_yaml(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise SpecError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(data, dict):
        raise SpecError(f"{path}: expected a mapping of settings, got {type(data).__name__}")
    if odd := [key for key in data if not isinstance(key, str)]:
        raise SpecError(f"{path}: {odd[0]!r}: expected the name of a setting, got {type(odd[0]).__name__}")
    return data


def is_plain(name: str) -> bool:
    """Whether a name is a folder's name on every system, and nothing more."""
    return 0 < len(name) <= 100 and name[0] != "." and all(c.isalnum() or c in "._-" for c in name)


def shipped(folder: str) -> Path:
    """A folder of YAML that ships with raysweep: beside the package in a checkout, inside it in a wheel."""
    inside = Path(__file__).parent / folder
    return inside if inside.is_dir() else Path(__file__).parent.parent / folder


def _at(value: Any, epoch: int) -> Any:
    if isinstance(value, Varying):
        return value.value(epoch)
    if isinstance(value, Spec):
        return value.at(epoch)
    if isinstance(value, dict):
        resolved = {k: _at(v, epoch) for k, v in value.items()}
        return resolved if any(resolved[k] is not value[k] for k in value) else value
    return value


def _nodes(data: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict):
        for key, value in data.items():
            path = f"{prefix}.{key}" if prefix else str(key)
            yield path, value
            yield from _nodes(value, path)


def _leaves(data: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for path, value in _nodes(data, prefix):
        if not isinstance(value, dict):
            yield path, value if not isinstance(value, list) else json.dumps(value)


def _match(path: str, data: Json) -> list[str]:
    if "*" in path:
        return [p for p, _ in _nodes(data, "") if fnmatch.fnmatchcase(p, path)]
    node: Any = data
    *parents, key = path.split(".")
    for part in parents:
        if not isinstance(node, dict) or part not in node:
            return []
        node = node[part]
    # A key that the part lacks now may be one that it has under another `kind`: pydantic is the judge of that.
    addable = isinstance(node, dict) and (key in node or (parents and "kind" in node))
    return [path] if addable else []


def _assign(data: Json, parts: list[str], value: Any) -> None:
    """Set the value at a path. Do nothing if a wider match of the same `*` has replaced the part that held it."""
    node: Any = data
    for part in parts[:-1]:
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        return
    if parts[-1] == "kind" and node.get("kind") != value:
        node.clear()
    # Each place gets its own copy: a deeper path may change it later, and the caller's value must not change.
    node[parts[-1]] = copy.deepcopy(value)


def _problems(error: ValidationError, data: Any, source: str) -> list[str]:
    prefix = f"{source}: " if source else ""
    lines = []
    for item in error.errors(include_url=False):
        key_is_wrong = item["type"] in ("unknown_setting", "missing")
        path, value = _locate(item["loc"], data, key_is_wrong)
        if item["type"] == "unknown_setting":
            head = path.rpartition(".")[0]
            near = ", ".join(f"{head}.{name}" if head else name for name in item["msg"].split())
            lines.append(f"{prefix}no setting {path!r}; nearest: {near}")
        elif item["type"] == "union_tag_invalid":
            tags = [tag.strip(" '") for tag in item["ctx"]["expected_tags"].split(",")]
            lines.append(f"{prefix}{path}: {unknown_name('kind', item['ctx']['tag'], tags)}")
        elif item["type"] == "missing":
            lines.append(f"{prefix}{path} is missing")
        elif item["type"] == "value_error" and isinstance(item.get("ctx", {}).get("error"), SpecError):
            for line in item["ctx"]["error"].problems:
                lines.append(f"{prefix}{f'{path}: ' if path else ''}{line}")
        else:
            message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            message = _AT_LEAST.sub(r"must have at least \1", message)
            lines.append(f"{prefix}{path} = {value!r}: {message}")
    return list(dict.fromkeys(lines))


def _with_suggestion(item: ErrorDetails, fields: list[str]) -> InitErrorDetails:
    detail = InitErrorDetails(type=item["type"], loc=item["loc"], input=item["input"], ctx=item.get("ctx", {}))
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), fields, n=3, cutoff=0.3) or fields
        detail["type"] = PydanticCustomError("unknown_setting", " ".join(near))
    elif item["type"] == "unknown_setting":
        detail["type"] = PydanticCustomError("unknown_setting", item["msg"])
    return detail


def _locate(loc: tuple[int | str, ...], data: Any, key_is_wrong: bool) -> tuple[str, Any]:
    """Dotted path and value of a pydantic location, without the tags of unions that pydantic puts between."""
    parts: list[str] = []
    node: Any = data
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and isinstance(part, int):
            node = node[int(part)]
        elif not (last and key_is_wrong):
            continue
        parts.append(str(part))
    return ".".join(parts), node
