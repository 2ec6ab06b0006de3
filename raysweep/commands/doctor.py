"""raysweep doctor"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING
from uuid import uuid4

from raysweep import storage
from raysweep.commands import data_settings, runs_in, writable
from raysweep.data import DataSpec, load
from raysweep.spec import SpecError
from raysweep.tracking import embedded_store, masked, store_version
from raysweep.wording import counted

if TYPE_CHECKING:
    from raysweep.sweep.probe import Answer

# Versions without the holes that are known: Ray's and torch's on every node, MLflow's behind the store.
_SAFE = {"ray": (2, 59, 1), "torch": (2, 10), "mlflow": (3, 8)}
_MIN_DISK, _MIN_MEMORY, _MAX_SKEW = 5 * 2**30, 2 * 2**30, 2.0


@dataclass(frozen=True)
class Finding:
    """One check's outcome. text: what was seen; do: what mends it."""

    check: str
    ok: bool
    text: str
    do: str = ""


def run(args: Namespace) -> int:
    # Nodes on one machine have one name and much in common.
    findings = list(dict.fromkeys(_findings(args)))
    broken = [finding for finding in findings if not finding.ok]
    if args.json:
        print(json.dumps({"sound": not broken, "findings": [asdict(finding) for finding in findings]}, indent=1))
        return 1 if broken else 0
    for finding in findings:
        print(f"{'ok    ' if finding.ok else 'BROKEN'} {finding.check:<9} {finding.text}")
        if finding.do:
            print(f"       {'do':<9} {finding.do}")
    if broken:
        print(f"raysweep: {len(broken)} of {len(findings)} checks failed", file=sys.stderr)
    return 1 if broken else 0


def _findings(args: Namespace) -> Iterator[Finding]:
    from raysweep.sweep import probe
    from raysweep.sweep.cluster import connected

    spec = DataSpec.load(data_settings(args, "the doctor"), "data")
    yield from _mlflow(embedded_store(args.out))
    try:
        runs = writable(runs_in(args), "--out")
    except SpecError as error:
        yield Finding("storage", False, str(error), "name a place that can be written, with --storage or --out")
        return
    try:
        fingerprint = load(spec).fingerprint
    except SpecError as error:
        yield Finding("data", False, f"here: {error}", "see `raysweep doctor --help` for --data-dir")
        fingerprint = ""
    marker = runs / f".doctor-{uuid4().hex}"
    marker.write_text("read me")
    storage.push(marker)
    try:
        with connected(args.address):
            answers = probe.ask(probe.Question(probe.where(runs), marker.name, spec.model_dump_json()))
            mine = probe.versions()
    except SpecError as error:
        do = "is `ray start` or `ray up` done, the port open, and RAY_AUTH_MODE the cluster's?"
        yield Finding("address", False, str(error), do)
        return
    finally:
        storage.drop_file(marker)
        marker.unlink()
    where = args.address or os.environ.get("RAY_ADDRESS") or "a cluster of its own on this machine"
    yield Finding("address", True, f"{where}: {counted(len(answers), 'node')}")
    yield from _nodes(answers, mine, storage.name(runs), spec.name, fingerprint)


def _mlflow(uri: str) -> Iterator[Finding]:
    try:
        found = store_version(uri)
    except SpecError as error:
        yield Finding("mlflow", False, str(error), "start the server, or set MLFLOW_TRACKING_URI")
        return
    do = f"upgrade: versions before {_dotted(_SAFE['mlflow'])} have known holes"
    ok = _numbers(found) >= _SAFE["mlflow"]
    yield Finding("mlflow", ok, f"{found} at {masked(uri)}", "" if ok else do)


