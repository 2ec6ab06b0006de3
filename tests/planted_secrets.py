"""Plant secrets in the environment of real commands, and look for them in everything these leave.

    python tests/planted_secrets.py            # a sweep, a pipeline, four failures; minutes
    python tests/planted_secrets.py --nodes    # instead, a sweep on a cluster of two nodes

Keys of Amazon, passwords of MLflow's server and of Optuna's database, and tokens of other services
are in the driver's environment. All of them hold one random mark. It may be nowhere but there: not
in files of sweeps and pipelines, logs of raysweep and Ray, MLflow's database and artifacts, what
commands print, arguments of processes, or the environment of workers on other nodes. Every process
is seen: those of Python write down their own arguments and those of what they start.

First the mark is planted on purpose in each kind of place, and the search must find all of them.
"""

import argparse
import base64
import gzip
import json
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import psutil
from free_ports import choose_free_port
from mlflow_server import MlflowServer

MARK = secrets.token_hex(8)
PASSWORD = f"password{MARK}"
LOGIN = f"ada:{PASSWORD}"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": f"PLANTED{MARK}",
    "AWS_SECRET_ACCESS_KEY": f"aws/secret{MARK}",
    "AWS_SESSION_TOKEN": f"session{MARK}",
    "DB_PASSWORD": f"database{MARK}",
    "WANDB_API_KEY": f"wandb{MARK}",
    "HF_TOKEN": f"hf_planted{MARK}",
}


def list_needles() -> list[bytes]:
    """List the forms of the mark: plain, UTF-16, and base64 at each place in a longer text."""
    needles = [MARK.encode(), MARK.encode("utf-16-le")]
    for offset, n_mixed in ((0, 0), (1, 2), (2, 3)):
        encoded = base64.b64encode(bytes(offset) + MARK.encode())
        # The last group depends on what follows.
        needles.append(encoded[n_mixed:-4])
    return needles


NEEDLES = list_needles()
# Imported by each Python at its start.
RECORDER = """\
import os, sys

def record(words):
    with open({file!r}, "ab") as stream:
        stream.write(b"\\0".join(map(os.fsencode, words)) + b"\\n")

def record_start(event, arguments):
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn"):
        words = arguments[1]
        record([words] if isinstance(words, (str, bytes, os.PathLike)) else list(words))
    elif event == "os.system":
        record([arguments[0]])

with open("/proc/self/cmdline", "rb") as stream:
    record(stream.read().split(b"\\0"))
sys.addaudithook(record_start)
"""
SMALL = ["--set", "epochs=2", "--set", "data.train_size=64", "--set", "data.val_size=50"]
SMALL += ["--set", "*.attacks.*.steps=2", "--set", "validation.finish.*.steps=2"]
SMALL += ["--set", "validation.finish.*.runs=1"]
LONG = ["--set", "epochs=400", "--set", "data.train_size=640", "--set", "data.val_size=50"]
PIPELINE = """\
set: {epochs: 2, data.val_size: 50, data.train_size: 64, "*.attacks.*.steps": 2,
      "validation.finish.*.steps": 1, "validation.finish.*.runs": 1}
stages:
  - {kind: train, runs: {AT: {method: at}}, seeds: [0]}
  - {kind: autoattack, attacks: {APGD: apgd-ce}, n: 10}
  - {kind: report}
"""


@dataclass
class Finding:
    """A place where the mark is."""

    where: str
    text: str


@dataclass
class ProcessWatch:
    """Looks at the arguments of all processes several times a second, and at those in a record.

    Attributes:
        record: File in which processes write arguments down (see `RECORDER`).
        n_looks: Number of looks.
        n_arguments: Number of different command lines that were seen.
        findings: Where the mark was.
    """

    record: Path
    n_looks: int = 0
    findings: list[Finding] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def n_arguments(self) -> int:
        return len(self._seen)

    def run(self) -> None:
        """Look until `stop`."""
        while not self._ended.wait(0.2):
            self.n_looks += 1
            for process in Path("/proc").glob("[0-9]*"):
                # It may have ended since.
                with suppress(OSError):
                    self._look_at((process / "cmdline").read_bytes())

    def _look_at(self, arguments: bytes) -> None:
        text = arguments.replace(b"\0", b" ").strip().decode(errors="replace")
        if text not in self._seen and find_needle(arguments) is not None:
            self.findings.append(Finding("arguments of a process", text))
        self._seen.add(text)

    def stop(self) -> None:
        """End the looks, and read the record."""
        self._ended.set()
        if self.record.exists():
            for line in self.record.read_bytes().splitlines():
                self._look_at(line)


@contextmanager
def watch_processes(folder: Path) -> Iterator[ProcessWatch]:
    """Look at processes during the block; those that it starts write down arguments in a folder."""
    watch = ProcessWatch(folder / "arguments")
    (folder / "sitecustomize.py").write_text(RECORDER.format(file=str(watch.record)))
    former_path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), former_path]))
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.stop()
        thread.join()
        if former_path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = former_path


