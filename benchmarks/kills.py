"""Kill drivers and workers of sweeps with SIGKILL at random moments, and count what is lost
and what is trained twice.

    python benchmarks/kills.py --kills 100 --out kills.json

Starts a Ray cluster of one node with two CPUs on this machine. Half of the sweeps are in a folder,
half in a bucket (moto's S3 server on this machine). All are GAIRAT on digits over the same grid.
One runs undisturbed first; the others are killed again and again, resumed with `--resume` if it was
the driver, and compared with the undisturbed one. Drivers and workers are forks of servers that
have imported what they need; the workers' is that of the tests. Finished sweeps are stored in --out
and not repeated. Prints the tables of kills.md.
"""

import argparse
import json
import logging
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from command_line import create_parser

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.update(
    AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="hush", AWS_EC2_METADATA_DISABLED="true"
)

import psutil
import ray
from measure import describe_machine
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from raysweep.cli import main as run_command_line
from raysweep.stores import open_path
from raysweep.sweep import worker_server
from raysweep.sweep.cluster import connect_to_cluster
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.ray_environment import ray_environment
from raysweep.sweep.ray_internals import listen_on_loopback

SPACE = """
method: gairat
sampler: {kind: grid}
scheduler: {kind: none}
base: {epochs: 12, data.train_size: 320, data.val_size: 50, "*.attacks.*.steps": 5}
space:
  method.terms.pgd.weight.lam: {categorical: [-1.0, 1.0]}
  method.terms.pgd.weight.burn_in: {categorical: [2, 6]}
"""
EPOCHS, N_TRIALS = 12, 4
# Titles of Ray's processes that train, or wait for those that do.
TRAINERS = (
    "ray::ImplicitFunc",
    "ray::trainable",
    "ray::RayTrainWorker",
    "ray::TrainController",
    "ray::_TrainSession",
)
# Arguments of nodes whose workers are forks.
FORKED: dict[str, Any] = {
    "setup_worker_path": worker_server.__file__,
    "include_log_monitor": False,
}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "raysweep.sweep.tuner",
        "raysweep.training.distributed",
        "raysweep.commands.common",
        "raysweep.result_loading",
        "raysweep.terminal",
        "mlflow.tracking",
        "mlflow.store.tracking.sqlalchemy_store",
        "ray.cluster_utils",
    ]
)
META_PATTERN = re.compile(r"/trials/(\d+)/epoch-(\d+)/meta\.json$")
PATIENCE = 600.0


@dataclass(frozen=True)
class WrittenEpoch:
    """A checkpoint that a trial finished.

    Attributes:
        at: Seconds since the start of the sweep.
        is_shared: Whether it was reused from a shared prefix.
    """

    at: float
    trial: int
    epoch: int
    is_shared: bool


class FolderVersions:
    """All checkpoints that were ever finished in a folder, as far as polling sees them."""

    def __init__(self, folder: Path) -> None:
        self.location = str(folder)

    def list_metas(self, sweep: str) -> dict[tuple[str, str], str]:
        """Return {(key, version): path} of meta.json files."""
        found = {}
        for meta in Path(self.location, sweep).glob("trials/*/epoch-*/meta.json"):
            try:
                found[str(meta), str(meta.stat().st_ino)] = str(meta)
            except OSError:
                continue
        return found

    def read(self, path: str) -> bytes:
        return Path(path).read_bytes()


