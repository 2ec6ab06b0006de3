"""Ray: how to reach a cluster, quietly and without phoning home."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from raysweep.spec import SpecError


@contextmanager
def connected(address: str | None = None, cpus: int | None = None) -> Iterator[dict[str, float]]:
    """Resources of the cluster at `address` ('auto', 'host:port'), or of a new one on this machine.

    Raises SpecError in one line if there is no cluster at that address.
    """
    if address is not None and address != "auto":
        _reach(address)
    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    address = address or os.environ.get("RAY_ADDRESS")
    # Ray says at each start that it guards a local cluster with a token. It should; once in its manual is enough.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    options = {"address": "local", "num_cpus": cpus} if address is None else {"address": address}
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SpecError(f"no Ray cluster at --address {address or 'local'}: {reason}") from None
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def nodes() -> list[dict[str, float]]:
    """What each living node of the cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _reach(address: str) -> None:
    """Fail at once where Ray would retry for a long time."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ValueError:
        raise SpecError(f"--address {address!r}: expected auto or host:port, for example 10.0.0.1:6379") from None
    except OSError as error:
        raise SpecError(f"no Ray cluster at --address {address}: {error.strerror or error}") from None
