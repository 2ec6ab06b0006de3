"""`raysweep doctor` on a good cluster and on broken ones."""

import http.server
import json
import threading
from pathlib import Path

import forked_processes
import pytest

from raysweep.cli import main
from raysweep.commands import doctor
from raysweep.data import DataSpec
from raysweep.errors import ExitCode
from raysweep.sweep import node_probe

pytestmark = pytest.mark.ray


def test_a_good_cluster(ray_cluster, workdir: Path, capsys) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sound"]
    checks = [
        "mlflow",
        "address",
        "versions",
        "storage",
        "data",
        "gpus",
        "clock",
        "room",
        "doors",
        "token",
    ]
    assert [finding["check"] for finding in report["findings"]] == checks
    assert not any(finding["do"] for finding in report["findings"])
    assert report["findings"][-2]["text"] == "Ray listens on loopback only"
    assert not (workdir / "mlflow.db").exists() and not list((workdir / "runs").iterdir()), (
        "it leaves nothing"
    )
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(checks) and all(line.startswith("ok ") for line in lines)


def test_data_that_not_every_node_sees(ray_cluster, workdir: Path, capsys) -> None:
    import numpy as np

    for split in ("train", "test"):
        np.savez(workdir / f"{split}.npz", x=np.zeros((9, 3, 8, 8), np.uint8), y=np.arange(9) % 3)
    arrays = ["--set", "data.name=arrays", "--set", "data.val_size=3"]
    assert main(["doctor", *arrays, "--set", "data.data_dir=."]) == 0, (
        "a relative folder is the driver's"
    )
    assert main(["doctor", *arrays, "--data-dir", str(workdir)]) == 0
    capsys.readouterr()
    elsewhere = DataSpec(name="arrays", data_dir=workdir / "elsewhere").model_dump_json()
    answers = node_probe.probe_nodes(node_probe.ProbeRequest(str(workdir), "train.npz", elsewhere))
    findings = doctor._diagnose_nodes(
        answers, node_probe.package_versions(), str(workdir), "arrays", "0" * 16
    )
    (broken,) = [finding for finding in findings if not finding.ok]
    assert broken.check == "data" and "elsewhere' has no train.npz" in broken.text
    assert "put data set 'arrays' where every node finds it" in broken.remedy
    assert main(["doctor", *arrays, "--data-dir", str(workdir / "nowhere")]) == 3
    assert "BROKEN data      here: data.data_dir" in capsys.readouterr().out


def test_storage_that_is_not_shared(ray_cluster, workdir: Path) -> None:
    spec = DataSpec().model_dump_json()
    (answer,) = node_probe.probe_nodes(
        node_probe.ProbeRequest(str(workdir / "elsewhere"), "marker", spec)
    )
    assert answer.problems["storage"] == f"does not see {workdir}/elsewhere as the driver does"


def examine_a_broken_cluster(*arguments: str) -> int:
    """The doctor on a head and a worker that Ray was told two GPUs of; they listen everywhere and
    want no token.
    """
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    from raysweep.sweep import worker_server
    from raysweep.sweep.ray_internals import skip_unused_processes, use_worker_script

    # Ray's own default, which the session's cluster has switched off.
    ray_constants.ENABLE_RAY_CLUSTER = True
    with skip_unused_processes(), use_worker_script(Path(worker_server.__file__)):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        cluster.add_node(num_cpus=1, num_gpus=2)
    code = main(["doctor", "--address", cluster.address, *arguments])
    cluster.shutdown()
    return code


@pytest.mark.slow
def test_a_broken_cluster_is_told_what_to_do(ray_cluster, tmp_path: Path) -> None:
    """The session's cluster lends its server of forks."""
    open_doors = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1", "RAY_AUTH_MODE": "disabled"}
    environment = {**open_doors, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    arguments, imports = ("--json", "--out", str(tmp_path)), forked_processes.COMMANDS
    done = forked_processes.start_function(
        examine_a_broken_cluster, *arguments, environment=environment, imports=imports
    )
    assert done.wait() == ExitCode.INFRASTRUCTURE, done.err
    report = json.loads(done.out)
    broken = {
        (finding["check"], finding["text"].split(": ", 1)[-1])
        for finding in report["findings"]
        if finding["do"]
    }
    assert ("gpus", "has 0 GPUs, 2 are declared to Ray") in broken
    assert ("doors", "other machines can reach Ray, and it requires no token") in broken
    assert any(
        finding["check"] == "mlflow" and "127.0.0.1:9" in finding["text"]
        for finding in report["findings"]
    )
    assert {finding["check"] for finding in report["findings"] if finding["ok"]} >= {
        "address",
        "storage",
        "data",
    }


class OldServer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"2.9.1")

    def log_message(self, *arguments: object) -> None:
        pass


def test_an_mlflow_server_with_known_holes(ray_cluster, workdir: Path, capsys, monkeypatch) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), OldServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    assert main(["doctor"]) == 3
    server.shutdown()
    assert (
        "do        upgrade: versions before 3.8 have known vulnerabilities"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--set", "epochs=3"], "--set epochs: only data.* settings matter to the doctor"),
        (["--set", "data.name=cifar"], "no data set 'cifar'; nearest: cifar10"),
    ],
)
def test_a_mistake_is_one_line(arguments, line, workdir: Path, capsys) -> None:
    assert main(["doctor", *arguments]) == 2
    assert line in capsys.readouterr().err