class BucketVersions:
    """All checkpoints that were ever finished in a bucket that keeps every version of an object."""

    def __init__(self, host: str, bucket: str) -> None:
        import boto3

        self.location = f"s3://{bucket}/sweeps?endpoint_override={host}&scheme=http"
        self._bucket = bucket
        self._client = boto3.client("s3", endpoint_url=f"http://{host}", region_name="us-east-1")
        self._client.create_bucket(Bucket=bucket)
        self._client.put_bucket_versioning(
            Bucket=bucket, VersioningConfiguration={"Status": "Enabled"}
        )

    def list_metas(self, sweep: str) -> dict[tuple[str, str], tuple[str, str]]:
        """Return {(key, version): (key, version)} of meta.json files.

        Forget earlier versions of all other files, which the server has in the memory of this
        process.
        """
        pages = self._client.get_paginator("list_object_versions").paginate(
            Bucket=self._bucket, Prefix="sweeps/"
        )
        found, outdated = {}, []
        for page in pages:
            for entry in page.get("Versions", []):
                identity = entry["Key"], entry["VersionId"]
                if not META_PATTERN.search(f"/{entry['Key']}"):
                    if not entry["IsLatest"]:
                        outdated.append({"Key": identity[0], "VersionId": identity[1]})
                elif entry["Key"].startswith(f"sweeps/{sweep}/"):
                    found[identity] = identity
        for start in range(0, len(outdated), 500):
            self._client.delete_objects(
                Bucket=self._bucket, Delete={"Objects": outdated[start : start + 500]}
            )
        return found

    def read(self, identity: tuple[str, str]) -> bytes:
        key, version = identity
        answer = self._client.get_object(Bucket=self._bucket, Key=key, VersionId=version)
        return answer["Body"].read()


class EpochWatcher:
    """Thread that records the epochs that a sweep's trials write."""

    def __init__(self, versions: FolderVersions | BucketVersions, sweep: str) -> None:
        self.written: list[WrittenEpoch] = []
        self.began = time.monotonic()
        self._versions, self._sweep = versions, sweep
        self._known: set[tuple[str, str]] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def last_epochs(self) -> dict[int, int]:
        """Return the last written epoch of each trial."""
        return {one.trial: one.epoch for one in self.written}

    def close(self) -> None:
        """Look a last time."""
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        pause = 0.01 if isinstance(self._versions, FolderVersions) else 0.3
        while not self._over.wait(pause):
            self._look()

    def _look(self) -> None:
        metas = self._versions.list_metas(self._sweep)
        for identity in sorted(metas.keys() - self._known):
            try:
                history = json.loads(self._versions.read(metas[identity]))["history"]
            except (OSError, ValueError):
                continue
            self._known.add(identity)
            trial, epoch = map(int, META_PATTERN.search(f"/{identity[0]}").groups())
            at = time.monotonic() - self.began
            self.written.append(WrittenEpoch(at, trial, epoch, "shared" in history[-1]))


@dataclass
class Kill:
    """One kill.

    Attributes:
        at: Seconds since the start of the sweep.
        kind: driver or worker.
        before: Last epoch of each trial before it.
        repeated: Largest number of epochs that one trial repeated after it; the epoch that was
            being trained counts.
    """

    at: float
    kind: str
    before: dict[int, int] = field(default_factory=dict)
    repeated: int = 0


