"""Log records as JSON lines and as text for people, without secrets; facts about this process."""

import importlib.metadata
import json
import logging
import os
import platform
import re
import socket
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from raysweep.formatting import redact_secrets

JsonEntry = dict[str, Any]
"""One line of a log, as a dict."""

_PACKAGES = ("raysweep", "torch", "torchvision", "ray", "mlflow", "optuna", "numpy", "obstore")
# Attributes that every record has, or that say where it was shown: they are no fields of the entry.
_COMMON_ATTRIBUTES = frozenset(
    {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName", "shown"}
)
_ENTRY_KEYS = ("time", "level", "logger", "process", "host", "message", "exception")
_MAX_TRACEBACK_CHARACTERS = 20_000
_MAX_CAUSES = 20

_SECRET_WORDS = (
    "secret|password|passwd|token|credential|signature|access_?key|api_?key|private_?key"
)
_SECRET_NAME = re.compile(rf"(?i){_SECRET_WORDS}")
# NAME=VALUE, "NAME": "VALUE", and the value of an HTTP header.
_ASSIGNMENT_PATTERN = re.compile(
    rf"(?i)([\w-]*(?:{_SECRET_WORDS})[\w-]*[\"']?\s*=\s*[\"']?)[^\s\"'&,;]+"
    rf"|([\"'][\w-]*(?:{_SECRET_WORDS})[\w-]*[\"']\s*:\s*[\"'])[^\"']+"
    r"|(authorization[\"']?\s*[:=]\s*[\"']?)[^\n\"']+"
)
_AWS_KEY_PATTERN = re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")
_HTTP_LOGIN_PATTERN = re.compile(r"(https?://)[^\s/@]+(?=@)")
# Shorter values of variables, such as `test`, are words of ordinary messages.
_MIN_SECRET_LENGTH = 8


def format_json_line(record: logging.LogRecord, context: Mapping[str, Any]) -> str:
    """Format a record as one line of `log.jsonl`.

    Args:
        record: The record; attributes that `extra=` added to it become keys of the entry.
        context: Further keys, such as the number of the trial.

    Returns:
        A JSON object without a line break and without secrets.
    """
    return json.dumps(_make_entry(record, context), default=str)


def _make_entry(record: logging.LogRecord, context: Mapping[str, Any]) -> JsonEntry:
    """Convert a record to an entry without secrets."""
    entry: JsonEntry = {
        "time": _format_time(record.created),
        "level": record.levelname,
        "logger": record.name,
        "process": record.process,
        "host": socket.gethostname(),
        **context,
        "message": record.getMessage(),
    }
    for name, value in record.__dict__.items():
        if name not in _COMMON_ATTRIBUTES and name not in _ENTRY_KEYS:
            entry[name] = value
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        text = "".join(traceback.format_exception(error))
        entry["exception"] = {
            "causes": describe_causes(error),
            "traceback": text[-_MAX_TRACEBACK_CHARACTERS:],
        }
    return {key: _redact_value(value) for key, value in entry.items()}


def describe_causes(error: BaseException) -> list[JsonEntry]:
    """Describe an exception and what caused it.

    Args:
        error: The exception.

    Returns:
        `type` and `message` of the exception, then of its cause, and so on to the first one. An
        exception that was being handled counts as the cause, also where `from None` hides it.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain and len(chain) < _MAX_CAUSES:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return [{"type": type(one).__name__, "message": str(one)} for one in chain]


def format_entry(entry: JsonEntry) -> str:
    """Format an entry for people.

    Args:
        entry: A line of `log.jsonl`.

    Returns:
        Time (UTC), level, who wrote it, and the message; below it an indented line for each cause
        of an exception.
    """
    head = f"{entry.get('time', ''):<24} {entry.get('level', ''):<7} {describe_writer(entry)}"
    lines = [f"{head}  {entry.get('message', '')}"]
    causes = (entry.get("exception") or {}).get("causes") or []
    for number, cause in enumerate(causes):
        introduction = "because of " if number else ""
        message = "\n        ".join(str(cause.get("message", "")).splitlines())
        lines.append(f"    {introduction}{cause.get('type', '')}: {message}")
    return "\n".join(lines)


def describe_writer(entry: JsonEntry) -> str:
    """Return who wrote an entry: `trial 0003` or a command, with its process and host."""
    who = str(entry.get("writer", ""))
    if who == "trial":
        who = f"trial {entry.get('trial', 0):04d}"
        if "rank" in entry:
            who += f" worker {entry['rank']}"
    return f"[{who} process {entry.get('process', '?')} on {entry.get('host', '?')}]"


def describe_process() -> JsonEntry:
    """Describe the versions of packages and the machine of this process.

    Returns:
        `versions` and `machine`. PyTorch is not imported for this, so `cuda` (the version for which
        it was built) is missing where nothing else has imported it.
    """
    versions: JsonEntry = {"python": platform.python_version(), **_package_versions()}
    torch = sys.modules.get("torch")
    if torch is not None:
        versions["cuda"] = torch.version.cuda
    return {"versions": versions, "machine": _describe_machine()}


def summarize_process() -> str:
    """Summarize `describe_process` in one line."""
    facts = describe_process()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    machine = facts["machine"]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    return (
        f"{versions}; {machine['host']}: {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB memory, {gpus}"
    )


def read_entries(texts: Iterable[str]) -> list[JsonEntry]:
    """Read the contents of log files.

    Args:
        texts: JSON lines, in any order.

    Returns:
        All entries in the order of their times, each by the clock of the machine that wrote it. A
        line that is not JSON, because a process was killed while it wrote, becomes an entry whose
        message is the line.
    """
    entries: list[JsonEntry] = []
    for text in texts:
        last_time = ""
        for line in filter(str.strip, text.split("\n")):
            entry = _parse_line(line, last_time)
            last_time = str(entry["time"])
            entries.append(entry)
    return sorted(entries, key=lambda entry: str(entry["time"]))


def _parse_line(line: str, last_time: str) -> JsonEntry:
    """Parse a line; a damaged one gets the time of the line before it."""
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if isinstance(entry, dict) and "time" in entry:
        return entry
    return {"time": last_time, "level": "DAMAGED", "message": line}


def redact_log_text(text: str) -> str:
    """Replace secrets in a text by `***`.

    Args:
        text: Message, URI, command line or traceback.

    Returns:
        The text without the passwords of URLs, AWS keys, values that are assigned to names such as
        `secret_key`, and the values of environment variables with such names.
    """
    for secret in _environment_secrets():
        text = text.replace(secret, "***")
    text = _AWS_KEY_PATTERN.sub("***", text)
    text = _ASSIGNMENT_PATTERN.sub(r"\1\2\3***", text)
    text = _HTTP_LOGIN_PATTERN.sub(r"\1***", text)
    return "\n".join(redact_secrets(line) for line in text.split("\n"))


def _environment_secrets() -> Iterator[str]:
    """Yield the values of environment variables that hold secrets, not paths of files with them."""
    for name, value in os.environ.items():
        is_secret = len(value) >= _MIN_SECRET_LENGTH and _SECRET_NAME.search(name)
        if is_secret and not value.startswith(("/", "~")):
            yield value


def _redact_value(value: Any) -> Any:
    """Redact all texts in a value of an entry."""
    if isinstance(value, str):
        return redact_log_text(value)
    if isinstance(value, Mapping):
        return {str(key): _redact_item(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_redact_value(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact_log_text(str(value))


def _redact_item(key: str, value: Any) -> Any:
    """Redact the value of a key; text under the name of a secret is one."""
    if isinstance(value, str) and _SECRET_NAME.search(key):
        return "***"
    return _redact_value(value)


def _format_time(seconds: float) -> str:
    """Format Unix seconds as UTC with milliseconds, such as 2026-03-01T02:00:00.123Z."""
    time = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return time.replace("+00:00", "Z")


@cache
def _package_versions() -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@cache
def _describe_machine() -> JsonEntry:
    """Describe the machine without starting anything on its GPUs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": _list_gpus(),
        "gpu_driver": _read_gpu_driver(),
    }


def _list_gpus() -> list[str]:
    """Return the names of this machine's NVIDIA GPUs."""
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        match = re.search(r"Model:\s*(.+)", file.read_text(errors="replace"))
        names.append(match[1].strip() if match else "NVIDIA GPU")
    return names


def _read_gpu_driver() -> str:
    """Return the version line of NVIDIA's driver; empty without one."""
    file = Path("/proc/driver/nvidia/version")
    if not file.is_file():
        return ""
    return file.read_text(errors="replace").partition("\n")[0].strip()
