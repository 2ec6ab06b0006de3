"""Measure the cost of training for several numbers of epochs, examples, trials and workers; print
tables and draw a plot.

    python benchmarks/scaling.py --plot benchmarks/scaling.svg
    python benchmarks/scaling.py --what norms --batch 128    # a part of it

Cost should grow linearly with epochs and examples: the table has slope, intercept and R2 of the
least-squares line. Workers share each batch over gloo on this machine, with one thread each. They
are compared with one worker of one thread, with one worker of as many threads, and with processes
that have as many rows and share nothing. On a busy machine, processor seconds tell more than wall
seconds: on idle cores, a step cannot take less. `norms` measures what half of the batch and
synchronised batch norms cost without any communication: the limit of two workers.
"""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from command_line import create_parser
from measure import Ratio, describe_machine, format_table, medians
from sweeps import time_sweeps

from raysweep.data import load_data
from raysweep.rng import ExampleRng
from raysweep.training.config import build_training_config
from raysweep.training.distributed import DistributedWorkerGroup
from raysweep.training.trainer import build_model_variants, compute_step_gradients, train_model
from raysweep.worker_group import SINGLE_WORKER, SingleWorkerGroup, WorkerGroup

CPU = torch.device("cpu")
# Epochs, training examples, trials.
SIZES = [1, 2, 4, 8], [128, 256, 512, 1024], [2, 4, 8, 12]


def time_training(changes: dict[str, object]) -> float:
    """Train GAIRAT on digits, with checkpoints and validation; return processor seconds."""
    config = build_training_config("gairat", {"*.burn_in": 0, "data.val_size": 64, **changes})
    data = load_data(config.data)
    with TemporaryDirectory() as folder:
        started = time.process_time()
        train_model(config, Path(folder), data=data)
        return time.process_time() - started


def fit_line(sizes: list[int], costs: list[float]) -> tuple[float, float, float]:
    """Return slope, intercept and R2 of the least-squares line."""
    slope, intercept = np.polyfit(sizes, costs, 1)
    residual = np.array(costs) - (slope * np.array(sizes) + intercept)
    return (
        float(slope),
        float(intercept),
        float(1 - (residual**2).sum() / np.var(costs) / len(costs)),
    )


def measure_cost_lines(
    epochs: list[int],
    examples: list[int],
    trials: list[int],
    n: int,
    plot: Path | None,
    small: bool = False,
) -> list[Ratio]:
    """Measure the cost for numbers of epochs, examples and trials: the least of n interleaved runs.

    Trials are measured in wall seconds, the others in processor seconds.
    """
    time_training({"epochs": 1, "data.train_size": 64})
    measured: dict[str, tuple[list[int], list[float]]] = {}
    for name, sizes, of in (
        ("epochs", epochs, lambda size: {"epochs": size, "data.train_size": 32 if small else 256}),
        ("training examples", examples, lambda size: {"epochs": 1, "data.train_size": size}),
    ):
        runs = [[time_training(of(size)) for size in sizes] for _ in range(n)]
        measured[name] = (sizes, [min(column) for column in zip(*runs, strict=True)])
    walls = [time_sweeps(trials, small) for _ in range(n)]
    measured["trials"] = (trials, [min(column) for column in zip(*walls, strict=True)])
    rows, found = [], []
    for name, (sizes, costs) in measured.items():
        slope, intercept, fit_ = fit_line(sizes, costs)
        costs_text = ", ".join(f"{cost:.2f}" for cost in costs)
        rows.append(
            [
                name,
                ", ".join(map(str, sizes)),
                costs_text,
                f"{slope:.2g}",
                f"{intercept:.2g}",
                f"{fit_:.4f}",
            ]
        )
        found.append(
            Ratio(
                f"cost against {name}, R2 of a line",
                f"{fit_:.4f}",
                "1",
                f"{len(sizes)} sizes, {n} runs",
            )
        )
    print(
        f"\nCost of GAIRAT on digits, processor s (trials: wall s of the sweep), least of {n}; "
        f"{describe_machine()}\n"
    )
    print(
        format_table(["cost against", "sizes", "seconds", "slope", "intercept", "R2"], rows),
        flush=True,
    )
    if plot:
        draw(measured, plot)
    return found


