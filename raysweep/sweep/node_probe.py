"""What each node of a cluster says of itself: the same few questions, asked by a task on each."""

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
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import raysweep
from raysweep import storage
from raysweep.data import DataSpec, load_data
from raysweep.data.dataset_cache import CachedDataset
from raysweep.spec import SpecError

REPORTED_PACKAGES = ("ray", "torch", "numpy")
_PROBE_TIMEOUT_SECONDS = 90.0
_LOOPBACK_PATTERN = re.compile(r"^(127\.|::1$|::ffff:127\.)")


@dataclass(frozen=True)
class ProbeRequest:
    """What to look for on every node. marker: a file that the asker wrote to `storage`; data: a
    spec, as JSON.

    fingerprint: of the asker's data, if a copy that the node made earlier will do.
    """

    storage_uri: str
    marker_file: str
    data_spec: str
    fingerprint: str = ""


@dataclass(frozen=True)
class NodeReport:
    """One node's. time: its clock; listening: Ray's ports beyond loopback, `name address:port`;
    token: whether its Ray wants one; problems by topic."""

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
    # The clock can be off by no less, whatever the answer's way took.
    clock_skew: float = 0.0


def probe_nodes(request: ProbeRequest) -> list[NodeReport]:
    """Every node's answer. A node that cannot say anything has its reason in `problems["node"]`."""
    nodes = _live_nodes()
    asked = time.time()
    waiting = [
        _pinned_probe_task(node).remote(asdict(request), node["Resources"].get("GPU", 0.0))
        for node in nodes.values()
    ]
    answers = {
        name: _collect_report(nodes[name], one, asked)
        for name, one in zip(nodes, waiting, strict=True)
    }
    # One that died meanwhile is no longer the cluster's.
    still = _live_nodes()
    return [
        answer for name, answer in answers.items() if "node" not in answer.problems or name in still
    ]


def find_node_problems(sweep_path: Path, cached_dataset: CachedDataset) -> list[str]:
    """What the nodes of a cluster lack for a sweep in `folder`, one line each."""
    if len(_live_nodes()) == 1:
        return []
    question = ProbeRequest(
        portable_path(sweep_path),
        "sweep.json",
        cached_dataset.spec.model_dump_json(),
        cached_dataset.fingerprint,
    )
    return [
        f"node {answer.node_name}: {answer.problems[topic]}; see `raysweep doctor`"
        for answer in probe_nodes(question)
        for topic in ("node", "storage", "data")
        if topic in answer.problems
    ]


def portable_path(folder: Path) -> str:
    """A folder as another machine finds it."""
    return storage.uri_of(folder.resolve())


def require_visible(sweep_path: Path) -> None:
    """Raises SpecError in one line if the sweep's folder is not to be seen from this machine."""
    if not storage.pull_file(sweep_path / "sweep.json"):
        hint = "--out or --storage must be what all nodes share"
        raise SpecError(
            f"{socket.gethostname()}: does not see {storage.uri_of(sweep_path)}: {hint}"
        )


def _live_nodes() -> dict[str, dict[str, Any]]:
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _pinned_probe_task(node: dict[str, Any]) -> Any:
    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(_probe_this_node).options(
        num_cpus=0, max_retries=0, scheduling_strategy=place
    )


def _collect_report(node: dict[str, Any], task_reference: Any, request_time: float) -> NodeReport:
    name, head = node["NodeManagerHostname"], "node:__internal_head__" in node["Resources"]
    try:
        said = ray.get(task_reference, timeout=_PROBE_TIMEOUT_SECONDS)
    except GetTimeoutError:
        return _unreachable_node_report(
            name, head, f"does not answer within {_PROBE_TIMEOUT_SECONDS:.0f} s"
        )
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        missing = next((line.strip() for line in lines if "ModuleNotFoundError" in line), None)
        return _unreachable_node_report(name, head, missing or lines[-1].strip())
    skew = max(request_time - said["clock_time"], said["clock_time"] - time.time(), 0.0)
    return NodeReport(node_name=name, is_head=head, clock_skew=skew, **said)


