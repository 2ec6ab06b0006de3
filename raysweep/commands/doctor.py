"""raysweep doctor"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from uuid import uuid4

from raysweep import storage
from raysweep.commands import make_writable_folder, parse_data_overrides, resolve_runs_folder
from raysweep.data import DataSpec, load_data
from raysweep.formatting import format_count, redact_secrets
from raysweep.spec import SpecError
from raysweep.tracking import get_mlflow_version, tracking_uri

if TYPE_CHECKING:
    from raysweep.sweep.node_probe import NodeReport

# Versions without the holes that are known: Ray's and torch's on every node, MLflow's behind the
# store.
_MIN_SAFE_VERSIONS = {"ray": (2, 59, 1), "torch": (2, 10), "mlflow": (3, 8)}
_MIN_DISK, _MIN_MEMORY, _MAX_CLOCK_SKEW = 5 * 2**30, 2 * 2**30, 2.0


@dataclass(frozen=True)
class Finding:
    """One check's outcome. text: what was seen; do: what mends it."""

    check: str
    ok: bool
    text: str
    remedy: str = ""

    def to_json_dict(self) -> dict[str, str | bool]:
        """Return what `--json` prints, with the keys that it has had since 0.1."""
        return {"check": self.check, "ok": self.ok, "text": self.text, "do": self.remedy}


def run_command(args: Namespace) -> int:
    # Nodes on one machine have one name and much in common.
    findings = list(dict.fromkeys(_iter_findings(args)))
    broken = [finding for finding in findings if not finding.ok]
    if args.json:
        print(
            json.dumps(
                {"sound": not broken, "findings": [finding.to_json_dict() for finding in findings]},
                indent=1,
            )
        )
        return 1 if broken else 0
    for finding in findings:
        print(f"{'ok    ' if finding.ok else 'BROKEN'} {finding.check:<9} {finding.text}")
        if finding.remedy:
            print(f"       {'do':<9} {finding.remedy}")
    if broken:
        print(f"raysweep: {len(broken)} of {len(findings)} checks failed", file=sys.stderr)
    return 1 if broken else 0


def _iter_findings(args: Namespace) -> Iterator[Finding]:
    from raysweep.sweep import node_probe
    from raysweep.sweep.cluster import connect_to_cluster

    spec = DataSpec.from_data(parse_data_overrides(args, "the doctor"), "data")
    yield from _diagnose_mlflow(tracking_uri(args.out))
    try:
        runs = make_writable_folder(resolve_runs_folder(args), "--out")
    except SpecError as error:
        yield Finding(
            "storage",
            False,
            str(error),
            "name a place that can be written, with --storage or --out",
        )
        return
    try:
        fingerprint = load_data(spec).fingerprint
    except SpecError as error:
        yield Finding(
            "data", False, f"here: {error}", "see `raysweep doctor --help` for --data-dir"
        )
        fingerprint = ""
    marker = runs / f".doctor-{uuid4().hex}"
    marker.write_text("read me")
    storage.push_to_bucket(marker)
    try:
        with connect_to_cluster(args.address):
            answers = node_probe.probe_nodes(
                node_probe.ProbeRequest(
                    node_probe.portable_path(runs), marker.name, spec.model_dump_json()
                )
            )
            mine = node_probe.package_versions()
    except SpecError as error:
        do = "is `ray start` or `ray up` done, the port open, and RAY_AUTH_MODE the cluster's?"
        yield Finding("address", False, str(error), do)
        return
    finally:
        storage.delete_remote_file(marker)
        marker.unlink()
    where = args.address or os.environ.get("RAY_ADDRESS") or "a cluster of its own on this machine"
    yield Finding("address", True, f"{where}: {format_count(len(answers), 'node')}")
    yield from _diagnose_nodes(answers, mine, storage.uri_of(runs), spec.name, fingerprint)


def _diagnose_mlflow(tracking_uri: str) -> Iterator[Finding]:
    try:
        found = get_mlflow_version(tracking_uri)
    except SpecError as error:
        yield Finding("mlflow", False, str(error), "start the server, or set MLFLOW_TRACKING_URI")
        return
    do = (
        f"upgrade: versions before {_format_version(_MIN_SAFE_VERSIONS['mlflow'])} have known holes"
    )
    ok = _parse_version(found) >= _MIN_SAFE_VERSIONS["mlflow"]
    yield Finding("mlflow", ok, f"{found} at {redact_secrets(tracking_uri)}", "" if ok else do)