def draw(measured: dict[str, tuple[list[int], list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(measured), figsize=(4.2 * len(measured), 3.2), layout="constrained"
    )
    for axis, (name, (sizes, costs)) in zip(axes, measured.items(), strict=True):
        slope, intercept, fit_ = fit_line(sizes, costs)
        axis.plot(
            [0, max(sizes)], [intercept, slope * max(sizes) + intercept], color="0.6", linewidth=1
        )
        axis.plot(sizes, costs, "o")
        unit = "wall seconds" if name == "trials" else "processor seconds"
        axis.set(xlabel=name, ylabel=unit, title=f"R2 = {fit_:.4f}", xlim=(0, None), ylim=(0, None))
    figure.savefig(path)


def worker_steps(
    workers: WorkerGroup, model: str, batch: int, n: int
) -> tuple[list[float], list[float]]:
    """Return wall and processor seconds of n steps of GAIRAT with PGD-10, after a warm-up
    step. Processor seconds are those of this worker, with its communication.
    """
    config = build_training_config(
        "gairat", {"*.burn_in": 0, "model.name": model, "data.val_size": 64}
    )
    data = load_data(config.data)
    faces = build_model_variants(config, data, CPU, workers)
    faces.model.train()
    rows = next(iter(data.iter_train_batches(batch, 0, 0, workers.rank, workers.size)))
    rng = ExampleRng.for_examples(rows.index, 0, "train", 0)
    walls, processor = [], []
    for _ in range(n + 1):
        workers.all_reduce_sum(torch.zeros(()))
        started, started_processor = time.perf_counter(), time.process_time()
        compute_step_gradients(config.resolve_at(0).method, faces, rows, rng, workers)
        processor.append(time.process_time() - started_processor)
        workers.all_reduce_sum(torch.zeros(()))
        walls.append(time.perf_counter() - started)
    return walls[1:], processor[1:]


@dataclass(frozen=True)
class Variant:
    """Processes that compute steps at the same time.

    Attributes:
        size: Number of processes.
        threads: Threads of each.
        is_joined: Whether they share the batch. If not, each has its own part of the batch alone,
            which is the limit of what sharing can reach.
    """

    size: int
    threads: int
    is_joined: bool = True


def _process(
    rank: int, variant: Variant, port: int, folder: str, model: str, batch: int, n: int
) -> None:
    torch.set_num_threads(variant.threads)
    workers: WorkerGroup = SINGLE_WORKER
    if variant.size > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", address, rank=rank, world_size=variant.size)
        dist.barrier()
    if variant.size > 1 and variant.is_joined:
        workers = DistributedWorkerGroup()
    own_batch = batch if variant.is_joined else batch // variant.size
    timings = worker_steps(workers, model, own_batch, n)
    if rank == 0:
        np.save(Path(folder) / "timings.npy", timings)
    if variant.size > 1:
        dist.destroy_process_group()


def in_processes(variant: Variant, model: str, batch: int, n: int) -> list[list[float]]:
    with socket.socket() as free, TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        mp.start_processes(
            _process,
            (variant, port, folder, model, batch, n),
            nprocs=variant.size,
            start_method="forkserver",
        )
        timings: list[list[float]] = np.load(Path(folder) / "timings.npy").tolist()
        return timings


FIRST, SHARED = "1 worker, 1 thread", "2 workers, 1 thread each"
VARIANTS = {
    FIRST: Variant(1, 1),
    "1 worker, 2 threads": Variant(1, 2),
    SHARED: Variant(2, 1),
    "2 processes with half a batch each, no communication": Variant(2, 1, is_joined=False),
}


def measure_workers(
    model: str, batch: int, n: int, repeats: int, variants: dict[str, Variant]
) -> list[Ratio]:
    """Measure the variants in interleaved rounds."""
    walls: dict[str, list[float]] = {name: [] for name in variants}
    processor: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            wall, spent = in_processes(variant, model, batch, n)
            walls[name] += wall
            processor[name] += spent
    time_of, spent_of = medians(walls), medians(processor)
    rows = [
        [
            name,
            f"{time_of[name]:.3f}",
            f"{time_of[FIRST] / time_of[name]:.2f}",
            f"{spent_of[name]:.3f}",
            f"{spent_of[FIRST] / spent_of[name]:.2f}",
        ]
        for name in variants
    ]
    print(
        f"\nWorkers, GAIRAT, {model} on digits, batch {batch}, medians of {n} x {repeats} steps; "
        f"{describe_machine()}\n"
    )
    head = ["workers", "wall s a step", "speedup", "processor s of the first", "speedup by these"]
    print(format_table(head, rows), flush=True)
    cores = f"2 on idle cores ({os.cpu_count()}, load {os.getloadavg()[0]:.0f})"
    return [
        Ratio(
            f"1 to 2 workers of training, {model}, batch {batch}",
            f"{time_of[FIRST] / time_of[SHARED]:.2f}"
            f" ({spent_of[FIRST] / spent_of[SHARED]:.2f} by processor seconds)",
            cores,
            f"{n * repeats} steps",
        )
    ]


class SilentWorkerGroup(SingleWorkerGroup):
    """One of two workers that never communicates: it takes its own sums for those of both."""

    size = 2


def measure_batch_norms(model: str, batch: int, n: int, repeats: int) -> None:
    """Measure the processor seconds of a step of one worker without communication, in interleaved
    rounds: with plain and with synchronised batch norms.
    """
    variants: dict[str, tuple[WorkerGroup, int]] = {
        f"plain, {batch} images": (SINGLE_WORKER, batch),
        f"plain, {batch // 2} images": (SINGLE_WORKER, batch // 2),
        f"synchronised, {batch // 2} images": (SilentWorkerGroup(), batch),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, (workers, size) in variants.items():
            seconds[name] += worker_steps(workers, model, size, n)[1]
    whole = medians(seconds)[next(iter(variants))]
    rows = [
        [name, f"{min(found):.2f}, {middle:.2f}, {max(found):.2f}", f"{whole / middle:.2f}"]
        for (name, found), middle in zip(seconds.items(), medians(seconds).values(), strict=True)
    ]
    print(
        f"\nBatch norms, GAIRAT, {model} on digits, {n} x {repeats} steps; {describe_machine()}\n"
    )
    head = ["batch norms", "processor s a step: least, median, most", "speedup"]
    print(format_table(head, rows), flush=True)


def run(full: bool = False) -> list[Ratio]:
    """Run the part of `python benchmarks`; small sizes unless `full`."""
    if not full:
        few = {name: VARIANTS[name] for name in (FIRST, SHARED)}
        return [
            *measure_cost_lines([1, 2], [32, 64], [1, 2], 1, None, small=True),
            *measure_workers("digits_cnn", 16, 1, 1, few),
        ]
    plot = Path(__file__).parent / "scaling.svg"
    return [*measure_cost_lines(*SIZES, 2, plot), *measure_workers("resnet18", 64, 2, 2, VARIANTS)]


def main() -> None:
    parser = create_parser(__doc__)
    parts = ["lines", "workers", "norms"]
    parser.add_argument("--what", nargs="+", choices=parts, default=parts)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "lines" in args.what:
        measure_cost_lines(*SIZES, 2, args.plot)
    if "workers" in args.what:
        measure_workers(args.model, args.batch, 2, args.repeats, VARIANTS)
    if "norms" in args.what:
        measure_batch_norms(args.model, args.batch, 1, args.repeats)


if __name__ == "__main__":
    main()
