"""Run one sweep with two versions of the code, and compare the robustness of their best trials.

    git worktree add FOLDER d5c5dbc
    python benchmarks/before_after.py --work WORK --before FOLDER [--seeds 5] [--method gairat]

FOLDER is a checkout of the other commit, `before`; this checkout is `after`. Both run in this
environment, so the other commit needs the same dependencies. The sampler and the trainings use the
same seed. Sweeps of this version leave out finalists and base runs, which d5c5dbc does not have.
The checkpoint that each sweep chose is attacked on all test images by full AutoAttack and by the
objective, both of this version. Results stay in WORK: the same command resumes an interrupted run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from command_line import create_parser
from measure import describe_machine, describe_mean, format_table
from scipy.stats import ttest_1samp

from raysweep.atomic_files import atomic_open
from raysweep.attacks import build_named_attack
from raysweep.data import load_data
from raysweep.evaluation import evaluate
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import load_space
from raysweep.training.checkpoint import read_checkpoint
from raysweep.training.model_loading import load_trained_model

HERE = Path(__file__).resolve().parent.parent
# Key of a result -> number of decimals: accuracies, and whole epochs.
DECIMALS = {"autoattack": 4, "objective": 4, "epochs": 0}
HEADER = [
    f"{name} {version}"
    for name in ("AutoAttack", "objective", "epochs")
    for version in ("before", "after")
]


def call(code: Path, folder: Path, *arguments: str) -> Any:
    """Run a command of a version of raysweep; return its JSON."""
    command = [sys.executable, "-m", "raysweep", *arguments, "--out", str(folder), "--json"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(code),
        "OMP_NUM_THREADS": "1",
        # Ray starts slowly on a busy machine.
        "RAY_raylet_start_wait_time_s": "600",
    }
    result = subprocess.run(
        command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(result.stdout)


def evaluate_best(folder: Path, method: str) -> dict[str, float]:
    """Evaluate the checkpoint that a sweep chose on all test images.

    Args:
        folder: Folder of the sweep, of either version.
        method: Method of the sweep.

    Returns:
        Accuracy by full AutoAttack and by the objective.
    """
    ledger = Ledger.open(folder)
    best = ledger.find_best_trial()
    assert best is not None
    config = load_space(method, {}).trial_config({})
    data = load_data(config.data)
    model = load_trained_model(read_checkpoint(ledger.best_checkpoint_path(best)), data)
    validation = config.resolve_at(config.epochs - 1).validation.replace(size=None, scales=())
    threat_model = validation.find_threat_model()
    assert threat_model is not None
    images, labels = data.test.get_float_images(slice(None)), data.test.y
    attack = build_named_attack("autoattack", *threat_model)
    report = evaluate(model, images, labels, attack, index=data.test.index)
    return {
        "autoattack": report.robust_accuracy,
        "objective": float(validation(model, data.test)["robust_worst"]),
    }


def run_sweep(
    code: Path, folder: Path, method: str, seed: int, options: list[str]
) -> dict[str, Any]:
    """Run a sweep, or its rest, and evaluate the checkpoint that it chose.

    Returns:
        `autoattack` and `objective`: accuracies on test images, in [0, 1]; `epochs`: number of
        epochs that the sweep trained; `machine`: what it ran on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    space = yaml.safe_load((code / "search_spaces" / f"{method}.yaml").read_text())
    space["sampler"]["seed"] = seed
    if code == HERE:
        space |= {"finalists": 0, "base_runs": 0}
    (folder / "space.yaml").write_text(yaml.safe_dump(space, sort_keys=False))
    start = ["tune", "--space", str(folder / "space.yaml"), "--name", "sweep"]
    start += ["--set", f"seed={seed}", *options]
    is_started = (folder / "runs" / "sweep" / "sweep.json").exists()
    facts = call(code, folder, *(["tune", "--resume", "sweep"] if is_started else start))
    return {
        **evaluate_best(folder / "runs" / "sweep", method),
        "epochs": facts["epochs"]["trained"],
        "machine": describe_machine(),
    }


def list_rows(results: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Return the rows of the table: one for each seed, the means, and the mean differences of the
    pairs with equal seeds, with their 95% intervals (Student's t).

    Args:
        results: `before` and `after` -> results of `run_sweep`, in the order of the seeds, at least
            two.
    """
    pairs = [*zip(results["before"], results["after"], strict=True)]
    rows = [
        [str(seed), *(f"{run[key]:.{digits}f}" for key, digits in DECIMALS.items() for run in pair)]
        for seed, pair in enumerate(pairs)
    ]
    means = [
        describe_mean([run[key] for run in results[name]], digits)
        for key, digits in DECIMALS.items()
        for name in results
    ]
    rows.append(["mean +- standard error", *means])
    differences = []
    for key, digits in DECIMALS.items():
        values = np.array([after[key] - before[key] for before, after in pairs])
        interval = ttest_1samp(values, 0).confidence_interval()
        mean, low, high = (
            f"{value:+.{digits}f}" for value in (values.mean(), interval.low, interval.high)
        )
        differences += ["", f"{mean} ({low} to {high})"]
    return [*rows, ["after minus before (95% interval)", *differences]]


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--before", type=Path, required=True, help="checkout of the other commit")
    parser.add_argument("--method", default="gairat")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, help="trials of both (default: those of each)")
    parser.add_argument("--set", nargs="+", default=[], metavar="PATH=VALUE", help="for both")
    args = parser.parse_args()
    versions = {"before": args.before.resolve(), "after": HERE}
    options = [part for setting in args.set for part in ("--set", setting)]
    options += ["--trials", str(args.trials)] if args.trials else []
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in versions}
    for name, code in versions.items():
        for seed in range(args.seeds):
            folder = args.work.resolve() / f"{args.method}-{name}-{seed}"
            path = folder / "result.json"
            if not path.exists():
                found = run_sweep(code, folder, args.method, seed, options)
                with atomic_open(path) as file:
                    file.write(json.dumps(found).encode())
            results[name].append(json.loads(path.read_text()))
            print(f"seed {seed}, {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    print(describe_machine())
    print(format_table(["seed", *HEADER], list_rows(results)))


if __name__ == "__main__":
    main()
