"""Measure how long a sweep takes to start, with workers that are forks and with ordinary ones.

    git worktree add /tmp/before COMMIT
    python benchmarks/start_of_sweep.py --rounds 3 --code /tmp/before .

Runs `raysweep tune` on a tiny sweep, in turn with the checkouts of --code and with
`RAYSWEEP_FORK_WORKERS` 1 and 0. Prints a Markdown table: the seconds from the command to the line
of the first epoch and to its end, and the processor seconds of all its processes until the first
epoch (least, median, most). Processor seconds depend less on other load.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
from measure import describe_machine, format_table

SETTINGS = (
    *("epochs=2", "data.train_size=64", "data.val_size=50", "*.steps=2", "validation.finish={}"),
    *("finalists=0", "base_runs=0"),
)
WORKERS = {"1": "forks of a server", "0": "ordinary workers"}


def run_sweep(code: Path, forks: str) -> tuple[float, float, float]:
    """Run one sweep; return the seconds to its first epoch and to its end, and the processor
    seconds to its first epoch.
    """
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
        for line in process.stdout:
            if not first_epoch and " epoch 1/2 " in line:
                first_epoch = time.monotonic() - began
                processor = sum_processor_seconds(process.pid)
        assert process.wait() == 0 and first_epoch
        total = time.monotonic() - began
    return first_epoch, total, processor


def sum_processor_seconds(pid: int) -> float:
    """Return the processor seconds of a process, and of those that it has started and that run."""
    command = psutil.Process(pid)
    total = 0.0
    for process in [command, *command.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def main() -> None:
    """Read the arguments, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--code", type=Path, nargs="+", default=[Path(__file__).parent.parent])
    parser.add_argument("--forks", nargs="+", choices=WORKERS, default=list(WORKERS))
    args = parser.parse_args()
    cases = [(code, forks) for code in args.code for forks in args.forks]
    seconds: dict[tuple[Path, str], list[tuple[float, float, float]]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for case in cases:
            seconds[case].append(run_sweep(*case))
    rows = [
        [str(code), WORKERS[forks], *(_summarize(column) for column in zip(*measured, strict=True))]
        for (code, forks), measured in seconds.items()
    ]
    print(f"{describe_machine()}; n = {args.rounds}\n")
    head = [
        "code",
        "workers",
        "to the first epoch, s",
        "whole, s",
        "processor s to the first epoch",
    ]
    print(format_table(head, rows))


def _summarize(values: tuple[float, ...]) -> str:
    """Return least, median and most."""
    return f"{min(values):.1f}, {statistics.median(values):.1f}, {max(values):.1f}"


if __name__ == "__main__":
    main()
