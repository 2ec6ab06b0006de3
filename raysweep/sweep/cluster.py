"""Ray: how to reach a cluster, quietly and without phoning home."""

import json
import logging
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

from raysweep.spec import SpecError

# JSON: what the cluster has at most, where an autoscaler scales it and does not tell (KubeRay).
_CLUSTER_MAX_VARIABLE = "RAYSWEEP_CLUSTER_MAX"
# `ray up` leaves the cluster's configuration here, in the home of the head.
_BOOTSTRAP_CONFIG_FILE = "ray_bootstrap_config.yaml"


@contextmanager
def connect_to_cluster(
    address: str | None = None, n_cpus: int | None = None
) -> Iterator[dict[str, float]]:
    """Resources of the cluster at `address` ('auto', 'host:port'), or of a new one on this machine.

    What an autoscaler may add counts. Raises SpecError in one line if there is no cluster at that
    address.
    """
    if address is not None and address != "auto":
        _require_reachable(address)
    if ray.is_initialized():
        yield cluster_capacity()
        return
    address = address or os.environ.get("RAY_ADDRESS")
    # Ray says at each start that it guards a local cluster with a token. It should; once in its
    # manual is enough.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    options = {"address": "local", "num_cpus": n_cpus} if address is None else {"address": address}
    try:
        with listen_on_loopback() if address is None else nullcontext():
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SpecError(f"no Ray cluster at --address {address or 'local'}: {reason}") from None
    try:
        with _treat_sigterm_as_interrupt():
            yield cluster_capacity()
    finally:
        ray.shutdown()


@contextmanager
def _treat_sigterm_as_interrupt() -> Iterator[None]:
    """In this block SIGTERM ends the driver as Ctrl-C does; Ray's own handler prints a stack and
    leaves at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def listen_on_loopback() -> Iterator[None]:
    """A Ray cluster that is started here listens on loopback alone, as Ray's own do on Windows and
    macOS.
    """
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    enabled, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]


def cluster_capacity() -> dict[str, float]:
    """Resources of all nodes together."""
    total: Counter[str] = Counter()
    for node in node_capacities():
        total.update(node)
    return dict(total)


def node_capacities() -> list[dict[str, float]]:
    """Resources of each node that the cluster has, or can have once its autoscaler has brought what
    is wanted.
    """
    if _CLUSTER_MAX_VARIABLE in os.environ:
        try:
            return [
                {
                    kind: float(amount)
                    for kind, amount in json.loads(os.environ[_CLUSTER_MAX_VARIABLE]).items()
                }
            ]
        except (ValueError, TypeError, AttributeError):
            raise SpecError(
                f'{_CLUSTER_MAX_VARIABLE}={os.environ[_CLUSTER_MAX_VARIABLE]!r}: expected JSON like {{"CPU": 32, "GPU": 8}}'
            ) from None
    present = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    file = Path.home() / _BOOTSTRAP_CONFIG_FILE
    return (
        [*present, *_unlaunched_node_capacities(json.loads(file.read_text()), len(present))]
        if file.is_file()
        else present
    )


def _unlaunched_node_capacities(
    cluster_config: dict[str, Any], n_live_nodes: int
) -> Iterator[dict[str, float]]:
    """The nodes that a `ray up` cluster of `present` nodes has not launched yet, of the types that
    have GPUs first.
    """
    types = [
        kind
        for name, kind in cluster_config["available_node_types"].items()
        if name != cluster_config["head_node_type"]
    ]
    types.sort(key=lambda kind: -kind["resources"].get("GPU", 0))
    all_workers = [
        kind["resources"]
        for kind in types
        for _ in range(kind.get("max_workers", 0))
        if kind["resources"]
    ]
    yield from islice(all_workers, n_live_nodes - 1, cluster_config["max_workers"])


def _require_reachable(address: str) -> None:
    """Fail at once where Ray would retry for a long time."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ValueError:
        raise SpecError(
            f"--address {address!r}: expected auto or host:port, for example 10.0.0.1:6379"
        ) from None
    except OSError as error:
        raise SpecError(
            f"no Ray cluster at --address {address}: {error.strerror or error}"
        ) from None
