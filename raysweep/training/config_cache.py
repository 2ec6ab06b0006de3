"""Keeps the results of the last config builds: a search space builds the same configs many times.

Results are looked up by everything that they are computed from, so a lookup cannot be wrong, only
miss. They are shared, and nobody may change them; specs are frozen.
"""

import marshal
from collections.abc import Callable
from typing import Any, TypeVar

from raysweep.models import MODELS
from raysweep.spec import count_former_names

T = TypeVar("T")
# A config takes about 50 kB.
_MAX_RESULTS = 512
_results: dict[bytes, Any] = {}


def get_or_build(inputs: tuple[Any, ...], build: Callable[[], T]) -> T:
    """Return the result of an earlier build with the same inputs, or build it.

    Args:
        inputs: What decides the result besides the names of networks. Inputs that are no plain
            data, such as specs, are not looked up.
        build: Function that computes the result. Its errors are not kept, nor is a result that came
            with a warning about a former name, which the next build must repeat.

    Returns:
        The result, perhaps the same object as for an earlier call.
    """
    try:
        # The names are part of the key because a spec is valid only while its network is known.
        # Version 2 writes equal data always in the same way.
        key = marshal.dumps((inputs, tuple(MODELS)), 2)
    except ValueError:
        return build()
    n_former_names = count_former_names()
    # Put in again, the order is that of the last use.
    result = _results.pop(key, None)
    if result is None:
        result = build()
    if count_former_names() == n_former_names:
        _results[key] = result
    while len(_results) > _MAX_RESULTS:
        _results.pop(next(iter(_results)), None)
    return result  # type: ignore[no-any-return]
