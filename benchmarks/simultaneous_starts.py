"""Start two drivers at once in a fresh folder, again and again, and count what they do to each
other.

    python benchmarks/simultaneous_starts.py --rounds 50 --sweeps 5

In each round two `train` of different names create the database of MLflow at once. In --sweeps
more rounds, two `tune` of one name also create one of Optuna: one must run, and the other be
refused in a line. Drivers are forks of a process that has imported what they need, so that they
start within milliseconds of each other.
Prints a table: how the drivers ended, tracebacks, and runs that MLflow has in which state.
"""

import argparse
import multiprocessing
import os
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

from measure import describe_machine, format_table

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

FORKS = multiprocessing.get_context("forkserver")
IMPORTS = [
    "raysweep.training.trainer",
    "raysweep.commands.common",
    "raysweep.sweep.tuner",
    "mlflow.tracking",
    "mlflow.store.tracking.sqlalchemy_store",
    "raysweep.plots",
]
TINY = ("data.train_size=64", "data.val_size=50", "batch_size=32", "*.steps=1", "epochs=1")
SETTINGS = [word for value in TINY for word in ("--set", value)]


def run_driver(arguments: list[str], folder: Path, number: int, start_at: float) -> None:
    """Run a command line at a time of the monotonic clock; write what it prints to a file."""
    os.chdir(folder)
    output = (folder / f"output-{number}").open("w")
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    from raysweep.cli import main

    time.sleep(max(0.0, start_at - time.monotonic()))
    sys.exit(main(arguments))


def start_together(commands: list[list[str]], folder: Path) -> list[tuple[int, str]]:
    """Run commands at once; return their exit codes and what they printed."""
    start_at = time.monotonic() + 1.0
    drivers = [
        FORKS.Process(target=run_driver, args=(command, folder, number, start_at))
        for number, command in enumerate(commands)
    ]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    outputs = [(folder / f"output-{number}").read_text() for number in range(len(drivers))]
    return [
        (int(driver.exitcode or 0), text) for driver, text in zip(drivers, outputs, strict=True)
    ]


def count_runs(folder: Path) -> Counter[str]:
    """Count the runs that MLflow has, by kind and state."""
    query = (
        "SELECT tags.value, runs.status FROM runs JOIN tags ON tags.run_uuid = runs.run_uuid "
        "WHERE tags.key = 'raysweep.kind'"
    )
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        return Counter(f"{kind} {status}" for kind, status in database.execute(query))


def describe_end(code: int, output: str) -> str:
    """Return how a driver ended, for the table."""
    if "Traceback" in output:
        return f"exit {code}, a traceback"
    n_errors = output.count("raysweep: error:")
    return f"exit {code}" + (f", {n_errors} line(s)" if n_errors else "")


def run_rounds(what: str, commands: list[list[str]], n_rounds: int) -> list[list[str]]:
    """Run rounds of the same commands, each in a fresh folder; return rows of the table."""
    ends: Counter[str] = Counter()
    states: Counter[str] = Counter()
    for number in range(n_rounds):
        with tempfile.TemporaryDirectory() as folder:
            results = start_together(commands, Path(folder))
            end = " and ".join(sorted(describe_end(code, output) for code, output in results))
            ends[end] += 1
            state = ", ".join(f"{n} {name}" for name, n in sorted(count_runs(Path(folder)).items()))
            states[state] += 1
            print(f"{what} {number}: {end}; {state}", file=sys.stderr)
            if "traceback" in end:
                print(*(output for _, output in results), sep="\n", file=sys.stderr)
    return [
        [what, str(n_rounds), describe_counts(ends), describe_counts(states)],
    ]


def describe_counts(counts: Counter[str]) -> str:
    return "; ".join(f"{count} x ({what})" for what, count in counts.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--sweeps", type=int, default=5)
    arguments = parser.parse_args()
    FORKS.set_forkserver_preload(IMPORTS)
    trains = [["train", "at", "--name", name, *SETTINGS] for name in ("a", "b")]
    sweep = ["tune", "at", "--name", "s", "--trials", "1", "--optuna", "sqlite:///optuna.db"]
    sweep += ["--set", "finalists=0", *SETTINGS]
    rows = run_rounds("two `train`", trains, arguments.rounds)
    rows += run_rounds("two `tune` of one name", [sweep, sweep], arguments.sweeps)
    print(describe_machine())
    print(format_table(["what", "rounds", "ends", "MLflow has"], rows))


if __name__ == "__main__":
    main()