class Round:
    """Runs one sweep and kills parts of it."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        versions: FolderVersions | BucketVersions,
        name: str,
    ) -> None:
        self.cluster, self.folder, self.versions, self.name = cluster, folder, versions, name
        self.kills: list[Kill] = []

    def run(self, chance: random.Random, n_kills: int, kinds: list[str]) -> dict[str, Any]:
        # About as many of each kind, in random order.
        order = kinds * -(-n_kills // len(kinds))
        chance.shuffle(order)
        self.watcher = EpochWatcher(self.versions, self.name)
        self._start_driver("--name", self.name, "--space", str(self.folder / "space.yaml"))
        while self.driver.is_alive():
            if len(self.kills) < n_kills and self._has_progressed():
                time.sleep(chance.uniform(0.0, 1.0))
                self._kill(chance, order[len(self.kills)])
            self.driver.join(0.02)
            if self._seconds() > PATIENCE:
                self.driver.kill()
        self.watcher.close()
        self._count_repeated_epochs()
        return {
            "seconds": self._seconds(),
            "code": self.driver.exitcode,
            "kills": [vars(kill) for kill in self.kills],
            **self._read_outcome(),
        }

    def _seconds(self) -> float:
        return time.monotonic() - self.watcher.began

    def _start_driver(self, *arguments: str) -> None:
        command = [
            "tune",
            "gairat",
            *arguments,
            "--set",
            "finalists=0",
            "--set",
            "base_runs=0",
            "--out",
            str(self.folder),
        ]
        command += ["--storage", self.versions.location]
        command += ["--cpus-per-trial", "1", "--gpus-per-trial", "0"]
        environment = {
            "RAY_ADDRESS": self.cluster.address,
            "RAYSWEEP_CACHE": os.environ["RAYSWEEP_CACHE"],
        }
        log = str(self.folder / f"{self.name}.log")
        self.driver = FORKS.Process(target=run_driver, args=(command, environment, log))
        self.driver.start()

    def _has_progressed(self) -> bool:
        """Whether an epoch was trained since the last kill, so that the next kill may follow."""
        since = self.kills[-1].at if self.kills else 0.0
        return any(one.at > since and not one.is_shared for one in self.watcher.written)

    def _kill(self, chance: random.Random, kind: str) -> None:
        workers = list_workers()
        if not self.driver.is_alive() or (kind != "driver" and not workers):
            return
        kill = Kill(self._seconds(), kind, self.watcher.last_epochs())
        if kind == "driver":
            self.driver.kill()
            self.driver.join()
            self._start_driver("--resume", self.name)
        else:
            os.kill(chance.choice(workers), signal.SIGKILL)
        self.kills.append(kill)

    def _count_repeated_epochs(self) -> None:
        ends = [*(kill.at for kill in self.kills), float("inf")][1:]
        for kill, until in zip(self.kills, ends, strict=bool(self.kills)):
            for trial, last in kill.before.items():
                after = [
                    one.epoch
                    for one in self.watcher.written
                    if one.trial == trial and kill.at < one.at <= until
                ]
                if after:
                    kill.repeated = max(kill.repeated, last + 2 - after[0])

    def _read_outcome(self) -> dict[str, Any]:
        ledger = open_ledger(self.versions.location, self.name)
        trials = ledger.load_trials()
        client = MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        where = f"tags.`raysweep.sweep` = '{ledger.key}'"
        runs = client.search_runs([client.get_experiment_by_name("raysweep").experiment_id], where)
        children = Counter(
            run.data.tags.get("raysweep.trial") for run in runs if "raysweep.trial" in run.data.tags
        )
        finished = [t for t in trials if t.state == "finished" and t.epoch == EPOCHS]
        written = Counter((one.trial, one.epoch) for one in self.watcher.written)
        own = Counter((one.trial, one.epoch) for one in self.watcher.written if not one.is_shared)
        return {
            "trials": len(trials),
            "lost trials": N_TRIALS - len(finished),
            "lost epochs": sum(EPOCHS - len(dict(trial.curve)) for trial in finished),
            "counted twice": sum(len(t.curve) - len(dict(t.curve)) for t in trials),
            "trained": len(own),
            "trained twice": sum(count > 1 for count in own.values()),
            "repeats": [
                [round(one.at, 2), one.trial, one.epoch, one.is_shared]
                for one in self.watcher.written
                if written[one.trial, one.epoch] > 1
            ],
            "runs": sorted(children.values()),
            "open": sum(run.info.status == "RUNNING" for run in runs),
            "weights": {json.dumps(t.params): read_digests(ledger, t.number) for t in trials},
        }


def run_driver(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Run `raysweep ARGUMENTS` in this process, which is a fork."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(run_command_line(arguments))


def open_ledger(location: str, name: str) -> Ledger:
    return Ledger.open(open_path(location) / name)


def read_digests(ledger: Ledger, trial: int) -> dict[str, str]:
    """Read the SHA-256 of weights and momentum from a trial's last checkpoint; {} without one."""
    meta = ledger.trial_path(trial) / f"epoch-{EPOCHS:04d}" / "meta.json"
    return dict(meta.read_json()["sha256"]) if meta.is_file() else {}


