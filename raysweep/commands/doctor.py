"""`raysweep doctor`: check a cluster before a sweep."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from raysweep.commands.options import (
    CommandParsers,
    add_address_option,
    add_command,
    add_json_option,
    add_location_options,
    add_override_options,
    add_verbose_option,
)

if TYPE_CHECKING:
    from raysweep.data import DataSpec
    from raysweep.stores import StorePath
    from raysweep.sweep.node_probe import NodeReport

SUMMARY = "check a cluster before a sweep: nodes, storage, data, MLflow, open ports"
DESCRIPTION = (
    "Checks MLflow and, from every node, versions, storage, data, GPUs, clocks, free disk and "
    "memory, and open ports. Below each failed check it prints what to do; then the exit code is 3."
)
EXAMPLES = (
    "raysweep doctor --address auto",
    "raysweep doctor --address auto --storage s3://lab/sweeps --data-dir DIR",
)

# First versions without known vulnerabilities: Ray and torch on every node, MLflow on its server.
_MIN_SAFE_VERSIONS = {"ray": (2, 59, 1), "torch": (2, 10), "mlflow": (3, 8)}
_MIN_DISK_BYTES = 5 * 2**30
_MIN_MEMORY_BYTES = 2 * 2**30
_MAX_CLOCK_SKEW_SECONDS = 2.0
_MAX_LISTED_WORKS = 5


@dataclass(frozen=True)
class DoctorRequest:
    """What the user asked `raysweep doctor` to do.

    Attributes:
        address: Ray cluster, `auto` or `host:port`; None for $RAY_ADDRESS or this machine.
        data_overrides: {path below `data`: value} of `--set data.*` and `--data-dir`.
        out: Folder of `runs` and `mlflow.db`.
        storage: Folder or URI of sweeps; None for `runs` in `out`.
        as_json: Whether to print JSON on stdout.
    """

    address: str | None
    data_overrides: dict[str, Any]
    out: Path
    storage: str | None
    as_json: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> DoctorRequest:
        """Convert parsed arguments. Raises SpecError if `--set` is malformed."""
        from raysweep.commands.common import parse_data_overrides

        return cls(
            address=args.address,
            data_overrides=parse_data_overrides(args.set, args.data_dir, "the doctor"),
            out=args.out,
            storage=args.storage,
            as_json=args.json,
        )


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: Name of the check.
        ok: Whether it passed.
        text: What was found.
        remedy: What to do if it failed; "" otherwise.
    """

    check: str
    ok: bool
    text: str
    remedy: str = ""

    def to_json_dict(self) -> dict[str, str | bool]:
        """Return what `--json` prints, with the keys of raysweep 0.1."""
        return {"check": self.check, "ok": self.ok, "text": self.text, "do": self.remedy}


def add_parser(parsers: CommandParsers) -> None:
    """Add the arguments of `raysweep doctor` to the command line."""
    parser = add_command(
        parsers, "doctor", run_command, summary=SUMMARY, description=DESCRIPTION, examples=EXAMPLES
    )
    add_address_option(parser)
    add_override_options(parser)
    add_location_options(parser)
    add_json_option(parser)
    add_verbose_option(parser)


def run_command(args: argparse.Namespace) -> None:
    """Run `raysweep doctor`. Raises InfrastructureError if a check failed."""
    from raysweep.errors import InfrastructureError

    request = DoctorRequest.from_args(args)
    # Nodes on one machine have the same name and the same findings.
    findings = list(dict.fromkeys(_iter_findings(request)))
    n_failed = sum(not finding.ok for finding in findings)
    if request.as_json:
        rows = [finding.to_json_dict() for finding in findings]
        print(json.dumps({"sound": not n_failed, "findings": rows}, indent=1))
    else:
        _print_findings(findings)
    if n_failed:
        raise InfrastructureError(f"{n_failed} of {len(findings)} checks failed")


def _print_findings(findings: list[Finding]) -> None:
    """Print a line per check, and what to do below each failed one."""
    for finding in findings:
        print(f"{'ok    ' if finding.ok else 'BROKEN'} {finding.check:<9} {finding.text}")
        if finding.remedy:
            print(f"       {'do':<9} {finding.remedy}")


