"""Measure what MLflow costs the driver of a sweep in its own thread, and how many reports it takes.

    git worktree add /tmp/before COMMIT
    python benchmarks/driver.py --code /tmp/before . --rounds 5 [--server]

Sends the starts, reports and ends of trials through the callback of Ray Tune to a real ledger and a
real MLflow store, without Ray and without training, as fast as the callback takes them. The
checkouts of --code are measured in turns, each in a process of its own. The first of two numbers is
in processor time of the driver's thread, which other load on the machine hardly changes, the second
in wall time that the callback keeps its caller waiting. `of it MLflow` is the share of the listener
for MLflow in the first.
"""

import argparse
import inspect
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from command_line import create_parser

os.environ.setdefault("OMP_NUM_THREADS", "1")

N_METRICS = 60
EVENTS = {"open": "open a run", "epoch": "report an epoch", "end": "end a run"}


def measure_here(uri: str, folder: Path, n_trials: int, n_epochs: int) -> dict[str, float]:
    """Drive one sweep with the raysweep that this process imports; return seconds by what."""
    from raysweep.data import load_data
    from raysweep.sweep.ledger import Ledger
    from raysweep.sweep.search_space import load_space
    from raysweep.sweep.tune_callbacks import Budget, LedgerCallback
    from raysweep.tracking import SweepTracker, Tracker
    from raysweep.training.trainer import train_model

    settings = {"data.val_size": 50, "data.train_size": 64, "batch_size": 32, "*.steps": 1}
    space = load_space("at", {**settings, "epochs": n_epochs, "finalists": 0})
    config = space.trial_config({})
    data = load_data(config.data)
    history = train_model(config, folder / "trained", data=data).last_checkpoint.history
    ledger = Ledger.create(folder / "runs" / "s", space)
    tracker = Tracker(uri or f"sqlite:///{folder / 'mlflow.db'}", folder / "mlruns")
    # Earlier versions took the fingerprint.
    takes_dataset = "dataset" in inspect.signature(SweepTracker).parameters
    listener = SweepTracker(tracker, data if takes_dataset else data.fingerprint)  # type: ignore
    seconds: dict[str, float] = defaultdict(float)

    def timed(name: str, call: Any, *arguments: Any, **options: Any) -> None:
        began, began_cpu = time.perf_counter(), time.thread_time()
        call(*arguments, **options)
        seconds[name] += time.perf_counter() - began
        seconds[f"{name} cpu"] += time.thread_time() - began_cpu

    notify = listener.on_trial_update
    listener.on_trial_update = (  # type: ignore[method-assign]
        lambda *arguments: timed("mlflow", notify, *arguments)
    )
    listener.on_sweep_start(ledger, n_trials)
    callback = LedgerCallback(ledger, n_epochs, [listener], 0.0, Budget())
    trials: list[Any] = [
        SimpleNamespace(trial_id=str(n), config={"number": n, "params": {}}, error_file=None)
        for n in range(n_trials)
    ]
    began = time.perf_counter()
    for trial in trials:
        target = ledger.trial_path(trial.config["number"]).local_path
        shutil.copytree(folder / "trained", target)
        timed("open", callback.on_trial_start, 0, trials, trial)
    for row in history:
        result = {**row, **{f"detail/{n}": row["epoch"] + n for n in range(N_METRICS - len(row))}}
        for trial in trials:
            timed("epoch", callback.on_trial_result, 0, trials, trial, result)
    for trial in trials:
        timed("end", callback.on_trial_complete, 0, trials, trial)
    for suffix in ("", " cpu"):
        seconds[f"callbacks{suffix}"] = sum(seconds[f"{event}{suffix}"] for event in EVENTS)
    timed("sweep end", listener.on_sweep_end, ledger)
    seconds["until MLflow has all"] = time.perf_counter() - began
    return seconds


def measure_checkout(code: Path, uri: str, n_trials: int, n_epochs: int) -> dict[str, float]:
    """Measure one checkout in a new process."""
    with tempfile.TemporaryDirectory(prefix="driver-") as folder:
        numbers = ["--trials", str(n_trials), "--epochs", str(n_epochs)]
        command = [sys.executable, __file__, "--measure", folder, "--uri", uri, *numbers]
        environment = {**os.environ, "PYTHONPATH": str(code.resolve())}
        output = subprocess.run(
            command, env=environment, cwd=folder, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def describe(found: list[dict[str, float]], n_trials: int, n_epochs: int) -> list[str]:
    """Return the cells of one checkout: medians of its rounds."""
    middle = {name: statistics.median(one[name] for one in found) for name in found[0]}
    per_event = {"open": n_trials, "epoch": n_trials * n_epochs, "end": n_trials}
    return [
        *(
            f"{1000 * middle[f'{name} cpu'] / per_event[name]:.2f} / "
            f"{1000 * middle[name] / per_event[name]:.1f} ms"
            for name in EVENTS
        ),
        f"{n_trials * n_epochs / middle['callbacks cpu']:.0f} / "
        f"{n_trials * n_epochs / middle['callbacks']:.0f}",
        f"{middle['mlflow cpu'] / middle['callbacks cpu']:.0%}",
        f"{middle['sweep end']:.1f} s",
        f"{middle['until MLflow has all']:.1f} s",
    ]


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--code", type=Path, nargs="+", default=[Path(__file__).parent.parent])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--server", action="store_true", help="an `mlflow server`, not SQLite")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--uri", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure_here(args.uri, args.measure, args.trials, args.epochs)))
        return
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from measure import describe_machine, format_table
    from mlflow_server import MlflowServer

    found: dict[Path, list[dict[str, float]]] = {code: [] for code in args.code}
    with tempfile.TemporaryDirectory(prefix="server-") as folder:
        server = MlflowServer(Path(folder))
        if args.server:
            server.start()
        for _ in range(args.rounds):
            for code in args.code:
                uri = server.uri if args.server else ""
                found[code].append(measure_checkout(code, uri, args.trials, args.epochs))
        server.kill()
    print(describe_machine())
    store = "mlflow server" if args.server else "SQLite"
    print(f"{store}; {args.trials} trials of {args.epochs} epochs; medians of {args.rounds} rounds")
    head = ["code", *EVENTS.values(), "reports a second", "of it MLflow", "sweep end", "in MLflow"]
    rows = [
        [str(code), *describe(rounds, args.trials, args.epochs)] for code, rounds in found.items()
    ]
    print(format_table(head, rows))


if __name__ == "__main__":
    main()