def list_workers() -> list[int]:
    """List the processes that belong to trials."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(TRAINERS):
                found.append(process.pid)
        except psutil.Error:
            continue
    return sorted(found)


def make_tables(done: dict[str, Any]) -> str:
    """Make the Markdown tables: of all kills, by storage, and of each sweep."""
    reference = done["reference"]["weights"]
    killed = {name: result for name, result in done.items() if name != "reference"}
    head = ["sweep", "kills (driver, worker)", "s", "exit code", "trials lost"]
    head += ["epochs lost", "epochs trained", "trained twice", "counted twice"]
    head += ["repeated by a kill, at most", "MLflow runs a trial", "left RUNNING", "same weights"]
    sweeps: list[list[Any]] = [head]
    totals: dict[str, Counter[str]] = {}
    for name, result in killed.items():
        kinds = Counter(kill["kind"] for kill in result["kills"])
        same = [reference[settings] == digests for settings, digests in result["weights"].items()]
        counts = Counter(
            {
                **{key: result[key] for key in ("lost trials", "lost epochs", "trained")},
                **{key: result[key] for key in ("trained twice", "counted twice", "open")},
                **kinds,
                "kills": len(result["kills"]),
                "sweeps": 1,
                "trials": result["trials"],
                "other weights": len(same) - sum(same),
            }
        )
        totals.setdefault(name.partition("-")[0], Counter()).update(counts)
        sweeps.append(
            [
                name,
                f"{counts['kills']} ({kinds['driver']}, {kinds['worker']})",
                f"{result['seconds']:.0f}",
                result["code"],
                *(result[key] for key in ("lost trials", "lost epochs", "trained")),
                *(result[key] for key in ("trained twice", "counted twice")),
                max((kill["repeated"] for kill in result["kills"]), default=0),
                "/".join(map(str, result["runs"])),
                result["open"],
                f"{sum(same)} of {len(same)}",
            ]
        )
    columns = ["sweeps", "kills", "driver", "worker", "trials", "lost trials"]
    columns += ["lost epochs", "trained", "trained twice", "counted twice", "open"]
    columns += ["other weights"]
    summary: list[list[Any]] = [["storage", *columns]]
    for storage_kind, counts in totals.items():
        summary.append([storage_kind, *(counts[column] for column in columns)])
    return "\n\n".join(make_markdown(table) for table in (summary, sweeps))


def make_markdown(table: list[list[Any]]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]])


def run_sweeps(args: argparse.Namespace, cluster: Cluster, host: str, done: dict[str, Any]) -> None:
    """Run the sweeps that are not done yet, until enough was killed or the time is over."""
    began = time.monotonic()
    names = ["reference", *(f"{('folder', 'bucket')[n % 2]}-{n // 2}" for n in range(1000))]
    for name in names:
        n_left = args.kills - sum(len(result["kills"]) for result in done.values())
        if n_left <= 0 or time.monotonic() - began > 60 * args.minutes:
            break
        if name in done:
            continue
        folder = Path(tempfile.mkdtemp(prefix="kills-"))
        (folder / "space.yaml").write_text(SPACE)
        versions = (
            BucketVersions(host, f"{name}-{args.seed}")
            if name.startswith("bucket")
            else FolderVersions(folder / "runs")
        )
        n_kills = 0 if name == "reference" else min(args.each, n_left)
        chance = random.Random(f"{args.seed} {name}")
        done[name] = Round(cluster, folder, versions, name).run(chance, n_kills, args.kinds)
        # The server keeps all versions in the memory of this process.
        urlopen(Request(f"http://{host}/moto-api/reset", method="POST")).read()
        shown = {key: value for key, value in done[name].items() if key != "weights"}
        print(name, json.dumps(shown), folder, flush=True)
        args.out.write_text(json.dumps(done, indent=1))


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--each", type=int, default=13, help="kills a sweep")
    parser.add_argument("--kinds", nargs="+", default=["driver", "worker"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30, help="start no sweep after so long")
    parser.add_argument("--out", type=Path, default=Path("kills.json"))
    args = parser.parse_args()
    done = json.loads(args.out.read_text()) if args.out.exists() else {}
    os.environ["RAYSWEEP_CACHE"] = tempfile.mkdtemp(prefix="kills-copies-")
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host = "{}:{}".format(*server.get_host_and_port())
    sockets = Path(tempfile.mkdtemp(prefix="forks-"))
    with ray_environment(), listen_on_loopback(), worker_server.run_worker_server(sockets):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **FORKED})
        try:
            # The job of the first worker must not end before those of its forks.
            with connect_to_cluster(cluster.address):
                ray.get(ray.remote(lambda: None).remote())
                run_sweeps(args, cluster, host, done)
        finally:
            cluster.shutdown()
            server.stop()
    print(describe_machine())
    print(make_tables(done))


if __name__ == "__main__":
    main()