@dataclass
class Playground:
    """A home folder, a folder for temporary files, and an MLflow server with a password in its URI.

    Attributes:
        folder: Where everything is.
        server: The server, started without the planted secrets.
    """

    folder: Path
    server: MlflowServer

    @property
    def environment(self) -> dict[str, str]:
        """Environment of commands, with the secrets."""
        own = {"HOME": str(self.folder / "home"), "TMPDIR": str(self.folder / "tmp")}
        tracking = self.server.uri.replace("://", f"://{LOGIN}@")
        return {**os.environ, **own, **ENVIRONMENT, "MLFLOW_TRACKING_URI": tracking}

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a command of raysweep; what it prints goes to files."""
        code = "import sys; from raysweep.cli import main; sys.exit(main())"
        printed = self.folder / "printed"
        with (
            (printed / f"{name}.out").open("wb") as out,
            (printed / f"{name}.err").open("wb") as err,
        ):
            return subprocess.Popen(
                [sys.executable, "-c", code, *arguments],
                env=self.environment,
                cwd=self.folder / "work",
                stdout=out,
                stderr=err,
            )

    def run(self, name: str, *arguments: str, expected: tuple[int, ...] = (0,)) -> None:
        """Run a command and check its exit code."""
        code = self.start(name, *arguments).wait(timeout=1200)
        error = (self.folder / "printed" / f"{name}.err").read_text()
        print(f"{name}: exit code {code}; {error.strip().splitlines()[-1:]}", flush=True)
        assert code in expected, error

    def run_until(self, name: str, what: str, then: signal.Signals | None, *args: str) -> None:
        """Run a command; once it trains, kill a trial, or the server, and wait for the end."""
        process = self.start(name, *args)
        deadline = time.monotonic() + 600
        trials = self.folder / "work" / "out" / "runs" / name / "trials"
        while not list(trials.glob("*/epoch-*")):
            assert process.poll() is None and time.monotonic() < deadline, name
            time.sleep(0.1)
        if what == "server":
            self.server.kill()
        else:
            for child in psutil.Process(process.pid).children(recursive=True):
                if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::ImplicitFunc"):
                    child.kill()
        if then is not None:
            time.sleep(5)
            process.send_signal(then)
        code = process.wait(timeout=1200)
        print(f"{name}: exit code {code} after the death of a {what}", flush=True)


def find_needle(content: bytes) -> int | None:
    """Return the first place of the mark in any form; None if it is not there."""
    places = [content.find(needle) for needle in NEEDLES]
    return min((place for place in places if place >= 0), default=None)


def list_contents(path: Path) -> list[bytes]:
    """Return the content of a file, and what is packed in it."""
    contents = [path.read_bytes()]
    if contents[0].startswith(b"\x1f\x8b"):
        contents.append(gzip.decompress(contents[0]))
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            contents += [archive.read(name) for name in archive.namelist()]
    return contents


def search_files(folder: Path) -> tuple[list[Finding], int]:
    """Look for the mark in all files below a folder; return where it is and the number of files."""
    findings, n_files = [], 0
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        n_files += 1
        for content in list_contents(path):
            place = find_needle(content)
            if place is not None:
                around = content[max(place - 80, 0) : place + 40].decode(errors="replace")
                findings.append(Finding(str(path), around))
                break
    return findings, n_files


def plant_on_purpose(folder: Path) -> int:
    """Plant the mark in a file of each kind, and in arguments of processes that end at once.

    Returns:
        The number of places.
    """
    secret = f"x{PASSWORD}yz"
    (folder / "plain.log").write_text(f"error: http://{LOGIN}@host/")
    for offset in range(3):
        header = base64.b64encode(b"a" * offset + LOGIN.encode() + b"-and-more")
        (folder / f"header-{offset}").write_bytes(b"Authorization: Basic " + header)
    (folder / "wide.txt").write_bytes(secret.encode("utf-16-le"))
    (folder / "log.gz").write_bytes(gzip.compress(secret.encode()))
    with zipfile.ZipFile(folder / "arrays.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", secret * 100)
    (folder / "quoted.json").write_text(json.dumps({"key": quote(f"a/b {secret}", safe="")}))
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        database.execute("create table tags (value text)")
        database.execute("insert into tags values (?)", [secret])
        database.commit()
    # By a process of Python that has the recorder, which itself has no secret in its arguments.
    code = "import os, subprocess; subprocess.run(['true', os.environ['SECRET']]); "
    code += "os.system('true ' + os.environ['SECRET'] + '-shell')"
    environment = {**os.environ, "SECRET": secret}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    subprocess.run([sys.executable, "-c", "", secret], env=environment, check=True)
    return 9 + 3


def check_search(folder: Path) -> None:
    """Check that the search finds the mark wherever it is planted on purpose."""
    place, record = folder / "place", folder / "record"
    place.mkdir()
    record.mkdir()
    with watch_processes(record) as watch:
        n_planted = plant_on_purpose(place)
    findings, n_files = search_files(place)
    n_commands = len({finding.text for finding in watch.findings})
    assert len(findings) == n_files == 9, [finding.where for finding in findings]
    assert n_files + n_commands >= n_planted, watch.findings
    print(f"planted on purpose: {n_files} files and {n_commands} command lines, all found")


def play_locally(place: Playground) -> None:
    """A sweep, a pipeline and failures, each on a Ray of its own."""
    out = ["--out", "out"]
    tune = ["tune", "at", "--space", "space.yaml", *out]
    place.run("pipeline", "run", "pipeline.yaml", *out)
    place.run("sweep", *tune, "--trials", "2", "--name", "sweep", *SMALL)
    place.run("show", "show", "sweep", *out)
    place.run(
        "database",
        *(*tune, "--trials", "1", "--name", "database", *SMALL),
        *("--optuna", "postgresql://ada:${DB_PASSWORD}@127.0.0.1:9/none"),
        expected=(2, 3),
    )
    bucket = "s3://planted/sweeps?endpoint_override=127.0.0.1:9&scheme=http"
    place.run("bucket", *tune, "--storage", bucket, *SMALL, expected=(2, 3))
    place.run_until(
        "trial", "trial", signal.SIGINT, *tune, "--trials", "1", "--name", "trial", *LONG
    )
    place.run_until(
        "server", "server", signal.SIGINT, *tune, "--trials", "1", "--name", "server", *LONG
    )
    place.run("unreachable", "train", "at", *SMALL, *out, expected=(3,))


def play_on_two_nodes(place: Playground) -> list[Finding]:
    """A sweep from a driver with secrets, on two nodes that have none; look at their workers."""
    from ray.cluster_utils import Cluster

    from raysweep.sweep.ray_environment import ray_environment
    from raysweep.sweep.ray_internals import listen_on_loopback

    findings: list[Finding] = []
    os.environ.update(HOME=str(place.folder / "home"), TMPDIR=str(place.folder / "tmp"))
    with ray_environment(), listen_on_loopback():
        temporary = place.folder / "tmp" / "ray"
        # Another Ray of this machine may have the usual port.
        port = choose_free_port()
        head = {"num_cpus": 1, "temp_dir": str(temporary), "dashboard_port": port}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(num_cpus=1, temp_dir=str(temporary))
            cluster.wait_for_nodes()
            arguments = [
                "tune",
                "at",
                "--space",
                "space.yaml",
                "--out",
                "out",
                "--name",
                "nodes",
                *SMALL,
            ]
            process = place.start(
                "nodes", *arguments, "--trials", "4", "--address", cluster.address
            )
            n_workers = set()
            while process.poll() is None:
                for worker in psutil.Process().children(recursive=True):
                    try:
                        arguments_of_worker, environment = worker.cmdline(), worker.environ()
                    except psutil.Error:
                        continue
                    if not arguments_of_worker or not arguments_of_worker[0].startswith("ray::"):
                        continue
                    n_workers.add(worker.pid)
                    for name, value in environment.items():
                        if MARK in value:
                            findings.append(Finding("environment of a worker", f"{name}={value}"))
                time.sleep(0.2)
            error = (place.folder / "printed" / "nodes.err").read_text()
            print(
                f"nodes: exit code {process.returncode}, {len(n_workers)} workers seen", flush=True
            )
            assert process.returncode == 0 and n_workers, error
        finally:
            cluster.shutdown()
    return findings


def main() -> int:
    """Play everything; print where the mark is; return 1 if it is anywhere."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", action="store_true")
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    args = parser.parse_args()
    # A busy machine starts the second node late.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
    # Sockets of Ray need a short path.
    folder = Path(tempfile.mkdtemp(prefix="plant-", dir="/tmp"))
    for name in ("home", "tmp", "printed", "work", "server"):
        (folder / name).mkdir()
    (folder / "work" / "pipeline.yaml").write_text(PIPELINE)
    space = "method: at\nfinalists: 0\nspace: {optim.lr: {float: [0.01, 0.1]}}\n"
    (folder / "work" / "space.yaml").write_text(space)
    others = Path(tempfile.mkdtemp(prefix="plant-"))
    check_search(others)
    place = Playground(folder, MlflowServer(folder / "server"))
    place.server.start()
    findings: list[Finding] = []
    try:
        (others / "all").mkdir()
        with watch_processes(others / "all") as watch:
            if args.nodes:
                findings += play_on_two_nodes(place)
            else:
                play_locally(place)
    finally:
        place.server.kill()
    findings += watch.findings
    in_files, n_files = search_files(folder)
    findings += in_files
    for finding in findings:
        print(f"FOUND {finding.where}: {finding.text}")
    print(
        f"{len(findings)} findings in {n_files} files and {watch.n_arguments} command lines "
        f"({watch.n_looks} looks)"
    )
    if not args.keep:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(others, ignore_errors=True)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
