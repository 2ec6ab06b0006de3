"""Simulate sweeps of 10,000 trials on 1,000 GPUs from measured costs, and find their bottlenecks.

    python benchmarks/scale.py benchmarks/scale_costs.json       # the table of scale.md

The simulation handles one event after another. As in Ray Tune, one driver handles proposals,
reports and ends of trials in sequence, and a trial continues when its report has been handled. All
checkpoints go through one store of a given bandwidth. Machines are preempted at random and replaced
after a while. Costs that grow with the number of trials are interpolated between measured sizes.
"""

import bisect
import heapq
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from command_line import create_parser

Costs = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Setting:
    """A sweep on a cluster; times in seconds and sizes in MB.

    Attributes:
        sweeps: number of sweeps of equal size that share GPUs and trials, with a driver each.
    """

    name: str
    gpus: int = 1000
    trials: int = 10_000
    epochs: int = 100
    grace: int = 10
    factor: int = 2
    epoch_seconds: float = 60.0
    checkpoint_mb: float = 90.0
    store_mb_per_second: float = 10_000.0
    optuna: str = "in memory"
    mlflow: str = "sqlite"
    sweeps: int = 1
    hours_between_preemptions: float = 6.0
    replacement_seconds: float = 240.0
    start_seconds: float = 15.0
    keeps_half_epochs: bool = True


@dataclass
class Server:
    """A queue that handles one request at a time."""

    free_at: float = 0.0
    busy: float = 0.0
    waited: float = 0.0
    served: int = 0

    def serve(self, now: float, seconds: float) -> float:
        """Return the time at which a request that arrives `now` is done."""
        start = max(now, self.free_at)
        self.free_at = start + seconds
        self.busy += seconds
        self.waited += start - now
        self.served += 1
        return self.free_at


@dataclass
class Outcome:
    """Result of a simulation.

    Attributes:
        hours: time until the last report.
        shares: parts of the GPUs' time until then, by what they do or wait for.
        driver_busy: share of that time in which the busiest driver works.
    """

    hours: float
    shares: dict[str, float]
    driver_busy: float
    preemptions: int
    lost_epochs: float
    by_part: Counter[str]


@dataclass(frozen=True)
class Event:
    """Something that happens on a GPU at a time.

    Attributes:
        quality: that of its trial.
        left: seconds of training that remain in this epoch.
    """

    at: float
    then: Callable[["Event"], "Event | None"]
    gpu: int
    quality: float = 0.0
    epochs: int = 0
    left: float = 0.0