def _diagnose_nodes(
    node_reports: "list[NodeReport]",
    local_versions: dict[str, str],
    storage_uri: str,
    dataset_name: str,
    fingerprint: str,
) -> Iterator[Finding]:
    silent = [answer for answer in node_reports if "node" in answer.problems]
    for answer in silent:
        missing = "ModuleNotFoundError" in answer.problems["node"]
        install = "install this package there: `pip install -c constraints.txt .` in the checkout"
        do = install if missing else "see its logs in /tmp/ray/session_latest/logs"
        yield Finding("node", False, f"{answer.node_name}: {answer.problems['node']}", do)
    heard = [answer for answer in node_reports if "node" not in answer.problems]
    if not heard:
        return
    yield from _diagnose_versions(heard, local_versions)
    folder = f"make {storage_uri} one folder for all nodes (NFS), or name another with --storage"
    yield from _diagnose_each_node(
        "storage", heard, _describe_storage_problem, f"read and written at {storage_uri}", folder
    )
    if fingerprint:
        fetch = f"put data set {dataset_name!r} where every node finds it: on the shared storage, with --data-dir"
        yield from _diagnose_each_node(
            "data",
            heard,
            partial(_describe_data_problem, fingerprint),
            f"{dataset_name}, fingerprint {fingerprint}",
            fetch,
        )
    total = f"{sum(a.gpus for a in heard)} seen, as many as declared"
    yield from _diagnose_each_node(
        "gpus",
        heard,
        _describe_gpu_mismatch,
        total,
        "`ray start --num-gpus` there with what `nvidia-smi -L` shows",
    )
    yield from _diagnose_each_node(
        "clock",
        heard,
        _describe_clock_skew,
        "no clock is provably off",
        "start chrony or systemd-timesyncd there",
    )
    least = f"at least {_format_gib(min(a.disk_free for a in heard))} of disk and {_format_gib(min(a.memory_free for a in heard))}"
    crowded = "make room: Ray spills to /tmp, and kills tasks when memory ends"
    yield from _diagnose_each_node(
        "room", heard, _describe_low_space, f"{least} of memory are free", crowded
    )
    yield from _network_exposure(heard)


def _describe_storage_problem(node_report: "NodeReport") -> str:
    return node_report.problems.get("storage", "")


def _describe_data_problem(fingerprint: str, node_report: "NodeReport") -> str:
    other = (
        ""
        if node_report.fingerprint == fingerprint
        else f"has other data than here ({fingerprint})"
    )
    return node_report.problems.get("data", other)


def _describe_gpu_mismatch(node_report: "NodeReport") -> str:
    same = node_report.gpus == node_report.declared_gpus
    return (
        "" if same else f"has {node_report.gpus} GPUs, Ray was told {node_report.declared_gpus:g}"
    )


def _describe_clock_skew(node_report: "NodeReport") -> str:
    return (
        f"its clock is off by {node_report.clock_skew:.1f} s"
        if node_report.clock_skew > _MAX_CLOCK_SKEW
        else ""
    )


def _describe_low_space(node_report: "NodeReport") -> str:
    enough = node_report.disk_free >= _MIN_DISK and node_report.memory_free >= _MIN_MEMORY
    return (
        ""
        if enough
        else f"{_format_gib(node_report.disk_free)} free in /tmp, {_format_gib(node_report.memory_free)} of memory"
    )


def _format_gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"


def _diagnose_each_node(
    check: str,
    node_reports: "list[NodeReport]",
    describe_problem: "Callable[[NodeReport], str]",
    ok_text: str,
    remedy: str,
) -> Iterator[Finding]:
    """A finding for each node where something is wrong, or one that all is well."""
    bad = [
        (answer.node_name, text) for answer in node_reports if (text := describe_problem(answer))
    ]
    for node, text in bad:
        yield Finding(check, False, f"{node}: {text}", remedy)
    if not bad:
        yield Finding(check, True, ok_text)


def _diagnose_versions(
    node_reports: "list[NodeReport]", local_versions: dict[str, str]
) -> Iterator[Finding]:
    differ = [
        (answer.node_name, f"{name} {found}, here {local_versions[name]}")
        for answer in node_reports
        for name, found in answer.versions.items()
        if found != local_versions[name]
    ]
    for node, text in differ:
        yield Finding(
            "versions",
            False,
            f"{node}: {text}",
            "install the same checkout with constraints.txt everywhere",
        )
    for name in ("ray", "torch"):
        if _parse_version(local_versions[name]) < _MIN_SAFE_VERSIONS[name]:
            do = f"upgrade: versions before {_format_version(_MIN_SAFE_VERSIONS[name])} have known holes"
            yield Finding("versions", False, f"{name} {local_versions[name]}", do)
    if not differ:
        yield Finding(
            "versions", True, ", ".join(f"{name} {found}" for name, found in local_versions.items())
        )


def _network_exposure(node_reports: "list[NodeReport]") -> Iterator[Finding]:
    """Who could talk to Ray: it runs whatever it is told."""
    open_to_all = [a.node_name for a in node_reports if not a.requires_token and a.exposed_ports]
    for node in open_to_all:
        do = "set RAY_AUTH_MODE=token for `ray start` on every node and for who connects (docs/cluster.md)"
        yield Finding("doors", False, f"{node}: Ray listens beyond loopback and wants no token", do)
    dashboards = [
        (a.node_name, port)
        for a in node_reports
        for port in a.exposed_ports
        if port.startswith("dashboard ")
    ]
    for node, port in dashboards:
        wanted = "behind a token" if node not in open_to_all else "for everybody"
        yield Finding(
            "doors",
            node not in open_to_all,
            f"{node}: {port} is reachable from other machines, {wanted}",
            "start the head with --dashboard-host=127.0.0.1 and use `ray dashboard` or ssh -L, if you can",
        )
    if not open_to_all and not dashboards:
        beyond = sum(bool(a.exposed_ports) for a in node_reports)
        closed = (
            "Ray listens on loopback alone"
            if not beyond
            else "Ray wants a token; the dashboard is on loopback"
        )
        yield Finding("doors", True, closed)


def _parse_version(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdecimal())


def _format_version(version_numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, version_numbers))
