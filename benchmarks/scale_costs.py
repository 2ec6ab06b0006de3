"""Measure the milliseconds that one event of a sweep costs its driver, for several numbers of
trials that exist already. Prints JSON.

    python benchmarks/scale_costs.py [--postgres /usr/lib/postgresql/15/bin] \\
        [--sizes 100 1000 10000] > costs.json
"""

import contextlib
import json
import os
import pwd
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
from command_line import create_parser

from raysweep.data import load_data
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.search_space import Params, SearchSpace, load_space
from raysweep.sweep.trial import Trial
from raysweep.tracking import SweepTracker, Tracker

EPOCHS, METRICS, REPEATS = 10, 25, 5


def settings_of(space: SearchSpace, number: int) -> Params:
    trial = optuna.trial.FixedTrial(_random(space, random.Random(number)))
    return space.suggest_params(trial)


def _random(space: SearchSpace, rng: random.Random) -> dict[str, Any]:
    def draw(distribution: Any) -> Any:
        if distribution.categorical is not None:
            return rng.choice(distribution.to_optuna().choices)
        return rng.uniform(*distribution.bounds_or_choices())

    return {path: draw(distribution) for path, distribution in space.space.items()}


def trial_of(space: SearchSpace, number: int) -> Trial:
    """Build an ended trial with as many metrics as a real one has."""
    rng = random.Random(number)
    row = {f"train/metric_{i}": rng.random() for i in range(METRICS - 3)}
    row |= {
        "robust_worst": rng.random(),
        "clean": rng.random(),
        "masking_gap": rng.random() * 0.1,
        "epoch": EPOCHS,
    }
    curve = [[epoch, rng.random()] for epoch in range(1, EPOCHS + 1)]
    return Trial(
        number, settings_of(space, number), "finished", EPOCHS, row, row, curve, EPOCHS, 100.0
    )


