"""Measure the time of sweeps on digits: python benchmarks/sweeps.py sharing|overhead|kinds

sharing: the same sweep with and without shared prefixes, in turn; its epochs and wall time.
overhead: a sweep and bare training of the same runs in the same number of processes, measured in
    turn, in wall and in processor seconds of all processes; the seconds a trial takes to start.
kinds: one small sweep of each kind of search, with its time.

Each prints a Markdown table. All sweeps log to MLflow, as `raysweep tune` does.
"""

import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from command_line import create_parser
from measure import ProcessorSeconds, Ratio, describe_machine
from measure import format_table as markdown

from raysweep.data import load_data
from raysweep.sweep.cluster import connect_to_cluster
from raysweep.sweep.epoch_counts import count_epochs
from raysweep.sweep.ledger import Ledger
from raysweep.sweep.resources import Resources
from raysweep.sweep.search_space import SearchSpace, load_space
from raysweep.sweep.trial import Trial
from raysweep.sweep.tuner import run_sweep
from raysweep.tracking import SweepTracker, Tracker
from raysweep.training.config import TrainingConfig
from raysweep.training.trainer import train_model

LAM, BURN_IN = "method.terms.pgd.weight.lam", "method.terms.pgd.weight.burn_in"
SMALL = {"data.train_size": 320, "data.val_size": 50, "*.attacks.*.steps": 5}
# As little as a sweep can train on.
TINY = {"data.train_size": 32, "data.val_size": 16, "*.attacks.*.steps": 1, "batch_size": 32,
        "validation.finish.*.steps": 1}  # fmt: skip
GRID = {
    "method": "gairat",
    "base": SMALL,
    "sampler": {"kind": "grid"},
    "scheduler": {"kind": "none"},
    "space": {LAM: {"categorical": [-2.0, -1.0, 0.0, 1.0]}, BURN_IN: {"categorical": [2, 4, 6]}},
    "trials": 12,
}


class Clock:
    """Listener that records when each trial started and reported, and the processor seconds."""

    def __init__(self) -> None:
        self.started_at: dict[int, float] = {}
        self.waits: list[float] = []
        self.processor = ProcessorSeconds()

    def on_sweep_start(self, ledger: Ledger, concurrency: int) -> None:
        self.concurrent = concurrency

    def on_trial_update(self, trial: Trial, epoch_metrics: dict[str, float] | None) -> None:
        now = time.perf_counter()
        begun = self.started_at.setdefault(trial.number, now)
        if epoch_metrics is not None and trial.epoch == 1 and "shared" not in epoch_metrics:
            self.waits.append(
                now - begun - epoch_metrics["train/seconds"] - epoch_metrics["validation_seconds"]
            )

    def on_repeat_update(self, run: Trial, epoch_metrics: dict[str, float] | None) -> None:
        self.on_base_run_update(run, epoch_metrics)

    def on_base_run_update(self, run: Trial, epoch_metrics: dict[str, float] | None) -> None:
        pass

    def on_finalist_update(self, trial: Trial, n_left: int) -> None:
        pass

    def on_sweep_end(self, ledger: Ledger, error: BaseException | None = None) -> None:
        pass


def run_timed_sweep(space: SearchSpace, **resources: Any) -> tuple[Ledger, float, Clock]:
    """Run a sweep in a new folder; return its ledger, wall seconds and clock."""
    folder, clock = Path(tempfile.mkdtemp(prefix="sweeps-")), Clock()
    tracker = Tracker(f"sqlite:///{folder}/mlflow.db", folder / "mlruns").wait_until_ready()
    dataset = load_data(space.trial_config({}).data)
    ledger = Ledger.create(folder / "runs" / "sweep", space)
    began = time.perf_counter()
    with clock.processor:
        run_sweep(ledger, [SweepTracker(tracker, dataset), clock], Resources(**resources))
    seconds, trials = time.perf_counter() - began, ledger.load_trials()
    print(
        f"{len(trials)} trials, {count_epochs(trials)}, {seconds:.1f} s",
        file=sys.stderr,
        flush=True,
    )
    return ledger, seconds, clock