def _iter_findings(request: DoctorRequest) -> Iterator[Finding]:
    """Run all checks; stop early if the storage or the cluster cannot be reached."""
    from raysweep.commands.common import make_writable_folder, resolve_runs_folder
    from raysweep.data import DataSpec
    from raysweep.errors import RaysweepError
    from raysweep.formatting import format_count
    from raysweep.sweep import node_probe
    from raysweep.tracking import tracking_uri

    spec = DataSpec.from_data(request.data_overrides, "data")
    yield from _diagnose_mlflow(tracking_uri(request.out))
    try:
        runs_folder = resolve_runs_folder(request.out, request.storage)
        if runs_folder.local_path is not None:
            make_writable_folder(runs_folder.local_path)
    except RaysweepError as error:
        remedy = "name a place that can be written, with --storage or --out"
        yield Finding("storage", False, str(error), remedy)
        return
    yield from _diagnose_unrecorded_work(request, runs_folder)
    fingerprint, data_findings = _fingerprint_local_data(spec)
    yield from data_findings
    try:
        node_reports = _probe_nodes(request.address, runs_folder, spec)
    except RaysweepError as error:
        remedy = (
            "check that `ray start` or `ray up` has run, that the port is open, and that "
            "RAY_AUTH_MODE is set as on the cluster"
        )
        yield Finding("address", False, str(error), remedy)
        return
    cluster = request.address or os.environ.get("RAY_ADDRESS") or "a new cluster on this machine"
    yield Finding("address", True, f"{cluster}: {format_count(len(node_reports), 'node')}")
    yield from _diagnose_nodes(
        node_reports,
        node_probe.package_versions(),
        str(runs_folder),
        spec.name,
        fingerprint,
    )


def _fingerprint_local_data(spec: DataSpec) -> tuple[str, list[Finding]]:
    """Fingerprint the data set on this machine.

    Returns:
        The fingerprint and no findings; if the data set is missing, "" and a finding about it.
    """
    from raysweep.data import load_data
    from raysweep.errors import RaysweepError

    try:
        return load_data(spec).fingerprint, []
    except RaysweepError as error:
        remedy = "see `raysweep doctor --help` for --data-dir"
        return "", [Finding("data", False, f"here: {error}", remedy)]


def _probe_nodes(address: str | None, runs_folder: StorePath, spec: DataSpec) -> list[NodeReport]:
    """Ask every node for a report; the nodes look for a marker file that exists meanwhile.

    Raises:
        InfrastructureError: The cluster does not answer.
    """
    from raysweep.sweep import node_probe
    from raysweep.sweep.cluster import connect_to_cluster

    marker = runs_folder / f".doctor-{uuid4().hex}"
    marker.write_text("read me")
    try:
        with connect_to_cluster(address):
            return node_probe.probe_nodes(
                node_probe.ProbeRequest(str(runs_folder), marker.name, spec.model_dump_json())
            )
    finally:
        marker.delete()


def _diagnose_mlflow(tracking_uri: str) -> Iterator[Finding]:
    """Check that the MLflow store answers and that its version is safe."""
    from raysweep.errors import RaysweepError
    from raysweep.redaction import redact_secrets
    from raysweep.tracking import get_mlflow_version

    try:
        version = get_mlflow_version(tracking_uri)
    except RaysweepError as error:
        yield Finding("mlflow", False, str(error), "start the server, or set MLFLOW_TRACKING_URI")
        return
    is_safe = _is_safe_version("mlflow", version)
    remedy = "" if is_safe else _upgrade_remedy("mlflow")
    yield Finding("mlflow", is_safe, f"{version} at {redact_secrets(tracking_uri)}", remedy)


def _diagnose_unrecorded_work(request: DoctorRequest, runs_folder: StorePath) -> Iterator[Finding]:
    """Check that MLflow has all records of the work that has ended."""
    from raysweep.commands.common import format_location_flags
    from raysweep.unrecorded_work import list_unrecorded_work

    works = list_unrecorded_work(request.out.resolve(), runs_folder)
    if works:
        names = ", ".join(work.title for work in works[:_MAX_LISTED_WORKS])
        if len(works) > _MAX_LISTED_WORKS:
            names += f" and {len(works) - _MAX_LISTED_WORKS} more"
        remedy = f"raysweep sync{format_location_flags(request.out, request.storage)}"
        yield Finding("mlflow", False, f"lacks records of {names}", remedy)


