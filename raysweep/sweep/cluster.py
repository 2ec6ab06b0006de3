"""Connect to a Ray cluster, and look up its resources."""

import json
import logging
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import joblib
import ray

from raysweep.errors import InfrastructureError, RaysweepError, get_first_line
from raysweep.spec import SpecError
from raysweep.sweep import worker_server
from raysweep.sweep.cluster_start import find_cluster_start
from raysweep.sweep.node_probe import list_exposed_ports
from raysweep.sweep.ray_access import (
    create_private_ray_folder,
    find_own_cluster,
    secure_token_file,
    short_temporary_folder,
    token_without_home,
)
from raysweep.sweep.ray_address import split_address
from raysweep.sweep.ray_environment import ray_environment
from raysweep.sweep.ray_internals import (
    check_ray_internals,
    describe_exposure,
    hide_lost_process_messages,
    keep_authentication_mode,
    listen_on_loopback,
    silence_authentication_log,
    skip_unused_processes,
    use_worker_script,
)
from raysweep.sweep.worker_server import can_fork_workers, run_worker_server
from raysweep.termination_signals import handle_termination_signals
from raysweep.user_folders import find_home

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

    Environment variables for Ray are set in this block only, see `ray_environment`.

    Args:
        address: `host:port`, or `auto` for `RAY_ADDRESS` or else the cluster on this machine that
            belongs to this user or root; None for `RAY_ADDRESS` or, if that is not set, a new
            cluster on this machine. A connection that is already open is used as it is.
        n_cpus: Number of CPUs of a new cluster; by default all that this process may use.

    Yields:
        Resources of all nodes together, see `cluster_capacity`.

    Raises:
        SpecError: If the address is malformed, in one line.
        InfrastructureError: If there is no cluster at the address, or if a new cluster would not
            stay on loopback with this version of Ray.
    """
    if address is not None and address != "auto":
        _require_reachable(address)
    with (
        ray_environment(),
        token_without_home(),
        hide_lost_process_messages(),
        keep_authentication_mode(),
    ):
        check_ray_internals("connect")
        early_start = find_cluster_start()
        if early_start is None and ray.is_initialized():
            yield cluster_capacity()
            return
        source = "--address"
        if address is None or address == "auto":
            if os.environ.get("RAY_ADDRESS"):
                source = "RAY_ADDRESS"
            address = os.environ.get("RAY_ADDRESS") or address or "local"
            if address not in ("auto", "local"):
                _require_reachable(address, source)
        if address == "auto":
            address = find_own_cluster()
            _require_reachable(address)
        with ExitStack() as workers:
            try:
                if early_start is not None:
                    early_start.wait()
                elif address == "local":
                    start_local_cluster(workers, n_cpus)
                else:
                    _join_cluster(address, source)
                _log_nodes(address)
                with _treat_termination_as_interrupt():
                    yield cluster_capacity()
            finally:
                started_at = time.monotonic()
                if early_start is not None:
                    early_start.end()
                else:
                    ray.shutdown()
                logger.info("left Ray; this took %.1f s", time.monotonic() - started_at)


def start_local_cluster(workers: ExitStack, n_cpus: int | None = None) -> None:
    """Start a cluster on this machine that stays on loopback, and connect to it.

    Args:
        workers: Stack that ends the server of the cluster's workers.
        n_cpus: Number of CPUs; by default all that this process may use.

    Raises:
        InfrastructureError: It does not start, or would not stay on loopback.
    """
    silence_authentication_log()
    secure_token_file()
    folder = create_private_ray_folder()
    with (
        _convert_start_errors("Ray could not be started on this machine"),
        listen_on_loopback(),
        short_temporary_folder(folder.parent),
        skip_unused_processes(),
        ExitStack() as start,
    ):
        logger.info("starting Ray on this machine")
        if can_fork_workers():
            server = workers.enter_context(run_worker_server(folder.parent))
            start.enter_context(use_worker_script(Path(worker_server.__file__)))
            server.import_ray()
        _initialize_ray(
            address="local", num_cpus=n_cpus or joblib.cpu_count(), _temp_dir=str(folder)
        )
    _require_loopback_ports()


def _join_cluster(address: str, source: str) -> None:
    """Connect to a cluster; the errors are those of `connect_to_cluster`."""
    silence_authentication_log()
    logger.info("joining the Ray cluster at %s", address)
    with _convert_start_errors(f"no Ray cluster at {source} {address}"):
        _initialize_ray(address=address)


@contextmanager
def _convert_start_errors(problem: str) -> Iterator[None]:
    """Convert errors of `ray.init` to InfrastructureError: `problem`, then their first line."""
    try:
        yield
    except RaysweepError:
        raise
    except Exception as error:
        # Ray raises a bare Exception when its node does not start in time.
        if type(error) is not Exception and not isinstance(
            error, ConnectionError | RuntimeError | ValueError
        ):
            raise
        raise InfrastructureError(f"{problem}: {get_first_line(error)}") from error


def _require_loopback_ports() -> None:
    """Raise InfrastructureError if other machines can reach the cluster that has started here."""
    if ports := list_exposed_ports(ray.get_runtime_context().get_session_name()):
        raise InfrastructureError(describe_exposure(ports))


def _initialize_ray(**options: Any) -> None:
    """Call `ray.init` so that it prints nothing."""
    ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)


def _log_nodes(address: str) -> None:
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
    where = (
        "started Ray here" if address == "local" else f"connected to the Ray cluster at {address}"
    )
    logger.info("%s: %d nodes of %d are alive", where, n_alive, len(nodes), extra={"nodes": nodes})


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
    home = find_home()
    bootstrap_config = None if home is None else home / _BOOTSTRAP_CONFIG_FILE
    if bootstrap_config is None or not bootstrap_config.is_file():
        return live_nodes
    config = json.loads(bootstrap_config.read_text(encoding="utf-8"))
    return [*live_nodes, *_unlaunched_node_capacities(config, len(live_nodes))]


@contextmanager
def _treat_termination_as_interrupt() -> Iterator[None]:
    """Make SIGTERM, and SIGHUP unless it is ignored, end the driver as Ctrl-C does in this block.

    Ray's own handler prints a stack and exits at once.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        logger.warning(
            "received %s: this process ends as after Ctrl-C, and its work can be resumed",
            signal.Signals(number).name,
            extra={"is_shown_elsewhere": True},
        )
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # As in a background job of a shell script, where raising SIGINT would do nothing.
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    with handle_termination_signals(interrupt):
        yield


def _parse_max_cluster_resources(text: str) -> dict[str, float]:
    """Parse the value of `RAYSWEEP_CLUSTER_MAX`; SpecError if it is malformed."""
    try:
        return {kind: float(amount) for kind, amount in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise SpecError(
            f'{_CLUSTER_MAX_VARIABLE}={text!r}: expected JSON like {{"CPU": 32, "GPU": 8}}'
        ) from error


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


def _require_reachable(address: str, source: str = "--address") -> None:
    """Raise an error at once for an address where Ray would retry for a long time."""
    try:
        socket.create_connection(split_address(address, source), timeout=5).close()
    except OSError as error:
        raise InfrastructureError(
            f"no Ray cluster at {source} {address}: {error.strerror or error}"
        ) from error
