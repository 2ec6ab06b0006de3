"""Kill the driver, trial processes and nodes of sweeps with SIGKILL at random moments, and count
the lost epochs and trials.

    python benchmarks/kills.py --kills 30 --out kills.json

Starts a Ray cluster of three nodes on this machine: a head for the driver and two nodes of one CPU
for the trials. For each number of workers a sweep of GAIRAT on digits (a grid, so that two sweeps
have the same trials) runs undisturbed first. Then sweeps are killed at random, resumed with
`--resume` if the driver was killed, and compared with the undisturbed one. Finished sweeps are
stored in --out and not repeated. Prints the tables of kills.md.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import psutil
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from raysweep.sweep.ledger import Ledger

SPACE = """
method: gairat
sampler: {kind: grid}
scheduler: {kind: none}
base: {epochs: 10, data.train_size: 320, data.val_size: 50, "*.attacks.*.steps": 5}
space:
  method.terms.pgd.weight.lam: {categorical: [-1.0, 1.0]}
  method.terms.pgd.weight.burn_in: {categorical: [2, 6]}
"""
# Titles of Ray's processes that train, or wait for those that do.
TRAINERS = (
    "ray::ImplicitFunc",
    "ray::trainable",
    "ray::RayTrainWorker",
    "ray::TrainController",
    "ray::_TrainSession",
)
PATIENCE = 600.0


class EpochWatcher:
    """Thread that records the epochs that a sweep's trials write.

    Attributes:
        events: (seconds since the start, trial, epoch, whether reused from a shared prefix).
    """

    def __init__(self, sweep: Path, began: float) -> None:
        self.events: list[tuple[float, int, int, bool]] = []
        self._sweep, self._began, self._known = sweep, began, set[tuple[str, int]]()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def last_epochs(self) -> dict[int, int]:
        """Return the last written epoch of each trial."""
        return {trial: epoch for _, trial, epoch, _ in self.events}

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            for meta in sorted(self._sweep.glob("trials/*/epoch-*/meta.json")):
                try:
                    key = (str(meta), meta.stat().st_ino)
                    if key not in self._known:
                        shared = "shared" in json.loads(meta.read_text())["history"][-1]
                        self._known.add(key)
                        epoch = int(meta.parent.name.removeprefix("epoch-"))
                        at = time.monotonic() - self._began
                        self.events.append((at, int(meta.parent.parent.name), epoch, shared))
                except (OSError, ValueError):
                    continue


class Round:
    """Runs one sweep and kills parts of it `kills` times."""

    def __init__(self, cluster: Cluster, folder: Path, name: str, workers: int) -> None:
        self.cluster, self.folder, self.name, self.workers = cluster, folder, name, workers
        self.sweep = folder / "runs" / name
        self.rows: list[dict[str, Any]] = []
        self.driver: subprocess.Popen[bytes] | None = None

    def run(self, chance: random.Random, kills: int) -> dict[str, Any]:
        # About as many of each kind, in random order.
        kinds = ["driver", "process", "node"] * -(-kills // 3)
        chance.shuffle(kinds)
        self.began = time.monotonic()
        self.written = EpochWatcher(self.sweep, self.began)
        self._start("--name", self.name)
        while self.driver.poll() is None:
            if len(self.rows) < kills and self._has_progressed():
                time.sleep(chance.uniform(0.0, 2.5))
                self._kill(chance, kinds[len(self.rows)])
            time.sleep(0.05)
            if time.monotonic() - self.began > PATIENCE:
                self.driver.kill()
        self.written.close()
        return {"workers": self.workers, "seconds": time.monotonic() - self.began,
                "kills": self._count_repeated_epochs(),
                "code": self.driver.returncode, **self._read_outcome()}  # fmt: skip

    def _start(self, *arguments: str) -> None:
        command = [
            sys.executable,
            "-m",
            "raysweep.cli",
            "tune",
            "gairat",
            *arguments,
            "--out",
            str(self.folder),
        ]
        command += [
            "--workers",
            str(self.workers),
            "--cpus-per-trial",
            str(self.workers),
            "--gpus-per-trial",
            "0",
        ]
        if "--name" in arguments:
            command += ["--space", str(self.folder / "space.yaml")]
        environment = {**os.environ, "RAY_ADDRESS": self.cluster.address}
        log = (self.folder / f"{self.name}.log").open("ab")
        self.driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def _has_progressed(self) -> bool:
        """Whether an epoch was trained since the last kill, so that the next kill may follow."""
        since = self.rows[-1]["at"] if self.rows else 0.0
        return any(at > since and not shared for at, _, _, shared in self.written.events)

    def _kill(self, chance: random.Random, kind: str) -> None:
        trainers = {node: trial_processes(node) for node in self.cluster.worker_nodes}
        if self.driver.poll() is not None or (kind != "driver" and not any(trainers.values())):
            return
        row = {
            "at": time.monotonic() - self.began,
            "kind": kind,
            "before": self.written.last_epochs(),
            "what": "driver",
        }
        if kind == "driver":
            self.driver.send_signal(signal.SIGKILL)
            self.driver.wait()
            self._start("--resume", self.name)
        elif kind == "node":
            node = chance.choice([node for node, processes in trainers.items() if processes])
            row["what"] = f"node with {', '.join(sorted(title for _, title in trainers[node]))}"
            self.cluster.remove_node(node, allow_graceful=False)
            self.cluster.add_node(num_cpus=1)
        else:
            pid, row["what"] = chance.choice(
                [process for found in trainers.values() for process in found]
            )
            os.kill(pid, signal.SIGKILL)
        self.rows.append(row)

    def _count_repeated_epochs(self) -> list[dict[str, Any]]:
        """Add `again` to each kill: the largest number of epochs that one trial repeated after it.

        The epoch that was being trained at the kill counts.
        """
        ends = [*(row["at"] for row in self.rows), float("inf")][1:]
        for row, until in zip(self.rows, ends, strict=bool(self.rows)):
            again = 0
            for trial, last in row["before"].items():
                after = [
                    e
                    for at, t, e, _ in self.written.events
                    if t == trial and row["at"] < at <= until
                ]
                again = max(again, last + 2 - after[0] if after else 0)
            row["again"] = again
        return self.rows

    def _read_outcome(self) -> dict[str, Any]:
        ledger = Ledger.open(self.sweep)
        trials = ledger.load_trials()
        client = MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        where = f"tags.`raysweep.sweep` = '{ledger.key}'"
        runs = client.search_runs([client.get_experiment_by_name("raysweep").experiment_id], where)
        children = Counter(
            run.data.tags.get("raysweep.trial") for run in runs if "raysweep.trial" in run.data.tags
        )
        return {
            "trials": len(trials),
            "lost": ledger.space.n_trials
            - sum(t.state == "finished" and t.epoch == 10 for t in trials),
            "curves": [[epoch for epoch, _ in trial.curve] for trial in trials],
            "runs": sorted(children.values()),
            "open": sum(run.info.status == "RUNNING" for run in runs),
            "weights": {
                json.dumps(t.params): read_digests(ledger.trial_path(t.number) / "epoch-0010")
                for t in trials
            },
            "best": {json.dumps(t.params): t.best.get("robust_worst") for t in trials},
        }


def read_digests(checkpoint: Path) -> dict[str, str]:
    """Read the SHA-256 of weights and momentum from a checkpoint; {} if there is none."""
    try:
        return dict(json.loads((checkpoint / "meta.json").read_text())["sha256"])
    except OSError:
        return {}


def trial_processes(node: Any) -> list[tuple[int, str]]:
    """List (pid, title) of the node's processes that belong to trials."""
    found = []
    try:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in raylet.children(recursive=True):
            title = " ".join(process.cmdline())
            if title.startswith(TRAINERS):
                found.append(
                    (
                        process.pid,
                        title.removeprefix("ray::").split(".")[0].split("(")[0].split(" ")[0],
                    )
                )
    except psutil.Error:
        pass
    return found


