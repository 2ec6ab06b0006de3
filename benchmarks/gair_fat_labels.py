"""Measure what GAIR-FAT loses if its adversarial images are paired with other images' labels.

    python benchmarks/gair_fat_labels.py

Early-stopped PGD of the authors' code returns its images in the order in which they stopped, with
their labels in the same order. After the burn-in GAIR_FAT.py takes the labels of the batch instead,
in the batch's own order, so that most images have the label of another one. raysweep returns all
rows in the order of the batch. This trains GAIR-FAT on digits with both pairings, and GAIRAT and
FAT beside them, and prints the accuracies of the last checkpoint on the test images.
"""

import statistics
import tempfile
from pathlib import Path

import torch
from command_line import create_parser
from torch import Tensor, nn

from raysweep.attacks import PGD, AttackResult
from raysweep.data import load_data
from raysweep.rng import ExampleRng
from raysweep.schedules import PiecewiseSchedule, Schedule, resolved_value
from raysweep.training.config import TrainingConfig, build_training_config
from raysweep.training.trainer import train_model

COLUMNS = ("clean", "pgd", "cw", "robust_worst")


class StopOrderPGD(PGD):
    """Early-stopped PGD whose rows are in the order in which they stopped.

    Rows that stop after the last step and those that never stop keep their order.
    """

    is_reordered: Schedule = 0
    """1 in the epochs in which the rows are reordered, 0 in the others."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: ExampleRng) -> AttackResult:
        """Attack a batch; see `PGD`."""
        result = super().__call__(model, x, y, rng)
        if not resolved_value(self.is_reordered):
            return result
        assert result.kappa is not None
        order = result.queries.argsort(stable=True)
        return AttackResult(result.x_adv[order], result.queries[order], result.kappa[order])


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (default: 3)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--burn-in", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| method | labels | clean | PGD-20 | CW-20 | worst |")
    print("|---|---|---|---|---|---|")
    for method, is_mispaired in (
        ("fat", False),
        ("gairat", False),
        ("gair-fat", False),
        ("gair-fat", True),
    ):
        rows = []
        for seed in range(arguments.seeds):
            config = build_config(method, seed, arguments.epochs, arguments.burn_in)
            if is_mispaired:
                config = pair_with_batch_labels(config)
            rows.append(train_and_evaluate(config))
        cells = [format_cell([row[name] for row in rows]) for name in COLUMNS]
        labels = "of the batch's order" if is_mispaired else "their own"
        print(f"| {method} | {labels} | {' | '.join(cells)} |", flush=True)


def build_config(method: str, seed: int, epochs: int, burn_in: int) -> TrainingConfig:
    """Return the run of a method on digits; the learning rate drops after 60% and 85%."""
    drops = [round(0.6 * epochs), round(0.85 * epochs)]
    settings = {
        "seed": seed,
        "epochs": epochs,
        "optim.lr": {"kind": "piecewise", "boundaries": drops, "values": [0.05, 0.01, 0.002]},
    }
    if method != "fat":
        settings["method.terms.pgd.weight.burn_in"] = burn_in
    return build_training_config(method, settings)


def pair_with_batch_labels(config: TrainingConfig) -> TrainingConfig:
    """Return a GAIR-FAT run that has the authors' pairing after the burn-in."""
    schedule = PiecewiseSchedule(boundaries=(config.burn_in,), values=(0.0, 1.0))
    attack = config.method.attacks["pgd"]
    fields = {name: getattr(attack, name) for name in type(attack).model_fields}
    mispaired = StopOrderPGD(**fields, is_reordered=schedule)
    method = config.method.model_copy(update={"attacks": {"pgd": mispaired}})
    return config.model_copy(update={"method": method})


def train_and_evaluate(config: TrainingConfig) -> dict[str, float]:
    """Train a run; return the test accuracies of its last checkpoint."""
    data = load_data(config.data)
    with tempfile.TemporaryDirectory() as folder:
        last = train_model(
            config, Path(folder) / "run", data=data, device=torch.device("cpu")
        ).last_checkpoint
        model = last.load_weights(config.model.build_model(data.channels, data.classes, 0))
    return config.validation(model, data.test)


def format_cell(shares: list[float]) -> str:
    """Return the mean in percent, with the standard deviation if there are several."""
    spread = f" ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):.1f}{spread}"


if __name__ == "__main__":
    main()
