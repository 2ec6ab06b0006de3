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
_MAX = "RAYSWEEP_CLUSTER_MAX"
# `ray up` leaves the cluster's configuration here, in the home of the head.
_BOOTSTRAP = "ray_bootstrap_config.yaml"


@contextmanager
def connected(address: str | None = None, cpus: int | None = None) -> Iterator[dict[str, float]]:
    """Resources of the cluster at `address` ('auto', 'host:port'), or of a new one on this machine.

    What an autoscaler may add counts. Raises SpecError in one line if there is no cluster at that address.
    """
    if address is not None and address != "auto":
        _reach(address)
    if ray.is_initialized():
        yield capacity()
        return
    address = address or os.environ.get("RAY_ADDRESS")
    # Ray says at each start that it guards a local cluster with a token. It should; once in its manual is enough.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    options = {"address": "local", "num_cpus": cpus} if address is None else {"address": address}
    try:
        with loopback() if address is None else nullcontext():
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SpecError(f"no Ray cluster at --address {address or 'local'}: {reason}") from None
    try:
        with _term_is_ctrl_c():
            yield capacity()
    finally:
        ray.shutdown()


@contextmanager
def _term_is_ctrl_c() -> Iterator[None]:
    """In this block SIGTERM ends the driver as Ctrl-C does; Ray's own handler prints a stack and leaves at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def loopback() -> Iterator[None]:
    """A Ray cluster that is started here listens on loopback alone, as Ray's own do on Windows and macOS."""
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    enabled, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]


def capacity() -> dict[str, float]:
    """Resources of all nodes together."""
    total: Counter[str] = Counter()
    for node in nodes():
        total.update(node)
    return dict(total)


def nodes() -> list[dict[str, float]]:
    """Resources of each node that the cluster has, or can have once its autoscaler has brought what is wanted."""
    if _MAX in os.environ:
        try:
            return [{kind: float(amount) for kind, amount in json.loads(os.environ[_MAX]).items()}]
        except (ValueError, TypeError, AttributeError):
            raise SpecError(f'{_MAX}={os.environ[_MAX]!r}: expected JSON like {{"CPU": 32, "GPU": 8}}') from None
    present = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    file = Path.home() / _BOOTSTRAP
    return [*present, *_launchable(json.loads(file.read_text()), len(present))] if file.is_file() else present


def _launchable(config: dict[str, Any], present: int) -> Iterator[dict[str, float]]:
    """The nodes that a `ray up` cluster of `present` nodes has not launched yet, of the types that have GPUs first."""
    types = [kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]]
    types.sort(key=lambda kind: -kind["resources"].get("GPU", 0))
    all_workers = [kind["resources"] for kind in types for _ in range(kind.get("max_workers", 0)) if kind["resources"]]
    yield from islice(all_workers, present - 1, config["max_workers"])


def _reach(address: str) -> None:
    """Fail at once where Ray would retry for a long time."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ValueError:
        raise SpecError(f"--address {address!r}: expected auto or host:port, for example 10.0.0.1:6379") from None
    except OSError as error:
        raise SpecError(f"no Ray cluster at --address {address}: {error.strerror or error}") from None
