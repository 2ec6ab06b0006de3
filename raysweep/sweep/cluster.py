"""Connect to a Ray cluster, and look up its resources."""

# ruff: noqa: E402
from raysweep.sweep.ray_environment import set_ray_environment

set_ray_environment()

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
from types import FrameType
from typing import Any

import ray
from ray._private import ray_constants

from raysweep.spec import SpecError

logger = logging.getLogger(__name__)

# JSON: the resources that the cluster can have at most, where the autoscaler does not publish them
# (KubeRay).
_CLUSTER_MAX_VARIABLE = "RAYSWEEP_CLUSTER_MAX"
# `ray up` writes the cluster's configuration to this file in the home folder of the head node.
_BOOTSTRAP_CONFIG_FILE = "ray_bootstrap_config.yaml"


@contextmanager
def connect_to_cluster(
    address: str | None = None, n_cpus: int | None = None
) -> Iterator[dict[str, float]]:
    """Connect to a Ray cluster in this block, or start one on this machine.

    Args:
        address: `auto` or `host:port`; None for `RAY_ADDRESS` or, if that is not set, a new cluster
            on this machine. A connection that is already open is used as it is.
        n_cpus: Number of CPUs of a new cluster; by default all of this machine.

    Yields:
        Resources of all nodes together, see `cluster_capacity`.

    Raises:
        SpecError: If there is no cluster at the address, in one line.
    """
    if address is not None and address != "auto":
        _require_reachable(address)
    if ray.is_initialized():
        yield cluster_capacity()
        return
    address = address or os.environ.get("RAY_ADDRESS")
    # At each start Ray logs that it protects a local cluster with a token.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    options = {"address": "local", "num_cpus": n_cpus} if address is None else {"address": address}
    try:
        with listen_on_loopback() if address is None else nullcontext():
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SpecError(f"no Ray cluster at --address {address or 'local'}: {reason}") from None
    _log_nodes(address)
    try:
        with _treat_sigterm_as_interrupt():
            yield cluster_capacity()
    finally:
        ray.shutdown()


def _log_nodes(address: str | None) -> None:
    """Log the nodes of the cluster and what they have."""
    nodes = [
        {
            "node": node["NodeManagerHostname"],
            "alive": node["Alive"],
            "resources": {kind: node["Resources"].get(kind, 0) for kind in ("CPU", "GPU")},
        }
        for node in ray.nodes()
    ]
    n_alive = sum(bool(node["alive"]) for node in nodes)
    where = f"connected to the Ray cluster at {address}" if address else "started Ray here"
    logger.info("%s: %d nodes of %d are alive", where, n_alive, len(nodes), extra={"nodes": nodes})


@contextmanager
def listen_on_loopback() -> Iterator[None]:
    """Make a Ray cluster that is started in this block listen on loopback only.

    That is Ray's default on Windows and macOS.
    """
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    was_enabled, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = was_enabled
        del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]


def cluster_capacity() -> dict[str, float]:
    """Add up the resources of all nodes, including nodes that an autoscaler may still add.

    Returns:
        Amounts by Ray's names, such as `CPU` and `GPU`.

    Raises:
        SpecError: If `RAYSWEEP_CLUSTER_MAX` is malformed.
    """
    total: Counter[str] = Counter()
    for node in node_capacities():
        total.update(node)
    return dict(total)


def node_capacities() -> list[dict[str, float]]:
    """List the resources of each node, including nodes that an autoscaler may still add.

    Returns:
        Amounts by Ray's names for each node. A cluster that states its maximum in
        `RAYSWEEP_CLUSTER_MAX` counts as one node.

    Raises:
        SpecError: If `RAYSWEEP_CLUSTER_MAX` is malformed.
    """
    if _CLUSTER_MAX_VARIABLE in os.environ:
        return [_parse_max_cluster_resources(os.environ[_CLUSTER_MAX_VARIABLE])]
    live_nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    bootstrap_config = Path.home() / _BOOTSTRAP_CONFIG_FILE
    if not bootstrap_config.is_file():
        return live_nodes
    config = json.loads(bootstrap_config.read_text())
    return [*live_nodes, *_unlaunched_node_capacities(config, len(live_nodes))]


@contextmanager
def _treat_sigterm_as_interrupt() -> Iterator[None]:
    """Make SIGTERM end the driver as Ctrl-C does in this block.

    Ray's own handler prints a stack and exits at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        logger.warning("received SIGTERM", extra={"shown": True})
        signal.raise_signal(signal.SIGINT)

    previous_handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def _parse_max_cluster_resources(text: str) -> dict[str, float]:
    """Parse the value of `RAYSWEEP_CLUSTER_MAX`; SpecError if it is malformed."""
    try:
        return {kind: float(amount) for kind, amount in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        raise SpecError(
            f'{_CLUSTER_MAX_VARIABLE}={text!r}: expected JSON like {{"CPU": 32, "GPU": 8}}'
        ) from None


def _unlaunched_node_capacities(
    cluster_config: dict[str, Any], n_live_nodes: int
) -> Iterator[dict[str, float]]:
    """Yield the workers that a `ray up` cluster can still launch, those with most GPUs first."""
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
    # One of the live nodes is the head.
    yield from islice(all_workers, n_live_nodes - 1, cluster_config["max_workers"])


def _require_reachable(address: str) -> None:
    """Raise SpecError at once for an address where Ray would retry for a long time."""
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
