"""Measure how long the command line takes to start, and the memory of a step and of a trial.

    python benchmarks/footprint.py
    python benchmarks/footprint.py --what plan driver    # a part of it

A step's memory is the growth of the peak memory of a new process in one step of GAIRAT (ResNet-18).
It is measured for a plain step, and for ours with few and with many attack steps, whose graphs must
not accumulate. A trial's memory is the peak of a process that trains an epoch, validates it and
writes the checkpoint, including all libraries.
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from command_line import create_parser
from measure import Ratio, describe_machine, format_table
from training_step import build_our_step, build_plain_step, prepare_subject

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
PLAN = """
import time
start = time.process_time()
import torch
torch_seconds = time.process_time() - start
from raysweep.sweep import epoch_timing
estimate, spent = epoch_timing.estimate_epoch_seconds, 0.0
def timed(*arguments, **options):
    global spent
    began = time.process_time()
    result = estimate(*arguments, **options)
    spent += time.process_time() - began
    return result
epoch_timing.estimate_epoch_seconds = timed
import contextlib, os, raysweep.cli
with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
    assert raysweep.cli.main(["tune", "lrat", "--plan"]) in (0, None)
total = time.process_time()
print(total - spent, torch_seconds, spent)
"""
DRIVER = """
import sys, tempfile
from pathlib import Path
import psutil
from scale_costs import trial_of
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.optuna_search import LedgerSearcher
from raysweep.sweep.search_space import load_space
from raysweep.sweep.tuner import run_sweep
n_trials = int(sys.argv[1])
space = load_space("lrat", {}).with_sweep_settings({"trials": n_trials})
def mebibytes():
    return psutil.Process().memory_info().rss / 2**20
with tempfile.TemporaryDirectory() as folder:
    ledger = Ledger.create(Path(folder) / "sweep", space)
    for number in range(n_trials):
        ledger.save_trial(trial_of(space, number))
    libraries = mebibytes()
    ledger = Ledger.open(Path(folder) / "sweep")
    searcher = LedgerSearcher(ledger)
    print(f"{mebibytes():.0f} MiB ({libraries:.0f} before it reads them)")
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


def time_commands(n: int, commands: list[str]) -> list[Ratio]:
    """Measure wall and processor seconds of each command.

    These are medians of n runs after one run that fills the disk cache.
    """
    rows, found = [], []
    for name in commands:
        arguments, goal = COMMANDS[name]
        walls, cpus = zip(*(time_command(arguments) for _ in range(n + 1)), strict=True)
        wall, cpu = median(walls[1:]), median(cpus[1:])
        limit = f"{goal:g} s" if goal else ""
        rows.append([name, f"{wall:.2f}", f"{cpu:.2f}", limit])
        if goal:
            found.append(
                Ratio(name, f"{wall:.2f} s ({cpu:.2f} of a processor)", limit, f"{n} runs")
            )
    print(f"\nStart-up, {n} runs; {describe_machine()}\n")
    print(
        format_table(["command", "wall s, median", "processor s, median", "goal"], rows), flush=True
    )
    return found


def time_command(arguments: list[str]) -> tuple[float, float]:
    """Run a command in an empty folder; return its wall and processor seconds."""
    with TemporaryDirectory() as folder:
        started, before = time.perf_counter(), os.times()
        python("-m", "raysweep.cli", *arguments, cwd=Path(folder))
        after = os.times()
    spent = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    return time.perf_counter() - started, spent


def measure_plan(n: int) -> list[Ratio]:
    """Measure the processor seconds of a plan without its timed steps; medians of n runs."""
    with TemporaryDirectory() as folder:
        runs = [python("-c", PLAN, cwd=Path(folder)).split() for _ in range(n)]
    rest, torch_seconds, steps = (median(map(float, column)) for column in zip(*runs, strict=True))
    value = f"{rest:.2f} s of a processor (import of torch {torch_seconds:.2f}, steps {steps:.2f})"
    print(f"\nA plan without its timed steps: {value}; {describe_machine()}")
    return [Ratio("raysweep tune lrat --plan without its timed steps", value, "2 s", f"{n} runs")]


def measure_step_memory(batch: int, steps: tuple[int, int], small: bool = False) -> list[Ratio]:
    """Measure the MiB that a step adds to the peak memory of its process."""
    network = "small" if small else "resnet18"
    asked = [("ours", steps[0]), ("ours", steps[1]), ("plain", steps[0])]
    with get_context("forkserver").Pool(1, maxtasksperchild=1) as pool:
        mib = pool.starmap(
            step_memory, [(batch, k, who == "ours", small) for who, k in asked], chunksize=1
        )
    rows = [[who, str(k), f"{size:.0f}"] for (who, k), size in zip(asked, mib, strict=True)]
    print(f"\nPeak memory of a GAIRAT step, {network}, batch {batch}; {describe_machine()}\n")
    print(format_table(["step", "attack steps", "MiB added to the process"], rows), flush=True)
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
    subject = prepare_subject("gairat", batch, small, warm_up=0)
    subject = replace(subject, method=apply_overrides(subject.method, {"attacks.pgd.steps": steps}))
    run = (
        build_our_step(subject, {"channels_last": True, "fold": True})
        if mine
        else build_plain_step(subject, False)
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def measure_trial_memory(sizes: list[tuple[str, str, str, list[str]]]) -> list[Ratio]:
    """Measure the peak resident MiB of one epoch of `raysweep train`.

    Args:
        sizes: rows of (name, what was counted, method, settings).
    """
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
    print(f"\nPeak memory of a trial's process; {describe_machine()}\n")
    print(
        format_table(
            ["trial", "peak memory", "measured over"], [[r.what, r.value, r.n] for r in found]
        ),
        flush=True,
    )
    return found


def measure_driver_memory(n_trials: int) -> list[Ratio]:
    """Measure the resident MiB of a driver with its libraries, ledger and study; without MLflow."""
    value = python("-c", DRIVER, str(n_trials)).strip()
    print(f"\nMemory of a driver with {n_trials} ended trials: {value}; {describe_machine()}")
    return [Ratio("memory of a driver", value, "", f"{n_trials} trials")]


def run(full: bool = False) -> list[Ratio]:
    """Run the part of `python benchmarks`; small sizes unless `full`."""
    if not full:
        return [
            *time_commands(1, ["raysweep --help"]),
            *measure_step_memory(64, (1, 2), small=True),
            *measure_trial_memory([(*TRIALS[0][:3], TINY)]),
        ]
    return [
        *time_commands(5, list(COMMANDS)),
        *measure_plan(5),
        *measure_step_memory(32, (2, 8)),
        *measure_trial_memory(TRIALS),
        *measure_driver_memory(10_000),
    ]


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parts: dict[str, Callable[[], object]] = {
        "commands": lambda: time_commands(args.runs, list(COMMANDS)),
        "plan": lambda: measure_plan(args.runs),
        "step": lambda: measure_step_memory(args.batch, (2, 8)),
        "trial": lambda: measure_trial_memory(TRIALS),
        "driver": lambda: measure_driver_memory(10_000),
    }
    parser.add_argument("--what", nargs="+", choices=parts, default=list(parts))
    args = parser.parse_args()
    for name in args.what:
        parts[name]()


if __name__ == "__main__":
    main()
