"""Measure the memory that the data of a trial needs: its own copy, or the cache of the machine.

python benchmarks/shared_data.py        # CIFAR-10's size (random pixels), 1 and 4 processes
"""

import gc
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from command_line import create_parser

from raysweep.data import DataSpec, load_data
from raysweep.data.dataset_cache import CachedDataset


def load_and_report(how: str, spec: DataSpec, fingerprint: str, ready: Any, results: Any) -> None:
    """Load the data, read every pixel, and report private and resident memory of this process."""
    gc.collect()
    before = psutil.Process().memory_full_info()
    began = time.perf_counter()
    data = load_data(spec) if how == "copy" else CachedDataset(spec, fingerprint).load_shared(spec)
    seconds = time.perf_counter() - began
    for split in (data.train, data.val, data.test):
        split.x.sum()
    ready.wait()
    after = psutil.Process().memory_full_info()
    ready.wait()
    results.put((seconds, after.uss - before.uss, after.rss - before.rss))


def measure(how: str, count: int, spec: DataSpec, fingerprint: str) -> tuple[float, float, float]:
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(count), context.Queue()
    trials = [
        context.Process(target=load_and_report, args=(how, spec, fingerprint, ready, results))
        for _ in range(count)
    ]
    for process in trials:
        process.start()
    found = [results.get() for _ in trials]
    for process in trials:
        process.join()
    return tuple(float(np.mean(column)) for column in zip(*found, strict=True))


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--examples", type=int, default=50_000)
    examples = parser.parse_args().examples
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        rng = np.random.default_rng(0)
        for split, count in (("train", examples), ("test", examples // 5)):
            x = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
            np.savez(Path(folder) / f"{split}.npz", x=x, y=np.arange(count) % 10)
        spec = DataSpec(name="arrays", data_dir=Path(folder))
        fingerprint = load_data(spec).fingerprint
        CachedDataset(spec, fingerprint).load_shared(spec)
        print(f"{examples} + {examples // 5} images, {1.2 * examples * 3072 / 2**20:.0f} MiB")
        print(
            "| how | processes | seconds | private MiB each (USS) | resident MiB each |\n"
            "|---|---:|---:|---:|---:|"
        )
        for how in ("copy", "shared"):
            for count in (1, 4):
                seconds, uss, rss = measure(how, count, spec, fingerprint)
                print(
                    f"| {how} | {count} | {seconds:.2f} | {uss / 2**20:.0f} | {rss / 2**20:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
