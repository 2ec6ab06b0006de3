"""Kill a real MLflow server in the middle of a real sweep, start it again or not, and show what
MLflow has at the end.

    python benchmarks/tracker_outages.py

Each sweep runs on a Ray cluster of its own. The server is killed (SIGKILL) when the first epochs
are recorded, or stopped (SIGSTOP) so that it accepts connections and says nothing; it comes back
before the sweep ends, or after it, and then `raysweep sync` is run. Prints a table: the exit codes,
the lines that say something about MLflow, and for each run of MLflow its state and number of epochs
at the end of the sweep and after `sync`, beside those of the ledger.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from command_line import create_parser
from measure import describe_machine, format_table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from mlflow import MlflowClient
from mlflow_server import MlflowServer

from raysweep.stores import open_path
from raysweep.sweep.ledger import Ledger

EPOCHS, N_TRIALS = 30, 4
TINY = ("data.train_size=64", "data.val_size=50", "batch_size=32", "*.steps=1", "finalists=0")
SETTINGS = [word for value in (*TINY, f"epochs={EPOCHS}") for word in ("--set", value)]
SCENES = {
    "killed, back in mid-sweep": (signal.SIGKILL, True),
    "stopped, back in mid-sweep": (signal.SIGSTOP, True),
    "killed, back after the end, then `sync`": (signal.SIGKILL, False),
}


def start(arguments: list[str], folder: Path, uri: str) -> subprocess.Popen[str]:
    """Start raysweep; what it prints goes to a file."""
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    output = (folder / "output").open("a")
    program = "import sys; from raysweep.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=output, stderr=output, text=True
    )


def count_epochs(uri: str) -> dict[str, tuple[str, int]]:
    """Return the state and the number of epochs of each run of MLflow, by name."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("raysweep")
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    return {
        run.info.run_name: (
            run.info.status,
            len({p.step for p in client.get_metric_history(run.info.run_id, "train/loss")}),
        )
        for run in runs
    }


def wait_for_epochs(folder: Path, n_epochs: int, process: subprocess.Popen[str]) -> None:
    """Wait until the trials of the ledger have so many epochs together, or the sweep ends."""
    while process.poll() is None:
        sweep = folder / "runs" / "s"
        if (sweep / "sweep.json").is_file():
            trials = Ledger.open(open_path(sweep)).load_trials()
            if sum(trial.epoch for trial in trials) >= n_epochs:
                return
        time.sleep(0.1)


def run_scene(name: str, number: signal.Signals, comes_back: bool) -> list[str]:
    """Run one sweep; return a row of the table."""
    folder = Path(tempfile.mkdtemp(prefix="outage-"))
    server = MlflowServer(folder)
    server.start()
    sweep = ["tune", "at", "--name", "s", "--trials", str(N_TRIALS), *SETTINGS]
    process = start(sweep, folder, server.uri)
    wait_for_epochs(folder, 5, process)
    if number == signal.SIGKILL:
        server.kill()
    else:
        server.send_signal(number)
    wait_for_epochs(folder, 40, process)
    if comes_back:
        server.send_signal(signal.SIGCONT) if number == signal.SIGSTOP else server.start()
    codes = [process.wait()]
    before = count_epochs(server.database_uri)
    if not comes_back:
        server.start()
        codes.append(start(["sync"], folder, server.uri).wait())
    server.kill()
    output = (folder / "output").read_text()
    lines = [line for line in output.splitlines() if "MLflow" in line and "warning" in line]
    in_mlflow = count_epochs(server.database_uri)
    trials = Ledger.open(open_path(folder / "runs" / "s")).load_trials()
    in_ledger = ", ".join(f"{trial.state} {trial.epoch}" for trial in trials)
    shutil.rmtree(folder)
    return [
        name,
        " and ".join(map(str, codes)),
        "yes" if "Traceback" in output else "no",
        str(len(lines)),
        in_ledger,
        *(
            ", ".join(f"{state} {n}" for _, (state, n) in sorted(found.items()))
            for found in (before, in_mlflow)
        ),
    ]


def main() -> None:
    create_parser(__doc__).parse_args()
    rows = [run_scene(name, *scene) for name, scene in SCENES.items()]
    print(describe_machine())
    head = ["MLflow's server", "exit", "traceback", "warnings", "ledger: trials, epochs"]
    print(format_table([*head, "MLflow at the end: trials, sweep", "after `sync`"], rows))


if __name__ == "__main__":
    main()
