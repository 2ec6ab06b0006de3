"""Measure how long training waits for its checkpoints, which are written beside the next epoch or,
for comparison, before it (`in turn`).

    python benchmarks/checkpoint_writes.py

The network has 11 million weights, so a checkpoint of weights and momentum has 90 MB. The wait is
the wall time of a run minus its steps and validations, divided by the epochs. It includes the last
checkpoint, which no later epoch hides, and the start of the run. Also prints how often `os.fsync`
is called for an epoch.
"""

import os
import time
from concurrent.futures import Executor, Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from command_line import create_parser
from measure import Ratio, describe_machine, format_table, medians

from raysweep.data import load_data
from raysweep.training import trainer
from raysweep.training.config import build_training_config
from raysweep.training.prefix_cache import PrefixCache


class ImmediateExecutor(Executor):
    """Runs each function where it is submitted."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


def time_waits(network: str, epochs: int, images: int) -> tuple[float, float, float]:
    """Train; return three means per epoch: the seconds that are neither steps nor validation, the
    seconds of these, and the number of calls of `os.fsync`.
    """
    config = build_training_config(
        "at",
        {
            "epochs": epochs,
            "model.name": network,
            "data.train_size": images,
            "data.val_size": 16,
            "validation.finish.*.runs": 1,
        },
    )
    data = load_data(config.data)
    started = time.perf_counter()
    with TemporaryDirectory() as folder, mock.patch.object(os, "fsync", wraps=os.fsync) as fsync:
        history = trainer.train_model(
            config,
            Path(folder) / "run",
            data=data,
            prefix_cache=PrefixCache(Path(folder) / "prefixes"),
        ).last_checkpoint.history
        wall = time.perf_counter() - started
    busy = sum(row["train/seconds"] + row["validation_seconds"] for row in history)
    return (wall - busy) / epochs, busy / epochs, fsync.call_count / epochs


def measure(network: str, epochs: int, images: int, n: int) -> list[Ratio]:
    """Measure both ways in n interleaved runs."""
    waits: dict[str, list[float]] = {"in turn": [], "beside the next epoch": []}
    busy: list[float] = []
    n_fsyncs = 0.0
    for _ in range(n):
        for name, executor in (
            ("in turn", lambda *_: ImmediateExecutor()),
            ("beside the next epoch", trainer.ThreadPoolExecutor),
        ):
            with mock.patch.object(trainer, "ThreadPoolExecutor", executor):
                wait, epoch, n_fsyncs = time_waits(network, epochs, images)
            waits[name].append(wait)
            busy.append(epoch)
    wait_of, epoch_seconds = medians(waits), medians({"epoch": busy})["epoch"]
    lines = [
        [name, f"{1000 * wait:.0f}", f"{wait / epoch_seconds:.1%}"]
        for name, wait in wait_of.items()
    ]
    print(
        f"\nWaits for checkpoints, {network}, epochs of {epoch_seconds:.2f} s, medians of {n} "
        f"interleaved runs of {epochs} epochs; {describe_machine()}\n"
    )
    head = ["checkpoints are written", "wait, ms an epoch", "share of an epoch"]
    print(format_table(head, lines), flush=True)
    print(f"\n{n_fsyncs:.1f} calls of os.fsync an epoch")
    return [
        Ratio(f"wait for a checkpoint, {network}, {name}", f"{1000 * wait:.0f} ms", "", f"{n} runs")
        for name, wait in wait_of.items()
    ]


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    measure(args.model, args.epochs, args.images, args.rounds)


if __name__ == "__main__":
    main()