def _diagnose_nodes(
    node_reports: list[NodeReport],
    local_versions: dict[str, str],
    storage_uri: str,
    dataset_name: str,
    fingerprint: str,
) -> Iterator[Finding]:
    """Check what the nodes reported.

    Args:
        node_reports: A report of each node.
        local_versions: {package: version} on this machine.
        storage_uri: Folder or URI of all sweeps.
        dataset_name: Name of the data set.
        fingerprint: Fingerprint of the data set on this machine, or "" if it is missing here.
    """
    reports = []
    for report in node_reports:
        if "node" in report.problems:
            yield _silent_node_finding(report)
        else:
            reports.append(report)
    if not reports:
        return
    yield from _diagnose_versions(reports, local_versions)
    yield from _diagnose_storage(reports, storage_uri)
    if fingerprint:
        yield from _diagnose_data(reports, dataset_name, fingerprint)
    yield from _diagnose_gpus(reports)
    yield from _diagnose_clocks(reports)
    yield from _diagnose_disk_and_memory(reports)
    yield from _diagnose_network(reports)


def _silent_node_finding(report: NodeReport) -> Finding:
    """Return the finding for a node that could not run the checks."""
    problem = report.problems["node"]
    if "ModuleNotFoundError" in problem:
        remedy = "install this package there: `pip install -c constraints.txt .` in the checkout"
    else:
        remedy = (
            "see its logs in session_latest/logs of its `ray start --temp-dir`, by default /tmp/ray"
        )
    return Finding("node", False, f"{report.node_name}: {problem}", remedy)


def _diagnose_each_node(
    check: str,
    reports: list[NodeReport],
    describe_problem: Callable[[NodeReport], str],
    ok_text: str,
    remedy: str,
) -> Iterator[Finding]:
    """Yield a finding for each node with a problem, or one finding that all nodes passed.

    Args:
        check: Name of the check.
        reports: A report of each node.
        describe_problem: Returns the problem of a node, or "".
        ok_text: Text of the finding if all nodes passed.
        remedy: What to do about a problem.
    """
    all_ok = True
    for report in reports:
        problem = describe_problem(report)
        if problem:
            all_ok = False
            yield Finding(check, False, f"{report.node_name}: {problem}", remedy)
    if all_ok:
        yield Finding(check, True, ok_text)


def _diagnose_versions(
    reports: list[NodeReport], local_versions: dict[str, str]
) -> Iterator[Finding]:
    """Check that all nodes have the package versions of this machine, and that those are safe."""
    all_equal = True
    for report in reports:
        for name, version in report.versions.items():
            if version != local_versions[name]:
                all_equal = False
                text = f"{report.node_name}: {name} {version}, here {local_versions[name]}"
                remedy = "install the same checkout with constraints.txt everywhere"
                yield Finding("versions", False, text, remedy)
    for name in ("ray", "torch"):
        if not _is_safe_version(name, local_versions[name]):
            text = f"{name} {local_versions[name]}"
            yield Finding("versions", False, text, _upgrade_remedy(name))
    if all_equal:
        versions = ", ".join(f"{name} {version}" for name, version in local_versions.items())
        yield Finding("versions", True, versions)


def _diagnose_storage(reports: list[NodeReport], storage_uri: str) -> Iterator[Finding]:
    """Check that all nodes read and write the storage."""
    remedy = f"make {storage_uri} one folder for all nodes (NFS), or name another with --storage"
    return _diagnose_each_node(
        "storage",
        reports,
        lambda report: report.problems.get("storage", ""),
        f"read and written at {storage_uri}",
        remedy,
    )


def _diagnose_data(
    reports: list[NodeReport], dataset_name: str, fingerprint: str
) -> Iterator[Finding]:
    """Check that all nodes have the data set of this machine."""
    remedy = (
        f"put data set {dataset_name!r} where every node finds it: on the shared storage, "
        "with --data-dir"
    )
    return _diagnose_each_node(
        "data",
        reports,
        partial(_describe_data_problem, fingerprint),
        f"{dataset_name}, fingerprint {fingerprint}",
        remedy,
    )


def _describe_data_problem(fingerprint: str, report: NodeReport) -> str:
    """Return why a node lacks the data set, or ""."""
    if "data" in report.problems:
        return report.problems["data"]
    if report.fingerprint != fingerprint:
        return f"has other data than here ({fingerprint})"
    return ""