def _unreachable_node_report(node_name: str, is_head: bool, reason: str) -> NodeReport:
    return NodeReport(node_name, is_head, {}, 0.0, 0, 0.0, 0, 0, [], problems={"node": reason})


def _probe_this_node(request_fields: dict[str, Any], declared_gpus: float) -> dict[str, Any]:
    """Runs on the node."""
    problems: dict[str, str] = {}
    asked = ProbeRequest(**request_fields)
    _probe_storage(asked, problems)
    return {
        "versions": package_versions(),
        "gpus": len(list(Path("/proc/driver/nvidia/gpus").glob("*"))),
        "declared_gpus": declared_gpus,
        "disk_free": shutil.disk_usage(tempfile.gettempdir()).free,
        "memory_free": psutil.virtual_memory().available,
        "exposed_ports": list_exposed_ports(ray._private.worker._global_node.session_name),
        "requires_token": is_token_auth_enabled(),
        "fingerprint": _probe_data(asked, problems),
        "problems": problems,
        "clock_time": time.time(),
    }


def _probe_storage(request: ProbeRequest, problems: dict[str, str]) -> None:
    """Read what the asker wrote, and write something beside it."""
    marker = storage.local_path(request.storage_uri) / request.marker_file
    mine = marker.with_name(f"{request.marker_file}-{socket.gethostname()}-{os.getpid()}")
    try:
        if not storage.pull_file(marker):
            problems["storage"] = f"does not see {request.storage_uri} as the driver does"
            return
        mine.write_bytes(marker.read_bytes())
        storage.push_to_bucket(mine)
        storage.delete_remote_file(mine)
        mine.unlink()
    except (OSError, SpecError) as error:
        problems["storage"] = (
            f"cannot write {request.storage_uri}: {getattr(error, 'strerror', None) or error}"
        )


def _probe_data(request: ProbeRequest, problems: dict[str, str]) -> str:
    spec = DataSpec.model_validate_json(request.data_spec)
    try:
        found = (
            CachedDataset(spec, request.fingerprint).load_shared(spec)
            if request.fingerprint
            else load_data(spec)
        )
        return found.fingerprint
    except SpecError as error:
        problems["data"] = error.problems[0]
        return ""


def package_versions() -> dict[str, str]:
    """Of Python, of what trains, and of this package with a digest of its code: checkouts may
    differ at one version.
    """
    found = {name: version(name) for name in REPORTED_PACKAGES}
    return {
        "python": sys.version.split()[0],
        "raysweep": f"{raysweep.__version__} ({code_digest()})",
        **found,
    }


@cache
def code_digest() -> str:
    """8 hex digits of the package's source files."""
    folder, sha = Path(raysweep.__file__).parent, hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        sha.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return sha.hexdigest()[:8]


def list_exposed_ports(session_name: str) -> list[str]:
    """Ports beyond loopback on which this cluster's processes here listen, as far as this user may
    see them.
    """
    found = set()
    for process in psutil.process_iter(["name", "cmdline"]):
        try:
            parent = process.parent()
            lines = [process.info["cmdline"] or [], parent.cmdline() if parent else []]
            # What Ray starts names its session; workers and agents rename themselves, their parent
            # has not.
            if not any(session_name in " ".join(line) for line in lines):
                continue
            sockets = process.net_connections(kind="tcp")
        except psutil.Error:
            continue
        for one in sockets:
            if one.status == psutil.CONN_LISTEN and not _LOOPBACK_PATTERN.match(one.laddr.ip):
                found.add(f"{_port_owner(process, one.laddr.port)} {one.laddr.ip}:{one.laddr.port}")
    return sorted(found)


def _port_owner(process: psutil.Process, port: int) -> str:
    """The dashboard's own port, where jobs are taken, is told from that of its metrics."""
    line = " ".join(process.info["cmdline"] or [])
    if "dashboard/dashboard.py" in line:
        return "dashboard" if f"--port={port} " in f"{line} " else "dashboard's metrics"
    return str(process.info["name"]).strip()
