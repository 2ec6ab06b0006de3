"""Ports for servers that tests start."""

import itertools
import os
import socket

# Ray's workers listen on ports from 10002 to 19999, and systems open others from 32768 on, or from
# 49152, for whoever asks for any port. Each process of pytest-xdist has a thousand between them.
_FIRST = 20_000
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 12
_OFFSETS = itertools.count(os.getpid())


def choose_free_port() -> int:
    """Return a port on loopback that is free, and that nobody is given who asks for any port."""
    for offset in itertools.islice(_OFFSETS, 1000):
        port = _FIRST + 1000 * _WORKER + offset % 1000
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise RuntimeError("no port is free")
