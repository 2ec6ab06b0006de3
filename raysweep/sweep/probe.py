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
from raysweep.data import DataSpec, load
from raysweep.data.shared import Source
from raysweep.spec import SpecError

PACKAGES = ("ray", "torch", "numpy")
_TIMEOUT = 90.0
_LOOPBACK = re.compile(r"^(127\.|::1$|::ffff:127\.)")


@dataclass(frozen=True)
class Question:
    """What to look for on every node. marker: a file that the asker wrote to `storage`; data: a spec, as JSON.

    fingerprint: of the asker's data, if a copy that the node made earlier will do.
    """

    storage: str
    marker: str
    data: str
    fingerprint: str = ""


@dataclass(frozen=True)
class Answer:
    """One node's. time: its clock; listening: Ray's ports beyond loopback, `name address:port`;
    token: whether its Ray wants one; problems by topic."""

    node: str
    head: bool
    versions: dict[str, str]
    time: float
    gpus: int
    gpus_declared: float
    disk_free: int
    memory_free: int
    listening: list[str]
    token: bool = False
    fingerprint: str = ""
    problems: dict[str, str] = field(default_factory=dict)
    # The clock can be off by no less, whatever the answer's way took.
    skew: float = 0.0


def ask(question: Question) -> list[Answer]:
    """Every node's answer. A node that cannot say anything has its reason in `problems["node"]`."""
    nodes = _alive()
    asked = time.time()
    waiting = [_on(node).remote(asdict(question), node["Resources"].get("GPU", 0.0)) for node in nodes.values()]
    answers = {name: _answer(nodes[name], one, asked) for name, one in zip(nodes, waiting, strict=True)}
    # One that died meanwhile is no longer the cluster's.
    still = _alive()
    return [answer for name, answer in answers.items() if "node" not in answer.problems or name in still]


def missing(folder: Path, source: Source) -> list[str]:
    """What the nodes of a cluster lack for a sweep in `folder`, one line each."""
    if len(_alive()) == 1:
        return []
    question = Question(where(folder), "sweep.json", source.spec.model_dump_json(), source.fingerprint)
    return [
        f"node {answer.node}: {answer.problems[topic]}; see `raysweep doctor`"
        for answer in ask(question)
        for topic in ("node", "storage", "data")
        if topic in answer.problems
    ]


def where(folder: Path) -> str:
    """A folder as another machine finds it."""
    return storage.name(folder.resolve())


def sees(folder: Path) -> None:
    """Raises SpecError in one line if the sweep's folder is not to be seen from this machine."""
    if not storage.pull_file(folder / "sweep.json"):
        hint = "--out or --storage must be what all nodes share"
        raise SpecError(f"{socket.gethostname()}: does not see {storage.name(folder)}: {hint}")


def _alive() -> dict[str, dict[str, Any]]:
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _on(node: dict[str, Any]) -> Any:
    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(_look).options(num_cpus=0, max_retries=0, scheduling_strategy=place)


def _answer(node: dict[str, Any], reference: Any, asked: float) -> Answer:
    name, head = node["NodeManagerHostname"], "node:__internal_head__" in node["Resources"]
    try:
        said = ray.get(reference, timeout=_TIMEOUT)
    except GetTimeoutError:
        return _silent(name, head, f"does not answer within {_TIMEOUT:.0f} s")
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        missing = next((line.strip() for line in lines if "ModuleNotFoundError" in line), None)
        return _silent(name, head, missing or lines[-1].strip())
    skew = max(asked - said["time"], said["time"] - time.time(), 0.0)
    return Answer(node=name, head=head, skew=skew, **said)


def _silent(name: str, head: bool, reason: str) -> Answer:
    return Answer(name, head, {}, 0.0, 0, 0.0, 0, 0, [], problems={"node": reason})


def _look(question: dict[str, Any], gpus_declared: float) -> dict[str, Any]:
    """Runs on the node."""
    problems: dict[str, str] = {}
    asked = Question(**question)
    _try_storage(asked, problems)
    return {
        "versions": versions(),
        "gpus": len(list(Path("/proc/driver/nvidia/gpus").glob("*"))),
        "gpus_declared": gpus_declared,
        "disk_free": shutil.disk_usage(tempfile.gettempdir()).free,
        "memory_free": psutil.virtual_memory().available,
        "listening": listening(ray._private.worker._global_node.session_name),
        "token": is_token_auth_enabled(),
        "fingerprint": _try_data(asked, problems),
        "problems": problems,
        "time": time.time(),
    }


def _try_storage(asked: Question, problems: dict[str, str]) -> None:
    """Read what the asker wrote, and write something beside it."""
    marker = storage.at(asked.storage) / asked.marker
    mine = marker.with_name(f"{asked.marker}-{socket.gethostname()}-{os.getpid()}")
    try:
        if not storage.pull_file(marker):
            problems["storage"] = f"does not see {asked.storage} as the driver does"
            return
        mine.write_bytes(marker.read_bytes())
        storage.push(mine)
        storage.drop_file(mine)
        mine.unlink()
    except (OSError, SpecError) as error:
        problems["storage"] = f"cannot write {asked.storage}: {getattr(error, 'strerror', None) or error}"


def _try_data(asked: Question, problems: dict[str, str]) -> str:
    spec = DataSpec.model_validate_json(asked.data)
    try:
        found = Source(spec, asked.fingerprint).load(spec) if asked.fingerprint else load(spec)
        return found.fingerprint
    except SpecError as error:
        problems["data"] = error.problems[0]
        return ""


def versions() -> dict[str, str]:
    """Of Python, of what trains, and of this package with a digest of its code: checkouts may differ at one version."""
    found = {name: version(name) for name in PACKAGES}
    return {"python": sys.version.split()[0], "raysweep": f"{raysweep.__version__} ({code_digest()})", **found}


@cache
def code_digest() -> str:
    """8 hex digits of the package's source files."""
    folder, sha = Path(raysweep.__file__).parent, hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        sha.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return sha.hexdigest()[:8]


def listening(session: str) -> list[str]:
    """Ports beyond loopback on which this cluster's processes here listen, as far as this user may see them."""
    found = set()
    for process in psutil.process_iter(["name", "cmdline"]):
        try:
            parent = process.parent()
            lines = [process.info["cmdline"] or [], parent.cmdline() if parent else []]
            # What Ray starts names its session; workers and agents rename themselves, their parent has not.
            if not any(session in " ".join(line) for line in lines):
                continue
            sockets = process.net_connections(kind="tcp")
        except psutil.Error:
            continue
        for one in sockets:
            if one.status == psutil.CONN_LISTEN and not _LOOPBACK.match(one.laddr.ip):
                found.add(f"{_name(process, one.laddr.port)} {one.laddr.ip}:{one.laddr.port}")
    return sorted(found)


def _name(process: psutil.Process, port: int) -> str:
    """The dashboard's own port, where jobs are taken, is told from that of its metrics."""
    line = " ".join(process.info["cmdline"] or [])
    if "dashboard/dashboard.py" in line:
        return "dashboard" if f"--port={port} " in f"{line} " else "dashboard's metrics"
    return str(process.info["name"]).strip()
