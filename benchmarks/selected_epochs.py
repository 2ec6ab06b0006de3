"""Which epoch of a reweighted run is chosen, and which one the maximum over all epochs would be.

    python benchmarks/selected_epochs.py

Trains GAIRAT on digits with a burn-in of half of its epochs, and once with weights that harm.
Within the burn-in GAIRAT is plain AT, so an epoch from there says nothing about its weights. Prints
a Markdown table, and the advice that `raysweep show` gives on each run.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from command_line import create_parser
from measure import describe_machine, format_table

from raysweep.training.config import TrainingConfig
from raysweep.training.metric_advice import advise_on_training
from raysweep.training.metric_history import EpochMetrics
from raysweep.training.presets import resolve_training_config
from raysweep.training.selection import find_best_epoch
from raysweep.training.trainer import train_model

RUNS: tuple[dict[str, Any], ...] = (
    {"epochs": 16, "*.burn_in": 8, "seed": 0},
    {"epochs": 16, "*.burn_in": 8, "seed": 1},
    {"epochs": 6, "*.burn_in": 4, "*.lam": -2},
)


def train_history(config: TrainingConfig) -> list[EpochMetrics]:
    """Return the metrics of all epochs of a run."""
    with tempfile.TemporaryDirectory() as folder:
        return train_model(config, Path(folder) / "run").last_checkpoint.history


def format_row(config: TrainingConfig, history: list[EpochMetrics]) -> list[str]:
    """Return the row of a run."""
    objective = config.validation.objective
    scores = [float(metrics[objective]) for metrics in history]
    highest = max(range(len(scores)), key=scores.__getitem__)
    chosen = find_best_epoch(config, history)
    return [
        str(config.epochs),
        str(config.burn_in),
        str(config.seed),
        f"{highest + 1} ({scores[highest]:.3f})",
        f"{chosen} ({scores[chosen - 1]:.3f})",
    ]


def main() -> None:
    """Train the runs and print the table."""
    create_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    rows, advice = [], []
    for settings in RUNS:
        config = resolve_training_config("gairat", settings)
        history = train_history(config)
        rows.append(format_row(config, history))
        advice.append([settings, *advise_on_training(config, history)])
    head = ["epochs", "burn-in", "seed", "highest of all epochs", "chosen"]
    print(f"{describe_machine()}\n\n{format_table(head, rows)}\n")
    for settings, *lines in advice:
        print(settings, *lines, sep="\n  ")


if __name__ == "__main__":
    main()
