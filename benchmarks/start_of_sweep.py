"""Measure how long a sweep takes to start, with workers that are forks and with ordinary ones.

    python benchmarks/start_of_sweep.py --rounds 3

Runs `raysweep tune` on a tiny sweep, in turn with `RAYSWEEP_FORK_WORKERS` 1 and 0. Prints a
Markdown table: the seconds from the command to the line of the first epoch and to its end (least,
median, most).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from measure import describe_machine, format_table

SETTINGS = (
    *("epochs=2", "data.train_size=64", "data.val_size=50", "*.steps=2", "validation.finish={}"),
    *("finalists=0", "base_runs=0"),
)


def run_sweep(forks: str) -> tuple[float, float]:
    """Run one sweep; return the seconds to its first epoch and to its end."""
    overrides = [argument for setting in SETTINGS for argument in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        command = [sys.executable, "-m", "raysweep", "tune", "at", "--trials", "2", "--out", folder]
        process = subprocess.Popen(
            [*command, *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"RAYSWEEP_FORK_WORKERS": forks},
        )
        assert process.stdout is not None
        first_epoch = 0.0
        for line in process.stdout:
            if not first_epoch and " epoch 1/2 " in line:
                first_epoch = time.monotonic() - began
        assert process.wait() == 0 and first_epoch
        total = time.monotonic() - began
    return first_epoch, total


def main() -> None:
    """Read the arguments, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    seconds: dict[str, list[tuple[float, float]]] = {"1": [], "0": []}
    for _ in range(args.rounds):
        for forks, measured in seconds.items():
            measured.append(run_sweep(forks))
    names = {"1": "forks of a server", "0": "ordinary workers"}
    rows = [
        [names[forks], *(_summarize(column) for column in zip(*measured, strict=True))]
        for forks, measured in seconds.items()
    ]
    print(f"{describe_machine()}; n = {args.rounds}\n")
    print(format_table(["workers", "to the first epoch, s", "whole, s"], rows))


def _summarize(values: tuple[float, ...]) -> str:
    """Return least, median and most."""
    return f"{min(values):.1f}, {statistics.median(values):.1f}, {max(values):.1f}"


if __name__ == "__main__":
    main()
