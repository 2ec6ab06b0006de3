"""Measure the time of a checkpoint in a bucket, with an S3 server on this machine (no network).

    python benchmarks/storage_overhead.py

Prints a Markdown table of median seconds: to save a checkpoint in a folder and in a bucket, to
download it, to check whether a local copy is current, and to store it as a shared prefix.
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from moto.server import ThreadedMotoServer
from pyarrow import fs

from raysweep.models import ModelSpec
from raysweep.stores import StorePath, open_path
from raysweep.stores.local_copies import delete_copy
from raysweep.training import checkpoint
from raysweep.training.config import build_training_config
from raysweep.training.prefix_cache import PrefixCache


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    os.environ.update(
        AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_EC2_METADATA_DISABLED="true"
    )
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    query = f"endpoint_override={host}:{port}&scheme=http"
    fs.FileSystem.from_uri(f"s3://bench?allow_bucket_creation=true&{query}")[0].create_dir("bench")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["RAYSWEEP_CACHE"] = f"{scratch}/copy"
        print(
            "| network | MB | save, folder | save, bucket | download | check copy | store prefix |"
        )
        print("|---|--:|--:|--:|--:|--:|--:|")
        for name, channels in (("digits_cnn", 1), ("resnet18", 3)):
            row = measure_checkpoint(
                name,
                channels,
                open_path(Path(scratch) / "folder"),
                open_path(f"s3://bench/x?{query}"),
                repeats,
            )
            print(
                f"| {name} | {row[0]:.1f} | {' | '.join(f'{value:.3f} s' for value in row[1:])} |",
                flush=True,
            )
    server.stop()


def measure_checkpoint(
    name: str, channels: int, folder: StorePath, bucket: StorePath, repeats: int
) -> list[float]:
    model = ModelSpec(name=name).build_model(channels, 10, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    config, prefixes = build_training_config("at"), PrefixCache(bucket / ".prefixes")

    def save(path: StorePath) -> checkpoint.TrainingCheckpoint:
        return checkpoint.save_checkpoint(
            path,
            config,
            checkpoint.TrainingState.copy_from(model, optimizer),
            [{"epoch": 1.0}],
            "data",
        )

    def download() -> None:
        delete_copy(copy)
        assert (bucket / name).fetch_checkpoint() == copy

    copy = save(bucket / name).local_folder
    size = sum(file.stat().st_size for file in copy.iterdir()) / 2**20
    keys = iter(range(repeats))
    steps: list[Callable[[], object]] = [
        lambda: save(folder / name),
        lambda: save(bucket / name),
        download,
        (bucket / name).fetch_checkpoint,
        lambda: prefixes.store_state(f"{name}{next(keys)}", bucket / name),
    ]
    return [size, *(median_seconds(step, repeats) for step in steps)]


def median_seconds(step: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    main()
