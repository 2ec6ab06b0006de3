"""Run one sweep with two versions of the code, and compare the robustness of their best trials.

    git worktree add FOLDER d5c5dbc
    python benchmarks/before_after.py --work WORK --before FOLDER [--seeds 5] [--method gairat]

Both run in this environment, so the other commit needs the same dependencies. The sampler and the
trainings use the same seed. Only the later version attacks finalists and trains base runs; its
sweeps leave both out here. The checkpoint that each sweep chose is evaluated on all test images by
the objective of this version. Results stay in WORK: the same command resumes an
interrupted run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from command_line import create_parser
from measure import describe_machine, describe_mean, format_table

from raysweep.atomic_files import atomic_open
from raysweep.data import load_data
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import load_space
from raysweep.training.checkpoint import read_checkpoint

HERE = Path(__file__).resolve().parent.parent


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


def evaluate_best(folder: Path, method: str) -> float:
    """Return the objective on all test images of the checkpoint that a sweep chose.

    Args:
        folder: Folder of the sweep, of either version.
        method: Method of the sweep.
    """
    ledger = Ledger.open(folder)
    best = ledger.find_best_trial()
    assert best is not None
    saved = read_checkpoint(ledger.best_checkpoint_path(best))
    config = load_space(method, {}).trial_config({})
    model = saved.load_weights(saved.config.model.build_model(1, 10, 0)).eval()
    validation = config.validation.replace(size=None, scales=())
    return float(validation(model, load_data(config.data).test)["robust_worst"])


def run_sweep(
    code: Path, folder: Path, method: str, seed: int, options: list[str]
) -> dict[str, Any]:
    """Run a sweep, or its rest, and evaluate the checkpoint that it chose.

    Returns:
        `robust`: the objective on test images; `epochs`: epochs trained by the sweep.
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
        "robust": evaluate_best(folder / "runs" / "sweep", method),
        "epochs": facts["epochs"]["trained"],
        "machine": describe_machine(),
    }


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
    for seed in range(args.seeds):
        for name, code in versions.items():
            folder = args.work.resolve() / f"{args.method}-{name}-{seed}"
            path = folder / "result.json"
            if not path.exists():
                found = run_sweep(code, folder, args.method, seed, options)
                with atomic_open(path) as file:
                    file.write(json.dumps(found).encode())
            results[name].append(json.loads(path.read_text()))
            print(f"seed {seed}, {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    rows = [
        [name, str(len(runs)), *(describe_mean([run[key] for run in runs]) for key in keys)]
        for keys in [("robust", "epochs")]
        for name, runs in results.items()
    ]
    difference = [
        after["robust"] - before["robust"]
        for before, after in zip(results["before"], results["after"], strict=True)
    ]
    header = ["version", "seeds", "robust worst on test", "epochs trained"]
    print(describe_machine())
    print(format_table(header, rows))
    print(f"after minus before, same seed: {describe_mean(difference)}")


if __name__ == "__main__":
    main()