def _nodes(
    answers: "list[Answer]", mine: dict[str, str], shared: str, data: str, fingerprint: str
) -> Iterator[Finding]:
    silent = [answer for answer in answers if "node" in answer.problems]
    for answer in silent:
        missing = "ModuleNotFoundError" in answer.problems["node"]
        install = "install this package there: `pip install -c constraints.txt .` in the checkout"
        do = install if missing else "see its logs in /tmp/ray/session_latest/logs"
        yield Finding("node", False, f"{answer.node}: {answer.problems['node']}", do)
    heard = [answer for answer in answers if "node" not in answer.problems]
    if not heard:
        return
    yield from _versions(heard, mine)
    folder = f"make {shared} one folder for all nodes (NFS), or name another with --storage"
    yield from _each("storage", heard, _no_storage, f"read and written at {shared}", folder)
    if fingerprint:
        fetch = f"put data set {data!r} where every node finds it: on the shared storage, with --data-dir"
        yield from _each("data", heard, partial(_no_data, fingerprint), f"{data}, fingerprint {fingerprint}", fetch)
    total = f"{sum(a.gpus for a in heard)} seen, as many as declared"
    yield from _each("gpus", heard, _miscounted, total, "`ray start --num-gpus` there with what `nvidia-smi -L` shows")
    yield from _each("clock", heard, _skewed, "no clock is provably off", "start chrony or systemd-timesyncd there")
    least = f"at least {_gib(min(a.disk_free for a in heard))} of disk and {_gib(min(a.memory_free for a in heard))}"
    crowded = "make room: Ray spills to /tmp, and kills tasks when memory ends"
    yield from _each("room", heard, _crowded, f"{least} of memory are free", crowded)
    yield from _doors(heard)


def _no_storage(answer: "Answer") -> str:
    return answer.problems.get("storage", "")


def _no_data(fingerprint: str, answer: "Answer") -> str:
    other = "" if answer.fingerprint == fingerprint else f"has other data than here ({fingerprint})"
    return answer.problems.get("data", other)


def _miscounted(answer: "Answer") -> str:
    same = answer.gpus == answer.gpus_declared
    return "" if same else f"has {answer.gpus} GPUs, Ray was told {answer.gpus_declared:g}"


def _skewed(answer: "Answer") -> str:
    return f"its clock is off by {answer.skew:.1f} s" if answer.skew > _MAX_SKEW else ""


def _crowded(answer: "Answer") -> str:
    enough = answer.disk_free >= _MIN_DISK and answer.memory_free >= _MIN_MEMORY
    return "" if enough else f"{_gib(answer.disk_free)} free in /tmp, {_gib(answer.memory_free)} of memory"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _each(
    check: str, answers: "list[Answer]", wrong: "Callable[[Answer], str]", good: str, do: str
) -> Iterator[Finding]:
    """A finding for each node where something is wrong, or one that all is well."""
    bad = [(answer.node, text) for answer in answers if (text := wrong(answer))]
    for node, text in bad:
        yield Finding(check, False, f"{node}: {text}", do)
    if not bad:
        yield Finding(check, True, good)


def _versions(heard: "list[Answer]", mine: dict[str, str]) -> Iterator[Finding]:
    differ = [
        (answer.node, f"{name} {found}, here {mine[name]}")
        for answer in heard
        for name, found in answer.versions.items()
        if found != mine[name]
    ]
    for node, text in differ:
        yield Finding("versions", False, f"{node}: {text}", "install the same checkout with constraints.txt everywhere")
    for name in ("ray", "torch"):
        if _numbers(mine[name]) < _SAFE[name]:
            do = f"upgrade: versions before {_dotted(_SAFE[name])} have known holes"
            yield Finding("versions", False, f"{name} {mine[name]}", do)
    if not differ:
        yield Finding("versions", True, ", ".join(f"{name} {found}" for name, found in mine.items()))


def _doors(heard: "list[Answer]") -> Iterator[Finding]:
    """Who could talk to Ray: it runs whatever it is told."""
    open_to_all = [a.node for a in heard if not a.token and a.listening]
    for node in open_to_all:
        do = "set RAY_AUTH_MODE=token for `ray start` on every node and for who connects (docs/cluster.md)"
        yield Finding("doors", False, f"{node}: Ray listens beyond loopback and wants no token", do)
    dashboards = [(a.node, port) for a in heard for port in a.listening if port.startswith("dashboard ")]
    for node, port in dashboards:
        wanted = "behind a token" if node not in open_to_all else "for everybody"
        yield Finding(
            "doors",
            node not in open_to_all,
            f"{node}: {port} is reachable from other machines, {wanted}",
            "start the head with --dashboard-host=127.0.0.1 and use `ray dashboard` or ssh -L, if you can",
        )
    if not open_to_all and not dashboards:
        beyond = sum(bool(a.listening) for a in heard)
        closed = "Ray listens on loopback alone" if not beyond else "Ray wants a token; the dashboard is on loopback"
        yield Finding("doors", True, closed)


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdecimal())


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