def measure_sharing(rounds: int) -> list[list[Any]]:
    shipped = load_space("gairat", {**SMALL, "finalists": 0, "base_runs": 0})
    cases = {
        "lambda x burn-in (grid of 12)": SearchSpace.from_data(GRID),
        "gairat as shipped (TPE, ASHA)": shipped,
    }
    table: list[list[Any]] = [
        [
            "sweep",
            "trials",
            "epochs of all trials",
            "epochs trained, shared",
            "ratio of epochs",
            "s, not shared",
            "s, shared",
            "ratio of s",
        ]
    ]
    for name, space in cases.items():
        alone, shared = [], []
        for _ in range(rounds):
            alone.append(run_timed_sweep(space.model_copy(update={"share_prefixes": False}))[:2])
            shared.append(run_timed_sweep(space)[:2])
        asked = [sum(trial.epoch for trial in ledger.load_trials()) for ledger, _ in shared]
        trained = [
            sum(trial.trained_epochs for trial in ledger.load_trials()) for ledger, _ in shared
        ]
        slow, fast = (statistics.median(seconds for _, seconds in runs) for runs in (alone, shared))
        table.append([name, space.n_trials, "/".join(map(str, asked)), "/".join(map(str, trained)),
                      f"{sum(trained) / sum(asked):.2f}", f"{slow:.1f}", f"{fast:.1f}",
                      f"{fast / slow:.2f}"])  # fmt: skip
    return table


def train_bare(config: TrainingConfig) -> None:
    torch.set_num_threads(1)
    train_model(config, Path(tempfile.mkdtemp(prefix="sweeps-")))


OVERHEAD = [
    "trials",
    "epochs each",
    "s per epoch",
    "s of bare training, 2 processes",
    "s of the sweep",
    "ratio (each round)",
    "processor s, bare",
    "sweep",
    "... beside its trials",
    "s to start, warm actor",
]
# What the command line of a worker that trains begins with.
TRIAL_WORKER = "ray::ImplicitFunc"


def measure_overhead(
    rounds: int, trials: int = 8, epochs: int = 8, base: dict[str, Any] | None = None
) -> list[list[Any]]:
    """Measure the same runs with and without a sweep, in turn.

    Training takes more processor seconds on a machine with other load. So what a sweep adds is also
    counted by itself: the processor seconds of all its processes except the workers that train.
    """
    space = SearchSpace.from_data(
        GRID
        | {"base": {**(base or SMALL), "epochs": epochs}}
        | {"share_prefixes": False, "trials": trials}
    )
    configs = [space.trial_config(point) for point in space.initial_points[: space.n_trials]]
    alone, swept, waits = [], [], []
    for _ in range(rounds):
        began = time.perf_counter()
        with ProcessorSeconds() as bare, ProcessPoolExecutor(2) as pool:
            list(pool.map(train_bare, configs))
        alone.append((time.perf_counter() - began, bare.total))
        _, seconds, clock = run_timed_sweep(space)
        by_name = clock.processor.by_name
        training = sum(part for name, part in by_name.items() if name.startswith(TRIAL_WORKER))
        swept.append((seconds, clock.processor.total, clock.processor.total - training))
        parts = ", ".join(f"{name} {part:.1f}" for name, part in by_name.most_common())
        print(f"processor seconds of the sweep: {parts}", file=sys.stderr, flush=True)
        waits += sorted(clock.waits)[: -clock.concurrent]
    (one, bare_processor), (two, sweep_processor, added) = (
        [statistics.median(column) for column in zip(*found, strict=True)]
        for found in (alone, swept)
    )
    ratios = "/".join(f"{b / a:.2f}" for (a, _), (b, *_) in zip(alone, swept, strict=True))
    n_epochs = sum(config.epochs for config in configs)
    row = [
        *(space.n_trials, epochs, f"{bare_processor / n_epochs:.2f}", f"{one:.1f}", f"{two:.1f}"),
        *(f"{two / one:.2f} ({ratios})", f"{bare_processor:.1f}", f"{sweep_processor:.1f}"),
        f"{added:.1f}",
        f"{statistics.median(waits):.2f}",
    ]
    return [list(OVERHEAD), row]


def time_sweeps(sizes: Sequence[int], small: bool = False) -> list[float]:
    """Return wall seconds of sweeps with these numbers of trials, without shared prefixes.

    Two trials run at a time, on a cluster that has started before.
    """
    base = {**TINY, "epochs": 1} if small else {**SMALL, "epochs": 2}
    spaces = [
        SearchSpace.from_data(GRID | {"base": base, "share_prefixes": False, "trials": size})
        for size in sizes
    ]
    with connect_to_cluster(n_cpus=2):
        return [run_timed_sweep(space)[1] for space in spaces]


