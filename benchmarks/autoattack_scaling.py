"""Measure AutoAttack's wall time for several numbers of workers and examples, on the robust digits
network of the tests.

    python benchmarks/autoattack_scaling.py --examples 50 100 200 --workers 1 2
        writes autoattack_scaling.svg
    python benchmarks/autoattack_scaling.py --ray ...
        the workers are Ray tasks

Each worker has one thread and has started before the time is taken. Verdicts must be the same for
every number of workers.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import torch
from command_line import create_parser

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from robust_digits import digits, robust_digits

from raysweep.evaluation import ProcessPoolMap, RobustnessReport, ShardMapper, evaluate

EPS = 0.2


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--examples", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".svg"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    seconds: dict[int, list[float]] = {}
    verdicts: dict[int, np.ndarray] = {}
    print(
        "| workers | examples | robust | wall s | examples / s | load |\n|---|---|---|---|---|---|"
    )
    for workers in args.workers:
        with pool(workers, args.ray) as map:
            run(map, 2 * workers, "pgd20")
            for count in args.examples:
                began = time.monotonic()
                robust = run(map, count).robust
                wall = time.monotonic() - began
                assert np.array_equal(verdicts.setdefault(count, robust), robust), (
                    "the verdict depends on the workers"
                )
                seconds.setdefault(workers, []).append(wall)
                cells = [
                    workers,
                    count,
                    robust.sum(),
                    f"{wall:.1f}",
                    f"{count / wall:.1f}",
                    f"{os.getloadavg()[0]:.0f}",
                ]
                print("|", *(f"{cell} |" for cell in cells), flush=True)
    draw(args.examples, seconds, args.out)


def run(map: ShardMapper, count: int, attack: str = "autoattack") -> RobustnessReport:
    return evaluate(robust_digits(), *digits(count), attack, EPS, map=map)


@contextmanager
def pool(workers: int, ray: bool) -> Iterator[ShardMapper]:
    if not ray:
        with ProcessPoolMap(workers) as processes:
            yield processes
        return
    from raysweep.sweep.cluster import connect_to_cluster
    from raysweep.sweep.ray_map import RayMap

    with connect_to_cluster(n_cpus=workers):
        yield RayMap()


def draw(examples: list[int], seconds: dict[int, list[float]], path: Path) -> None:
    """Plot wall time against examples and against workers."""
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "raysweep", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
    for workers, walls in seconds.items():
        left.plot(examples, walls, "o-", label=f"{workers} worker{'s' * (workers > 1)}")
    for i, count in enumerate(examples):
        right.plot(
            list(seconds), [walls[i] for walls in seconds.values()], "o-", label=f"{count} examples"
        )
    left.set(xlabel="examples", ylabel="wall time, s", ylim=(0, None))
    right.set(xlabel="workers", xticks=list(seconds))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