def fastest_milliseconds(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Time some calls and return the fastest, which other load on the machine affects least."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - began))
    return round(min(found), 2)


def optuna_costs(space: SearchSpace, storage: Any, sizes: list[int]) -> dict[int, float]:
    """Measure a proposal and the report of its result, by the number of trials in the study."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=storage, direction="maximize", sampler=space.sampler.build_sampler()
    )
    costs, held = {}, 0

    def run_once() -> None:
        nonlocal held
        trial = study.ask()
        space.suggest_params(trial)
        study.tell(trial, random.random())
        held += 1

    for size in sizes:
        missing = [trial_of(space, number) for number in range(held, size)]
        distributions = {
            path: distribution.to_optuna() for path, distribution in space.space.items()
        }
        study.add_trials(
            optuna.trial.create_trial(
                params=space.optuna_params(t.params),
                distributions={path: distributions[path] for path in t.params},
                value=t.score("robust_worst"),
            )
            for t in missing
        )
        held = max(held, size)
        costs[size] = fastest_milliseconds(run_once)
    return costs


def ledger_costs(space: SearchSpace, folder: Path, sizes: list[int]) -> dict[str, dict[int, float]]:
    ledger = Ledger.create(folder / "sweep", space)
    costs: dict[str, dict[int, float]] = {"write a trial": {}, "read all trials": {}}
    held = 0
    for size in sizes:
        for number in range(held, size):
            ledger.save_trial(trial_of(space, number))
        held = size
        again = trial_of(space, 0)
        costs["write a trial"][size] = fastest_milliseconds(
            lambda trial=again: ledger.save_trial(trial)
        )
        costs["read all trials"][size] = fastest_milliseconds(ledger.load_trials, 2)
    return costs


def mlflow_costs(
    space: SearchSpace, uri: str, folder: Path, sizes: list[int]
) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    """Measure opening a trial's run with its settings, logging one epoch, and closing the run, by
    the number of runs in the store.

    Returns:
        Milliseconds until MLflow has the record, which a thread writes; and milliseconds of the
        driver, which hands it over.
    """
    tracker = Tracker(uri, folder / "artifacts").wait_until_ready()
    follower = SweepTracker(tracker, load_data(space.trial_config({}).data))
    ledger = Ledger.create(folder / "followed", space)
    follower.on_sweep_start(ledger, 1)
    names = ("open a run", "log an epoch", "close a run")
    written: dict[str, dict[int, float]] = {name: {} for name in names}
    handed_over: dict[str, dict[int, float]] = {name: {} for name in names}
    held = 0
    for size in sizes:
        _fill(uri, tracker, held, size)
        held = size
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for number in range(size, size + REPEATS):
            trial = trial_of(space, number)
            running = Trial(number, trial.params)
            ended = Trial(number, trial.params, "stopped", EPOCHS)
            updates = [(running, None), (running, trial.latest), (ended, None)]
            for name, (update, row) in zip(names, updates, strict=True):
                began = time.perf_counter()
                follower.on_trial_update(update, row)
                after = time.perf_counter()
                assert follower.flush(), "MLflow does not answer"
                seconds[name].append((time.perf_counter() - began, after - began))
        for name, pairs in seconds.items():
            until_written, until_handed_over = map(min, zip(*pairs, strict=True))
            written[name][size] = round(1000 * until_written, 2)
            handed_over[name][size] = round(1000 * until_handed_over, 3)
    return written, handed_over


def _fill(uri: str, tracker: Tracker, first: int, last: int) -> None:
    """Insert runs as sweeps leave them into the tables; through MLflow it would take an hour."""
    import sqlalchemy as sa
    from mlflow.store.tracking.dbmodels.models import (
        SqlLatestMetric,
        SqlMetric,
        SqlParam,
        SqlRun,
        SqlTag,
    )

    _, experiment = tracker._start_connecting().result()
    now = int(time.time() * 1000)
    rows: dict[Any, list[dict[str, Any]]] = {
        m: [] for m in (SqlRun, SqlTag, SqlParam, SqlMetric, SqlLatestMetric)
    }
    for number in range(first, last):
        run = f"{number:032x}"
        rows[SqlRun].append(
            {
                "run_uuid": run, "name": f"s/{number:04d}", "source_type": "LOCAL",
                "entry_point_name": "",
                "user_id": "u", "status": "FINISHED", "start_time": now, "end_time": now,
                "source_version": "",
                "lifecycle_stage": "active", "artifact_uri": "a", "experiment_id": int(experiment),
            }
        )  # fmt: skip
        tags = {
            "raysweep.kind": "trial",
            "raysweep.sweep": "k",
            "raysweep.trial": f"{number:05d}",
            "state": "stopped",
        }
        rows[SqlTag] += [{"run_uuid": run, "key": k, "value": v} for k, v in tags.items()]
        rows[SqlParam] += [{"run_uuid": run, "key": f"p{i}", "value": str(i)} for i in range(60)]
        rows[SqlLatestMetric] += [
            {
                "run_uuid": run,
                "key": f"m{i}",
                "value": 0.5,
                "timestamp": now,
                "step": 1,
                "is_nan": False,
            }
            for i in range(METRICS)
        ]
        rows[SqlMetric] += [
            {
                "run_uuid": run,
                "key": f"m{i}",
                "value": 0.5,
                "timestamp": now,
                "step": s,
                "is_nan": False,
            }
            for i in range(METRICS)
            for s in range(2)
        ]
    engine = sa.create_engine(uri)
    with engine.begin() as connection:
        for model, values in rows.items():
            if values:
                connection.execute(sa.insert(model.__table__), values)
    engine.dispose()


def tune_costs(count: int) -> dict[int, float]:
    """Measure Ray Tune's own work, without ours, for a trial of one report, early and late in a
    sweep.
    """
    from ray import tune

    from raysweep.sweep.cluster import connect_to_cluster

    ended: list[float] = []

    class Clock(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            ended.append(time.perf_counter())

    with connect_to_cluster(n_cpus=2), tempfile.TemporaryDirectory() as folder:
        tune.Tuner(
            tune.with_resources(lambda config: tune.report({"x": 1}), {"CPU": 1}),
            tune_config=tune.TuneConfig(
                num_samples=count, max_concurrent_trials=2, reuse_actors=True
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0, callbacks=[Clock()]),
        ).fit()
    # Ten in a row, the fastest: two run at once, and end together.
    early, late = ended[10 : count // 4], ended[-count // 4 :]
    each = [
        min(b - a for a, b in zip(part, part[10:], strict=False)) / 10 for part in (early, late)
    ]
    return {count // 4: round(1000 * each[0], 2), count: round(1000 * each[1], 2)}


@contextlib.contextmanager
def postgres(binaries: Path, folder: Path) -> Iterator[str]:
    """Run a new PostgreSQL server on loopback, without a password."""
    user = pwd.getpwnam("postgres")
    folder.chmod(0o755)
    data = folder / "pg"
    data.mkdir()
    os.chown(data, user.pw_uid, user.pw_gid)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(*command: str) -> None:
        subprocess.run(
            command,
            user=user.pw_uid,
            group=user.pw_gid,
            cwd="/",
            check=True,
            stdout=subprocess.DEVNULL,
        )

    run(str(binaries / "initdb"), "-A", "trust", "-D", str(data))
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={data}"
    run(
        str(binaries / "pg_ctl"),
        "-D",
        str(data),
        "-o",
        options,
        "-l",
        str(data / "log"),
        "-w",
        "start",
    )
    try:
        for database in ("optuna", "mlflow"):
            run(str(binaries / "createdb"), "-h", "127.0.0.1", "-p", str(port), database)
        yield f"postgresql://postgres@127.0.0.1:{port}"
    finally:
        run(str(binaries / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--postgres", type=Path, metavar="BIN", help="folder of initdb and pg_ctl")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument(
        "--parts", nargs="+", default=["optuna", "optuna-storage", "ledger", "mlflow", "tune"]
    )
    args = parser.parse_args()
    space = load_space("lrat", {})
    costs: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp(prefix="scale-"))
    small = [size for size in args.sizes if size <= 1000]
    with contextlib.ExitStack() as stack:
        stores = {"sqlite": f"sqlite:///{folder}"}
        if args.postgres:
            stores["postgres"] = stack.enter_context(postgres(args.postgres, folder))
        if "optuna" in args.parts:
            costs["optuna in memory"] = optuna_costs(space, None, args.sizes)
        if "ledger" in args.parts:
            costs |= {
                f"ledger: {what}": cost
                for what, cost in ledger_costs(space, folder, args.sizes).items()
            }
        for name, uri in stores.items():
            suffix = ".db" if name == "sqlite" else ""
            if "optuna-storage" in args.parts:
                # Each trial brought there costs a transaction: ten thousand take minutes.
                costs[f"optuna {name}"] = optuna_costs(space, f"{uri}/optuna{suffix}", small)
            if "mlflow" in args.parts:
                (folder / name).mkdir()
                written, handed_over = mlflow_costs(
                    space, f"{uri}/mlflow{suffix}", folder / name, args.sizes
                )
                costs |= {f"mlflow {name}: {what}": cost for what, cost in written.items()}
                costs |= {f"mlflow background: {what}": cost for what, cost in handed_over.items()}
        if "tune" in args.parts:
            costs["ray tune: a trial"] = tune_costs(min(args.sizes[-1], 800))
    shutil.rmtree(folder, ignore_errors=True)
    json.dump(costs, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
