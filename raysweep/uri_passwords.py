"""Passwords of URIs that stand in the environment or in a file, not in the URI itself.

The command line of a process is visible to all users of its machine. So `--optuna` and
$MLFLOW_TRACKING_URI may name a variable in place of a password:
`postgresql://me:${OPTUNA_PASSWORD}@host/db`.
"""

import os
import re
from pathlib import Path
from urllib.parse import quote

from raysweep.errors import SpecError

_VARIABLE_PATTERN = re.compile(r"\$\{(\w+)\}")


def fill_in_passwords(uri: str, source: str) -> str:
    """Replace each `${NAME}` of a URI by an environment variable.

    Args:
        uri: The URI, as it may be shown.
        source: Option or variable that gave the URI, for errors.

    Returns:
        The URI with the value of $NAME, or else with the first line of the file that $NAME_FILE
        names, percent-encoded. It must not be shown.

    Raises:
        SpecError: Neither variable is set, or the file cannot be read.
    """

    def read_value(match: re.Match[str]) -> str:
        return quote(_read_password(match[1], source), safe="")

    return _VARIABLE_PATTERN.sub(read_value, uri)


def _read_password(name: str, source: str) -> str:
    """Return the value of a variable, or else the first line of the file of `NAME_FILE`."""
    if name in os.environ:
        return os.environ[name]
    file = os.environ.get(f"{name}_FILE")
    if file is None:
        raise SpecError(
            f"{source}: ${{{name}}}: set the environment variable {name} or {name}_FILE"
        )
    try:
        return Path(file).read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise SpecError(f"{source}: {name}_FILE={file}: cannot be read: {reason}") from error
