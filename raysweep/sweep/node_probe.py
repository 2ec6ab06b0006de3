"""Probe the nodes of a Ray cluster with a task on each: versions, storage, data, clock, ports."""

import hashlib
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import raysweep
from raysweep.data import DataSpec, load_data
from raysweep.data.dataset_cache import CachedDataset
from raysweep.errors import InfrastructureError, RaysweepError
from raysweep.stores import StoredFileNotFound, StorePath, open_path
from raysweep.sweep.ray_access import find_token_exposure
from raysweep.sweep.ray_internals import is_head_node, requires_token

REPORTED_PACKAGES = ("ray", "torch", "numpy")
_PROBE_TIMEOUT_SECONDS = 90.0
_LOOPBACK_PATTERN = re.compile(r"^(127\.|::1$|::ffff:127\.)")


@dataclass(frozen=True)
class ProbeRequest:
    """What a probe looks for on every node.

    Attributes:
        storage_uri: Folder that the node must be able to read and write.
        marker_file: Name of a file in that folder, which the driver wrote.
        data_spec: The data set, a `DataSpec` as JSON.
        fingerprint: Fingerprint of the driver's data. If it is set, a copy in the node's cache
            is enough. If it is empty, the node reads the data set itself.
    """

    storage_uri: str
    marker_file: str
    data_spec: str
    fingerprint: str = ""


@dataclass(frozen=True)
class NodeReport:
    """What a probe found on one node.

    Attributes:
        node_name: Host name.
        is_head: Whether this is the head node of the cluster.
        versions: Versions of Python, raysweep and `REPORTED_PACKAGES`.
        clock_time: The node's clock, in seconds since the epoch.
        gpus: NVIDIA GPUs that the machine has.
        declared_gpus: GPUs that Ray was started with.
        disk_free: Free bytes where temporary files are written.
        memory_free: Available bytes of memory.
        exposed_ports: Ray's ports beyond loopback, as `NAME ADDRESS:PORT`.
        requires_token: Whether the node's Ray asks for a token.
        fingerprint: Fingerprint of the node's data; empty if it cannot be read.
        problems: Messages by topic, `node`, `storage`, `data` or `token`.
        clock_skew: Lower bound of the difference between the node's clock and the driver's, in
            seconds. It holds for any delay of the answer.
    """

    node_name: str
    is_head: bool
    versions: dict[str, str]
    clock_time: float
    gpus: int
    declared_gpus: float
    disk_free: int
    memory_free: int
    exposed_ports: list[str]
    requires_token: bool = False
    fingerprint: str = ""
    problems: dict[str, str] = field(default_factory=dict)
    clock_skew: float = 0.0


def probe_nodes(request: ProbeRequest) -> list[NodeReport]:
    """Run a probe on every live node of the connected cluster.

    Args:
        request: What to look for.

    Returns:
        A report of each node. A node that could not answer has the reason in `problems["node"]`,
        unless it left the cluster meanwhile: then it has no report.
    """
    nodes = _live_nodes()
    request_time = time.time()
    tasks = {
        node_id: _pinned_probe_task(node).remote(asdict(request), node["Resources"].get("GPU", 0.0))
        for node_id, node in nodes.items()
    }
    reports = {
        node_id: _collect_report(nodes[node_id], task, request_time)
        for node_id, task in tasks.items()
    }
    live_ids = _live_nodes().keys()
    return [
        report
        for node_id, report in reports.items()
        if "node" not in report.problems or node_id in live_ids
    ]


def find_node_problems(sweep_path: StorePath, cached_dataset: CachedDataset) -> list[str]:
    """Check whether all nodes of the connected cluster can run trials of a sweep.

    Args:
        sweep_path: Folder of the sweep.
        cached_dataset: The sweep's data.

    Returns:
        One line for each problem. A cluster of a single node is not probed.
    """
    if len(_live_nodes()) == 1:
        return []
    request = ProbeRequest(
        str(sweep_path),
        "sweep.json",
        cached_dataset.spec.model_dump_json(),
        cached_dataset.fingerprint,
    )
    return [
        f"node {report.node_name}: {report.problems[topic]}; see `raysweep doctor`"
        for report in probe_nodes(request)
        for topic in ("node", "storage", "data")
        if topic in report.problems
    ]


def require_visible(sweep_path: StorePath) -> None:
    """Check that this machine can read the folder of a sweep.

    Args:
        sweep_path: The folder.

    Raises:
        InfrastructureError: If `sweep.json` is not there.
    """
    if not (sweep_path / "sweep.json").is_file():
        raise InfrastructureError(
            f"{socket.gethostname()}: does not see {sweep_path}: "
            "--out or --storage must name a folder that all nodes share"
        )


def package_versions() -> dict[str, str]:
    """Return the versions of Python, raysweep and `REPORTED_PACKAGES`.

    The version of raysweep includes a digest of its code, because checkouts of the same version may
    differ.
    """
    return {
        "python": sys.version.split()[0],
        "raysweep": f"{raysweep.__version__} ({code_digest()})",
        **{name: version(name) for name in REPORTED_PACKAGES},
    }


@cache
def code_digest() -> str:
    """Return 8 hex digits that name the source files of raysweep."""
    folder, sha = Path(raysweep.__file__).parent, hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        sha.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return sha.hexdigest()[:8]


