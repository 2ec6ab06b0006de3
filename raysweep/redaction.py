"""Replace secrets in texts by `***`. Every text that leaves the program passes through here.

Errors, log entries, tracebacks, tags and what the terminal shows call `redact_secrets`. It removes
too much rather than too little where a text is unclear.
"""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, quote_plus

_MASK = "***"
_SECRET_WORDS = (
    r"passw(?:or)?d|passwort|passphrase|pwd|secret|token|credentials?|signature|cookie|authorization"
    r"|(?:access|account|api|private|secret|shared)[_-]?key(?:[_-]?id)?"
)
# The name of a secret ends with such a word. Names such as InvalidAuthToken are those of errors.
_SECRET_NAME = rf"(?!(?i:invalid|expired|missing|bad))[\w.-]*?(?i:{_SECRET_WORDS})"
_SECRET_NAME_PATTERN = re.compile(_SECRET_NAME)
_QUOTED_VALUE = r"\"(?:[^\"\\\n]|\\.)*\"?|'(?:[^'\\\n]|\\.)*'?"

_PEM_PATTERN = re.compile(
    r"-----BEGIN [^-\n]*-----.*?(?:-----END [^-\n]*-----|\Z)"
    # The beginning may have been cut off.
    r"|(?<![A-Za-z0-9+/=])[A-Za-z0-9+/=]{16,}(?:(?:\s|\\n)+[A-Za-z0-9+/=]+)*(?:\s|\\n)*"
    r"-----END [^-\n]*-----",
    re.DOTALL,
)
# Keys and tokens of well-known services.
_TOKEN_PATTERN = re.compile(
    r"\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_\w{8,}|github_pat_\w{8,}|glpat-[\w-]{16,}"
    r"|hf_\w{16,}|sk-[\w-]{16,}|xox[abprs]-[\w-]{8,}|ya29\.[\w-]{8,}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]+\.[\w-]*)"
)
_SCHEME = r"(?P<before>[A-Za-z][\w+.-]{0,20}:/{1,4})"
_HOST_FOLLOWS = r"@(?=[\w\[%.-])"
# A password may contain `/` and `@`, so it ends at the last `@` of the word.
_PASSWORD_PATTERN = re.compile(rf"{_SCHEME}[^\s:/]*:\S+{_HOST_FOLLOWS}")
_LOGIN_PATTERN = re.compile(rf"{_SCHEME}(?<=//)(?!(?:anonymous|\.\.\.)@)[^\s/]+{_HOST_FOLLOWS}")
# It may also contain spaces, and then ends at the last `@` before the next URL.
_SPACED_PASSWORD_PATTERN = re.compile(
    # A host with a port at the end of a word has no password: what follows is a sentence.
    rf"{_SCHEME}(?:(?![^\s:/]+:[1-9]\d{{0,4}}[]:;,.)'\"]*(?:\s|$))[^\s:/]*:(?=\S)|\*\*\*@)"
    rf"(?:(?!\w:/)[^\n])*{_HOST_FOLLOWS}"
)
_LOGIN_WITHOUT_SCHEME_PATTERN = re.compile(
    r"(?P<before>(?<![^\s'\"(=]))[^\s:/@'\"(=]+:(?=[^\s/])\S*@(?=[\w\[%.-])"
    r"|(?P<before_server>(?i:endpoint\w*|server|host|proxy|ur[il]|address)=(?:\w+://)?)[^\s&]*@"
)
_QUERY_PATTERN = re.compile(
    rf"(?P<before>[?&](?:{_SECRET_NAME}|(?i:sig|key|code|auth|pass|pw))=)(?!\*\*\*)[^\s&#'\"]+"
)
_ASSIGNMENT_PATTERN = re.compile(
    # The last part of a path, such as `/etc/passwd: cannot be read`, is no name of a secret.
    # Nor is that of the working directory, or of what a parser found in a file.
    rf"(?<![\w.=/-])(?!(?i:(?:old)?pwd[\"']?[ \t]*[:=][ \t]*[\"']?[/~]))"
    r"(?!(?<=(?i:unexpected) )(?i:token))"
    rf"(?P<before>{_SECRET_NAME}\\?[\"']?\s*[:=](?!//)[ \t]*)(?!\*\*\*)"
    rf"(?:{_QUOTED_VALUE}|[^\s\"'&,;)\]}}][^\n\"'&;)\]}}]*?(?=\s+[\w.-]+=|[\n\"'&;)\]}}]|$))"
)
_FLAG_PATTERN = re.compile(
    rf"(?P<before>--[\w-]*(?i:{_SECRET_WORDS})[= ])(?!\*\*\*)(?:{_QUOTED_VALUE}|\S+)"
)
_BEARER_PATTERN = re.compile(
    # Base64 text has a digit or a capital letter inside; words such as `basic research` have none.
    r"(?P<before>\b(?i:bearer )|\b(?i:basic )(?=[\w+/][a-z]*[A-Z0-9+/=]))[\w.+/=~-]{6,}"
)
# Shorter values of variables, such as `test`, are words of ordinary messages.
_MIN_SECRET_LENGTH = 8


