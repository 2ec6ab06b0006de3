"""Keys with which stored results of attacks are signed, so that those of others are not believed.

The user's key is in a file that only the user can read. Each evaluation has a key of its own, which
is derived from it and travels to the processes that attack.
"""

import hmac
import logging
import os
import secrets
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from raysweep.file_privacy import (
    find_state_folder,
    make_folder_private,
    read_private_file,
    write_new_private_file,
)

logger = logging.getLogger(__name__)

KEY_FILE = "result_key"
_KEY_BYTES = 32


def derive_evaluation_key(evaluation: str) -> bytes:
    """Return the key that signs the results of one evaluation.

    Args:
        evaluation: Digest of the model, the data and the settings.

    Returns:
        32 bytes, the same for this user in each process. If the user's key can be neither read nor
        written, they are those of this process only, and a warning says so.
    """
    return hmac.digest(_load_user_key(), f"evaluation {evaluation}".encode(), "sha256")


def sign_arrays(key: bytes, file_name: str, arrays: Mapping[str, npt.NDArray[np.generic]]) -> bytes:
    """Compute the signature (HMAC-SHA256) of a stored result.

    Args:
        key: Key of the evaluation.
        file_name: Name of the file, which names the attack and its settings.
        arrays: Name -> array.

    Returns:
        32 bytes, which depend on all names, types, shapes and values.
    """
    mac = hmac.new(key, _frame(file_name.encode()), "sha256")
    for name in sorted(arrays):
        array = arrays[name]
        mac.update(_frame(f"{name} {array.dtype.str} {array.shape}".encode()))
        mac.update(np.ascontiguousarray(array).tobytes())
    return mac.digest()


def _frame(text: bytes) -> bytes:
    """Return a text behind its length, so that no other sequence of texts has the same bytes."""
    return len(text).to_bytes(8, "big") + text


@cache
def _load_user_key() -> bytes:
    """Return the key of this user; make one if there is none, or others could have read it."""
    try:
        path = find_state_folder() / KEY_FILE
        return _read_or_create_key(path)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        logger.warning(
            "results of attacks are signed for this process only: there is no place for your key "
            "(%s); a resumed evaluation will attack robust examples again. Set XDG_STATE_HOME to a "
            "folder that you can write",
            reason,
        )
        return secrets.token_bytes(_KEY_BYTES)


def _read_or_create_key(path: Path) -> bytes:
    """Return the key in a file, which is created if necessary."""
    make_folder_private(path.parent)
    saved = read_private_file(path)
    if saved is not None and (saved.exposed_mode or len(saved.content) != _KEY_BYTES):
        logger.warning(
            "%s is replaced by a new key: others could read it, or it was damaged. Stored results "
            "of attacks that it signed are checked as those of somebody else",
            path,
        )
        path.unlink()
        saved = None
    if saved is None:
        write_new_private_file(path, secrets.token_bytes(_KEY_BYTES))
        saved = read_private_file(path)
    if saved is None:
        raise FileNotFoundError(2, os.strerror(2), str(path))
    return saved.content
