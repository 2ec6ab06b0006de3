"""Record real curves of random settings of the shipped search spaces on digits, for
`search_quality.py`.

    python benchmarks/search_curves.py record --work FOLDER [--spaces gairat lrat]
    python benchmarks/search_curves.py collect --work FOLDER --table benchmarks/search_curves.npz

`record` draws settings from each space as a random sweep does, after its starting points, and
trains each to its end with two seeds, by the real objective; trainings share prefixes. Recorded
runs stay in FOLDER, so the same command resumes. Runs that the table has are not trained again.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from command_line import create_parser
from measure import describe_machine, read_commit

from raysweep.atomic_files import atomic_open
from raysweep.data import load_data
from raysweep.errors import RaysweepError
from raysweep.sweep.search_space import Params, SearchSpace, load_space
from raysweep.training.config import TrainingConfig
from raysweep.training.prefix_cache import PrefixCache
from raysweep.training.trainer import train_model

N_SETTINGS = {"gairat": 100, "lrat": 100, "trades": 50, "fat": 50}
SEEDS = (0, 1)
METRICS = ("robust_worst", "robust_margin", "clean")


def draw_settings(space: SearchSpace, count: int) -> list[Params]:
    """Return the starting points of a space and random settings."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for point in space.initial_points:
        study.enqueue_trial(space.optuna_params(point))
    return [space.suggest_params(study.ask()) for _ in range(count)]


def list_runs(spaces: list[str]) -> Iterator[tuple[str, int, int, Params, TrainingConfig]]:
    """List the runs: space, number of the setting, seed, params and config; the spaces in turn."""
    drawn = {}
    for name in spaces:
        space = load_space(name, {"finalists": 0, "base_runs": 0})
        drawn[name] = (space, draw_settings(space, N_SETTINGS[name]))
    for number in range(max(N_SETTINGS[name] for name in spaces)):
        for name, (space, settings) in drawn.items():
            if number < len(settings):
                for seed in SEEDS:
                    params = settings[number]
                    yield name, number, seed, params, space.trial_config({**params, "seed": seed})


def record_run(config: TrainingConfig, folder: Path, cache: PrefixCache) -> dict[str, Any]:
    """Train a run: its metrics by epoch, and the objective of its best checkpoint on test."""
    data = load_data(config.data)
    result = train_model(config, folder, data=data, prefix_cache=cache)
    history = result.last_checkpoint.history
    best = result.best_checkpoint
    model = best.load_weights(config.model.build_model(1, 10, 0)).eval()
    test = config.validation.replace(size=None, scales=())(model, data.test)
    return {
        "curves": {name: [float(row[name]) for row in history] for name in METRICS},
        "best_epoch": best.epoch,
        "trained": [int("shared" not in row) for row in history],
        "burn_in": config.burn_in,
        "test": test["robust_worst"],
        "seconds": sum(row["train/seconds"] + row["validation_seconds"] for row in history),
    }


def read_runs(table: Path, work: Path) -> dict[str, dict[str, Any]]:
    """Return the runs of a table, if there is one, and those recorded in `work`, by their keys."""
    runs = json.loads(np.load(table)["runs"].tobytes()) if table.exists() else []
    runs += [json.loads(path.read_text()) for path in (work / "parts").glob("*.json")]
    return {run_key(run["space"], run["params"], run["seed"]): run for run in runs}


def run_key(name: str, params: Params, seed: int) -> str:
    """Return what determines a training. Random settings of a conditional space may be equal."""
    return json.dumps([name, params, seed], sort_keys=True)


def record(work: Path, spaces: list[str], table: Path) -> None:
    """Record the runs that are missing both in the table and in `work`."""
    parts = work / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    known = set(read_runs(table, work))
    for name, number, seed, params, config in list_runs(spaces):
        if (key := run_key(name, params, seed)) in known:
            continue
        known.add(key)
        path = parts / f"{name}-{number:03d}-{seed}.json"
        cache = PrefixCache(work / "prefixes", max_bytes=2**31)
        facts = {"space": name, "number": number, "seed": seed, "params": params}
        facts |= {"machine": describe_machine(), "commit": read_commit()}
        began = time.process_time()
        try:
            found = record_run(config, work / "runs" / path.stem, cache)
        except RaysweepError as error:
            found = {"failed": str(error)}
        found["processor_seconds"] = round(time.process_time() - began, 2)
        with atomic_open(path) as file:
            file.write(json.dumps(facts | found).encode())
        print(
            f"{path.stem}: {found.get('test', 'failed')}, {found['processor_seconds']} s",
            flush=True,
        )


def collect(work: Path, table: Path) -> None:
    """Add the recorded runs to the table: a JSON text of all runs, with their curves."""
    runs = sorted(
        read_runs(table, work).values(), key=lambda run: (run["space"], run["number"], run["seed"])
    )
    text = json.dumps(runs, separators=(",", ":"))
    with atomic_open(table) as file:
        np.savez_compressed(file, runs=np.frombuffer(text.encode(), np.uint8))
    print(f"{table}: {len(runs)} runs, {table.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("action", choices=["record", "collect"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--spaces", nargs="+", default=list(N_SETTINGS), choices=N_SETTINGS)
    parser.add_argument("--table", type=Path, default=Path(__file__).with_suffix(".npz"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.action == "collect":
        collect(args.work, args.table)
    else:
        record(args.work, args.spaces, args.table)


if __name__ == "__main__":
    main()
