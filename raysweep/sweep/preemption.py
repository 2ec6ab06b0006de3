"""React to SIGTERM in a trial's process, whose machine is about to be taken away.

The trial saves its unfinished epoch, then its process exits.
"""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from raysweep.logs import close_logs

logger = logging.getLogger(__name__)

# Exit status by which shells report an end by SIGTERM.
_SIGTERM_EXIT_CODE = 128 + signal.SIGTERM


class _SigtermState:
    """State of this process.

    Attributes:
        requested: Whether the process has received SIGTERM.
        deferred: Whether SIGTERM only sets `requested`, instead of ending the process.
    """

    requested = False
    deferred = False


def termination_requested() -> bool:
    """Return whether this process has received SIGTERM."""
    return _SigtermState.requested


@contextmanager
def defer_sigterm() -> Iterator[None]:
    """Keep SIGTERM from ending the process in this block.

    The code in the block polls `termination_requested`, saves its work, and calls `exit_preempted`.
    """
    _SigtermState.deferred = True
    try:
        yield
    finally:
        _SigtermState.deferred = False


def exit_preempted() -> None:
    """Exit this process at once after SIGTERM.

    Tune finds a dead process and starts the trial again on another machine.
    """
    logger.warning("this process ends after SIGTERM; the trial starts again elsewhere")
    close_logs()
    os._exit(_SIGTERM_EXIT_CODE)


class PreemptibleMixin:
    """Mixin for the class that Tune makes of a function: installs the SIGTERM handler.

    Tune runs the function in a thread, but signal handlers can only be installed in the main
    thread, where `setup` runs.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Install the handler, then set up Tune's class."""
        signal.signal(signal.SIGTERM, _handle_sigterm)
        super().setup(config)  # type: ignore[misc]


def _handle_sigterm(signal_number: int, frame: FrameType | None) -> None:
    """Remember the request; exit unless SIGTERM is deferred."""
    _SigtermState.requested = True
    logger.warning("received SIGTERM", extra={"deferred": _SigtermState.deferred})
    if not _SigtermState.deferred:
        sys.exit(_SIGTERM_EXIT_CODE)
