"""Replace secrets in texts and in the values of log entries by `***`."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from raysweep.formatting import redact_secrets

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


def redact_value(value: Any) -> Any:
    """Replace secrets in a value of a log entry.

    Args:
        value: Text, number, list or dict; anything else becomes a text.

    Returns:
        The value with `***` for the secrets in all its texts, and for texts under the name of one.
    """
    if isinstance(value, str):
        return redact_log_text(value)
    if isinstance(value, Mapping):
        return {str(key): _redact_item(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redact_value(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact_log_text(str(value))


def _redact_item(key: str, value: Any) -> Any:
    """Redact the value of a key; text under the name of a secret is one."""
    if isinstance(value, str) and _SECRET_NAME.search(key):
        return "***"
    return redact_value(value)


def _environment_secrets() -> Iterator[str]:
    """Yield the values of environment variables that hold secrets, not paths of files with them."""
    for name, value in os.environ.items():
        is_secret = len(value) >= _MIN_SECRET_LENGTH and _SECRET_NAME.search(name)
        if is_secret and not value.startswith(("/", "~")):
            yield value