class Sweep:
    """Simulates one sweep on its share of the GPUs, from its first trial to its last."""

    def __init__(self, setting: Setting, costs: Costs, store: Server, seed: int) -> None:
        self._s, self._costs, self._store = setting, costs, store
        self._random = random.Random(seed)
        self._driver = Server()
        self._rungs: dict[int, list[float]] = {}
        rung = setting.grace
        while rung < setting.epochs:
            self._rungs[rung] = []
            rung *= setting.factor
        self._started = self._preemptions = 0
        self._trained = self._lost = self._last = 0.0
        self.by_part: Counter[str] = Counter()

    def events(self) -> list[Event]:
        """Return the first events: each GPU asks for a trial."""
        return [Event(0.0, self._ask, gpu) for gpu in range(self._s.gpus)]

    def _ask(self, event: Event) -> Event | None:
        if self._started == self._s.trials:
            return None
        self._started += 1
        begin = self._driver.serve(event.at, self._cost("start")) + self._s.start_seconds
        return Event(begin, self._train, event.gpu, self._random.random(), 0, self._epoch())

    def _train(self, event: Event) -> Event:
        """Train to the end of the epoch, or until the machine is preempted."""
        taken = self._random.expovariate(1 / (3600 * self._s.hours_between_preemptions))
        if taken >= event.left:
            self._trained += event.left
            return replace(event, at=event.at + event.left, then=self._save)
        self._trained += taken
        kept = taken if self._s.keeps_half_epochs else 0.0
        self._lost += (taken - kept) / self._s.epoch_seconds
        return replace(event, at=event.at + taken, then=self._lose, left=event.left - kept)

    def _lose(self, event: Event) -> Event:
        self._preemptions += 1
        told = self._driver.serve(
            event.at, interpolate_cost(self._costs["ray tune: a trial"], self._started) / 1000
        )
        return replace(
            event, at=told + self._s.replacement_seconds + self._s.start_seconds, then=self._train
        )

    def _save(self, event: Event) -> Event:
        saved = self._store.serve(event.at, self._s.checkpoint_mb / self._s.store_mb_per_second)
        return replace(event, at=saved, then=self._report, epochs=event.epochs + 1)

    def _report(self, event: Event) -> Event:
        told = self._driver.serve(event.at, self._cost("report"))
        self._last = max(self._last, told)
        if event.epochs < self._s.epochs and self._good(event.epochs, event.quality):
            return replace(event, at=told, then=self._train, left=self._epoch())
        return replace(event, at=told, then=self._end)

    def _end(self, event: Event) -> Event:
        return Event(self._driver.serve(event.at, self._cost("end")), self._ask, event.gpu)

    def outcome(self) -> tuple[float, float, Server, int, float, int]:
        starts = self._started + self._preemptions
        return self._last, self._trained, self._driver, self._preemptions, self._lost, starts

    def _epoch(self) -> float:
        return self._s.epoch_seconds * self._random.lognormvariate(0, 0.15)

    def _good(self, epochs: int, quality: float) -> bool:
        if epochs not in self._rungs:
            return True
        reached = self._rungs[epochs]
        value = quality + self._random.gauss(0, 0.1)
        bisect.insort(reached, value)
        return value >= reached[-max(1, len(reached) // self._s.factor)]

    def _cost(self, event: str) -> float:
        """Return seconds of the driver, which grow with the trials in study and store."""
        names = {
            "start": [
                f"optuna {self._s.optuna}",
                "ledger: write a trial",
                f"mlflow {self._s.mlflow}: open a run",
            ],
            "report": [
                "ledger: write a trial",
                f"mlflow {self._s.mlflow}: log an epoch",
                "ray tune: a report",
            ],
            "end": [
                "ledger: write a trial",
                f"mlflow {self._s.mlflow}: close a run",
                "ray tune: a trial",
            ],
        }[event]
        total = 0.0
        for name in names:
            # All sweeps share MLflow's store.
            held = self._started * (self._s.sweeps if name.startswith("mlflow") else 1)
            seconds = interpolate_cost(self._costs[name], held) / 1000
            self.by_part[name.split(":")[0]] += seconds  # type: ignore[assignment]
            total += seconds
        return total


def interpolate_cost(cost: dict[str, float], held: int) -> float:
    """Interpolate a cost linearly between the measured numbers of trials; extrapolate beyond."""
    points = sorted((int(size), value) for size, value in cost.items())
    if len(points) == 1 or held <= points[0][0]:
        return points[0][1]
    after = min(bisect.bisect_left([size for size, _ in points], held), len(points) - 1)
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    return max(0.0, y0 + (y1 - y0) * (held - x0) / (x1 - x0))


def simulate(setting: Setting, costs: Costs) -> Outcome:
    """Simulate all sweeps at the same time, on one store."""
    store = Server()
    part = replace(
        setting, gpus=setting.gpus // setting.sweeps, trials=setting.trials // setting.sweeps
    )
    sweeps = [Sweep(part, costs, store, seed) for seed in range(setting.sweeps)]
    # Events at one moment in the order in which they came up: what happens to be equal is not
    # compared further.
    count = itertools.count()
    queue = [(event.at, next(count), event) for sweep in sweeps for event in sweep.events()]
    while queue:
        _, _, event = heapq.heappop(queue)
        after = event.then(event)
        if after is not None:
            heapq.heappush(queue, (after.at, next(count), after))
    ended = [sweep.outcome() for sweep in sweeps]
    last = max(one[0] for one in ended)
    drivers = [one[2] for one in ended]
    parts: Counter[str] = Counter()
    for sweep in sweeps:
        parts.update(sweep.by_part)
    whole = setting.gpus * last
    idle = {
        "training": sum(one[1] for one in ended),
        "the driver": sum(driver.waited + driver.busy for driver in drivers),
        "the store": store.waited + store.busy,
        "starts": sum(one[5] for one in ended) * setting.start_seconds,
        "new machines": sum(one[3] for one in ended) * setting.replacement_seconds,
    }
    shares = {name: seconds / whole for name, seconds in idle.items()}
    return Outcome(
        hours=last / 3600,
        shares=shares | {"the last trials": 1 - sum(shares.values())},
        driver_busy=max(driver.busy for driver in drivers) / last,
        preemptions=sum(one[3] for one in ended),
        lost_epochs=sum(one[4] for one in ended),
        by_part=parts,
    )


def settings() -> list[Setting]:
    slow = Setting("epochs of 60 s")
    fast = Setting("epochs of 10 s", epoch_seconds=10.0)
    wide = Setting("370 MB a checkpoint (WRN-32-10)", checkpoint_mb=370.0)
    return [
        slow,
        replace(slow, name="... Optuna on SQLite", optuna="sqlite"),
        replace(slow, name="... half epochs lost", keeps_half_epochs=False),
        replace(slow, name="... preempted every hour", hours_between_preemptions=1.0),
        replace(
            slow,
            name="... every hour, half epochs lost",
            hours_between_preemptions=1.0,
            keeps_half_epochs=False,
        ),
        wide,
        replace(wide, name="... store of 1 GB/s (one NFS server)", store_mb_per_second=1000.0),
        fast,
        replace(fast, name="... MLflow on PostgreSQL", mlflow="postgres"),
        replace(fast, name="... MLflow written by a thread", mlflow="background"),
        replace(fast, name="... 10 sweeps of 1,000 trials", sweeps=10),
        replace(fast, name="... 10 sweeps, PostgreSQL", sweeps=10, mlflow="postgres"),
        replace(fast, name="... 100 GPUs", gpus=100),
    ]


def largest_loss(outcome: Outcome) -> str:
    """Return the largest cause of GPU time without training."""
    name, share = max(
        (item for item in outcome.shares.items() if item[0] != "training"), key=lambda item: item[1]
    )
    part = f": {outcome.by_part.most_common(1)[0][0]}" if name == "the driver" else ""
    return f"{name} ({share:.0%}{part})"


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("costs", type=Path)
    parser.add_argument(
        "--shrink",
        type=int,
        default=1,
        metavar="N",
        help="N times fewer GPUs and trials, for a try",
    )
    args = parser.parse_args()
    costs: Costs = json.loads(args.costs.read_text())
    # What a trial costs Tune is its start, its one report and its end.
    costs["ray tune: a report"] = {
        size: value / 3 for size, value in costs["ray tune: a trial"].items()
    }
    print(
        "| setting | hours | GPU time in training | driver busy | preemptions | epochs lost | "
        "largest other use of GPU time |"
    )
    print("|---|---:|---:|---:|---:|---:|---|")
    for setting in settings():
        small = replace(
            setting, gpus=setting.gpus // args.shrink, trials=setting.trials // args.shrink
        )
        o = simulate(small, costs)
        numbers = (
            f"{o.hours:.1f} | {o.shares['training']:.0%} | {o.driver_busy:.0%} | {o.preemptions}"
        )
        print(
            f"| {setting.name} | {numbers} | {math.ceil(o.lost_epochs)} | {largest_loss(o)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