def list_exposed_ports(session_name: str) -> list[str]:
    """List the ports beyond loopback on which processes of a Ray session listen on this machine.

    Args:
        session_name: Name of the Ray session.

    Returns:
        Sorted `NAME ADDRESS:PORT`, for processes that this user may inspect.
    """
    ports = set()
    for process in psutil.process_iter(["name", "cmdline"]):
        try:
            if not _belongs_to_session(process, session_name):
                continue
            connections = process.net_connections(kind="tcp")
        except psutil.Error:
            continue
        for connection in connections:
            address = connection.laddr
            if connection.status == psutil.CONN_LISTEN and not _LOOPBACK_PATTERN.match(address.ip):
                ports.add(f"{_port_owner(process, address.port)} {address.ip}:{address.port}")
    return sorted(ports)


def _live_nodes() -> dict[str, dict[str, Any]]:
    """Return Ray's descriptions of the live nodes by node id."""
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _pinned_probe_task(node: dict[str, Any]) -> Any:
    """Return the remote function that probes `node`."""
    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(_probe_this_node).options(
        num_cpus=0, max_retries=0, scheduling_strategy=strategy
    )


def _collect_report(node: dict[str, Any], task_reference: Any, request_time: float) -> NodeReport:
    """Wait for a node's answer and make its report."""
    name, is_head = node["NodeManagerHostname"], is_head_node(node)
    try:
        answer = ray.get(task_reference, timeout=_PROBE_TIMEOUT_SECONDS)
    except GetTimeoutError:
        reason = f"does not answer within {_PROBE_TIMEOUT_SECONDS:.0f} s"
        return _unreachable_node_report(name, is_head, reason)
    except Exception as error:
        return _unreachable_node_report(name, is_head, _summarize_ray_error(error))
    node_time = answer["clock_time"]
    skew = max(request_time - node_time, node_time - time.time(), 0.0)
    return NodeReport(node_name=name, is_head=is_head, clock_skew=skew, **answer)


def _summarize_ray_error(error: Exception) -> str:
    """Return the line of Ray's message that names a missing module, or else its last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return next((line for line in lines if "ModuleNotFoundError" in line), lines[-1])


def _unreachable_node_report(node_name: str, is_head: bool, reason: str) -> NodeReport:
    """Return the report of a node that could not answer."""
    return NodeReport(node_name, is_head, {}, 0.0, 0, 0.0, 0, 0, [], problems={"node": reason})


def _probe_this_node(request_fields: dict[str, Any], declared_gpus: float) -> dict[str, Any]:
    """Probe the node on which this task runs; return fields of its `NodeReport`."""
    problems: dict[str, str] = {}
    request = ProbeRequest(**request_fields)
    _probe_storage(request, problems)
    if requires_token() and (exposure := find_token_exposure()):
        problems["token"] = exposure
    return {
        "versions": package_versions(),
        "gpus": len(list(Path("/proc/driver/nvidia/gpus").glob("*"))),
        "declared_gpus": declared_gpus,
        "disk_free": shutil.disk_usage(tempfile.gettempdir()).free,
        "memory_free": psutil.virtual_memory().available,
        "exposed_ports": list_exposed_ports(ray.get_runtime_context().get_session_name()),
        "requires_token": requires_token(),
        "fingerprint": _probe_data(request, problems),
        "problems": problems,
        "clock_time": time.time(),
    }


def _probe_storage(request: ProbeRequest, problems: dict[str, str]) -> None:
    """Read the marker that the driver wrote, and write a copy beside it."""
    folder = open_path(request.storage_uri)
    copy = folder / f"{request.marker_file}-{socket.gethostname()}-{os.getpid()}"
    try:
        copy.write_bytes((folder / request.marker_file).read_bytes())
        copy.delete()
    except StoredFileNotFound:
        problems["storage"] = f"does not see {request.storage_uri} as the driver does"
    except (OSError, RaysweepError) as error:
        reason = getattr(error, "strerror", None) or error
        problems["storage"] = f"cannot write {request.storage_uri}: {reason}"


def _probe_data(request: ProbeRequest, problems: dict[str, str]) -> str:
    """Load the data set and return its fingerprint; empty if that fails."""
    spec = DataSpec.model_validate_json(request.data_spec)
    try:
        if request.fingerprint:
            return CachedDataset(spec, request.fingerprint).load_shared(spec).fingerprint
        return load_data(spec).fingerprint
    except RaysweepError as error:
        problems["data"] = error.problems[0]
        return ""


def _belongs_to_session(process: psutil.Process, session_name: str) -> bool:
    """Return whether a process, with its `info["cmdline"]`, belongs to a Ray session."""
    parent, command_line = process.parent(), " ".join(process.info["cmdline"] or [])
    # Processes that Ray starts have the session in their command line. Workers and agents replace
    # theirs by a title, such as `ray::IDLE`; then that of their parent, the raylet, has it.
    if session_name in command_line or (parent and session_name in " ".join(parent.cmdline())):
        return True
    # The parent of a fork is the worker server. But the fork has files of the session open.
    is_named_by_ray = command_line.startswith("ray::")
    return is_named_by_ray and any(session_name in file.path for file in process.open_files())


def _port_owner(process: psutil.Process, port: int) -> str:
    """Return a name for the service that listens on a port of the process.

    The dashboard listens on two ports: its own, where jobs are submitted, and that of its metrics.
    """
    command_line = " ".join(process.info["cmdline"] or [])
    if "dashboard/dashboard.py" in command_line:
        return "dashboard" if f"--port={port} " in f"{command_line} " else "dashboard's metrics"
    return str(process.info["name"]).strip()
