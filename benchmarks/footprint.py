"""How long the command line takes to answer, and how much memory a trial's step needs.

    python benchmarks/footprint.py

A step's memory is the peak of a process of its own that does one step of GAIRAT (ResNet-18), beside
what it holds before the step: ours with attacks of few and of many steps, whose graphs must not add
up, and a plain step. A trial's is the peak of a process that trains an epoch, validates it and
writes the checkpoint, all libraries included.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from measure import Ratio, machine, table
from training_step import ours, plain, prepared

from raysweep.spec import apply_overrides

HERE = Path(__file__).parent
COMMANDS: dict[str, tuple[list[str], float | None]] = {
    "raysweep --help": (["--help"], 0.3),
    "raysweep list": (["list"], None),
    "raysweep tune lrat --plan": (["tune", "lrat", "--plan"], 3.0),
}
TRIAL = """
import contextlib, os, resource, sys
from raysweep.cli import main
with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
    code = main(sys.argv[1:])
print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
sys.exit(code)
"""
CIFAR = [
    "data.name=arrays",
    "data.val_size=64",
    "data.train_size=128",
    "batch_size=128",
    "model.name=resnet18",
    "*.burn_in=0",
]
DIGITS = ["data.train_size=256", "data.val_size=64"]
TINY = [
    "data.train_size=32",
    "data.val_size=16",
    "*.attacks.*.steps=1",
    "validation.finish.*.steps=1",
]
TRIALS = [
    ("LRAT, digits", "1 epoch", "lrat", DIGITS),
    ("GAIRAT, ResNet-18, 32 x 32 pixels", "1 step of 128", "gairat", CIFAR),
]


def python(*arguments: str, cwd: Path = HERE) -> str:
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{arguments[:2]}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def answers(n: int, commands: list[str]) -> list[Ratio]:
    """Wall and processor seconds of each command, medians of n after one that fills the disk's
    cache.
    """
    rows, found = [], []
    for name in commands:
        arguments, goal = COMMANDS[name]
        walls, cpus = zip(*(timed(arguments) for _ in range(n + 1)), strict=True)
        wall, cpu = median(walls[1:]), median(cpus[1:])
        limit = f"{goal:g} s" if goal else ""
        rows.append([name, f"{wall:.2f}", f"{cpu:.2f}", limit])
        if goal:
            found.append(
                Ratio(name, f"{wall:.2f} s ({cpu:.2f} of a processor)", limit, f"{n} runs")
            )
    print(f"\nStart-up, {n} runs; {machine()}\n")
    print(table(["command", "s, median", "processor s", "goal"], rows), flush=True)
    return found


def timed(arguments: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of a command in an empty folder."""
    with TemporaryDirectory() as folder:
        started, before = time.perf_counter(), os.times()
        python("-m", "raysweep.cli", *arguments, cwd=Path(folder))
        after = os.times()
    spent = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    return time.perf_counter() - started, spent


def memory(batch: int, steps: tuple[int, int], small: bool = False) -> list[Ratio]:
    """MiB that a step adds to its process."""
    network = "small" if small else "resnet18"
    asked = [("ours", steps[0]), ("ours", steps[1]), ("plain", steps[0])]
    with get_context("forkserver").Pool(1, maxtasksperchild=1) as pool:
        mib = pool.starmap(
            step_memory, [(batch, k, who == "ours", small) for who, k in asked], chunksize=1
        )
    rows = [[who, str(k), f"{size:.0f}"] for (who, k), size in zip(asked, mib, strict=True)]
    print(f"\nPeak memory of a GAIRAT step, {network}, batch {batch}; {machine()}\n")
    print(table(["step", "attack steps", "MiB over rest"], rows), flush=True)
    what = f"memory of a step, {steps[1]} over {steps[0]} attack steps"
    ratio = (
        f"{mib[1] / mib[0]:.2f} ({mib[0]:.0f} MiB; plain {mib[2]:.0f})"
        if mib[0]
        else "too small to see"
    )
    return [Ratio(what, ratio, "1", f"batch {batch}")]


def step_memory(batch: int, steps: int, mine: bool, small: bool) -> float:
    """Return by how many MiB the peak memory of this process grows in its first step: ours (`mine`)
    or a plain one.
    """
    torch.set_num_threads(1)
    subject = prepared("gairat", batch, small, warm_up=0)
    subject = replace(subject, method=apply_overrides(subject.method, {"attacks.pgd.steps": steps}))
    run = ours(subject, {"channels_last": True, "fold": True}) if mine else plain(subject, False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def trials(sizes: list[tuple[str, str, str, list[str]]]) -> list[Ratio]:
    """Peak resident MiB of `raysweep train`, an epoch of it, for (what, n, method, settings)."""
    found = []
    for what, n, method, settings in sizes:
        with TemporaryDirectory() as folder:
            images = np.random.default_rng(0).integers(0, 256, (192, 3, 32, 32), np.uint8)
            for name in ("train", "test"):
                np.savez(Path(folder, f"{name}.npz"), x=images, y=np.arange(192) % 10)
            chosen = [part for setting in ("epochs=1", *settings) for part in ("--set", setting)]
            command = [method, *chosen, "--out", folder]
            command += ["--data-dir", folder] if "data.name=arrays" in settings else []
            found.append(
                Ratio(
                    f"memory of a trial, {what}",
                    python("-c", TRIAL, "train", *command).strip(),
                    "",
                    n,
                )
            )
    print(f"\nPeak memory of a trial's process; {machine()}\n")
    print(table(["trial", "peak", "n"], [[r.what, r.value, r.n] for r in found]), flush=True)
    return found


def run(full: bool = False) -> list[Ratio]:
    """What `python benchmarks` shows of it."""
    if not full:
        return [
            *answers(1, ["raysweep --help"]),
            *memory(64, (1, 2), small=True),
            *trials([(*TRIALS[0][:3], TINY)]),
        ]
    return [*answers(5, list(COMMANDS)), *memory(32, (2, 8)), *trials(TRIALS)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    answers(args.runs, list(COMMANDS))
    memory(args.batch, (2, 8))
    trials(TRIALS)


if __name__ == "__main__":
    main()
