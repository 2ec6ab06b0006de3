"""Log requests to a bucket that take long: obstore repeats them without telling."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

# Seconds without an answer after which a request is logged. Most take less than one second.
_SLOW_AFTER = 10.0


@contextmanager
def log_slow_request(uri: str) -> Iterator[None]:
    """Context manager around one request, with all of its repetitions.

    It logs that no answer has come for some seconds, while the request is still repeated, and later
    how the request ended.

    Args:
        uri: URI of the file or folder.
    """
    started_at = time.monotonic()
    timer = threading.Timer(_SLOW_AFTER, _log_wait, args=(uri,))
    timer.daemon = True
    timer.start()
    try:
        yield
    except BaseException as error:
        _log_end(uri, started_at, f"failed: {type(error).__name__}")
        raise
    else:
        _log_end(uri, started_at, "was answered")
    finally:
        timer.cancel()


def _log_wait(uri: str) -> None:
    """Log that a request is still waiting."""
    logger.warning(
        "%s: a request has taken %g s so far; it is repeated as long as the bucket does not answer",
        uri,
        _SLOW_AFTER,
        extra={"event": "slow_request", "uri": uri},
    )


def _log_end(uri: str, started_at: float, how: str) -> None:
    """Log how a request ended that was slow."""
    seconds = time.monotonic() - started_at
    if seconds >= _SLOW_AFTER:
        logger.warning(
            "%s: the request %s after %.1f s",
            uri,
            how,
            seconds,
            extra={"event": "slow_request_end", "uri": uri, "seconds": round(seconds, 1)},
        )