def _diagnose_gpus(reports: list[NodeReport]) -> Iterator[Finding]:
    """Check that each node has as many GPUs as Ray counts there."""
    n_gpus = sum(report.gpus for report in reports)
    return _diagnose_each_node(
        "gpus",
        reports,
        _describe_gpu_mismatch,
        f"{n_gpus} seen, as many as declared",
        "`ray start --num-gpus` there with what `nvidia-smi -L` shows",
    )


def _describe_gpu_mismatch(report: NodeReport) -> str:
    """Return how a node's GPUs differ from those declared to Ray, or ""."""
    if report.gpus == report.declared_gpus:
        return ""
    return f"has {report.gpus} GPUs, {report.declared_gpus:g} are declared to Ray"


def _diagnose_clocks(reports: list[NodeReport]) -> Iterator[Finding]:
    """Check the clocks. Only errors that are larger than the delay of messages can be found."""
    return _diagnose_each_node(
        "clock",
        reports,
        _describe_clock_skew,
        "no clock is measurably wrong",
        "start chrony or systemd-timesyncd there",
    )


def _describe_clock_skew(report: NodeReport) -> str:
    """Return by how much a node's clock is off, or ""."""
    if report.clock_skew <= _MAX_CLOCK_SKEW_SECONDS:
        return ""
    return f"its clock is off by {report.clock_skew:.1f} s"


def _diagnose_disk_and_memory(reports: list[NodeReport]) -> Iterator[Finding]:
    """Check the free disk and memory of all nodes."""
    min_disk = _format_gib(min(report.disk_free for report in reports))
    min_memory = _format_gib(min(report.memory_free for report in reports))
    return _diagnose_each_node(
        "room",
        reports,
        _describe_low_disk_or_memory,
        f"at least {min_disk} of disk and {min_memory} of memory are free",
        "free disk or memory: Ray writes objects to /tmp, and kills tasks if memory runs out",
    )


def _describe_low_disk_or_memory(report: NodeReport) -> str:
    """Return the free space of a node if it is low, or ""."""
    if report.disk_free >= _MIN_DISK_BYTES and report.memory_free >= _MIN_MEMORY_BYTES:
        return ""
    disk, memory = _format_gib(report.disk_free), _format_gib(report.memory_free)
    return f"{disk} free in /tmp, {memory} of memory"


def _format_gib(n_bytes: int) -> str:
    """Return a size in GiB."""
    return f"{n_bytes / 2**30:.1f} GiB"


def _diagnose_network(reports: list[NodeReport]) -> Iterator[Finding]:
    """Check that only users with the token can reach Ray, which runs any code it receives."""
    unprotected = [
        report.node_name for report in reports if report.exposed_ports and not report.requires_token
    ]
    for node in unprotected:
        yield Finding(
            "doors",
            False,
            f"{node}: other machines can reach Ray, and it requires no token",
            "set RAY_AUTH_MODE=token for `ray start` on every node and for every driver "
            "(docs/cluster.md)",
        )
    dashboards = [
        (report.node_name, port)
        for report in reports
        for port in report.exposed_ports
        if port.startswith("dashboard ")
    ]
    for node, port in dashboards:
        is_protected = node not in unprotected
        token = "with a token" if is_protected else "without a token"
        yield Finding(
            "doors",
            is_protected,
            f"{node}: {port} is reachable from other machines, {token}",
            "start the head with --dashboard-host=127.0.0.1 and use `ray dashboard` or ssh -L, "
            "if you can",
        )
    if not unprotected and not dashboards:
        is_exposed = any(report.exposed_ports for report in reports)
        protected = "Ray requires a token; the dashboard is on loopback"
        yield Finding("doors", True, protected if is_exposed else "Ray listens on loopback only")
    yield from _diagnose_each_node(
        "token",
        reports,
        lambda report: report.problems.get("token", ""),
        "no other user can read Ray's token",
        "chmod 700 ~/.ray; chmod 600 ~/.ray/auth_token; whoever has read the token can still use "
        "it: stop the cluster, delete the file, start again",
    )


def _is_safe_version(package: str, version: str) -> bool:
    """Return whether a version has no known vulnerabilities."""
    numbers = version.split("+")[0].split(".")
    return (
        tuple(int(number) for number in numbers if number.isdecimal())
        >= _MIN_SAFE_VERSIONS[package]
    )


def _upgrade_remedy(package: str) -> str:
    """Return what to do about an unsafe version."""
    version = ".".join(map(str, _MIN_SAFE_VERSIONS[package]))
    return f"upgrade: versions before {version} have known vulnerabilities"
