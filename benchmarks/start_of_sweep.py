"""Measure how long a sweep takes to start, with workers that are forks and with ordinary ones.

    git worktree add /tmp/before COMMIT
    python benchmarks/start_of_sweep.py --rounds 3 --code /tmp/before .

Runs `raysweep tune` on a tiny sweep, in turn with the checkouts of --code and with
`RAYSWEEP_FORK_WORKERS` 1 and 0. Prints a Markdown table: the seconds from the command to the line
of the first epoch and to its end, and the processor seconds of all its processes until the first
epoch (least, median, most). Processor seconds depend less on other load. The epoch itself is not
subtracted: the line below the table has its seconds. A second table has the memory of the command
and of the workers that train, once a trial has reported its second epoch. The last line has what a
program without raysweep needs for the same libraries, a node of Ray and an actor with PyTorch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from measure import describe_machine, format_table

SETTINGS = (
    *("epochs=2", "data.train_size=64", "data.val_size=50", "*.steps=2", "validation.finish={}"),
    *("finalists=0", "base_runs=0"),
)
WORKERS = {"1": "forks of a server", "0": "ordinary workers"}

BARE_START = """
import time
began = time.monotonic()
import ray.tune, torch
imported = time.monotonic()
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
started = time.monotonic()
ray.get(ray.remote(lambda: __import__("torch").ones(1).sum().item()).remote())
print("seconds", imported - began, started - imported, time.monotonic() - started)
"""


@dataclass(frozen=True)
class SweepMeasurement:
    """Times and memory of one sweep.

    Attributes:
        first_epoch: Seconds from the command to the line of its first epoch.
        total: Seconds to its end.
        processor: Processor seconds of all its processes to the first epoch.
        epoch: Seconds of the first epoch and its validation, as the trial measured them.
        memory: By "command" and "worker": resident memory, proportional share and private memory
            in MiB.
    """

    first_epoch: float
    total: float
    processor: float
    epoch: float
    memory: dict[str, list[tuple[float, float, float]]]


def run_sweep(code: Path, forks: str) -> SweepMeasurement:
    """Run one sweep and measure it."""
    overrides = [argument for setting in SETTINGS for argument in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        command = [sys.executable, "-m", "raysweep", "tune", "at", "--trials", "2", "--out", folder]
        process = subprocess.Popen(
            [*command, *overrides],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "RAYSWEEP_FORK_WORKERS": forks,
                "PYTHONPATH": str(code.resolve()),
            },
        )
        assert process.stdout is not None
        first_epoch = processor = 0.0
        memory: dict[str, list[tuple[float, float, float]]] = {}
        for line in process.stdout:
            if not first_epoch and " epoch 1/2 " in line:
                first_epoch = time.monotonic() - began
                processor = sum_processor_seconds(process.pid)
            if not memory and " epoch 2/2 " in line:
                memory = measure_memory(process.pid)
        assert process.wait() == 0 and first_epoch
        total = time.monotonic() - began
        epochs = [
            json.loads(file.read_text())["history"][0]
            for file in Path(folder).glob("runs/*/trials/*/epoch-*/meta.json")
        ]
    seconds = min(row["train/seconds"] + row["validation_seconds"] for row in epochs)
    return SweepMeasurement(first_epoch, total, processor, seconds, memory)


def measure_bare_start() -> list[float]:
    """Return the seconds of imports, of Ray's start and of a first task in a program of its own."""
    found = subprocess.run(
        [sys.executable, "-c", BARE_START], capture_output=True, text=True, check=True
    )
    (line,) = [line for line in found.stdout.splitlines() if line.startswith("seconds")]
    return [float(text) for text in line.split()[1:]]


def sum_processor_seconds(pid: int) -> float:
    """Return the processor seconds of a process, and of those that it has started and that run."""
    command = psutil.Process(pid)
    total = 0.0
    for process in [command, *command.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def measure_memory(pid: int) -> dict[str, list[tuple[float, float, float]]]:
    """Return resident memory, proportional share and private memory in MiB of a command and of the
    workers that train its trials.
    """
    command = psutil.Process(pid)
    found: dict[str, list[tuple[float, float, float]]] = {"command": [], "worker": []}
    for process in [command, *command.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            is_worker = "".join(process.cmdline()).startswith("ray::ImplicitFunc")
            if is_worker or process == command:
                memory = process.memory_full_info()
                sizes = (memory.rss / 2**20, memory.pss / 2**20, memory.uss / 2**20)
                found["worker" if is_worker else "command"].append(sizes)
    return found


def main() -> None:
    """Read the arguments, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--code", type=Path, nargs="+", default=[Path(__file__).parent.parent])
    parser.add_argument("--forks", nargs="+", choices=WORKERS, default=list(WORKERS))
    args = parser.parse_args()
    cases = [(code, forks) for code in args.code for forks in args.forks]
    measured: dict[tuple[Path, str], list[SweepMeasurement]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for case in cases:
            measured[case].append(run_sweep(*case))
    rows, sizes = [], []
    for (code, forks), found in measured.items():
        columns = zip(*((one.first_epoch, one.total, one.processor) for one in found), strict=True)
        rows.append([str(code), WORKERS[forks], *map(_summarize, columns)])
        for name in ("command", "worker"):
            of_processes = [size for one in found for size in one.memory.get(name, [])]
            medians = [
                f"{statistics.median(column):.0f}" for column in zip(*of_processes, strict=True)
            ]
            sizes.append([str(code), WORKERS[forks], name, *(medians or ["-"] * 3)])
    print(f"{describe_machine()}; n = {args.rounds}\n")
    head = [
        "code",
        "workers",
        "to the first epoch, s",
        "whole, s",
        "processor s to the first epoch",
    ]
    print(format_table(head, rows))
    epochs = [one.epoch for found in measured.values() for one in found]
    print(f"\nThe first epoch itself: {_summarize(tuple(epochs), 2)} s\n")
    head = ["code", "workers", "process", "resident, MiB", "proportional share", "private"]
    print(format_table(head, sizes))
    bare = zip(*(measure_bare_start() for _ in range(args.rounds)), strict=True)
    imports, start, task = (_summarize(column) for column in bare)
    print(f"\nWithout raysweep: imports {imports} s; Ray's start {start} s; first task {task} s")


def _summarize(values: tuple[float, ...], digits: int = 1) -> str:
    """Return least, median and most."""
    return ", ".join(
        f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values))
    )


if __name__ == "__main__":
    main()