def run(full: bool = False) -> list[Ratio]:
    """Run the part of `python benchmarks`; small sizes unless `full`."""
    with connect_to_cluster(n_cpus=2):
        head, *rows = measure_overhead(2) if full else measure_overhead(1, 3, 1, TINY)
    print(f"\nA sweep and bare training of the same runs; {describe_machine()}\n")
    print(markdown(head, [[str(cell) for cell in row] for row in rows]), flush=True)
    found = []
    for trials, epochs, epoch, alone, swept, ratio, _, _, added, start in rows:
        n = f"{trials} trials of {epochs} epochs of {epoch} s"
        minutes = (float(swept) - float(alone)) / (trials * epochs * 60 / 2)
        found.append(Ratio("sweep over bare training", ratio, "1.10", n))
        found.append(Ratio("... processor seconds beside the trials", f"{added} s", "", n))
        found.append(
            Ratio("... what it adds, beside epochs of a minute", f"{minutes:.1%}", "5%", n)
        )
        found.append(Ratio("start of a trial on a warm actor", f"{start} s", "1 s", n))
    return found


def measure_kinds(rounds: int) -> list[list[Any]]:
    ranges = {LAM: {"float": [-3.0, 3.0]}, BURN_IN: {"int": [1, 3]}}
    plain = {
        "method": "gairat",
        "base": {**SMALL, "epochs": 4},
        "scheduler": {"kind": "none"},
        "space": ranges,
        "trials": 8,
    }
    both = {"metric": ["clean", "robust_worst"]}
    cases: dict[str, tuple[dict[str, Any], int]] = {
        "TPE, ASHA": (
            {"sampler": {"kind": "tpe", "startup": 4}, "scheduler": {"kind": "asha", "grace": 2}},
            1,
        ),
        "TPE, no early stopping": ({"sampler": {"kind": "tpe", "startup": 4}}, 1),
        "random": ({"sampler": {"kind": "random"}}, 1),
        "grid": ({"sampler": {"kind": "grid"}, "space": GRID["space"]}, 1),
        "TPE, two metrics": ({"sampler": {"kind": "tpe", "startup": 4}, **both}, 1),
        "NSGA-II, two metrics": ({"sampler": {"kind": "nsga2", "startup": 4}, **both}, 1),
        "random, 2 workers a trial": ({"sampler": {"kind": "random"}, "trials": 2}, 2),
    }
    table: list[list[Any]] = [
        [
            "sweep",
            "trials",
            "finished / stopped / failed",
            "epochs asked",
            "trained",
            "best robust_worst",
            "front",
            "s",
        ]
    ]
    for name, (changes, workers) in cases.items():
        ledger, seconds, _ = run_timed_sweep(
            SearchSpace.from_data(plain | changes), cpus=workers, workers=workers
        )
        trials = ledger.load_trials()
        states = Counter(trial.state for trial in trials)
        best = max(trial.score("robust_worst") for trial in trials)
        counts = " / ".join(str(states[state]) for state in ("finished", "stopped", "failed"))
        n_on_front = ""
        if len(ledger.space.objectives) > 1:
            n_on_front = str(len(ledger.unmasked_pareto_front()))
        table.append([name, len(trials), counts,
                      sum(t.epoch for t in trials), sum(t.trained_epochs for t in trials),
                      f"{best:.3f}", n_on_front, f"{seconds:.1f}"])  # fmt: skip
        print(table[-1], file=sys.stderr, flush=True)
    return table


def main() -> None:
    parser = create_parser(__doc__)
    what = {"sharing": measure_sharing, "overhead": measure_overhead, "kinds": measure_kinds}
    parser.add_argument("what", choices=what)
    parser.add_argument(
        "--rounds", type=int, default=2, help="of each, in turn; the table has medians (default: 2)"
    )
    args = parser.parse_args()
    with connect_to_cluster(n_cpus=2):
        table = what[args.what](args.rounds)
    head, *rows = [f"| {' | '.join(map(str, row))} |" for row in table]
    print("\n".join([head, "|---" * len(table[0]) + "|", *rows]))


if __name__ == "__main__":
    main()
