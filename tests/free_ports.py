"""Ports for servers that tests start."""

import itertools
import os
import socket

# Above the ports of Ray's workers (10002 to 19999) and below the ephemeral ports, which the kernel
# gives to sockets that bind to port 0 (from 32768 on Linux, from 49152 on macOS). Each process of
# pytest-xdist has 1,000 ports, for up to 12 processes.
_FIRST = 20_000
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 12
_OFFSETS = itertools.count(os.getpid())


def choose_free_port() -> int:
    """Return a free port on loopback that is no ephemeral port, so that it stays free until the
    server binds it: the kernel gives it to nobody else.

    Raises:
        RuntimeError: If none of this process's 1,000 ports is free.
    """
    for offset in itertools.islice(_OFFSETS, 1000):
        port = _FIRST + 1000 * _WORKER + offset % 1000
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise RuntimeError("no port is free")