def compare(result: dict[str, Any], reference: dict[str, Any]) -> str:
    same = [
        reference["weights"].get(settings) == found for settings, found in result["weights"].items()
    ]
    return f"{sum(same)} of {len(same)}"


def tables(done: dict[str, Any]) -> str:
    killed = {name: result for name, result in done.items() if not name.startswith("reference")}
    rows: list[list[Any]] = [
        [
            "#",
            "sweep",
            "workers",
            "killed",
            "at s",
            "last epoch of each trial before",
            "epochs repeated, at most",
        ]
    ]
    for name, result in killed.items():
        for row in result["kills"]:
            before = " ".join(str(epoch) for _, epoch in sorted(row["before"].items()))
            rows.append(
                [
                    len(rows),
                    name,
                    result["workers"],
                    row["what"],
                    f"{row['at']:.1f}",
                    before,
                    row["again"],
                ]
            )
    ends: list[list[Any]] = [
        ["sweep", "workers", "kills", "exit code", "trials", "trials lost", "epochs counted twice",
         "MLflow runs per trial", "MLflow runs left RUNNING", "trials with the same weights"]
    ]  # fmt: skip
    for name, result in killed.items():
        twice = sum(len(curve) - len(set(curve)) for curve in result["curves"])
        runs, same = (
            "/".join(map(str, result["runs"])),
            compare(result, done[f"reference-{result['workers']}"]),
        )
        ends.append([name, result["workers"], len(result["kills"]), result["code"],
                     result["trials"], result["lost"],
                     twice, runs, result["open"], same])  # fmt: skip
    return "\n\n".join(markdown(table) for table in (rows, ends))


def markdown(table: list[list[Any]]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--each", type=int, default=6, help="kills a sweep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30, help="start no sweep after so long")
    parser.add_argument("--out", type=Path, default=Path("kills.json"))
    args = parser.parse_args()
    done = json.loads(args.out.read_text()) if args.out.exists() else {}
    began = time.monotonic()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        for number in range(1000):
            count = sum(len(result["kills"]) for result in done.values())
            workers = 2 if number % 6 == 2 else 1
            for name, kills in (
                (f"reference-{workers}", 0),
                (f"killed-{number}", min(args.per_method // workers, args.kills - count)),
            ):
                if (
                    name in done
                    or count >= args.kills
                    or time.monotonic() - began > 60 * args.minutes
                ):
                    continue
                folder = Path(tempfile.mkdtemp(prefix="kills-"))
                # Several workers take their time to start: one trial is enough.
                one = SPACE.replace("[-1.0, 1.0]", "[-1.0]").replace("[2, 6]", "[2]")
                (folder / "space.yaml").write_text(one if workers > 1 else SPACE)
                chance = random.Random(f"{args.seed} {name}")
                done[name] = Round(cluster, folder, name, workers).run(chance, kills)
                print(
                    name,
                    json.dumps({k: v for k, v in done[name].items() if k != "weights"}),
                    folder,
                    flush=True,
                )
                args.out.write_text(json.dumps(done, indent=1))
    finally:
        cluster.shutdown()
    print(tables(done))


if __name__ == "__main__":
    main()
