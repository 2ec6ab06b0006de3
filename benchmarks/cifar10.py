"""Train ResNet-18 on CIFAR-10 and evaluate it with AutoAttack: time of an epoch and of its
validation, throughput, and accuracies.

    python benchmarks/cifar10.py --data-dir DIR --epochs 20 --methods at gairat lrat --examples 1000

DIR contains `train.npz` and `test.npz` (see `raysweep list`, arrays). A GPU is recommended, not
required. The learning rate falls at 2/3 and 5/6 of the epochs; GAIRAT's burn-in ends at half. If
torchattacks is installed, its attacks and ours alternate on the first `--against` images.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import autoattack
import numpy as np
import torch
from command_line import create_parser
from measure import DEVICE, Flops, describe_machine, format_table, measure_matrix_rate

from raysweep.data import DatasetSplits, load_data
from raysweep.evaluation import evaluate
from raysweep.evaluation.float32_precision import disable_tf32_and_autocast
from raysweep.rng import ExampleRng
from raysweep.training.callbacks import FunctionCallback
from raysweep.training.config import TrainingConfig, build_training_config
from raysweep.training.model_variants import ModelVariants
from raysweep.training.speed_settings import ComputeSpec
from raysweep.training.trainer import TrainingResult, compute_step_gradients, train_model
from raysweep.yaml_files import parse_yaml

FAST = {"compute.attack": "bf16", "compute.train": "bf16", "compute.compile": True}


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["gairat"])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--examples", type=int, default=1000, help="test images for AutoAttack")
    parser.add_argument(
        "--against", type=int, default=0, help="test images for torchattacks in turn with ours"
    )
    parser.add_argument(
        "--plain", action="store_true", help="without the fast paths that are off by default"
    )
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--out", type=Path, help="keep the checkpoints here")
    args = parser.parse_args()
    changes = dict(part.split("=", 1) for part in args.set)
    print(describe_machine(), flush=True)
    rows: list[list[str]] = []
    for method in args.methods:
        config = build_config(
            method, args.data_dir, args.epochs, {} if args.plain else FAST, changes
        )
        data = load_data(config.data)
        with TemporaryDirectory() as folder:
            found = train_model(
                config,
                (args.out or Path(folder)) / method,
                FunctionCallback(print_epoch),
                data=data,
                device=DEVICE,
            )
            model = (
                found.best_checkpoint.load_weights(
                    config.model.build_model(data.channels, data.classes, 0)
                )
                .to(DEVICE)
                .eval()
            )
        rows.append(
            [
                method,
                *training_cells(config, data, found),
                *evaluation_cells(config, data, model, args),
            ]
        )
        head = ["method", "s per epoch", "images / s", "share of matrix rate",
                "validation / training time", "clean, validation", "PGD-20, validation",
                "worst, validation", "AutoAttack, test", "clean, test", "test images",
                "s of AutoAttack"]  # fmt: skip
        print(format_table(head, rows), flush=True)


def build_config(
    method: str, folder: Path, epochs: int, fast: dict[str, Any], changes: dict[str, str]
) -> TrainingConfig:
    base: dict[str, Any] = {
        "data.name": "arrays",
        "data.data_dir": str(folder),
        "epochs": epochs,
        **({"*.burn_in": epochs // 2} if "gair" in method else {}),
        "validation.every": 2,
        "optim.lr": {
            "kind": "piecewise",
            "boundaries": [epochs * 2 // 3, epochs * 5 // 6],
            "values": [0.1, 0.01, 0.001],
        },
    }
    return build_training_config(
        method, base, fast, {path: parse_yaml(value) for path, value in changes.items()}
    )


def print_epoch(row: dict[str, float], checkpoint: object) -> None:
    said = {
        key: round(row[key], 4)
        for key in ("train/loss", "train/seconds", "clean", "robust_worst")
        if key in row
    }
    print(int(row["epoch"]), said, flush=True)


def training_cells(config: TrainingConfig, data: DatasetSplits, found: TrainingResult) -> list[str]:
    """Return the cells about training: seconds, images per second and share of the matrix rate of
    the median epoch (without the first), share of validation in the time, and best accuracies.
    """
    history = found.last_checkpoint.history
    seconds = float(np.median([row["train/seconds"] for row in history[1:] or history]))
    count = len(data.train.y) // config.batch_size * config.batch_size
    checked = [row["validation_seconds"] for row in history[2:] if "validation_seconds" in row]
    share = np.median(checked) / config.validation.every / seconds if checked else float("nan")
    rate = count * step_flops(config, data) / seconds / measure_matrix_rate(torch.bfloat16)
    best = found.best_checkpoint.history[found.best_checkpoint.epoch - 1]
    return [
        f"{seconds:.1f}",
        f"{count / seconds:.0f}",
        f"{rate:.0%}",
        f"{share:.0%}",
        *(f"{best[key]:.3f}" for key in ("clean", "pgd", "robust_worst")),
    ]


def step_flops(config: TrainingConfig, data: DatasetSplits) -> float:
    """Count the floating-point operations of a training step for one image, averaged over four."""
    model = config.model.build_model(data.channels, data.classes, 0).to(DEVICE).train()
    batch = next(iter(data.to(DEVICE).iter_train_batches(4, 0, 0)))
    faces = ModelVariants(model, batch.x[:1], ComputeSpec().resolve(DEVICE))
    with Flops() as counted:
        compute_step_gradients(
            config.resolve_at(config.epochs - 1).method,
            faces,
            batch,
            ExampleRng.for_examples(batch.index, 0),
        )
    return counted.total / 4


def evaluation_cells(
    config: TrainingConfig, data: DatasetSplits, model: torch.nn.Module, args: argparse.Namespace
) -> list[str]:
    x, y = data.test.x[: args.examples], data.test.y[: args.examples]
    eps = config.validation.attacks["pgd"].eps
    began = time.monotonic()
    report = evaluate(model, x, y, eps=eps)
    seconds = time.monotonic() - began
    print(
        report,
        {name: int(rows.sum()) for name, rows in report.robust_after.items()},
        *report.warnings,
        flush=True,
    )
    print({name: f"{cost.seconds:.1f} s" for name, cost in report.cost.items()}, flush=True)
    if args.against:
        copied = x[: args.against].float() / 255 if x.dtype == torch.uint8 else x[: args.against]
        with disable_tf32_and_autocast(DEVICE):
            autoattack.compare_with_torchattacks(
                model, copied, y[: args.against], eps, "Linf", 0, None
            )
    return [
        f"{report.robust_accuracy:.3f}",
        f"{report.clean_accuracy:.3f}",
        str(len(y)),
        f"{seconds:.0f}",
    ]


if __name__ == "__main__":
    main()
