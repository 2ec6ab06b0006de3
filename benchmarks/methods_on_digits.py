"""Train all methods on scikit-learn's digits with equal budgets and print a Markdown table.

    python benchmarks/methods_on_digits.py

Each method is trained with the preset of the data set (8 epochs, burn-in 3) and its own defaults.
Its last checkpoint is evaluated on the 450 test images with PGD-20 and CW-PGD-20 at Linf 0.15.
Columns: `worst` is the accuracy under both attacks together, `gap` is the PGD accuracy minus
`worst`. `low weights` is the largest share, over a method's terms, of training examples whose
weight is below 0.2 of the mean in the last epoch (`lrat` gives most examples the bound 0 by
design). `rst` and `gair-rst` use labelled data only.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from command_line import create_parser

from raysweep.catalog import METHODS
from raysweep.data import load_data
from raysweep.training.config import build_training_config
from raysweep.training.trainer import train_model

COLUMNS = ("clean", "pgd", "cw", "robust_worst", "masking_gap")


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("methods", nargs="*", help="default: all")
    parser.add_argument(
        "--seeds", type=int, default=1, help="seeds 0, 1, ...; the table has means (default: 1)"
    )
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| method | clean | PGD-20 | CW-20 | worst | gap | low weights | s |")
    print("|---|---|---|---|---|---|---|---|")
    for method in arguments.methods or METHODS:
        rows = [row(method, seed, arguments.epochs) for seed in range(arguments.seeds)]
        means = {
            name: statistics.mean(r[name] for r in rows) for name in (*COLUMNS, "low", "seconds")
        }
        scores = " | ".join(f"{100 * means[name]:.1f}" for name in COLUMNS)
        print(
            f"| {method} | {scores} | {100 * means['low']:.0f}% | {means['seconds']:.0f} |",
            flush=True,
        )


def row(method: str, seed: int, epochs: int) -> dict[str, float]:
    """Train one run; return its test accuracies, largest share of low weights, and wall time."""
    config = build_training_config(method, {"seed": seed, "epochs": epochs})
    data, started = load_data(config.data), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        last = train_model(
            config, Path(folder) / "run", data=data, device=torch.device("cpu")
        ).last_checkpoint
        model = last.load_weights(config.model.build_model(data.channels, data.classes, 0))
    low = max(
        value for key, value in last.last_metrics.items() if key.startswith("train/low_weight_")
    )
    seconds = time.perf_counter() - started
    return {**config.validation(model, data.test), "low": low, "seconds": seconds}


if __name__ == "__main__":
    main()
