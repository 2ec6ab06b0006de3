"""How long the command line takes to answer, and how much memory a trial's step needs.

    python benchmarks/footprint.py

Memory is the peak of a process of its own that does one step of GAIRAT (ResNet-18), beside what it holds before the
step: ours with attacks of few and of many steps, whose graphs must not add up, and a plain step.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from measure import Ratio, machine, table

HERE = Path(__file__).parent
COMMANDS = {
    "raysweep --help": (["--help"], 0.3),
    "raysweep list": (["list"], None),
    "raysweep tune lrat --plan": (["tune", "lrat", "--plan"], 3.0),
}
# What a step costs in memory: argv is batch, attack steps, and whether it is ours.
STEP = """
import dataclasses, resource, sys
import torch
torch.set_num_threads(1)
from training_step import FLOAT32, PATHS, ours, plain, prepared
from raysweep.spec import override
batch, steps, mine = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "ours"
subject = prepared("gairat", batch, False, warm_up=0)
subject = dataclasses.replace(subject, method=override(subject.method, {"attacks.pgd.steps": steps}))
run = ours(subject, {"channels_last": True, "fold": True}) if mine else plain(subject, False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def python(*arguments: str, cwd: Path = HERE) -> str:
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{arguments[:2]}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def answers(n: int) -> list[Ratio]:
    """Wall and processor seconds of each command, medians of n after one that fills the disk's cache."""
    rows, found = [], []
    for name, (arguments, goal) in COMMANDS.items():
        walls, cpus = [], []
        for _ in range(n + 1):
            with TemporaryDirectory() as folder:
                started, before = time.perf_counter(), os.times()
                python("-m", "raysweep.cli", *arguments, cwd=Path(folder))
                after = os.times()
                walls.append(time.perf_counter() - started)
                cpus.append(after.children_user + after.children_system - before.children_user - before.children_system)
        wall, cpu = median(walls[1:]), median(cpus[1:])
        limit = f"{goal:g} s" if goal else ""
        rows.append([name, f"{wall:.2f}", f"{cpu:.2f}", limit])
        if goal:
            found.append(Ratio(f"{name}, s", f"{wall:.2f} ({cpu:.2f} of a processor)", limit, f"{n} runs"))
    print(f"\nStart-up, {n} runs; {machine()}\n")
    print(table(["command", "s, median", "processor s", "goal"], rows), flush=True)
    return found


def memory(batch: int, steps: tuple[int, int]) -> list[Ratio]:
    """MiB that a step adds to its process."""
    few, many = (float(python("-c", STEP, str(batch), str(k), "ours")) for k in steps)
    public = float(python("-c", STEP, str(batch), str(steps[0]), "plain"))
    rows = [["ours", str(steps[0]), f"{few:.0f}"], ["ours", str(steps[1]), f"{many:.0f}"]]
    rows.append(["plain", str(steps[0]), f"{public:.0f}"])
    print(f"\nPeak memory of a GAIRAT step, ResNet-18, batch {batch}; {machine()}\n")
    print(table(["step", "attack steps", "MiB over rest"], rows), flush=True)
    what = f"memory of a step, {steps[1]} over {steps[0]} attack steps"
    return [Ratio(what, f"{many / few:.2f}", "1", f"batch {batch}, 1 process each")]


def run(full: bool = False) -> list[Ratio]:
    """What `python benchmarks` shows of it."""
    return [*answers(5 if full else 1), *memory(32 if full else 2, (2, 8) if full else (1, 2))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    answers(args.runs)
    memory(args.batch, (2, 8))


if __name__ == "__main__":
    main()