def redact_secrets(text: str) -> str:
    """Replace secrets in a text by `***`.

    Args:
        text: Message, URI, command line or traceback.

    Returns:
        The text without the logins of URLs, secret fields of queries, values under names such as
        `secret_key`, keys in PEM format, keys of well-known services, and the values of environment
        variables with secret names.
    """
    return _redact_text(text, _list_environment_secrets())


def _redact_text(text: str, environment_secrets: Sequence[str]) -> str:
    """Replace secrets in a text, as `redact_secrets`; those of the environment are given."""
    if not text:
        return text
    if "-----" in text:
        text = _PEM_PATTERN.sub(_MASK, text)
    for secret in environment_secrets:
        text = text.replace(secret, _MASK)
    text = _TOKEN_PATTERN.sub(_MASK, text)
    if "@" in text:
        text = _PASSWORD_PATTERN.sub(_mask_login, text)
        text = _LOGIN_PATTERN.sub(_mask_login, text)
        text = _SPACED_PASSWORD_PATTERN.sub(_mask_login, text)
        text = _LOGIN_WITHOUT_SCHEME_PATTERN.sub(_mask_login, text)
    # Looking for characters that a pattern needs takes a hundredth of its time, and most texts of
    # log entries lack them.
    if "=" in text and ("?" in text or "&" in text):
        text = _mask_value(_QUERY_PATTERN, text)
    if "--" in text:
        text = _mask_value(_FLAG_PATTERN, text)
    if "=" in text or ":" in text:
        text = _mask_value(_ASSIGNMENT_PATTERN, text)
    if " " in text:
        text = _mask_value(_BEARER_PATTERN, text)
    return text


def _mask_value(pattern: re.Pattern[str], text: str) -> str:
    """Replace what follows the group `before` of each match."""
    return pattern.sub(rf"\g<before>{_MASK}", text)


def redact_value(value: Any) -> Any:
    """Replace secrets in a value of a log entry.

    Args:
        value: Text, number, list or dict; anything else becomes a text.

    Returns:
        The value with `***` for the secrets in all its texts, and for texts under the name of one.
    """
    # Once for all texts: reading the environment for each would take longer than everything else.
    return _redact_value(value, _list_environment_secrets())


def _redact_value(value: Any, environment_secrets: Sequence[str]) -> Any:
    """Replace secrets in a value, as `redact_value`; those of the environment are given."""
    if isinstance(value, str):
        return _redact_text(value, environment_secrets)
    if isinstance(value, Mapping):
        return {
            _redact_text(str(key), environment_secrets): _redact_item(
                str(key), value[key], environment_secrets
            )
            for key in value
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_redact_value(item, environment_secrets) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return _redact_text(str(value), environment_secrets)


def _mask_login(match: re.Match[str]) -> str:
    """Return the replacement of a URL's login."""
    before = next(filter(None, match.groups()), "")
    return f"{before}{_MASK}@"


def _redact_item(key: str, value: Any, environment_secrets: Sequence[str]) -> Any:
    """Redact the value of a key; text under the name of a secret is one."""
    if isinstance(value, str) and _is_secret_name(key):
        return _MASK
    return _redact_value(value, environment_secrets)


@functools.lru_cache(maxsize=1024)
def _is_secret_name(name: str) -> bool:
    """Return whether a variable or key of this name holds a secret."""
    return _SECRET_NAME_PATTERN.fullmatch(name) is not None


def _list_environment_secrets() -> list[str]:
    """Return the values of environment variables that hold secrets, also as URLs write them.

    Paths of files with secrets are left out. Longer values come first: one may be part of another.
    """
    secrets: set[str] = set()
    for name in filter(_is_secret_name, os.environ):
        value = os.environ.get(name, "")
        if len(value) >= _MIN_SECRET_LENGTH and not value.startswith(("/", "~")):
            secrets |= {value, quote(value), quote(value, safe=""), quote_plus(value)}
    return sorted(secrets, key=len, reverse=True)
